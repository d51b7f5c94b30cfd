"""`python -m reproduce.attacks`: its plan, its cells, its report from made-up records."""

import json
from functools import partial
from pathlib import Path

import pytest
from scipy.stats import ttest_1samp

from baselines import METHODS
from config import InputError
from reproduce import attacks
from reproduce.statistics import half_width, spread
from rerule import configure

OPTIONS = attacks.Options(seeds=5, tofu_dir="DATA")


def record(family, seed, rows, first_replay=11):
    methods = {"rerule": {"first_replay": first_replay}} if "ReRULE" in rows else {}
    return {"family": family, "seed": seed, "commit": "abc", "seconds": 3600, "methods": methods, "rows": rows}


def row(retain, leak):
    return {"retain_recall": retain, "leak_64": leak, "membership_auc": 0.987}


def made_up():
    records = {}
    for seed, (retain, leak) in {21: (80.0, 30.0), 22: (84.0, 36.0)}.items():
        rows = {"Original": row(100.0, 100.0), "RULE": row(retain, leak), "ReRULE": row(retain + 8, leak + 10 + seed)}
        records[f"base_{seed}"] = record("base", seed, rows)
        records[f"random_{seed}"] = record("random", seed, {"ReRULE": row(retain + 4, leak)}, None)
    return records


def test_every_job_is_a_command_that_the_driver_takes():
    jobs = attacks.all_jobs(OPTIONS, {})
    families = attacks.PLAN["families"]
    assert len(jobs) == sum(min(5, own.get("first", 5)) for own in families.values())
    assert {job.start for job in jobs} <= {None, *(job.name for job in jobs)}
    for job in [job for job in jobs if job.seed == 21]:
        config = configure([arg.format(tofu_dir="DATA") for arg in job.args])
        assert config.seed == 21 and config.attack == attacks.PLAN["attacks"] and not config.eval_every
        if job.family == "base":
            assert config.method == METHODS
    assert not any("tofu" in job.name for job in attacks.all_jobs(attacks.Options(), {}))
    assert any("tofu" in job.name for job in attacks.all_jobs(attacks.Options(), {"tofu_22": {}}))  # of an earlier call


def test_a_cell_is_the_mean_and_half_a_t_interval():
    cell = partial(spread, width=half_width)
    values = [3.0, 5.0, 4.0, 9.0, 7.0]
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    assert cell(values, 3) == f"5.600 ± {(high - low) / 2:.3f}"
    assert cell([1.0, None], 1) == "1.0" and cell([None], 1) == "–" and cell([2.0], 0, sign="+") == "+2"


def test_the_report_of_made_up_runs(tmp_path):
    attacks.write(tmp_path, made_up())
    text = (tmp_path / "report.md").read_text()
    assert "4 runs, seeds 21–22, 4.0 hours of one CPU thread, commit abc" in text and text.count("Not run.") == 2
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in rows] == [
        "", "Original", "RULE", "ReRULE",  # every method
        "", "RULE", "ReRULE", "ReRULE, random groups (no replay on 2 of 2 seeds)",
    ]  # fmt: skip
    assert "82.0 ± 25.4" in rows[2] and "0.99 ± 0.00" in rows[2]  # t(0.975, 1) = 12.706, sd 2.828
    assert rows[6].endswith("| +8.0 ± 0.0 | +31.5 ± 6.4 |") and rows[5].endswith("|  |  |")
    assert rows[7].endswith("| +4.0 ± 0.0 | +0.0 ± 0.0 |")


def test_the_committed_tables_are_those_of_the_committed_records(tmp_path):
    folder = Path(__file__).parents[2] / "results" / "attacks"
    records = json.loads((folder / "records.json").read_text())["runs"]
    attacks.write(tmp_path, records)
    assert (tmp_path / "report.md").read_text() == (folder / "report.md").read_text()
    assert {job.name for job in attacks.all_jobs(OPTIONS, {})} == set(records)


def test_a_folder_without_tofus_files_is_one_line(tmp_path):
    with pytest.raises(InputError, match="holds no forget01.json"):
        attacks.main(["--tofu_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")])
    with pytest.raises(InputError, match="--seeds 0"):
        attacks.main(["--seeds", "0"])
    assert not (tmp_path / "out").exists()
