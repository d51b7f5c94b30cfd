"""Attacks on the weights, in copies: does a little fine-tuning, or rounding, bring back what was forgotten?"""

import copy
import math
from importlib.util import find_spec

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from benchmarks.attacks.case import recall
from benchmarks.attacks.measures import quantisation, relearning, rounded
from benchmarks.metrics import UNSEEN
from data import encode_answer, encode_prompt
from engine.bars import Bar
from engine.model import optimizer_for
from engine.seeds import batch_at
from sft import sft_loss_of

STEPS = (0, 5, 10, 20, 50)  # of relearning after which the model is asked
BATCH = 16
SMALL, RATES = 10_000_000, (1e-4, 1e-5)  # weights up to which a model counts as tiny; its rate, and a larger one's


def relearn(case):
    """Fine-tune a copy and ask again. It is trained on (a) the forget probes with their answers, (b) those of half of
    the answers, asked about the other half, (c) probes about neighbours alone. Columns, forget recall in %:
    `relearn_forget_<step>`, `relearn_half_…`, `relearn_neighbours_…`; `relearn_r` beside a retained model, 0–1. Rows:
    the answers after each number of steps."""
    weights = sum(p.numel() for p in case.model.parameters())
    lr = case.relearn_lr or RATES[weights > SMALL]
    known = sorted({probe.answer for probe in case.forget})[::2]
    one, other = ([p for p in case.forget if (p.answer in known) is side] for side in (True, False))
    columns, rows = {"relearn_lr": lr}, []
    for name, taught, asked in (
        ("forget", case.forget, case.forget), ("half", one, other), ("neighbours", case.retain, case.forget),
    ):  # fmt: skip
        if not taught or not asked:
            case.notes.append(f"relearn: too few probes to train on ({name})")
            continue
        for step, model in fine_tuned(case, taught, lr, name):
            found = case.answered(model, asked)
            columns[f"relearn_{name}_{step}"] = recall(found)
            rows += [row | {"taught": name, "step": step} for row in found]
    before, after = (case.retained.get(f"relearn_forget_{step}") for step in (STEPS[0], STEPS[-1]))
    own = [columns.get(f"relearn_forget_{step}") for step in (STEPS[0], STEPS[-1])]
    if None not in (before, after, *own):  # the last is missing where a gradient was not finite
        columns["relearn_r"] = relearning(*own, before, after)
    return columns, rows


def fine_tuned(case, taught, lr, name):
    """Yield (step, the copy) at each of `STEPS` of plain SFT with AdamW in float32. A gradient that is not finite ends
    it, with a note."""
    model = copy.deepcopy(case.model).float().requires_grad_(True)
    optimizer = optimizer_for(model, lr, 0.0)
    tokenizer = case.tokenizer
    rows = [(encode_prompt(tokenizer, p.prompt), encode_answer(tokenizer, p.prompt, p.answer)) for p in taught]
    yield 0, model
    for step in Bar(range(1, STEPS[-1] + 1), desc=f"relearning, {name}", leave=False, disable=not case.progress):
        batch = [rows[i] for i in batch_at(len(rows), BATCH, step, case.seed, "relearn", name)]
        sft_loss_of(model, batch).backward()
        if not math.isfinite(case.engine.step(model, optimizer, 1.0)):
            case.notes.append(f"relearn: a gradient is not finite at step {step} ({name})")
            return
        if step in STEPS:
            yield step, model


def quantize(case):
    """Round the weights of every linear layer but the head, and ask again.
    Columns, in %: `forget_recall_8bit`, `retain_recall_8bit`, `forget_refusal_8bit` and the same for 4 bits, rounded to
    nearest in blocks of 64, and for NF4 where bitsandbytes is installed; `quantize_q_…`, 0–1, how much of the
    forgetting stays. Rows: the answers."""
    ways = {"8bit": lambda w: rounded(w, 8), "4bit": lambda w: rounded(w, 4)}
    if find_spec("bitsandbytes"):
        ways["nf4"] = nf4
    known = recall([row for row in case.before if row["forget"] and row["split"] != UNSEEN])
    columns, rows = {}, []
    for name, way in ways.items():
        model = copy.deepcopy(case.model)
        if not round_layers(model, way):
            case.notes.append("quantize: the model has no linear layer, so nothing was rounded")
            return {}, []
        found = case.answered(model, case.forget + case.retain)
        forget, retain = found[: len(case.forget)], found[len(case.forget) :]
        columns |= {f"forget_recall_{name}": recall(forget), f"retain_recall_{name}": recall(retain)}
        columns[f"forget_refusal_{name}"] = 100 * sum(row["refusal"] for row in forget) / len(forget)
        columns[f"quantize_q_{name}"] = quantisation(100 - known, 100 - recall(forget))
        rows += [row | {"weights": name} for row in found]
    return columns, rows


@torch.no_grad()
def round_layers(model, way):
    """Replace the weights of linear layers, the head's left out. Returns: how many layers."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    heads = [part.get_output_embeddings() for part in parts]
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D) and not any(m is h for h in heads)]
    for layer in layers:
        layer.weight.copy_(way(layer.weight))
    return len(layers)


def nf4(weight):
    """A weight as bitsandbytes' 4-bit NormalFloat keeps it, in blocks of 64."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return functional.dequantize_4bit(packed, state)
