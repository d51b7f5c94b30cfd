"""Stage 2's off-policy half: the buffer of hard groups and their importance-weighted update, Eq. 5.

Covers Section 3.3, the hard-case test of Section 3.2 and κ of Appendix E (29). Table 4's control and others are in
`baselines/controls.py`.

Symbols: B the buffer, τ the hard-case threshold, r̄ a group's mean reward, w_i the importance weight of response y_i,
ε_low and ε_high its clipping range. Shapes as in `grpo.py`.

Deviations
- The paper leaves the ratio's level, its range and the normalisation open: `ratio_level`, `epsilon_low`,
  `epsilon_high`, `replay_objective` and `normalize_ratio` choose, with Eq. 5 as it is written for the default.
- Storing goes on after replay has started unless `store_until` is "activation".
- The KL term is left off replayed rollouts: k3 of a stale refusal is large (`replay_kl` brings it back)."""

from collections import deque

import torch

from grpo import RolloutGroup, accumulate_gradient, k3


def is_hard(group, tau):
    """x ∈ Hard(τ): the group's mean reward r̄ is below τ (Section 3.2)."""
    return group.rewards.mean().item() < tau


def is_active(n_stored, min_groups, step, warmup_steps):
    """Replay runs once |B| ≥ min_groups and step > warmup_steps (steps count from 1)."""
    return n_stored >= min_groups and step > warmup_steps


def draw(groups, n, generator):
    """min(n, len(groups)) of the groups, uniformly and without replacement."""
    return [groups[i] for i in torch.randperm(len(groups), generator=generator)[:n].tolist()]


def hard_groups(groups, tau, generator=None):
    """What ReRULE stores of a step."""
    return [group for group in groups if is_hard(group, tau)]


class ReplayBuffer:
    """B, a ring of rollout groups: at capacity the oldest leaves.
    Args: stored(groups, tau, generator) → what of a step's groups enters B; drawn(ring, previous, groups, n, generator)
        → the groups to replay, `previous` being the step before's. Hard groups and uniform draws unless given."""

    def __init__(self, capacity, stored=hard_groups, drawn=lambda ring, previous, groups, n, rng: draw(ring, n, rng)):
        self.ring, self.previous, self.stored, self.drawn = deque(maxlen=capacity), [], stored, drawn

    def __len__(self):
        return len(self.ring)

    def draw(self, n, groups, generator):
        """n groups to replay in the step that has sampled `groups`."""
        return self.drawn(list(self.ring), self.previous, groups, n, generator)

    def store(self, groups, tau, generator, closed=False):
        """Step 6: what of a step's groups enters B; nothing once it is `closed`."""
        if not closed:
            self.ring.extend(self.stored(groups, tau, generator))
        self.previous = groups

    def state(self):
        return {"buffer": [vars(g) for g in self.ring], "previous": [vars(g) for g in self.previous]}

    def restore(self, state):
        self.ring.extend(RolloutGroup(**group) for group in state["buffer"])
        self.previous = [RolloutGroup(**group) for group in state["previous"]]


# --- Eq. 5 -----------------------------------------------------------------------------------------------------------


def importance_ratio(logprobs, old_logprobs, mask, level):
    """π_θ/π_old per token, (B, T): of the token itself, or of its whole response, the same in every column.
    level: "sequence" π_θ(y|x)/π_old(y|x), the exp of the summed log-ratio; "token"; "geometric", the |y|-th root of
    the sequence's. Log-ratios are held within ±20, far outside any clipping range, so that none overflows."""
    log_ratio = (logprobs - old_logprobs) * mask  # (B, T)
    if level != "token":
        log_ratio = log_ratio.sum(-1, keepdim=True)  # (B, 1)
        if level == "geometric":
            log_ratio = log_ratio / mask.sum(-1, keepdim=True)
    return log_ratio.clamp(-20, 20).exp().expand_as(logprobs)


def clip_ratio(ratio, epsilon_low, epsilon_high):
    """w = clip(ratio, 1 − ε_low, 1 + ε_high)."""
    return ratio.clamp(1 - epsilon_low, 1 + epsilon_high)


def off_policy_loss(logprobs, ratio, advantages, epsilon_low, epsilon_high, objective="weight", mean_weight=1.0):
    """Per-token loss of a replayed response, (B, T).
    objective "weight": gradient −w_i Â_i ∇log π_θ, w_i held fixed, as Eq. 5 is written; w_i over `mean_weight` where
        weights are normalised.
    objective "surrogate": PPO's −min(ρ Â, clip(ρ) Â), ρ differentiated: no gradient once a ratio is out of range on
        the side where its advantage has already pushed it.
    Args: logprobs (B, T) with gradient; ratio (B, T) from `importance_ratio`; advantages (B, 1)."""
    one = torch.exp(logprobs - logprobs.detach())  # value 1, gradient ∇log π_θ
    ratio = ratio.detach()
    if objective == "surrogate":
        rho = ratio * one
        return -torch.minimum(rho * advantages, clip_ratio(rho, epsilon_low, epsilon_high) * advantages)
    return -clip_ratio(ratio, epsilon_low, epsilon_high) / mean_weight * advantages * one  # Eq. 5


def off_policy_gradient(model, batches, config, logprobs_of, mean_weight=1.0):
    """Step 5: add to the gradients that of Eq. 5 over `batches` of replayed groups.
    Returns: their importance ratios (n,), of responses, or of tokens at level "token"."""
    ratios = []

    def token_loss(batch, logprobs):
        ratio = importance_ratio(logprobs.detach(), batch.old_logprobs, batch.mask, config.ratio_level)  # (B, T)
        ratios.append(one_each(ratio, batch, config.ratio_level))
        loss = off_policy_loss(
            logprobs, ratio, batch.advantages, config.epsilon_low, config.epsilon_high, config.replay_objective,
            mean_weight,
        )  # Eq. 5  # fmt: skip
        return loss + config.kl_coef * k3(logprobs, batch.ref_logprobs) if config.replay_kl else loss

    accumulate_gradient(model, batches, token_loss, logprobs_of)
    return torch.cat(ratios)


@torch.no_grad()
def ratios_of(model, batches, level, logprobs_of):
    """The ratios alone: where weights are normalised, their mean must be known before the first gradient."""
    pairs = ((batch, logprobs_of(model, batch)) for batch in batches)
    return torch.cat([one_each(importance_ratio(p, b.old_logprobs, b.mask, level), b, level) for b, p in pairs])


def one_each(ratio, batch, level):
    """The distinct values of a (B, T) ratio: one for each token at level "token", else one for each response."""
    counted = batch.weights > 0  # (B, T)
    return ratio[counted] if level == "token" else ratio[counted.any(-1), 0]


def fresh_statistics(groups, config):
    """What ratios are at age 0, where π_old is π_θ: off 1 by what separates the sampler from the training forward.
    With `old_logprobs` "training" the forward's log-probabilities take the place of the sampler's, as TRL has it."""
    gap, ratios = [], []
    for group in groups:
        own, group.train_logprobs = group.train_logprobs, None  # (G, T)
        gap.append(((own - group.old_logprobs) * group.mask).abs().max().item())
        ratio = importance_ratio(own, group.old_logprobs, group.mask, config.ratio_level)
        ratios.append(ratio[group.mask] if config.ratio_level == "token" else ratio[:, 0])
        if config.old_logprobs == "training":
            group.old_logprobs = own
    told = ratio_statistics(torch.cat(ratios), config.epsilon_low, config.epsilon_high)
    return {"logprob_gap": max(gap), **{f"fresh_{name}": told[name] for name in ("ratio_mean", "clipped_share", "ess")}}


def effective_sample_size(weights):
    """κ = (Σ w)² / (n Σ w²) ∈ (0, 1] over the n weights of one replay update (Appendix E, 29)."""
    return (weights.sum() ** 2 / (len(weights) * (weights**2).sum())).item()


def ratio_statistics(ratios, epsilon_low, epsilon_high):
    """What a replay update's ratios were, unclipped unless said so; `ratios` (n,) of the groups not skipped."""
    clipped = clip_ratio(ratios, epsilon_low, epsilon_high)
    return {
        "ratio_mean": ratios.mean().item(), "ratio_min": ratios.min().item(), "ratio_max": ratios.max().item(),
        "clipped_share": (clipped != ratios).float().mean().item(), "ess": effective_sample_size(clipped),
        "ess_unclipped": effective_sample_size(ratios),
    }  # fmt: skip
