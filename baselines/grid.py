"""Each baseline's learning rate: every rate of a grid on seeds that no table uses, and the best one for each method.

The paper names no rate for its baselines. A method scores the harmonic mean of what was forgotten, 100 − recall on the
forget probes, and what was kept, recall on the retain probes, averaged over the seeds; a run that diverged scores 0.
What is chosen stands in results/rates_<benchmark>.json, where the driver reads it. One command a benchmark; killed, it
goes on where it was.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from tqdm import tqdm

from baselines import METHODS, TITLES
from config import Config, InputError, setting
from engine.files import write_json, write_text
from engine.flags import parse, run_command

EXAMPLES = [
    "python -m baselines.grid",
    "python -m baselines.grid --method ga npo --rates 1e-4 3e-4 --seeds 11 12 13 --results runs/grid",
    "python -m baselines.grid --benchmark tofu --data_dir DATA/tofu --seeds 11",
]


@dataclass
class Options:
    """Try every rate for every method on the given seeds, two runs at a time; write results/rates_<benchmark>.md."""

    benchmark: str = setting("A benchmark, for its tiny model.", Config.benchmark)
    data_dir: str = setting("The benchmark's folder.", "")
    method: list[str] = setting("Methods.", [m for m in METHODS if m not in ("rej_steer", "rule", "rerule")])
    rates: list[float] = setting("Learning rates.", [3e-5, 1e-4, 3e-4, 1e-3, 3e-3])
    seeds: list[int] = setting("Seeds.", [11, 12])
    runs: str = setting("Folder for the runs.", "runs/grid")
    results: str = setting("Folder for the outcome.", "results")


def score(row):
    """Harmonic mean of 100 − forget recall and retain recall; 0 where the run diverged."""
    forgotten, kept = 100 - row["forget_recall"], row["retain_recall"]
    return 0.0 if row.get("stopped") or not forgotten or not kept else 2 * forgotten * kept / (forgotten + kept)


def run(folder, flags):
    """Train unless it is done, in a process of its own with one thread; returns {method: row} of its table."""
    if not (folder / "table.json").exists():
        driver = Path(__file__).parent.parent / "rerule.py"
        command = [sys.executable, str(driver), "--output_dir", str(folder), "--eval_every", "0", *map(str, flags)]
        command += ["--resume"] if (folder / "config.json").exists() else []
        env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"{folder}: the run failed: {done.stderr.strip().splitlines()[-1]}")
    table = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    return {name: table[title] for name, title in TITLES.items() if title in table}


def outcome(rows, o):
    """rows: {(seed, rate): {method: row}} → {method: {"best": rate, "scores": {rate: [one for each seed]}}}."""
    found = {}
    for method in o.method:
        scores = {rate: [score(rows[seed, rate][method]) for seed in o.seeds] for rate in o.rates}
        found[method] = {"best": max(o.rates, key=lambda rate: mean(scores[rate])), "scores": scores}
    return found


def table(found, o):
    lines = [f"| {o.benchmark}, seeds {', '.join(map(str, o.seeds))} | " + " | ".join(f"{r:g}" for r in o.rates) + " |"]
    lines.append("|---|" + "---:|" * len(o.rates))
    for method, row in found.items():
        cells = [", ".join(f"{value:.0f}" for value in row["scores"][rate]) for rate in o.rates]
        cells = [f"**{c}**" if rate == row["best"] else c for c, rate in zip(cells, o.rates, strict=True)]
        lines.append(f"| {TITLES[method]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    o = parse(Options, argv, examples=EXAMPLES)
    folder, results = Path(o.runs) / o.benchmark, Path(o.results)
    shared = ["--benchmark", o.benchmark, *(["--data_dir", o.data_dir, "--model", "tiny"] if o.data_dir else [])]
    jobs = [(seed, rate) for seed in o.seeds for rate in o.rates]
    stored = results / f"rates_{o.benchmark}.json"
    if stored.exists() and not set(json.loads(stored.read_text(encoding="utf-8"))) <= set(o.method):
        raise InputError(f"--results {results}: {stored.name} holds methods that --method leaves out; choose another")

    def base(seed):
        return run(folder / f"base_{seed}", [*shared, "--seed", seed, "--method", "rej_steer"])

    def job(key):
        seed, rate = key
        flags = ["--seed", seed, "--start_from", folder / f"base_{seed}", "--baseline_lr", rate, "--method", *o.method]
        return key, run(folder / f"{seed}_{rate:g}", [*shared, *flags])

    with ThreadPoolExecutor(2) as pool:
        list(tqdm(pool.map(base, o.seeds), desc="models before unlearning", total=len(o.seeds)))
        rows = dict(tqdm(pool.map(job, jobs), desc="grid", total=len(jobs)))
    found = outcome(rows, o)
    results.mkdir(parents=True, exist_ok=True)
    write_json(stored, found)
    write_text(stored.with_suffix(".md"), table(found, o))
    print(table(found, o))


if __name__ == "__main__":
    run_command(main)
