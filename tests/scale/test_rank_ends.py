"""How a rank ends: its words are not lost, and the interpreter does not take itself apart under a thread of gloo's."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from scale.ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("launched", [False, True])
@pytest.mark.parametrize("act, code", [("print('done')", 0), ("raise InputError('no')", 2)])
def test_a_rank_ends_before_the_interpreter_takes_itself_apart(launched, act, code):
    """A thread of gloo's may abort it there. What was printed is not lost, and a single process ends as ever."""
    program = (
        "import atexit\nfrom config import InputError\nfrom engine.flags import run_command\n"
        f"atexit.register(print, 'late')\ndef main(): {act}\nrun_command(main)"
    )
    env = os.environ | {"PYTHONUNBUFFERED": ""} | ({"WORLD_SIZE": "2"} if launched else {})
    done = subprocess.run([sys.executable, "-c", program], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code
    assert ("done" in done.stdout, "error: no" in done.stderr) == (code == 0, code == 2)
    assert ("late" in done.stdout) == (not launched)


def test_a_rank_that_says_nothing_of_an_error_waits_for_the_one_that_does():
    """torchrun stops all ranks once one has ended: the message would be lost with a slower rank 0."""
    program = "from config import InputError\nfrom engine.flags import run_command\n"
    program += "def main():\n print('here', flush=True)\n raise InputError('no')\nrun_command(main)"
    env = os.environ | {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    how = dict(env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", program], **how) as process:
        assert process.stdout.readline() == "here\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.0)
        process.terminate()  # as torchrun does
        assert process.communicate() == ("", "") and process.returncode == -signal.SIGTERM


def test_a_rank_that_is_told_to_stop_after_its_session_ends_without_a_word(monkeypatch):
    """Its group is no more then; only in a session is there a rank to name and a state to go on from."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in dict(RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items():
        monkeypatch.setenv(name, str(value))
    with Ranks("cpu").session():
        assert callable(signal.getsignal(signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
