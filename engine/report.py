"""What a run leaves to be read: a row a step and a group, the table, the answers row by row, the model cards.

docs/training_metrics.md defines every key of metrics.jsonl. The table has the rows of the paper's Tables 1, 2 and 5."""

import csv
import io
import json
import shlex
import sys
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCardData

import benchmarks
from baselines import TITLES
from engine import page, plots
from engine.files import RANK, printable, read_lines, write_json, write_text
from grpo import fill
from refusal import is_refusal
from replay import clip_ratio, importance_ratio, is_hard


def record(run, phase, row, groups, queries, stops):
    """Write a step's rows and show how it went. `row`: what the step itself has measured."""
    name = {"method": phase.name, "stage": 2, "step": groups[0].step}
    row = name | group_metrics(groups, queries, run.config.tau) | row
    entered = [id(group) for group in phase.buffer.ring if group.step == row["step"]]
    for group in groups:
        query = queries[group.query]
        run.samples.write(
            {"method": phase.name, "step": group.step, "query": group.query, "kind": query.kind, "group": query.group,
             "prompt": query.question, "completions": group.texts, "rewards": group.rewards.tolist(),
             "refusals": [is_refusal(text) for text in group.texts],
             "stored": entered.index(id(group)) + 1 if id(group) in entered else 0}
        )  # fmt: skip
    ended = torch.stack([(torch.isin(g.response_ids, torch.tensor(stops)) & g.mask).any(-1) for g in groups])  # (N, G)
    row["truncation"] = 1 - ended.float().mean().item()
    shown = row["step"] == phase.first or row["step"] % max(1, run.config.steps // 4) == 0
    rollouts = [[queries[g.query].kind, queries[g.query].question, g.texts[0], g.rewards[0].item()] for g in groups]
    run.log(row | {f"seconds_{part}": value for part, value in phase.seconds.items()}, rollouts if shown else ())
    phase.bar.set_postfix(reward=f"{row['reward']:.2f}", kl=f"{row['kl']:.3f}", buffer=row["buffer_size"])
    if shown:
        show_samples(phase, groups, queries)


def noted(logprobs_of):
    """`logprobs_of` that leaves what it gives in the groups too, as `train_logprobs`."""

    def noting(model, batch):
        logprobs = logprobs_of(model, batch)
        fill(batch, "train_logprobs", logprobs.detach())
        return logprobs

    return noting


def replayed(engine, config, drawn, used, step):
    """The groups of a replay update for the log: [step sampled, query, mean clipped weight or None if not `used`]."""
    engine.complete(used, "train_logprobs")
    told = []
    for group in drawn:
        own, group.train_logprobs, weight = group.train_logprobs, None, None
        if own is not None:
            ratio = importance_ratio(own, group.old_logprobs, group.mask, config.ratio_level)  # (G, T)
            ratio = ratio[group.mask] if config.ratio_level == "token" else ratio[:, 0]
            weight = clip_ratio(ratio, config.epsilon_low, config.epsilon_high).mean().item()
        told.append([group.step, group.query, weight])
    return {"replay_age": sum(step - group.step for group in drawn) / max(1, len(drawn)), "replayed": told}


def group_metrics(groups, queries, tau):
    """Rewards and refusals of a step's rollouts, together and by the kind of query, and shares of kinds of group."""
    row = {
        "reward": torch.stack([group.rewards.mean() for group in groups]).mean().item(),
        "equal_groups": sum(group.all_equal() for group in groups) / len(groups),
        "hard_groups": sum(is_hard(group, tau) for group in groups) / len(groups),
        "response_tokens": sum(int(group.mask.sum()) for group in groups),
    }
    for kind in ("forget", "boundary"):
        of_kind = [group for group in groups if queries[group.query].kind == kind]
        row[f"reward_{kind}"] = plots.mean([group.rewards.mean().item() for group in of_kind])
        row[f"refusal_{kind}"] = plots.mean([is_refusal(text) for group in of_kind for text in group.texts])
    return row


def show_samples(phase, groups, queries):
    """One completion for a forget and one for a boundary prompt, with its reward: numbers alone hide reward hacking."""
    for kind in ("forget", "boundary"):
        for group in [group for group in groups if queries[group.query].kind == kind][:1]:
            question, answer = printable(queries[group.query].question[-60:]), group.texts[0][:70]
            reward = group.rewards[0].item()
            phase.bar.write(f"{phase.name:>7} {group.step:>4} {kind:>8}  r = {reward:.1f}  {question} → {answer!r}")


def write(folder, columns, results, figures=True):
    """Tables and pictures of {phase: {column: value}}; columns: {column: heading}, left out where all are empty."""
    if RANK:
        return
    columns = columns | {"forget_tokens": "Forget data, % of tokens", "retain_tokens": "Retain data, % of tokens"}
    known = {key for row in results.values() for key, value in row.items() if value is not None}
    columns = {key: title for key, title in columns.items() if key in known} | {"seconds": "Training, s ↓"}
    results = {name: results[name] for name in TITLES if name in results}
    lines, cells = io.StringIO(), [[TITLES[name], *map(row.get, columns)] for name, row in results.items()]
    csv.writer(lines).writerows([["Model", *columns], *cells])
    write_text(folder / "table.csv", lines.getvalue())
    write_json(folder / "table.json", {TITLES[name]: row for name, row in results.items()})
    lines, notes = [f"| {' | '.join(['Model', *columns.values()])} |", "|---|" + "---:|" * len(columns)], {}
    for name, row in results.items():
        marked = [f"† stopped early, with the last finite weights: {row['stopped']}"] if row.get("stopped") else []
        marked += [f"† {row['without_replay']}"] if row.get("without_replay") else []
        cells = [TITLES[name] + "†" * bool(marked), *(cell(row.get(key)) for key in columns)]
        lines.append(f"| {' | '.join(cells)} |")
        for note in [*row["notes"], *marked]:
            notes.setdefault(printable(note), []).append(TITLES[name])
    told = [f"{'every row' if len(of) == len(results) else ', '.join(of)}: {note}" for note, of in notes.items()]
    write_text(folder / "table.md", "\n".join([*lines, "", *told]).rstrip() + "\n")
    if figures:
        page.write(folder)
        plots.curves(folder)
        recalls = ("forget_recall", "retain_recall")
        rows = {TITLES[name]: [row] for name, row in results.items() if None not in map(row.get, recalls)}
        if len(rows) >= 6:
            plots.scatter(rows, folder / "scatter.png")


def replay_of(run, method):
    """Of a trained ReRULE, by the log's process: `first_replay`, its first step; what to say if it never ran."""
    if method != "rerule" or RANK:
        return {}
    run.metrics.size()  # puts every row on the disk
    rows = [row for row in read_lines(run.folder / "metrics.jsonl") if row["method"] == method]
    steps, held = [row["step"] for row in rows if "replay_groups" in row], [row["buffer_size"] for row in rows]
    if steps:
        return {"first_replay": min(steps)}
    share, least = run.config.min_share, run.config.min_groups
    waits = f"for {f'{share:.0%} of the groups sampled' if share else f'{least} groups'}"
    waits += f" and step {run.config.warmup_steps + 1}"
    told = f"replay never ran, so this is RULE: it waits {waits}; {max(held, default=0)} groups were stored"
    print(f"{method}: {told}", file=sys.stderr)
    return {"first_replay": None, "without_replay": told}


def cell(value):
    if not isinstance(value, int | float):
        return "–"
    return f"{value:.1f}" if abs(value) >= 1 or value == 0 else f"{value:.4g}"


def print_table(folder):
    """The table on a terminal: one line a column, one column a row of the table, so that it fits any window."""
    if RANK:
        return
    text = (folder / "table.md").read_text(encoding="utf-8", errors="replace")
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    header, rows = lines[0] if lines else [""], lines[2:]
    width = max(map(len, header)) + 2
    for first in range(0, len(rows), 6):
        some = rows[first : first + 6]
        for at, title in enumerate(map(str.strip, header)):
            title = f"    {title}" if title[:1].islower() else title
            cells = "".join(f"{row[at].strip():>{max(12, len(row[0]))}}" for row in some)
            print(f"{title if at else '':<{width}}{cells}")
        print()
    notes = [line for line in text.splitlines() if "†" in line and not line.startswith("|")]
    rest = f"Everything else is in {folder}/: run.html, table.md, curves.png, metrics.jsonl, samples.jsonl, models."
    print(*notes, rest, *pointers(folder), sep="\n")


def pointers(folder):
    """Where a finished run's picture is, and two commands that go on from it."""
    held = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    last, seed, data = folder / (held["method"] or ["original"])[-1], held["seed"], held["data_dir"]
    asked = ["--benchmark", held["benchmark"], *(["--data_dir", data] if data else []), "--seed", seed, "--model", last]
    again = ["rerule.py", folder / "config.json", "--seed", seed + 1, "--output_dir", f"{folder}_{seed + 1}"]
    commands = {"Another seed": again, "Score a model": ["evaluate.py", *asked, "--output", f"{last}.json"]}
    told = [f"The picture: {path}" for path in folder.glob("curves.png")]
    return told + [f"{what}: python {shlex.join(map(str, words))}" for what, words in commands.items()]


def save_examples(folder, phase, rows):
    """Every probe's prediction and scores, one JSON line each, so that a figure can be traced to its rows."""
    Path(folder / "predictions").mkdir(exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(folder / "predictions" / f"{phase}.jsonl", text)


def write_card(folder, phase, config, scores):
    """README.md of a saved model, with the Hub's header. scores: {column: value}."""
    stored, benchmark = Path(__file__).with_name("model_card.json"), benchmarks.ALL[config.benchmark]
    known = json.loads(stored.read_text(encoding="utf-8"))
    done = known.get(phase, f"Unlearned with {TITLES[phase]}, a baseline of Appendix B.")
    title, hub = f"{TITLES[phase]}, {benchmark.name}", benchmark.hub
    given, here = config.model != "tiny", {"dataset_type": hub or benchmark.name, "dataset_name": benchmark.name}
    found = [EvalResult("text-generation", metric_type=name, metric_name=heading, metric_value=scores[name], **here)
             for name, heading in benchmark.columns.items() if scores.get(name) is not None]  # fmt: skip
    header = ModelCardData(
        base_model=config.model if given and not Path(config.model).exists() else None, library_name="transformers",
        pipeline_tag="text-generation", license="other" if hub or given else "mit", datasets=hub or None,
        tags=["unlearning", "rerule", benchmark.name], model_name=title, eval_results=found or None,
    )  # fmt: skip
    text, model = stored.with_suffix(".md").read_text(encoding="utf-8"), printable(config.model)
    text = text.format(title=title, done=done, config=config, model=model)
    write_text(folder / "README.md", f"---\n{header.to_yaml()}\n---\n\n{text}")
