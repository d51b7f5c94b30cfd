"""Faults of the machine, of a server and of the user's own hand: each attack by its number, as in `test_refused.py`."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import huggingface_hub.constants
import pytest
import torch
from attacked import ROOT, build_data, called, ended, evaluate, forked, left, nobody, rerule, short, small_files
from made import tofu, tree

from config import InputError
from engine import llm

torch.set_num_threads(1)


# --- E6, E18, E27: the disk ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 700, 4000, 12_000])
def test_E06_a_full_disk_is_one_line_and_the_run_goes_on(finished, tmp_path, size):
    argv = ["--output_dir", tmp_path / "run"]
    line = forked(short, *argv, prepare=(small_files, size)).last()
    assert "File too large" in line and "--resume" in line and str(tmp_path) in line, line
    assert ended(short, *argv, "--resume").code == 0
    assert left(tmp_path / "run") == left(finished)


def test_E06_of_an_evaluation_and_a_build(finished, folders, tmp_path):
    argv = [*tofu(folders), "--model", finished / "rerule"]
    assert tree(finished)
    done = forked(
        evaluate, "--benchmark", "builtin", *argv[4:], "--output", tmp_path / "o.json", prepare=(small_files, 100)
    )
    assert "o.json" in done.last() and not (tmp_path / "o.json").exists()
    argv = ["--source", "tofu", "--input", folders["tofu"], "--target", "Orla", "--output_dir", tmp_path / "built"]
    done = forked(build_data, *argv, prepare=(small_files, 100))
    assert "built" in done.last() and not (tmp_path / "built").exists()


@pytest.mark.parametrize("name", ["rerule.tmp", "state.pt.tmp", "table.md.tmp", "config.json.tmp", "shards.tmp"])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_E18_a_stray_temporary_name_is_in_nobodys_way(interrupted, tmp_path, name, kind):
    place = interrupted / name
    if kind == "file":
        place.write_text("x")
    elif kind == "folder":
        (place / "deep").mkdir(parents=True)
    else:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis").write_text("years of work")
        place.symlink_to(tmp_path / "mine")
    assert ended(short, "--output_dir", interrupted, "--resume").code == 0
    assert not list(interrupted.glob("*.tmp")) and (kind != "link" or (tmp_path / "mine" / "thesis").exists())


def test_E27_others_may_read_a_model_where_they_may_read_the_rest(finished):
    mask = os.umask(0)
    os.umask(mask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (finished / "rerule").iterdir()}
    assert set(modes.values()) == {0o666 & ~mask}, modes


# --- E12: servers ----------------------------------------------------------------------------------------------------


class Server:
    """A server that says what `talk(connection)` says, to whoever asks; `asked` counts."""

    def __init__(self, talk):
        self.asked, self.listener = 0, socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"

        def serve():
            while True:
                try:
                    connection, _ = self.listener.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        def answer(connection):
            try:
                if connection.recv(65536):
                    self.asked += 1
                    talk(connection)
            except OSError:
                pass
            connection.close()

        threading.Thread(target=serve, daemon=True).start()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def endless(connection):
    connection.sendall(HEAD + b"\r\n" + b'{"choices": "')
    while True:
        connection.sendall(b"x" * 65536)


def dripping(connection):
    connection.sendall(HEAD + b"\r\n")
    for _ in range(200):
        connection.sendall(b" ")
        time.sleep(0.05)


def packed(connection):
    connection.sendall(HEAD + b"Content-Encoding: gzip\r\n\r\n" + b"\x1f\x8b" * 100)


def redirecting(connection):
    connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: /v1/chat/completions\r\nContent-Length: 0\r\n\r\n")


def headers_without_end(connection):
    connection.sendall(HEAD)
    while True:
        connection.sendall(b"X-More: " + b"x" * 6000 + b"\r\n")


TALKS = {endless: 3, dripping: 3, packed: 1, redirecting: 1, headers_without_end: 3}


@pytest.mark.parametrize("talk", TALKS, ids=lambda talk: talk.__name__)
def test_E12_a_hostile_server_costs_neither_memory_nor_time(talk, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(llm, "ATTEMPTS", 3)
    server, start, at_first = Server(talk), time.monotonic(), memory()
    with pytest.raises(InputError, match="--url"):
        llm.ask_all(
            ["Who?"],
            lambda reply: reply,
            url=server.url,
            model="m",
            key="secret",
            cache=tmp_path / "c",
            flag="--url",
            field="f",
            max_tokens=9,
            once=True,
            timeout=0.3,
            wait=0.01,
            progress=False,
        )
    assert time.monotonic() - start < 10 and memory() - at_first < 100e6
    assert server.asked <= TALKS[talk] and b"secret" not in (tmp_path / "c").read_bytes()
    server.listener.close()


def memory():
    """The bytes of this process in memory."""
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")


# --- E8: what a language model says ----------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ['"\\ud800"', '["x\\udfff"]', '{"\\ud83d": 1}', '"\ud800"'])
def test_E08_half_a_character_in_a_reply_is_a_bad_reply(inner):
    with pytest.raises(llm.BadReply):
        llm.json_object(f'{{"a": {inner}}}', ["a"])
    assert llm.json_object('{"a": "\\ud83d\\ude00"}', ["a"]) == {"a": "😀"}


# --- E20: names and rights -------------------------------------------------------------------------------------------

LONG = "n" * 300
PATHS = {
    rerule: ["output_dir", "start_from", "purge_terms", "retain_log", "data_dir", "model", "tokenizer"],
    evaluate: ["output", "data_dir", "model", "from_log", "retain_log", "retain_model", "tokenizer"],
    build_data: ["input", "output_dir", "neighbours"],
}


@pytest.mark.parametrize(
    ("command", "flag"), [(c, f) for c in PATHS for f in PATHS[c]], ids=lambda x: getattr(x, "__name__", x)
)
@pytest.mark.parametrize(
    "name", [LONG, f"{LONG}/x", "a\0b", "x/" * 3000, "secret", "secret/x.json"], ids=lambda n: n[:4]
)
def test_E20_a_name_that_cannot_be_is_told_in_a_line(folders, tmp_path, monkeypatch, command, flag, name):
    if "\0" in name and flag != "model":
        name = "\n"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").mkdir(mode=0)
    flags = {
        rerule: {**dict(zip(("benchmark", "data_dir"), tofu(folders)[1::2], strict=True)), "output_dir": "run"},
        evaluate: {"benchmark": "tofu", "data_dir": folders["tofu"], "output": "out.json", "model": "no/model"},
        build_data: {"source": "tofu", "input": folders["tofu"], "target": "Orla", "output_dir": "built"},
    }[command] | {flag: name}
    if flag in ("from_log",):
        del flags["model"]
    for place in (tmp_path, *tmp_path.parents[:3]):
        place.chmod(0o755)
    with nobody():
        done = ended(command, *[f"--{key}={value}" for key, value in flags.items()])
    assert done.line(most=7000) and not any((tmp_path / made).exists() for made in ("run", "out.json", "built"))


# --- E21: nobody reads what we print ---------------------------------------------------------------------------------


WHERE = (">&-", "> /dev/full", "| head -c 1 > /dev/null; exit ${PIPESTATUS[0]}", "2>&-", "<&-")
SHORT_RUN = "import attacked, sys; attacked.run_command(lambda: attacked.short('--output_dir', sys.argv[1]))"
CASES = [(what, where) for what in ("help", "table", "log") for where in WHERE]
IN_CI = [*CASES[:3], CASES[6], CASES[10]]


@pytest.mark.parametrize(
    ("what", "where"), [pytest.param(*c, marks=[] if c in IN_CI else [pytest.mark.long]) for c in CASES]
)
def test_E21_no_traceback_where_stdout_is_closed_or_full(finished, tmp_path, what, where):
    log = finished / "predictions" / "rerule.jsonl"
    line = {
        "help": "rerule.py --help",
        "table": f'-c "{SHORT_RUN}" {finished}',
        "log": f"evaluate.py --benchmark builtin --from_log {log} --output {tmp_path / 'o.json'}",
    }[what]
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT / 'tests/robust'}:{ROOT}"}
    line = f"{sys.executable} {line} {where}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, env=env)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) <= 1 and done.returncode in ((0,) if "&-" in where else (0, 1)), done
    assert what != "log" or (tmp_path / "o.json").exists() or done.returncode


# --- E22: Ctrl-C -----------------------------------------------------------------------------------------------------

AT_IMPORT = """
import os, runpy, signal, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == moment:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
moment, place, sys.argv = sys.argv[1], sys.argv[2], sys.argv[2:]
sys.path.insert(0, "")
how = {} if place.endswith(".py") else {"alter_sys": True}
(runpy.run_module if how else runpy.run_path)(place, run_name="__main__", **how)
"""
MOMENTS = [
    ("transformers", "rerule.py"),
    ("torch", "rerule.py"),
    ("engine.run", "rerule.py"),
    ("torch", "evaluate.py"),
    ("benchmarks.answers", "evaluate.py"),
    ("huggingface_hub", "build_data"),
    ("numpy", "reproduce"),
]


@pytest.mark.parametrize(("module", "command"), MOMENTS)
def test_E22_an_interrupt_during_imports_is_a_word(tmp_path, module, command):
    argv = {"evaluate.py": ["--benchmark", "builtin", "--model", "x", "--output", tmp_path / "o"]}.get(command, [])
    done = called("-c", AT_IMPORT, module, command, *argv)
    assert done.err.splitlines() == ["interrupted"] and done.code == -signal.SIGINT and not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.parametrize("after", [0.3 + 0.4 * i for i in range(20)])
def test_E22_an_interrupt_at_any_moment(tmp_path, after):
    argv = ["rerule.py", "--output_dir", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, *argv], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err and err.rstrip().endswith("interrupted"), err
    assert json.dumps(after) and (not (tmp_path / "run").exists() or shutil.rmtree(tmp_path / "run") is None)
