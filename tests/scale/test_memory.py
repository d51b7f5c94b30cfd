"""The memory plan: by hand, as it is printed, and beside what a step takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny
from miniature import driver
from transformers import AutoConfig, LlamaConfig

from config import Config, InputError
from scale import memory

TESTS = Path(__file__).resolve().parents[1]
EIGHT = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
             num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192)  # fmt: skip


def test_the_plan_by_hand():
    """Llama-3-8B: 8.03e9 parameters; a token's keys and values are 2 · 32 layers · 8 heads · 128 · 2 bytes."""
    n, together, kv, kept, vocabulary = memory.count(LlamaConfig(**EIGHT), torch.bfloat16, 128)
    assert n == 8_030_261_248 and together == 2 * 128256 * 4096 + 4096 and vocabulary == 128256
    assert kv == 2 * 32 * 8 * 128 * 2
    inputs = 32 * 128 * 4096 * 2  # what each layer is given
    assert inputs <= kept[True] < 2 * inputs + kept[False] / 32 and kept[False] > 10 * inputs
    config = Config(max_new_tokens=1024, offload=True, gradient_checkpointing=True, rollout_prompts=16)
    found = memory.plan((n, together, kv, kept, vocabulary), config, 0, True)
    assert found["weights"] == (2 * n, 4 * n) and found["gradients"] == (4 * n, 4 * n)
    assert found["optimiser"] == (0, 8 * n) and found["reference"] == (2 * n, 0)
    assert found["KV cache"][0] == 1.5 * kv * 16 * (64 + 8 * 1024)
    assert found["most at once"][0] < 80e9 and found["most at once"][1] == 16 * n
    alone = Config(max_new_tokens=1024, rollout_prompts=16, gradient_checkpointing=True)
    one = memory.plan((n, together, kv, kept, vocabulary), alone, 0, True)
    assert one["weights"] == (4 * n, 0)  # and a copy in bf16: to sample from, or autocast's in the update
    assert one["in passing"] == (2 * n + 24 * 16 * 8 * vocabulary, 0)
    four = memory.plan((n, together, kv, kept, vocabulary), Config(max_new_tokens=1024), 4, True)
    assert four["optimiser"] == (2 * n, 0) and four["reference"] == (n / 2, 0)


def test_the_least_flags_for_a_gpu_of_any_size():
    counted = memory.seen(LlamaConfig(**EIGHT), config := Config(max_new_tokens=1024), True)
    found = {room: memory.fitting(counted, config, 0, room * 1e9) for room in (300, 80, 20)}
    assert found[300][0] == config and found[300][1] == "as it is" and found[20] is None
    wanted, more, gpu, host = found[80]
    assert more == "--gradient_checkpointing True --offload True --rollout_prompts 16" and wanted.rollout_prompts == 16
    assert gpu <= 0.95 * 80e9 and (gpu, host) == memory.plan(counted, wanted, 0, True)["most at once"]
    assert memory.advice(counted, config, 0) == f"{more}: {gpu / 1e9:.1f} GB, {host / 1e9:.1f} GB of the host"


def test_the_plan_counts_prompts_as_long_as_the_benchmark_has_them():
    counted = (1e9, 1e8, 1000, {False: 1e9, True: 1e8}, 128256)
    for name, prompt in (("builtin", 64), ("rwku", 64), ("tofu", 64), ("muse", 512)):
        config = Config(benchmark=name, max_new_tokens=128)
        assert memory.plan(counted, config, 0, True)["KV cache"][0] == 1.5 * 1000 * (32 * prompt + 256 * 128)


def test_dry_run_prints_and_leaves_nothing(tmp_path, capsys):
    LlamaConfig(**EIGHT).save_pretrained(tmp_path / "model")
    common = ["--benchmark", "rwku", "--data_dir", tmp_path, "--output_dir", tmp_path / "run", "--dry_run"]
    driver(*common, "--model", tmp_path / "model")
    printed = capsys.readouterr().out
    for name in memory.ROWS:
        assert name in printed
    assert "--gradient_checkpointing True --offload True --rollout_prompts" in printed
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="--model .*nowhere"):
        driver(*common, "--model", tmp_path / "nowhere")
    with pytest.raises(InputError, match="--dry_run: expected a --model"):
        driver("--dry_run")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plan_is_what_a_step_on_the_cpu_takes(checkpointing):
    """A step of the driver's own functions in a fresh process: its peak beside the plan's."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, TESTS / "ranks.py", "measure", str(checkpointing)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    planned, measured = map(float, done.stdout.split()[-2:])
    assert 0.85 < measured / planned < 1.15, done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_every_architecture_can_be_counted(kind, tmp_path):
    model = tiny(kind)
    model.save_pretrained(tmp_path)
    counted = memory.count(AutoConfig.from_pretrained(tmp_path), torch.float32, 32)
    assert counted[0] == sum(p.numel() for p in model.parameters()) and counted[3][True] < counted[3][False]
