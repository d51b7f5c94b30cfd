"""The benchmark on a model too small to say anything: what it prints, and that it runs the driver's own step."""

import importlib.util
import json

import pytest
import torch

import benchmark
import rerule
from files import InputError

KEYS = {"step_s", "gen_s", "ref_s", "update_s", "replay_s", "peak_rss_mb", "tokens_per_s", "matmul_peak_share"}
TINY = "--hidden 16 --layers 1 --steps 2 --warmup 1 --threads 1".split()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few prompts; and what the benchmark puts in the driver's place is taken out again."""
    monkeypatch.setattr(benchmark, "PROMPTS_PER_STEP", 4)
    for name in ("reward", "is_refusal"):
        monkeypatch.setattr(rerule, name, getattr(rerule, name))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def printed(capsys, *flags):
    benchmark.main([*TINY, *flags])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


@pytest.mark.parametrize("shape", ["short", "rwku"])
def test_one_line_with_every_number(capsys, shape):
    row = printed(capsys, "--shape", shape)
    assert row.keys() >= KEYS and row["shape"] == shape and row["steps"] == 2
    assert row["gen_s"] + row["ref_s"] + row["update_s"] <= row["step_s"]
    assert row["replay_s"] < 1e-3 and "replay_group_s" not in row
    longest = 4 * 8 * benchmark.SHAPES[shape][1]
    assert 0.8 * longest < row["tokens_per_step"] <= longest
    assert 0 < row["matmul_peak_share"] < 1 and row["peak_rss_mb"] > 100


def test_replay_is_timed_for_each_group_that_is_not_skipped(capsys):
    row = printed(capsys, "--replay")
    assert row["replay_s"] > 0 and 0 <= row["replay_skipped"] < 1
    assert 0 < row["replay_group_s"] <= row["replay_s"]


def test_the_steps_are_the_drivers(monkeypatch, capsys):
    calls, sample = [], rerule.sample
    monkeypatch.setattr(rerule, "sample", lambda *args: calls.append(args) or sample(*args))
    printed(capsys)
    assert len(calls) == 3  # the warm-up step and both timed ones
    _, prompts, group_size, longest, _, temperature, *_ = calls[0]
    assert (len(prompts), group_size, longest, temperature) == (4, 8, 24, 1.0)
    assert all(len(prompt) == 12 for prompt in prompts)


def test_a_missing_peer_is_one_clear_line(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "trl" else find(name, *rest))
    with pytest.raises(InputError, match="pip install trl"):
        benchmark.main([*TINY, "--peer", "trl"])


def test_flags_that_make_no_sense():
    with pytest.raises(InputError, match="at least 1"):
        benchmark.main(["--steps", "0"])
