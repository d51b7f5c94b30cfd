"""Targets that nobody tuned for: five of RWKU's and TOFU's forget01, with published data and with `--associated`.

The runs are those of `targets.json`, which says on which targets settings were chosen. Writes results/targets/."""

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

from benchmarks import rwku
from benchmarks.associated import WORSE
from benchmarks.metrics import mean
from config import Count, setting
from engine.files import write_json, write_text
from engine.flags import parse, run_command
from engine.plots import NAMES, look, pyplot, save
from reproduce import HERE, made, read_json, table
from reproduce.attacks import compared, rows_of
from reproduce.jobs import study
from reproduce.plan import FIRST_SEED, jobs_of_row
from reward import rouge_l_recall

PLAN = read_json(HERE / "targets.json")


@dataclass
class Options:
    """Unlearn five RWKU targets and TOFU's forget01 with published data and with `--associated` queries."""

    seeds: Count = setting(f"Seeds, from {FIRST_SEED} on.", 5)
    output_dir: str = setting("Folder for the tables, the figure and the records behind them.", "results/targets")
    targets_dir: str = setting("Folder with the folders of RWKU's targets.", "")
    tofu_dir: str = setting("Folder with TOFU's files; without one its rows are left out.", "")
    workers: Count = setting("Runs at a time, one thread each.", 2)


def all_jobs(o, records):
    """Every run, seed by seed; a family is <condition>@<target>. On one target settings are changed one at a time."""
    jobs, seeds = [], range(FIRST_SEED, FIRST_SEED + o.seeds)
    for target, about in PLAN["targets"].items():
        for condition, given in (PLAN["conditions"] | about.get("more", {})).items():
            flags = f"{about['data']} {about.get(condition, given['flags'])}".replace("TARGET", target)
            row = given | {"flags": flags} | ({"start": f"{given['start']}@{target}"} if "start" in given else {})
            jobs += jobs_of_row(o, records, f"{condition}@{target}", row, seeds, flags.split())
    return sorted(jobs, key=lambda job: job.seed)


def counted(o):
    """{target: {"floor": forget recall of an answer that is the target's name, in %, "near": {neighbour that RWKU
    evaluates: [forget prompts that name it, boundary prompts]}}}, counted or, without the targets' folder, read."""
    path, found = Path(o.output_dir, "counted.json"), {}
    for target in [name for name in PLAN["targets"] if o.targets_dir and name != "tofu"]:
        place = SimpleNamespace(data_dir=str(Path(o.targets_dir, target)))
        queries, probes = rwku.train(place).queries, rwku.probes(place)
        sides = [[query.question for query in queries if query.kind == kind] for kind in ("forget", "boundary")]
        floor = mean((rouge_l_recall(probe.target, probe.answer) for probe in probes if probe.forget), 100)
        found[target] = {"floor": floor, "near": {}}
        for name in dict.fromkeys(probe.type for probe in probes if not probe.forget):
            holds = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.I).search
            found[target]["near"][name] = [sum(map(bool, map(holds, side))) for side in sides]
    if found:
        write_json(path, found)
    return read_json(path) if path.exists() else {}


def models(records, target, of=PLAN["conditions"]):
    """{"RULE, published": {seed: columns}, …} of a target."""
    return {f"{title}, {given['data']}" if given["data"] else title: own
            for name, given in of.items() for title, own in rows_of(records, f"{name}@{target}").items()}  # fmt: skip


def together(records):
    """Markdown of all targets: the means of the first four columns in one cell."""
    found = {about["title"]: models(records, target) for target, about in PLAN["targets"].items()}
    means = lambda own: [mean(row[name] for row in own.values()) for name in [*PLAN["columns"]][:4]]  # noqa: E731
    cell = lambda own: " / ".join(f"{value:.1f}" for value in means(own)) if own else "–"  # noqa: E731
    labels = dict.fromkeys(label for own in found.values() for label in own)
    rows = [[label, *(cell(own.get(label)) for own in found.values())] for label in labels]
    return table(rows, f"| | {' | '.join(found)} |")


def warned(records):
    """Markdown of how often the warning of a run came, and how often it should have, over all targets."""
    count = {}
    for found in (models(records, target) for target in PLAN["targets"]):
        for label, own in [item for item in found.items() if item[0].split(",")[0] in NAMES.values()]:
            for seed, row in own.items():
                change = {name: row[name] - found["Rej. Steer"][seed][name] for name in PLAN["columns"]}
                worse = [max(-change[f"{x}_recall"], change[f"{x}_refusal"]) > WORSE for x in ("held", "retain")]
                count.setdefault(label, []).append((1, *worse, all(worse)))
    return table([[label, *map(str, map(sum, zip(*own, strict=True)))] for label, own in sorted(count.items())])


def refused(records, counts):
    """{"RULE, published": [(forget prompts that name a neighbour, % of its probes refused), …], …}."""
    found = {}
    for target, of in counts.items():
        for label, own in models(records, target).items():
            for name, (forget, _) in of["near"].items():
                share = mean(row.get(f"neighbour_{rwku.slug(name)}_refusal") for row in own.values())
                found.setdefault(label, []).append((forget, share))
    return found


def binned(points):
    """Markdown of refusals by how many forget prompts name the neighbour."""
    ends = [*pairwise((0, 1, 10, 50, 10**9))]
    parts = {label: [[y for x, y in own if a <= x < b] for a, b in ends] for label, own in points.items()}
    cell = lambda part: f"{mean(part):.1f} ({len(part)})" if part else "–"  # noqa: E731
    return table([[label, *map(cell, own)] for label, own in parts.items()])


def draw(points, records, path):
    """Refusals of a neighbour's probes against how often forget prompts name it; what a run watches, over its steps."""
    figure, axes = pyplot().subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    for axis, (words, families) in zip(axes, PLAN["shown"].items(), strict=False):
        for title, family in families.items():
            data, dash = PLAN["conditions"][family]["data"], "-" if family == "published" else ":"
            label = f"{title}, {data}" if data else title
            seen = zip(*points.get(label, []), strict=True)
            axis.plot(*seen, **look(title) | {"linestyle": "", "alpha": 0.8}, label=title)
            runs = [run for run in records.values() if run["family"].startswith(f"{family}@")]
            looks = [(round(4 * step / run["steps"]) / 4, refusals) for run in runs  # at 0, a quarter, a half, …
                     for step, _, refusals, _ in run["methods"].get(title.lower(), {}).get("held", [])]  # fmt: skip
            middle = [(at, mean(y for x, y in looks if x == at)) for at in sorted({x for x, _ in looks} - {0})]
            axes[2].plot(*zip(*middle, strict=True), **look(title) | {"linestyle": dash}, label=label)
        axis.set(xscale="symlog", ylim=(-3, 103), title=words, xlabel="Forget prompts that name the neighbour")
        axis.set(xticks=[0, 1, 10, 100], xticklabels=[0, 1, 10, 100])
    axes[0].set_ylabel("Its probes that are refused, % (↓ better)")
    axes[2].set(title="What a run watches", xlabel="Part of Stage 2", xticks=[0.25, 0.5, 0.75, 1])
    axes[2].set(ylabel="Refused of queries held out, % (↓ better)", ylim=(0, 1.3 * axes[2].get_ylim()[1]))
    for axis in axes[1:]:
        axis.legend(frameon=False, fontsize=9)
    save(figure, path)


def write(folder, records, counts):
    """report.md and targets.png from the records and from what `counted` found."""
    points = refused(records, counts)
    draw(points, records, folder / "targets.png")
    tables, first = [], {name: run for name, run in records.items() if run["seed"] == FIRST_SEED}
    for target, about in PLAN["targets"].items():
        floor = PLAN["floor"].format(**counts[target]) if target in counts else ""
        found = {f"{about['title']}\n\n{floor}": models(records, target)}
        if "more" in about:
            changed = models(first, target, PLAN["conditions"] | about["more"])
            found[f"{about['title']}: one setting changed at a time, seed {FIRST_SEED}\n\n"] = changed
        tables += [f"### {head}{compared(own, 'Rej. Steer', PLAN)}" for head, own in found.items() if own]
    parts = {"together": together(records), "tables": "\n\n".join(tables), "made": made(records)}
    text = (HERE / "targets.md").read_text(encoding="utf-8")
    write_text(folder / "report.md", text.format(**parts, warned=warned(records), refused=binned(points)))


def main(argv=None):
    o = parse(Options, argv)
    study(o, all_jobs, lambda folder, records: write(folder, records, counted(o)))


if __name__ == "__main__":
    run_command(main)
