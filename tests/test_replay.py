"""The ring, the hard-case test, activation, Eq. 5 and κ, against hand-worked numbers."""

import io
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import make_groups, naive_logprobs, tiny

import grpo
import replay
import rerule
from config import Config
from data import Prompt, Query, Training
from engine.process import Engine
from grpo import RolloutGroup

plain_logprobs = partial(grpo.response_logprobs, temperature=1.0)


def group(step, rewards=(0.0, 1.0)):
    n = len(rewards)
    return RolloutGroup(
        step, step, torch.tensor([1]), torch.ones(n, 2, dtype=torch.long), torch.ones(n, 2, dtype=torch.bool),
        torch.zeros(n, 2), None, torch.tensor(rewards), torch.zeros(n),
    )  # fmt: skip


def steps_of(groups):
    return [group.step for group in groups]


HARD, EASY, UNEQUAL = [0.0, 0.0], [1.0, 1.0], [0.0, 0.5]  # rewards, for τ = 0.6


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_ring_drops_the_oldest():
    ring = replay.ReplayBuffer(3)
    for step in range(5):
        ring.store([group(step)], 0.6, rng())
    assert steps_of(ring.ring) == [2, 3, 4] and len(ring) == 3


def test_sampling_is_uniform_without_replacement():
    ring = replay.ReplayBuffer(10)
    ring.store([group(step) for step in range(6)], 0.6, rng())
    counts, generator = [0] * 6, rng()
    for _ in range(3000):
        drawn = steps_of(ring.draw(2, [], generator))
        assert len(set(drawn)) == 2
        for step in drawn:
            counts[step] += 1
    assert all(abs(count - 1000) < 120 for count in counts)  # 5 standard deviations of a binomial(3000, 1/3)
    assert sorted(steps_of(ring.draw(99, [], rng()))) == list(range(6))


def test_hard_is_strictly_below_tau():
    assert replay.is_hard(group(1, [0.0, 0.5]), 0.4) and not replay.is_hard(group(1, [0.5, 0.5]), 0.5)
    # τ = 0.4 over 8 rollouts of {0, 0.5, 1} keeps means up to 6/16, not only groups of 0
    assert replay.is_hard(group(1, [0.5] * 6 + [0.0] * 2), 0.4) and not replay.is_hard(group(1, [0.5] * 7 + [0.0]), 0.4)


def test_hard_groups_are_what_is_stored():
    groups = [group(0, HARD), group(1, EASY), group(2, UNEQUAL)]
    ring = replay.ReplayBuffer(9)
    ring.store(groups, 0.6, rng())
    assert steps_of(replay.hard_groups(groups, 0.6)) == steps_of(ring.ring) == [0, 2]


def test_a_closed_buffer_stores_nothing_yet_knows_the_step_before():
    ring = replay.ReplayBuffer(10)
    ring.store([group(0, HARD)], 0.6, rng())
    ring.store([group(1, HARD)], 0.6, rng(), closed=True)
    assert steps_of(ring.ring) == [0] and steps_of(ring.previous) == [1]


def test_a_buffer_of_a_saved_state_is_the_one_that_was_saved():
    ring, again, file = replay.ReplayBuffer(2), replay.ReplayBuffer(2), io.BytesIO()
    for step in range(3):
        stored = group(step, UNEQUAL)
        stored.old_logprobs, stored.texts = torch.randn(2, 2), ["a b", "é"]
        ring.store([stored], 0.6, rng())
    torch.save(ring.state(), file)
    file.seek(0)
    again.restore(torch.load(file, weights_only=True))
    assert steps_of(again.ring) == [1, 2] and steps_of(again.previous) == [2]
    for one, other in zip(ring.ring, again.ring, strict=True):
        assert torch.equal(one.old_logprobs, other.old_logprobs) and one.texts == other.texts
        assert other.ref_logprobs is None and other.mask.dtype == torch.bool
    again.store([group(9, HARD)], 0.6, rng())
    assert steps_of(again.ring) == [2, 9]  # still a ring of two


def test_activation_needs_both_size_and_warm_up():
    assert replay.is_active(100, 100, 16, 15)
    assert not replay.is_active(99, 100, 16, 15) and not replay.is_active(100, 100, 15, 15)


OLD = torch.log(torch.tensor([[0.5, 0.2, 0.9], [0.4, 0.1, 0.5]]))
NEW = torch.log(torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.1, 0.5]]))
MASK = torch.tensor([[True, True, False], [True, True, True]])


def test_importance_ratio_by_hand():
    counted = SimpleNamespace(weights=grpo.token_weights(MASK, "sequence", 2, 5))
    # first row: 0.6/0.5 = 1.2, 0.3/0.2 = 1.5, padding ignored; second: 0.5, 1, 1
    ratio = replay.importance_ratio(NEW, OLD, MASK, "token")
    assert torch.allclose(ratio, torch.tensor([[1.2, 1.5, 1.0], [0.5, 1.0, 1.0]]))
    ratio = replay.importance_ratio(NEW, OLD, MASK, "sequence")
    assert ratio.shape == (2, 3) and torch.allclose(ratio[:, 0], torch.tensor([1.8, 0.5]))
    ratio = replay.importance_ratio(NEW, OLD, MASK, "geometric")
    assert torch.allclose(ratio[:, 0], torch.tensor([1.8 ** (1 / 2), 0.5 ** (1 / 3)]))
    assert torch.allclose(replay.one_each(ratio, counted, "geometric"), ratio[:, 2])
    assert replay.one_each(replay.importance_ratio(NEW, OLD, MASK, "token"), counted, "token").shape == (5,)


def test_ratio_never_overflows():
    ratio = replay.importance_ratio(
        torch.full((1, 500), -0.1), torch.full((1, 500), -9.0), torch.ones(1, 500), "sequence"
    )
    assert torch.isfinite(ratio).all() and torch.isfinite((ratio**2).sum())


def test_eq_5_value_and_gradient():
    new = NEW.clone().requires_grad_()
    ratio = replay.importance_ratio(new, OLD, MASK, "sequence")
    advantages = torch.tensor([[2.0], [-1.0]])
    loss = replay.off_policy_loss(new, ratio, advantages, 0.2, 0.3)
    loss[MASK].sum().backward()
    # weights: 1.8 → 1.3, 0.5 → 0.8; gradient −w Â on each token, w itself not differentiated
    assert torch.allclose(new.grad, torch.tensor([[-2.6, -2.6, 0.0], [0.8, 0.8, 0.8]]))
    new.grad = None
    loss = replay.off_policy_loss(new, ratio, advantages, 0.2, 0.3, mean_weight=1.05)
    loss[MASK].sum().backward()
    assert torch.allclose(new.grad[0, 0], torch.tensor(-2.6 / 1.05))


def test_surrogate_is_ppos_clipped_minimum():
    new = NEW.clone().requires_grad_()
    ratio = replay.importance_ratio(new, OLD, MASK, "token")
    advantages = torch.tensor([[2.0], [-1.0]])
    loss = replay.off_policy_loss(new, ratio, advantages, 0.2, 0.3, "surrogate")
    loss[MASK].sum().backward()
    # row 1, Â > 0: 1.2 in range → −2·1.2; 1.5 above it → clipped, no gradient. Row 2, Â < 0: 0.5 below → no gradient
    assert torch.allclose(new.grad, torch.tensor([[-2.4, 0.0, 0.0], [0.0, 1.0, 1.0]]))
    assert loss[1, 0].item() == pytest.approx(0.8)


def test_effective_sample_size_by_hand():
    assert replay.effective_sample_size(torch.tensor([2.0, 2.0, 2.0])) == pytest.approx(1)
    assert replay.effective_sample_size(torch.tensor([1.0, 0.0, 0.0, 0.0])) == pytest.approx(1 / 4)
    assert replay.effective_sample_size(torch.tensor([1.0, 3.0])) == pytest.approx(16 / 20)


def test_clipping_alone_keeps_kappa_above_its_bound():
    """With w in [0.8, 1.3], κ ≥ 4·0.8·1.3/2.1² whatever the ratios, so the unclipped κ is reported beside it."""
    worst = min(
        replay.ratio_statistics(torch.tensor([1e-6] * k + [1e6] * (60 - k)), 0.2, 0.3)["ess"] for k in range(1, 60)
    )
    assert worst >= 4 * 0.8 * 1.3 / 2.1**2 - 1e-6
    stats = replay.ratio_statistics(torch.tensor([0.5, 1.0, 2.0, 1.1]), 0.2, 0.3)
    assert stats["clipped_share"] == 0.5 and stats["ratio_max"] == 2 and stats["ratio_min"] == 0.5
    assert stats["ratio_mean"] == pytest.approx(1.15)
    assert stats["ess_unclipped"] == pytest.approx(4.6**2 / (4 * (0.25 + 1 + 4 + 1.21)))
    assert not math.isnan(stats["ess"])


# --- in the loop -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["sequence", "token", "geometric"])
def test_off_policy_gradient_is_that_of_eq_5_by_one_row_at_a_time(model, level):
    groups, other = make_groups(model, prompts=((3, 4), (5, 6, 7, 8, 9), (8,))), tiny("llama")
    for each, moved in zip(groups, (0.1, -0.02, 0.0), strict=True):
        each.old_logprobs = each.old_logprobs + moved * each.mask
    batches = [grpo.collate(part, "cpu", of=groups) for part in (groups[:2], groups[2:])]
    ratios = replay.off_policy_gradient(model, batches, Config(ratio_level=level), plain_logprobs)
    expected, total = [], 0.0
    for each in groups:
        for i, keep in enumerate(each.mask):
            log_p = naive_logprobs(other, each.prompt_ids.tolist(), each.response_ids[i][keep].tolist(), 1.0)
            moved = log_p.detach() - each.old_logprobs[i][keep]
            own = {"sequence": moved.sum()[None], "token": moved, "geometric": moved.mean()[None]}[level].exp()
            expected.append(own)
            total = total - (own.clamp(0.8, 1.3) * each.advantages[i] * log_p).sum() / len(log_p) / 9
    assert torch.allclose(ratios, torch.cat(expected), atol=1e-4) and len(ratios.unique()) > 2
    total.backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_a_batch_of_weight_0_has_no_ratios_and_no_gradient(model, level):
    """What several ranks put in a missing micro-batch's place."""
    groups, config = make_groups(model), Config(ratio_level=level)
    batch, stand_in = (grpo.collate([each], "cpu", of=groups) for each in groups)
    stand_in.weights.zero_()
    found = []
    for batches in ([batch], [batch, stand_in]):
        model.zero_grad()
        ratios = replay.off_policy_gradient(model, batches, config, plain_logprobs)
        assert torch.equal(ratios, replay.ratios_of(model, batches, level, plain_logprobs))
        found.append([ratios, *(p.grad.clone() for p in model.parameters())])
    assert len(found[0][0]) == (batch.mask.sum() if level == "token" else 3)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def rows_of_stage2(method, words):
    """Three steps of Stage 2 in which every group is hard and replay may start at once: the rows of its log."""
    rows, queries = [], [Query(Prompt(None, f"who is {c} ?"), c, "boundary", (c,)) for c in "abcd"]
    config = Config(
        steps=3, prompts_per_step=4, group_size=4, lr=1e-3, tau=1.0, min_groups=1, warmup_steps=0, buffer_size=20,
        replay_groups=3, max_new_tokens=4, save_every=0, eval_every=0,
    )  # fmt: skip
    logs = dict(log=lambda row, *_: rows.append(row), samples=SimpleNamespace(write=lambda row: None))
    run = SimpleNamespace(config=config, engine=Engine("cpu"), state={"phase": None}, **logs)
    model, reference = tiny("llama", len(words)), tiny("llama", len(words)).requires_grad_(False)
    rerule.stage2(run, method, model, reference, words, Training([], queries), lambda query, text: len(text) % 2 / 2)
    assert all(row["hard_groups"] == 1 for row in rows)
    return rows


def test_rules_buffer_stays_empty_whatever_is_hard(words):
    rows = rows_of_stage2("rule", words)
    assert [row["buffer_size"] for row in rows] == [0, 0, 0]
    assert not any(name.startswith(("replay", "ratio", "ess")) for row in rows for name in row)


def test_rerules_buffer_takes_every_hard_group_and_is_replayed_from_the_next_step(words):
    rows = rows_of_stage2("rerule", words)
    assert [row["buffer_size"] for row in rows] == [4, 8, 12]
    assert [row.get("replay_groups") for row in rows] == [None, 3, 3]


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("whose", ["sampler", "training"])
def test_ratios_of_fresh_groups_are_what_separates_the_sampler_from_training(model, level, whose):
    groups, config = make_groups(model), Config(ratio_level=level, old_logprobs=whose)
    sampled = [each.old_logprobs - 0.25 * each.mask for each in groups]  # the sampler's arithmetic was another
    for each, old in zip(groups, sampled, strict=True):
        each.train_logprobs, each.old_logprobs = each.old_logprobs.masked_fill(~each.mask, -9.0), old
    lengths = torch.cat([each.mask.sum(-1) for each in groups])  # (B,)
    expected = (0.25 * (lengths if level == "sequence" else torch.ones(int(lengths.sum())))).exp()
    found = replay.fresh_statistics(groups, config)
    clipped = expected.clamp(0.8, 1.3)
    assert found["logprob_gap"] == pytest.approx(0.25, abs=1e-5)
    assert found["fresh_ratio_mean"] == pytest.approx(expected.mean().item(), rel=1e-4)
    assert found["fresh_clipped_share"] == (expected > 1.3).float().mean().item()
    assert found["fresh_ess"] == pytest.approx(replay.effective_sample_size(clipped), rel=1e-4)
    for each, old in zip(groups, sampled, strict=True):
        assert each.train_logprobs is None  # nothing more to store with the group
        now = old + 0.25 * each.mask if whose == "training" else old
        assert torch.allclose(each.old_logprobs[each.mask], now[each.mask], atol=1e-6)
