"""What a run leaves on disk: models in the wanted number type, at most one state beside the one being written."""

import json

import pytest
import torch
from conftest import tiny
from made import byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import rerule
from baselines.whp import Pair
from engine.process import Engine
from engine.run import Run


def saved(folder, model, *flags, half=False):
    """The folder that `Run.save_model` makes of a model."""
    engine = Engine("cpu")
    engine.half = half  # as where a GPU computes
    run = Run(rerule.configure([*flags, "--output_dir", str(folder)]), engine)
    run.open()
    run.save_model("rule", model, byte_tokenizer())
    return folder / "rule"


def weights_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def llama(tied):
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=259, tie_word_embeddings=tied, **sizes)).eval()


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_saved_in_bf16_takes_half_the_bytes_and_is_the_rounded_one(tied, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "whole", llama(tied)))
    half = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "half", llama(tied), "--save_dtype", "bfloat16"))
    assert whole.dtype == torch.float32 and half.dtype == torch.bfloat16  # as config.json says
    assert json.loads((tmp_path / "half" / "rule" / "config.json").read_text())["dtype"] == "bfloat16"
    assert weights_of(tmp_path / "half") == pytest.approx(weights_of(tmp_path / "whole") / 2, rel=0.01)
    assert weights_of(tmp_path / "whole") == pytest.approx(4 * sum(p.numel() for p in whole.parameters()), rel=0.01)
    for (name, p), q, own in zip(whole.named_parameters(), half.parameters(), llama(tied).parameters(), strict=True):
        assert torch.equal(p, own) and torch.equal(q, own.bfloat16()), name
    assert (half.lm_head.weight is half.model.embed_tokens.weight) == tied


def test_auto_is_bf16_where_a_gpu_computes_alone(tmp_path):
    expected = {(False, "auto"): torch.float32, (True, "auto"): torch.bfloat16, (True, "float32"): torch.float32}
    for (half, flag), dtype in expected.items():
        folder = saved(tmp_path / f"{half} {flag}", tiny("qwen2"), "--save_dtype", flag, half=half)
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == dtype


def test_both_models_of_a_pair_are_cast(tmp_path):
    folder = saved(tmp_path / "run", Pair(tiny("llama"), tiny("llama"), 1.5), "--save_dtype", "bfloat16")
    for name in ("original", "reinforced"):
        assert AutoModelForCausalLM.from_pretrained(folder / name).dtype == torch.bfloat16
    pair, _ = Engine("cpu").load(folder)
    assert pair.alpha == 1.5 and pair.dtype == torch.float32
    assert torch.equal(pair.original.lm_head.weight, tiny("llama").lm_head.weight.bfloat16().float())
