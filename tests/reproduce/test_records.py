"""Records and what is read off them, by hand."""

import math

import pytest
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
