import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

import world  # noqa: E402

SIZES = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)


def tiny(architecture, vocab=40):
    torch.manual_seed(0)
    if architecture == "gpt2":
        config = GPT2Config(
            vocab_size=vocab, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3, **SIZES
        )
        return GPT2LMHeadModel(config).eval()
    kinds = {"llama": (LlamaConfig, LlamaForCausalLM, 2), "qwen2": (Qwen2Config, Qwen2ForCausalLM, 1)}
    config_of, model_of, kv_heads = kinds[architecture]
    config = config_of(
        vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=kv_heads, max_position_embeddings=64, initializer_range=0.3, **SIZES,
    )  # fmt: skip
    return model_of(config).eval()


@pytest.fixture(params=["llama", "qwen2", "gpt2"])
def any_model(request):
    """A random model of each architecture, sharp enough (init 0.3) that a wrong position or mask shows."""
    return tiny(request.param)


@pytest.fixture
def model():
    return tiny("llama")


@pytest.fixture
def words():
    """A whole-word tokenizer that puts BOS before every text."""
    return world.word_tokenizer(["a b c d e f g h who where is was the cat dog ? [INST] [/INST] I don't know that."])
