"""The report: its statistics by hand, its verdicts, its plan, its text from made-up records, a kill and a restart."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

import analysis
import claims
import config as settings
import experiments
import reproduce
import writeup
from files import InputError

ROOT = Path(__file__).resolve().parents[1]


# --- records ---------------------------------------------------------------------------------------------------------


def packed(*queries):
    return "".join(np.base_repr(query, 36).zfill(2) for query in queries)


def base_run(rule, rerule, first_replay=3, tau=0.5, kinds="ffbb"):
    """A base run of two groups a step; rule, rerule: one string of two characters a step."""
    steps = [packed(0, 2), packed(1, 3)] * (len(rule) // 2)

    def method(rewards, first):
        seconds = {f"seconds_{part}": 1.0 for part in analysis.PARTS}
        return {
            "rewards": rewards, "first_replay": first, "response_tokens": 100, "replay_groups": 6 if first else 0,
            "replay_skipped": 0, "ess": 0.95, "ess_unclipped": 0.5, "clipped_share": 0.7, "evaluations": [], **seconds,
        }  # fmt: skip

    return {
        "family": "base", "seed": 21, "args": ["--seed", "21"], "tau": tau, "steps": len(rule), "queries": steps,
        "kinds": kinds, "rows": {}, "methods": {"rule": method(rule, None), "rerule": method(rerule, first_replay)},
        "cases": [[0, "forget", "Q0?", "A"], [2, "boundary", "Q2?", "B"]],
    }  # fmt: skip


def test_a_group_is_one_character():
    assert [analysis.level(r) for r in ([0.0] * 8, [1.0] * 8, [0.5] * 8, [0.0] * 4 + [1.0] * 4, [0.5] + [0.0] * 7)] == [
        "0", "g", "=", "8", "1"]  # fmt: skip
    assert [analysis.mean_reward(c) for c in "0g=81"] == [0, 1, 0.5, 0.5, 1 / 16]
    assert [analysis.all_equal(c) for c in "0g=81"] == [True, True, True, False, False]


def test_regions_are_fixed_before_replay():
    # queries 0 and 2 in odd steps, 1 and 3 in even ones; replay starts at step 3; what comes then counts nothing
    base = base_run(rule=["g0", "84", "0g", "08", "0g", "0g"], rerule=["g0", "84", "gg", "gg", "gg", "gg"])
    assert analysis.before_replay(base) == {0: [1.0], 2: [0.0], 1: [0.5], 3: [0.25]}
    assert analysis.regions(base) == {0: "easy", 2: "hard", 1: "easy", 3: "hard"}
    assert analysis.hard_share(base, 0.5) == 0.5
    assert analysis.hard_share(base, 0.6, "f") == 0.5 and analysis.hard_share(base, 0.5, "b") == 1
    late = analysis.groups_of(base, "rule", last=True)  # steps 5 and 6 of 6
    assert late == [(5, 0, 0.0, True), (5, 2, 1.0, True), (6, 1, 0.0, True), (6, 3, 1.0, True)]
    outcome = analysis.outcome(base, "rule", base)
    assert (outcome["late_hard"], outcome["late_easy"], outcome["late_cases"]) == (1, 0, 0.5)
    assert outcome["seconds_stage2"] == 4


def test_arithmetic_by_hand():
    rows = [{"response_tokens": 10}, {"response_tokens": 20, "replay_groups": 4, "replay_skipped": 1}]
    assert analysis.arithmetic(rows) == 5 * 10 + (5 + 3 * 0.75) * 20


def test_recall_of_neighbours_weighs_phrasings_and_worlds():
    row = {
        "hard_trained_recall": 60.0,
        "hard_heldout_recall": 30.0,
        "easy_trained_recall": 90.0,
        "easy_heldout_recall": 90.0,
    }
    run = {"rows": {"RULE": row | {"retain_recall": 70.0, "forget_recall": 5.0}}, "methods": {}}
    outcome = analysis.outcome(run, "rule", None)
    assert outcome["hard"] == 50 and outcome["easy"] == 90
    assert outcome["balance"] == pytest.approx(2 / (1 / 70 + 1 / 95))
    assert outcome["heldout"] == pytest.approx((22 * 30 + 20 * 90) / 42)


# --- statistics ------------------------------------------------------------------------------------------------------


def test_bootstrap_interval():
    assert analysis.bootstrap([2.0] * 5) == (2, 2)
    values = [1.0, 2.5, 0.5, 4.0, 3.0, 2.0, -1.0, 1.5]
    other = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20000).confidence_interval
    assert analysis.bootstrap(values) == pytest.approx((other.low, other.high), abs=0.1)
    assert analysis.bootstrap(values) == analysis.bootstrap(values)


def test_statistic_by_hand():
    stat = analysis.statistic([1.0, 2.0, None, 3.0, -1.0, 0.0])
    assert (stat["n"], stat["up"], stat["down"], stat["mean"]) == (5, 3, 1, 1.0)
    assert stat["sd"] == pytest.approx(math.sqrt(10 / 4))
    assert stat["p"] == pytest.approx(2 * 5 / 16)  # 3 or more of 4 on either side
    assert analysis.statistic([1.0]) is None
    assert analysis.statistic([0.0, 0.0])["p"] == 1


def test_differences_are_paired_by_seed():
    a, b = {1: {"x": 5.0}, 2: {"x": 7.0}, 3: {"x": 1.0}, 9: {"x": 0.0}}, {1: {"x": 4.0}, 2: {"x": 4.0}, 3: {"x": None}}
    assert analysis.paired(a, b, "x")["values"] == [1, 3]


def test_instability_is_over_the_last_third():
    evaluations = [{"step": s, "retain_recall": v} for s, v in ((2, 0), (4, 90), (6, 10), (8, 50), (10, 54), (12, 55))]
    sd, rest = analysis.instability(evaluations)  # last third: steps 10 and 12 of 12, too few for a line
    assert sd is None and rest is None
    rising = [{"step": s, "retain_recall": 10.0 * s} for s in range(1, 13)]
    sd, rest = analysis.instability(rising)  # steps 9 to 12: 90, 100, 110, 120
    assert sd == pytest.approx(math.sqrt(500 / 3)) and rest == pytest.approx(0, abs=1e-9)


def test_slope_and_rank_correlation():
    assert analysis.slope([(0, 1), (1, 3), (2, 5)]) == pytest.approx(2)
    assert analysis.rank_correlation([1, 2, 3], [5, 9, 100]) == pytest.approx(1)
    assert analysis.rank_correlation([1, 2, 3], [4, 4, 4]) is None


def test_bound_by_hand():
    base = base_run(rule=["g0", "84"] * 3, rerule=["g0", "84"] * 3)
    found = analysis.bound(base, base)
    # p_H = 1/2, 100 sampled tokens in 12 groups, 6 groups replayed: N_on 50, N_re 50
    assert (found["p_hard"], found["n_on"], found["n_re"]) == (0.5, 50, 50)
    assert found["n_eff_clipped"] == pytest.approx(50 + 0.95 * 50)
    assert found["bound_unclipped"] == pytest.approx(math.sqrt(50 / 75))


def test_choice_of_rates_and_steps():
    def run(rule, rerule, ratio=1.25):
        rows = {name: {"retain_recall": v, "forget_recall": 1.0} for name, v in (("RULE", rule), ("ReRULE", rerule))}
        return {
            "rows": rows,
            "steps": 32,
            "methods": {"rule": {"arithmetic": 4.0}, "rerule": {"arithmetic": 4 * ratio}},
        }

    records = {"select_11": run(10, 40), "grid2_11": run(30, 20), "select_12": run(20, 30), "grid2_12": run(25, 35)}
    for record in records.values():
        record["methods"] = {
            name: base_run(["g0"], ["g0"])["methods"]["rule"] | m for name, m in record["methods"].items()
        }
    chosen = analysis.choose(records, (11, 12), ("1", "2"))
    assert chosen == {"rule": "2", "rerule": "1", "steps": 40, "ratio": 1.25}
    assert analysis.choose(records, (11, 12, 13), ("1", "2")) is None


# --- verdicts --------------------------------------------------------------------------------------------------------


def stat(mean, low, high):
    return {"values": [1.0] * 5 + [-1.0] * 3, "mean": mean, "low": low, "high": high, "n": 8}


def test_verdicts():
    assert claims.verdict(stat(2, 1, 3)) == "holds"
    assert claims.verdict(stat(2, -1, 3)) == "holds in direction"
    assert claims.verdict(stat(-2, -3, 1)) == "not seen"
    assert claims.verdict(stat(-2, -3, -1)) == "opposite"
    assert claims.verdict(stat(2, 1, 3), bar=1.5) == "holds in direction"
    assert claims.verdict(stat(0, 0, 0)) == "not seen" and claims.verdict(stat(0, 0, 0), -1) == "holds"


def test_the_worst_part_counts():
    good, weak = claims.Part("", stat(2, 1, 3)), claims.Part("", stat(2, -1, 3))
    assert claims.overall([good, weak]) == "holds in direction"
    assert claims.overall([good, claims.Part("", None)]) == "not run"


@pytest.mark.parametrize(
    "found, expected",
    [((0, -1, 1), "holds"), ((1, -1, 3), "holds in direction"), ((3, 1, 5), "not seen"), ((5, 3, 7), "opposite"),
     ((-5, -7, -3), "opposite")],
)  # fmt: skip
def test_no_change_has_two_sides(found, expected):
    assert claims.overall(claims.unchanged("", stat(*found))) == expected


def test_a_figure_is_one_line():
    assert claims.figure(stat(8.61, 5.2, 11.93), " points") == "+8.6 points [+5.2, +11.9], 5 up 3 down, p = 0.73"
    assert claims.figure(stat(0.123, -0.2, 0.3)) == "+0.12 [-0.20, +0.30], 5 up 3 down, p = 0.73"
    told = claims.shown(claims.Part("x", stat(0.5, -1, 1), -1))
    assert told == "x: +0.5 [-1.0, +1.0], 5 above and 0 below -1, p = 0.062"
    pair = claims.unchanged("x", stat(0.5, -1, 1), "")
    assert claims.shown(pair[0]).endswith("5 up 3 down, p = 0.73") and claims.shown(pair[1]) == ""


# --- the plan --------------------------------------------------------------------------------------------------------


def options(**changes):
    return reproduce.Options(tofu_dir="DATA", **changes)


def selected(monkeypatch):
    chosen = {"rule": "8e-5", "rerule": "1.6e-4", "steps": 42, "ratio": 1.3}
    monkeypatch.setattr(analysis, "choose", lambda *_: chosen)


def test_choices_come_before_what_needs_them():
    waiting = [job.family for job in experiments.plan(options(), {}) if job.args is None]
    assert set(waiting) == {"compute", "best_rule", "best_rerule"}


@pytest.mark.parametrize("quick", [False, True])
def test_every_run_of_the_plan_is_a_valid_command(monkeypatch, quick):
    selected(monkeypatch)
    jobs = experiments.plan(options(quick=quick, seeds=2), {})
    names = {job.name for job in jobs}
    assert len(names) == len(jobs)
    known = {*settings.METHODS, *getattr(settings, "ALIASES", {})}
    for job in jobs:
        assert job.start is None or job.start in names
        args = [arg.format(tofu_dir="DATA") for arg in job.args]
        if job.family == "baselines" and "ga" not in known:
            continue
        config = settings.resolve(settings.parse(settings.Config, args))
        assert config.seed == job.seed and config.seed not in (*range(11), *range(1, 6))
    assert not {job.seed for job in jobs if job.family in ("select", "grid")} & {
        job.seed for job in jobs if job.family not in ("select", "grid")}  # fmt: skip


def test_two_updates_a_batch_from_the_start(monkeypatch):
    selected(monkeypatch)
    (job,) = [job for job in experiments.plan(options(quick=True, seeds=2), {}) if job.name == "twice_21"]
    config = settings.resolve(settings.parse(settings.Config, list(job.args)))
    assert (config.replay_store, config.min_groups, config.warmup_steps, config.method[-1]) == (
        "current",
        1,
        0,
        "rerule",
    )


def test_the_whole_plan_fits_its_budget(monkeypatch):
    selected(monkeypatch)
    assert sum(job.cost for job in experiments.plan(options(), {})) < 2 * 90 * 60
    assert sum(job.cost for job in experiments.plan(options(quick=True, seeds=2), {})) < 2 * 10 * 60


def test_time_left():
    assert reproduce.time_left(1200, 0, 50, 2) == "about 10 min left"  # nothing done yet: the plan's own seconds
    assert reproduce.time_left(600, 300, 120, 2) == "about 4 min left"


def test_only_takes_a_part_and_what_it_starts_from(monkeypatch):
    jobs = experiments.wanted(options(only=["table4"], seeds=3), experiments.plan(options(seeds=3), {}))
    assert {job.family for job in jobs} == {"base", "random", "combined", "combined_random"}
    jobs = experiments.wanted(options(only=["tofu"], seeds=3), experiments.plan(options(seeds=3), {}))
    assert {job.family for job in jobs} == {"tofu", "tofu_random"}


def test_every_part_of_a_claim_has_its_runs_in_the_plan():
    families = {job.family for job in experiments.plan(options(), {})}
    assert {f for section in experiments.SECTIONS.values() for f in section} <= families
    assert families - {"select", "grid"} <= {f for section in experiments.SECTIONS.values() for f in section}


@pytest.mark.parametrize(
    "argv, line",
    [(["--only", "table9"], "--only table9: expected some of table1,"),
     (["--seeds", "1"], "--seeds, --workers: expected at least 2 seeds"),
     (["--tofu_dir", "nowhere"], "--tofu_dir nowhere: holds no forget01.json")],
)  # fmt: skip
def test_bad_flags(argv, line, tmp_path):
    with pytest.raises(InputError, match=line.split(":")[0]) as error:
        reproduce.main([*argv, "--output_dir", str(tmp_path / "out")])
    assert line in str(error.value)
    assert not (tmp_path / "out").exists()


def test_bad_records(tmp_path):
    (tmp_path / "records.json").write_text('{"runs": ')
    with pytest.raises(InputError, match="records.json: cannot be read"):
        reproduce.main(["--output_dir", str(tmp_path)])
    (tmp_path / "records.json").write_text('{"runs": {"base_21": {"args": ["--steps", "14"]}}}')
    with pytest.raises(InputError, match="holds a quick run"):
        reproduce.main(["--output_dir", str(tmp_path)])


# --- the report ------------------------------------------------------------------------------------------------------


def made_up(job):
    """A record for a job that never ran, with plausible shapes and values that differ from seed to seed."""
    rng = np.random.default_rng(sum(map(ord, job.name)))
    about = {"family": job.family, "seed": job.seed, "args": list(job.args), "commit": "c0ffee", "seconds": 9.0,
             "versions": {"python": "3", "torch": "2"}}  # fmt: skip
    if job.family == "probe":
        figures = {"queries": 4, "norm": 1.0, "weighted": float(rng.random()), "equal": 0.5, "missed": 0.1,
                   "false": 0.2, "n_forget": 8, "n_boundary": 8}  # fmt: skip
        return about | {"models": {m: {"easy": figures, "hard": figures} for m in ("Rej. Steer", "RULE", "ReRULE")}}
    names = ["Rej. Steer", "Original", "Retained", "RULE", "ReRULE"]
    names = ["GA", "PURGE"] if job.family == "baselines" else names
    row = lambda: {k: float(rng.uniform(40, 60)) for k in analysis.KEPT if k != "stopped"}  # noqa: E731
    early = ["gg840g8400"] * 2  # ten prompts, all asked in each of twelve steps
    late = lambda: ["".join(rng.choice(list("048cg"), 10)) for _ in range(10)]  # noqa: E731
    run = base_run(early + late(), early + late(), kinds="fffffbbbbb") | {"queries": [packed(*range(10))] * 12}
    run["cases"] = [[4, "forget", "Q4?", "A"], [9, "boundary", "Q9?", "B"]]
    for method in run["methods"].values():
        method["evaluations"] = [
            {"step": s, "retain_recall": float(rng.random()), "forget_refusal": 99.0} for s in range(1, 13)
        ]
        method["arithmetic"] = 100.0
    run["methods"]["rerule"] |= {"seconds_replay": float(rng.uniform(1, 2)), "replay_groups": int(rng.integers(4, 9))}
    return run | about | {"rows": {name: row() for name in names}, "lr": 4e-5}


@pytest.fixture
def records(monkeypatch):
    selected(monkeypatch)
    jobs = experiments.plan(options(seeds=3), {})
    return {job.name: made_up(job) for job in jobs}, jobs


def test_the_report_has_every_part_and_is_the_same_again(records, tmp_path):
    runs, jobs = records
    writeup.write(tmp_path, options(seeds=3), runs, jobs)
    text, pictures = (tmp_path / "report.md").read_text(), {p.name: p.read_bytes() for p in tmp_path.glob("*.png")}
    assert "Not run" not in text and "not run" not in text and "missing" not in text
    for number in (1, 3, 4, 6, 7, 8):
        assert f"Table {number}" in text or f"Tables {number}," in text
    assert all(f"Figure {number}" in text for number in (1, 2, 3))
    assert all(f"({name})" in text for name in pictures) and len(pictures) == 8
    assert "commit c0ffee" in text and "python reproduce.py --seeds 3 --tofu_dir DATA/tofu" in text
    assert sum(line.startswith("| ") and line.endswith("` |") for line in text.splitlines()) >= 14  # claims
    assert "nan" not in text
    writeup.write(tmp_path, options(seeds=3), runs, jobs)
    assert (tmp_path / "report.md").read_text() == text
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.png")} == pictures


def test_the_report_says_what_is_missing(records, tmp_path):
    runs, jobs = records
    runs = {name: run for name, run in runs.items() if run["family"] in ("base", "random")}
    writeup.write(tmp_path, options(seeds=3), runs, jobs)
    text = (tmp_path / "report.md").read_text()
    assert f"{len(jobs) - 6} of {len(jobs)} runs are missing" in text
    assert text.count("Not run") >= 5 and "**not run**" in text
    writeup.write(tmp_path, options(seeds=3), {}, jobs)
    assert "No runs yet" in (tmp_path / "report.md").read_text()


def test_every_function_in_the_pipelines_picture_exists():
    import figures

    for *_, name, _ in figures.BOXES:
        module, function = name.split(".")
        assert callable(getattr(importlib.import_module(module), function)), name


def test_the_papers_figures():
    paper = json.loads((ROOT / "paper.json").read_text(encoding="utf-8"))
    assert paper["table2"]["ReRULE"]["utility"] - paper["table2"]["RULE"]["utility"] == pytest.approx(9.9)
    assert paper["table1"]["RULE"]["forget_all"] == pytest.approx((28.0 + 16.8 + 38.3) / 3, abs=0.05)
    assert paper["table5"]["ReRULE"] == {"forget_quality": 0.165, "model_utility": 0.6076, "forget_rouge_l": 0.1322}


def test_gradients_and_mis_refusals_by_a_naive_computation():
    """One region's norm by plain autograd over the same rollouts, its rates by counting them."""
    import torch

    import gradients
    import world
    from config import Config
    from data import Benchmark, stop_ids
    from grpo import collate, plain_response_logprobs
    from rerule import rollout
    from reward import is_refusal

    benchmark = world.World(0).benchmark()
    queries = benchmark.queries[:4]
    texts = [p.plain for p, _ in benchmark.taught] + [answer for _, answer in benchmark.taught]
    tokenizer = world.word_tokenizer(texts)
    model = world.tiny_llama(tokenizer, 0, 16, 1, 64).eval()
    config = Config(group_size=6, max_new_tokens=5, seed=3, max_tokens=60, loss_norm="sequence", kl_coef=0.01)
    small, place = Benchmark("builtin", [], queries), {0: "hard", 1: "easy", 2: "hard", 3: "hard"}
    stops = stop_ids(tokenizer, model, False)
    found = gradients.regions_of(model, tokenizer, small, place, config)
    assert found["hard"]["queries"] == 3 and found["easy"]["queries"] == 1
    groups, answers, _ = rollout(model, tokenizer, queries, [0, 2, 3], stops, config, "probe hard")
    loss = 0
    for group in groups:
        logprobs = plain_response_logprobs(model, collate([group], "cpu"), 1.0)
        means = (logprobs * group.mask).sum(-1) / group.mask.sum(-1)
        loss = loss - (group.advantages * means).mean() / 3
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert found["hard"]["norm"] == pytest.approx(norm, rel=1e-3) and norm > 0
    assert found["hard"]["weighted"] == pytest.approx(0.75 * norm, rel=1e-3)
    of_kind = [part for i, part in zip([0, 2, 3], answers, strict=True) if queries[i].kind == "forget"]
    forget = [is_refusal(text) for part in of_kind for text in part]
    assert found["hard"]["missed"] == pytest.approx(1 - sum(forget) / len(forget), abs=1e-4)
    assert found["hard"]["n_forget"] == len(forget)


# --- running ---------------------------------------------------------------------------------------------------------

SMALL = (
    "--tiny_epochs 0.3 --tiny_hidden 32 --tiny_layers 1 --sft_steps 2 --sft_stop 0 --steps 4 --group_size 8 "
    "--prompts_per_step 8 --tau 1 --min_groups 4 --warmup_steps 1 --replay_groups 4 --max_new_tokens 4 --save_every 1"
)
CHILD = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import reproduce, test_reproduce
reproduce.plan = test_reproduce.small_plan
if __name__ == "__main__":
    reproduce.main(["--output_dir", sys.argv[1], "--workers", "1", "--only", "table4", "appendix_e"])
"""


def small_plan(o, records):
    base = (*SMALL.split(), "--eval_every", "2", "--seed", "21")
    variant = (*SMALL.split(), *"--eval_every 0 --method rerule --replay_store random --seed 21".split())
    return [
        experiments.Job("base_21", "base", 21, base, None, 9),
        experiments.Job("random_21", "random", 21, variant, "base_21", 3),
        experiments.Job("probe_21", "probe", 21, ("--seed", "21"), "base_21", 3),
    ]


def reproduce_small(folder, script, until=None):
    """Run the small plan in a process of its own; with `until`, kill it outright once that holds."""
    script.write_text(CHILD)
    process = subprocess.Popen([sys.executable, script, folder], stderr=subprocess.PIPE, text=True)
    while until and process.poll() is None and not until():
        time.sleep(0.02)
    if until:
        assert process.poll() is None, process.communicate()[1]
        os.kill(process.pid, signal.SIGKILL)
    error = process.communicate(timeout=120)[1]
    assert until or process.returncode == 0, error


def figures_of(folder):
    """Records without times."""
    runs = json.loads((folder / "records.json").read_text())["runs"]
    return without_times(runs)


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not k.startswith("seconds")}
    return value


def test_killed_and_started_again_it_goes_on(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    reproduce_small(whole, tmp_path / "child.py")
    assert sorted(p.name for p in (whole / "runs" / "base_21").iterdir()) == [
        "config.json", "metrics.jsonl", "record.json", "samples.jsonl.gz", "table.json"]  # fmt: skip

    reproduce_small(parts, tmp_path / "child.py", until=lambda: (parts / "runs" / "base_21" / "rule").exists())
    assert not (parts / "records.json").exists()
    time.sleep(1.5)  # a worker whose parent is gone ends
    reproduce_small(parts, tmp_path / "child.py")
    assert figures_of(parts) == figures_of(whole)

    before = {p.name: p.read_bytes() for p in parts.iterdir() if p.is_file()}
    reproduce_small(parts, tmp_path / "child.py")
    assert {p.name: p.read_bytes() for p in parts.iterdir() if p.is_file()} == before
