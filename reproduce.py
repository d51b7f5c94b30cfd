"""The paper in miniature: runs or resumes what is missing of a plan, then writes results/report.md and its figures.

Covers every table, figure and ablation of the paper on the built-in world, Table 5 on real TOFU text with a tiny model,
and controls that the paper lacks. The plan is in `experiments.py`, records and statistics in `analysis.py`, verdicts in
`claims.py`, the text in `tables.py` and `writeup.py`, pictures in `figures.py`.

What is kept: records.json, all that the report is made of, which a later call reads and adds to; and of each run in
runs/ its settings, table, metrics and samples. A run's own curves are not drawn, and its models go once no other run
starts from them.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two runs at a time, one core each: before torch is imported

import config as settings  # it sets OMP_WAIT_POLICY

# isort: split
import contextlib
import gzip
import importlib.metadata
import json
import multiprocessing
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import analysis
from config import setting
from experiments import SECTIONS, plan, wanted
from files import InputError, exit_on_input_error, write_json, write_text

BAR = "{desc} |{bar}| {percentage:3.0f} %, {elapsed} gone{postfix}"


@dataclass
class Options:
    """Make the report of every table, figure and ablation; a later call goes on where an earlier one stopped."""

    only: list[str] = setting(f"Parts of the report to run, some of: {' '.join(SECTIONS)}. All unless given.", [])
    seeds: int = setting("Seeds of the report, from 21 on; baselines and TOFU use 3 at most.", 8)
    output_dir: str = setting("Folder for the report, its figures and records. [results; with --quick runs/quick]", "")
    tofu_dir: str = setting("Folder with TOFU's files; without one its table is left out.", "")
    quick: bool = setting("Two seeds at most, one to choose on, and fewer steps: to see it work.", False)
    workers: int = setting("Runs at a time, one thread each.", 2)


# --- one job, in a worker process ------------------------------------------------------------------------------------


def start_worker():
    """A worker ends with its parent, however that ended, so that no two ever write one run's folder."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def work(job, runs, tofu_dir, about):
    """Run one job in runs/<name> and write its record. Returns a line that says what was wrong, or None."""
    import torch

    torch.set_num_threads(1)
    folder, started = runs / job.name, time.perf_counter()
    (runs / "logs").mkdir(parents=True, exist_ok=True)
    with (
        open(runs / "logs" / f"{job.name}.log", "a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        try:
            if job.family == "probe":
                from gradients import probe

                folder.mkdir(exist_ok=True)
                record = probe(runs / job.start, json.loads((runs / job.start / "record.json").read_text()))
            else:
                drive([*(arg.format(tofu_dir=tofu_dir) for arg in job.args), "--resume", "--output_dir", str(folder)]
                      + (["--start_from", str(runs / job.start)] if job.start else []))  # fmt: skip
                record = analysis.record(folder)
        except InputError as error:
            return f"{job.name}: {error}"
    record = {"family": job.family, "seed": job.seed, "args": list(job.args), **about, **record}
    if not (folder / "record.json").exists():  # a base run made again for its models keeps its first record
        write_json(folder / "record.json", record | {"seconds": round(time.perf_counter() - started, 1)})
    return None


def drive(args):
    """`python rerule.py args`, in this process; a run's own figures are not drawn."""
    import report
    import rerule

    report.draw_curves = report.draw_scatter = lambda *_: None
    before, sys.argv = sys.argv, ["rerule.py", *args]
    try:
        rerule.main()
    finally:
        sys.argv = before


def trim(folder):
    """Keep of a finished run what can be read: settings, table, metrics, record, and samples packed."""
    for path in folder.iterdir():
        if path.name == "samples.jsonl":
            with gzip.open(folder / "samples.jsonl.gz", "wb") as packed:
                packed.write(path.read_bytes())
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("config.json", "table.json", "metrics.jsonl", "record.json", "samples.jsonl.gz"):
            path.unlink()


# --- all jobs --------------------------------------------------------------------------------------------------------


def about():
    """What a record says of where it comes from: the code's commit and the versions."""
    here = Path(__file__).parent

    def git(*args):
        done = subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = git("status", "--porcelain", "--", *(path.name for path in here.glob("*.py")))
    commit = (git("rev-parse", "--short=12", "HEAD") or "unknown") + (" with uncommitted changes" if changed else "")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy", "scipy")}
    return {"commit": commit, "versions": {"python": platform.python_version(), **versions}}


def read_records(folder):
    """{name: record}: those of records.json, then those of finished runs that are not in it yet."""
    path, records = folder / "records.json", {}
    if path.exists():
        try:
            records = json.loads(path.read_text(encoding="utf-8"))["runs"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise InputError(f"{path}: cannot be read ({error!r:.80}); choose another --output_dir") from None
    for path in sorted(folder.glob("runs/*/record.json")):
        records.setdefault(path.parent.name, json.loads(path.read_text(encoding="utf-8")))
    return records


def write_records(folder, records):
    """records.json: one line a run, sorted, so that the same runs give the same file."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(records[name])}" for name in sorted(records))
    write_text(folder / "records.json", '{"runs": {\n' + lines + "\n}}\n")


def run_all(o, folder, records):
    """Run what is missing, longest chains first, and put every record into `records`."""
    runs, source = folder / "runs", about()
    is_done = lambda job: job.name in records and tuple(records[job.name]["args"]) == job.args  # noqa: E731
    if all(is_done(job) for job in wanted(o, plan(o, records))):
        return
    runs.mkdir(parents=True, exist_ok=True)
    context, running, bar = multiprocessing.get_context("spawn"), {}, None
    with ProcessPoolExecutor(o.workers, context, start_worker) as pool:
        while True:
            jobs = wanted(o, plan(o, records))
            missing = [job for job in jobs if not is_done(job)]
            needed, busy = {job.start for job in missing}, {job.name for job in running.values()}
            again = [job for job in jobs if job.name in needed and is_done(job) and not has_models(runs / job.name)]
            bar = bar or tqdm(total=round(sum(job.cost for job in missing + again)), dynamic_ncols=True, bar_format=BAR)
            for path in runs.iterdir():
                if path.name in records and path.name not in needed | busy:
                    trim(path)
            ready = [job for job in again + missing if job.name not in busy and job.args is not None]
            ready = [job for job in ready if not job.start or (job.start not in busy and has_models(runs / job.start))]
            for job in ready[: o.workers - len(running)]:
                if not is_done(job) and (runs / job.name / "record.json").exists():
                    shutil.rmtree(runs / job.name)  # of another plan
                running[pool.submit(work, job, runs, o.tofu_dir, source)] = job
            if not running:
                break
            names = ", ".join(job.name for job in running.values())
            bar.set_description_str(f"{len(jobs) - len(missing)} of {len(jobs)} runs; now {names}", refresh=False)
            bar.set_postfix_str(time_left(bar.total - bar.n, bar.n, bar.format_dict["elapsed"], o.workers))
            done, _ = wait(running, timeout=2, return_when=FIRST_COMPLETED)
            for future in done:
                job, problem = running.pop(future), result_of(future)
                if problem:
                    bar.write(f"{problem} (see {runs / 'logs' / job.name}.log)")
                    raise InputError(f"the run {job.name} failed; once that is mended, the same command goes on")
                if not is_done(job):
                    records[job.name] = json.loads((runs / job.name / "record.json").read_text(encoding="utf-8"))
                bar.update(round(job.cost))
    bar.close()


def result_of(future):
    """What a worker said, or that it was killed."""
    try:
        return future.result()
    except BrokenProcessPool:
        return "its process was killed, perhaps for want of memory"


def time_left(cost_left, cost_done, elapsed, workers):
    """Minutes left: by the speed so far, or by the plan's seconds before anything is done."""
    seconds = cost_left * elapsed / cost_done if cost_done else cost_left / workers
    return f"about {max(1, round(seconds / 60))} min left"


def has_models(folder):
    """Whether a finished run still has its models: `trim` takes its table.md with them."""
    return (folder / "record.json").exists() and (folder / "table.md").exists()


def main(argv=None):
    o = settings.parse(Options, argv)
    for name in o.only:
        if name not in SECTIONS:
            raise InputError(f"--only {name}: expected some of {', '.join(SECTIONS)}")
    if o.seeds < 2 or o.workers < 1:
        raise InputError("--seeds, --workers: expected at least 2 seeds, whose spread is told, and 1 worker")
    if o.tofu_dir and not (Path(o.tofu_dir) / "forget01.json").is_file():
        raise InputError(f"--tofu_dir {o.tofu_dir}: holds no forget01.json")
    o.seeds = min(o.seeds, 2) if o.quick else o.seeds
    folder = Path(o.output_dir or ("runs/quick" if o.quick else "results"))
    records = read_records(folder)
    if any(("--steps", "14") == tuple(r["args"][:2]) for r in records.values()) != o.quick and records:
        raise InputError(f"--output_dir {folder}: holds {'no ' if o.quick else 'a '}quick run; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        run_all(o, folder, records)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        os._exit(130)  # without waiting for the runs, which end with this process
    write_records(folder, records)
    import writeup

    writeup.write(folder, o, records, plan(o, records))
    print(f"{folder / 'report.md'}: {len(records)} runs")


if __name__ == "__main__":
    exit_on_input_error(main)
