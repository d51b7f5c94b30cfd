"""The plan of all runs: valid commands, within its budget, and what `--only` takes of it."""

import pytest
from made_up import CHOSEN, options

from reproduce import plan
from rerule import configure


@pytest.fixture
def chosen(monkeypatch):
    monkeypatch.setattr(plan, "choose", lambda *_: CHOSEN)


def test_choices_come_before_what_needs_them():
    waiting = [job.family for job in plan.all_jobs(options(), {}) if job.args is None]
    assert set(waiting) == {"compute", "best_rule", "best_rerule"}


@pytest.mark.parametrize("quick", [False, True])
def test_every_run_of_the_plan_is_a_valid_command(chosen, quick):
    jobs = plan.all_jobs(options(quick=quick, seeds=2), {})
    names = {job.name for job in jobs}
    assert len(names) == len(jobs)
    for job in jobs:
        assert job.start is None or job.start in names
        args = [arg.format(tofu_dir="DATA") for arg in job.args]
        config = configure(args)
        assert config.seed == job.seed and config.seed not in (*range(11), *range(1, 6))
    assert not {job.seed for job in jobs if job.family in ("select", "grid")} & {
        job.seed for job in jobs if job.family not in ("select", "grid")}  # fmt: skip


def test_two_updates_a_batch_from_the_start(chosen):
    (job,) = [job for job in plan.all_jobs(options(quick=True, seeds=2), {}) if job.name == "twice_21"]
    config = configure(list(job.args))
    assert (config.replay_store, config.min_groups, config.warmup_steps) == ("current", 1, 0)
    assert config.method[-1] == "rerule"


def test_the_whole_plan_fits_its_budget(chosen):
    assert sum(job.cost for job in plan.all_jobs(options(), {})) < 2 * 90 * 60
    assert sum(job.cost for job in plan.all_jobs(options(quick=True, seeds=2), {})) < 2 * 10 * 60


def test_only_takes_a_part_and_what_it_starts_from():
    jobs = plan.wanted(options(only=["table4"], seeds=3), plan.all_jobs(options(seeds=3), {}))
    assert {job.family for job in jobs} == {"base", "random", "combined", "combined_random"}
    jobs = plan.wanted(options(only=["tofu"], seeds=3), plan.all_jobs(options(seeds=3), {}))
    assert {job.family for job in jobs} == {"tofu", "tofu_random"}


def test_every_part_of_a_claim_has_its_runs_in_the_plan():
    families = {job.family for job in plan.all_jobs(options(), {})}
    assert {f for section in plan.SECTIONS.values() for f in section} <= families
    assert families - {"select", "grid"} <= {f for section in plan.SECTIONS.values() for f in section}
