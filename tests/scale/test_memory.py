"""The memory plan: by hand, as it is printed, and beside what a step takes."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace

import pytest
import ranks
import torch
from conftest import tiny
from miniature import driver
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, LlamaConfig

from config import Config, InputError
from scale import memory

EIGHT = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
             num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192)  # fmt: skip


def fixed(adapters=0, cache=0, sampling=0, kept=0, most=0, n=1e9):
    """`Counted` of a made-up model, the same at any lengths."""
    lengths = memory.Lengths(adapters, cache, sampling, kept, most)
    return memory.Counted(n, 1e8, 1000, 2e8, lambda config, fsdp: lengths)


def deep(layers=32):
    """(`Counted` of Llama-3-8B, the same by lengths seen at two and three layers: each further layer takes as much)."""
    two, three, *_ = (memory.seen(LlamaConfig(**EIGHT | {"num_hidden_layers": n}), True) for n in (2, 3))
    whole = memory.seen(LlamaConfig(**EIGHT | {"num_hidden_layers": layers}), True)

    def at(config, fsdp):
        pairs = zip(two.at(config, fsdp), three.at(config, fsdp), strict=True)
        return memory.Lengths(*(a + (layers - 2) * (b - a) for a, b in pairs))

    return whole, whole._replace(at=at)


def test_what_is_counted_of_llama_3_8b():
    """8.03e9 parameters; a token's keys and values are 2 · 32 layers · 8 heads · 128 · 2 bytes."""
    config = Config(benchmark="rwku", max_new_tokens=1024, gradient_checkpointing=True)
    _, counted = deep()
    assert counted.parameters == 8_030_261_248 and counted.rest == 2 * 128256 * 4096 + 4096
    assert counted.layer == 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336 + 2 * 4096
    assert counted.kv == 2 * 32 * 8 * 128 * 2
    at, tokens = counted.at(config, True), 64 + 8 * 1024
    assert at.adapters == 0 and counted.kv * tokens <= at.cache <= 1.5 * counted.kv * (tokens + 8)
    assert 24 * 8 * 128256 < at.sampling < 80 * 8 * 128256  # logits, their log-softmax, its exponential, its sum twice
    inputs = 32 * tokens * 4096 * 2  # what each layer is given
    assert inputs < at.kept < 1.4 * inputs and at.kept + 5 * tokens * 14336 * 2 < at.most < at.kept + 4e9
    six, guessed = deep(6)
    assert six.at(config, True) == guessed.at(config, True)


def test_the_plan_by_hand():
    counted, n = fixed(cache=2e8, sampling=3e7, kept=1e9, most=3e9), 1e9
    host = memory.plan(counted, Config(offload=True, rollout_prompts=16), 0, True)
    assert host["weights"] == (2 * n, 4 * n) and host["gradients"] == (4 * n, 4 * n)
    assert host["optimiser"] == (0, 8 * n) and host["reference"] == (2 * n, 0) and host["activations"] == (1e9, 0)
    assert host["KV cache"] == (16 * 2e8, 0) and host["in passing"] == (2e9 + 4 * 1e8, 0)  # a layer's gradients go
    assert host["most at once"] == (4 * n + 4 * n + 3e9 + 4e8, 16 * n)
    one = memory.plan(counted, Config(rollout_prompts=16), 0, True)
    assert one["weights"] == (4 * n, 0) and one["in passing"] == (16 * 3e7 + 2 * n, 0)  # a copy in bf16 to sample from
    assert one["most at once"] == (14 * n + 4 * n + 3e9, 0)
    four = memory.plan(counted, Config(), 4, True)
    assert four["optimiser"] == (2 * n, 0) and four["reference"] == (n / 2, 0) and four["KV cache"] == (8 * 2e8, 0)
    cpu = memory.plan(counted, Config(rollout_prompts=16), 0, False)
    assert cpu["weights"] == (0, 4 * n) and cpu["in passing"] == (0, 2e9)


def test_adapters_in_the_plan():
    """Frozen weights once, in bf16, which sample too; 16 bytes for each weight of an adapter; no reference."""
    counted, n, a = fixed(adapters=1e7, cache=2e8, sampling=3e7, kept=1e9, most=3e9), 1e9, 1e7
    found = memory.plan(counted, Config(lora_rank=16, rollout_prompts=4), 0, True)
    assert found["weights"] == (2 * n + 4 * a, 0) and found["gradients"] == (4 * a, 0)
    assert found["optimiser"] == (8 * a, 0) and found["reference"] == (0, 0) and found["in passing"] == (2e9, 0)
    assert found["most at once"] == (2 * n + 16 * a + 3e9, 0)
    four = memory.plan(counted, Config(lora_rank=16), 4, True)
    assert four["weights"] == ((n + a), 0) and four["gradients"] == (a, 0)


WITH = "--gradient_checkpointing True"


@pytest.mark.parametrize("benchmark, longest", [("tofu", 256), ("rwku", 1024)])
def test_the_least_flags_for_gpus_of_24_40_and_80_gb(benchmark, longest):
    """8 B trains adapters alone on 24 GB where answers are short, on 40 GB at RWKU's length; all weights on 80 GB."""
    config = Config(benchmark=benchmark, max_new_tokens=longest)
    _, counted = deep()
    found = {room: memory.fitting(counted, config, 0, room * 1e9) for room in (15, 24, 40, 80, 300)}
    assert found[15] is None and found[300][:2] == (config, "as it is")
    assert found[24][1] == f"{WITH} --lora_rank 16 --rollout_prompts {8 if benchmark == 'tofu' else 4}"
    assert found[40][1] == f"{WITH} --lora_rank 16" + " --rollout_prompts 8" * (benchmark == "rwku")
    assert found[80][1] == f"{WITH} --offload True" + " --rollout_prompts 16" * (benchmark == "rwku")
    for room in (24, 40, 80):
        wanted, _, gpu, host = found[room]
        assert gpu <= 0.95 * room * 1e9 and (gpu, host) == memory.plan(counted, wanted, 0, True)["most at once"]
        assert wanted.gradient_checkpointing and (wanted.lora_rank == 16) == (room < 80)
    adapters = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))  # of rank 16, (in + out) each
    assert counted.at(found[24][0], False).adapters == adapters


def test_disk_by_hand():
    """bf16 on a GPU; both models of WHP; two states of 12 bytes a weight beside what the methods before have left."""
    flags = dict(method=["whp", "rej_steer", "rule"], save_every=50)
    assert memory.disk(1e9, 0, Config(**flags), True) == {"models": 8e9, "state": 12e9, "most at once": 30e9}
    assert memory.disk(1e9, 0, Config(**flags), False)["models"] == 16e9
    assert memory.disk(1e9, 0, Config(**flags | {"save_every": 0}), True)["most at once"] == 8e9
    adapted = memory.disk(1e9, 1e7, Config(**flags, save_dtype="float32"), True)
    assert adapted == {"models": 4 * 4.04e9, "state": 0.12e9, "most at once": 4 * 4.04e9 + 0.12e9}


def test_the_plan_counts_prompts_as_long_as_the_benchmark_has_them():
    model = LlamaConfig(**EIGHT | {"num_hidden_layers": 1})
    for name, prompt in (("builtin", 64), ("rwku", 64), ("tofu", 64), ("muse", 512)):
        config = Config(benchmark=name, max_new_tokens=3, max_tokens=4096, prompts_per_step=2)
        at = memory.seen(model, True).at(config, False)
        room = prompt + 8 + 32 * 8 if prompt < 512 else (prompt + 8) * 1.5
        assert at.cache == 2 * 8 * 128 * 2 * room


def test_dry_run_prints_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    LlamaConfig(**EIGHT | {"num_hidden_layers": 1}).save_pretrained(tmp_path / "model")
    common = ["--benchmark", "rwku", "--data_dir", tmp_path, "--output_dir", tmp_path / "run", "--dry_run"]
    driver(*common, "--model", tmp_path / "model", "--gradient_checkpointing")
    printed = capsys.readouterr().out
    rows = ("weights", "gradients", "optimiser", "reference", "KV cache", "activations", "in passing")
    for name in (*rows, "In 24 GB a GPU: --offload True: ", "In 40 GB", "In 80 GB a GPU: as it is: "):
        assert name in printed
    assert "Disk: models 7.6, state 15.2, most at once 35.5; free " in printed
    assert "does not fit" not in printed and not (tmp_path / "run").exists()
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda folder: SimpleNamespace(free=35e9))
    driver(*common, "--model", tmp_path / "model", "--gradient_checkpointing", "--lora_rank", "8")
    assert "does not fit" not in capsys.readouterr().out
    driver(*common, "--model", tmp_path / "model", "--gradient_checkpointing")
    assert f"It does not fit the disk of --output_dir {tmp_path / 'run'}." in capsys.readouterr().out
    with pytest.raises(InputError, match="--model .*nowhere"):
        driver(*common, "--model", tmp_path / "nowhere")
    with pytest.raises(InputError, match="--dry_run: expected a --model"):
        driver("--dry_run")


# --- beside what is taken --------------------------------------------------------------------------------------------


def taken(part):
    """(what a part of a step returns, bytes that torch had reserved for it at most)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = part()
    sizes = [event.nbytes() for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    return result, max(accumulate(sizes))


@pytest.mark.parametrize("checkpointing, lora_rank, half", [(False, 0, False), (True, 0, True), (True, 8, True)])
def test_the_plan_is_what_a_step_takes(checkpointing, lora_rank, half):
    """Beside weights and moments: all of the cache and what passes while sampling; gradients and activations in the
    update. Answers are long, two query heads share keys. half: a GPU's plan, for autocast and a copy in bf16."""
    architecture, found = ranks.small(64, 4, 600), {}
    config = Config(prompts_per_step=6, group_size=4, max_new_tokens=48, max_tokens=800, lr=2e-6)
    config.gradient_checkpointing, config.lora_rank, config.lora_alpha = checkpointing, lora_rank, 16.0
    counted = memory.seen(architecture, on_gpu=half)
    plan = memory.plan(counted, config, 0, on_gpu=half)
    sizes, at = {name: gpu + host for name, (gpu, host) in plan.items()}, counted.at(config, False)

    def meter(what, part):
        result, found[what] = taken(part)
        return result

    with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
        ranks.stage2_step(architecture, config, meter, half)
    sampling = sizes["KV cache"] + 6 * at.sampling + (2 * counted.parameters if half and not lora_rank else 0)
    update = sizes["gradients"] + sizes["activations"] + sizes["in passing"]
    assert found["sampling"] == pytest.approx(sampling, rel=0.05) and found["update"] == pytest.approx(update, rel=0.05)
    always = sizes["weights"] + sizes["optimiser"] + sizes["reference"]
    assert sizes["most at once"] == always + max(update, sampling)
    assert max(update - sizes["gradients"], sampling) > 0.5 * sizes["most at once"]  # not 20 bytes a weight


def test_ten_phases_hold_no_more_than_two(tmp_path):
    """In a process of its own: models, gradients, moments and what was saved of them are free once a phase is over."""
    command = [sys.executable, ranks.__file__, "phases", tmp_path, "", "offload", "lora"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("held:")]
    for way in ("plain", "offload", "lora"):
        held, traced = zip(*((int(a), int(b)) for name, a, b in lines if name == way), strict=True)
        assert len(held) == 10 and max(held[2:]) < 1.05 * held[1], done.stdout
        assert max(traced[2:]) < traced[1] + 200_000, done.stdout


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_every_architecture_can_be_counted(kind, tmp_path, capsys):
    model = tiny(kind)
    model.save_pretrained(tmp_path)
    config, found = Config(max_new_tokens=8, prompts_per_step=2, group_size=2), {}
    counted = memory.seen(AutoConfig.from_pretrained(tmp_path), False)
    for checkpointing in (False, True):
        found[checkpointing] = counted.at(replace(config, gradient_checkpointing=checkpointing), False)
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    assert found[True].kept < found[False].kept and found[True].cache == found[False].cache > 0
    assert not capsys.readouterr().err  # which would tell of a plain way
