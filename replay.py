"""Stage 2's off-policy half: the buffer of hard groups and their importance-weighted update, Eq. 5.

Covers Section 3.3, the hard-case test of Section 3.2, Table 4's control and κ of Appendix E (29).

Symbols: B the buffer, τ the hard-case threshold, r̄ a group's mean reward, w_i the importance weight of response y_i,
ε_low and ε_high its clipping range.

Deviations
- The paper leaves the ratio's level, its range and the normalisation open: `is_level`, `clip_low`, `clip_high`,
  `is_objective` and `is_normalize` choose, with Eq. 5 as it is written for the default.
- Storing goes on after replay has started unless `store_until` is "activation".
- The KL term is left off replayed rollouts: k3 of a stale refusal explodes (`replay_kl` brings it back).
"""

from collections import deque

import torch


class ReplayBuffer:
    """A ring of rollout groups: at capacity the oldest leaves."""

    def __init__(self, capacity, groups=()):
        self.ring = deque(groups, maxlen=capacity)

    def __len__(self):
        return len(self.ring)

    def add(self, groups):
        self.ring.extend(groups)

    def sample(self, n, generator):
        """min(n, |B|) groups, uniformly and without replacement."""
        return draw(list(self.ring), n, generator)


def draw(groups, n, generator):
    """min(n, len(groups)) of the groups, uniformly and without replacement."""
    return [groups[i] for i in torch.randperm(len(groups), generator=generator)[:n].tolist()]


def is_hard(group, tau):
    """x ∈ Hard(τ): the group's mean reward r̄ is below τ (Section 3.2)."""
    return group.rewards.mean().item() < tau


def groups_to_store(groups, tau, store, generator):
    """The hard groups of a step.

    store: "random" (Table 4's control) as many, drawn uniformly from all of them; "unequal" those that have a gradient.
    """
    hard = [group for group in groups if is_hard(group, tau) and not (store == "unequal" and group.all_equal())]
    return draw(groups, len(hard), generator) if store == "random" else hard


def is_active(n_stored, min_groups, step, warmup_steps):
    """Replay runs once |B| ≥ min_groups and step > warmup_steps (steps count from 1)."""
    return n_stored >= min_groups and step > warmup_steps


def importance_ratio(logprobs, old_logprobs, mask, level):
    """π_θ/π_old per token, (B, T): of the token itself, or of its whole response, the same in every column.

    level: "sequence" π_θ(y|x)/π_old(y|x), the exp of the summed log-ratio; "token"; "geometric", the |y|-th root of
    the sequence's. Log-ratios are held within ±20, far outside any clipping range, so that none overflows.
    """
    log_ratio = (logprobs - old_logprobs) * mask  # (B, T)
    if level != "token":
        log_ratio = log_ratio.sum(-1, keepdim=True)  # (B, 1)
        if level == "geometric":
            log_ratio = log_ratio / mask.sum(-1, keepdim=True)
    return log_ratio.clamp(-20, 20).exp().expand_as(logprobs)


def one_each(ratio, mask, level):
    """The distinct values of a (B, T) ratio: one for each token at level "token", else one for each response."""
    return ratio[mask] if level == "token" else ratio[:, 0]


def clip_ratio(ratio, clip_low, clip_high):
    """w = clip(ratio, 1 − ε_low, 1 + ε_high)."""
    return ratio.clamp(1 - clip_low, 1 + clip_high)


def off_policy_loss(logprobs, ratio, advantages, clip_low, clip_high, objective="weight", mean_weight=1.0):
    """Per-token loss of a replayed response, (B, T).

    objective "weight": gradient −w_i Â_i ∇log π_θ, w_i held fixed, as Eq. 5 is written; w_i over `mean_weight` where
        weights are normalised.
    objective "surrogate": PPO's −min(ρ Â, clip(ρ) Â), ρ differentiated: no gradient once a ratio is out of range on
        the side where its advantage has already pushed it.
    Args: logprobs (B, T) with gradient; ratio (B, T) from `importance_ratio`; advantages (B, 1).
    """
    one = torch.exp(logprobs - logprobs.detach())  # value 1, gradient ∇log π_θ
    ratio = ratio.detach()
    if objective == "surrogate":
        rho = ratio * one
        return -torch.minimum(rho * advantages, clip_ratio(rho, clip_low, clip_high) * advantages)
    return -clip_ratio(ratio, clip_low, clip_high) / mean_weight * advantages * one  # Eq. 5


def effective_sample_size(weights):
    """κ = (Σ w)² / (n Σ w²) ∈ (0, 1] over the n weights of one replay update (Appendix E, 29)."""
    return (weights.sum() ** 2 / (len(weights) * (weights**2).sum())).item()


def ratio_statistics(ratios, clip_low, clip_high):
    """What a replay update's ratios were, unclipped unless said so; `ratios` (n,) of the groups not skipped."""
    clipped = clip_ratio(ratios, clip_low, clip_high)
    return {
        "ratio_mean": ratios.mean().item(),
        "ratio_min": ratios.min().item(),
        "ratio_max": ratios.max().item(),
        "clipped_share": (clipped != ratios).float().mean().item(),
        "ess": effective_sample_size(clipped),
        "ess_unclipped": effective_sample_size(ratios),
    }
