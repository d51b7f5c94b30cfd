"""The paper in miniature: runs or resumes what is missing of a plan, then writes results/report.md and its figures.

Covers every table, figure and ablation of the paper on made-up worlds, Table 5 on TOFU's text, and controls of ours.
Kept are records.json, all that the report is made of, which a later call adds to, and of each run in runs/ its
settings, table, metrics and samples; models go once no other run starts from them."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from config import InputError, setting
from engine.flags import parse, run_command
from reproduce import plan, report
from reproduce.jobs import read_records, run_all, write_records
from reproduce.plan import SECTIONS


@dataclass
class Options:
    """Make the report of every table, figure and ablation; a later call goes on where an earlier one stopped."""

    only: list[str] = setting(f"Parts of the report to run, some of: {' '.join(SECTIONS)}. All unless given.", [])
    seeds: int = setting("Seeds of the report, from 21 on; a verdict needs 8.", 8)
    output_dir: str = setting("Folder for the report, its figures and records. [results; with --quick runs/quick]", "")
    tofu_dir: str = setting("Folder with TOFU's files; without one its table is left out.", "")
    rwku_dir: str = setting("Folder of one RWKU target; without one the table of attacks is left out.", "")
    quick: bool = setting("Two seeds at most, one to choose on, two rates, fewer steps: to see it work.", False)
    workers: int = setting("Runs at a time, one thread each.", 2)


def main(argv=None):
    o = parse(Options, argv)
    for name in o.only:
        if name not in SECTIONS:
            raise InputError(f"--only {name}: expected some of {', '.join(SECTIONS)}")
    if o.seeds < 2 or o.workers < 1:
        raise InputError("--seeds, --workers: expected at least 2 seeds, whose spread is told, and 1 worker")
    o.seeds = min(o.seeds, 2) if o.quick else o.seeds
    folder = Path(o.output_dir or ("runs/quick" if o.quick else "results"))
    records = read_records(folder)
    if any(("--steps", "8") == tuple(r["args"][:2]) for r in records.values()) != o.quick and records:
        raise InputError(f"--output_dir {folder}: holds {'no ' if o.quick else 'a '}quick run; choose another folder")
    try:
        run_all(o, folder, records, lambda o, records: plan.wanted(o, plan.all_jobs(o, records)))
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        os._exit(130)  # without waiting for the runs, which end with this process
    write_records(folder, records)
    report.write(folder, o, records, plan.all_jobs(o, records))
    print(f"{folder / 'report.md'}: {len(records)} runs")


if __name__ == "__main__":
    run_command(main)
