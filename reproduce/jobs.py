"""The workers: each job of the plan in a process of its own, some at a time, and the records that they leave."""

import json
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from tqdm import tqdm

from config import InputError
from engine.files import about, remove, write_json, write_text
from engine.flags import check_bounds
from reproduce import read_json
from reproduce.records import record_of

BAR = "{desc} |{bar}| {percentage:3.0f} %, {elapsed} gone, {remaining} left"
TEXTS = {"tofu_dir": "forget01.json", "rwku_dir": "forget_level3.json", "targets_dir": "1_Stephen_King/intro.json"}
KEPT = "config.json table.json metrics.jsonl record.json samples.jsonl samples.jsonl.gz".split()  # gz: once packed


def start_worker():
    """A worker ends with its parent, however that ended, so that no two ever write one run's folder."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def work(job, runs, folders, about):
    """Run one job in runs/<name> and write its record. Returns a line that says what was wrong, or None."""
    import torch

    torch.set_num_threads(1)
    folder, path, started = runs / job.name, runs / "logs" / f"{job.name}.log", time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            if job.family == "probe":
                from reproduce.gradients import probe

                folder.mkdir(exist_ok=True)
                record = probe(runs / job.start, read_json(runs / job.start / "record.json"))
            else:
                import rerule

                if "{book_dir}" in job.args:
                    from reproduce import book

                    folders = {"book_dir": book.write(runs / f"{job.name}_data", job.seed)}
                flags = ["--held_out", "0", *(arg.format(**folders) for arg in job.args)]  # 0 unless a plan says more
                flags += ["--resume", "--output_dir", str(folder)]
                flags += ["--start_from", str(runs / job.start)] if job.start else []
                rerule.main(rerule.configure(flags), figures=False)
                record = record_of(folder, whole="@" not in job.family)
        except InputError as error:
            return f"{job.name}: {error}"
    record = {"family": job.family, "seed": job.seed, "args": list(job.args), **about, **record}
    if not (folder / "record.json").exists():  # a base run made again for its models keeps its first record
        write_json(folder / "record.json", record | {"seconds": round(time.perf_counter() - started, 1)})


def read_records(folder):
    """{name: record}: those of records.json, then those of finished runs that are not in it yet."""
    path = folder / "records.json"
    try:
        records = dict(read_json(path)["runs"]) if path.exists() else {}
        for path in sorted(folder.glob("runs/*/record.json")):
            records.setdefault(path.parent.name, read_json(path))
        for name, record in records.items():
            if not {"args", "family", "seed"} <= record.keys() or not isinstance(record["args"], list):
                raise ValueError(f"{name} is no record")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error!r:.80}); choose another --output_dir") from None
    return records


def write_records(folder, records):
    """records.json: one line a run, sorted, so that the same runs give the same file."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(records[name])}" for name in sorted(records))
    write_text(folder / "records.json", '{"runs": {\n' + lines + "\n}}\n")


def run_all(o, folder, records, jobs_of):
    """Run what is missing of the jobs and put their records into `records`. InputError: also of a failed run."""
    runs, source, folders = folder / "runs", about(), {flag: getattr(o, flag, "") for flag in TEXTS}
    for flag, place in folders.items():
        if place and not Path(place, TEXTS[flag]).is_file():
            raise InputError(f"--{flag} {place}: holds no {TEXTS[flag]}")
    is_done = lambda job: job.name in records and tuple(records[job.name]["args"]) == job.args  # noqa: E731
    if all(is_done(job) for job in jobs_of(o, records)):
        return
    runs.mkdir(parents=True, exist_ok=True)
    context, running, bar = multiprocessing.get_context("spawn"), {}, None
    pool = ProcessPoolExecutor(o.workers, context, start_worker)  # not awaited where the user interrupts
    while True:
        jobs = jobs_of(o, records)
        missing = [job for job in jobs if not is_done(job)]
        needed, busy = {job.start for job in missing}, {job.name for job in running.values()}
        again = [job for job in jobs if job.name in needed and is_done(job) and not has_models(runs / job.name)]
        bar = bar or tqdm(total=round(sum(job.cost for job in missing + again)), dynamic_ncols=True, bar_format=BAR)
        for name in records.keys() - needed - busy:
            for path in sorted((runs / name).glob("*")):
                if path.name not in KEPT:
                    remove(path)
        ready = [job for job in again + missing if job.name not in busy and job.args is not None]
        ready = [job for job in ready if not job.start or (job.start not in busy and has_models(runs / job.start))]
        for job in ready[: o.workers - len(running)]:
            if not is_done(job) and (runs / job.name / "record.json").exists():
                remove(runs / job.name)  # of another plan
            running[pool.submit(work, job, runs, folders, source)] = job
        if not running:
            break
        names = ", ".join(job.name for job in running.values())
        bar.set_description_str(f"{len(jobs) - len(missing)} of {len(jobs)} runs; now {names}", refresh=False)
        done, _ = wait(running, timeout=2, return_when=FIRST_COMPLETED)
        for future in done:
            job = running.pop(future)
            try:
                problem = future.result()
            except BrokenProcessPool:
                problem = "its process was killed, perhaps for want of memory"
            if problem:
                bar.write(f"{problem} (see {runs / 'logs' / job.name}.log)")
                raise InputError(f"the run {job.name} failed; once that is mended, the same command goes on")
            if not is_done(job):
                records[job.name] = read_json(runs / job.name / "record.json")
            bar.update(round(job.cost))
    bar.close()


def study(o, jobs_of, write):
    """Runs, or resumes, what is missing of a plan; then write(folder, records) makes its report."""
    check_bounds(o)
    folder = Path(o.output_dir)
    records = read_records(folder)
    run_all(o, folder, records, jobs_of)
    write_records(folder, records)
    write(folder, records)
    print(f"{folder / 'report.md'}: {len(records)} runs")


def has_models(folder):
    """Whether a finished run still has its models: its table.md goes with them."""
    return (folder / "record.json").exists() and (folder / "table.md").exists()
