"""One run's folder and state, and what every training loop shares: loading a model, its optimiser, a clock.

What makes a run resumable: each phase saves its state every few steps together with the lengths of both logs; a resumed
run cuts the logs back to those lengths and goes on. A phase is over once its model's folder is in place.
"""

import json
import math
import os
import shutil
import time
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

import config as settings
import parallel
import report
from files import InputError, Log, save_folder, save_state, write_json
from whp import Pair

logging.disable_progress_bar()  # ours are enough


EARLY = ("original", "retained", "rej_steer")  # phases before Stage 2, which `--start_from` takes over


def read(path, expected, flag):
    """A JSON file or saved state of an earlier run, which must hold the key `expected`."""
    try:
        as_json = path.suffix == ".json"
        found = json.loads(path.read_text(encoding="utf-8")) if as_json else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # whatever JSON, pickle or zip say of bytes that are none of theirs
        raise InputError(f"{path}: cannot be read ({error!r:.80}); choose another --{flag}") from None
    if not isinstance(found, dict) or expected not in found:
        raise InputError(f"{path}: is not that of a run (no '{expected}'); choose another --{flag}")
    return found


def link_files(source, folder):
    """Put the files of one folder into another: as links to the same bytes, or as copies on another disk."""
    for path in source.iterdir():
        try:
            os.link(path, folder / path.name)
        except OSError:
            shutil.copy2(path, folder / path.name)


def is_writable(folder):
    """Whether a folder can be written to, or made where it is not there yet."""
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


class Run:
    """The output folder of one run: its logs, its last saved state and which phases are over.

    Making one only reads and checks; `open` makes the folder, once everything else about the run has been checked too.
    """

    def __init__(self, config):
        self.config, self.folder = config, Path(config.output_dir)
        self.state = {"done": {}, "phase": None, "sizes": {"metrics": 0, "samples": 0}}
        here = f"--output_dir {self.folder}"
        if not is_writable(self.folder):
            raise InputError(f"{here}: expected a folder that can be made or written to")
        if (self.folder / "config.json").exists():
            changed = settings.differences(config, read(self.folder / "config.json", "benchmark", "output_dir"))
            if changed:
                raise InputError(f"{here}: holds another run ({', '.join(changed[:3])}); choose another folder")
            if (self.folder / "state.pt").exists():
                self.state = read(self.folder / "state.pt", "sizes", "output_dir")
            if not config.resume and not self.finished("run"):
                raise InputError(f"{here}: holds an unfinished run; add --resume to go on with it")
            for name, size in self.state["sizes"].items():
                path = self.folder / f"{name}.jsonl"
                if not self.finished("run") and size > (path.stat().st_size if path.exists() else 0):
                    raise InputError(f"{path}: is shorter than the saved state of the run; choose another --output_dir")
        elif self.folder.exists() and any(path.suffix != ".tmp" for path in self.folder.iterdir()):
            raise InputError(f"{here}: is not empty and holds no run; choose another folder")
        if config.start_from and not self.state["done"]:
            self.check_source(Path(config.start_from))

    def check_source(self, source):
        """Raise InputError unless the run in `source` trained, before Stage 2, what this one would."""
        here = f"--start_from {source}"
        if not (source / "config.json").is_file() or not (source / "state.pt").is_file():
            raise InputError(f"{here}: is no folder of a run")
        theirs = read(source / "config.json", "seed", "start_from")
        changed = settings.differences(self.config, theirs, settings.BEFORE_STAGE_2)
        if changed:
            raise InputError(f"{here}: trained other models before Stage 2 ({', '.join(changed[:3])})")
        self.source = read(source / "state.pt", "done", "start_from")["done"]
        if "rej_steer scored" not in self.source:
            raise InputError(f"{here}: its Stage 1 is not over")

    def adopt(self, source):
        """Take over the phases before Stage 2: their models (linked where the disk allows), answers and log rows."""
        for phase in [name for name in EARLY if f"{name} scored" in self.source]:
            save_folder(self.folder / phase, lambda folder, phase=phase: link_files(source / phase, folder))
            report.save_examples(self.folder, phase, report.read_lines(source / "predictions" / f"{phase}.jsonl"))
            names = [name for name in (phase, f"{phase} scored") if name in self.source]
            self.state["done"] |= {name: self.source[name] for name in names}
        for row in report.read_lines(source / "metrics.jsonl"):
            if row["method"] in EARLY:
                self.metrics.write(row)
        self.save(None, 0, None)

    def open(self):
        """Make the folder, or go on with it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output_dir {self.folder}: cannot be made ({error.strerror})") from None
        write_json(self.folder / "config.json", asdict(self.config))
        self.metrics = Log(self.folder / "metrics.jsonl", self.state["sizes"]["metrics"])
        self.samples = Log(self.folder / "samples.jsonl", self.state["sizes"]["samples"])
        if self.config.start_from and not self.state["done"]:
            self.adopt(Path(self.config.start_from))

    def finished(self, phase):
        return phase in self.state["done"]

    def saved(self, phase):
        """(step, payload) of the last saved state of this phase, or (0, None)."""
        if self.state["phase"] == phase:
            return self.state["step"], self.state["payload"]
        return 0, None

    def save(self, phase, step, payload, model=None, optimizer=None):
        if model is not None:
            payload = payload | parallel.state_of(model, optimizer, self.folder, f"shards_{phase}_{step}")
        sizes = {"metrics": self.metrics.size(), "samples": self.samples.size()}
        self.state = {"done": self.state["done"], "phase": phase, "step": step, "payload": payload, "sizes": sizes}
        save_state(self.folder / "state.pt", self.state)
        parallel.forget_states(self.folder, (payload or {}).get("shards"))

    def restore(self, payload, model, optimizer):
        parallel.restore(payload, self.folder, model, optimizer)

    def finish(self, phase, result):
        """Mark a phase as over, with what the table needs of it. Its model folder must be in place by now."""
        self.state["done"][phase] = result
        self.save(None, 0, None)

    def rows(self):
        """{phase: its evaluation} of every phase scored so far, for the table."""
        return {name.split()[0]: result for name, result in self.state["done"].items() if name.endswith(" scored")}

    def save_model(self, phase, model, tokenizer):
        model, weights = parallel.plain(model)

        def fill(folder):
            model.save_pretrained(folder, **({"state_dict": weights} if weights else {}))
            tokenizer.save_pretrained(folder)
            (folder / "README.md").write_text(report.model_card(phase, self.config), encoding="utf-8")

        save_folder(self.folder / phase, fill)
        parallel.barrier()


def load_model(path, device, flag="model", dtype=torch.float32, training=None):
    """(model in eval mode, tokenizer) of a folder or Hugging Face id. Raises InputError naming the flag.

    Training keeps weights in float32 whatever the GPU computes in: a bf16 weight of 1 swallows every update below 4e-3.
    training: the run's settings where the weights are to be trained; a GPU holds others in bf16.
    """
    if not training and torch.device(device).type == "cuda" and dtype == torch.float32:
        dtype = torch.bfloat16
    model, tokenizer = parallel.together(lambda: read_model(path, flag, dtype))
    model = model.to(device).eval() if isinstance(model, Pair) else parallel.spread(model, device, training)
    return quicken(model, device), tokenizer


def read_model(path, flag, dtype):
    """(model, None on other ranks than the first; tokenizer)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)  # first: a model may take minutes
        if tokenizer.eos_token_id is None:
            raise InputError(f"--{flag} {path}: its tokenizer has no EOS token, so no answer could ever end")
        if (Path(path) / "whp.json").is_file():
            return Pair.from_pretrained(path, dtype), tokenizer
        if parallel.rank():
            return None, tokenizer
        model, found = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except InputError:
        raise
    except Exception as error:  # OSError, ValueError, and whatever else the readers of weights and tokenizers raise
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise InputError(f"--{flag} {path}: is no model folder or Hugging Face id ({reason})") from None
    if found["missing_keys"]:
        raise InputError(f"--{flag} {path}: its files lack weights of the model ({min(found['missing_keys'])})")
    return model, tokenizer


@cache
def fast_products():
    """Let float32 products on the CPU come from oneDNN, and say whether they do: on AMD's twice as fast as from MKL.

    torch turns to it where bf16 may be used inside; without matrix units for bf16 a processor then computes in float32
    all the same. A product tried here tells: had it been rounded, all would stay as it was.
    """
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    torch.set_float32_matmul_precision("medium")
    exact = torch.backends.mkldnn.is_available() and (a @ b - a.double() @ b.double()).abs().max().item() < 1e-3
    if not exact:
        torch.set_float32_matmul_precision("highest")
    return exact


def quicken(model, device):
    """Fast products for a model on the CPU, and attention made of them: torch's fused one asks oneDNN for tiny ones."""
    if torch.device(device).type == "cpu" and fast_products():
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                part.set_attn_implementation("eager")
    return model


def optimizer_for(model, lr, weight_decay):
    """AdamW; in one pass over memory where the weights are on the host of a GPU."""
    how = {"fused": True} if getattr(model, "offloaded", False) else {}
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay, **how)


def optimizer_step(model, optimizer, max_grad_norm):
    """Clip, step and clear. Returns the norm before clipping; where it is not finite, no step is taken."""
    norm = parallel.whole(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)).item()
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@contextmanager
def clock(seconds, phase):
    """Add the seconds spent inside to seconds[phase]."""
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start
