"""A whole job where bf16 computes, as on a GPU, on architectures whose query heads share keys."""

import json
import math

import pytest
import torch
from made import SMALL, byte_tokenizer, published_rwku
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import rerule
from engine import fast, process

KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma": (GemmaConfig, GemmaForCausalLM),
}


class Half(process.Engine):
    """One process on the CPU that does what it does on a GPU."""

    def __init__(self, *args):
        super().__init__(*args)
        self.half, self.trained = True, set()

    def session(self):
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)

    def step(self, found, *args):
        self.trained |= {(p.dtype, p.grad.dtype) for p in found.parameters() if p.grad is not None}
        return super().step(found, *args)


@pytest.mark.parametrize("kind", KINDS)
def test_stage_1_and_rerule_in_bf16(kind, tmp_path, monkeypatch):
    """Keys and values of every sampler are bf16; weights and gradients are float32 and move; what is saved is bf16."""
    config_of, model_of = KINDS[kind]
    published_rwku(tmp_path / "data")
    torch.manual_seed(0)
    model_of(
        config_of(
            vocab_size=259,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=1024,
            initializer_range=0.1,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )  # fmt: skip
    ).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    kept, made, engine = set(), fast.RoomAhead.__init__, Half("cpu", 400)

    def noted(room, layer):
        kept.update((layer.keys.dtype, layer.values.dtype))
        made(room, layer)

    monkeypatch.setattr(fast.RoomAhead, "__init__", noted)
    monkeypatch.setattr(rerule, "start", lambda config: engine)
    flags = [*SMALL[SMALL.index("--sft_steps") :], "--sft_lr", "1e-3", "--benchmark", "rwku", "--method", "rerule"]
    where = {"model": tmp_path / "model", "data_dir": tmp_path / "data", "output_dir": tmp_path / "run"}
    rerule.main(rerule.configure(flags + [str(word) for name, path in where.items() for word in (f"--{name}", path)]))
    assert kept == {torch.bfloat16} and engine.trained == {(torch.float32, torch.float32)}
    assert all("plain numbers" in line for line in engine.ways.values()), engine.ways  # no way was turned down
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["method"] == "rerule"]
    assert len(rows) == 4 and any(row.get("replay_groups") for row in rows)
    assert all(math.isfinite(row[name]) for row in rows for name in ("loss", "kl", "reward", "grad_norm"))
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name) for name in ("rej_steer", "rerule"))
    assert before.dtype == after.dtype == torch.bfloat16
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
