"""Commands under attack, in this process or in one of their own: what they said, how they ended, what they left."""

import codecs
import io
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from engine.flags import parse, run_command

ROOT = Path(__file__).resolve().parents[2]
SIZES = dict(N_TARGETS=2, N_HARD=2, N_EASY=2, N_UNKNOWN=1)
SHORT = (  # a run of four phases in two seconds, which replays
    "--method rerule --tiny_epochs 1 --tiny_hidden 16 --tiny_layers 1 --tiny_batch_size 64 --sft_steps 3 --sft_stop 0 "
    "--sft_batch_size 8 --sft_lr 2e-3 --steps 3 --prompts_per_step 4 --group_size 4 --lr 2e-3 --tau 1 --min_groups 2 "
    "--warmup_steps 1 --replay_groups 3 --buffer_size 20 --max_new_tokens 4 --eval_every 0 --save_every 1"
).split()


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    def line(self, code=2, most=700):
        """The one line on stderr with which a command has ended."""
        assert self.code == code, self
        lines = self.err.splitlines()
        assert len(lines) == 1 and "error: " in lines[0] and lines[0].isprintable() and len(lines[0]) < most, self.err
        return lines[0].split("error: ", 1)[1]

    def last(self, code=1):
        """The same, where bars of a training that had begun may stand above it."""
        assert self.code == code and "Traceback" not in self.err, self
        return self.err.splitlines()[-1]


# --- the commands ----------------------------------------------------------------------------------------------------


def rerule(*argv):
    import rerule

    rerule.main(rerule.configure(argv), figures=False)


def short(*argv):
    """The driver on a world smaller still than the miniature."""
    from benchmarks import builtin
    from engine.run import LOCKS

    try:
        with mock.patch.multiple(builtin, **SIZES):
            rerule(*SHORT, *argv)
    finally:
        LOCKS.clear()  # as at a process's end: another may go on


def evaluate(*argv):
    import evaluate

    evaluate.main(parse(evaluate.Options, list(argv)))


def build_data(*argv):
    from build_data import __main__ as build

    build.main(list(argv))


def reproduce(*argv):
    from reproduce import __main__ as report

    report.main(list(argv))


def ended(command, *argv):
    """A command in this process, told as on a command line."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err), mock.patch("os.dup2"):
        try:
            run_command(lambda: command(*map(str, argv)), leave=False)
        except SystemExit as error:
            code = error.code
    return Ended(code, out.getvalue(), err.getvalue())


def called(*line, env=(), **how):
    """A command line as a shell would run it: ("rerule.py", flag, …) or ("-m", "build_data", flag, …)."""
    done = subprocess.run(
        [sys.executable, *map(str, line)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **dict(env)},
        errors="backslashreplace",
        **how,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


# --- processes of their own, forked from this one, which has imported all --------------------------------------------


def child(command, argv, ends, prepare):
    for number, end in enumerate(ends, 1):
        os.dup2(end, number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
    if prepare:
        prepare[0](*prepare[1:])
    run_command(lambda: command(*argv), leave=False)


def process(command, *argv, prepare=()):
    """(process, [what it says on stdout, on stderr] once it has ended). prepare: (function, its arguments), called in
    it first."""
    pipes, said = [os.pipe(), os.pipe()], ["", ""]
    ends = [end for _, end in pipes]
    begun = multiprocessing.get_context("fork").Process(target=child, args=(command, [*map(str, argv)], ends, prepare))
    begun.start()

    def read(at):
        with open(pipes[at][0], errors="backslashreplace") as file:
            said[at] = file.read()

    for at in range(2):
        os.close(ends[at])
        threading.Thread(target=read, args=(at,), daemon=True).start()
    return begun, said


def forked(command, *argv, prepare=(), timeout=120):
    """A command in a process of its own, to its end."""
    begun, said = process(command, *argv, prepare=prepare)
    begun.join(timeout)
    if begun.exitcode is None:
        begun.kill()
    time.sleep(0.05)  # until what it said has been read
    return Ended(begun.exitcode, *said)


def small_files(size):
    """No file of this process may grow past `size` bytes: the disk is full for it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def killed_at(count):
    """This process is killed at its n-th write."""
    calls = []

    def at(*_):
        calls.append(0)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    watch(at)


def until(holds, seconds=60):
    """Wait for something."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@contextmanager
def nobody():
    """Without root's right to read and write everything, where the tests run as root."""
    codecs.lookup("utf-8-sig")  # Python itself may lie where nobody may look
    if os.geteuid():
        yield
        return
    os.setresgid(65534, 65534, 0)
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)


# --- where a run touches the disk ------------------------------------------------------------------------------------


def points():
    """{name: (object, attribute)} of every way in which a run writes."""
    import torch
    import transformers.modeling_utils as modeling

    from engine import files

    return {
        "log": (files.Log, "write"),
        "sync": (os, "fsync"),
        "rename": (os, "replace"),
        "save": (torch, "save"),
        "weights": (modeling, "safe_save_file"),
        "text": (Path, "write_text"),
        "mkdir": (Path, "mkdir"),
    }


def watch(call, names=None):
    """Put call(name, its arguments) before every way of writing, in this process. Returns: what takes it away again."""
    patches = []
    for name, (holder, attribute) in points().items():
        if names is None or name in names:
            own = getattr(holder, attribute)

            def instead(*args, own=own, name=name, **kwargs):
                call(name, args)
                return own(*args, **kwargs)

            patches.append(mock.patch.object(holder, attribute, instead))
            patches[-1].start()
    return lambda: [patch.stop() for patch in patches]


def left(folder):
    """{file: its bytes} of what a run leaves, times, settings and the state aside: models, logs, answers, the table."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".jsonl" or name == "table.json":
            found[name] = [
                part for part in path.read_text().replace("}", ",").split(",") if not re.search('"seconds|"time"', part)
            ]
        elif path.name not in ("state.pt", "config.json", ".lock", "table.md", "table.csv") or path.parent != folder:
            found[name] = path.read_bytes()
    return found


def interrupt(folder, method="rerule", step=3):
    """The folder of a short run that was interrupted once a step was logged."""
    from engine import files

    write = files.Log.write

    def interrupting(log, row):
        write(log, row)
        if (row["method"], row["step"]) == (method, step) and "loss" in row:
            raise KeyboardInterrupt

    with mock.patch.object(files.Log, "write", interrupting):
        assert ended(short, "--output_dir", folder).code == 130
    return folder
