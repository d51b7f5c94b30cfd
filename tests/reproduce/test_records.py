"""Records and what is read off them, by hand."""

import itertools
import json
import math

import pytest
from made_up import base_run

from reproduce import records
from reproduce.plan import Job


def test_regions_are_fixed_before_replay():
    # queries 0 and 2 in odd steps, 1 and 3 in even ones; replay starts at step 3; what comes then counts nothing
    base = base_run(rule=["g0", "84", "0g", "08", "0g", "0g"], rerule=["g0", "84", "gg", "gg", "gg", "gg"])
    assert records.before_replay(base) == {0: [1.0], 2: [0.0], 1: [0.5], 3: [0.25]}
    assert records.regions(base) == {0: "easy", 2: "hard", 1: "easy", 3: "hard"}
    assert records.hard_share(base, 0.5) == 0.5
    assert records.hard_share(base, 0.6, "f") == 0.5 and records.hard_share(base, 0.5, "b") == 1
    late = records.groups_of(base, "rule", last=True)  # steps 5 and 6 of 6
    assert late == [(5, 0, 0.0), (5, 2, 1.0), (6, 1, 0.0), (6, 3, 1.0)]
    outcome = records.outcome(base, "rule", base)
    assert (outcome["late_hard"], outcome["late_easy"], outcome["late_cases"]) == (1, 0, 0.5)
    assert outcome["seconds_stage2"] == 4


def test_arithmetic_by_hand():
    rows = [{"response_tokens": 10}, {"response_tokens": 20, "replay_groups": 4, "replay_skipped": 1, "redrawn": 16}]
    assert records.arithmetic(rows, 32) == 5 * 10 + (5 + 3 * 0.75 + 0.5) * 20


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
    base["methods"]["rerule"]["replay_skipped"] = 2  # of equal rewards: drawn, but κ is of the other four's weights
    assert records.bound(base, base)["n_eff_clipped"] == pytest.approx(50 + 0.95 * 4 * 100 / 12)


def selection(scores, replayed=lambda name, rate, seed: True, ratio=1.25):
    """Selection runs of two seeds and two rates; scores: {curve: (retain recall at the first rate, at the second)}."""
    found = {}
    for at, rate in enumerate(records.RATES[:2]):
        for name, seed in itertools.product(records.CURVES, (11, 12)):
            family, method = records.place_of(name, rate, "select")
            run = found.setdefault(f"{family}_{seed}", {"rows": {}, "methods": {}, "steps": 32, "family": family})
            row = {"retain_recall": scores[name][at] + seed, "forget_recall": 1.0}
            first = 11 if method == "rerule" and replayed(name, rate, seed) else None
            run["rows"][records.NAMES[method]] = row
            own = base_run(["g0"], ["g0"])["methods"]["rule"]
            run["methods"][method] = own | {"first_replay": first, "arithmetic": 4.0 * (ratio if first else 1)}
    for seed in (11, 12):  # the base runs have ReRULE too
        found[f"select_{seed}"]["methods"]["rerule"] = found[f"rerule@4e-5_{seed}"]["methods"]["rerule"]
    return found


def test_each_curve_gets_its_best_rate_and_rule_its_steps():
    scores = {"rule": (40, 60), "rerule": (70, 50), "random": (50, 51), "recent": (9, 8), "current": (1, 2)}
    runs, rates = selection(scores), records.RATES[:2]
    chosen = records.choose(runs, (11, 12), rates)
    best = {"rule": "8e-5", "rerule": "4e-5", "random": "8e-5", "recent": "4e-5", "current": "8e-5"}
    assert {name: chosen[name] for name in best} == best and chosen["steps"] == chosen["compute"] == "8e-5"
    assert chosen["n_steps"] == {"4e-5": 40, "8e-5": 40} and chosen["ratios"]["8e-5"] == 1.25
    assert records.choose(runs, (11, 12, 13), rates) is None and records.choose(runs, (11, 12), records.RATES) is None


def test_a_rate_at_which_replay_did_not_run_on_every_seed_is_not_chosen():
    scores = dict.fromkeys(records.CURVES, (5, 80))  # one seed at the second rate beats two at the first
    silent = selection(scores, replayed=lambda *place: place != ("random", "8e-5", 12))
    chosen = records.choose(silent, (11, 12), records.RATES[:2])
    assert chosen["random"] == "4e-5" and chosen["recent"] == "8e-5"


def test_a_run_without_replay_is_in_no_comparison_of_replay():
    run = base_run(["g0"] * 4, ["g0"] * 4, first_replay=None)
    jobs = [Job("base_21", "base", 21, (), None, 1)]
    r = records.Results({"base_21": run}, jobs)
    assert r.refused == ["base_21"] and r.of("base") == {} and list(r.of("base", "rule")) == [21]
    assert records.Results({"base_21": base_run(["g0"] * 4, ["g0"] * 4)}, jobs).refused == []


def test_a_steps_groups_are_in_one_order_for_every_method(tmp_path):
    """Two methods whose groups come in different orders; the record tells which group is whose."""
    config = {"tau": 0.5, "lr": 1e-4, "steps": 1, "group_size": 2, "prompts_per_step": 2, "start_from": "x"}
    rows = [("rule", 7, [1.0, 1.0]), ("rule", 3, [0.0, 0.0]), ("rerule", 3, [0.0, 1.0]), ("rerule", 7, [1.0, 0.5])]
    samples = [{"method": m, "step": 1, "query": q, "kind": "boundary", "group": "hard", "prompt": str(q), "rewards": r}
               for m, q, r in rows]  # fmt: skip
    metrics = [{"method": m, "stage": 2, "step": 1, "response_tokens": 5} for m in ("rule", "rerule")]
    (tmp_path / "predictions").mkdir()
    for name, content in (("config.json", [config]), ("table.json", [{}]), ("metrics.jsonl", metrics),
                          ("samples.jsonl", samples), ("predictions/original.jsonl", [])):  # fmt: skip
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    record = records.record_of(tmp_path)
    assert [row[1:] for row in records.groups_of(record, "rule")] == [(3, 0.0), (7, 1.0)]
    assert [row[1:] for row in records.groups_of(record, "rerule")] == [(3, 0.5), (7, 0.75)]
    assert record["kinds"] == "---h---h"
    light = records.record_of(tmp_path, whole=False)
    assert "rewards" not in light["methods"]["rule"] and light["methods"]["rule"]["response_tokens"] == 5
