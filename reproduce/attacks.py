"""Forgotten or hidden: every method attacked, and which part of replay leaks. Writes results/attacks/.

The runs are those of `attacks.json`. No setting was chosen on their seeds: the rate of relearning was chosen on seed
11, on Original and Retained alone. The variants with `leaks` were added after a look at seed 21."""

from dataclasses import dataclass
from functools import partial

from baselines import METHODS, TITLES
from config import Count, setting
from engine.files import write_text
from engine.flags import parse, run_command
from reproduce import HERE, made, read_json, table
from reproduce.jobs import study
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
    """{title: {seed: columns}} of a family's runs, in the order of methods."""
    own = {run["seed"]: run["rows"] for _, run in sorted(records.items()) if run["family"] == family}
    found = {title: {seed: rows[title] for seed, rows in own.items() if title in rows} for title in TITLES.values()}
    return {title: seeds for title, seeds in found.items() if seeds}


def compared(rows, against=None, plan=PLAN):
    """Markdown of {label: {seed: columns}}; against: the row from which paired differences are taken."""
    columns, paired, lines = plan["columns"], plan["paired"] if against else {}, []
    cell = partial(spread, width=half_width)
    for label, own in rows.items():
        cells = [cell([row.get(name) for row in own.values()], 2 if "auc" in name else 1) for name in columns]
        for name in paired:
            change = [row[name] - rows[against][seed][name] for seed, row in own.items() if seed in rows[against]]
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
    text, parts["variants"] = (HERE / "attacks.md").read_text("utf-8"), compared(variants(records), "RULE")
    write_text(folder / "report.md", text.format(made=made(records), **parts))


def main(argv=None):
    study(parse(Options, argv), all_jobs, write)


if __name__ == "__main__":
    run_command(main)
