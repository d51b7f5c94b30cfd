"""What a run leaves to be read: a ReRULE that never replayed says so."""

import json
from types import SimpleNamespace

import pytest

from engine import report
from engine.files import Log


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
