"""Draws that depend on their arguments alone: seeds, generators and the order of rows."""

import subprocess
import sys
from pathlib import Path

import torch

from engine import seeds

ROOT = Path(__file__).resolve().parents[2]


def test_a_seed_is_the_same_in_every_process_and_another_for_each_purpose():
    program = "from engine.seeds import derive_seed; print(derive_seed(3, 'rollout', 7))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) == seeds.derive_seed(3, "rollout", 7)
    parts = [(seed, purpose, step) for seed in range(3) for purpose in ("rollout", "replay") for step in range(1, 20)]
    found = {seeds.derive_seed(*each) for each in parts}
    assert len(found) == len(parts) and all(0 <= seed < 2**63 for seed in found)


def test_a_generator_takes_nothing_from_torchs_own():
    before = torch.get_rng_state()
    first, again, other = (seeds.generator("cpu", 0, "rollout", step) for step in (1, 1, 2))
    draws = [torch.rand(4, generator=rng) for rng in (first, again, other)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_every_row_comes_once_a_pass_and_batches_run_over():
    n, size = 7, 3
    order = [i for step in range(1, 15) for i in seeds.batch_at(n, size, step, 0, "rows")]
    passes = [order[at : at + n] for at in range(0, 42, n)]
    assert all(sorted(one) == list(range(n)) for one in passes) and len({tuple(one) for one in passes}) > 3
    assert sorted(seeds.batch_at(4, 8, 1, 0)) == sorted([*range(4)] * 2)  # a batch larger than the data


def test_a_batch_depends_on_its_arguments_alone():
    first = seeds.batch_at(50, 8, 9, 0, "rows")
    seeds.batch_at(50, 8, 3, 0, "rows")
    assert seeds.batch_at(50, 8, 9, 0, "rows") == first
    assert first not in (seeds.batch_at(50, 8, 9, 1, "rows"), seeds.batch_at(50, 8, 9, 0, "queries"))
