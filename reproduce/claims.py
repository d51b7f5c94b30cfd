"""Each claim of the paper with what was run for it, our figure and a verdict that follows from the figure alone.

`claims.json` has each claim's sentence in our words, what was run, the command that shows it, and its parts. A part is
one number a seed, as a difference ("of" less "less") or by a function of ours ("measure"), and the bar that it must
clear ("bar", 0 unless named) or the margin that it must stay within ("within"). A side names a family of runs, a method
and a column; in place of a family "@4e-5" is a learning rate, "@chosen" the one chosen for the method on the selection
seeds and "@chosen:rule" the one chosen for RULE.

A part is tested against its bar, two-sided. "Within ± margin" is two tests, one for each edge, one-sided. Holm corrects
all tests of the report together. At p ≤ 0.05 so corrected a part holds or is opposite, by its side of the bar; else it
is inconclusive. A claim is opposite if a part is, holds if all do, else inconclusive. It is not run below SEEDS seeds or
where a replay condition never replayed. It is not testable here where `claims.json` gives a reason: another model or
longer answers would decide it. A claim without a verdict is not among the tests.

The bars are older than the results. Claims with "since" keep the bar, and what it is held against, of that commit of 21
November 2026, 100 minutes before the first report (51ddfb7). All others came into the history with this sentence,
before any of their runs was made.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from math import log10
from pathlib import Path

from baselines import TITLES
from engine.plots import NAMES, mean
from reproduce import records
from reproduce.plan import SECTIONS
from reproduce.statistics import difference, holm, instability, p_value, rank_correlation, signs, slope, statistic

HARD_STORES = SECTIONS["appendix_e"][:-1]  # ReRULE and its variants that store hard groups alone; the probe is last
REPLAYS = ("rerule", "random", "recent", "current")  # methods that must have replayed
SEEDS, LEVEL = 8, 0.05  # seeds that a verdict needs; p that it needs
VERDICTS = ("not testable here", "inconclusive", "opposite", "holds")  # and "not run"
RATES = Path(__file__).parent.parent / "results" / "rates_builtin.json"  # the baselines', chosen on seeds 11 and 12


class NotRun(Exception):
    """Why a part has no values that may be used."""


@dataclass
class Test:
    """The hypothesis that the mean lies at an edge."""

    edge: float
    cleared: bool  # the mean lies on the claim's side
    p: float
    adjusted: float = 1.0  # by Holm


@dataclass
class Part:
    """One measured quantity: what it is, its statistic over seeds, the bar or margin, its tests and its verdict."""

    label: str
    stat: dict | None
    bar: float = 0.0
    unit: str = ""
    within: float | None = None
    why: str = ""  # it has no verdict
    verdict: str = "not run"
    tests: list[Test] = field(default_factory=list)


def judge(part):
    """The verdict of a part whose tests are corrected."""
    found = {test.cleared for test in part.tests if test.adjusted <= LEVEL}
    sure = all(test.adjusted <= LEVEL for test in part.tests)
    return "opposite" if False in found else "holds" if sure else "inconclusive"


def overall(parts):
    """A claim's verdict from its parts'."""
    found = {part.verdict for part in parts}
    return next((v for v in ("not run", "not testable here", "opposite", "inconclusive") if v in found), "holds")


def tests(part):
    """What is tested of a part: its bar two-sided, or both edges of its margin one-sided."""
    values, average = part.stat["values"], part.stat["mean"]
    if part.within is None:
        return [Test(part.bar, average > part.bar, p_value(values, part.bar))]
    low, high = -part.within, part.within
    return [Test(low, average > low, p_value(values, low, 1)), Test(high, average < high, p_value(values, high, 1))]


def shown(part):
    """A part in one line: mean, interval and its kind, the test of its bar or of the nearer edge, seeds on each side."""
    if part.stat is None:
        return f"{part.label}: {part.why}"
    test = min(part.tests, key=lambda test: abs(test.edge - part.stat["mean"]), default=None)
    told = f", p = {test.p:.2g} (Holm {test.adjusted:.2g})" if test else ""
    told += f" for ±{part.within:g}" if test and part.within is not None else ""
    why = f"; {part.why}" if part.why else ""
    return f"{part.label}: {spread(part.stat, part.unit)}{told}, {seeds(part.stat, part.bar)}{why}"


def figure(stat, unit=""):
    """A statistic in one line, tested against 0 without correction."""
    return "–" if stat is None else f"{spread(stat, unit)}, p = {stat['p']:.2g}, {seeds(stat)}"


def spread(stat, unit=""):
    """Mean, 95 % interval and its kind."""
    digits = 1 if max(abs(stat["mean"]), abs(stat["low"]), abs(stat["high"])) >= 1 else 2
    return f"{stat['mean']:+.{digits}f}{unit} [{stat['low']:+.{digits}f}, {stat['high']:+.{digits}f}] {stat['kind']}"


def seeds(stat, bar=0.0):
    up, down, _ = signs(stat["values"], bar)
    return f"{up} above {down} below {bar:g}" if bar else f"{up} up {down} down"


def claims(r):
    """The rows of `claims.json` with their parts measured and judged, over `r`, the report's `records.Results`."""
    found = json.loads(Path(__file__).with_name("claims.json").read_text(encoding="utf-8"))
    names = defaultdict(lambda: "its own rate", r.chosen or {}) | {"rival": best_baseline()}
    tested = []
    for claim in found:
        claim["run"] = claim["run"].format_map(names)
        claim["parts"] = [measured(r, row, names) for row in claim["parts"]]
        if "not_testable" in claim:
            claim["run"] += f"; not testable here: {claim['not_testable']}"
            for part in claim["parts"]:
                part.verdict = VERDICTS[0]
        elif not any(part.why for part in claim["parts"]):
            tested += claim["parts"]
    for part in tested:
        part.tests = tests(part)
    every = [test for part in tested for test in part.tests]
    for test, adjusted in zip(every, holm([test.p for test in every]), strict=True):
        test.adjusted = adjusted
    for part in tested:
        part.verdict = judge(part)
    return found


def measured(r, row, names):
    """A row of `claims.json` as a part, with one value a seed."""
    part = Part(row["label"].format_map(names), None, row.get("bar", 0), row.get("unit", ""), row.get("within"))
    try:
        if "measure" in row:
            measure, *args = row["measure"]
            values = globals()[measure](r, *args)
        else:
            (ours, column), (theirs, other) = (
                (of(r, place, method.format_map(names)), column) for place, method, column in (row["of"], row["less"])
            )
            scale = log10 if row.get("log10") else lambda x: row.get("times", 1) * x
            pairs = [(o.get(column), theirs[seed].get(other)) for seed, o in ours.items() if seed in theirs]
            values = [scale(a) - scale(b) for a, b in pairs if None not in (a, b)]
    except NotRun as reason:
        part.why = str(reason)
        return part
    part.stat = statistic(values)
    n = sum(value is not None for value in values)
    part.why = f"{n} seeds of the {SEEDS} asked for" if n < SEEDS else ""
    return part


def of(r, place, method="rerule"):
    """{seed: outcome} of a method in a family of runs or at a rate, see above. Raises NotRun where it cannot be used."""
    found, name = r.of(place, method) if place[0] != "@" else None, place
    if found is None:
        rate, _, whose = place[1:].partition(":")
        if rate == "chosen":
            if not r.chosen:
                raise NotRun("no rate chosen yet")
            rate = r.chosen[whose or method]
        found, name = r.at(method, rate), f"{method} at {rate}"
    if method in REPLAYS and (silent := never_replayed(found)):
        raise NotRun(f"no replay on seeds {', '.join(map(str, silent))} of {name}")
    return found


def never_replayed(outcomes):
    """The seeds of {seed: outcome} on which replay never started."""
    return [seed for seed, o in outcomes.items() if o.get("first_replay") is None]


def stays_low(r):
    """% of hard prompts whose mean reward under RULE is still below τ in the last third of the steps."""
    shares = []
    for base in r.runs("base").values():
        place, late = records.regions(base), {}
        for _, query, reward, _ in records.groups_of(base, "rule", last=True):
            if place.get(query) == "hard":
                late.setdefault(query, []).append(reward)
        low = [mean(rewards) < base["tau"] for rewards in late.values()]
        shares.append(100 * sum(low) / len(low) if low else None)
    return shares


def boundary_share(r):
    """Share of hard groups among prompts about crossed neighbours less that among those about plain ones, in points."""
    kinds = [[records.hard_share(base, base["tau"], kind) for kind in "he"] for base in r.runs("base").values()]
    return [None if None in pair else 100 * (pair[0] - pair[1]) for pair in kinds]


def terms(r, of, less):
    """One of Eq. 4's terms, P(region) × the norm of its mean gradient, less another. of, less: model, region."""
    probes = [run["models"] for run in r.runs("probe").values() if len(run["models"]["RULE"]) == 2]  # both regions
    return [models[of[0]][of[1]]["weighted"] - models[less[0]][less[1]]["weighted"] for models in probes]


def gains(r, family):
    """{seed: ReRULE's retain recall less RULE's}."""
    ours, theirs = r.of(family), r.of(family, "rule")
    return {seed: ours[seed]["retain_recall"] - theirs[seed]["retain_recall"] for seed in ours}


def gain_between_worlds(r):
    """ReRULE's gain in the world of 30 crossed names less that in the world of none."""
    plain, crossed = (gains(r, world) for world in ("world0", "world30") if of(r, world) is not None)
    return [crossed[seed] - plain[seed] for seed in plain if seed in crossed]


def tau_fall(r):
    """Points of retain recall lost from τ 0.4 to 1.0 by a straight line through the four."""
    rows = {0.4: of(r, "base"), **{t: of(r, f"tau{t}") for t in (0.6, 0.8, 1.0)}}
    seeds = [seed for seed in rows[0.4] if all(seed in row for row in rows.values())]
    return [-0.6 * slope([(t, row[s]["retain_recall"]) for t, row in rows.items()]) for s in seeds]


def extra_time(r, family):
    """Stage 2's extra seconds under ReRULE, in % of RULE's."""
    ours, theirs = r.of(family), r.of(family, "rule")
    return [100 * (ours[seed]["seconds_stage2"] / theirs[seed]["seconds_stage2"] - 1) for seed in ours]


def instability_gap(r):
    """sd of retain recall about a straight line over the last third of the steps, RULE's less ReRULE's."""
    of(r, "base")  # replay ran
    runs = [[base["methods"][method]["evaluations"] for method in NAMES] for base in r.runs("base").values()]
    return [difference(*(instability(evaluations)[1] for evaluations in pair)) for pair in runs]


def best_baseline():
    """The fine-tuning baseline with the best mean score at its best rate, on the seeds on which rates were chosen."""
    rows = json.loads(RATES.read_text(encoding="utf-8"))
    best = {name: max(map(mean, row["scores"].values())) for name, row in rows.items() if name != "purge"}
    return TITLES[max(best, key=best.get)]


def kept_by_purge(r):
    """PURGE's retain recall in % of the original model's."""
    purge, original = r.of("baselines", "PURGE"), r.of("base", "Original")
    kept = {seed: o["retain_recall"] for seed, o in purge.items() if o["retain_recall"] is not None}
    return [100 * value / original[seed]["retain_recall"] for seed, value in kept.items()]


def bound_points(r):
    """{seed: [(family, 1 − bound, gain on hard prompts)]} of every family in HARD_STORES."""
    rule, bases, found = r.of("base", "rule"), r.runs("base"), {}
    for family in HARD_STORES:
        for seed, o in r.of(family).items():
            bound = records.bound(r.runs(family)[seed], bases[seed])["bound_clipped"]
            change = difference(o["late_hard"], rule[seed]["late_hard"])
            if None not in (bound, change):
                found.setdefault(seed, []).append((family, 1 - bound, change))
    return found


def bound_correlations(r):
    """Spearman's ρ of the bound's tightening with the observed gain."""
    points = [rows for rows in bound_points(r).values() if len(rows) >= 4 and all(of(r, family) for family, *_ in rows)]
    return [rank_correlation([x for _, x, _ in rows], [y for *_, y in rows]) for rows in points]
