"""Pictures: what all of them share, and the two of a run. Matplotlib is imported when the first one is drawn.

The curves are in the spirit of the paper's Figures 1 and 3. "Hard" and "easy" prompts are told apart by their mean
reward before replay starts, where RULE and ReRULE are the same run, never by how they turned out: prompts picked by
outcome would flatter replay by regression to the mean.

Colours are Okabe and Ito's, told apart by every kind of colour vision; a second mark (dash, shape, label) repeats them.
"""

import io
import json
import math
from functools import cache

from engine.files import read_lines, replacing

NAMES = {"rule": "RULE", "rerule": "ReRULE"}
COLOURS = {"rule": "#0072B2", "rerule": "#D55E00"}  # blue and vermilion: theirs in every picture, and nobody else's
DASH = {"rule": "--", "rerule": "-"}
GREEN, PINK, AMBER, GREY = "#009E73", "#CC79A7", "#E69F00", "#666666"
LOOKS = {  # of a point in the scatter: marker, its size, colour, words
    "start": ("*", 150, "black", "before unlearning, or never taught the forget set"),
    "baseline": ("s", 45, GREY, "baselines"),
    "stage 1": ("^", 65, GREEN, "Stage 1 alone"),
    "rule": ("o", 60, COLOURS["rule"], "RULE"),
    "rerule": ("D", 50, COLOURS["rerule"], "ReRULE"),
}
KINDS = {"Original": "start", "Retained": "start", "Rej. Steer": "stage 1", "RULE": "rule", "ReRULE": "rerule"}


@cache
def pyplot():
    """Matplotlib's pyplot, without a window and in our style."""
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    plt.rcParams.update({"font.size": 11, "axes.titlesize": 11.5, "axes.grid": True, "grid.alpha": 0.25,
                         "axes.spines.top": False, "axes.spines.right": False})  # fmt: skip
    return plt


def save(figure, path, dpi=150):
    """Write a PNG of 256 colours; no date in it, so the same data give the same bytes."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi)
    pyplot().close(figure)
    few = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)  # rare ones too: a few dots
    with replacing(path) as temporary:
        few.save(temporary, "PNG", optimize=True, dpi=(dpi, dpi))


def mark_start(axis, starts, text="replay starts"):
    """A line where replay starts; a band where runs differ. starts: a step a run, None where it never does."""
    starts = sorted(start - 0.5 for start in starts if start)
    if not starts:
        return
    middle = (starts[(len(starts) - 1) // 2] + starts[len(starts) // 2]) / 2
    if starts[0] < starts[-1]:
        axis.axvspan(starts[0], starts[-1], color=GREY, alpha=0.15, linewidth=0)
    axis.axvline(middle, color=GREY, linestyle=":", linewidth=1.4)
    axis.annotate(text, (middle, 0.03), xycoords=("data", "axes fraction"), xytext=(4, 0), textcoords="offset points",
                  fontsize=9, color="#333333", va="bottom")  # fmt: skip


def smooth(values, width=5):
    """Centred mean over `width` steps, narrower at both ends; None is left out."""
    return [mean(values[max(0, i - width // 2) : i + width // 2 + 1]) for i in range(len(values))]


def mean(values):
    """The mean of what is not None; None where nothing is."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def hard_prompts(samples, first_replay, tau):
    """(hard, easy): query numbers whose mean reward before `first_replay` is below τ, or not."""
    seen = {}
    for row in samples:
        if row["step"] < first_replay:
            seen.setdefault(row["query"], []).extend(row["rewards"])
    hard = {query for query, rewards in seen.items() if sum(rewards) / len(rewards) < tau}
    return hard, set(seen) - hard


def curves(folder):
    """curves.png: reward of forget and boundary prompts, of hard and easy prompts, and recall where it was measured."""
    metrics = [row for row in read_lines(folder / "metrics.jsonl") if row["method"] in COLOURS]
    samples = read_lines(folder / "samples.jsonl")
    tau = json.loads((folder / "config.json").read_text(encoding="utf-8"))["tau"]
    if not metrics:
        return
    starts = [row["step"] for row in metrics if row.get("replay_groups")]
    first_replay = min(starts, default=max(row["step"] for row in metrics) + 1)
    regions = hard_prompts([row for row in samples if row["method"] == metrics[0]["method"]], first_replay, tau)
    evaluated = any("eval_retain_recall" in row for row in metrics)

    figure, axes = pyplot().subplots(1, 2 + evaluated, figsize=(5.2 * (2 + evaluated), 4.2), layout="constrained")
    panels = [
        ("Reward by kind of prompt", "Mean reward (higher is better)", ("forget", "boundary")),
        (f"Reward of hard and easy prompts\n(split at τ = {tau:g} before replay)", "", ("easy", "hard")),
        ("Recall on evaluation probes", "ROUGE-L recall, 0–100", ("retain ↑", "forget ↓")),
    ]
    for method in dict.fromkeys(row["method"] for row in metrics):
        own = [row for row in metrics if row["method"] == method]
        lines = lines_of(own, [row for row in samples if row["method"] == method], *regions)
        for axis, (*_, series) in zip(axes, panels, strict=False):
            for name, dash in zip(series, ("-", "--"), strict=True):
                points = [(row["step"], y) for row, y in zip(own, lines[name], strict=True) if y is not None]
                if points:
                    draw_line(axis, *zip(*points, strict=True), dash, method, name)
    for axis, (title, label, _) in zip(axes, panels, strict=False):
        mark_start(axis, starts[:1], "replay starts" if axis is axes[0] else "")
        axis.set(title=title, xlabel="Stage 2 step", ylabel=label)
        axis.legend(fontsize=9, loc="best", framealpha=0.9)
    save(figure, folder / "curves.png")


def lines_of(metrics, samples, hard, easy):
    """{name of a line: its value at each step, or None} of one method."""
    by_step = {}
    for row in samples:
        place = "hard" if row["query"] in hard else "easy" if row["query"] in easy else None
        by_step.setdefault((row["step"], place), []).append(sum(row["rewards"]) / len(row["rewards"]))
    return {
        **{kind: [row[f"reward_{kind}"] for row in metrics] for kind in ("forget", "boundary")},
        **{p: [mean(by_step.get((row["step"], p), [])) for row in metrics] for p in ("hard", "easy")},
        "retain ↑": [row.get("eval_retain_recall") for row in metrics],
        "forget ↓": [row.get("eval_forget_recall") for row in metrics],
    }


def draw_line(axis, x, y, dash, method, name):
    """An evaluation as it is, with its points; a reward faint, and smoothed over it."""
    look = dict(color=COLOURS[method], linestyle=dash)
    if name[-1] in "↑↓":
        axis.plot(x, y, marker="o", markersize=4, label=f"{NAMES[method]}, {name}", **look)
    else:
        axis.plot(x, y, linewidth=0.6, alpha=0.35, **look)
        axis.plot(x, smooth(y), linewidth=2, label=f"{NAMES[method]}, {name}", **look)


def scatter(points, path):
    """What is left of the forget set against what is kept of the retain set, a point for each model.

    points: {row title: (forget recall, retain recall, [the same pair of each seed], whether it stopped early)}.
    """
    figure, axis = pyplot().subplots(figsize=(9, 5.8), layout="constrained")
    kinds = {name: KINDS.get(name.split(",")[0], "baseline") for name in points}
    for kind, (marker, size, colour, label) in LOOKS.items():
        own = [point for name, point in points.items() if kinds[name] == kind]
        if own:
            x, y, seeds, stopped = zip(*own, strict=True)
            faces = ["none" if early else colour for early in stopped]
            axis.scatter(x, y, s=size, marker=marker, c=faces, edgecolors=colour, label=label, zorder=3)
            for pairs in filter(None, seeds):
                axis.scatter(*zip(*pairs, strict=True), s=10, color=colour, alpha=0.35, linewidths=0)
    lowest = min(pair[1] for point in points.values() for pair in (point, *point[2]))
    axis.set(
        xlabel="Recall of what was to be forgotten, ROUGE-L, 0–100 (← better)",
        ylabel="Recall of what was to be kept, ROUGE-L, 0–100 (↑ better)",
        xlim=(-4, 112), ylim=(max(-5, lowest - 8), 105),
    )  # fmt: skip
    notes = ["small dots are seeds"] * any(point[2] for point in points.values())
    notes += ["open: stopped early"] * any(point[3] for point in points.values())
    axis.legend(loc="lower right", fontsize=9.5, title="; ".join(notes) or None)
    place_labels(axis, {name: point[:2] for name, point in points.items()})
    save(figure, path)


def place_labels(axis, points, size=8.5):
    """Write each point's name beside it: in the nearest of some places where name, above all, and leader cover least.

    points: {name: (x, y)}; the legend and the axes' limits are in place. All sizes are in points of 1/72 inch.
    """
    axis.figure.canvas.draw()  # places axes and legend
    scale = 72 / axis.figure.dpi
    at = {name: tuple(axis.transData.transform(point) * scale) for name, point in points.items()}
    left, bottom, right, top = axis.bbox.extents * scale
    taken = [around(x, y, 6) for x, y in at.values()] + [axis.get_legend().get_window_extent().extents * scale]
    for name, (x, y) in sorted(at.items(), key=lambda item: item[1]):
        text = axis.annotate(name, points[name], (0, 0), textcoords="offset points", fontsize=size, va="center")
        text.set_in_layout(False)
        width, places = text.get_window_extent().width * scale, []
        for radius in (8, 13, 19, 26, 35, 46, 60, 78):
            for angle in range(0, 360, 15):
                dx, dy = radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))
                start = dx if dx > 1 else dx - width if dx < -1 else dx - width / 2
                box = (x + start, y + dy - 0.6 * size, x + start + width, y + dy + 0.6 * size)
                leader = [around(x + dx * part / radius, y + dy * part / radius, 1) for part in range(10, radius, 5)]
                covered = sum(overlap(own, other) for own in (*leader, *[box] * 9) for other in taken)
                covered += 9 * (box[0] < left or box[1] < bottom or box[2] > right or box[3] > top)
                places.append((covered, radius, angle % 180 != 0, angle, (dx, dy), start, (box, *leader)))
            if min(places)[0] == 0:
                break
        _, radius, _, _, end, start, boxes = min(places)
        taken += boxes
        text.set_position((start, end[1]))
        if radius > 8:
            line = dict(arrowstyle="-", color="#999999", linewidth=0.6, shrinkA=0, shrinkB=3)
            axis.annotate("", points[name], end, textcoords="offset points", arrowprops=line).set_in_layout(False)


def around(x, y, half):
    """A square's sides: left, bottom, right, top."""
    return x - half, y - half, x + half, y + half


def overlap(a, b):
    """Whether two boxes share any place."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
