"""`--report_to`: every number of metrics.jsonl, once, under the tracker's names; a resumed run goes on where it was."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import miniature
import pytest

from config import Config, InputError
from engine import flags, trackers
from engine.run import Run

ROOT = Path(__file__).parents[2]
ROW = {"method": "rule", "stage": 2, "reward": 0.5, "kl": None, "eval_forget_recall": 1.0, "seconds_update": 2.0,
       "seconds": 3, "time": "2026-01-01T00:00:00+00:00"}  # fmt: skip
NAMED = {"train/reward": 0.5, "eval/forget_recall": 1.0, "seconds/update": 2.0, "train/seconds": 3}
ROLLOUTS = [["forget", "Who | is <b>?", "I don't\nknow.", 1.0]]


def made(tmp_path, kind):
    return type("Run", (), {"config": Config(report_to=kind), "folder": tmp_path})()


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def test_names_of_a_row():
    assert trackers.named(ROW | {"step": 4}) == NAMED
    assert trackers.named({"method": "rule", "score_forget_recall": 2.0, "notes": ["n"]}) == {
        "score/forget_recall": 2.0
    }


def test_tensorboard_holds_the_log_once_though_the_run_was_killed(tmp_path):
    pytest.importorskip("tensorboard")
    argv = ["--output_dir", tmp_path / "run", "--method", "rule", "--eval_every", 3, "--report_to", "tensorboard"]
    assert miniature.start(argv, ("rule", 6)) == -9  # step 5 was reported, and is done again
    assert json.loads((tmp_path / "run" / "tracker.json").read_text())["last"]["rule"] == 5
    time.sleep(1.1)  # the names of files, by which readers order them, tell the second
    miniature.main(*argv, "--resume")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    table = json.loads((tmp_path / "run" / "table.json").read_text())
    for phase, title in (("original", "Original"), ("rej_steer", "Rej. Steer"), ("rule", "RULE")):
        found, expected = events(tmp_path / "run" / "tensorboard" / phase), {}
        for row in [row for row in rows if row["method"] == phase]:
            for name, value in trackers.named(row).items():
                if not name.startswith("seconds/") and name != "train/seconds":  # a step done again took another time
                    expected.setdefault(name, []).append((row["step"], pytest.approx(value, rel=1e-6)))
        scores = {f"score/{k}": v for k, v in table[title].items() if isinstance(v, int | float) and k != "seconds"}
        last = max(row["step"] for row in rows if row["method"] == phase)
        expected |= {name: [(last, pytest.approx(value, rel=1e-6))] for name, value in scores.items()}
        timed = {name for name in found.Tags()["scalars"] if "seconds" in name}
        assert set(found.Tags()["scalars"]) - timed == set(expected) and timed
        for name, values in expected.items():
            assert [(event.step, event.value) for event in found.Scalars(name)] == values, name
        assert len(found.Scalars(min(timed))) <= last
    texts = events(tmp_path / "run" / "tensorboard" / "rule").Tensors("completions/text_summary")
    assert [event.step for event in texts] == [1, 2, 3, 4, 5, 6, 7]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    shown = texts[0].tensor_proto.string_val[0].decode().splitlines()
    assert len(shown) == 2 + 6 and samples[0]["completions"][0].split()[0] in shown[2]


def test_a_completion_is_text_and_no_markdown(tmp_path):
    pytest.importorskip("tensorboard")
    run = made(tmp_path, "tensorboard")
    trackers.report(run, ROW | {"step": 1}, ROLLOUTS)
    (text,) = events(tmp_path / "tensorboard" / "rule").Tensors("completions/text_summary")
    line = text.tensor_proto.string_val[0].decode().splitlines()[-1]
    assert line == r"| forget | Who \| is \<b\>? | I don't know. | 1.0 |"


@pytest.fixture(params=["wandb", "trackio"])
def fake(request, monkeypatch):
    """A module with what both document: init → a run with log and finish, Table(columns=, data=)."""
    said = []

    def init(project, name=None, group=None, config=None, resume=None, **more):
        if request.param == "trackio":
            assert not more
        said.append(("init", name, resume, more.get("id")))
        return SimpleNamespace(log=lambda values, step=None: said.append((step, values)),
                               finish=lambda: said.append("finish"))  # fmt: skip

    module = SimpleNamespace(init=init, Table=lambda columns=None, data=None: (columns, data))
    monkeypatch.setitem(sys.modules, request.param, module)
    trackers.opened.cache_clear()
    return request.param, said


def test_the_documented_calls_and_a_resumed_run(fake, tmp_path):
    kind, said = fake
    run = made(tmp_path, kind)
    trackers.report(run, ROW | {"step": 1}, ROLLOUTS)
    trackers.report(run, ROW | {"step": 2})
    own = json.loads((tmp_path / "tracker.json").read_text())["own"]
    ident = f"rule-{own}" if kind == "wandb" else None
    opened = ("init", f"rule-{own}", "allow", ident)
    assert said == [opened, (1, NAMED | {"completions": (trackers.COLUMNS, ROLLOUTS)}), (2, NAMED)]
    said.clear()
    again = made(tmp_path, kind)  # another process, which does step 2 again
    for step in (2, 3):
        trackers.report(again, ROW | {"step": step})
    trackers.report(again, {"method": "rule", "score_leakage": 1.0})
    trackers.report(again, {"method": "original", "score_leakage": 2.0})
    assert said[:4] == [opened, (3, NAMED), (3, {"score/leakage": 1.0}), "finish"]
    assert said[4][1] == f"original-{own}" and said[5:] == [(0, {"score/leakage": 2.0}), "finish"]


def test_what_a_tracker_raises_is_one_line(fake, tmp_path, monkeypatch):
    def init(**how):
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setattr(sys.modules[fake[0]], "init", init)
    with pytest.raises(InputError, match=rf"--report_to {fake[0]}: cannot be opened .*no API key") as error:
        trackers.report(made(tmp_path, fake[0]), ROW | {"step": 1})
    assert "\n" not in str(error.value)


def test_only_the_first_process_reports(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "RANK", 1)
    trackers.report(made(tmp_path, fake[0]), ROW | {"step": 1})
    assert fake[1] == [] and not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_the_real_package_offline(kind, tmp_path, monkeypatch):
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("TRACKIO_DIR", str(tmp_path / "db"))):
        monkeypatch.setenv(name, value)
    pytest.importorskip(kind)
    for steps in ((1, 2), (2, 3)):  # the second time after a kill
        run = made(tmp_path, kind)
        for step in steps:
            trackers.report(run, ROW | {"step": step}, ROLLOUTS)
    trackers.report(run, {"method": "rule", "score_leakage": 1.0})
    name = f"rule-{json.loads((tmp_path / 'tracker.json').read_text())['own']}"
    if kind == "wandb":
        assert list(tmp_path.glob(f"wandb/offline-run-*-{name}/*.wandb"))
    else:
        logged = [row for row in sys.modules[kind].sqlite_storage.SQLiteStorage.get_logs("rerule", name)]
        assert [row["step"] for row in logged if "train/reward" in row] == [1, 2, 3]
        assert {key: logged[0][key] for key in NAMED} == NAMED


@pytest.mark.parametrize("found", [None, ModuleSpec("wandb", None)], ids=["none", "a mere folder of that name"])
def test_a_tracker_that_is_not_installed(refused, monkeypatch, found):
    real = flags.find_spec
    monkeypatch.setattr(flags, "find_spec", lambda name: found if name == "wandb" else real(name))
    assert refused("--report_to", "wandb") == ("--report_to wandb: expected wandb to be installed (pip install wandb)")


def test_another_tracker_is_the_same_run(tmp_path):
    from engine.process import Engine
    from rerule import configure

    config = configure(["--output_dir", str(tmp_path / "run")])
    Run(config, Engine("cpu")).open()
    Run(replace(config, resume=True, report_to="tensorboard"), Engine("cpu"))


def test_nothing_is_imported_unless_asked_for():
    code = "import sys, rerule; print({'tensorboard', 'wandb', 'trackio'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "set()\n"
