"""What a run leaves to be read: a ReRULE that never replayed says so."""

import json
import shlex
from types import SimpleNamespace

import pytest

import evaluate
from engine import report
from engine.files import Log
from engine.flags import parse


@pytest.fixture
def run(tmp_path):
    """A run of four steps, in which replay runs from step 3 on where asked."""

    def made(replays):
        rows = [{"method": "rule", "step": step, "buffer_size": 0} for step in range(1, 5)]
        rows += [{"method": "rerule", "step": s, "buffer_size": 5 * s} for s in range(1, 5)]
        for row in rows[-2:] if replays else []:
            row["replay_groups"] = 0  # a step on zero gradient draws none, and has run all the same
        log = Log(tmp_path / "metrics.jsonl")
        for row in rows:
            log.write(row)  # on no disk yet
        config = SimpleNamespace(min_groups=60, min_share=0.0, warmup_steps=10)
        return SimpleNamespace(folder=tmp_path, config=config, metrics=log)

    return made


def table(folder, found):
    rows = {"rule": {"seconds": 1.0, "notes": []}, "rerule": {"seconds": 2.0, "notes": [], **found}}
    report.write(folder, {}, rows, figures=False)
    return (folder / "table.md").read_text(), json.loads((folder / "table.json").read_text())["ReRULE"]


def test_replay_that_never_ran_is_told_at_once_and_in_the_table(run, tmp_path, capsys):
    found = report.replay_of(run(False), "rerule")
    told = "replay never ran, so this is RULE: it waits for 60 groups and step 11; 20 groups were stored"
    assert capsys.readouterr().err == f"rerule: {told}\n"
    text, row = table(tmp_path, found)
    assert "| ReRULE† |" in text and f"ReRULE: † {told}" in text and row["first_replay"] is None
    assert "| RULE |" in text


def test_replay_that_waits_for_a_share_of_the_groups_says_so(run, capsys):
    waiting = run(False)
    waiting.config.min_share = 0.05
    assert "it waits for 5% of the groups sampled and step 11;" in report.replay_of(waiting, "rerule")["without_replay"]


def test_replay_that_ran_has_its_first_step(run, tmp_path, capsys):
    text, row = table(tmp_path, report.replay_of(run(True), "rerule"))
    assert row["first_replay"] == 3 and "†" not in text and not capsys.readouterr().err


def test_other_methods_say_nothing_of_replay(run):
    assert report.replay_of(run(False), "rule") == {} == report.replay_of(run(False), "po")


def test_a_finished_run_names_its_picture_and_two_commands_that_work(tmp_path, capsys):
    """The table first, then where to look and what to run, each command one that its program takes."""
    folder = tmp_path / "some run"
    folder.mkdir()
    (folder / "table.md").write_text("| Model | Recall ↓ |\n|---|---:|\n| RULE | 1.0 |\n", encoding="utf-8")
    held = {"benchmark": "tofu", "data_dir": "my data", "seed": 3, "method": ["rej_steer", "rule"]}
    (folder / "config.json").write_text(json.dumps(held), encoding="utf-8")
    report.print_table(folder)
    assert "picture" not in capsys.readouterr().out
    (folder / "curves.png").touch()
    report.print_table(folder)
    *_, picture, again, score = capsys.readouterr().out.splitlines()
    assert picture.endswith(f" {folder / 'curves.png'}")
    again, score = (shlex.split(line.split("python ")[1]) for line in (again, score))
    assert again == ["rerule.py", f"{folder / 'config.json'}", "--seed", "4", "--output_dir", f"{folder}_4"]
    o = parse(evaluate.Options, score[1:])
    assert score[0] == "evaluate.py" and (o.benchmark, o.data_dir, o.seed) == ("tofu", "my data", 3)
    assert (o.model, o.output) == (f"{folder / 'rule'}", f"{folder / 'rule'}.json")
