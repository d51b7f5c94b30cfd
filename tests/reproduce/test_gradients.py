"""Eq. 4 and Eq. 27 against a naive computation."""

import pytest
import torch

from benchmarks.builtin import World
from benchmarks.tiny import tiny_llama, word_tokenizer
from config import Config
from data import Training, stop_ids
from engine.process import Engine
from grpo import collate, response_logprobs
from refusal import is_refusal
from reproduce import gradients
from rerule import rollout, score
from reward import query_reward


def test_gradients_and_mis_refusals_by_a_naive_computation():
    """One region's norm by plain autograd over the same rollouts, its rates by counting them."""
    whole = World(0).training()
    queries = whole.queries[:4]
    tokenizer = word_tokenizer([p.plain for p, _ in whole.taught] + [answer for _, answer in whole.taught])
    model = tiny_llama(tokenizer, 0, 16, 1, 64).eval()
    config = Config(group_size=6, max_new_tokens=5, seed=3, max_tokens=60, loss_norm="sequence", kl_coef=0.01)
    small, place = Training([], queries), {0: "hard", 1: "easy", 2: "hard", 3: "hard"}
    engine, stops = Engine("cpu", config.max_tokens), stop_ids(tokenizer, model, False)
    found = gradients.regions_of(engine, model, tokenizer, small, place, config)
    assert found["hard"]["queries"] == 3 and found["easy"]["queries"] == 1
    groups = rollout(engine, model, tokenizer, queries, [0, 2, 3], stops, config, "probe hard")
    score(groups, queries, query_reward)
    loss = 0
    for group in groups:
        logprobs = response_logprobs(model, collate([group], "cpu"), 1.0)
        means = (logprobs * group.mask).sum(-1) / group.mask.sum(-1)
        loss = loss - (group.advantages * means).mean() / 3
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert found["hard"]["norm"] == pytest.approx(norm, rel=1e-3) and norm > 0
    assert found["hard"]["weighted"] == pytest.approx(0.75 * norm, rel=1e-3)
    forget = [is_refusal(text) for group in groups if queries[group.query].kind == "forget" for text in group.texts]
    assert found["hard"]["missed"] == pytest.approx(1 - sum(forget) / len(forget), abs=1e-4)
