"""Each claim of the paper with what was run for it, our figure and a verdict that follows from the figure alone.

A part of a claim is one number a seed and a bar that it must clear. With the 95 % bootstrap interval over seeds:
holds, the whole interval is above the bar; holds in direction, the mean is, the interval is not; opposite, the whole
interval is below; not seen, anything else. A claim with several parts gets the worst of their verdicts. "No change"
claims have two parts, one for each direction, with a margin as the bar.
"""

from dataclasses import dataclass

from engine.plots import NAMES, mean
from reproduce import records
from reproduce.records import difference

HARD_STORES = {  # ReRULE and its variants that store hard groups alone
    "base": "τ 0.4", "tau0.6": "τ 0.6", "tau0.8": "τ 0.8", "tau1.0": "τ 1.0", "activation": "stored until activation",
    "unequal": "no all-equal groups",
}  # fmt: skip
VERDICTS = ("opposite", "not seen", "holds in direction", "holds")
MARGIN = 2.0  # points of recall or refusal that count as no change


@dataclass
class Part:
    """One measured quantity: what it is, its statistic over seeds, and the bar that it must clear."""

    label: str
    stat: dict | None
    bar: float = 0.0
    unit: str = ""
    half: int = 0  # 1 and 2: the two halves of a "no change", of which the first is shown


@dataclass
class Claim:
    """The paper's sentence in our words, what was run, the parts, and the command that shows it."""

    text: str
    run: str
    parts: list[Part]
    only: str


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
    return "not run" if None in found or not found else min(found, key=VERDICTS.index)


def unchanged(label, stat, unit=" points", margin=MARGIN):
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
    """All claims, over `r`, the report's `records.Results`."""
    rule, rerule, bases = r.of("base", "rule"), r.of("base"), r.runs("base")
    paired, each = records.paired, records.statistic

    def gain(family, column="retain_recall"):
        return paired(r.of(family), r.of(family, "rule"), column)

    probes = [run["models"] for run in r.runs("probe").values() if len(run["models"]["RULE"]) == 2]  # both regions
    stays = [stays_low(base) for base in bases.values()]
    kinds = [[records.hard_share(base, base["tau"], kind) for kind in "bf"] for base in bases.values()]
    plain, crossed = gains(r, "world0"), gains(r, "world30")
    by_method = [[b["methods"][m]["evaluations"] for m in NAMES] for b in bases.values()]
    steady = [[records.instability(evaluations)[0] for evaluations in pair] for pair in by_method]
    purge = r.of("baselines", "PURGE")
    original = {seed: run["rows"]["Original"]["retain_recall"] for seed, run in bases.items()}
    kept = [100 * purge[s]["retain_recall"] / original[s] for s in purge if purge[s]["retain_recall"] is not None]
    rival = best_baseline(r)
    steer = {seed: records.outcome(base, "Rej. Steer", base) for seed, base in bases.items()}
    return [
        Claim("Hard cases persist: they still earn less than easy ones at the end of training.",
              "RULE's mean reward on easy less hard prompts, last third of the steps",
              [Part("easy − hard", each([difference(o["late_easy"], o["late_hard"]) for o in rule.values()]))],
              "figure1"),
        Claim("Hard cases stay low-reward throughout training.",
              "Share of hard prompts still below τ under RULE in the last third of the steps; bar 50 %",
              [Part("still below τ", each(stays), 50, " %")], "figure1"),
        Claim("Hard cases lie near the forget/retain boundary.",
              "Share of groups below τ before replay, boundary less forget prompts",
              [Part("boundary − forget", each([100 * (b - f) for b, f in kinds]), 0, " points")], "table6"),
        Claim("Easy cases stop giving gradient, so late training lives on hard ones.",
              "Eq. 4's two terms at the end of RULE, P(region) × norm; and whether the easy term fell since Stage 1",
              [Part("hard − easy", each([term(m, "RULE", "hard") - term(m, "RULE", "easy") for m in probes])),
               Part("easy term's fall", each([term(m, "Rej. Steer", "easy") - term(m, "RULE", "easy")
                                              for m in probes]))], "appendix_e"),
        Claim("Replaying hard cases improves retain quality.", "Recall on all neighbours, ReRULE less RULE",
              [Part("ReRULE − RULE", gain("base"), 0, " points")], "controls"),
        Claim("With random storage ReRULE falls back to RULE.",
              f"Random storage less RULE (no change: within ± {MARGIN:g}), and ReRULE less random storage",
              [*unchanged("random − RULE", paired(r.of("random"), rule, "retain_recall")),
               Part("ReRULE − random", paired(rerule, r.of("random"), "retain_recall"), 0, " points")], "table4"),
        Claim("It is the hard cases that replay helps with, not replay as such.",
              "ReRULE less replay of the previous batch, which is neither hard nor stored",
              [Part("ReRULE − previous batch", paired(rerule, r.of("recent"), "retain_recall"), 0, " points")],
              "controls"),
        Claim("Replay makes training more efficient: more from the same computation.",
              "ReRULE less RULE with more steps, as much arithmetic in all",
              [Part("ReRULE − longer RULE", paired(rerule, r.of("compute", "rule"), "retain_recall"), 0, " points")],
              "controls"),
        Claim("ReRULE beats RULE, each at its best setting.",
              "Each at the learning rate that was best for it on the selection seeds",
              [Part("ReRULE − RULE", paired(r.of("best_rerule"), r.of("best_rule", "rule"), "retain_recall"), 0,
                    " points")], "controls"),
        Claim("A lower τ is better.",
              "Retain recall at τ 0.4 less that at 1.0, by a straight line through 0.4, 0.6, 0.8, 1.0",
              [Part("fall from τ 0.4 to 1.0", each(tau_fall(r)), 0, " points")], "table8"),
        Claim("Replay pays where the hard/easy disparity is pronounced.",
              "ReRULE's gain in the world of 30 crossed names less that in the world of none",
              [Part("gain at 30 − at 0", each([crossed[s] - plain[s] for s in plain if s in crossed]), 0,
                    " points")], "worlds"),
        Claim("There is little to gain where the disparity is small.",
              f"ReRULE less RULE in the world without crossed names (no change: within ± {MARGIN:g})",
              unchanged("ReRULE − RULE", gain("world0")), "worlds"),
        Claim("Replay adds only 5–11 % of training time.",
              "Seconds of Stage 2 that ReRULE saves (below 0: takes more) in % of RULE's; bar −11 %",
              [Part("built-in", scaled(extra_time(r, "base"), -1), -11, " %"),
               Part("TOFU", scaled(extra_time(r, "tofu"), -1), -11, " %")], "table7"),
        Claim("ReRULE is better on all benchmarks.",
              "Retain quality of ReRULE less RULE in each of three worlds and on TOFU text (model utility × 100)",
              [Part("built-in", gain("base"), 0, " points"), Part("no crossed names", gain("world0"), 0, " points"),
               Part("30 crossed", gain("world30"), 0, " points"),
               Part("TOFU", scaled(gain("tofu", "model_utility"), 100), 0, " points")],
              "claims"),
        Claim("Forget quality is unharmed.", "Refusal and recall of forget probes, ReRULE less RULE, 1 point allowed",
              [Part("refusal", gain("base", "forget_refusal"), -1, " points"),
               Part("recall, its sign changed", scaled(gain("base", "forget_recall"), -1), -1, " points")], "table1"),
        Claim("A tighter hard-case bound, and so better hard cases.",
              "Rank correlation, over a seed's replay variants, of 1 − √(N_on/N_eff) with the gain on hard prompts",
              [Part("Spearman's ρ", each(bound_correlations(r)))], "appendix_e"),
        Claim("The hardest cases earn more under ReRULE.",
              "Reward of the three hardest forget and boundary prompts, last third, ReRULE less RULE",
              [Part("ReRULE − RULE", paired(rerule, rule, "late_cases"))], "table3"),
        Claim("RULE's retain quality is unstable, ReRULE's steady.",
              "sd of retain recall over the last third of the steps, RULE less ReRULE",
              [Part("sd, RULE − ReRULE", each([difference(a, b) for a, b in steady]), 0, " points")], "figure3"),
        Claim("RULE generalises to phrasings it was not trained on.",
              "Held-out phrasings: what RULE adds to Stage 1's retain recall; refusal less that on trained ones, "
              f"{MARGIN:g} points allowed",
              [Part("retain", paired(rule, steer, "heldout"), 0, " points"),
               Part("refusal", each([difference(o["forget_heldout_refusal"], o["forget_trained_refusal"])
                                     for o in rule.values()]), -MARGIN, " points")], "table1"),
        Claim("Reinforcement beats the fine-tuning baselines.",
              "Harmonic mean of retain recall and 100 − forget recall, ReRULE less the best baseline "
              f"({rival or 'none yet'})",
              [Part("ReRULE − best", paired(rerule, r.of("baselines", rival), "balance") if rival else None, 0,
                    " points")], "table1"),
        Claim("PURGE keeps 98 % of the utility.", "Its retain recall in % of the original model's",
              [Part("kept", each(kept), 98, " %")], "table1"),
    ]  # fmt: skip


def term(models, model, region):
    """One of Eq. 4's two terms: P(region) × the norm of its mean gradient."""
    return models[model][region]["weighted"]


def scaled(stat, by):
    """The statistic of the values times `by`."""
    return stat and records.statistic([by * value for value in stat["values"]])


def gains(r, family):
    """{seed: ReRULE's retain recall less RULE's}."""
    ours, theirs = r.of(family), r.of(family, "rule")
    return {seed: ours[seed]["retain_recall"] - theirs[seed]["retain_recall"] for seed in ours}


def stays_low(base):
    """% of a seed's hard prompts whose mean reward under RULE is still below τ in the last third of the steps."""
    place, late = records.regions(base), {}
    for _, query, reward, _ in records.groups_of(base, "rule", last=True):
        if place.get(query) == "hard":
            late.setdefault(query, []).append(reward)
    low = [mean(rewards) < base["tau"] for rewards in late.values()]
    return 100 * sum(low) / len(low) if low else None


def tau_fall(r):
    """Points of retain recall lost from τ 0.4 to 1.0 by a straight line through the four, a value a seed."""
    rows = {0.4: r.of("base"), **{t: r.of(f"tau{t}") for t in (0.6, 0.8, 1.0)}}
    seeds = [seed for seed in rows[0.4] if all(seed in row for row in rows.values())]
    return [-0.6 * records.slope([(t, row[s]["retain_recall"]) for t, row in rows.items()]) for s in seeds]


def extra_time(r, family):
    """Statistic of Stage 2's extra seconds under ReRULE, in % of RULE's."""
    ours, theirs = r.of(family), r.of(family, "rule")
    return records.statistic(
        [100 * (ours[s]["seconds_stage2"] / theirs[s]["seconds_stage2"] - 1) for s in sorted(ours)]
    )


def best_baseline(r):
    """The baseline with the best mean balance of what is kept and what is forgotten."""
    names = {name for run in r.runs("baselines").values() for name in run["rows"]}
    names -= {"Original", "Retained", "Rej. Steer", "PURGE"}
    means = {name: mean(o["balance"] for o in r.of("baselines", name).values()) for name in sorted(names)}
    return max((name for name in means if means[name] is not None), key=means.get, default=None)


def bound_points(r):
    """{seed: [(family, 1 − bound, gain on hard prompts)]} of every family in HARD_STORES."""
    rule, found = r.of("base", "rule"), {}
    for family in HARD_STORES:
        for seed, o in r.of(family).items():
            run, base = r.runs(family)[seed], r.runs("base").get(seed)
            bound = records.bound(run, base)["bound_clipped"] if base else None
            change = difference(o.get("late_hard"), rule[seed].get("late_hard")) if seed in rule else None
            if None not in (bound, change):
                found.setdefault(seed, []).append((family, 1 - bound, change))
    return found


def bound_correlations(r):
    """Spearman's ρ of the bound's tightening with the observed gain, a value a seed."""
    points = [rows for rows in bound_points(r).values() if len(rows) >= 4]
    return [records.rank_correlation([x for _, x, _ in rows], [y for *_, y in rows]) for rows in points]
