"""The ring, the hard-case test, activation, Eq. 5 and κ, against hand-worked numbers."""

import math

import pytest
import torch

import replay
from grpo import RolloutGroup


def group(step, rewards=(0.0, 1.0)):
    n = len(rewards)
    return RolloutGroup(
        step, torch.tensor([1]), torch.ones(n, 2, dtype=torch.long), torch.ones(n, 2, dtype=torch.bool),
        torch.zeros(n, 2), None, torch.tensor(rewards), torch.zeros(n), step,
    )  # fmt: skip


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_ring_drops_the_oldest():
    ring = replay.ReplayBuffer(3)
    for step in range(5):
        ring.add([group(step)])
    assert [g.step for g in ring.ring] == [2, 3, 4] and len(ring) == 3


def test_sampling_is_uniform_without_replacement():
    ring = replay.ReplayBuffer(10, [group(step) for step in range(6)])
    counts, generator = [0] * 6, rng()
    for _ in range(3000):
        drawn = [g.step for g in ring.sample(2, generator)]
        assert len(set(drawn)) == 2
        for step in drawn:
            counts[step] += 1
    assert all(abs(count - 1000) < 120 for count in counts)  # 5 standard deviations of a binomial(3000, 1/3)
    assert sorted(g.step for g in ring.sample(99, rng())) == list(range(6))


def test_hard_is_strictly_below_tau():
    assert replay.is_hard(group(1, [0.0, 0.5]), 0.4) and not replay.is_hard(group(1, [0.5, 0.5]), 0.5)
    # τ = 0.4 over 8 rollouts of {0, 0.5, 1} keeps means up to 6/16, not only groups of 0
    assert replay.is_hard(group(1, [0.5] * 6 + [0.0] * 2), 0.4) and not replay.is_hard(group(1, [0.5] * 7 + [0.0]), 0.4)


def test_random_storage_keeps_as_many_as_are_hard():
    groups = [group(i, [0.0, 0.0] if i < 3 else [1.0, 1.0]) for i in range(20)]
    assert [g.step for g in replay.groups_to_store(groups, 0.6, "hard", rng())] == [0, 1, 2]
    drawn = [tuple(g.step for g in replay.groups_to_store(groups, 0.6, "random", rng(s))) for s in range(20)]
    assert {len(steps) for steps in drawn} == {3} and len(set(drawn)) > 10
    assert any(step >= 3 for steps in drawn for step in steps)


def test_activation_needs_both_size_and_warm_up():
    assert replay.is_active(100, 100, 16, 15)
    assert not replay.is_active(99, 100, 16, 15) and not replay.is_active(100, 100, 15, 15)


OLD = torch.log(torch.tensor([[0.5, 0.2, 0.9], [0.4, 0.1, 0.5]]))
NEW = torch.log(torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.1, 0.5]]))
MASK = torch.tensor([[True, True, False], [True, True, True]])


def test_importance_ratio_by_hand():
    # first row: 0.6/0.5 = 1.2, 0.3/0.2 = 1.5, padding ignored; second: 0.5, 1, 1
    ratio = replay.importance_ratio(NEW, OLD, MASK, "token")
    assert torch.allclose(ratio, torch.tensor([[1.2, 1.5, 1.0], [0.5, 1.0, 1.0]]))
    ratio = replay.importance_ratio(NEW, OLD, MASK, "sequence")
    assert ratio.shape == (2, 3) and torch.allclose(ratio[:, 0], torch.tensor([1.8, 0.5]))
    ratio = replay.importance_ratio(NEW, OLD, MASK, "geometric")
    assert torch.allclose(ratio[:, 0], torch.tensor([1.8 ** (1 / 2), 0.5 ** (1 / 3)]))
    assert torch.allclose(replay.one_each(ratio, MASK, "geometric"), ratio[:, 2])
    assert replay.one_each(replay.importance_ratio(NEW, OLD, MASK, "token"), MASK, "token").shape == (5,)


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
