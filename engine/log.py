"""What a step of Stage 2 leaves: a row of metrics.jsonl, a row of samples.jsonl a group, two completions on the screen.

docs/training_metrics.md defines every key.
"""

import torch

from refusal import is_refusal
from replay import is_hard


def record(run, phase, row, groups, queries, stops):
    """Write a step's rows and show how it went. `row`: what the step itself has measured."""
    row = (
        {"method": phase.name, "stage": 2, "step": groups[0].step}
        | group_metrics(groups, queries, run.config.tau)
        | row
    )
    ended = torch.stack([(torch.isin(g.response_ids, torch.tensor(stops)) & g.mask).any(-1) for g in groups])  # (N, G)
    row["truncation"] = 1 - ended.float().mean().item()
    run.metrics.write(row | {f"seconds_{part}": value for part, value in phase.seconds.items()})
    for group in groups:
        query = queries[group.query]
        run.samples.write(
            {"method": phase.name, "step": group.step, "query": group.query, "kind": query.kind, "group": query.group,
             "prompt": query.question, "completions": group.texts, "rewards": group.rewards.tolist()}
        )  # fmt: skip
    phase.bar.set_postfix(reward=f"{row['reward']:.2f}", kl=f"{row['kl']:.3f}", buffer=row["buffer_size"])
    if row["step"] == phase.first or row["step"] % max(1, run.config.steps // 4) == 0:
        show_samples(phase, groups, queries)


def group_metrics(groups, queries, tau):
    """Rewards and refusals of a step's rollouts, together and by the kind of query, and shares of kinds of group."""
    row = {
        "reward": torch.stack([group.rewards.mean() for group in groups]).mean().item(),
        "equal_groups": sum(group.all_equal() for group in groups) / len(groups),
        "hard_groups": sum(is_hard(group, tau) for group in groups) / len(groups),
        "response_tokens": sum(int(group.mask.sum()) for group in groups),
    }
    for kind in ("forget", "boundary"):
        of_kind = [group for group in groups if queries[group.query].kind == kind]
        refusals = [is_refusal(text) for group in of_kind for text in group.texts]
        rewards = [group.rewards.mean().item() for group in of_kind]
        row[f"reward_{kind}"] = sum(rewards) / len(rewards) if rewards else None
        row[f"refusal_{kind}"] = sum(refusals) / len(refusals) if refusals else None
    return row


def show_samples(phase, groups, queries):
    """One completion for a forget and one for a boundary prompt, with its reward: numbers alone hide reward hacking."""
    for kind in ("forget", "boundary"):
        for group in [group for group in groups if queries[group.query].kind == kind][:1]:
            question, answer = queries[group.query].question[-60:], group.texts[0][:70]
            reward = group.rewards[0].item()
            phase.bar.write(f"{phase.name:>7} {group.step:>4} {kind:>8}  r = {reward:.1f}  {question} → {answer!r}")
