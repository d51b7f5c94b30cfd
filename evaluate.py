"""Scores any checkpoint on any benchmark: greedy answers, losses, table. Also a command: `python evaluate.py --help`.

Covers Section 4's evaluation and Appendix C; a benchmark's queries, limits and formulas are in its own module of
`benchmarks/`, what they share in `benchmarks/metrics.py`, the judge of naturalness in `benchmarks/judge.py`.
"""

from dataclasses import dataclass, field
from typing import Literal

from config import Count, InputError, setting
from engine.flags import check_bounds, parse, run_command


@dataclass
class Options:
    """Score a checkpoint on RWKU, MUSE-Books, TOFU or the built-in world; print the paper's columns, write JSON."""

    benchmark: str = field(metadata={"help": "What to score on: rwku, muse, tofu, builtin."})
    output: str = field(metadata={"help": "JSON file for the columns and every row behind them."})
    model: str = setting("Model folder or Hugging Face id.", "")
    data_dir: str = setting("The benchmark's folder; for RWKU one target's folder or a folder of them.", "")
    from_log: str = setting("Score a stored log, ours or TOFU's own, in place of a model.", "")
    retain_model: str = setting("TOFU: the retained model, which forget quality compares with.", "")
    retain_log: str = setting("TOFU: its log, ours or TOFU's own, in place of the retained model.", "")
    max_new_tokens: Count | None = setting("Longest answer in tokens. Unless given: the benchmark's own limit.")
    batch_size: Count = setting("Rows in a batch; halved whenever memory runs out.", 32)
    seed: int = setting("Built-in world: its seed.", 0)
    device: Literal["auto", "cpu", "cuda"] = setting("Where to run.", "auto")
    judge_url: str = setting("A judge of naturalness: any OpenAI-compatible URL, as http://localhost:8000/v1.", "")
    judge_model: str = setting("The judge's model name.", "")
    judge_key_env: str = setting("Environment variable that holds the judge's key.", "JUDGE_API_KEY")
    judge_cache: str = setting("JSON-lines file of ratings already paid for. Unless given: <output>.judge.jsonl.", "")
    judge_price: float = setting("Dollars per million tokens of the judge, to show the cost beforehand.", 0.0)


EXAMPLES = [
    "python evaluate.py --benchmark tofu --data_dir DATA/tofu --model runs/tofu/rerule --output out.json",
    "python evaluate.py --benchmark rwku --data_dir DATA/rwku --model ID_OR_FOLDER --output out.json",
    "python evaluate.py --benchmark tofu --from_log A.json --retain_log B.json --output out.json",
]
if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    OPTIONS = run_command(lambda: parse(Options, examples=EXAMPLES), leave=False)

import os
import sys
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import benchmarks
from benchmarks import judge, metrics
from benchmarks.fits import check_ids
from benchmarks.logs import read_log, read_retained
from data import encode_pair, encode_prompt, stop_ids
from engine.files import write_json
from engine.process import Engine
from refusal import is_refusal

# --- the model -------------------------------------------------------------------------------------------------------


@contextmanager
def inference(model):
    """Eval mode without gradients; every module's own mode is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def in_batches(run, lengths, batch_size, title, progress=True):
    """Results of `run(indices)` for all rows, the longest first; running out of memory halves the batch and goes on.

    Args: run: list of row indices → list of results; lengths: sort key per row.
    Returns: results in the rows' own order.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    results, at = [None] * len(order), 0
    with tqdm(total=len(order), desc=title, disable=not progress, leave=False) as bar:
        while at < len(order):
            part = order[at : at + batch_size]
            try:
                outputs = run(part)
            except torch.OutOfMemoryError:
                outputs = None
            if outputs is None:
                if len(part) == 1:
                    raise InputError("out of memory with a batch of one row: this device is too small for the model")
                batch_size = len(part) // 2
                torch.cuda.empty_cache()
                tqdm.write(f"{title}: out of memory, going on with a batch of {batch_size}", file=sys.stderr)
                continue
            for i, output in zip(part, outputs, strict=True):
                results[i] = output
            at += len(part)
            bar.update(len(part))
    return results


def greedy(engine, model, tokenizer, prompts, limits, newline, batch_size, progress=True):
    """Greedy answers.

    Args: prompts: lists of token ids; limits: new tokens allowed, per row; newline: whether one ends an answer.
    Returns: list of (text, whether it was cut at its limit).
    """
    ends = set(stop_ids(tokenizer, model))
    stops = stop_ids(tokenizer, model, newline)

    def run(part):
        longest = max(limits[i] for i in part)
        ids, mask, _ = engine.sample(model, [prompts[i] for i in part], 1, longest, stops, 0.0)
        answers = []
        for i, row, kept in zip(part, ids[:, 0], mask[:, 0], strict=True):  # (N, 1, T) → N × (T,)
            tokens = row[kept].tolist()[: limits[i]]
            truncated = tokens[-1] not in stops
            tokens = tokens[:-1] if tokens[-1] in ends else tokens
            answers.append((tokenizer.decode(tokens, skip_special_tokens=True), truncated))
        return answers

    lengths = [(limit, len(prompt)) for limit, prompt in zip(limits, prompts, strict=True)]
    return in_batches(run, lengths, batch_size, "answers", progress)


def answer_losses(model, tokenizer, pairs, batch_size, progress=True):
    """Teacher-forced loss of each (Prompt, answer): mean over answer tokens, EOS included (TOFU).

    The answer starts after as many tokens as the prompt alone has.
    """
    rows = [encode_pair(tokenizer, prompt, answer) for prompt, answer in pairs]
    starts = [len(encode_prompt(tokenizer, prompt)) for prompt, _ in pairs]
    check_ids(model, tokenizer, rows, [0] * len(rows))

    def run(part):
        width = max(len(rows[i]) for i in part)
        first = min(starts[i] for i in part) - 1  # the first position whose logits are needed
        ids = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in part], device=model.device)  # (N, T)
        lengths = torch.tensor([len(rows[i]) for i in part], device=model.device)
        mask = torch.arange(width, device=model.device) < lengths[:, None]  # (N, T)
        logits = model(
            input_ids=ids, attention_mask=mask.long(), use_cache=False, logits_to_keep=width - first
        ).logits  # (N, T − first, V)
        losses = []
        for k, i in enumerate(part):
            start, end = starts[i], len(rows[i])
            own = logits[k, start - 1 - first : end - 1 - first]  # (end − start, V): each from what comes before it
            losses.append(F.cross_entropy(own.float(), ids[k, start:end]).item())
        return losses

    return in_batches(run, [len(row) for row in rows], batch_size, "losses", progress)


# --- evaluation ------------------------------------------------------------------------------------------------------


def evaluate(
    engine, model, tokenizer, benchmark, probes, *, batch_size=32, max_new_tokens=None, retained=None, progress=True,
    check_batching=False,
):  # fmt: skip
    """Ask every probe and score the answers. Touches neither the model's mode nor any random state.

    Args:
        benchmark: data.Benchmark; max_new_tokens: None for the benchmark's own limit.
        retained: TOFU: truth ratios of the retained model on the forget rows.
        check_batching: outside float32 on the CPU, decode some rows again one by one and count different answers.
    Returns: {"benchmark", "summary": {column: value or None}, "per_target", "notes", "per_example": one dict a probe}.
    Raises: InputError.
    """
    prompts = [encode_prompt(tokenizer, probe.prompt) for probe in probes]
    limits = [max_new_tokens or benchmark.limit(p.split, len(ids)) for p, ids in zip(probes, prompts, strict=True)]
    check_ids(model, tokenizer, prompts, limits)
    limited = f"answers were limited to {max_new_tokens} new tokens, not to the benchmark's own length"
    notes = [limited] if max_new_tokens else []

    def answer(some, batch_size):
        some_prompts, some_limits = [prompts[i] for i in some], [limits[i] for i in some]
        return greedy(engine, model, tokenizer, some_prompts, some_limits, benchmark.newline_ends, batch_size, progress)

    with inference(model), engine.held(model):
        answers = answer(range(len(probes)), batch_size)
        if check_batching and (model.device.type != "cpu" or model.dtype != torch.float32):
            some = range(0, len(probes), max(1, len(probes) // 8))
            differ = sum(alone != answers[i] for i, alone in zip(some, answer(some, 1), strict=True))
            notes.append(f"{differ} of {len(some)} rows decoded alone differ from the same rows in a batch")
        losses = probe_losses(model, tokenizer, benchmark, probes, batch_size, progress)
    rows = []
    for i, (probe, (text, truncated)) in enumerate(zip(probes, answers, strict=True)):
        gold = probe.answer
        if probe.split in benchmark.continued:
            gold = tokenizer.decode(tokenizer(gold).input_ids[: limits[i]], skip_special_tokens=True)
        row = score(benchmark, probe, gold, text) | {"truncated": truncated, "prompt": tokenizer.decode(prompts[i])}
        rows.append(row | losses.get(i, {}))
    return finish(benchmark, rows, retained, notes)


def probe_losses(model, tokenizer, benchmark, probes, batch_size, progress=True):
    """{index of a probe with wrong answers: its losses, probability and truth ratio}, where the benchmark has them."""
    if not benchmark.losses:
        return {}
    asked = {i: probe for i, probe in enumerate(probes) if probe.perturbed}
    pairs = [(p.prompt, a) for p in asked.values() for a in (p.answer, p.paraphrased or p.answer, *p.perturbed)]
    losses, found = iter(answer_losses(model, tokenizer, pairs, batch_size, progress)), {}
    for i, probe in asked.items():
        gold, paraphrased, *perturbed = islice(losses, 2 + len(probe.perturbed))
        found[i] = benchmark.losses(probe.split, gold, paraphrased, perturbed)
    return found


def truth_ratios(model, tokenizer, benchmark, probes, batch_size):
    """Truth ratios on the forget rows, in order: what `evaluate(retained=…)` needs of a retained model."""
    forget = [probe for probe in probes if probe.split == "forget"]
    with inference(model):
        found = probe_losses(model, tokenizer, benchmark, forget, batch_size)
    return [found[i]["truth_ratio"] for i in range(len(forget))]


def score(benchmark, probe, answer, text):
    """One row of "per_example" from the text a model wrote."""
    text = benchmark.cut(probe.split, text).strip()
    recall, f1 = metrics.rouge_l(benchmark.scorer, text, answer)
    return {
        "split": probe.split,
        "target": probe.target,
        "type": probe.type,
        "forget": probe.forget,
        "question": probe.question,
        "answer": answer,
        "prediction": text,
        "rouge_l_recall": recall,
        "rouge_l_f1": f1,
        "refusal": is_refusal(text),
        "leak": metrics.leaks(text, probe.question, answer),
        "named": metrics.names(probe.question, probe.target) if probe.forget and probe.target else None,
    }


def finish(benchmark, rows, retained, notes=()):
    """Rows → the result that `evaluate` returns and the command writes."""
    summary, per_target, more = metrics.summarise(benchmark, rows, retained)
    return {
        "benchmark": benchmark.name,
        "summary": summary,
        "per_target": per_target,
        "notes": list(dict.fromkeys([*notes, *more])),
        "per_example": metrics.finite(rows),
    }


# --- command ---------------------------------------------------------------------------------------------------------


def check_options(o):
    """The benchmark. Raises InputError for flags that do not go together, before anything slow starts."""
    if o.benchmark not in benchmarks.ALL:
        raise InputError(f"--benchmark {o.benchmark}: expected one of {', '.join(benchmarks.ALL)}")
    check_bounds(o)
    benchmark, output = benchmarks.ALL[o.benchmark], Path(o.output)
    compares = "retain_model" if o.retain_model else "retain_log" if o.retain_log else ""
    no_file = output.is_dir() or not output.absolute().parent.is_dir()
    for wrong, message in (
        (bool(o.model) == bool(o.from_log), "expected one of --model and --from_log"),
        (o.retain_model and o.retain_log, "expected one of --retain_model and --retain_log"),
        (compares and not benchmark.forget_rows, f"--{compares}: only --benchmark tofu compares with a retained model"),
        (o.retain_model and o.from_log, "--retain_model: --from_log runs no model; give --retain_log"),
        (bool(o.judge_url) != bool(o.judge_model), "--judge_url and --judge_model go together"),
        (o.device == "cuda" and not torch.cuda.is_available(), "--device cuda: no GPU is available"),
        (no_file, f"--output {o.output}: expected a file in a folder that exists"),
    ):
        if wrong:
            raise InputError(message)
    return benchmark


def main(o):
    benchmark = check_options(o)
    rows, theirs = read_log(o.from_log, benchmark) if o.from_log else (benchmark.probes(o), False)
    retained = read_retained(o.retain_log, benchmark, rows, theirs) if o.retain_log else None
    if o.from_log:
        result = finish(benchmark, rows, retained)
    else:
        engine = Engine("cuda" if o.device != "cpu" and torch.cuda.is_available() else "cpu")
        with engine.session():  # as in training: the same table for the same weights
            if o.retain_model:
                model, tokenizer = engine.load(o.retain_model, "retain_model", "auto")
                retained = truth_ratios(model, tokenizer, benchmark, rows, o.batch_size)
            model, tokenizer = engine.load(o.model, dtype="auto")
            result = evaluate(
                engine, model, tokenizer, benchmark, rows, batch_size=o.batch_size, max_new_tokens=o.max_new_tokens,
                retained=retained, check_batching=True,
            )  # fmt: skip
    if o.judge_url:
        notes = judge.rate_rows(
            [row for row in result["per_example"] if row["forget"] and row["split"] != metrics.UNSEEN],
            url=o.judge_url, model=o.judge_model, key=os.environ.get(o.judge_key_env, ""),
            cache=o.judge_cache or f"{o.output}.judge.jsonl", price=o.judge_price,
        )  # fmt: skip
        result = finish(benchmark, result["per_example"], retained, result["notes"] + notes)
    print(metrics.table(benchmark, result))
    for note in result["notes"]:
        print(note)
    write_json(o.output, result)


if __name__ == "__main__":
    run_command(lambda: main(OPTIONS))
