"""The plan of all runs: valid commands, within its budget, and what `--only` takes of it."""

import pytest
from made_up import everything, options

from reproduce import plan
from rerule import configure


def whole(**changes):
    return everything(**changes)[1]


def test_choices_come_before_what_needs_them():
    waiting = {job.family.split("@")[0] for job in plan.all_jobs(options(), {}) if job.args is None}
    assert waiting == {"compute", *plan.SECTIONS["controls_best"], *plan.SECTIONS["town"]} - {"town"}


@pytest.mark.parametrize("quick", [False, True])
def test_every_run_of_the_plan_is_a_valid_command(quick):
    jobs = whole(seeds=2, quick=quick)
    names = {job.name for job in jobs}
    assert len(names) == len(jobs)
    for job in jobs:
        assert job.start is None or job.start in names
        config = configure([arg.format(tofu_dir="DATA", rwku_dir="DATA", book_dir="DATA") for arg in job.args])
        assert config.seed == job.seed and config.seed not in (*range(11), *range(1, 6))
        assert job.family.partition("@")[2] in ("", f"{config.lr:g}".replace("e-0", "e-"), *plan.RATES)
    assert not {j.seed for j in jobs if j.seed in plan.SELECTION} & {j.seed for j in jobs if j.family == "base"}


def test_replay_starts_by_share_wherever_two_kinds_of_it_are_compared():
    for job in whole(seeds=2):
        config = configure([arg.format(tofu_dir="D", rwku_dir="D", book_dir="D") for arg in job.args])
        alone = job.family in ("base", "select", "town", "tofu", "book", "rwku", "probe")
        if "rerule" in config.method and not alone:
            assert config.min_share == 0.05, job.name


def test_the_town_tries_a_rate_below_those_of_the_main_figure():
    rates = {job.family.partition("@")[2] for job in whole() if job.family.startswith("town@")}
    assert rates == {"2e-5", "4e-5", "8e-5", "1.6e-4", "3.2e-4"}


def test_the_whole_plan_fits_its_budget():
    assert sum(job.cost for job in whole()) < 2 * 120 * 60  # seconds: two hours with two workers
    assert 0.45 * sum(job.cost for job in whole(seeds=2, quick=True)) < 2 * 8 * 60  # fewer steps


def test_only_takes_a_part_and_what_it_starts_from():
    jobs = plan.wanted(options(only=["table8"], seeds=3), whole(seeds=3))
    assert {job.family for job in jobs} == {"select", "base", "rerule@4e-5", "tau0.6", "tau0.8", "tau1.0"}
    jobs = plan.wanted(options(only=["controls_best"], seeds=3), whole(seeds=3))
    assert {job.family for job in jobs} >= {"select", "random@4e-5", "grid@6.4e-4", "fresh_best"}
    assert not {"town", "baselines"} & {job.family for job in jobs}


def test_every_part_of_the_report_has_its_runs_in_the_plan():
    families = {job.family.split("@")[0] for job in whole()}
    assert {f for section in plan.SECTIONS.values() for f in section} == families
