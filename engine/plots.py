"""Pictures: what all of them share, and the two of a run. Matplotlib is imported when the first one is drawn.

The curves follow the paper's Figures 1 and 3. Hard and easy prompts are told apart as in `reproduce/records.py`."""

import io
import json
from functools import cache
from statistics import harmonic_mean

from benchmarks.metrics import mean
from engine.files import read_lines, replacing

NAMES = {"rule": "RULE", "rerule": "ReRULE"}
GREY = "#666666"
LOOKS = {  # a method's colour in every picture (Okabe and Ito's: told apart by any colour vision), marker, dash
    "original": ("black", "<", "-"), "retained": ("black", ">", "-"), "rej_steer": ("#56B4E9", "X", ":"),
    "rule": ("#0072B2", "o", "--"), "rerule": ("#D55E00", "D", "-"), "random": ("#009E73", "s", "-."),
    "recent": ("#E69F00", "^", ":"), "current": ("#CC79A7", "v", (0, (5, 1))), "other": (GREY, "h", "-"),
}  # fmt: skip
RECALLS = {"forget_recall": "Recall of what was\nto be forgotten, %\n(← better)",
           "retain_recall": "Recall of what was\nto be kept, %\n(→ better)",
           "leak_64": "Best of 64 samples\non what was to be\nforgotten, % (← better)"}  # fmt: skip


def look(method):
    """Keywords of `plot` for a method, by its key or its row's title ("RULE, longer" is RULE); others are all alike."""
    key = method.split(",")[0].lower().replace(". ", "_")
    return dict(zip(("color", "marker", "linestyle"), LOOKS.get(key, LOOKS["other"]), strict=True))


@cache
def pyplot():
    """Matplotlib's pyplot, without a window and in our style."""
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    plt.rcParams.update({"font.size": 10.5, "axes.titlesize": 11, "figure.labelsize": 10.5, "axes.grid": True,
                         "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False})  # fmt: skip
    return plt


def save(figure, path):
    """Write a PNG of 256 colours at 200 dpi; no date in it, so the same data give the same bytes."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=200)
    pyplot().close(figure)
    few = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)  # rare ones too: a few dots
    with replacing(path) as temporary:
        few.save(temporary, "PNG", optimize=True, dpi=(200, 200))


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
                  fontsize=9, va="bottom")  # fmt: skip


def smooth(values, width=5):
    """Centred mean over `width` steps, narrower at both ends; None is left out."""
    return [mean(values[max(0, i - width // 2) : i + width // 2 + 1]) for i in range(len(values))]


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
    metrics = [row for row in read_lines(folder / "metrics.jsonl") if row["method"] in NAMES]
    samples = read_lines(folder / "samples.jsonl")
    tau = json.loads((folder / "config.json").read_text(encoding="utf-8"))["tau"]
    if not metrics:
        return
    starts = [row["step"] for row in metrics if row.get("replay_groups")]
    first_replay = min(starts, default=max(row["step"] for row in metrics) + 1)
    regions = hard_prompts([row for row in samples if row["method"] == metrics[0]["method"]], first_replay, tau)
    panels = [
        ("Reward by kind of prompt", "Mean reward (higher is better)", ("forget", "boundary")),
        (f"Reward of hard and easy prompts\n(split at τ = {tau:g} before replay)", "", ("easy", "hard")),
        ("Recall on evaluation probes", "ROUGE-L recall, 0–100", ("retain ↑", "forget ↓")),
        ("Queries held out of training", "%", ("recall ↑", "refusals ↓")),
    ]
    logged = set().union(*metrics)
    panels = [panel for panel, key in zip(panels, (None, None, "eval_retain_recall", "held_recall"), strict=True)
              if key is None or key in logged]  # fmt: skip
    figure, axes = pyplot().subplots(1, len(panels), figsize=(4 * len(panels), 4.4), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in metrics):
        own = [row for row in metrics if row["method"] == method]
        lines = lines_of(own, [row for row in samples if row["method"] == method], *regions)
        for axis, (*_, series) in zip(axes, panels, strict=True):
            for name, dash in zip(series, ("-", "--"), strict=True):
                points = [(row["step"], y) for row, y in zip(own, lines[name], strict=True) if y is not None]
                if points:
                    draw_line(axis, *zip(*points, strict=True), dash, method, name)
    for axis, (title, label, _) in zip(axes, panels, strict=True):
        mark_start(axis, starts[:1], "replay starts" if axis is axes[0] else "")
        axis.set(title=title, xlabel="Stage 2 step. Thick: mean of five; below: its end", ylabel=label)
        axis.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    save(figure, folder / "curves.png")


def lines_of(metrics, samples, hard, easy):
    """{name of a line: its value at each step, or None} of one method."""
    lines = {kind: [row[f"reward_{kind}"] for row in metrics] for kind in ("forget", "boundary")}
    for name, queries in (("hard", hard), ("easy", easy)):
        own = [(row["step"], mean(row["rewards"])) for row in samples if row["query"] in queries]
        lines[name] = [mean([reward for step, reward in own if step == row["step"]]) for row in metrics]
    evaluated = (("retain ↑", "eval_retain_recall"), ("forget ↓", "eval_forget_recall"),
                 ("recall ↑", "held_recall"), ("refusals ↓", "held_refusal"))  # fmt: skip
    return lines | {name: [row.get(column) for row in metrics] for name, column in evaluated}


def draw_line(axis, x, y, dash, method, name):
    """An evaluation as it is, with its points; a reward faint, and smoothed over it. The legend has the last value."""
    evaluated, drawn = name[-1] in "↑↓", look(method) | {"linestyle": dash, "markersize": 4}
    if not evaluated:
        drawn["marker"] = ""
        axis.plot(x, y, linewidth=0.6, alpha=0.35, **drawn)
        y = smooth(y)
    axis.plot(x, y, label=f"{NAMES[method]}, {name}: {y[-1]:.{1 if evaluated else 2}f}", **drawn)


def dots(axis, rows, form="{mean:.1f}", shift=0.0, column=34):
    """Rows of a dot plot, from the top: mean, interval and seeds of each, and its numbers in a column at the right.
    rows: [(label, method, statistic or None)]; a statistic has "mean" and "values", and "low" and "high" if known.
    shift: of the marks, upwards, in rows; column: where the numbers end, in points from the axis."""
    for y, (_, method, stat) in enumerate(reversed(rows)):
        drawn, values = look(method), stat["values"] if stat else []
        for at, value in enumerate(values if len(values) > 1 else []):
            place = y + shift + 0.24 * (at / (len(values) - 1) - 0.5)
            axis.plot(value, place, ".", color=drawn["color"], alpha=0.45, markersize=5, markeredgewidth=0)
        if stat and "low" in stat:
            axis.plot([stat["low"], stat["high"]], [y + shift] * 2, color=drawn["color"], linewidth=2.2, zorder=3)
        if stat:
            axis.plot(stat["mean"], y + shift, markersize=8, mew=0.6, mec="white", zorder=4, label=method, **drawn)
        told = form.format(**stat).replace("-", "−") if stat else "–"
        axis.annotate(told, (1, y), (column, 0), ("axes fraction", "data"), "offset points", ha="right", va="center")
    axis.set_yticks(range(len(rows)), [label for label, *_ in reversed(rows)])
    axis.tick_params("y", length=0)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.grid(axis="y", visible=False)


def scatter(rows, path):
    """Left of the forget set beside what is kept, best balance on top. rows: {title: [row of each seed]}, with both."""
    found, balance = {}, {}
    for title, seeds in rows.items():
        values = {column: [row[column] for row in seeds if row.get(column) is not None] for column in RECALLS}
        if values["forget_recall"] and values["retain_recall"]:
            found[title] = {column: {"mean": mean(own), "values": own} for column, own in values.items() if own}
            left, kept = (found[title][f"{side}_recall"]["mean"] for side in ("forget", "retain"))
            balance[title] = harmonic_mean([kept, max(0, 100 - left)])
    order = {title: title + "†" * any(row.get("stopped") for row in rows[title])
             for title in sorted(found, key=balance.get, reverse=True)}  # fmt: skip
    columns = [column for column in RECALLS if 2 * sum(column in own for own in found.values()) > len(found)]
    figure, axes = pyplot().subplots(1, len(columns), sharey=True, layout="constrained")
    figure.set_size_inches(3.6 + 2.1 * len(columns), 1.3 + 0.27 * len(order))
    for axis, column in zip(axes, columns, strict=True):
        dots(axis, [(label, title, found[title].get(column)) for title, label in order.items()])
        axis.set_title(RECALLS[column], fontsize=10)
    figure.supxlabel("Top: best harmonic mean of what is kept and 100 − what is left. †: stopped early")
    save(figure, path)
