"""Each claim of the paper with what was run for it, our figure and a verdict that follows from the figure alone.

`claims.json` has each claim's sentence in our words, what was run, the command that shows it, and its parts. A part is
one number a seed, as a difference ("of" less "less", if any, or "as" one of WAYS) or by a function of ours ("measure",
with the families in which replay "needs" to have run), and the "bar" that it must clear (0) or the margin that it must
stay "within". A side has a family of runs, a method and a column, or is the difference of two such sides. "@4e-5" in
place of a family is a learning rate, "@chosen" the one chosen for the method on the selection seeds, "@chosen:rule" for
RULE. "since" names the commit of a bar, 9b80cbb unless given. `template.md` tells how a verdict follows."""

from collections import defaultdict
from dataclasses import dataclass
from math import log10

import numpy as np

from baselines import TITLES
from engine.plots import mean
from reproduce import HERE, read_json, records
from reproduce.plan import SECTIONS
from reproduce.statistics import difference, holm, p_value, rank_correlation, statistic

HARD_STORES = SECTIONS["appendix_e"][:-1]  # ReRULE and its variants that store hard groups alone; the probe is last
SEEDS, LEVEL = 8, 0.05  # seeds that a verdict needs; p that it needs
VERDICTS = ("not run", "not testable here", "opposite", "inconclusive", "holds")  # the first found counts
WAYS = {"difference": lambda a, b=0: a - b, "percent": lambda a, b: 100 * a / b, "log10": lambda a, b: log10(a / b),
        "extra": lambda a, b: 100 * (a / b - 1)}  # fmt: skip
RATES = HERE.parent / "results" / "rates_builtin.json"  # the baselines', chosen on seeds 11 and 12


class NotRun(Exception):
    """Says why a part has no values that may be used."""


@dataclass
class Part:
    """One measured quantity: what it is, its statistic over seeds, and the edges that it is tested against."""

    label: str
    stat: dict | None
    edges: tuple = ((0.0, 1),)  # a bar, or two edges of a margin; 1: the claim lies above it, −1: below
    unit: str = ""
    why: str = ""  # it cannot be judged
    verdict: str = "not run"
    p: tuple = ()  # one for each edge
    adjusted: tuple = ()  # by Holm


def judge(part):
    """The verdict of a part whose p-values are corrected."""
    sides = [up * (part.stat["mean"] - edge) > 0 for edge, up in part.edges]
    sure = [side for side, p in zip(sides, part.adjusted, strict=True) if p <= LEVEL]
    return "opposite" if not all(sure) else "holds" if len(sure) == len(sides) else "inconclusive"


def overall(parts):
    """A claim's verdict from its parts'."""
    return next(verdict for verdict in VERDICTS if verdict in [part.verdict for part in parts])


def shown(part):
    """A part in one line: mean, interval and kind, the test of its bar or of the nearer edge, seeds on both sides."""
    if part.stat is None:
        return f"{part.label}: {part.why}"
    edges, told = [edge for edge, _ in part.edges], ""
    if part.p:
        _, p, adjusted = min(zip((abs(edge - part.stat["mean"]) for edge in edges), part.p, part.adjusted, strict=True))
        told = f", p = {p:.2g} (Holm {adjusted:.2g})" + f" for ±{edges[-1]:g}" * (len(edges) == 2)
    why = f"; {part.why}" if part.why else ""
    return f"{part.label}: {figure(part.stat, part.unit, told, edges[0] if len(edges) == 1 else 0)}{why}"


def figure(stat, unit="", told=None, bar=0.0):
    """Mean, interval, kind, test (`told`: uncorrected, against 0, unless given), seeds on both sides of the bar."""
    if stat is None:
        return "–"
    told = f", p = {stat['p']:.2g}" if told is None else told
    digits = 1 if max(abs(stat["mean"]), abs(stat["low"]), abs(stat["high"])) >= 1 else 2
    average, low, high = (f"{stat[name]:+.{digits}f}" for name in ("mean", "low", "high"))
    up, down = sum(value > bar for value in stat["values"]), sum(value < bar for value in stat["values"])
    seeds = f"{up} above {down} below {bar:g}" if bar else f"{up} up {down} down"
    return f"{average}{unit} [{low}, {high}] {stat['kind']}{told}, {seeds}"


def claims(r):
    """The rows of `claims.json` with their parts measured and judged, over `r`, the report's `records.Results`."""
    found = read_json(HERE / "claims.json")
    names, tested = defaultdict(lambda: "its own rate", r.chosen or {}) | {"rival": best_baseline()}, []
    for claim in found:
        claim["run"] = claim["run"].format_map(names)
        claim["parts"] = [measured(r, row, names) for row in claim["parts"]]
        if "not_testable" in claim:
            claim["run"] += f"; not testable here: {claim['not_testable']}"
            for part in claim["parts"]:
                part.verdict = "not testable here"
        elif not any(part.why for part in claim["parts"]):
            tested += claim["parts"]
    for part in tested:
        part.p = [p_value(part.stat["values"], edge, 3 - len(part.edges)) for edge, _ in part.edges]
    adjusted = iter(holm([p for part in tested for p in part.p]))
    for part in tested:
        part.adjusted = [next(adjusted) for _ in part.p]
        part.verdict = judge(part)
    return found


def measured(r, row, names):
    """A row of `claims.json` as a part, with one value a seed."""
    edges = ((-row["within"], 1), (row["within"], -1)) if "within" in row else ((row.get("bar", 0), 1),)
    part = Part(row["label"].format_map(names), None, edges, row.get("unit", ""))
    try:
        if "measure" in row:
            for family in row.get("needs", ()):
                of(r, family)
            values = globals()[row["measure"]](r)
        else:
            sides = [side(r, row[name], names) for name in ("of", "less") if name in row]
            seeds = [seed for seed in sides[0] if None not in [own.get(seed) for own in sides]]
            way = WAYS[row.get("as", "difference")]
            values = [row.get("times", 1) * way(*(own[seed] for own in sides)) for seed in seeds]
    except NotRun as reason:
        part.why = str(reason)
        return part
    part.stat, n = statistic(values), sum(value is not None for value in values)
    part.why = f"{n} seeds of the {SEEDS} asked for" if n < SEEDS else ""
    return part


def side(r, what, names):
    """{seed: value} of a part's side."""
    if isinstance(what[0], list):
        ours, theirs = (side(r, one, names) for one in what)
        return {seed: difference(value, theirs.get(seed)) for seed, value in ours.items()}
    place, method, column = what
    return {seed: o.get(column) for seed, o in of(r, place, method.format_map(names)).items()}


def of(r, place, method="rerule"):
    """{seed: outcome} of a method in a family of runs or at a rate; raises NotRun where it cannot be used."""
    if place[0] == "@":
        rate, _, whose = place[1:].partition(":")
        rate = (r.chosen or {}).get(whose or method) if rate == "chosen" else rate
        if rate is None:
            raise NotRun("no rate chosen: not all selection runs are there, or at none did all replay")
        place, method = records.place_of(method, rate)
    own = {name for name, run in r.records.items() if run["family"] == place and run["seed"] in r.seeds}
    if method == "rerule" and (silent := own.intersection(r.refused)):
        raise NotRun(f"replay never ran in {', '.join(sorted(silent))}")
    return r.of(place, method)


def tau_fall(r):
    """Points of retain recall lost from τ 0.4 to 1.0 by a straight line through the four."""
    rows = {0.4: r.at("rerule", "4e-5"), **{t: r.of(f"tau{t}") for t in (0.6, 0.8, 1.0)}}
    seeds = [seed for seed in rows[0.4] if all(seed in row for row in rows.values())]
    return [-0.6 * np.polyfit([*rows], [row[s]["retain_recall"] for row in rows.values()], 1)[0] for s in seeds]


def best_baseline():
    """The fine-tuning baseline with the best mean score at its best rate, on the seeds on which rates were chosen."""
    best = {name: max(map(mean, row["scores"].values())) for name, row in read_json(RATES).items() if name != "purge"}
    return TITLES[max(best, key=best.get)]


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
    points = [rows for rows in bound_points(r).values() if len(rows) >= 4]
    return [rank_correlation([x for _, x, _ in rows], [y for *_, y in rows]) for rows in points]
