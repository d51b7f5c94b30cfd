"""The report's figures, drawn from records. Every panel says what is better, shows seeds, and can do without colour.

Covers the paper's Figures 1, 2 and 3, and pictures of what this repository adds; `gains` opens the README.
"""

import json
from pathlib import Path

import numpy as np

from engine.plots import AMBER, COLOURS, DASH, GREEN, GREY, NAMES, PINK, mark_start, mean, pyplot, save, smooth
from reproduce import claims, records
from reproduce.plan import FAMILIES, SECTIONS

BLUE, VERMILION = COLOURS["rule"], COLOURS["rerule"]
PROBED = {"Rej. Steer": "after\nStage 1", "RULE": "RULE", "ReRULE": "ReRULE"}
BOXES, ARROWS = json.loads(Path(__file__).with_name("pipeline.json").read_text(encoding="utf-8")).values()
GAIN = "Retain quality, ReRULE − RULE,\npoints of recall (↑ better)"


def gains(rows, path):
    """What each kind of replay, and each control without replay, gains over RULE: mean, 95 % interval, every seed.

    rows: [(label, kind, statistic)], kind "rerule", "replay" or "rule" (no replay at all), from top to bottom.
    """
    looks = {"rerule": (VERMILION, "o", "ReRULE"), "replay": (GREEN, "s", "other kinds of replay"),
             "rule": (BLUE, "^", "RULE alone, without replay")}  # fmt: skip
    figure, axis = pyplot().subplots(figsize=(10, 1.4 + 0.42 * len(rows)), layout="constrained")
    for y, (_, kind, stat) in enumerate(reversed(rows)):
        colour, marker, _ = looks[kind]
        places = y + np.linspace(-0.16, 0.16, stat["n"])
        axis.scatter(stat["values"], places, s=12, color=GREY, alpha=0.55, linewidths=0)
        axis.plot([stat["low"], stat["high"]], [y, y], color=colour, linewidth=3.2, solid_capstyle="butt", zorder=3)
        axis.scatter([stat["mean"]], [y], s=75, marker=marker, color=colour, edgecolors="white", zorder=4)
    for colour, marker, label in looks.values():
        look = dict(linewidth=3.2, markersize=9, markeredgecolor="white")
        axis.plot([], [], marker=marker, color=colour, label=label, **look)
    axis.scatter([], [], s=12, color=GREY, label="one seed")
    axis.axvline(0, color="black", linewidth=1)
    axis.set_yticks(range(len(rows)), [label for label, *_ in reversed(rows)])
    axis.set(xlabel="Points of recall on what must be kept, above RULE (→ better)",
             ylim=(-0.6, len(rows) - 0.4))  # fmt: skip
    axis.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=10)
    save(figure, path, dpi=200)


def trajectories(r, path, parts=5):
    """Figure 1: RULE's mean reward over passes through the prompts, in fifths from hard to easy, by kind of prompt."""
    bases = r.runs("base").values()
    figure, axes = pyplot().subplots(1, 2, figsize=(10, 4.3), sharey=True, layout="constrained")
    shades = pyplot().get_cmap("cividis")(np.linspace(0, 0.85, parts))
    for axis, kind, title in zip(axes, "fb", ("Forget prompts", "Boundary prompts"), strict=True):
        curves = [passes(base, kind, parts) for base in bases]  # seeds × parts × passes
        for part in range(parts):
            name = {0: "hardest fifth", parts - 1: "easiest fifth"}.get(part, f"{part + 1}")
            lines(axis, curves[0][0], [curve[1][part] for curve in curves], color=shades[part], alpha=0.25,
                  thick=dict(linewidth=2.6, marker="osD^v"[part % 5], markersize=6, label=name))  # fmt: skip
        mark_start(axis, [base["methods"]["rerule"]["first_replay"] for base in bases],
                   "sorted by reward\nbefore this step")  # fmt: skip
        axis.set(title=title, xlabel="Stage 2 step (middle of a pass through all prompts)", ylim=(-0.03, 1.03))
    axes[0].set_ylabel("Mean reward, 0–1 (↑ better)")
    axes[0].legend(title="RULE, prompts from hard to easy", loc="lower left", bbox_to_anchor=(0.02, 0.12), fontsize=9.5)
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


def lines(axis, steps, values, thick, **look):
    """Each seed thin, their mean thick: of those that have a value at a step."""
    values = np.array(values, float)  # None: NaN
    for line in values:
        axis.plot(steps, line, linewidth=0.8, **look)
    middle = [mean(v for v in column if v == v) for column in values.T]
    axis.plot(steps, np.array(middle, float), **look | {"alpha": 1} | thick)


def pipeline(path):
    """Figure 2: the steps of Stage 2 in their order, each box a function of ours.

    `pipeline.json`: boxes, {function: [column, row, what it does]}, the lower rows being what ReRULE adds; and arrows,
    [from, to (numbers of boxes), bend, words, how far these stand from the middle].
    """
    from matplotlib.patches import FancyBboxPatch

    figure, axis = pyplot().subplots(figsize=(13, 5.4), layout="constrained")
    axis.axis("off")
    boxes, places = [], [place for *place, _ in BOXES.values()]
    for name, (x, y, text) in BOXES.items():
        face, edge, dash = ("#DDEBF5", BLUE, "--") if y == 2 else ("#FBE6DA", VERMILION, "-")
        boxes.append(FancyBboxPatch((x - 0.44, y - 0.27), 0.88, 0.54, "round,pad=0,rounding_size=0.05", facecolor=face,
                                    edgecolor=edge, linewidth=1.8, linestyle=dash))  # fmt: skip
        axis.add_patch(boxes[-1])
        axis.text(x, y + 0.07, text, ha="center", va="center", fontsize=11, linespacing=1.3)
        axis.text(x, y - 0.19, name, ha="center", va="center", fontsize=9, family="monospace")
    look = dict(arrowstyle="-|>", linewidth=1.5, color="black", shrinkA=1, shrinkB=1)
    for a, b, bend, words, dx, dy in ARROWS:
        (xa, ya), (xb, yb) = places[a], places[b]
        ends = dict(patchA=boxes[a], patchB=boxes[b], connectionstyle=f"arc3,rad={bend}")
        axis.annotate("", (xb, yb), (xa, ya), arrowprops=look | ends)
        axis.text((xa + xb) / 2 + dx, (ya + yb) / 2 + dy, words, ha="center", va="center", fontsize=10)
    axis.text(-0.42, 0.4, "Dashed, blue: RULE.\nSolid, orange: what\nReRULE adds.", fontsize=11, va="center")
    axis.set(xlim=(-0.45, 4.45), ylim=(-0.3, 2.75))
    save(figure, path, dpi=200)


def over_steps(r, path):
    """Figure 3: retain quality, forget quality and hard prompts' reward over steps, RULE against ReRULE."""
    bases = r.runs("base").values()
    figure, axes = pyplot().subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    for method in NAMES:
        own, rewards = [base["methods"][method]["evaluations"] for base in bases], []
        for base in bases:
            place, hard = records.regions(base), [[] for _ in range(base["steps"])]
            for step, query, reward, _ in records.groups_of(base, method):
                hard[step - 1] += [reward] * (place.get(query) == "hard")
            rewards.append(smooth(list(map(mean, hard))))
        drawn = [[[row[column] for row in rows] for rows in own] for column in ("retain_recall", "forget_refusal")]
        steps = [row["step"] for row in own[0]]
        at = [steps, steps, range(1, len(rewards[0]) + 1)]
        for axis, x, values in zip(axes, at, [*drawn, rewards], strict=True):
            lines(axis, x, values, color=COLOURS[method], linestyle=DASH[method], alpha=0.28,
                  thick=dict(linewidth=2.8, label=f"{NAMES[method]}, mean of {len(values)} seeds"))  # fmt: skip
    titles = {"Retain quality": "Recall on all neighbours, % (↑ better)",
              "Forget quality": "Refusals of forget probes, % (↑ better)",
              "Hard prompts, as training sees them": "Mean reward, 0–1 (↑ better)"}  # fmt: skip
    for axis, (title, label) in zip(axes, titles.items(), strict=True):
        mark_start(axis, [base["methods"]["rerule"]["first_replay"] for base in bases])
        axis.set(title=title, xlabel="Stage 2 step", ylabel=label)
    axes[1].set_ylim(min(90, axes[1].get_ylim()[0]), 100.5)
    axes[1].legend(loc="center right", fontsize=10)
    save(figure, path)


def conditions(r, path):
    """When replay pays: the gain against the share of hard groups in three worlds; retain quality by τ."""
    figure, axes = pyplot().subplots(1, 2, figsize=(11, 4.3), layout="constrained")
    for marker, family in zip("os^", SECTIONS["worlds"], strict=True):
        found, runs, label = claims.gains(r, family), r.runs(family), FAMILIES[family]["world"]
        shares = [100 * records.hard_share(runs[seed], runs[seed]["tau"]) for seed in found]
        whisker(axes[0], np.mean(shares), shares, records.statistic(found.values()), marker, label)
    rule = r.of("base", "rule")
    for at, family in enumerate(SECTIONS["table8"]):
        stat = records.paired(r.of(family), rule, "retain_recall")
        if stat:
            whisker(axes[1], at, at + np.linspace(-0.12, 0.12, stat["n"]), stat)
    for axis in axes:
        axis.axhline(0, color="black", linewidth=1)
    axes[0].set(title="Does replay pay where there is more that is hard?", ylabel=GAIN,
                xlabel="Groups with mean reward below τ before replay, %")  # fmt: skip
    axes[0].legend(fontsize=9.5)
    axes[1].set_xticks(range(4), ["0.4", "0.6", "0.8", "1.0"])
    axes[1].set(title="Is a lower threshold better?", xlabel="τ: groups with mean reward below it are stored",
                ylabel=GAIN, xlim=(-0.5, 3.5))  # fmt: skip
    save(figure, path)


def whisker(axis, x, of_seeds, stat, marker="o", label=None):
    """A mean with its interval at x; the seeds at places of their own."""
    axis.scatter(of_seeds, stat["values"], s=22, marker=marker, color=GREY, alpha=0.6)
    ends = [[stat["mean"] - stat["low"]], [stat["high"] - stat["mean"]]]
    look = dict(color=VERMILION, markersize=10, capsize=4, linewidth=2.2)
    axis.errorbar(x, stat["mean"], ends, fmt=marker, label=label, **look)


def theory(r, path):
    """Appendix E: the bound's tightening against the observed gain, Eq. 4's two terms, Eq. 27's four rates."""
    figure, axes = pyplot().subplots(1, 3, figsize=(14.5, 4.5), layout="constrained")
    points = [point for rows in claims.bound_points(r).values() for point in rows]
    looks = zip("osD^vP", (VERMILION, AMBER, GREEN, PINK, "black", GREY), claims.HARD_STORES, strict=True)
    for marker, colour, family in looks:
        own = [(x, y) for f, x, y in points if f == family]
        if own:
            name = FAMILIES[family]["in_bound"]
            axes[0].scatter(*zip(*own, strict=True), s=30, marker=marker, color=colour, alpha=0.85, label=name)
    axes[0].axhline(0, color="black", linewidth=1)
    axes[0].set(title="Does a tighter bound go with a larger gain?", xlabel="How much tighter: 1 − √(N_on / N_eff)",
                ylabel="Hard prompts' reward, last third,\nReRULE − RULE (↑ better)")  # fmt: skip
    axes[0].legend(fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))  # points fill the panel
    probes = [run["models"] for run in r.runs("probe").values()]
    bars(axes[1], probes, 1, {"{} region": ("weighted", GREEN)})
    axes[1].set(title="Eq. 4: which region moves the model?", ylabel="P(region) × norm of its mean gradient")
    bars(axes[2], probes, 100, {"forget, {}: answered": ("missed", GREEN), "boundary, {}: refused": ("false", PINK)})
    axes[2].set(title="Eq. 27: mis-refusals", ylabel="% of sampled answers (↓ better)")
    save(figure, path)


def bars(axis, probes, scale, series):
    """Bars of probe figures, easy and hard side by side, seeds as dots. series: {label: (figure, colour)}."""
    bar = [(label.format(region), region, hatch, *look) for label, look in series.items()
           for region, hatch in (("easy", ""), ("hard", "//"))]  # fmt: skip
    width = 0.8 / len(bar)
    for at, (label, region, hatch, key, colour) in enumerate(bar):
        found = {}  # place: a value a seed
        for place, model in enumerate(PROBED):
            values = [p[model][region][key] for p in probes if region in p[model] and p[model][region][key] is not None]
            if values:
                found[place - 0.4 + width * (at + 0.5)] = scale * np.array(values)
        means = [values.mean() for values in found.values()]
        axis.bar(list(found), means, width * 0.92, color=colour, alpha=0.75, hatch=hatch, edgecolor="white",
                 label=label if found else None)  # fmt: skip
        for x, values in found.items():
            axis.scatter(np.full(len(values), x), values, s=9, color="black", alpha=0.55, zorder=3)
    axis.margins(y=0.2)  # room for the legend
    axis.set_xticks(range(len(PROBED)), PROBED.values())
    axis.legend(fontsize=9)
    axis.grid(axis="x", visible=False)


def hardest(base, path):
    """Table 3's reward curves: the three hardest forget and boundary prompts of one seed, at each visit."""
    figure, axes = pyplot().subplots(2, 3, figsize=(13, 6.2), sharex=True, sharey=True, layout="constrained")
    for axis, (query, kind, prompt, answer) in zip(axes.flat, base["cases"], strict=False):
        for method, marker, size in (("rule", "s", 11), ("rerule", "o", 6)):
            points = [(step, reward) for step, q, reward, _ in records.groups_of(base, method) if q == query]
            axis.plot(*zip(*points, strict=True), DASH[method], marker=marker, color=COLOURS[method], linewidth=2,
                      markersize=size, label=NAMES[method])  # fmt: skip
        mark_start(axis, [base["methods"]["rerule"]["first_replay"]], "replay starts" if axis is axes[0, 0] else "")
        wanted = "a refusal" if kind == "forget" else answer
        axis.set_title(f"{kind}: {prompt}\nwanted: {wanted}", fontsize=10)
        axis.set_ylim(-0.05, 1.05)
    for axis in axes[1]:
        axis.set_xlabel("Stage 2 step")
    for axis in axes[:, 0]:
        axis.set_ylabel("Group's mean reward (↑ better)")
    axes[0, 0].legend(fontsize=10)
    save(figure, path)
