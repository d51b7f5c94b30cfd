"""What each control stores and draws, by hand; fresh rollouts and dynamic sampling through the driver."""

import json

import miniature
import pytest
import torch

from baselines import controls
from config import STORES, Config
from engine.seeds import batch_at
from grpo import RolloutGroup
from replay import hard_groups

HARD, EASY, UNEQUAL = [0.0, 0.0], [1.0, 1.0], [0.0, 0.5]  # rewards, for τ = 0.6


def group(step, rewards=(0.0, 1.0), advantages=None, kind="", query=None):
    n = len(rewards)
    return RolloutGroup(
        step if query is None else query, step, torch.tensor([1]), torch.ones(n, 2, dtype=torch.long),
        torch.ones(n, 2, dtype=torch.bool), torch.zeros(n, 2), None, torch.tensor(rewards),
        torch.tensor(advantages or [0.0] * n), kind=kind,
    )  # fmt: skip


def steps_of(groups):
    return [group.step for group in groups]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def buffer(store, collect=None, **flags):
    return controls.buffer_for(Config(buffer_size=50, replay_store=store, **flags), collect)


def test_every_name_is_a_store_or_a_draw_of_its_own():
    assert set(controls.STORED) | {"hard", "fresh", "recent", "current", "none"} == set(STORES)


@pytest.mark.parametrize(
    "control, stored, drawn",
    [
        ("hard", [0, 1, 3], [0, 1, 3]), ("unequal", [1, 3], [1, 3]), ("easy", [2, 4], [2, 4]), ("medium", [1], [1]),
        ("priority", [1, 3, 4], [1, 3, 4]), ("boundary", [0, 1], [0, 1]), ("leaks", [0, 1, 3, 4], [0, 1, 3, 4]),
        ("recent", [0, 1, 3], [0, 1, 2, 3, 4]), ("current", [0, 1, 3], [7]), ("none", [0, 1, 3], []),
    ],
)  # fmt: skip
def test_what_each_control_stores_of_a_step_and_draws_in_the_next(control, stored, drawn):
    one = [1.0, -1.0]
    groups = [
        group(0, HARD, kind="boundary"), group(1, UNEQUAL, one, "boundary"), group(2, EASY, kind="boundary"),
        group(3, [0.0, 0.4], one, "forget"), group(4, [1.0, 0.9], one, "forget"),
    ]  # fmt: skip
    ring = buffer(control)
    ring.store(groups, 0.6, rng())
    assert steps_of(ring.ring) == stored and len(ring) == len(stored)
    assert sorted(steps_of(ring.draw(9, [group(7)], rng()))) == drawn


def test_random_storage_keeps_as_many_as_are_hard():
    groups = [group(i, HARD if i < 3 else EASY) for i in range(20)]
    kept = []
    for seed in range(20):
        ring = buffer("random")
        ring.store(groups, 0.6, rng(seed))
        kept.append(tuple(steps_of(ring.ring)))
    assert len(hard_groups(groups, 0.6)) == 3 and {len(steps) for steps in kept} == {3} and len(set(kept)) > 10
    assert any(step >= 3 for steps in kept for step in steps)


def test_groups_past_the_largest_age_are_not_drawn():
    ring = buffer("hard", max_age=2)
    ring.store([group(step, HARD) for step in (1, 3, 5, 6)], 0.6, rng())
    assert sorted(steps_of(ring.draw(9, [group(7)], rng()))) == [5, 6]
    assert ring.draw(9, [group(20)], rng()) == []


def test_priority_draws_in_proportion_to_the_mean_advantage():
    ring = buffer("priority")
    sizes = [0.5, 1.0, 1.5]
    ring.store([group(i, UNEQUAL, [size, -size]) for i, size in enumerate(sizes)], 0.6, rng())
    counts, generator = [0, 0, 0], rng()
    for _ in range(3000):
        (drawn,) = ring.draw(1, [group(7)], generator)
        counts[drawn.step] += 1
    assert [round(6 * n / 3000) for n in counts] == [1, 2, 3] and abs(counts[2] - 1500) < 140  # 5 binomial sd
    assert sorted(steps_of(ring.draw(9, [group(7)], rng()))) == [0, 1, 2]


def test_fresh_groups_answer_the_prompts_of_those_drawn():
    asked = []

    def collect(numbers, step, name):
        asked.append((sorted(numbers), step, name))
        return [group(step, query=n) for n in numbers]

    ring = buffer("fresh", collect)
    ring.store([group(1, HARD, query=40), group(2, HARD, query=41), group(3, EASY, query=42)], 0.6, rng())
    fresh = ring.draw(9, [group(7)], rng())
    assert asked == [([40, 41], 7, "fresh")] and sorted(g.query for g in fresh) == [40, 41]
    assert buffer("fresh", None).draw(9, [group(7)], rng()) == []


def test_the_share_that_starts_replay_is_of_the_groups_sampled_before():
    config = Config(min_groups=60, prompts_per_step=32)
    assert controls.least_stored(config, 11) == 60
    config.min_share = 0.05
    assert controls.least_stored(config, 11) == pytest.approx(16) and controls.least_stored(config, 1) == 60


def test_dynamic_sampling_fills_a_batch_with_groups_that_have_a_gradient():
    config, asked = Config(redraw=2, seed=3), []

    def collect(numbers, step, name):
        asked.append((numbers, step, name))
        return [group(step, UNEQUAL if n % 2 else EASY, query=n) for n in numbers]

    first = [group(5, UNEQUAL, query=100), *(group(5, HARD, query=101 + i) for i in range(3))]
    groups, more = controls.refill(first, 40, collect, config)
    odd = [n for k in range(len(asked)) for n in batch_at(40, 4, 5, 3, "redraw", k) if n % 2]
    assert [g.query for g in groups] == [100, *odd, 101, 102, 103][:4] and more == 4 * len(asked)  # in their places
    assert [name for *_, name in asked] == ["redraw 0", "redraw 1"][: len(asked)]
    mixed = [group(5, HARD), group(5, UNEQUAL), group(5, EASY)]
    kept, more = controls.refill(mixed, 40, None, Config(redraw=0))
    assert all(one is other for one, other in zip(kept, mixed, strict=True)) and more == 0  # RULE itself: as sampled
    full = [group(5, UNEQUAL, query=i) for i in range(4)]
    assert controls.refill(full, 40, None, config) == (full, 0)  # nothing to replace: nothing sampled


def rows_of(folder, *flags):
    miniature.main("--output_dir", folder, *flags)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == 2]


def test_fresh_rollouts_through_the_driver(tmp_path, early):
    rows = rows_of(tmp_path / "run", *early, "--method", "rerule", "--replay_store", "fresh")
    replayed = [row for row in rows if row.get("ratio_mean")]
    assert replayed and all(row["replay_age"] == 0 for row in replayed)
    assert all(abs(row[f"ratio_{end}"] - 1) < 1e-4 for row in replayed for end in ("min", "mean", "max"))


def test_dynamic_sampling_and_share_through_the_driver(tmp_path, early):
    rows = rows_of(tmp_path / "a", *early, "--method", "rule", "--redraw", "2")
    plain = rows_of(tmp_path / "b", *early, "--method", "rule")
    assert sum(row["redrawn"] for row in rows) > 0 == sum(row["redrawn"] for row in plain)
    assert sum(row["equal_groups"] for row in rows) < sum(row["equal_groups"] for row in plain)
    more = ("--buffer_size", "999", "--min_groups", "999", "--min_share", "0.01")
    shared = rows_of(tmp_path / "c", *early, "--method", "rerule", *more)
    assert any(row.get("replay_groups") for row in shared)  # where 999 groups would never do
