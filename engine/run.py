"""One run's folder and state: its logs, which phases are over, what resuming needs, and the loop that most phases are.

Each phase saves its state every few steps together with the lengths of both logs; a resumed run cuts the logs back to
those lengths and goes on. A phase is over once its model's folder is in place."""

import fcntl
import importlib
import json
import math
import os
import shutil
import sys
import time
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import torch

from baselines import TITLES
from config import Config, InputError
from engine import fast, report, trackers
from engine.bars import Bar
from engine.files import RANK, Log, about, is_writable, now, read_lines, read_rows, replacing, save_folder, write_json
from engine.model import optimizer_for
from engine.process import Engine
from engine.seeds import batch_at, derive_seed
from sft import learning_rate, sft_loss_of

warnings.filterwarnings("ignore", message="Detected pickle protocol")  # what is no state is refused in any case
UNFINISHED = ("config.json.tmp", ".lock")  # of a run that was killed as it began
LOCKS = {}  # folder → the file that is locked
EARLY = ("original", "retained", "rej_steer")  # phases before Stage 2, which `--start_from` takes over
# what a run may be gone on with
FREE = {"resume", "save_every", "output_dir", "device", "start_from", "dry_run", "offload", "rollout_prompts",
        "max_tokens", "eval_batch_size", "gradient_checkpointing", "cuda_graphs", "report_to"}  # fmt: skip
BEFORE_STAGE_2 = [
    "benchmark", "crossed", "model", "tokenizer", "data_dir", "seed", "retain_log", "weight_decay", "max_grad_norm",
    "temperature", "max_new_tokens", "save_dtype", "held_out",
    *(f.name for f in fields(Config) if f.name.startswith(("sft_", "tiny_", "lora_"))),
]  # fmt: skip


def differences(ours, theirs, names=None):
    """The settings, all but `FREE` unless named, in which a new command differs from a stored run: "name old → new"."""
    names = names or [f.name for f in fields(Config) if f.name not in FREE]
    pairs = [(name, theirs.get(name), getattr(ours, name)) for name in names]
    return [f"{name} {old} → {new}" for name, old, new in pairs if old != new]


def read(path, expected, flag):
    """A JSON file or saved state of an earlier run, which must hold the key `expected`."""
    try:
        as_json = path.suffix == ".json"
        found = json.loads(path.read_bytes()) if as_json else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # whatever JSON, pickle or zip say of bytes that are none of theirs
        raise InputError(f"{path}: cannot be read ({error!r:.80}); choose another --{flag}") from None
    if not isinstance(found, dict) or expected not in found:
        raise InputError(f"{path}: is not that of a run (no '{expected}'); choose another --{flag}")
    if not as_json and not is_state(found):
        raise InputError(f"{path}: is no state of a run; choose another --{flag}")
    return found


def is_state(found):
    """Whether what a file holds has the form that `Run.save` gives it."""
    done, phase, sizes, payload = (found.get(name) for name in ("done", "phase", "sizes", "payload"))
    try:
        parts = [sizes[name] for name in ("metrics", "samples")]
        whole = all([*map(type, part)] == [int, int] and min(part) >= 0 for part in parts)
        whole = whole and all(isinstance(row.get("notes", []), list) for row in done.values())
        whole = whole and all("notes" in row for name, row in done.items() if name.endswith(" scored"))
        if phase is None:
            return whole and payload is None
        kept = phase in TITLES and phase not in done and type(found["step"]) is int and found["step"] > 0
        kept = kept and isinstance(payload["seconds"], float) and isinstance(payload["over"], bool | str)
        return whole and kept and ("shards" in payload or {"model", "optimizer"} <= payload.keys())
    except (KeyError, TypeError, AttributeError):
        return False


def link(path, target):
    """The same bytes under another name, or a copy on another disk."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copy2(path, target)


def start(config):
    """The engine that a run's settings, and torchrun, ask for."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no GPU is available")
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    if config.cuda_graphs and device == "cpu":
        raise InputError("--cuda_graphs: no GPU is available")
    if config.lora_rank:
        from engine import lora

        lora.check(config)
    kind = Engine
    if config.offload or "WORLD_SIZE" in os.environ:
        from scale.ranks import Ranks as kind
    engine = kind(device, config.max_tokens, config.rollout_prompts, config.tokenizer)
    if config.cuda_graphs:
        engine.graphs = bool(importlib.import_module("engine.graphs"))  # it adds its way to `fast.WAYS`
    return engine


class Run:
    """The output folder of one run: logs, last saved state, phases that are over. It is read here, made by `open`."""

    def __init__(self, config, engine):
        self.config, self.engine, self.folder, self.starts = config, engine, Path(config.output_dir), []
        self.source = {}  # phases that `start_from` takes over
        self.state = {"done": {}, "phase": None, "sizes": {"metrics": (0, 0), "samples": (0, 0)}}
        here = f"--output_dir {self.folder}"
        if not is_writable(self.folder):
            raise InputError(f"{here}: expected a folder that can be made or written to")
        if (self.folder / "config.json").exists():
            stored = read(self.folder / "config.json", "benchmark", "output_dir")
            changed, starts = differences(config, stored), stored.get("starts")
            self.starts = starts if isinstance(starts, list) else []
            if changed:
                raise InputError(f"{here}: holds another run ({', '.join(changed[:3])}); choose another folder")
            self.lock()
            if (self.folder / "state.pt").exists():
                self.state = read(self.folder / "state.pt", "sizes", "output_dir")
            if not config.resume and not self.finished("run"):
                raise InputError(f"{here}: holds an unfinished run; add --resume to go on with it")
            for name, (size, crc) in () if self.finished("run") else self.state["sizes"].items():
                path = self.folder / f"{name}.jsonl"
                held = path.read_bytes()[:size] if path.exists() else b""
                if len(held) < size or zlib.crc32(held) != crc:
                    how = "shorter than" if len(held) < size else "not the log of"
                    raise InputError(f"{path}: is {how} the saved state of the run; choose another --output_dir")
        elif self.folder.exists() and any(path.name not in UNFINISHED for path in self.folder.iterdir()):
            raise InputError(f"{here}: is not empty and holds no run; choose another folder")
        if config.start_from and not self.state["done"]:
            self.check_source(Path(config.start_from))

    def lock(self):
        """Raise InputError where another process writes to this folder. The system frees the lock of one that ended."""
        if not RANK and self.folder.is_dir():
            LOCKS[self.folder.resolve()] = file = open(self.folder / ".lock", "a")  # open for as long as the process
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"--output_dir {self.folder}: another process is writing to it") from None

    def check_source(self, source):
        """Raise InputError unless the run in `source` trained, before Stage 2, what this one would."""
        here = f"--start_from {source}"
        if not (source / "config.json").is_file() or not (source / "state.pt").is_file():
            raise InputError(f"{here}: is no folder of a run")
        stored = read(source / "config.json", "seed", "start_from")
        changed = differences(self.config, stored, BEFORE_STAGE_2)
        changed += [f"no --attack {name}" for name in self.config.attack if name not in stored.get("attack", [])]
        if changed:
            raise InputError(f"{here}: trained other models before Stage 2 ({', '.join(changed[:3])})")
        self.source = read(source / "state.pt", "done", "start_from")["done"]
        if "rej_steer scored" not in self.source:
            raise InputError(f"{here}: its Stage 1 is not over")
        read_rows(source / "metrics.jsonl", {"method": str})  # what `adopt` reads
        for phase in [name for name in EARLY if f"{name} scored" in self.source]:
            read_rows(source / "predictions" / f"{phase}.jsonl", {})

    def adopt(self, source):
        """Take over the phases before Stage 2: their models (linked where the disk allows), answers and log rows."""
        linked = partial(shutil.copytree, copy_function=link, dirs_exist_ok=True)
        for phase in [name for name in EARLY if f"{name} scored" in self.source]:
            save_folder(self.folder / phase, partial(linked, source / phase))
            report.save_examples(self.folder, phase, read_lines(source / "predictions" / f"{phase}.jsonl"))
            if self.config.attack:
                (self.folder / "attacks").mkdir(exist_ok=True)
                shutil.copy(source / "attacks" / f"{phase}.json", self.folder / "attacks")
            self.state["done"] |= {name: found for name, found in self.source.items() if name.split()[0] == phase}
        for row in read_lines(source / "metrics.jsonl"):
            if row["method"] in EARLY:
                self.metrics.write(row)
        self.save(None, 0, None)

    def open(self, model=None):
        """Make the folder, or go on with it. model: the original one of a run at full size, whose disk is looked at."""
        if model is not None:
            from scale.memory import check_disk

            over = {name.split()[0] for name in self.state["done"] | self.source}
            left = replace(self.config, method=[name for name in self.config.method if name not in over])
            check_disk(sum(p.numel() for p in model.parameters()), left, self.folder, self.engine.half)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output_dir {self.folder}: cannot be made ({error.strerror})") from None
        self.lock()
        self.engine.forget_states(self.folder, (self.state.get("payload") or {}).get("shards"))
        ways = self.folder / "ways.json"
        self.ways = read_rows(ways, {})[0] if ways.exists() else {}  # of the processes before
        start = {"command": sys.argv, **about(), "device": str(self.engine.device)}
        write_json(self.folder / "config.json", asdict(self.config) | {"starts": [*self.starts, start]})
        self.metrics = Log(self.folder / "metrics.jsonl", *self.state["sizes"]["metrics"])
        self.samples = Log(self.folder / "samples.jsonl", *self.state["sizes"]["samples"])
        if self.config.start_from and not self.state["done"]:
            self.adopt(Path(self.config.start_from))

    def log(self, row, rollouts=()):
        """Write a step's row with the time of day; a tracker gets some of its rollouts too."""
        row["time"] = now()
        self.metrics.write(row)
        trackers.report(self, row, rollouts)

    def finished(self, phase):
        return phase in self.state["done"]

    def save(self, phase, step, payload, model=None, optimizer=None):
        if model is not None:
            payload = payload | self.engine.state_of(model, optimizer, self.folder, f"shards_{phase}_{step}")
        write_json(self.folder / "ways.json", self.ways | self.engine.ways)
        sizes = {name: (log.size(), log.crc) for name, log in (("metrics", self.metrics), ("samples", self.samples))}
        self.state = {"done": self.state["done"], "phase": phase, "step": step, "sizes": sizes}
        if not RANK:
            with replacing(self.folder / "state.pt") as temporary, open(temporary, "wb") as file:
                torch.save(self.state | {"payload": payload}, file)  # not held: a model let go of shall be free
                file.flush()
                os.fsync(file.fileno())  # a kill in mid-save keeps the last state
        self.engine.forget_states(self.folder, (payload or {}).get("shards"))

    def finish(self, phase, result):
        """Mark a phase as over, with what the table needs of it. Its model folder must be in place by now."""
        name, _, scored = phase.partition(" ")
        if scored and (self.folder / name).is_dir():
            report.write_card(self.folder / name, name, self.config, result)
        self.state["done"][phase] = result
        self.save(None, 0, None)
        if scored:
            trackers.report(self, {"method": name, **{f"score_{column}": result[column] for column in result}})

    def rows(self):
        """{phase: its evaluation} of every phase scored so far, for the table."""
        return {name.split()[0]: result for name, result in self.state["done"].items() if name.endswith(" scored")}

    def save_model(self, phase, model, tokenizer):
        """Leave a phase's model as a Hugging Face folder, in `--save_dtype`. The model is of no use afterwards."""
        half = self.config.save_dtype == "bfloat16" or (self.config.save_dtype == "auto" and self.engine.half)
        model, weights = self.engine.plain(model, torch.bfloat16 if half else torch.float32)

        def fill(folder):
            model.save_pretrained(folder, **({"state_dict": weights} if weights else {}))
            tokenizer.save_pretrained(folder)
            for path in folder.rglob("*.safetensors"):  # its library lets nobody else read them
                path.chmod(folder.stat().st_mode & 0o666)

        save_folder(self.folder / phase, fill)
        self.engine.wait()


class Phase:
    """One training loop of a run: steps from where its last state was saved, clocks, and a state every few steps.
    buffer: what else is saved, by `state` and `restore`. `over`, True or why training failed, ends the loop."""

    def __init__(self, run, name, steps, model, optimizer, buffer=None):
        self.run, self.name, self.model, self.optimizer, self.buffer = run, name, model, optimizer, buffer
        self.first, self.total, self.seconds, self.over = 1, 0.0, {}, False
        if run.state["phase"] == name:
            payload, self.first = run.state.pop("payload"), run.state["step"] + 1
            self.total, self.over = payload["seconds"], payload["over"]
            try:
                if self.first > steps + 1:
                    raise ValueError("it has more steps")
                if "shards" in payload:  # written by several processes
                    from scale.ranks import restore_shards

                    restore_shards(payload, run.folder, model, optimizer)
                else:
                    run.engine.restore(payload, model, optimizer)
                if buffer is not None:
                    buffer.restore(payload)
            except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                where, reason = run.folder / "state.pt", f"{[*str(error).splitlines(), ''][0]:.80}"
                raise InputError(f"{where}: does not fit the model of {name} ({reason})") from None
        self.bar = Bar(range(self.first, steps + 1), desc=name, initial=self.first - 1, total=steps)

    def __iter__(self):
        for step in self.bar:
            if self.over:
                return
            self.seconds = {}
            yield step
            if self.run.config.save_every and step % self.run.config.save_every == 0:
                payload = {"seconds": self.total, "over": self.over}
                payload |= {} if self.buffer is None else self.buffer.state()
                self.run.save(self.name, step, payload, self.model, self.optimizer)

    @contextmanager
    def clock(self, part):
        """Count the seconds spent inside, for this step and in all."""
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        self.seconds[part] = self.seconds.get(part, 0.0) + spent
        self.total += spent


def descend(run, phase, stage, model, loss_of, *, steps, lr, warmup, stop=None):
    """The loop of every training but Stage 2: an optimiser step on `loss_of(step)`, a scalar with its graph; resumable.
    stop(step) → (more for the log, whether to end: False, True, or why training failed).
    Returns: seconds; why it stopped before its time, or None. A gradient that is not finite changes no weights."""
    config, engine = run.config, run.engine
    optimizer = optimizer_for(model, lr, config.weight_decay)
    steps = Phase(run, phase, steps, model, optimizer)
    for step in steps:
        with steps.clock("step"):
            torch.manual_seed(derive_seed(config.seed, phase, "dropout", step))
            model.train()
            loss = engine.backward(loss_of(step))
            rate = learning_rate(lr, step, steps.bar.total, warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            norm = engine.step(model, optimizer, config.max_grad_norm)
            model.eval()
            if not math.isfinite(norm):
                steps.over = f"a gradient is not finite at step {step}"
                break
            more, over = stop(step) if stop else ({}, False)
            steps.over = f"{over} at step {step}" if isinstance(over, str) else over
        shown = {name: f"{value:.3g}" for name, value in more.items() if value is not None}
        steps.bar.set_postfix(loss=f"{loss:.3f}", **shown)
        row = {"method": phase, "stage": stage, "step": step, "loss": loss, "reward": None, "kl": None}
        run.log(row | {"grad_norm": norm, **more, "lr": rate, "seconds": steps.total})
    return steps.total, steps.over if isinstance(steps.over, str) else None


def fit(run, phase, stage, model, rows, *, steps, lr, batch_size, warmup, stop=None):
    """`descend` by SFT on (prompt ids, answer ids) rows."""

    def loss_of(step):
        batch = [rows[i] for i in batch_at(len(rows), batch_size, step, run.config.seed, phase)]
        own, weight = run.engine.share(batch, lambda row: len(row[1]))
        prompts, answers = zip(*own, strict=True)
        prompts, *past = fast.read_openings(model, prompts) if run.config.model == "tiny" else [prompts]
        return weight * sft_loss_of(model, [*zip(prompts, answers, strict=True)], *past)

    return descend(run, phase, stage, model, loss_of, steps=steps, lr=lr, warmup=warmup, stop=stop)
