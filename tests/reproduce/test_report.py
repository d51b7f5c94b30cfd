"""The report: its text and figures from made-up records."""

import json
import re
from pathlib import Path

import pytest
from made_up import everything, options
from PIL import Image

from reproduce import plan, report

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def records():
    return everything(seeds=3)


def test_the_report_has_every_part_and_is_the_same_again(records, tmp_path):
    runs, jobs = records
    report.write(tmp_path, options(seeds=3), runs, jobs)
    text, pictures = (tmp_path / "report.md").read_text(), {p.name: p.read_bytes() for p in tmp_path.glob("*.*g")}
    assert "Not run" not in text.replace("*Not run*", "") and "missing" not in text
    assert "3 seeds of the 8 asked for" in text and "**holds**" not in text  # too few for any verdict
    for number in (1, 3, 4, 5, 6, 7, 8):
        assert f"Table {number}" in text or f"Tables {number} and" in text
    assert all(f"Figure {number}" in text for number in (1, 2, 3))
    assert all(f"({name})" in text for name in pictures) and len(pictures) == 12
    assert "commit c0ffee" in text and "python -m reproduce --seeds 3 --tofu_dir DATA/tofu --rwku_dir DATA/rwku" in text
    assert sum(line.startswith("| ") and line.endswith("` |") for line in text.splitlines()) >= 14  # claims
    assert "nan" not in text
    report.write(tmp_path, options(seeds=3), runs, jobs)
    assert (tmp_path / "report.md").read_text() == text
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.*g")} == pictures


def test_the_report_says_what_is_missing(records, tmp_path):
    runs, jobs = records
    runs = {name: run for name, run in runs.items() if run["family"] in ("base", "world0", "world30")}
    report.write(tmp_path, options(seeds=3), runs, jobs)
    text = (tmp_path / "report.md").read_text()
    assert f"{len(jobs) - 9} of {len(jobs)} runs are missing" in text
    assert text.count("Not run") >= 5 and "**not run**" in text
    report.write(tmp_path, options(seeds=3), {}, jobs)
    assert "No runs yet" in (tmp_path / "report.md").read_text()


def test_the_papers_figures():
    paper = json.loads((ROOT / "reproduce" / "paper.json").read_text(encoding="utf-8"))
    assert paper["table2"]["ReRULE"]["utility"] - paper["table2"]["RULE"]["utility"] == pytest.approx(9.9)
    assert paper["table1"]["RULE"]["forget_all"] == pytest.approx((28.0 + 16.8 + 38.3) / 3, abs=0.05)
    assert paper["table5"]["ReRULE"] == {"forget_quality": 0.165, "model_utility": 0.6076, "forget_rouge_l": 0.1322}


def test_every_command_in_the_text_is_one(records):
    text = (ROOT / "reproduce" / "template.md").read_text(encoding="utf-8")
    named = re.findall(r"--only ((?:\w+ ?)+)(?:`|--)", text)
    assert len(named) == len(report.PARTS) and set(" ".join(named).split()) <= set(plan.SECTIONS)


def test_the_committed_figures_are_sharp_and_small():
    for path in (ROOT / "results").glob("*.png"):
        assert path.stat().st_size < 300_000, path.name
        with Image.open(path) as picture:
            assert round(picture.info["dpi"][0]) == 200, path.name
