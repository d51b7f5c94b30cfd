"""What ReRULE's replay is compared with: other groups stored, others drawn, and batches without equal groups.

Covers Table 4's control, random storage; the rest is ours. `--replay_store` is one; `--max_age`, `--redraw` suit any.

Deviations
- DAPO (arXiv 2503.14476) draws prompts until a batch has no group of equal rewards. `refill` does so a given number of
  times, then takes groups of equal rewards after all, so that each batch has as many groups and the divisors stay."""

import torch

from engine.seeds import batch_at
from replay import ReplayBuffer, draw, hard_groups, is_hard

STORED = {  # of a step's groups: f(groups, tau, generator)
    "random": lambda groups, tau, generator: draw(groups, len(hard_groups(groups, tau)), generator),  # Table 4
    "easy": lambda groups, tau, _: [g for g in groups if not is_hard(g, tau)],
    "medium": lambda groups, *_: [g for g in groups if 0.25 <= g.rewards.mean().item() <= 0.75],
    "priority": lambda groups, *_: [g for g in groups if not g.all_equal()],
    "unequal": lambda groups, tau, _: [g for g in hard_groups(groups, tau) if not g.all_equal()],
    "boundary": lambda groups, tau, _: [g for g in hard_groups(groups, tau) if g.kind == "boundary"],
    "leaks": lambda groups, tau, _: [g for g in groups if is_hard(g, tau) or g.kind == "forget" and not g.all_equal()],
}


def by_priority(groups, n, generator):
    """min(n, len(groups)) of the groups without replacement, each with a chance in proportion to its mean |Â|."""
    if not groups:
        return []
    weights = torch.stack([group.advantages.abs().mean() for group in groups]).cpu()
    places = torch.multinomial(weights, min(n, int((weights > 0).sum())), generator=generator)
    return [groups[i] for i in places.tolist()]


def buffer_for(config, collect):
    """The replay buffer that `config` asks for. collect(query numbers, step, name of a draw) → groups with rewards."""
    name = config.replay_store

    def drawn(ring, previous, groups, n, generator):  # in the step that has sampled `groups`
        step = groups[0].step
        young = [g for g in ring if not config.max_age or step - g.step <= config.max_age]
        if name == "none":  # a step on zero gradient: momentum and weight decay alone
            return []
        pick, pool = by_priority if name == "priority" else draw, {"recent": previous, "current": groups}
        found = pick(pool.get(name, young), n, generator)
        return collect([g.query for g in found], step, "fresh") if name == "fresh" and found else found

    return ReplayBuffer(config.buffer_size, STORED.get(name, hard_groups), drawn)


def least_stored(config, step):
    """Groups that B must hold before replay starts: the paper's number, or a share of those sampled before `step`."""
    return config.min_share * config.prompts_per_step * (step - 1) or config.min_groups


def refill(groups, n_queries, collect, config):
    """Dynamic sampling, `redraw` batches at most. Returns: as many groups, unequal if found; how many were sampled."""
    more, fresh = 0, []
    for k in range(config.redraw):
        wanted = sum(group.all_equal() for group in groups) - len(fresh)
        if wanted <= 0:
            break
        numbers = batch_at(n_queries, len(groups), groups[0].step, config.seed, "redraw", k)
        fresh += [group for group in collect(numbers, groups[0].step, f"redraw {k}") if not group.all_equal()]
        more += len(numbers)
    return [fresh.pop(0) if fresh and group.all_equal() else group for group in groups], more


def zero_gradient(model):
    """A gradient of 0 wherever there is none, for a step by momentum and weight decay alone."""
    for p in model.parameters():
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)
