"""The engine of one process: micro-batches, their weights, and draws that do not depend on how they are made."""

import weakref

import pytest
import torch
from conftest import drawing, make_groups, naive_loss, tiny

import grpo
from engine import fast
from engine.model import optimizer_for
from engine.process import Engine, micro_batches

PROMPTS = [tuple(range(3, 3 + n)) for n in (1, 9, 4, 2, 7)]
NORMS = ["sequence", "token", "sum"]


def test_micro_batches_hold_every_group_once_and_the_budget(model):
    groups = make_groups(model, prompts=PROMPTS)
    parts = micro_batches(groups, 60)
    assert sorted(g.query for part in parts for g in part) == [0, 1, 2, 3, 4] and 1 < len(parts) < 5
    for part in parts:
        width = max(len(g.prompt_ids) + g.mask.numel() for g in part)
        assert len(part) == 1 or len(part) * width <= 60


@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])
@pytest.mark.parametrize("norm", NORMS)
def test_weights_of_all_micro_batches_are_those_of_the_whole(model, norm, max_tokens):
    """Also where some groups of the update are left out: divisors count them all the same."""
    every = make_groups(model, prompts=PROMPTS, stops=range(2, 12))
    for groups, of in ((every, None), (every[1:4], every)):
        batches = list(Engine("cpu", max_tokens).batches(model, groups, norm, of))
        together = grpo.collate(every, "cpu")
        whole = grpo.token_weights(together.mask, norm, *together.mask.shape[:1], together.mask.sum())  # (B, T)
        whole = dict(zip((g.query for g in every), whole.split(3), strict=True))
        found = {}
        for batch in batches:
            parts = batch.weights.split(3)
            found |= {group.query: part for group, part in zip(batch.groups, parts, strict=True)}
        assert set(found) == {group.query for group in groups}
        for query, weights in found.items():
            width = min(weights.shape[1], whole[query].shape[1])
            assert torch.allclose(weights[:, :width], whole[query][:, :width], rtol=1e-6)
            assert (weights[:, width:] == 0).all() and (whole[query][:, width:] == 0).all()
        expected = sum(whole[group.query].sum() for group in groups)
        assert sum(batch.weights.sum() for batch in batches) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])
@pytest.mark.parametrize("norm", NORMS)
def test_an_update_depends_on_neither_max_tokens_nor_checkpointing(model, norm, max_tokens, checkpointed):
    engine, groups, other = Engine("cpu", max_tokens), make_groups(model, prompts=PROMPTS), tiny("llama")
    logprobs_of = engine.logprobs(1.0)
    grpo.add_reference(other, engine.batches(other, groups), logprobs_of)
    for group in groups:
        group.ref_logprobs -= 0.3
    if checkpointed:
        fast.checkpoint_layers(model)
    loss, kl = grpo.on_policy_gradient(model, engine.batches(model, groups, norm), 0.1, logprobs_of)
    total, expected = naive_loss(other, groups, norm, 0.1)
    total.backward()
    assert loss == pytest.approx(total.item(), abs=1e-5) and kl == pytest.approx(expected, rel=1e-4)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=2e-5, rtol=1e-3)


def test_so_many_prompts_side_by_side_draw_the_same(any_model):
    prompts = [[3, 4], [5, 6, 7], [8], [4, 4, 4, 4], [9, 3]]
    how = (any_model, prompts, 3, 7, [2], 1.0)
    found = [Engine("cpu", rollout_prompts=n).sample(*how, torch.Generator().manual_seed(5)) for n in (0, 1, 2, 9)]
    found.append(grpo.sample(*how, drawing(15, 5)))
    for ids, mask, logprobs in found[1:]:
        assert torch.equal(ids, found[0][0]) and torch.equal(mask, found[0][1])
        assert torch.allclose(logprobs, found[0][2], atol=1e-5)


def test_where_bf16_computes_a_copy_in_bf16_is_sampled_from(any_model, monkeypatch):
    """Keys are bf16, and each sampling has the weights of its time; under autocast fp32 weights leave keys in fp32."""
    engine, seen = Engine("cpu"), []
    engine.half = True
    choose = fast.choose

    def spied(model, what, told):
        seen.append(model)
        return choose(model, what, told)

    monkeypatch.setattr(fast, "choose", spied)
    how = ([[3, 4], [5, 6, 7]], 2, 4, [2], 1.0)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        engine.sample(any_model, *how, torch.Generator().manual_seed(5))
        kept = any_model(torch.tensor([[3, 4]]), use_cache=True).past_key_values.layers[0]
        low = seen[0](torch.tensor([[3, 4]]), use_cache=True).past_key_values.layers[0]
        assert low.keys.dtype == low.values.dtype == torch.bfloat16
        assert (kept.keys.dtype == torch.float32) == (any_model.config.model_type != "gpt2")  # which rotates no key
        with torch.no_grad():
            any_model.get_output_embeddings().weight[7] += 100 * any_model.get_output_embeddings().weight[7].sign()
        engine.sample(any_model, *how, torch.Generator().manual_seed(5))
    ours = dict(any_model.named_parameters())
    assert seen[1] is not seen[0] and all(p.dtype == torch.float32 and p.requires_grad for p in ours.values())
    assert all(torch.equal(p, ours[name].detach().bfloat16()) for name, p in seen[1].named_parameters())
    assert len(engine.ways) == 1  # tried once
    engine.half = False
    assert engine.lowered(any_model) is any_model


def test_sampling_that_runs_out_of_memory_takes_half_as_many_prompts(model, monkeypatch, capsys):
    prompts, asked = [[3, 4], [5, 6, 7], [8], [4, 4, 4, 4], [9, 3]], []
    how = (model, prompts, 3, 7, [2], 1.0)
    whole = Engine("cpu").sample(*how, torch.Generator().manual_seed(5))

    def scarce(model, prompts, *more):
        asked.append(len(prompts))
        if len(prompts) > room:
            raise torch.OutOfMemoryError
        return grpo.sample(model, prompts, *more)

    monkeypatch.setattr(fast, "choose", lambda *_: scarce)
    engine, room = Engine("cpu"), 1
    found = engine.sample(*how, torch.Generator().manual_seed(5))
    assert torch.equal(found[0], whole[0]) and torch.equal(found[1], whole[1])
    assert asked == [5, 2, 1, 1, 1, 1, 1] and engine.rollout_prompts == 1
    assert "out of memory: 2 prompts side by side from here on" in capsys.readouterr().err
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        engine.sample(*how, torch.Generator().manual_seed(5))


def test_a_model_let_go_of_is_freed_before_the_next_is_read(monkeypatch):
    engine, held = Engine("cpu"), tiny("llama")
    held.itself, gone = [held], weakref.ref(held)  # a cycle, as FSDP makes
    del held
    monkeypatch.setattr(engine, "read", lambda *_: (tiny("llama"), gone()))
    assert engine.load("any")[1] is None


def test_greedy_answers_need_no_generator_and_do_not_depend_on_the_split(any_model):
    prompts = [[3, 4], [5, 6, 7], [8], [4, 4, 4, 4], [9, 3]]
    found = [Engine("cpu", rollout_prompts=n).sample(any_model, prompts, 1, 7, [2], 0) for n in (0, 2)]
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_a_step_on_a_gradient_that_is_not_finite_is_not_taken(model):
    engine, optimizer = Engine("cpu"), optimizer_for(model, 1e-2, 0.0)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.tensor([[3, 4]])).logits.sum().backward()
    next(model.parameters()).grad[0, 0] = torch.nan
    assert not torch.tensor(engine.step(model, optimizer, 1.0)).isfinite()
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(model.parameters(), before, strict=True))


def test_the_norm_of_a_step_is_that_before_clipping(model):
    engine, optimizer = Engine("cpu"), optimizer_for(model, 1e-2, 0.0)
    model(torch.tensor([[3, 4]])).logits.logsumexp(-1).sum().backward()
    expected = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    before = [p.detach().clone() for p in model.parameters()]
    assert engine.step(model, optimizer, 1e-3) == pytest.approx(expected, rel=1e-5) and expected > 1e-3
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
