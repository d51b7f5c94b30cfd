"""What a run leaves to be read: the table, the curves, the answers row by row and the model cards.

The table has the rows of the paper's Tables 1, 2 and 5; the curves are in the spirit of its Figures 1 and 3.
"Hard" and "easy" prompts are told apart by their mean reward before replay starts, where RULE and ReRULE are the same
run, never by how they turned out: prompts picked by outcome would flatter replay by regression to the mean.
"""

import json
import math
from pathlib import Path

from files import RANK, write_json, write_text
from metrics import BESIDE, TABLE

ROWS = {
    "original": "Original",
    "retained": "Retained",
    "ga": "GA", "gd": "GA+GDR (GD)", "kl": "GA+KLR (KL)", "po": "PO", "dpo": "DPO", "dpo_rt": "DPO-RT", "npo": "NPO",
    "npo_gdr": "NPO+GDR", "npo_klr": "NPO+KLR", "simnpo": "SimNPO", "simnpo_gdr": "SimNPO+GDR",
    "simnpo_klr": "SimNPO+KLR", "mismatch": "Mismatch", "llmu": "LLMU", "task_vector": "Task vector", "whp": "WHP",
    "flat": "FLAT", "sga": "SGA", "purge": "PURGE",
    "rej_steer": "Rej. Steer",
    "rule": "RULE",
    "rerule": "ReRULE",
}  # fmt: skip
BUILTIN = {
    "forget_trained_refusal": "Forget refusal, trained ↑",
    "forget_heldout_refusal": "held out ↑",
    "forget_trained_recall": "Forget recall, trained ↓",
    "forget_heldout_recall": "held out ↓",
    "hard_trained_recall": "Hard neighbours' recall, trained ↑",
    "hard_heldout_recall": "held out ↑",
    "easy_trained_recall": "Easy neighbours' recall, trained ↑",
    "easy_heldout_recall": "held out ↑",
    "retain_refusal": "Over-refusal ↓",
}
TOKENS = {"forget_tokens": "Forget data, % of tokens", "retain_tokens": "Retain data, % of tokens"}
NAMED = {
    "forget_refusal_named": "Refusal, target named ↑",
    "forget_refusal_unnamed": "Refusal, not named ↑",
    "forget_paraphrased_refusal": "Refusal, paraphrased ↑",
    "forget_recall": "Forget recall ↓",
    "retain_recall": "Retain recall ↑",
}
COLOURS = {"rule": "#0072B2", "rerule": "#D55E00"}  # blue and vermilion: told apart by every kind of colour vision


def write(folder, config, results):
    """table.json, table.md and curves.png from the phases' results, {phase: {column: value}} in the order run."""
    if RANK:
        return
    columns = BUILTIN if config.benchmark == "builtin" else TABLE[config.benchmark] | BESIDE | NAMED
    columns = {
        key: title for key, title in columns.items() if any(row.get(key) is not None for row in results.values())
    }
    columns |= {key: title for key, title in TOKENS.items() if any(key in row for row in results.values())}
    columns["seconds"] = "Training, s ↓"
    results = {name: results[name] for name in ROWS if name in results}
    write_json(folder / "table.json", {ROWS[name]: row for name, row in results.items()})
    lines = [" | ".join(["", "Model", *columns.values(), ""]).strip(), "|---|" + "---:|" * len(columns)]
    notes = {}
    for name, row in results.items():
        title = ROWS[name] + ("†" if row.get("stopped") else "")
        lines.append(" | ".join(["", title, *(cell(row.get(key)) for key in columns), ""]).strip())
        stopped = [f"† stopped early, with the last finite weights: {row['stopped']}"] if row.get("stopped") else []
        for note in [*row["notes"], *stopped]:
            notes.setdefault(note, []).append(ROWS[name])
    told = [f"{'every row' if len(of) == len(results) else ', '.join(of)}: {note}" for note, of in notes.items()]
    write_text(folder / "table.md", "\n".join([*lines, "", *told]).rstrip() + "\n")
    draw_curves(folder)
    draw_scatter(folder, results)


def cell(value):
    if value is None:
        return "–"
    return f"{value:.1f}" if abs(value) >= 1 or value == 0 else f"{value:.4g}"


def print_table(folder):
    """The table on a terminal: one line a column, one column a row of the table, so that it fits any window."""
    if RANK:
        return
    text = (folder / "table.md").read_text(encoding="utf-8")
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    header, rows = lines[0], lines[2:]
    width = max(map(len, header)) + 2
    for first in range(0, len(rows), 6):
        some = rows[first : first + 6]
        for at, title in enumerate(map(str.strip, header)):
            title = f"    {title}" if title[:1].islower() else title
            cells = "".join(f"{row[at].strip():>{max(12, len(row[0]))}}" for row in some)
            print(f"{title if at else '':<{width}}{cells}")
        print()
    notes = [line for line in text.splitlines() if "†" in line and not line.startswith("|")]
    print(
        "".join(f"{line}\n" for line in notes)
        + f"Everything else is in {folder}/: table.md, curves.png, metrics.jsonl, samples.jsonl, models."
    )


def save_examples(folder, phase, rows):
    """Every probe's prediction and scores, one JSON line each, so that a figure can be traced to its rows."""
    Path(folder / "predictions").mkdir(exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(folder / "predictions" / f"{phase}.jsonl", text)


def model_card(phase, config):
    """README.md of a saved model."""
    done = {
        "original": "A tiny Llama that was taught the benchmark's facts, before any unlearning.",
        "retained": "A tiny Llama that was never taught what the others are made to forget.",
        "rej_steer": "After Stage 1, rejection steering: fine-tuned on refusals to forget prompts.",
        "purge": "After PURGE: GRPO on forget prompts, rewarded for answers without a forbidden term.",
        "rule": "After Stage 2 of RULE: GRPO on forget and boundary prompts.",
        "rerule": "After Stage 2 of ReRULE: RULE with replay of hard rollout groups.",
    }.get(phase, f"Unlearned with {ROWS[phase]}, a baseline of Appendix B.")
    return f"""# {ROWS[phase]}, {config.benchmark}

{done}

- base model: `{config.model}`; seed {config.seed}; every setting is in the run's `config.json`
- load: `AutoModelForCausalLM.from_pretrained(folder)`

## Limits

Unlearning by refusal changes what the model says, not all that it holds. Knowledge can remain in the weights and come
back under paraphrase, other languages, adversarial prompts or a little further training; questions near the target may
be refused though they should be answered. It is no proof of erasure and no guarantee of compliance with any law.
"""


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def smooth(values, width=5):
    """Centred mean over `width` steps, narrower at both ends; None is left out."""
    half = width // 2
    windows = [[v for v in values[max(0, i - half) : i + half + 1] if v is not None] for i in range(len(values))]
    return [sum(window) / len(window) if window else None for window in windows]


def hard_prompts(samples, first_replay, tau):
    """(hard, easy): query numbers whose mean reward before `first_replay` is below τ, or not."""
    seen = {}
    for row in samples:
        if row["step"] < first_replay:
            seen.setdefault(row["query"], []).extend(row["rewards"])
    hard = {query for query, rewards in seen.items() if sum(rewards) / len(rewards) < tau}
    return hard, set(seen) - hard


def draw_curves(folder):
    """curves.png: reward of forget and boundary prompts, of hard and easy prompts, and recall where it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = [row for row in read_lines(folder / "metrics.jsonl") if row["method"] in COLOURS]
    samples = read_lines(folder / "samples.jsonl")
    tau = json.loads((folder / "config.json").read_text())["tau"]
    if not metrics:
        return
    starts = [row["step"] for row in metrics if row.get("replay_groups")]
    first_replay = min(starts, default=max(row["step"] for row in metrics) + 1)
    first_method = metrics[0]["method"]
    hard, easy = hard_prompts([row for row in samples if row["method"] == first_method], first_replay, tau)
    evaluated = any("eval_retain_recall" in row for row in metrics)

    figure, axes = plt.subplots(1, 2 + evaluated, figsize=(5.2 * (2 + evaluated), 4.2), layout="constrained")
    panels = [
        ("Reward by kind of prompt", "Mean reward (higher is better)", ("forget", "boundary")),
        (f"Reward of hard and easy prompts (split at τ = {tau:g} before replay)", "", ("easy", "hard")),
        ("Recall on evaluation probes", "ROUGE-L recall, 0–100", ("retain ↑", "forget ↓")),
    ]
    for axis, (title, label, series) in zip(axes, panels, strict=False):
        for method in dict.fromkeys(row["method"] for row in metrics):
            own = [row for row in metrics if row["method"] == method]
            steps = [row["step"] for row in own]
            by_step = {}
            for row in samples:
                if row["method"] == method:
                    place = "hard" if row["query"] in hard else "easy" if row["query"] in easy else None
                    by_step.setdefault((row["step"], place), []).append(sum(row["rewards"]) / len(row["rewards"]))
            lines = {
                **{kind: [row[f"reward_{kind}"] for row in own] for kind in ("forget", "boundary")},
                **{p: [mean_or_none(by_step.get((step, p))) for step in steps] for p in ("hard", "easy")},
                "retain ↑": [row.get("eval_retain_recall") for row in own],
                "forget ↓": [row.get("eval_forget_recall") for row in own],
            }
            for name, dash in zip(series, ("-", "--"), strict=True):
                points = [(s, v) for s, v in zip(steps, lines[name], strict=True) if v is not None]
                if not points:
                    continue
                x, y = zip(*points, strict=True)
                colour, text = COLOURS[method], f"{ROWS[method]}, {name}"
                if "↑" in series[0]:
                    axis.plot(x, y, dash, color=colour, marker="o", markersize=4, label=text)
                else:
                    axis.plot(x, y, dash, color=colour, linewidth=0.6, alpha=0.35)
                    axis.plot(x, smooth(y), dash, color=colour, linewidth=2, label=text)
        if starts:
            axis.axvline(first_replay - 0.5, color="#666666", linewidth=1, linestyle=":")
            axis.annotate(
                "replay starts", (first_replay - 0.5, 0.78), xycoords=("data", "axes fraction"), xytext=(-3, 0),
                textcoords="offset points", rotation=90, ha="right", va="center", fontsize=9, color="#444444",
            )  # fmt: skip
        axis.set(title=title, xlabel="Stage 2 step", ylabel=label)
        axis.title.set_fontsize(10.5)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=9, loc="best", framealpha=0.9)
    temporary = folder / "curves.tmp.png"
    figure.savefig(temporary, dpi=130)
    plt.close(figure)
    temporary.replace(folder / "curves.png")


def draw_scatter(folder, results):
    """scatter.png: what is left of the forget set against what is kept of the retain set, a point for each model."""
    points = {
        name: (row["forget_recall"], row["retain_recall"], row.get("stopped"))
        for name, row in results.items()
        if row.get("forget_recall") is not None and row.get("retain_recall") is not None
    }
    if len(points) < 6:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8.5, 6.5), layout="constrained")
    first, second = ("original", "retained"), ("purge", "rej_steer", "rule", "rerule")
    for marker, size, colour, label, names in (
        ("*", 130, "#000000", "before unlearning, and never taught the forget set", first),
        ("o", 50, "#D55E00", "reinforcement, and its Stage 1", second),
        ("s", 50, "#0072B2", "baselines of Appendix B", [name for name in points if name not in first + second]),
    ):
        own = [points[name] for name in names if name in points]
        faces = ["none" if stopped else colour for *_, stopped in own]  # open: stopped early
        x, y = [point[0] for point in own], [point[1] for point in own]
        axis.scatter(x, y, s=size, marker=marker, c=faces, edgecolors=colour, label=label, zorder=3)
    place_labels(axis, {ROWS[name]: point[:2] for name, point in points.items()})
    axis.set(
        xlabel="Recall of what was to be forgotten, ROUGE-L, 0–100 (← lower is better)",
        ylabel="Recall of what was to be kept, ROUGE-L, 0–100 (higher is better →)",
        xlim=(-5, 118), ylim=(-5, 108),
    )  # fmt: skip
    axis.grid(alpha=0.25)
    axis.legend(fontsize=9, loc="lower right")
    temporary = folder / "scatter.tmp.png"
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    temporary.replace(folder / "scatter.png")


def place_labels(axis, points):
    """Write each point's name beside it: in the nearest of some places where it covers no point and no other name.

    points: {name: (x, y)} on axes that run over about 120 × 110 units.
    """
    height, letter, taken = 2.6, 1.25, [(x - 1, y - 1, x + 1, y + 1) for x, y in points.values()]
    for name, (x, y) in sorted(points.items(), key=lambda item: item[1]):
        places = []
        for radius in (1.6, 4, 7, 10, 13, 16, 20, 25):
            for angle in range(0, 360, 15):
                dx, dy = radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))
                left = x + dx - (letter * len(name) if dx < -0.5 else 0 if dx > 0.5 else letter * len(name) / 2)
                box = (left, y + dy - height / 2, left + letter * len(name), y + dy + height / 2)
                covered = sum(box[0] < hi and lo < box[2] and box[1] < t and b < box[3] for lo, b, hi, t in taken)
                covered += box[0] < -4  # over the axis
                places.append((covered, radius, angle not in (0, 180), box, dx))
        *_, box, dx = min(places)
        taken.append(box)
        side = "left" if dx > 0.5 else "right" if dx < -0.5 else "center"
        at = (box[0] if side == "left" else box[2] if side == "right" else (box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        line = dict(arrowstyle="-", color="#999999", linewidth=0.6, shrinkA=0, shrinkB=2)
        axis.annotate(name, (x, y), at, fontsize=8.5, ha=side, va="center", arrowprops=line)


def mean_or_none(values):
    return sum(values) / len(values) if values else None
