"""One run's folder and state, and what every training loop shares: loading a model, its optimiser, a clock.

What makes a run resumable: each phase saves its state every few steps together with the lengths of both logs; a resumed
run cuts the logs back to those lengths and goes on. A phase is over once its model's folder is in place.
"""

import json
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import config as settings
import report
from files import InputError, Log, save_folder, save_state, write_json


class Run:
    """The output folder of one run: its logs, its last saved state and which phases are over."""

    def __init__(self, config):
        self.config, self.folder = config, Path(config.output_dir)
        self.state = {"done": {}, "phase": None, "sizes": {"metrics": 0, "samples": 0}}
        stored = self.folder / "config.json"
        if stored.exists():
            theirs = json.loads(stored.read_text())
            changed = settings.differences(config, theirs)
            if changed:
                what = ", ".join(f"{name} {theirs.get(name)} → {getattr(config, name)}" for name in changed[:3])
                raise InputError(f"--output_dir {self.folder}: holds another run ({what}); choose another folder")
            if (self.folder / "state.pt").exists():
                self.state = torch.load(self.folder / "state.pt", map_location="cpu", weights_only=True)
            if not config.resume and not self.finished("run"):
                raise InputError(f"--output_dir {self.folder}: holds an unfinished run; add --resume to go on with it")
        elif self.folder.exists() and any(path.suffix != ".tmp" for path in self.folder.iterdir()):
            raise InputError(f"--output_dir {self.folder}: is not empty and holds no run; choose another folder")
        if self.finished("run"):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(stored, asdict(config))
        self.metrics = Log(self.folder / "metrics.jsonl", self.state["sizes"]["metrics"])
        self.samples = Log(self.folder / "samples.jsonl", self.state["sizes"]["samples"])

    def finished(self, phase):
        return phase in self.state["done"]

    def saved(self, phase):
        """(step, payload) of the last saved state of this phase, or (0, None)."""
        if self.state["phase"] == phase:
            return self.state["step"], self.state["payload"]
        return 0, None

    def save(self, phase, step, payload):
        sizes = {"metrics": self.metrics.size(), "samples": self.samples.size()}
        self.state = {"done": self.state["done"], "phase": phase, "step": step, "payload": payload, "sizes": sizes}
        save_state(self.folder / "state.pt", self.state)

    def finish(self, phase, result):
        """Mark a phase as over, with what the table needs of it. Its model folder must be in place by now."""
        self.state["done"][phase] = result
        self.save(None, 0, None)

    def rows(self):
        """{phase: its evaluation} of every phase scored so far, for the table."""
        return {name.split()[0]: result for name, result in self.state["done"].items() if name.endswith(" scored")}

    def save_model(self, phase, model, tokenizer):
        def fill(folder):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            (folder / "README.md").write_text(report.model_card(phase, self.config), encoding="utf-8")

        save_folder(self.folder / phase, fill)


def load_model(path, device, flag="model", dtype=torch.float32):
    """(model in eval mode, tokenizer) of a folder or Hugging Face id. Raises InputError naming the flag.

    Training keeps weights in float32 whatever the GPU computes in: a bf16 weight of 1 swallows every update below 4e-3.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--{flag} {path}: is no model folder or Hugging Face id ({reason})") from None
    if tokenizer.eos_token_id is None:
        raise InputError(f"--{flag} {path}: its tokenizer has no EOS token, so no answer could ever end")
    return model.to(device).eval(), tokenizer


def optimizer_for(model, lr, weight_decay):
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay)


@contextmanager
def clock(seconds, phase):
    """Add the seconds spent inside to seconds[phase]."""
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start
