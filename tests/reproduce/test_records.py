"""Records and the statistics over them, by hand."""

import math

import numpy as np
import pytest
import scipy.stats
from made_up import base_run

from reproduce import records


def test_a_group_is_one_character():
    assert [records.level(r) for r in ([0.0] * 8, [1.0] * 8, [0.5] * 8, [0.0] * 4 + [1.0] * 4, [0.5] + [0.0] * 7)] == [
        "0", "g", "=", "8", "1"]  # fmt: skip
    assert [records.mean_reward(c) for c in "0g=81"] == [0, 1, 0.5, 0.5, 1 / 16]
    assert [records.all_equal(c) for c in "0g=81"] == [True, True, True, False, False]


def test_regions_are_fixed_before_replay():
    # queries 0 and 2 in odd steps, 1 and 3 in even ones; replay starts at step 3; what comes then counts nothing
    base = base_run(rule=["g0", "84", "0g", "08", "0g", "0g"], rerule=["g0", "84", "gg", "gg", "gg", "gg"])
    assert records.before_replay(base) == {0: [1.0], 2: [0.0], 1: [0.5], 3: [0.25]}
    assert records.regions(base) == {0: "easy", 2: "hard", 1: "easy", 3: "hard"}
    assert records.hard_share(base, 0.5) == 0.5
    assert records.hard_share(base, 0.6, "f") == 0.5 and records.hard_share(base, 0.5, "b") == 1
    late = records.groups_of(base, "rule", last=True)  # steps 5 and 6 of 6
    assert late == [(5, 0, 0.0, True), (5, 2, 1.0, True), (6, 1, 0.0, True), (6, 3, 1.0, True)]
    outcome = records.outcome(base, "rule", base)
    assert (outcome["late_hard"], outcome["late_easy"], outcome["late_cases"]) == (1, 0, 0.5)
    assert outcome["seconds_stage2"] == 4


def test_arithmetic_by_hand():
    rows = [{"response_tokens": 10}, {"response_tokens": 20, "replay_groups": 4, "replay_skipped": 1}]
    assert records.arithmetic(rows) == 5 * 10 + (5 + 3 * 0.75) * 20


def test_recall_of_neighbours_weighs_phrasings_and_worlds():
    row = {
        "hard_trained_recall": 60.0,
        "hard_heldout_recall": 30.0,
        "easy_trained_recall": 90.0,
        "easy_heldout_recall": 90.0,
    }
    run = {"rows": {"RULE": row | {"retain_recall": 70.0, "forget_recall": 5.0}}, "methods": {}}
    outcome = records.outcome(run, "rule", None)
    assert outcome["hard"] == 50 and outcome["easy"] == 90
    assert outcome["balance"] == pytest.approx(2 / (1 / 70 + 1 / 95))
    assert outcome["heldout"] == pytest.approx((22 * 30 + 20 * 90) / 42)


# --- statistics ------------------------------------------------------------------------------------------------------


def test_bootstrap_interval():
    assert records.bootstrap([2.0] * 5) == (2, 2)
    values = [1.0, 2.5, 0.5, 4.0, 3.0, 2.0, -1.0, 1.5]
    other = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20000).confidence_interval
    assert records.bootstrap(values) == pytest.approx((other.low, other.high), abs=0.1)
    assert records.bootstrap(values) == records.bootstrap(values)


def test_statistic_by_hand():
    stat = records.statistic([1.0, 2.0, None, 3.0, -1.0, 0.0])
    assert (stat["n"], stat["up"], stat["down"], stat["mean"]) == (5, 3, 1, 1.0)
    assert stat["sd"] == pytest.approx(math.sqrt(10 / 4))
    assert stat["p"] == pytest.approx(2 * 5 / 16)  # 3 or more of 4 on either side
    assert records.statistic([1.0]) is None
    assert records.statistic([0.0, 0.0])["p"] == 1


def test_differences_are_paired_by_seed():
    a, b = {1: {"x": 5.0}, 2: {"x": 7.0}, 3: {"x": 1.0}, 9: {"x": 0.0}}, {1: {"x": 4.0}, 2: {"x": 4.0}, 3: {"x": None}}
    assert records.paired(a, b, "x")["values"] == [1, 3]


def test_instability_is_over_the_last_third():
    evaluations = [{"step": s, "retain_recall": v} for s, v in ((2, 0), (4, 90), (6, 10), (8, 50), (10, 54), (12, 55))]
    sd, rest = records.instability(evaluations)  # last third: steps 10 and 12 of 12, too few for a line
    assert sd is None and rest is None
    rising = [{"step": s, "retain_recall": 10.0 * s} for s in range(1, 13)]
    sd, rest = records.instability(rising)  # steps 9 to 12: 90, 100, 110, 120
    assert sd == pytest.approx(math.sqrt(500 / 3)) and rest == pytest.approx(0, abs=1e-9)


def test_slope_and_rank_correlation():
    assert records.slope([(0, 1), (1, 3), (2, 5)]) == pytest.approx(2)
    assert records.rank_correlation([1, 2, 3], [5, 9, 100]) == pytest.approx(1)
    assert records.rank_correlation([1, 2, 3], [4, 4, 4]) is None


def test_bound_by_hand():
    base = base_run(rule=["g0", "84"] * 3, rerule=["g0", "84"] * 3)
    found = records.bound(base, base)
    # p_H = 1/2, 100 sampled tokens in 12 groups, 6 groups replayed: N_on 50, N_re 50
    assert (found["p_hard"], found["n_on"], found["n_re"]) == (0.5, 50, 50)
    assert found["n_eff_clipped"] == pytest.approx(50 + 0.95 * 50)
    assert found["bound_unclipped"] == pytest.approx(math.sqrt(50 / 75))


def test_choice_of_rates_and_steps():
    def run(rule, rerule, ratio=1.25):
        rows = {name: {"retain_recall": v, "forget_recall": 1.0} for name, v in (("RULE", rule), ("ReRULE", rerule))}
        return {
            "rows": rows,
            "steps": 32,
            "methods": {"rule": {"arithmetic": 4.0}, "rerule": {"arithmetic": 4 * ratio}},
        }

    runs = {"select_11": run(10, 40), "grid2_11": run(30, 20), "select_12": run(20, 30), "grid2_12": run(25, 35)}
    for record in runs.values():
        record["methods"] = {
            name: base_run(["g0"], ["g0"])["methods"]["rule"] | m for name, m in record["methods"].items()
        }
    chosen = records.choose(runs, (11, 12), ("1", "2"))
    assert chosen == {"rule": "2", "rerule": "1", "steps": 40, "ratio": 1.25}
    assert records.choose(runs, (11, 12, 13), ("1", "2")) is None
