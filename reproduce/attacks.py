"""Forgotten or hidden: every method attacked, and which part of replay leaks. Writes results/attacks/.

The runs are those of `attacks.json`. No setting was chosen on their seeds: the rate of relearning was chosen on seed
11, on Original and Retained alone. The variants with `leaks` were added after a look at seed 21."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from baselines import METHODS, TITLES
from config import Count, setting
from engine.files import write_text
from engine.flags import check_bounds, parse, run_command
from reproduce import HERE, read_json, table
from reproduce.jobs import read_records, run_all, write_records
from reproduce.plan import FIRST_SEED, jobs_of_row
from reproduce.records import never_replayed
from reproduce.statistics import half_width, spread

PLAN = read_json(HERE / "attacks.json")


@dataclass
class Options:
    """Attack every method, and every variant of replay, on the built-in world and on TOFU's text."""

    seeds: Count = setting(f"Seeds, from {FIRST_SEED} on.", 5)
    output_dir: str = setting("Folder for the tables and the records behind them.", "results/attacks")
    tofu_dir: str = setting("Folder with TOFU's files; without one its table is left out.", "")
    workers: Count = setting("Runs at a time, one thread each.", 2)


def all_jobs(o, records):
    """Every run, the longest first; a family's `start` names the family whose models it begins with."""
    jobs, seeds = [], range(FIRST_SEED, FIRST_SEED + o.seeds)
    for family, row in PLAN["families"].items():
        flags = row["flags"].replace("ALL", " ".join(METHODS)).split()
        jobs += jobs_of_row(o, records, family, row, seeds, (*flags, "--eval_every", "0", "--attack", *PLAN["attacks"]))
    return jobs


def rows_of(records, family):
    """{title: [columns of each seed]} of a family's runs, in the order of methods."""
    own = [records[name]["rows"] for name in sorted(records) if records[name]["family"] == family]
    found = {title: [rows[title] for rows in own if title in rows] for title in TITLES.values()}
    return {title: seeds for title, seeds in found.items() if seeds}


def compared(rows, against=None):
    """Markdown of {label: [columns of each seed]}; against: the row from which paired differences are taken."""
    columns, paired, lines = PLAN["columns"], PLAN["paired"] if against else {}, []
    cell = partial(spread, width=half_width)
    for label, seeds in rows.items():
        cells = [cell([s.get(name) for s in seeds], 2 if name == "membership_auc" else 1) for name in columns]
        for name in paired:
            change = [own[name] - other[name] for own, other in zip(seeds, rows[against], strict=True)]
            cells.append("" if label == against else cell(change, sign="+"))
        lines.append([label, *cells])
    return table(lines, f"| | {' | '.join([*columns.values(), *paired.values()])} |")


def variants(records):
    """RULE, ReRULE and each variant of them, with whether replay ran."""
    base = rows_of(records, "base")
    found = {title: base[title] for title in ("RULE", "ReRULE") if title in base}
    for family, row in PLAN["families"].items():
        runs = [record for record in records.values() if record["family"] == family]
        if "start" in row and runs:
            never = sum(map(never_replayed, runs))
            label = row["label"] + f" (no replay on {never} of {len(runs)} seeds)" * bool(never)
            (found[label],) = rows_of(records, family).values()
    return found


def write(folder, records):
    """report.md from the records."""
    rows = {family: rows_of(records, family) for family in ("base", "trained", "tofu")}
    parts = {family: compared(own) if own else "Not run." for family, own in rows.items()}
    commits = ", ".join(sorted({record["commit"] for record in records.values()}))
    seeds = sorted({record["seed"] for record in records.values()})
    hours = sum(record["seconds"] for record in records.values()) / 3600
    text = (HERE / "attacks.md").read_text(encoding="utf-8")
    made = f"{len(records)} runs, seeds {seeds[0]}–{seeds[-1]}, {hours:.1f} hours of one CPU thread, commit {commits}"
    write_text(folder / "report.md", text.format(made=made, variants=compared(variants(records), "RULE"), **parts))


def main(argv=None):
    o = parse(Options, argv)
    check_bounds(o)
    folder = Path(o.output_dir)
    records = read_records(folder)
    run_all(o, folder, records, all_jobs)
    write_records(folder, records)
    write(folder, records)
    print(f"{folder / 'report.md'}: {len(records)} runs")


if __name__ == "__main__":
    run_command(main)
