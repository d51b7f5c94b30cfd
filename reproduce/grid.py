"""Each baseline's learning rate: every rate of a grid on seeds that no table uses, and the best one for each method.

The paper names no rate for its baselines. A score is averaged over the seeds, 0 for a run that diverged. What is chosen
stands in results/rates_<benchmark>.json, where the driver reads it. Killed, a command goes on where it was."""

from dataclasses import dataclass
from pathlib import Path

from baselines import TITLES
from config import Config, Count, InputError, setting
from engine.files import write_json, write_text
from engine.flags import check_bounds, parse, run_command
from engine.plots import mean
from reproduce import WORDS, read_json, table
from reproduce.jobs import read_records, run_all
from reproduce.plan import BASELINES, Job
from reproduce.records import score

EXAMPLES = WORDS["examples"]["grid"]


@dataclass
class Options:
    """Try every rate for every method on the given seeds; write results/rates_<benchmark>.json and .md."""

    benchmark: str = setting("A benchmark, for its tiny model.", Config.benchmark)
    data_dir: str = setting("The benchmark's folder.", "")
    method: list[str] = setting("Methods.", BASELINES)
    rates: list[float] = setting("Learning rates.", [3e-5, 1e-4, 3e-4, 1e-3, 3e-3])
    seeds: list[int] = setting("Seeds.", [11, 12])
    runs: str = setting("Folder for the runs.", "runs/grid")
    results: str = setting("Folder for the outcome.", "results")
    workers: Count = setting("Runs at a time, one thread each.", 2)


def all_jobs(o, _):
    """A base run for each seed, then all methods at each rate from its models. "@": records without each group."""
    data, bases, jobs = ("--data_dir", "{data_dir}", "--model", "tiny") if o.data_dir else (), [], []
    for seed in o.seeds:
        shared = "--benchmark", o.benchmark, *data, "--eval_every", "0", "--seed", str(seed), "--method"
        bases.append(Job(f"base_{seed}", "base@", seed, (*shared, "rej_steer"), None, 45))
        for rate in o.rates:
            args = *shared, *o.method, "--baseline_lr", str(rate)
            jobs.append(Job(f"{seed}_{rate:g}", f"grid@{rate:g}", seed, args, f"base_{seed}", 65))
    return bases + jobs


def outcome(tables, o):
    """tables: {(seed, rate): {title: row}} → {method: {"best": rate, "scores": {rate: [one for each seed]}}}."""
    found = {}
    for method in o.method:
        scores = {rate: [score(tables[seed, rate][TITLES[method]]) for seed in o.seeds] for rate in o.rates}
        found[method] = {"best": max(o.rates, key=lambda rate: mean(scores[rate])), "scores": scores}
    return found


def shown(found, o):
    """The table of `outcome`, the best rates bold."""
    lines = []
    for method, row in found.items():
        cells = {rate: ", ".join(f"{value:.0f}" for value in own) for rate, own in row["scores"].items()}
        lines.append([TITLES[method], *(f"**{c}**" if rate == row["best"] else c for rate, c in cells.items())])
    head = f"| {o.benchmark}, seeds {', '.join(map(str, o.seeds))} | {' | '.join(f'{rate:g}' for rate in o.rates)} |"
    return table(lines, head) + "\n"


def main(argv=None):
    o = parse(Options, argv, examples=EXAMPLES)
    check_bounds(o)
    folder, stored = Path(o.runs) / o.benchmark, Path(o.results) / f"rates_{o.benchmark}.json"
    for name in o.method:
        if name not in BASELINES:
            raise InputError(f"--method {name}: expected some of {', '.join(BASELINES)}")
    if stored.exists() and not set(read_json(stored)) <= set(o.method):
        raise InputError(f"--results {o.results}: {stored.name} holds methods that --method leaves out; choose another")
    run_all(o, folder, read_records(folder), all_jobs)
    runs = [(seed, rate) for seed in o.seeds for rate in o.rates]
    found = outcome({run: read_json(folder / "runs" / "{}_{:g}".format(*run) / "table.json") for run in runs}, o)
    stored.parent.mkdir(parents=True, exist_ok=True)
    write_json(stored, found)
    write_text(stored.with_suffix(".md"), shown(found, o))
    print(shown(found, o))


if __name__ == "__main__":
    run_command(main)
