"""The report's figures, drawn from records. Every panel says what is better, shows seeds, and can do without colour.

Covers the paper's Figures 1, 2 and 3, and pictures of what this repository adds; `gains` opens the README.

Colours are Okabe and Ito's, told apart by every kind of colour vision; a second mark (dash, shape, label) repeats them.
"""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch

import analysis
import claims
from report import place_labels

BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
COLOURS = {"rule": BLUE, "rerule": VERMILION}
DASH = {"rule": "--", "rerule": "-"}
plt.rcParams.update({"font.size": 11, "axes.titlesize": 11.5, "axes.grid": True, "grid.alpha": 0.25,
                     "axes.spines.top": False, "axes.spines.right": False})  # fmt: skip


def save(figure, path, dpi=100):
    """Write a PNG under a temporary name first; no date in it, so that the same records give the same bytes."""
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=dpi, metadata={"Software": None})
    plt.close(figure)
    temporary.replace(path)


def gains(rows, path):
    """What each kind of replay, and each control without replay, gains over RULE: mean, 95 % interval, every seed.

    rows: [(label, kind, statistic)], kind "paper", "control" or "rule" (no replay at all), from top to bottom.
    """
    looks = {"paper": (VERMILION, "o", "the paper's method, and its own control"),
             "control": (GREEN, "s", "replay of something else, or done otherwise"),
             "rule": (BLUE, "^", "RULE alone, no replay")}  # fmt: skip
    figure, axis = plt.subplots(figsize=(9.5, 1.7 + 0.42 * len(rows)), layout="constrained")
    seen = set()
    for at, (_, kind, stat) in enumerate(rows):
        colour, marker, label = looks[kind]
        y = len(rows) - 1 - at
        jitter = np.linspace(-0.16, 0.16, stat["n"])
        axis.scatter(stat["values"], y + jitter, s=12, color=GREY, alpha=0.55, linewidths=0,
                     label=None if seen else "one seed", zorder=2)  # fmt: skip
        axis.plot([stat["low"], stat["high"]], [y, y], color=colour, linewidth=3.2, solid_capstyle="butt", zorder=3)
        axis.scatter([stat["mean"]], [y], s=75, marker=marker, color=colour, edgecolors="white", zorder=4,
                     label=None if kind in seen else label)  # fmt: skip
        seen |= {kind}
    axis.axvline(0, color="black", linewidth=1)
    axis.set_yticks(range(len(rows)), [label for label, *_ in reversed(rows)])
    axis.set(xlabel="Retain quality, difference to RULE in points of recall (→ better)", ylim=(-0.6, len(rows) - 0.4))
    axis.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=10)
    save(figure, path)


def trajectories(r, path, parts=5):
    """Figure 1: RULE's mean reward over passes through the prompts, in fifths from hard to easy, by kind of prompt."""
    bases = r.runs("base")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.3), sharey=True, layout="constrained")
    shades = plt.get_cmap("cividis")(np.linspace(0, 0.85, parts))
    for axis, kind, title in zip(axes, "fb", ("Forget prompts", "Boundary prompts"), strict=True):
        curves = [passes(base, kind, parts) for base in bases.values()]  # seeds × parts × passes
        steps = curves[0][0]
        for part in range(parts):
            values = np.array([curve[1][part] for curve in curves], float)
            for line in values:
                axis.plot(steps, line, color=shades[part], alpha=0.25, linewidth=0.8)
            name = {0: "hardest fifth", parts - 1: "easiest fifth"}.get(part, f"{part + 1}")
            axis.plot(steps, middle(values), color=shades[part], linewidth=2.6, marker="osD^v"[part % 5],
                      markersize=6, label=name)  # fmt: skip
        starts = [base["methods"]["rerule"]["first_replay"] for base in bases.values()]
        mark_start(axis, starts, "sorted by reward\nbefore this step")
        axis.set(title=title, xlabel="Stage 2 step (middle of a pass through all prompts)", ylim=(-0.03, 1.03))
    axes[0].set_ylabel("Mean reward, 0–1 (↑ better)")
    axes[0].legend(title="RULE, prompts from hard to easy", loc="lower left", bbox_to_anchor=(0.02, 0.12), fontsize=9.5)
    save(figure, path)


def passes(base, kind, parts):
    """(middle step of each pass, [part][pass] mean reward) of RULE on one kind of prompt, sorted before replay."""
    means = {query: np.mean(values) for query, values in analysis.before_replay(base).items()}
    order = sorted((q for q in means if base["kinds"][q] == kind), key=lambda q: (means[q], q))
    part_of = {query: at * parts // len(order) for at, query in enumerate(order)}
    length = -(-len(base["kinds"]) // len(base["methods"]["rule"]["rewards"][0]))  # steps of one pass
    rows = {}
    for step, query, reward, _ in analysis.groups_of(base, "rule"):
        if query in part_of:
            rows.setdefault((part_of[query], (step - 1) // length), []).append(reward)
    n_passes = -(-base["steps"] // length)
    middles = [np.mean([s for s in range(1, base["steps"] + 1) if (s - 1) // length == p]) for p in range(n_passes)]
    return middles, [[np.mean(rows.get((part, p), [np.nan])) for p in range(n_passes)] for part in range(parts)]


def mark_start(axis, starts, text="replay starts"):
    """A line where replay starts; a band where seeds differ."""
    starts = [s for s in starts if s]
    if not starts:
        return
    if min(starts) < max(starts):
        axis.axvspan(min(starts) - 0.5, max(starts) - 0.5, color=GREY, alpha=0.15, linewidth=0)
    axis.axvline(np.median(starts) - 0.5, color=GREY, linestyle=":", linewidth=1.4)
    axis.annotate(text, (np.median(starts) - 0.5, 0.03), xycoords=("data", "axes fraction"), xytext=(4, 0),
                  textcoords="offset points", fontsize=9, color="#333333", va="bottom")  # fmt: skip


BOXES = [  # Figure 2: (column, row, functions by module, what it does)
    (0, 1, "sft.stage1", "Stage 1: learn to\nrefuse, by SFT"),
    (1, 1, "rerule.rollout", "1–2  sample G responses;\nrewards, advantages"),
    (2, 1, "grpo.add_reference", "3  log π_ref of the\nfrozen Stage 1 model"),
    (3, 1, "rerule.on_policy_gradient", "4  on-policy update,\nEq. 3 and β KL"),
    (1, 0, "replay.groups_to_store", "6  store groups with\nmean reward below τ"),
    (2, 0, "replay.ReplayBuffer", "B: a ring, the oldest\ngroup leaves"),
    (3, 0, "rerule.off_policy_gradient", "5  once B is full enough:\nreplay update, Eq. 5"),
]
ARROWS = [(0, 1, ""), (1, 2, ""), (2, 3, ""), (1, 4, " hard groups"), (4, 5, ""), (5, 6, "32"), (3, 6, " then")]


def pipeline(path):
    """Figure 2: one step of Stage 2, each box a function of ours; the lower row is what ReRULE adds."""
    figure, axis = plt.subplots(figsize=(11, 4.1), layout="constrained")
    axis.axis("off")
    place = lambda column, row: (3.1 * column, 2.0 * row)  # noqa: E731
    for column, row, name, text in BOXES:
        (x, y), face, edge, dash = (
            place(column, row),
            *(("#FBE6DA", VERMILION, "-") if row == 0 else ("#DDEBF5", BLUE, "--")),
        )
        box = FancyBboxPatch((x - 1.28, y - 0.55), 2.56, 1.1, "round,pad=0,rounding_size=0.12", facecolor=face,
                             edgecolor=edge, linewidth=1.8, linestyle=dash)  # fmt: skip
        axis.add_patch(box)
        axis.text(x, y + 0.14, text, ha="center", va="center", fontsize=10.5, linespacing=1.3)
        axis.text(x, y - 0.36, name, ha="center", va="center", fontsize=8.8, family="monospace")
    for a, b, label in ARROWS:
        (xa, ya), (xb, yb) = place(*BOXES[a][:2]), place(*BOXES[b][:2])
        flat = ya == yb
        start, end = ((xa + 1.28, ya), (xb - 1.28, yb)) if flat else ((xa, ya - 0.55), (xb, yb + 0.55))
        axis.annotate(
            "", end, start, arrowprops=dict(arrowstyle="-|>", color="black", linewidth=1.4, shrinkA=1, shrinkB=1)
        )
        x, y = (start[0] + end[0]) / 2 + (0 if flat else 0.1), (start[1] + end[1]) / 2 + (0.17 if flat else 0)
        axis.text(x, y, label, fontsize=9.5, ha="center" if flat else "left", va="center")
    (x3, y), (x1, _) = place(3, 1), place(1, 1)
    bent = dict(arrowstyle="-|>", color="black", linewidth=1.4, connectionstyle="arc3,rad=0.14")
    axis.annotate("", (x1, y + 0.55), (x3, y + 0.55), arrowprops=bent)
    axis.text((x1 + x3) / 2, y + 1.2, "next step, from the updated model", ha="center", fontsize=10)
    axis.text(-1.28, 0, "Dashed, blue: RULE.\nSolid, orange: what\nReRULE adds.", fontsize=10.5, va="center")
    axis.set(xlim=(-1.4, 10.75), ylim=(-0.7, 3.6))
    save(figure, path)


def over_steps(r, path):
    """Figure 3: retain quality, forget quality and hard prompts' reward over steps, RULE against ReRULE."""
    bases = r.runs("base")
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    starts = [base["methods"]["rerule"]["first_replay"] for base in bases.values()]
    for method in ("rule", "rerule"):
        for axis, column in zip(axes, ("retain_recall", "forget_refusal"), strict=False):
            lines = {s: {e["step"]: e[column] for e in b["methods"][method]["evaluations"]} for s, b in bases.items()}
            steps = sorted(next(iter(lines.values())))
            spread(axis, steps, [[line[s] for s in steps] for line in lines.values()], method)
        lines = [hard_rewards(base, method) for base in bases.values()]
        spread(axes[2], list(range(1, len(lines[0]) + 1)), lines, method)
    sds = {m: [analysis.instability(b["methods"][m]["evaluations"])[0] for b in bases.values()] for m in COLOURS}
    told = ", ".join(
        f"{analysis.NAMES[m]} {analysis.mean(v):.1f}" for m, v in sds.items() if analysis.mean(v) is not None
    )
    titles = (
        f"Retain quality\n(sd over the last third: {told})",
        "Forget quality",
        "Hard prompts, as training sees them",
    )
    labels = (
        "Recall on all neighbours, % (↑ better)",
        "Refusals of forget probes, % (↑ better)",
        "Mean reward, 0–1 (↑ better)",
    )
    for axis, title, label in zip(axes, titles, labels, strict=True):
        mark_start(axis, starts)
        axis.set(title=title, xlabel="Stage 2 step", ylabel=label)
    axes[1].set_ylim(min(90, axes[1].get_ylim()[0]), 100.5)
    axes[1].legend(*axes[0].get_legend_handles_labels(), loc="center right", fontsize=10)
    save(figure, path)


def middle(lines):
    """Mean over lines at each place, of those that have a value there."""
    return np.array([analysis.mean(v for v in column if v == v) for column in np.transpose(lines)], float)


def spread(axis, steps, lines, method):
    """Each seed thin, their mean thick."""
    lines = np.array(lines, float)  # None: NaN
    for line in lines:
        axis.plot(steps, line, DASH[method], color=COLOURS[method], alpha=0.28, linewidth=0.8)
    axis.plot(steps, middle(lines), DASH[method], color=COLOURS[method], linewidth=2.8,
              label=f"{analysis.NAMES[method]}, mean of {len(lines)} seeds")  # fmt: skip


def hard_rewards(base, method, width=5):
    """Mean reward of hard prompts at each step, a centred mean over `width` steps."""
    place, by_step = analysis.regions(base), {}
    for step, query, reward, _ in analysis.groups_of(base, method):
        if place.get(query) == "hard":
            by_step.setdefault(step, []).append(reward)
    means = [analysis.mean(by_step.get(step, [])) for step in range(1, base["steps"] + 1)]
    half = width // 2
    return [analysis.mean(means[max(0, i - half) : i + half + 1]) for i in range(len(means))]


def conditions(r, path):
    """When replay pays: the gain against the share of hard groups in three worlds; retain quality by τ."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.3), layout="constrained")
    for family, marker, label in (("world0", "o", "no crossed names"), ("base", "s", "22 of 42 crossed"),
                                  ("world30", "^", "30 of 42 crossed")):  # fmt: skip
        found = claims.gains(r, family)
        if len(found) > 1:
            x = [100 * analysis.hard_share(r.runs(family)[s], r.runs(family)[s]["tau"]) for s in found]
            y = list(found.values())
            stat = analysis.statistic(y)
            axes[0].scatter(x, y, s=22, marker=marker, color=GREY, alpha=0.6)
            whisker(axes[0], np.mean(x), stat, marker, label)
    axes[0].axhline(0, color="black", linewidth=1)
    axes[0].set(title="Does replay pay where there is more that is hard?",
                xlabel="Groups with mean reward below τ before replay, %",
                ylabel="Retain quality, ReRULE − RULE,\npoints of recall (↑ better)")  # fmt: skip
    axes[0].legend(fontsize=9.5)
    rule = r.of("base", "rule")
    for at, tau in enumerate(("0.4", "0.6", "0.8", "1.0")):
        stat = analysis.paired(r.of("base" if tau == "0.4" else f"tau{tau}"), rule, "retain_recall")
        if stat:
            axes[1].scatter(at + np.linspace(-0.12, 0.12, stat["n"]), stat["values"], s=22, color=GREY, alpha=0.6)
            whisker(axes[1], at, stat)
    axes[1].axhline(0, color="black", linewidth=1)
    axes[1].set_xticks(range(4), ["0.4", "0.6", "0.8", "1.0"])
    axes[1].set(title="Is a lower threshold better?", xlabel="τ: groups with mean reward below it are stored",
                ylabel="Retain quality, ReRULE − RULE,\npoints of recall (↑ better)", xlim=(-0.5, 3.5))  # fmt: skip
    save(figure, path)


def whisker(axis, x, stat, marker="o", label=None):
    """A mean with its interval."""
    ends = [[stat["mean"] - stat["low"]], [stat["high"] - stat["mean"]]]
    axis.errorbar(
        x, stat["mean"], ends, fmt=marker, color=VERMILION, markersize=10, capsize=4, linewidth=2.2, label=label
    )


def theory(r, path):
    """Appendix E: the bound's tightening against the observed gain, Eq. 4's two terms, Eq. 27's four rates."""
    figure, axes = plt.subplots(1, 3, figsize=(14.5, 4.5), layout="constrained")
    names = {"base": "τ 0.4", "tau0.6": "τ 0.6", "tau0.8": "τ 0.8", "tau1.0": "τ 1.0",
             "activation": "stored until activation", "unequal": "no all-equal groups"}  # fmt: skip
    points = [point for rows in claims.bound_points(r).values() for point in rows]
    colours = (VERMILION, BLUE, GREEN, "#CC79A7", "#E69F00", GREY)
    for (family, name), marker, colour in zip(names.items(), "osD^vP", colours, strict=True):
        own = [(x, y) for f, x, y in points if f == family]
        if own:
            axes[0].scatter(*zip(*own, strict=True), s=30, marker=marker, color=colour, alpha=0.85, label=name)
    axes[0].axhline(0, color="black", linewidth=1)
    axes[0].set(title="Does a tighter bound go with a larger gain?", xlabel="How much tighter: 1 − √(N_on / N_eff)",
                ylabel="Hard prompts' reward, last third,\nReRULE − RULE (↑ better)")  # fmt: skip
    axes[0].legend(fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))  # points fill the panel
    probes = [run["models"] for run in r.runs("probe").values()]
    models = ["Rej. Steer", "RULE", "ReRULE"]
    bars(axes[1], models, [("easy", BLUE, "", "weighted"), ("hard", VERMILION, "//", "weighted")], probes)
    axes[1].set(title="Eq. 4: which region moves the model?", ylabel="P(region) × norm of its mean gradient")
    four = [(region, colour, hatch, key) for colour, key in ((BLUE, "missed"), (VERMILION, "false"))
            for region, hatch in (("easy", ""), ("hard", "//"))]  # fmt: skip
    bars(axes[2], models, four, probes, 100)
    axes[2].set(title="Eq. 27: mis-refusals", ylabel="% of sampled answers (↓ better)")
    for axis in axes[1:]:
        axis.set_xticks(range(len(models)), ["after\nStage 1", "RULE", "ReRULE"])
        axis.legend(fontsize=9)
        axis.grid(axis="x", visible=False)
    save(figure, path)


def bars(axis, models, series, probes, scale=1):
    """Grouped bars of probe figures with every seed as a dot."""
    labels = {"weighted": "{} region", "missed": "forget, {}: answered", "false": "boundary, {}: refused"}
    width = 0.8 / len(series)
    for at, (region, colour, hatch, key) in enumerate(series):
        label = labels[key].format(region)
        for place, model in enumerate(models):
            values = [p[model][region][key] for p in probes if region in p[model] and p[model][region][key] is not None]
            x = place - 0.4 + width * (at + 0.5)
            if values:
                values = scale * np.array(values)
                axis.bar(
                    x,
                    values.mean(),
                    width * 0.92,
                    color=colour,
                    alpha=0.75,
                    hatch=hatch,
                    edgecolor="white",
                    label=label,
                )
                axis.scatter(np.full(len(values), x), values, s=9, color="black", alpha=0.55, zorder=3)
                label = None


def hardest(r, path):
    """Table 3's reward curves: the three hardest forget and boundary prompts of the first seed, at each visit."""
    base = r.runs("base")[min(r.runs("base"))]
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.2), sharex=True, sharey=True, layout="constrained")
    for axis, (query, kind, prompt, answer) in zip(axes.flat, base["cases"], strict=False):
        for method, marker, size in (("rule", "s", 11), ("rerule", "o", 6)):
            points = [(step, reward) for step, q, reward, _ in analysis.groups_of(base, method) if q == query]
            axis.plot(*zip(*points, strict=True), DASH[method], marker=marker, color=COLOURS[method], linewidth=2,
                      markersize=size, label=analysis.NAMES[method])  # fmt: skip
        mark_start(axis, [base["methods"]["rerule"]["first_replay"]])
        wanted = "a refusal" if kind == "forget" else answer
        axis.set_title(f"{kind}: {prompt}\nwanted: {wanted}", fontsize=10)
        axis.set_ylim(-0.05, 1.05)
    for axis in axes[1]:
        axis.set_xlabel("Stage 2 step")
    for axis in axes[:, 0]:
        axis.set_ylabel("Group's mean reward (↑ better)")
    axes[0, 0].legend(fontsize=10)
    save(figure, path)


def methods(rows, path):
    """Tables 1, 2 and 5 at a glance. rows: {name: [(forget recall, retain recall), a pair a seed]}."""
    figure, axis = plt.subplots(figsize=(9, 6.2), layout="constrained")
    own, looks = ("RULE", "ReRULE", "Rej. Steer", "PURGE"), {}
    for name, points in rows.items():
        colour = "black" if name in ("Original", "Retained") else VERMILION if name.split(",")[0] in own else BLUE
        marker = "*" if colour == "black" else "o" if colour == VERMILION else "s"
        x, y = np.mean(points, 0)
        axis.scatter(*zip(*points, strict=True), s=10, color=colour, alpha=0.35, linewidths=0)
        label = {
            "*": "never unlearned, never taught",
            "o": "reinforcement and its Stage 1",
            "s": "fine-tuning baselines",
        }[marker]
        axis.scatter([x], [y], s=150 if marker == "*" else 60, marker=marker, color=colour, zorder=3,
                     label=None if marker in looks else label)  # fmt: skip
        looks[marker] = True
    place_labels(axis, {name: tuple(np.mean(points, 0)) for name, points in rows.items()})
    axis.set(xlabel="Recall of what was to be forgotten, % (← better)", xlim=(-4, 118), ylim=(-4, 106))
    axis.set_ylabel("Retain quality: recall on all neighbours, % (↑ better)")
    axis.legend(loc="lower right", fontsize=10, title="means; small dots are seeds")
    save(figure, path)
