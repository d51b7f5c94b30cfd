"""Targets that nobody tuned for: RWKU's published data and queries about what stands beside a target, on five of them.

The runs are those of `targets.json`; it says which targets a setting was chosen on. Writes results/targets/."""

from dataclasses import dataclass

from config import Count, setting
from engine.flags import check_bounds, parse, run_command
from reproduce import HERE, read_json
from reproduce.jobs import read_records, run_all, write_records
from reproduce.plan import FIRST_SEED, jobs_of_row
from pathlib import Path

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
    """Every run: by seed, targets reported on first; a family is <condition>@<target>."""
    jobs, seeds = [], range(FIRST_SEED, FIRST_SEED + o.seeds)
    for condition, given in PLAN["conditions"].items():
        for target in PLAN["targets"]:
            own = PLAN["tofu"].get(condition, given["flags"]) if target == "tofu" else given["flags"]
            own = f"{PLAN['data'].get(target, PLAN['data']['rwku'])} {own}".replace("TARGET", target)
            row = given | {"flags": own} | ({"start": f"{given['start']}@{target}"} if "start" in given else {})
            jobs += jobs_of_row(o, records, f"{condition}@{target}", row, seeds, tuple(own.split()))
    late = lambda job: job.seed + 2.5 * (PLAN["targets"][job.family.split("@")[1]] == "chosen on")  # noqa: E731
    return sorted(jobs, key=lambda job: (job.family.startswith("baselines"), late(job)))


def main(argv=None):
    o = parse(Options, argv)
    check_bounds(o)
    folder = Path(o.output_dir)
    records = read_records(folder)
    run_all(o, folder, records, all_jobs)
    write_records(folder, records)
    print(f"{folder / 'report.md'}: {len(records)} runs")


if __name__ == "__main__":
    run_command(main)
