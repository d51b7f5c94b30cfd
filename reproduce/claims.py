"""Each claim of the paper with what was run for it, our figure and a verdict that follows from the figure alone.

`claims.json` has each claim's sentence in our words, what was run, the command that shows it, and its parts. A part is
one number a seed, as a difference ("of" less "less": family, method and column) or by a function of ours ("measure"),
and a bar that it must clear. With the 95 % bootstrap interval over seeds: holds, the whole interval is above the bar;
holds in direction, the mean is, the interval is not; opposite, the whole interval is below; not seen, anything else.
A claim gets the worst of its parts' verdicts. A "no change" part ("within" a margin) becomes two, one a direction.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from engine.plots import NAMES, mean
from reproduce import records
from reproduce.plan import SECTIONS
from reproduce.records import difference

HARD_STORES = SECTIONS["appendix_e"][:-1]  # ReRULE and its variants that store hard groups alone; the probe is last
VERDICTS = ("opposite", "not seen", "holds in direction", "holds")


@dataclass
class Part:
    """One measured quantity: what it is, its statistic over seeds, and the bar that it must clear."""

    label: str
    stat: dict | None
    bar: float = 0.0
    unit: str = ""
    half: int = 0  # 1 and 2: the two halves of a "no change", of which the first is shown


def verdict(stat, bar=0.0):
    """One of VERDICTS for a statistic over seeds, None where there is none."""
    if stat is None:
        return None
    if stat["low"] > bar:
        return "holds"
    if stat["high"] < bar:
        return "opposite"
    return "holds in direction" if stat["mean"] > bar else "not seen"


def overall(parts):
    """The worst verdict of the parts; "not run" where one is missing."""
    found = [verdict(part.stat, part.bar) for part in parts]
    return "not run" if None in found else min(found, key=VERDICTS.index)


def unchanged(label, stat, unit=" points", margin=2.0):
    """The two parts of "stays within ± margin"."""
    opposite = stat and {**stat, "mean": -stat["mean"], "low": -stat["high"], "high": -stat["low"]}
    return [Part(label, stat, -margin, unit, 1), Part("", opposite, -margin, unit, 2)]


def shown(part):
    """A part in one line, seeds counted against its bar where it has one; nothing for the second half of a pair."""
    bar = 0 if part.half else part.bar
    return "" if part.half == 2 else f"{part.label}: {figure(part.stat, part.unit, bar)}"


def figure(stat, unit="", bar=0.0):
    """A statistic in one line."""
    if stat is None:
        return "–"
    digits = 1 if max(abs(stat["mean"]), abs(stat["low"]), abs(stat["high"])) >= 1 else 2
    low, high = (f"{stat[end]:+.{digits}f}" for end in ("low", "high"))
    up, down, p = records.signs(stat["values"], bar)
    seeds = f"{up} above and {down} below {bar:g}" if bar else f"{up} up {down} down"
    return f"{stat['mean']:+.{digits}f}{unit} [{low}, {high}], {seeds}, p = {p:.2g}"


def claims(r):
    """The rows of `claims.json` with their parts measured, over `r`, the report's `records.Results`."""
    found = json.loads(Path(__file__).with_name("claims.json").read_text(encoding="utf-8"))
    rival = best_baseline(r) or "none yet"
    for claim in found:
        rows, claim["parts"], claim["run"] = claim["parts"], [], claim["run"].format(rival=rival)
        for row in rows:
            if "measure" in row:
                measure, *args = row["measure"]
                values = globals()[measure](r, *args)
            else:
                of, less = ((r.of(f, m.format(rival=rival)), column) for f, m, column in (row["of"], row["less"]))
                values = [difference(o.get(of[1]), less[0][s].get(less[1])) for s, o in of[0].items() if s in less[0]]
            stat = records.statistic([row.get("times", 1) * value for value in values if value is not None])
            part = Part(row["label"], stat, row.get("bar", 0), row.get("unit", ""))
            within = "within" in row
            claim["parts"] += unchanged(part.label, stat, part.unit, row["within"]) if within else [part]
    return found


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
    """Share of hard groups among boundary prompts less that among forget prompts, in points."""
    kinds = [[records.hard_share(base, base["tau"], kind) for kind in "bf"] for base in r.runs("base").values()]
    return [100 * (boundary - forget) for boundary, forget in kinds]


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
    plain, crossed = gains(r, "world0"), gains(r, "world30")
    return [crossed[seed] - plain[seed] for seed in plain if seed in crossed]


def tau_fall(r):
    """Points of retain recall lost from τ 0.4 to 1.0 by a straight line through the four."""
    rows = {0.4: r.of("base"), **{t: r.of(f"tau{t}") for t in (0.6, 0.8, 1.0)}}
    seeds = [seed for seed in rows[0.4] if all(seed in row for row in rows.values())]
    return [-0.6 * records.slope([(t, row[s]["retain_recall"]) for t, row in rows.items()]) for s in seeds]


def extra_time(r, family):
    """Stage 2's extra seconds under ReRULE, in % of RULE's."""
    ours, theirs = r.of(family), r.of(family, "rule")
    return [100 * (ours[seed]["seconds_stage2"] / theirs[seed]["seconds_stage2"] - 1) for seed in ours]


def instability_gap(r):
    """sd of retain recall over the last third of the steps, RULE's less ReRULE's."""
    runs = [[base["methods"][method]["evaluations"] for method in NAMES] for base in r.runs("base").values()]
    return [difference(*(records.instability(evaluations)[0] for evaluations in pair)) for pair in runs]


def best_baseline(r):
    """The baseline with the best mean balance of what is kept and what is forgotten."""
    names = {name for run in r.runs("baselines").values() for name in run["rows"]}
    names -= {"Original", "Retained", "Rej. Steer", "PURGE"}
    means = {name: mean(o["balance"] for o in r.of("baselines", name).values()) for name in sorted(names)}
    return max((name for name in means if means[name] is not None), key=means.get, default=None)


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
    points = [rows for rows in bound_points(r).values() if len(rows) >= 4]
    return [records.rank_correlation([x for _, x, _ in rows], [y for *_, y in rows]) for rows in points]
