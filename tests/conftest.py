"""Tiny models, rollout groups and a naive computation of both, for tests in every folder."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]  # modules; what tests share

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

import grpo  # noqa: E402
from benchmarks.tiny import word_tokenizer  # noqa: E402

SIZES = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
PROMPTS = ((3, 4), (5, 6, 7, 8, 9))


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
    return word_tokenizer(["a b c d e f g h who where is was the cat dog ? [INST] [/INST] I don't know that."])


def drawing(n_responses, rng):
    """draw() of a sampler, in which a seed stands for a generator: a number for each response, and one to spare."""
    rng = torch.Generator().manual_seed(rng) if isinstance(rng, int) else rng
    return lambda: torch.rand(n_responses + 1, dtype=torch.double, generator=rng)


def make_groups(
    model, prompts=PROMPTS, temperature=1.0, seed=0, group_size=3, max_new=6, stops=(2,), sample=grpo.sample
):  # fmt: skip
    """Groups sampled from the model, with random rewards."""
    rng = torch.Generator().manual_seed(seed)
    draw = drawing(len(prompts) * group_size, rng)
    ids, mask, old = sample(model, prompts, group_size, max_new, list(stops), temperature, draw)
    rewards = torch.rand(len(prompts), group_size, generator=rng)
    advantages = grpo.group_advantages(rewards)
    return [
        grpo.RolloutGroup(n, 1, torch.tensor(p), ids[n], mask[n], old[n], None, rewards[n], advantages[n])
        for n, p in enumerate(prompts)
    ]


def naive_logprobs(model, prompt, response, temperature):
    """One unpadded row at a time, one full forward, a Python loop over tokens."""
    logits = model(torch.tensor([list(prompt) + list(response)])).logits[0]
    out = []
    for t, token in enumerate(response):
        row = logits[len(prompt) + t - 1] / temperature
        out.append(row[token] - torch.logsumexp(row, 0))
    return torch.stack(out)


def naive_loss(model, groups, loss_norm, kl_coef):
    """Eq. 3 and β KL by one row at a time. Returns: loss with its graph; the sum of k3 over tokens."""
    n_responses, n_tokens = sum(len(g.rewards) for g in groups), sum(int(g.mask.sum()) for g in groups)
    total, kl = 0.0, 0.0
    for group in groups:
        for i in range(len(group.mask)):
            tokens = group.response_ids[i][group.mask[i]].tolist()
            log_p = naive_logprobs(model, group.prompt_ids.tolist(), tokens, 1.0)
            delta = group.ref_logprobs[i][group.mask[i]] - log_p
            k3 = delta.exp() - delta - 1
            per_token = -group.advantages[i] * (log_p - log_p.detach() + 1) + kl_coef * k3
            weights = {"sequence": 1 / n_responses / len(tokens), "token": 1 / n_tokens, "sum": 1 / n_responses}
            total, kl = total + weights[loss_norm] * per_token.sum(), kl + k3.sum().item()
    return total, kl
