"""The report's figures, drawn from records. Every panel says what is better, shows seeds, and can do without colour.

Covers the paper's Figures 1 and 3; `rates` is the main one. A title is neutral or has the figures that it tells."""

import textwrap

import numpy as np

from engine.plots import GREY, NAMES, dots, look, mark_start, mean, pyplot, save, smooth
from reproduce import WORDS, claims, records
from reproduce.plan import FAMILIES
from reproduce.statistics import paired, statistic

LINES = NAMES | WORDS["replays"]
ABOVE = {"loc": "outside upper center", "ncols": 5, "frameon": False}
BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "frameon": False, "fontsize": 9.5}
PROBED = ("Rej. Steer", "RULE", "ReRULE")
SHARED = f"rerule@{records.RATES[0]}"  # starts replay as its variants do; the base runs, by the paper's rule
TOWN = {name: tuple(place) for name, place in WORDS["town_models"].items()}  # family, method


def rates(r, path):
    """The main figure, by learning rate: each kind of replay beside RULE with as many batches, steps, computation."""
    panels, rows = WORDS["panels"], WORDS["kept_and_told"]
    figure, axes = pyplot().subplots(2, 3, figsize=(10, 6.6), sharex=True, sharey="row", layout="constrained")
    for axis, column, alone in zip(axes.flat, np.repeat(list(rows), 3), [*panels] * 2, strict=True):
        told = []
        for at, (method, name) in enumerate(LINES.items()):
            source, beside = alone if method == "rule" else method, 1.07 ** (at - 2)
            stats = {rate: statistic([o.get(column) for o in r.at(source, rate).values()]) for rate in r.rates}
            stats = {rate: stat for rate, stat in stats.items() if stat}
            x, y = [float(rate) * beside for rate in stats], [stat["mean"] for stat in stats.values()]
            axis.plot(x, y, linewidth=1.6, markersize=4, label=name, **look(method))
            ends = [[stat[end] for stat in stats.values()] for end in ("low", "high")]
            axis.vlines(x, *ends, color=look(method)["color"], linewidth=1.1)
            if best := stats.get((r.chosen or {}).get(source)):
                axis.plot(float(r.chosen[source]) * beside, best["mean"], ms=9, mec="black", zorder=4, **look(method))
                told += [f"{name} {best['mean']:.1f}"] * (method in NAMES)
        axis.set_title(f"{panels[alone]}\n" * (axis in axes[0]) + ", ".join(told), fontsize=10, linespacing=1.4)
        axis.set(xscale="log", ylabel=rows[column] if alone == "rule" else "")
        axis.set_xticks([float(rate) for rate in r.rates], r.rates, fontsize=9)
        axis.minorticks_off()
    figure.supxlabel("Learning rate. Large marks, and figures above: at the rate chosen for the method on other seeds")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), **ABOVE)
    save(figure, path)


def gains(panels, path, best_first=True):
    """Gains over RULE at the same rate. panels: {title: [(label, method as in `LOOKS`, statistic or None)]}."""
    heights = [0.8 + 0.3 * len(rows) for rows in panels.values()]
    figure, axes = pyplot().subplots(len(panels), figsize=(10, sum(heights)), height_ratios=heights, squeeze=False,
                                     sharex=True, layout="constrained")  # fmt: skip
    for axis, (title, rows) in zip(axes.flat, panels.items(), strict=True):
        if best_first:
            rows = sorted(rows, key=lambda row: -row[2]["mean"] if row[2] else np.inf)
        dots(axis, rows, "{mean:+.1f} [{low:+.1f}, {high:+.1f}]", column=122)
        axis.axvline(0, color="black", linewidth=1)
        axis.set_title(title, loc="left")
    axis.set_xlabel("Recall of what must be kept, less RULE's at the same rate, points (→ better). Small: seeds")
    save(figure, path)


def matrix(axis, rows, form="{mean:.0f}"):
    """Rows of several methods, {label: {method: statistic or None}}: marks and a column of numbers for each."""
    from matplotlib.transforms import ScaledTranslation

    methods = list(next(iter(rows.values()), ()))
    for at, method in enumerate(methods):
        shift, column = 0.33 - 0.66 * at / max(1, len(methods) - 1), 36 + 42 * at
        dots(axis, [(label, method, own[method]) for label, own in rows.items()], form, shift, column)
        head = dict(xycoords="axes fraction", textcoords="offset points", ha="center", fontsize=9)
        axis.annotate(LINES.get(method, method).replace(" ", "\n"), (1, 1), (column - 8, 16), **head)
        mark = axis.transAxes + ScaledTranslation((column - 8) / 72, 8 / 72, axis.figure.dpi_scale_trans)
        axis.plot(1, 1, transform=mark, clip_on=False, markersize=8, mec="white", **look(method))
    for y in range(1, len(rows)):
        axis.axhline(y - 0.5, color=GREY, linewidth=0.5, alpha=0.4)


def town(r, columns, path):
    """What is left of the forget set, and what is kept, the nearest neighbours first. columns: {words: column}."""
    found = {name: r.of(*place).values() for name, place in TOWN.items()}
    found = {name: own for name, own in found.items() if any(o["forget_recall"] is not None for o in own)}
    rows = {words: {name: statistic([o.get(column) for o in own]) for name, own in found.items()}
            for words, column in columns.items()}  # fmt: skip
    figure, axis = pyplot().subplots(figsize=(10, 1 + 0.75 * len(rows)), layout="constrained")
    matrix(axis, rows)
    axis.set_xlabel("Recall, %. Small: seeds")
    save(figure, path)


def attacks(r, path):
    """What RWKU's attacks still bring out, by type. On top: the largest mean over the methods that unlearn."""
    runs, rows = [run["rows"] for run in r.runs("rwku").values()], {}
    methods = [name for name in ("Original", *PROBED) if name in runs[0]]
    kinds = {column for column in runs[0]["RULE"] if column.startswith("attack_")}
    for kind in sorted(kind for kind in kinds if not kind.startswith("attack_cross_lingual_")):  # all languages as one
        values = {name: [row[name][kind] for row in runs if row[name].get(kind) is not None] for name in methods}
        found = {name: {"mean": mean(own), "values": own} if own else None for name, own in values.items()}
        rows[kind.removeprefix("attack_").replace("_", " ")] = found
    level = {kind: mean(own[name] and own[name]["mean"] for name in methods[1:]) or 0 for kind, own in rows.items()}
    rows = {kind: rows[kind] for kind in sorted(rows, key=level.get, reverse=True)}
    figure, axis = pyplot().subplots(figsize=(10, 1 + 0.5 * len(rows)), layout="constrained")
    matrix(axis, rows)
    axis.set_xlabel("Recall of what was to be forgotten, under attack, % (← better)")
    save(figure, path)


def age(r, path, edges=(2, 4, 8, 16)):
    """What age does to importance weights, and to the gain."""
    points = [point for run in r.runs("base").values() for point in run["methods"]["rerule"]["by_age"]]
    points = np.reshape([point for point in points if None not in point], (-1, 3))  # None: all groups were skipped
    color, parts = look("rerule")["color"], np.digitize(points[:, 0], edges)
    means = np.reshape([points[parts == part].mean(0) for part in sorted(set(parts))], (-1, 3))
    figure, axes = pyplot().subplots(1, 2, figsize=(10, 3.9), layout="constrained", width_ratios=(1, 0.8))
    for at, name, fill, dash, up in ((1, "effective sample size, share (↑ better)", color, "o-", 7),
                                     (2, "share of weights clipped (↓ better)", "white", "o--", -15)):  # fmt: skip
        axes[0].plot(points[:, 0], points[:, at], ".", color=color, alpha=0.2, markersize=4, markeredgewidth=0)
        axes[0].plot(means[:, 0], means[:, at], dash, label=name, color=color, markerfacecolor=fill, markersize=8)
        for x, y in means[:, [0, at]]:
            axes[0].annotate(f"{y:.2f}", (x, y), (0, up), textcoords="offset points", ha="center", fontsize=9.5)
    axes[0].set_xscale("log", base=2)
    axes[0].xaxis.set_major_formatter("{x:.0f}")
    axes[0].legend(**BELOW)
    rule, labels = r.of("base", "rule"), {f"age{e}": f"at most {e} steps old" for e in edges} | {SHARED: "of any age"}
    stats = {words: paired(r.of(family), rule, "retain_recall") for family, words in labels.items()}
    dots(axes[1], [(words, "rerule", stat) for words, stat in stats.items() if stat], "{mean:+.1f}")
    axes[1].axvline(0, color="black", linewidth=1)
    for axis, words in zip(axes, WORDS["age"], strict=True):
        axis.set(**words)
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
            lines(axis, curves[0][0], [c[1][part] for c in curves], name, color=shades[part], marker="osD^v"[part])
        mark_start(axis, [base["methods"]["rerule"]["first_replay"] for base in bases], "sorted by reward\nbefore this")
        axis.set(title=title, xlabel="Stage 2 step (middle of a pass through all prompts)")
        axis.legend(**BELOW, ncols=2)
    axes[0].set_ylabel("RULE: mean reward, 0–1 (↑ better)")
    save(figure, path)


def passes(base, kind, parts):
    """(middle step of each pass, [part][pass] mean reward) of RULE on one kind of prompt, sorted before replay."""
    means = {query: np.mean(values) for query, values in records.before_replay(base).items()}
    order = sorted((q for q in means if (base["kinds"][q] == "f") == (kind == "f")), key=lambda q: (means[q], q))
    part_of = {query: at * parts // len(order) for at, query in enumerate(order)}
    length = -(-len(base["kinds"]) // len(base["methods"]["rule"]["rewards"][0]))  # steps of one pass
    rows, steps = {}, {}
    for step, query, reward in records.groups_of(base, "rule"):
        steps.setdefault((step - 1) // length, set()).add(step)
        if query in part_of:
            rows.setdefault((part_of[query], (step - 1) // length), []).append(reward)
    means = [[np.mean(rows.get((part, at), [np.nan])) for at in steps] for part in range(parts)]
    return [np.mean(list(found)) for found in steps.values()], means


def lines(axis, steps, values, name, **drawn):
    """Each seed thin, their mean thick: of those that have a value at a step. The legend has the mean's two ends."""
    values = np.array(values, float)  # None: NaN
    for line in values:
        axis.plot(steps, line, **drawn | {"linewidth": 0.7, "alpha": 0.25, "marker": ""})
    middle = np.array([mean(v for v in column if v == v) for column in values.T], float)
    ends = " → ".join(f"{middle[at]:.{1 if np.nanmax(values) > 1 else 2}f}" for at in (0, -1))
    axis.plot(steps, middle, linewidth=2.4, label=f"{name}: {ends}", **drawn)


def over_steps(r, path):
    """Figure 3: retain quality, forget quality and hard prompts' reward over steps, RULE against ReRULE."""
    bases = r.runs("base").values()
    figure, axes = pyplot().subplots(1, 3, figsize=(10, 4.2), layout="constrained")
    for method, name in NAMES.items():
        own, rewards = [base["methods"][method]["evaluations"] for base in bases], []
        for base in bases:
            place, hard = records.regions(base), [[] for _ in range(base["steps"])]
            for step, query, reward in records.groups_of(base, method):
                hard[step - 1] += [reward] * (place.get(query) == "hard")
            rewards.append(smooth(list(map(mean, hard))))
        drawn = [[[row[column] for row in rows] for rows in own] for column in ("retain_recall", "forget_refusal")]
        steps = [row["step"] for row in own[0]]
        for axis, x, values in zip(axes, (steps, steps, range(1, len(hard) + 1)), [*drawn, rewards], strict=True):
            lines(axis, x, values, name, **look(method) | {"marker": ""})
    for axis, title in zip(axes, WORDS["over_steps"], strict=True):
        mark_start(axis, [base["methods"]["rerule"]["first_replay"] for base in bases])
        axis.set_title(title, fontsize=10)
        axis.legend(**BELOW)
    figure.supxlabel(f"Stage 2 step. Thick: mean of {len(bases)} seeds")
    save(figure, path)


def conditions(r, worlds, path):
    """When replay pays: the gain in three worlds (rows of `gains`), by hard groups before replay, and by τ."""
    rule = r.of("base", "rule")
    taus = [(f"τ = {family[3:] or 0.4}", "rerule", paired(r.of(family or SHARED), rule, "retain_recall"))
            for family in ("", "tau0.6", "tau0.8", "tau1.0")]  # fmt: skip
    panels = {"By world: groups of mean reward below τ before replay": worlds, "By τ: groups below it are stored": taus}
    gains(panels, path, best_first=False)


def theory(r, path):
    """Appendix E: the bound's tightening against the observed gain, Eq. 4's two terms, Eq. 27's four rates."""
    figure = pyplot().figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplot_mosaic([["bound", "terms"], ["bound", "rates"]], width_ratios=(1, 0.62))
    axis, points = axes["bound"], claims.bound_points(r).values()
    shades = pyplot().get_cmap("cividis")(np.linspace(0, 0.9, len(claims.HARD_STORES)))
    for marker, shade, family in zip("osD^vP", shades, claims.HARD_STORES, strict=True):
        own, label = [(x, y) for f, x, y in sum(points, []) if f == family], FAMILIES[family]["in_bound"]
        axis.plot(*np.reshape(own, (-1, 2)).T, marker, color=shade, markersize=5.5, alpha=0.85, label=label)
    rho = mean(claims.bound_correlations(r))
    axis.axhline(0, color="black", linewidth=1)
    axis.set_title(f"Bound against gain: rank correlation within a seed {'–' if rho is None else format(rho, '+.2f')}")
    axis.set(**WORDS["bound_axes"])
    axis.legend(**BELOW, ncols=3)
    rows = {"terms": {}, "rates": {}}
    for panel, label, key in WORDS["probe_rows"]:
        for region in ("easy", "hard"):
            probes = {name: r.of("probe", name).values() for name in PROBED}
            found = {name: statistic([o.get(f"{region}_{key}") for o in own]) for name, own in probes.items()}
            rows[panel] |= {label.format(region): found} if any(found.values()) else {}
    for panel, own in rows.items():
        axes[panel].set_xlabel(WORDS["probe_axes"][panel])
        matrix(axes[panel], own, "{mean:.2f}")
    save(figure, path)


def hardest(base, path):
    """Table 3's reward curves: the three hardest forget and boundary prompts of one seed, at each visit."""
    figure, axes = pyplot().subplots(2, 3, figsize=(10.5, 6.6), sharex=True, sharey=True, layout="constrained")
    for axis, (query, kind, prompt, answer) in zip(axes.flat, base["cases"], strict=False):
        told = []
        for method, size in (("rule", 9), ("rerule", 5)):
            points = [(step, reward) for step, q, reward in records.groups_of(base, method) if q == query]
            axis.plot(*zip(*points, strict=True), linewidth=1.8, markersize=size, label=NAMES[method], **look(method))
            told.append(f"{NAMES[method]} {points[0][1]:.2f} → {points[-1][1]:.2f}")
        mark_start(axis, [base["methods"]["rerule"]["first_replay"]], "replay starts" if axis is axes[0, 0] else "")
        words = f"{kind}: {prompt}", "wanted: " + ("a refusal" if kind == "forget" else answer), ", ".join(told)
        axis.set_title("\n".join(textwrap.fill(line, 42) for line in words), fontsize=9.5, loc="left")
        axis.set_ylim(-0.05, 1.05)
    figure.supxlabel("Stage 2 step")
    figure.supylabel("Group's mean reward (↑ better)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), **ABOVE)
    save(figure, path)
