"""Equations and traps of the on-policy half, each against a hand-worked number or a naive implementation."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import PROMPTS, drawing, make_groups, naive_logprobs, naive_loss, tiny

import grpo
from engine.process import micro_batches

plain_logprobs = partial(grpo.response_logprobs, temperature=1.0)


# --- advantages, KL, loss --------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    # mean 0.5, deviations ±0.5, sample variance 4·0.25/3, so std = 0.57735 and Â = ±0.86602 (less 1e-6's trace)
    got = grpo.group_advantages(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    assert torch.allclose(got, torch.tensor([[-0.866024, -0.866024, 0.866024, 0.866024]]), atol=1e-5)
    got = grpo.group_advantages(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), unbiased=False)
    assert torch.allclose(got, torch.tensor([[-1.0, -1.0, 1.0, 1.0]]), atol=1e-5)


def test_seven_ones_and_a_half():
    got = grpo.group_advantages(torch.tensor([[1.0] * 7 + [0.5]]))[0]
    assert got[0] == pytest.approx(0.354, abs=1e-3) and got[-1] == pytest.approx(-2.475, abs=1e-3)
    assert (got**2).sum() == pytest.approx(7, abs=1e-3)  # Σ Â² = G − 1 for any unequal group


@pytest.mark.parametrize("value", [0.0, 0.1, 0.5, 2 / 3, 1.0])
def test_equal_rewards_give_exactly_zero(value):
    assert (grpo.group_advantages(torch.full((2, 7), value)) == 0).all()


def test_a_group_of_one_is_an_error():
    with pytest.raises(ValueError, match="at least 2"):
        grpo.group_advantages(torch.ones(4, 1))


def test_k3_by_hand():
    log_p, log_ref = torch.log(torch.tensor([0.5, 0.25])), torch.log(torch.tensor([0.25, 0.5]))
    # Δ = −ln 2 and ln 2: 0.5 + 0.6931 − 1 and 2 − 0.6931 − 1
    assert torch.allclose(grpo.k3(log_p, log_ref), torch.tensor([0.193147, 0.306853]), atol=1e-6)
    assert (grpo.k3(log_p, log_p) == 0).all()
    assert grpo.k3(torch.tensor(-30.0), torch.tensor(0.0)) == 10  # clamped
    far = torch.tensor([-3.0, -30.0, -300.0], requires_grad=True)
    grpo.k3(far, torch.zeros(3)).sum().backward()  # exp(300) is more than float32 holds
    assert far.grad.tolist() == [0.0, 0.0, 0.0]


def test_k3_is_unbiased_for_the_kl_of_its_sampler():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    expected = (p * grpo.k3(p.log(), q.log())).sum()
    assert expected.item() == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-6)


def test_policy_gradient_is_eq_3():
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    advantages = torch.tensor([[2.0], [-1.0]])
    loss = grpo.policy_gradient_loss(logprobs, advantages)
    assert torch.equal(loss.detach(), torch.tensor([[-2.0, -2.0], [1.0, 1.0]]))  # value −Â
    loss.sum().backward()
    assert torch.equal(logprobs.grad, torch.tensor([[-2.0, -2.0], [1.0, 1.0]]))  # gradient −Â ∇log π


def test_token_weights_by_hand():
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    assert torch.allclose(grpo.token_weights(mask, "sequence", 2, 6)[:, 0], torch.tensor([1 / 8, 1 / 4]))
    assert torch.allclose(grpo.token_weights(mask, "token", 2, 6)[:, 0], torch.tensor([1 / 6, 1 / 6]))
    assert torch.allclose(grpo.token_weights(mask, "sum", 2, 6)[:, 0], torch.tensor([1 / 2, 1 / 2]))
    for norm in ("sequence", "token", "sum"):
        assert (grpo.token_weights(mask, norm, 2, 6)[1, 2:] == 0).all()


# --- log-probabilities and gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.9])
def test_logprobs_equal_a_naive_forward(any_model, temperature):
    groups = make_groups(any_model, temperature=temperature)
    with torch.no_grad():
        plain = grpo.response_logprobs(any_model, grpo.collate(groups, "cpu"), temperature)
        rows = [(g.prompt_ids.tolist(), r[m].tolist(), o[m]) for g in groups
                for r, m, o in zip(g.response_ids, g.mask, g.old_logprobs, strict=True)]  # fmt: skip
        for i, (prompt, response, old) in enumerate(rows):
            naive = naive_logprobs(any_model, prompt, response, temperature)
            for got in (plain[i, : len(response)], old):
                assert torch.allclose(got, naive, atol=1e-5)


def test_a_row_does_not_depend_on_its_batch(any_model):
    groups = make_groups(any_model)
    with torch.no_grad():
        together = grpo.response_logprobs(any_model, grpo.collate(groups, "cpu"), 1.0)
        alone = grpo.response_logprobs(any_model, grpo.collate(groups[:1], "cpu"), 1.0)
    mask = groups[0].mask
    assert torch.allclose(together[:3, : mask.shape[1]][mask], alone[mask], atol=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 50, 10_000])
@pytest.mark.parametrize("norm", ["sequence", "token", "sum"])
def test_loss_and_gradient_do_not_depend_on_the_split(model, norm, max_tokens):
    groups = make_groups(model, prompts=((3, 4), (5, 6, 7, 8, 9), (8,), (4, 4, 4)))
    grpo.add_reference(tiny("llama"), [grpo.collate(groups, "cpu")], plain_logprobs)
    for group in groups:
        group.ref_logprobs -= 0.3

    def token_loss(batch, logprobs):
        return grpo.policy_gradient_loss(logprobs, batch.advantages) + 0.1 * grpo.k3(logprobs, batch.ref_logprobs)

    batches = [grpo.collate(part, "cpu", norm, of=groups) for part in micro_batches(groups, max_tokens)]
    assert len(batches) == {1: 4, 50: 2, 10_000: 1}[max_tokens]
    value = grpo.accumulate_gradient(model, batches, token_loss, plain_logprobs)
    other = tiny("llama")
    total, _ = naive_loss(other, groups, norm, 0.1)
    total.backward()
    assert value == pytest.approx(total.item(), abs=1e-5)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("norm", ["sequence", "token", "sum"])
def test_on_policy_gradient_is_that_of_eq_3_and_beta_kl_by_one_row_at_a_time(model, norm):
    groups, other = make_groups(model, prompts=((3, 4), (5, 6, 7, 8, 9), (8,))), tiny("llama")
    for group in groups:
        group.ref_logprobs = group.old_logprobs + 0.3
    groups[1].old_logprobs = groups[1].old_logprobs - 0.25 * groups[1].mask  # as if the weights had moved since
    batches = [grpo.collate(part, "cpu", norm, of=groups) for part in (groups[:1], groups[1:])]
    loss, kl = grpo.on_policy_gradient(model, batches, 0.1, plain_logprobs)
    total, expected = naive_loss(other, groups, norm, 0.1)
    total.backward()
    assert loss == pytest.approx(total.item(), abs=1e-5) and kl == pytest.approx(expected, rel=1e-4)
    for group, shift in zip(groups, (0.0, -0.25, 0.0), strict=True):
        moved = (group.old_logprobs - group.train_logprobs)[group.mask]  # (Σ|y|,)
        assert group.train_logprobs.shape == group.mask.shape and torch.allclose(moved, torch.tensor(shift), atol=1e-5)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=2e-5, rtol=1e-3)


def test_a_batch_of_weight_0_adds_nothing_to_gradient_loss_or_kl(model):
    """What several ranks put in a missing micro-batch's place."""
    groups = make_groups(model)
    for group in groups:
        group.ref_logprobs = group.old_logprobs + 0.3
    batch, stand_in = (grpo.collate([group], "cpu", of=groups) for group in groups)
    stand_in.weights.zero_()
    alone = grpo.on_policy_gradient(model, [batch], 0.1, plain_logprobs)
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    assert grpo.on_policy_gradient(model, [batch, stand_in], 0.1, plain_logprobs) == alone
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), gradients, strict=True))


def test_collate_keeps_padding_out(model):
    groups = make_groups(model)
    batch = grpo.collate(groups, "cpu")
    assert batch.prompt_ids.shape == (2, 5) and batch.prompt_mask[0].tolist() == [False] * 3 + [True] * 2
    assert batch.response_ids.shape == batch.mask.shape == batch.old_logprobs.shape == batch.weights.shape
    assert batch.ref_logprobs is None and batch.advantages.shape == (6, 1) and batch.groups == groups
    assert torch.equal(batch.weights > 0, batch.mask)
    assert grpo.positions(batch.prompt_mask)[0].tolist() == [0, 0, 0, 0, 1]


def test_groups_without_rewards_can_be_collated_for_the_reference(model):
    groups = make_groups(model)
    for group in groups:
        group.rewards = group.advantages = None
    batch = grpo.collate(groups, "cpu")
    assert batch.advantages is None
    grpo.add_reference(model, [batch], plain_logprobs)
    for group in groups:
        assert group.ref_logprobs.shape == group.mask.shape
        assert torch.allclose(group.ref_logprobs[group.mask], group.old_logprobs[group.mask], atol=1e-5)


# --- sampling and its traps ------------------------------------------------------------------------------------------


def test_mask_comes_from_generated_length_not_from_token_ids(model):
    """Pad = EOS = 0 here, and the stop token's own log-probability is trained."""
    ids, mask, logprobs = grpo.sample(model, [[3, 4]] * 4, 8, 12, [0], 1.0, drawing(32, 1))
    lengths = mask.sum(-1)
    assert (lengths > 0).all() and len(lengths.unique()) > 1
    for row, keep, log_p in zip(ids.flatten(0, 1), mask.flatten(0, 1), logprobs.flatten(0, 1), strict=True):
        n = int(keep.sum())
        assert keep[:n].all() and not keep[n:].any()
        assert (row[: n - 1] != 0).all()
        assert n == len(row) or row[n - 1] == 0  # the stop token is inside the mask
        assert (log_p[:n] < 0).all()


def test_behind_its_end_a_response_holds_nothing(any_model):
    """Ids 0, mask False, log-probability 0, whatever the stop tokens are."""
    ids, mask, logprobs = grpo.sample(any_model, PROMPTS, 8, 12, list(range(5, 15)), 1.0, drawing(16, 0))
    lengths = mask.sum(-1)
    assert ids.shape == mask.shape == logprobs.shape == (2, 8, 12) and len(lengths.unique()) > 2
    assert torch.equal(mask, torch.arange(12) < lengths[..., None])
    assert (ids[~mask] == 0).all() and (logprobs[~mask] == 0).all() and (logprobs[mask] < 0).all()
    ended = lengths < 12
    last = ids.gather(-1, lengths[..., None] - 1)[..., 0]
    assert torch.isin(last[ended], torch.arange(5, 15)).all()


def test_several_stop_ids(model):
    ids, mask, _ = grpo.sample(model, [[3, 4]], 64, 12, [2, 5, 7], 1.0, drawing(64, 0))
    last = {int(row[keep][-1]) for row, keep in zip(ids[0], mask[0], strict=True) if not keep.all()}
    assert len(last) > 1 and last <= {2, 5, 7}


def test_greedy_equals_generate_and_ignores_padding(any_model):
    prompts = [[3, 4, 5], [6], [7, 8, 9, 10, 11]]
    ids, mask, _ = grpo.sample(any_model, prompts, 1, 8, [2], 0.0)
    for n, prompt in enumerate(prompts):
        out = any_model.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0
        )
        assert ids[n, 0][mask[n, 0]].tolist() == out[0, len(prompt) :].tolist()


def test_sampling_follows_the_models_distribution():
    """Chi-square of 8,000 two-token responses against the exact probabilities, at a temperature other than 1."""
    from scipy.stats import chisquare

    small = tiny("llama", vocab=6)
    ids, mask, _ = grpo.sample(small, [[3, 4]], 8000, 2, [2], 0.8, drawing(8000, 3))
    with torch.no_grad():
        first = F.softmax(small(torch.tensor([[3, 4]])).logits[0, -1] / 0.8, -1)
        then = F.softmax(small(torch.tensor([[3, 4, a] for a in range(6)])).logits[:, -1] / 0.8, -1)
    expected, counted = [], []
    for a in range(6):
        for b in range(6) if a != 2 else [0]:
            expected.append(first[a] if a == 2 else first[a] * then[a, b])
            counted.append(((ids[0, :, 0] == a) & ((ids[0, :, 1] == b) | (a == 2))).sum())
    expected, counted = torch.stack(expected), torch.stack(counted)
    assert expected.sum().item() == pytest.approx(1, abs=1e-5)
    large = expected * 8000 > 5
    observed = torch.cat([counted[large], counted[~large].sum()[None]]).double()
    wanted = torch.cat([expected[large], expected[~large].sum()[None]]).double() * 8000
    assert chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-3
    assert not mask[0, :, 1][ids[0, :, 0] == 2].any()


def test_the_same_generator_gives_the_same_rollouts(model):
    first, second = (make_groups(model, seed=5) for _ in range(2))
    assert all(torch.equal(a.response_ids, b.response_ids) for a, b in zip(first, second, strict=True))
    assert not torch.equal(make_groups(model, seed=6)[0].response_ids[:, :1], first[0].response_ids[:, :1])
