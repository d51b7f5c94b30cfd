"""The report's figures, drawn from records. Every panel says what is better, shows seeds, and can do without colour.

Covers the paper's Figures 1, 2 and 3, and pictures of what this repository adds; `rates` is the main one. A title is
neutral or has the figures that it tells, so that no record can deny it.
"""

import json
import textwrap
from pathlib import Path

import numpy as np

from engine.plots import GREY, NAMES, dots, look, mark_start, mean, pyplot, save, smooth
from reproduce import claims, records
from reproduce.plan import FAMILIES, RATES, SECTIONS, SELECTION

LINES = NAMES | {"random": "random groups", "recent": "previous batch", "current": "same batch twice"}
PROBED = {"Rej. Steer": "after\nStage 1", "RULE": "RULE", "ReRULE": "ReRULE"}
BOXES, ARROWS = json.loads(Path(__file__).with_name("pipeline.json").read_text(encoding="utf-8")).values()
GAIN = "Retain recall, ReRULE − RULE, points (↑ better)"
TOWN = {"Original": ("town", "Original"), "Retained": ("town", "Retained"), "Rej. Steer": ("town", "Rej. Steer"),
        "RULE": ("town_rule", "RULE"), "ReRULE": ("town_rerule", "ReRULE"), "random": ("town_random", "ReRULE"),
        "recent": ("town_recent", "ReRULE")}  # fmt: skip


def summary(values):
    """`records.statistic` of one value a seed; of one or two seeds the mean alone; None without any."""
    values = [value for value in values if value is not None]
    alone = {"mean": mean(values), "values": values} if values else None
    return records.statistic(values) if len(values) > 2 else alone


def rates(r, path):
    """The main figure: what is kept, and what many samples still tell, against the learning rate, each kind of replay
    beside RULE with as many batches, as many optimiser steps, and as much computation."""
    panels = {"rule": "As many batches of rollouts", "steps": "As many optimiser steps\n(RULE: more batches)",
              "compute": "As much computation\n(RULE: more batches)"}  # fmt: skip
    rows = {"retain_recall": "Recall of what must be kept, %\n(↑ better)",
            "leak_64": "Forgotten facts in the best of\n64 samples, recall, % (↓ better)"}  # fmt: skip
    figure, axes = pyplot().subplots(2, 3, figsize=(10, 6.6), sharex=True, sharey="row", layout="constrained")
    for axis, column, alone in zip(axes.flat, np.repeat(list(rows), 3), [*panels] * 2, strict=True):
        told = []
        for at, (method, name) in enumerate(LINES.items()):
            source = alone if method == "rule" else method
            stats = {rate: summary([o.get(column) for o in r.at(source, rate).values()]) for rate in RATES}
            stats = {float(rate) * 1.07 ** (at - 2): stat for rate, stat in stats.items() if stat}  # beside one another
            whiskers(axis, stats, label=name, linewidth=1.6, markersize=4, **look(method))
            best = float(r.chosen.get(source, r.chosen[method])) * 1.07 ** (at - 2)
            if best in stats:
                axis.plot(best, stats[best]["mean"], markersize=11, markeredgecolor="black", zorder=4, **look(method))
                told += [f"{name} {stats[best]['mean']:.1f}"] * (method in NAMES)
        title = f"{panels[alone]}\n" * (axis in axes[0]) + ", ".join(told)
        axis.set_title(title, fontsize=10, linespacing=1.4)
        axis.set_xscale("log")
        axis.set_xticks([float(rate) for rate in RATES], RATES, fontsize=9)
        axis.minorticks_off()
    for axis, label in zip(axes[:, 0], rows.values(), strict=True):
        axis.set_ylabel(label)
    figure.supxlabel("Learning rate. Large: the rate chosen for the method on seeds "
                     f"{SELECTION[0]}–{SELECTION[-1]}; above each panel its figures there.", fontsize=10.5)  # fmt: skip
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    save(figure, path)


def whiskers(axis, stats, **drawn):
    """Means with their intervals at places x. stats: {x: statistic}."""
    middle = np.array([stat["mean"] for stat in stats.values()])
    low, high = (np.array([stat.get(end, stat["mean"]) for stat in stats.values()]) for end in ("low", "high"))
    axis.errorbar(list(stats), middle, [middle - low, high - middle], elinewidth=1.1, **drawn)


def gains(panels, path):
    """What each kind of replay, and each control, gains over RULE at the same rate: mean, 95 % interval, every seed.

    panels: {title: [(label, look, statistic)]}, look a method's key in `engine.plots.LOOKS`. The best comes on top.
    """
    panels = {title: sorted(rows, key=lambda row: -row[2]["mean"]) for title, rows in panels.items() if rows}
    heights = [1 + 0.3 * len(rows) for rows in panels.values()]
    figure, axes = pyplot().subplots(len(panels), figsize=(10, sum(heights)), height_ratios=heights, squeeze=False,
                                     sharex=True, layout="constrained")  # fmt: skip
    for axis, (title, rows) in zip(axes.flat, panels.items(), strict=True):
        dots(axis, rows, "{mean:+.1f} [{low:+.1f}, {high:+.1f}]")
        axis.axvline(0, color="black", linewidth=1)
        axis.set_title(title, loc="left")
    axis.set_xlabel("Recall of what must be kept, less RULE's at the same rate, points (→ better). Small: seeds")
    save(figure, path)


def matrix(axis, rows, form="{mean:.0f}", step=0.12):
    """Rows of several methods: marks of their own, one under the other, and a column of numbers a method.

    rows: {label: {method: statistic or None}}, the same methods in each; step: from column to column, in axis widths.
    """
    methods = list(next(iter(rows.values())))
    for at, method in enumerate(methods):
        shift, column = 0.33 - 0.66 * at / max(1, len(methods) - 1), 1.03 + step * at
        dots(axis, [(label, method, own[method]) for label, own in rows.items()], form, shift, column)
        mark = look(method) | {"transform": axis.transAxes, "clip_on": False}
        axis.plot(column + 0.3 * step, 1.06, markersize=8, markeredgecolor="white", **mark)
        name = PROBED.get(method, LINES.get(method, method)).replace(" ", "\n")
        axis.text(column + 0.3 * step, 1.1, name, transform=axis.transAxes, ha="center", va="bottom", fontsize=9)
    for y in range(1, len(rows)):
        axis.axhline(y - 0.5, color=GREY, linewidth=0.5, alpha=0.4)


def town(r, columns, path):
    """What is left of the forget set, and what is kept, the nearer neighbours first. columns: {words: column}."""
    rows = {words: {name: summary([run["rows"].get(title, {}).get(column) for run in r.runs(family).values()])
                    for name, (family, title) in TOWN.items()} for words, column in columns.items()}  # fmt: skip
    there = [name for name in TOWN if any(own[name] for own in rows.values())]
    rows = {words: {name: own[name] for name in there} for words, own in rows.items()}
    figure, axis = pyplot().subplots(figsize=(10, 1 + 0.75 * len(rows)), layout="constrained")
    matrix(axis, rows)
    axis.set_xlabel("Recall, %. Small: seeds")
    save(figure, path)


def attacks(r, path):
    """What RWKU's attacks still bring out, by type, the most telling on top: a mark a method."""
    runs = [run["rows"] for run in r.runs("rwku").values()]
    kinds = {column for row in runs[0].values() for column in row if column.startswith("attack_")}
    kinds = {kind for kind in kinds if not kind.startswith("attack_cross_lingual_")}  # each language: in the table
    methods = [name for name in ("Original", "Rej. Steer", "RULE", "ReRULE") if name in runs[0]]
    rows = {kind: {name: summary([row[name].get(kind) for row in runs]) for name in methods} for kind in sorted(kinds)}
    level = {kind: mean(own[m]["mean"] for m in methods[1:] if own[m]) or 0 for kind, own in rows.items()}
    rows = {k.removeprefix("attack_").replace("_", " "): rows[k] for k in sorted(rows, key=lambda k: -level[k])}
    figure, axis = pyplot().subplots(figsize=(10, 1 + 0.5 * len(rows)), layout="constrained")
    matrix(axis, rows)
    axis.set_xlabel("Recall of what was to be forgotten, under attack, % (← better)")
    save(figure, path)


def age(r, path, edges=(2, 4, 8, 16)):
    """What age does: to importance weights, and to the gain where replay stops at an age."""
    points = [point for run in r.runs("base").values() for point in run["methods"]["rerule"]["by_age"]]
    groups = [[p for p in points if np.digitize(p[0], edges) == part] for part in range(len(edges) + 1)]
    color, means = look("rerule")["color"], [np.mean(group, 0) for group in groups if group]
    figure, axes = pyplot().subplots(1, 2, figsize=(10, 3.9), layout="constrained", width_ratios=(1, 0.8))
    for at, name, fill, up in ((1, "effective sample size, share (↑ better)", color, 9),
                               (2, "share of weights clipped (↓ better)", "white", -9)):  # fmt: skip
        axes[0].plot(*np.array(points)[:, [0, at]].T, ".", color=GREY, alpha=0.25, markersize=4, markeredgewidth=0)
        drawn = dict(color=color, marker="o", markerfacecolor=fill, linewidth=1.8, markersize=8)
        axes[0].plot([m[0] for m in means], [m[at] for m in means], "-" if at == 1 else "--", label=name, **drawn)
        for m in means:
            axes[0].annotate(f"{m[at]:.2f}", (m[0], m[at]), (0, up), textcoords="offset points", ha="center",
                             va="center", fontsize=9)  # fmt: skip
    axes[0].set_xscale("log", base=2)
    axes[0].set_xticks([e for e in (1, *edges, 32) if e <= 2 * max(p[0] for p in points)])
    axes[0].xaxis.set_major_formatter("{x:.0f}")
    axes[0].set(title="ReRULE's weights before clipping; small: an update", ylim=(-0.05, 1.12),
                xlabel="Mean age of the replayed groups, steps")  # fmt: skip
    axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=9.5, ncols=1, frameon=False)
    rule, labels = r.of("base", "rule"), {f"age{e}": f"at most {e} steps old" for e in edges} | {"base": "of any age"}
    stats = {words: records.paired(r.of(family), rule, "retain_recall") for family, words in labels.items()}
    dots(axes[1], [(words, "rerule", stat) for words, stat in stats.items() if stat], "{mean:+.1f}")
    axes[1].axvline(0, color="black", linewidth=1)
    axes[1].set(title="ReRULE with replay of groups …", xlabel=GAIN.replace(", points (↑", ",\npoints (→"))
    save(figure, path)


def trajectories(r, path, parts=5):
    """Figure 1: RULE's mean reward over passes through the prompts, in fifths from hard to easy, by kind of prompt."""
    bases = r.runs("base").values()
    figure, axes = pyplot().subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    shades = pyplot().get_cmap("cividis")(np.linspace(0, 0.85, parts))
    for axis, kind, title in zip(axes, "fb", ("Forget prompts", "Boundary prompts"), strict=True):
        curves = [passes(base, kind, parts) for base in bases]  # seeds × parts × passes
        for part in range(parts):
            name = {0: "hardest fifth", parts - 1: "easiest fifth"}.get(part, f"fifth {part + 1}")
            own = [curve[1][part] for curve in curves]
            first, *_, last = np.nanmean(np.array(own, float), 0)
            lines(axis, curves[0][0], own, color=shades[part], alpha=0.25,
                  thick=dict(linewidth=2.4, marker="osD^v"[part], label=f"{name} {first:.2f} → {last:.2f}"))
        mark_start(axis, [base["methods"]["rerule"]["first_replay"] for base in bases], "sorted by reward\nbefore this")
        axis.set(title=title, xlabel="Stage 2 step (middle of a pass through all prompts)")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=9, frameon=False)
    axes[0].set_ylabel("RULE: mean reward, 0–1 (↑ better)")
    save(figure, path)


def passes(base, kind, parts):
    """(middle step of each pass, [part][pass] mean reward) of RULE on one kind of prompt, sorted before replay."""
    means = {query: np.mean(values) for query, values in records.before_replay(base).items()}
    order = sorted((q for q in means if base["kinds"][q] == kind), key=lambda q: (means[q], q))
    part_of = {query: at * parts // len(order) for at, query in enumerate(order)}
    length = -(-len(base["kinds"]) // len(base["methods"]["rule"]["rewards"][0]))  # steps of one pass
    rows, steps = {}, {}
    for step, query, reward, _ in records.groups_of(base, "rule"):
        steps.setdefault((step - 1) // length, set()).add(step)
        if query in part_of:
            rows.setdefault((part_of[query], (step - 1) // length), []).append(reward)
    return [np.mean(list(found)) for found in steps.values()], [
        [np.mean(rows.get((part, at), [np.nan])) for at in steps] for part in range(parts)
    ]


def lines(axis, steps, values, thick, **drawn):
    """Each seed thin, their mean thick: of those that have a value at a step."""
    values = np.array(values, float)  # None: NaN
    for line in values:
        axis.plot(steps, line, linewidth=0.7, **drawn)
    middle = [mean(v for v in column if v == v) for column in values.T]
    axis.plot(steps, np.array(middle, float), **drawn | {"alpha": 1} | thick)


def pipeline(path):
    """Figure 2: the steps of Stage 2 in their order, each box a function of ours.

    `pipeline.json`: boxes, {function: [column, row, what it does]}, the lower row being what ReRULE adds; and arrows,
    [from, to (numbers of boxes), corners from tail to head, words, where these stand, dash].
    """
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    from matplotlib.path import Path as Corners

    figure, axis = pyplot().subplots(figsize=(10, 4.1), layout="constrained")
    axis.axis("off")
    for name, (x, y, text) in BOXES.items():
        face, method, dash = ("#DDEBF5", "rule", "--") if y else ("#FBE6DA", "rerule", "-")
        drawn = dict(facecolor=face, edgecolor=look(method)["color"], linewidth=1.8, linestyle=dash)
        axis.add_patch(FancyBboxPatch((x - 0.45, y - 0.3), 0.9, 0.6, "round,pad=0,rounding_size=0.05", **drawn))
        axis.text(x, y + 0.06, text, ha="center", va="center", fontsize=10, linespacing=1.25)
        axis.text(x, y - 0.23, name, ha="center", va="center", fontsize=7.5, family="monospace")
    for _, _, corners, words, place, dash in ARROWS:
        arrow = dict(arrowstyle="-|>", mutation_scale=14, linewidth=1.4, color="black", linestyle=dash, shrinkB=0)
        axis.add_patch(FancyArrowPatch(path=Corners(corners), **arrow))
        axis.text(*place, words, ha="center", va="center", fontsize=9.5)
    told = "Dashed, blue: RULE.\nSolid, orange: what\nReRULE adds.\n\nActive: step > warm-up\nand |B| ≥ min_groups."
    axis.text(-0.44, 0, told, fontsize=9.5, va="center")
    axis.set(xlim=(-0.47, 4.47), ylim=(-0.58, 2.05))
    save(figure, path)


def over_steps(r, path):
    """Figure 3: retain quality, forget quality and hard prompts' reward over steps, RULE against ReRULE."""
    bases = r.runs("base").values()
    figure, axes = pyplot().subplots(1, 3, figsize=(10.5, 4.2), layout="constrained")
    ends = [[], [], []]
    for method in NAMES:
        own, rewards = [base["methods"][method]["evaluations"] for base in bases], []
        for base in bases:
            place, hard = records.regions(base), [[] for _ in range(base["steps"])]
            for step, query, reward, _ in records.groups_of(base, method):
                hard[step - 1] += [reward] * (place.get(query) == "hard")
            rewards.append(smooth(list(map(mean, hard))))
        drawn = [[[row[column] for row in rows] for rows in own] for column in ("retain_recall", "forget_refusal")]
        steps = [row["step"] for row in own[0]]
        at, colour, dash = [steps, steps, range(1, len(rewards[0]) + 1)], *map(look(method).get, ("color", "linestyle"))
        for axis, x, values, end in zip(axes, at, [*drawn, rewards], ends, strict=True):
            lines(axis, x, values, color=colour, linestyle=dash, alpha=0.28,
                  thick=dict(linewidth=2.6, label=f"{NAMES[method]}, mean of {len(values)} seeds"))  # fmt: skip
            end.append(f"{NAMES[method]} {mean(line[-1] for line in values):.{1 if axis is not axes[2] else 2}f}")
    titles = ("Recall on all neighbours, %\n(↑ better)", "Refusals of forget probes, greedy, %\n(↑ better)",
              "Hard prompts' mean reward in training,\n0–1 (↑ better)")  # fmt: skip
    for axis, title, end in zip(axes, titles, ends, strict=True):
        mark_start(axis, [base["methods"]["rerule"]["first_replay"] for base in bases])
        axis.set(xlabel=f"Stage 2 step; at the end\n{', '.join(end)}")
        axis.set_title(title, fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    save(figure, path)


def conditions(r, path):
    """When replay pays: the gain against the share of hard groups in three worlds; retain quality by τ."""
    figure, axes = pyplot().subplots(1, 2, figsize=(10, 4.3), layout="constrained")
    for marker, family in zip("os^", SECTIONS["worlds"], strict=True):
        runs, stat = r.runs(family), records.paired(r.of(family), r.of(family, "rule"), "retain_recall")
        shares = [100 * records.hard_share(runs[seed], runs[seed]["tau"]) for seed in sorted(runs)]
        whisker(axes[0], np.mean(shares), shares, stat, marker, FAMILIES[family]["world"])
    rule = r.of("base", "rule")
    for at, family in enumerate(SECTIONS["table8"]):
        stat = records.paired(r.of(family), rule, "retain_recall")
        if stat:
            whisker(axes[1], at, at + np.linspace(-0.12, 0.12, stat["n"]), stat)
    for axis in axes:
        axis.axhline(0, color="black", linewidth=1)
    axes[0].set(title="Gain by how much is hard", ylabel=GAIN, xlabel="Groups of mean reward below τ before replay, %")
    axes[0].legend(fontsize=9.5)
    axes[1].set_xticks(range(4), ["0.4", "0.6", "0.8", "1.0"])
    axes[1].set(title="Gain by threshold", xlabel="τ: groups of mean reward below it are stored", xlim=(-0.5, 3.6))
    save(figure, path)


def whisker(axis, x, of_seeds, stat, marker="o", label=None):
    """A mean with its interval and number at x; the seeds at places of their own."""
    axis.scatter(of_seeds, stat["values"], s=18, marker=marker, color=GREY, alpha=0.5)
    whiskers(axis, {x: stat}, color=look("rerule")["color"], markersize=9, capsize=4, fmt=marker, label=label)
    axis.annotate(f"{stat['mean']:+.1f}", (x, stat["mean"]), (9, 0), textcoords="offset points", va="center")


def theory(r, path):
    """Appendix E: the bound's tightening against the observed gain, Eq. 4's two terms, Eq. 27's four rates."""
    figure = pyplot().figure(figsize=(10, 5.2), layout="constrained")
    axes = figure.subplot_mosaic([["bound", "terms"], ["bound", "rates"]], width_ratios=(1, 0.62))
    points = [point for rows in claims.bound_points(r).values() for point in rows]
    shades = pyplot().get_cmap("cividis")(np.linspace(0, 0.9, len(claims.HARD_STORES)))
    for marker, shade, family in zip("osD^vP", shades, claims.HARD_STORES, strict=True):
        own = [(x, y) for f, x, y in points if f == family]
        if own:
            name = FAMILIES[family]["in_bound"]
            axes["bound"].plot(*zip(*own, strict=True), marker, color=shade, markersize=5.5, alpha=0.85, label=name)
    rho = mean(claims.bound_correlations(r))
    axes["bound"].axhline(0, color="black", linewidth=1)
    axes["bound"].set(title=f"Bound against gain; within a seed rank correlation {rho:+.2f}" if rho is not None else "",
                      xlabel="How much tighter: 1 − √(N_on / N_eff)",
                      ylabel="Hard prompts' reward, last third, ReRULE − RULE (↑ better)")  # fmt: skip
    axes["bound"].legend(fontsize=9, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    probes = [run["models"] for run in r.runs("probe").values()]

    def of_models(region, key, scale=1):
        found = {model: [p[model].get(region, {}).get(key) for p in probes] for model in PROBED}
        return {model: summary([scale * v for v in values if v is not None]) for model, values in found.items()}

    matrix(axes["terms"], {f"{region} region": of_models(region, "weighted") for region in ("easy", "hard")},
           "{mean:.2f}", 0.2)  # fmt: skip
    axes["terms"].set_xlabel("Eq. 4: P(region) × norm of its mean gradient")
    kinds = ("forget", "answered", "missed"), ("boundary", "refused", "false")
    shown = {f"{kind}, {region}:\n{what}": of_models(region, key, 100)
             for kind, what, key in kinds for region in ("easy", "hard")}  # fmt: skip
    matrix(axes["rates"], {name: own for name, own in shown.items() if any(own.values())}, "{mean:.1f}", 0.2)
    axes["rates"].set_xlabel("Eq. 27: % of sampled answers (← better)")
    save(figure, path)


def hardest(base, path):
    """Table 3's reward curves: the three hardest forget and boundary prompts of one seed, at each visit."""
    figure, axes = pyplot().subplots(2, 3, figsize=(10.5, 6.6), sharex=True, sharey=True, layout="constrained")
    for axis, (query, kind, prompt, answer) in zip(axes.flat, base["cases"], strict=False):
        told = []
        for method, size in (("rule", 9), ("rerule", 5)):
            points = [(step, reward) for step, q, reward, _ in records.groups_of(base, method) if q == query]
            axis.plot(*zip(*points, strict=True), linewidth=1.8, markersize=size, label=NAMES[method], **look(method))
            told.append(f"{NAMES[method]} {points[0][1]:.2f} → {points[-1][1]:.2f}")
        mark_start(axis, [base["methods"]["rerule"]["first_replay"]], "replay starts" if axis is axes[0, 0] else "")
        wanted = "a refusal" if kind == "forget" else answer
        words = [textwrap.fill(line, 42) for line in (f"{kind}: {prompt}", f"wanted: {wanted}", ", ".join(told))]
        axis.set_title("\n".join(words), fontsize=9.5, loc="left")
        axis.set_ylim(-0.05, 1.05)
    for axis in axes[1]:
        axis.set_xlabel("Stage 2 step")
    for axis in axes[:, 0]:
        axis.set_ylabel("Group's mean reward (↑ better)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    save(figure, path)
