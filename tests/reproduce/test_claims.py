"""Verdicts: each rule by hand; every claim names runs and columns that there are."""

import json
import re
from pathlib import Path

import pytest
from made_up import base_run

from reproduce import claims, plan, records
from reproduce.statistics import statistic

NEAR = [-0.2, -0.1, 0.0, 0.1, 0.2, -0.15, 0.15, 0.05]  # its standard error is about 0.05


def part(mean=0.0, *adjusted, edges=((0.0, 1),)):
    return claims.Part("x", {"mean": mean, "values": [mean]}, edges, adjusted=adjusted)


def test_a_bar_is_cleared_missed_or_neither():
    assert claims.judge(part(2, 0.05)) == "holds" and claims.judge(part(-2, 0.05)) == "opposite"
    assert claims.judge(part(2, 0.051)) == "inconclusive" and claims.judge(part(-2, 0.051)) == "inconclusive"
    assert claims.judge(part(2, 0.01, edges=((3.0, 1),))) == "opposite"


@pytest.mark.parametrize(
    "mean, adjusted, expected",
    [(0, (0.01, 0.01), "holds"), (1, (0.001, 0.2), "inconclusive"), (3, (0.001, 0.2), "inconclusive"),
     (3, (0.001, 0.04), "opposite"), (-3, (0.04, 0.001), "opposite")],
)  # fmt: skip
def test_no_change_has_two_edges(mean, adjusted, expected):
    assert claims.judge(part(mean, *adjusted, edges=((-2.0, 1), (2.0, -1)))) == expected


def test_a_claim_is_what_its_parts_are_together():
    def told(*verdicts):
        return claims.overall([claims.Part("", None, verdict=verdict) for verdict in verdicts])

    assert told("holds", "holds") == "holds" and told("holds", "inconclusive") == "inconclusive"
    assert told("holds", "inconclusive", "opposite") == "opposite" and told("holds", "not run") == "not run"
    assert told("not testable here") == "not testable here"


def test_a_part_is_one_line():
    stat = statistic([7.0, 8.0, 9.0, 8.5, 7.5, 8.0, 8.0, 8.0])
    found = claims.Part("x", stat, unit=" points", p=(0.00123,), adjusted=(0.0341,))
    assert claims.shown(found) == "x: +8.0 points [+7.5, +8.5] t, p = 0.0012 (Holm 0.034), 8 up 0 down"
    found = claims.Part("x", statistic([-0.5, 0.5]), ((-1, 1),), "", p=(0.5,), adjusted=(1.0,))
    assert claims.shown(found) == "x: +0.0 [-6.4, +6.4] t, p = 0.5 (Holm 1), 2 above 0 below -1"
    found = claims.Part("x", statistic(NEAR), ((-2, 1), (2, -1)), p=(1e-9, 2e-9), adjusted=(1e-8, 2e-8))
    assert claims.shown(found) == "x: +0.01 [-0.11, +0.13] t, p = 2e-09 (Holm 2e-08) for ±2, 4 up 3 down"
    assert claims.shown(claims.Part("x", stat, why="3 seeds")) == "x: +8.0 [+7.5, +8.5] t, 8 up 0 down; 3 seeds"
    assert claims.shown(claims.Part("x", None, why="no replay")) == "x: no replay"
    assert claims.figure(statistic([0.0, 2.0])) == "+1.0 [-11.7, +13.7] t, p = 0.5, 1 up 0 down"
    assert claims.figure(None) == "–"


# --- a report in miniature -------------------------------------------------------------------------------------------


class Results:
    """Stands in for `records.Results`: outcomes by family and method."""

    def __init__(self, outcomes, refused=()):
        self.outcomes, self.refused, self.chosen = outcomes, list(refused), {"rule": "8e-5", "rerule": "1.6e-4"}
        self.records = {name: {"family": name[:-3], "seed": int(name[-2:])} for name in refused}
        self.seeds = set(range(21, 29))

    def of(self, family, method="rerule"):
        return self.outcomes.get((family, method), {})


def seeds(values, column="x"):
    return {seed: {column: value} for seed, value in enumerate(values)}


@pytest.fixture
def rows(monkeypatch):
    """Sets what stands in claims.json."""

    def write(*claimed):
        found = [{"text": "t", "run": "r", "only": "o", "parts": [row], **more} for row, more in claimed]
        monkeypatch.setattr(claims, "read_json", lambda path: json.loads(json.dumps(found)))
        monkeypatch.setattr(claims, "best_baseline", lambda: "PO")

    return write


def test_sides_are_paired_and_holm_counts_what_is_tested(rows):
    plain = {"label": "a", "of": ["base", "rerule", "x"], "less": ["base", "rule", "x"]}
    margin, few = plain | {"label": "b", "within": 2}, plain | {"of": ["few", "rerule", "x"]}
    rows((plain, {}), (margin, {}), (plain, {"not_testable": "so"}), (few, {}))
    r = Results({("base", "rerule"): seeds(x + 1 for x in NEAR), ("base", "rule"): seeds([0.0] * 8),
                 ("few", "rerule"): seeds([1.0] * 7)})  # fmt: skip
    found = claims.claims(r)
    assert [claims.overall(claim["parts"]) for claim in found] == ["holds", "holds", "not testable here", "not run"]
    (one,), (two,), (three,), (four,) = (claim["parts"] for claim in found)
    ps = sorted(one.p + two.p)  # three tests: one against 0, one-sided ones against −2 and 2
    assert len(ps) == 3 and len(two.p) == 2 and not three.p and not four.p
    assert max(one.adjusted + two.adjusted) == pytest.approx(max(3 * ps[0], 2 * ps[1], ps[2]))
    assert found[2]["run"] == "r; not testable here: so" and four.why == "7 seeds of the 8 asked for"


def test_rates_of_the_main_figure(rows):
    def row(of, less):
        return {"label": "{rerule} {rival}", "of": [of, "rerule", "x"], "less": [less, "rule", "x"]}, {}

    rows(row("@4e-5", "@4e-5"), row("@chosen", "@chosen"), row("@chosen:rule", "@chosen:rule"))
    of = {("rerule@4e-5", "rerule"): 1, ("grid@1.6e-4", "rerule"): 2, ("grid@8e-5", "rerule"): 3}
    r = Results({key: seeds([value] * 8) for key, value in of.items()} | {
        ("base", "rule"): seeds([0.5] * 8), ("grid@8e-5", "rule"): seeds([0.0] * 8)})  # fmt: skip
    parts = [claim["parts"][0] for claim in claims.claims(r)]
    assert [part.stat["mean"] for part in parts] == [0.5, 2, 3] and parts[0].label == "1.6e-4 PO"
    r.chosen = None
    assert all(claim["parts"][0].why.startswith("no rate chosen") for claim in claims.claims(r)[1:])


def test_a_run_that_never_replayed_is_refused_by_name(rows):
    rows(({"label": "a", "of": ["base", "rerule", "x"], "less": ["other", "rule", "x"]}, {}))
    outcomes = {("base", "rerule"): seeds(NEAR), ("other", "rule"): seeds([0.0] * 8)}
    (claim,) = claims.claims(Results(outcomes, ["base_23", "base_25"]))
    assert claims.shown(claim["parts"][0]) == "a: replay never ran in base_23, base_25"
    assert claims.overall(claim["parts"]) == "not run"
    (claim,) = claims.claims(Results(outcomes, ["base_11", "other_23"]))  # a selection seed; RULE needs no replay
    assert claims.overall(claim["parts"]) == "inconclusive"


def test_what_never_replayed():
    ran, idle = (base_run(["g0"] * 6, ["g0"] * 6, first_replay=first) for first in (3, None))
    assert not records.never_replayed(ran) and records.never_replayed(idle)
    assert not records.never_replayed(idle, "rule") and not records.never_replayed({"methods": {}})


def test_ways_to_compare():
    def values(row, a, b):
        r = Results({("f", "rerule"): seeds(a), ("f", "rule"): seeds(b)})
        sides = {"label": "", "of": ["f", "rerule", "x"], "less": ["f", "rule", "x"]}
        return claims.measured(r, sides | row, {}).stat["values"]

    assert values({"times": -1}, [3.0, 5.0, 9.0], [1.0, 2.0, None]) == [-2, -3]
    assert values({"as": "percent"}, [3.0, 1.0], [4.0, 2.0]) == [75, 50]
    assert values({"as": "log10"}, [0.1, 1.0], [0.001, 10.0]) == pytest.approx([2, -1])


def test_the_best_baseline_is_chosen_on_its_own_seeds(monkeypatch, tmp_path):
    found = {"ga": {"scores": {"1": [90, 10], "2": [60, 60]}}, "po": {"scores": {"1": [61, 61]}},
             "purge": {"scores": {"1": [99, 99]}}}  # fmt: skip
    (tmp_path / "rates.json").write_text(json.dumps(found))
    monkeypatch.setattr(claims, "RATES", tmp_path / "rates.json")
    assert claims.best_baseline() == "PO"


def test_every_claim_names_what_there_is():
    text = Path(claims.__file__).with_name("claims.json").read_text(encoding="utf-8")
    found = json.loads(text)
    assert len({claim["text"] for claim in found}) == len(found) and "|" not in text
    for claim in found:
        assert set(claim["only"].split()) <= set(plan.SECTIONS), claim["text"]
        assert claim.get("since", "abf3adc") == "abf3adc"
        for row in claim["parts"]:
            assert ("measure" in row) != ("of" in row) and not {"bar", "within"} <= set(row)
            if "measure" in row:
                assert callable(getattr(claims, row["measure"]))
    rates = set(re.findall(r'"@([^"]+)"', text)) - {"chosen", "chosen:rule"}
    assert rates == {"4e-5", "8e-5", "1.6e-4", "3.2e-4", "6.4e-4"}


def test_a_part_may_be_one_side_or_a_difference_of_differences():
    def values(**row):
        r = Results({("a", "rerule"): seeds([5.0, 9.0, 1.0]), ("a", "rule"): seeds([1.0, 2.0]),
                     ("b", "rerule"): seeds([3.0, 4.0, 1.0]), ("b", "rule"): seeds([2.0, None])})  # fmt: skip
        stat = claims.measured(r, {"label": ""} | row, {}).stat
        return stat and stat["values"]

    a, b = ([[family, method, "x"] for method in ("rerule", "rule")] for family in "ab")
    assert values(of=a[0]) == [5, 9, 1] and values(of=a[0], times=2) == [10, 18, 2]
    assert values(of=a) == [4, 7] and values(of=a, less=b) is None  # one seed has all four
    assert values(of=a[0], less=a[1], **{"as": "extra"}) == [400, 350]


def test_what_a_base_run_measures_of_hard_prompts():
    """Prompts 0 and 2, then 1 and 3, are asked by turns; 0 and 1 are forget prompts, 2 is crossed, 3 plain."""
    base = base_run(["0g", "00"] + ["0g", "gg", "gg", "0g"], ["gg"] * 6, first_replay=3, kinds="ffhe")
    found = records.outcome(base, "rule", base)
    assert found["below_hard"] == 0 and found["below_easy"] == 1  # before step 3: prompt 2 earned 1, prompt 3 nothing
    assert found["late_hard"] == pytest.approx((1 + 0 + 1) / 3) and found["late_easy"] == 1
    assert found["late_below"] == pytest.approx(100 / 3)  # of prompts 0, 1 and 3, prompt 1 alone earns nothing late
    recalls = enumerate([0.0] * 6 + [1.0, 4.0, 1.0], 1)
    base["methods"]["rule"]["evaluations"] = [{"step": step, "retain_recall": recall} for step, recall in recalls]
    found = records.outcome(base, "rule", base)
    assert found["late_sd"] == pytest.approx(3**0.5) and found["late_unrest"] == pytest.approx(6**0.5)


def test_a_probes_figures_are_columns():
    probe = {"models": {"RULE": {"hard": {"weighted": 2.0}}}}
    assert records.outcome(probe, "RULE", None) == {"hard_weighted": 2.0} and records.outcome(probe, "x", None) == {}
