"""A write that fails at the k-th call, a kill at the k-th: each run goes on and ends with the same bytes.

Here at a few of a run's writes; `python -m pytest -m long` fails every one, and kills at twenty."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from attacked import ended, forked, killed_at, left, short, watch
from safetensors import safe_open

torch.set_num_threads(1)
ABOUT = 245  # writes of a short run; those past its end are left out
IN_CI = [1, 5, 23, 62, 131, 178, 203, 224]
KILLS = [round(ABOUT * (i + 0.5) / 20) for i in range(20)]


def marked(numbers, few):
    return [pytest.param(k, marks=[] if k in few else [pytest.mark.long]) for k in numbers]


def failing(at, how):
    """What fails the k-th write, halfway through where it is one of bytes, and notes which it was."""
    calls, failed = [], []

    def call(name, args):
        calls.append(name)
        if len(calls) == at:
            failed.append(name)
            if name == "log":
                args[0].file.write(b'{"half a row')
            elif name == "save":
                args[1].write(b"half a state")
            elif name == "weights":
                Path(args[1]).write_bytes(b"half of the weights")
            elif name == "text":
                Path(args[0]).write_bytes(b"half a te")
            raise OSError(how, os.strerror(how), str(args[0]) if name in ("text", "mkdir") else None)

    return call, failed


def whole(folder):
    """Whether every file under its own name can be read to its end."""
    for path in folder.rglob("*"):
        if ".tmp" not in str(path):
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    assert [file.get_tensor(name).shape for name in file.keys()]
            elif path.name == "state.pt":
                torch.load(path, weights_only=True)


def resumed(folder, finished):
    done = ended(short, "--output_dir", folder, "--resume")
    assert done.code == 0, done
    assert left(folder) == left(finished)
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("at", marked(range(1, ABOUT), IN_CI))
def test_a_write_that_fails_is_told_and_the_run_goes_on_to_the_same_bytes(finished, tmp_path, at):
    how = (errno.ENOSPC, errno.EIO, errno.EDQUOT)[at % 3]
    call, failed = failing(at, how)
    stop = watch(call)
    try:
        done = ended(short, "--output_dir", tmp_path / "run")
    finally:
        stop()
    if failed:
        assert os.strerror(how) in done.last(2 if at == 1 else 1), (failed, done)
        whole(tmp_path / "run")
        resumed(tmp_path / "run", finished)
    else:
        assert done.code == 0 and at > ABOUT - 30  # past the end


@pytest.mark.parametrize("at", marked(KILLS, KILLS[3::5]))
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(finished, tmp_path, at):
    assert forked(short, "--output_dir", tmp_path / "run", prepare=(killed_at, at)).code in (-9, 0)
    whole(tmp_path / "run")
    resumed(tmp_path / "run", finished)


@pytest.mark.parametrize("at", marked([2, 9, 30, 45], [30]))
def test_a_resumed_run_may_fail_too(interrupted, finished, at):
    call, failed = failing(at, errno.ENOSPC)
    stop = watch(call)
    done = ended(short, "--output_dir", interrupted, "--resume")
    stop()
    assert failed and done.last()
    resumed(interrupted, finished)
