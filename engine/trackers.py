"""Trackers: metrics.jsonl's rows in TensorBoard, Weights & Biases or Trackio as well, each phase a run of theirs.

None is imported unless `--report_to` names it. By tracker.json a resumed run reports no step twice."""

import json
import re
from dataclasses import asdict
from functools import lru_cache
from importlib import import_module
from uuid import uuid4

from config import InputError
from engine.files import RANK, escaped, write_json

COLUMNS = ["kind", "prompt", "completion", "reward"]


def named(row):
    """A row's numbers by a tracker's names: reward → train/reward, eval_recall → eval/recall, seconds_update → …"""
    known = [name for name in row if isinstance(row[name], int | float) and name not in ("stage", "step")]
    return {re.sub("^(eval|score|seconds)_|^", lambda m: f"{m[1] or 'train'}/", n, count=1): row[n] for n in known}


@lru_cache(maxsize=1)
def opened(run, phase, own):
    """A phase's run in the tracker, gone on with where there is one. own: what tells our run from others."""
    kind, name = run.config.report_to, f"{phase}-{own}"
    if kind == "tensorboard":
        return import_module("torch.utils.tensorboard").SummaryWriter(run.folder / "tensorboard" / phase)
    how = dict(project="rerule", name=name, group=f"{run.folder.name}-{own}", config=asdict(run.config), resume="allow")
    more = dict(id=name, dir=run.folder, reinit="finish_previous") if kind == "wandb" else {}
    try:
        return import_module(kind).init(**how, **more)
    except Exception as error:  # no key, no network, whatever a tracker raises
        raise InputError(f"--report_to {kind}: cannot be opened ({error!r:.200})") from None


def report(run, row, rollouts=()):
    """A row, with some rollouts as lists of COLUMNS. One without a step, a phase's scores, is the phase's last."""
    kind, phase, path = run.config.report_to, row["method"], run.folder / "tracker.json"
    if RANK or kind == "none":
        return
    known = json.loads(path.read_text()) if path.exists() else {"own": uuid4().hex[:8], "last": {}}
    last = known["last"].get(phase, 0)
    if row.get("step", last + 1) <= last:
        return
    live, step = opened(run, phase, known["own"]), row.get("step", last)
    if kind == "tensorboard":
        for name, value in named(row).items():
            live.add_scalar(name, value, step)
        lines = [COLUMNS, ["---"] * 4, *(map(escaped, rollout) for rollout in rollouts)]
        if rollouts:
            live.add_text("completions", "\n".join(f"| {' | '.join(line)} |" for line in lines), step)
        live.flush()
    else:
        table = {"completions": import_module(kind).Table(columns=COLUMNS, data=rollouts)} if rollouts else {}
        live.log(named(row) | table, step=step)
    if "step" not in row:
        (live.close if kind == "tensorboard" else live.finish)()
        opened.cache_clear()
    known["last"][phase] = step
    write_json(path, known)
