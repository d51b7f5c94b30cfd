"""Scores any checkpoint on RWKU, MUSE-Books, TOFU or the built-in world: greedy answers, losses, table.

Covers Section 4's evaluation and Appendix C; the queries are in `probes.py`, the formulas in `metrics.py`, the judge of
naturalness in `judge.py`. Also a command: `python evaluate.py --help`.

Deviations
- RWKU stops at any token that holds a newline; the official list of stop tokens names only those spelt exactly so.
- TOFU's limit of 200 tokens, prompt and answer together, is applied to each row; the official code applies it to the
  padded batch, so that there an answer depends on its neighbours. Losses are not cut at 200 tokens: no row is so long.
- MUSE's VerbMem does not stop at a newline, as in MUSE's own script; RULE's does.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: two spinning threads stall a shared machine

import sys
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

import config
import grpo
import judge
import metrics
import parallel
from config import setting
from data import encode_prompt, stop_ids
from files import InputError, exit_on_input_error, write_json
from probes import Probe, check_lengths, load_probes, read_log, read_retained
from refusal import is_refusal
from run import load_model

__all__ = ["Probe", "evaluate", "load_probes", "truth_ratios"]
MUSE_CUTS = ("\n\n", "\nQuestion", "Question:")
TOFU_TOTAL = 200  # tokens of prompt and answer together


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


def decode(model, tokenizer, prompts, limits, newline, batch_size, progress=True):
    """Greedy answers.

    Args: prompts: lists of token ids; limits: new tokens allowed, per row; newline: whether one ends an answer.
    Returns: list of (text, whether it was cut at its limit).
    """
    ends = set(stop_ids(tokenizer, model))
    stops = stop_ids(tokenizer, model, newline)

    def run(part):
        longest = max(limits[i] for i in part)
        ids, mask, _ = grpo.sample(model, [prompts[i] for i in part], 1, longest, stops, 0.0)
        answers = []
        for i, row, kept in zip(part, ids[:, 0], mask[:, 0], strict=True):  # (N, 1, T) → N × (T,)
            tokens = row[kept].tolist()[: limits[i]]
            truncated = tokens[-1] not in stops
            tokens = tokens[:-1] if tokens[-1] in ends else tokens
            answers.append((tokenizer.decode(tokens, skip_special_tokens=True), truncated))
        return answers

    lengths = [(limit, len(prompt)) for limit, prompt in zip(limits, prompts, strict=True)]
    return in_batches(run, lengths, batch_size, "answers", progress)


def answer_nll(logits, ids, start):
    """Mean negative log-likelihood of ids[start:] given what comes before. logits (T − start + 1, V), ids (T,)."""
    return F.cross_entropy(logits[:-1].float(), ids[start:])


def encode_pair(tokenizer, prompt, answer):
    """Prompt and answer as one string with nothing between, then EOS (TOFU)."""
    return encode_prompt(tokenizer, replace(prompt, opening=prompt.opening + answer)) + [tokenizer.eos_token_id]


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
            own = logits[k, starts[i] - 1 - first : len(rows[i]) - first]  # (T_i − start + 1, V)
            losses.append(answer_nll(own, ids[k, : len(rows[i])], starts[i]).item())
        return losses

    return in_batches(run, [len(row) for row in rows], batch_size, "losses", progress)


def check_ids(model, tokenizer, rows, limits):
    """Raise InputError where the tokenizer does not belong to the model, or a row and its answer exceed the context."""
    known = model.get_input_embeddings().num_embeddings
    if max(max(row) for row in rows) >= known or len(tokenizer) < 0.9 * known:
        raise InputError(f"the tokenizer has {len(tokenizer)} tokens, the model {known}: they do not belong together")
    context = getattr(model.config, "max_position_embeddings", None)
    length, i = max((len(row) + limit, i) for i, (row, limit) in enumerate(zip(rows, limits, strict=True)))
    if context and length > context:
        more = f" with {limits[i]} more to write (--max_new_tokens)" if limits[i] else ""
        raise InputError(
            f"{len(rows[i])} tokens{more} exceed the model's context of {context}: …{tokenizer.decode(rows[i])[-60:]!r}"
        )


def context_needed(tokenizer, benchmark, probes):
    """Positions that a model must have to be evaluated on these probes."""
    prompts = [encode_prompt(tokenizer, probe.prompt) for probe in probes]
    asked = [len(ids) + limit_for(benchmark, p.split, len(ids)) for p, ids in zip(probes, prompts, strict=True)]
    pairs = [(p.prompt, answer) for p in probes for answer in (p.answer, p.paraphrased, *p.perturbed) if p.perturbed]
    return max(asked + [len(encode_pair(tokenizer, *pair)) for pair in pairs])


def limit_for(benchmark, split, prompt_length):
    """New tokens that the benchmark's own evaluation allows."""
    if benchmark == "tofu":
        return max(1, TOFU_TOTAL - prompt_length)
    if benchmark == "muse":
        return 128 if split == "verbmem" else 32
    return 30 if benchmark == "rwku" else config.PRESETS[benchmark]["max_new_tokens"]


# --- evaluation ------------------------------------------------------------------------------------------------------


def evaluate(
    model, tokenizer, benchmark, probes, *, batch_size=32, max_new_tokens=None, retain_log=None, progress=True,
    check_batching=False,
):  # fmt: skip
    """Ask every probe and score the answers. Touches neither the model's mode nor any random state.

    Args:
        max_new_tokens: None for the benchmark's own limit.
        retain_log: TOFU: a log of the retained model, ours or TOFU's, or its truth ratios on the forget rows.
        check_batching: outside float32 on the CPU, decode some rows again one by one and count different answers.
    Returns: {"benchmark", "summary": {column: value or None}, "per_target", "notes", "per_example": one dict a probe}.
    Raises: InputError.
    """
    retained, name = retain_log, "the retained model"
    if retain_log is not None and not isinstance(retain_log, list):
        retained, name = read_retained(retain_log)[0], retain_log
    check_lengths(retained, sum(probe.split == "forget" for probe in probes), name)
    prompts = [encode_prompt(tokenizer, probe.prompt) for probe in probes]
    own = [limit_for(benchmark, probe.split, len(ids)) for probe, ids in zip(probes, prompts, strict=True)]
    limits = [max_new_tokens or limit for limit in own]
    check_ids(model, tokenizer, prompts, limits)
    notes = []
    if max_new_tokens:
        notes.append(f"answers were limited to {max_new_tokens} new tokens, not to the benchmark's own length")

    def answer(some, batch_size):
        some_prompts, some_limits = [prompts[i] for i in some], [limits[i] for i in some]
        return decode(model, tokenizer, some_prompts, some_limits, benchmark == "rwku", batch_size, progress)

    with inference(model), parallel.gathered(model):
        answers = answer(range(len(probes)), batch_size)
        if check_batching and (model.device.type != "cpu" or model.dtype != torch.float32):
            some = range(0, len(probes), max(1, len(probes) // 8))
            differ = sum(alone != answers[i] for i, alone in zip(some, answer(some, 1), strict=True))
            notes.append(f"{differ} of {len(some)} rows decoded alone differ from the same rows in a batch")
        losses = probe_losses(model, tokenizer, probes, batch_size, progress) if benchmark == "tofu" else {}
    rows = []
    for i, (probe, (text, truncated)) in enumerate(zip(probes, answers, strict=True)):
        gold = probe.answer
        if probe.split == "verbmem":  # the first l tokens of the true continuation, BOS among them as in MUSE's script
            gold = tokenizer.decode(tokenizer(gold).input_ids[: limits[i]], skip_special_tokens=True)
        row = score(benchmark, probe, gold, text) | {"truncated": truncated, "prompt": tokenizer.decode(prompts[i])}
        rows.append(row | losses.get(i, {}))
    return finish(benchmark, rows, retained, notes)


def probe_losses(model, tokenizer, probes, batch_size, progress=True):
    """{index of a probe with wrong answers: its losses, probability and truth ratio}."""
    pairs, owners = [], []
    for i, probe in enumerate(probes):
        if probe.perturbed:
            pairs += [(probe.prompt, a) for a in (probe.answer, probe.paraphrased or probe.answer, *probe.perturbed)]
            owners.append((i, len(probe.perturbed) + 2))
    losses = iter(answer_losses(model, tokenizer, pairs, batch_size, progress))
    found = {}
    for i, count in owners:
        gold, paraphrased, *perturbed = [next(losses) for _ in range(count)]
        found[i] = metrics.tofu_scores(probes[i].split, gold, paraphrased, perturbed)
    return found


def truth_ratios(model, tokenizer, probes, batch_size=32, progress=True):
    """Truth ratios on the forget rows, in order: what `evaluate(retain_log=…)` needs of a retained model."""
    forget = [probe for probe in probes if probe.split == "forget"]
    with inference(model):
        found = probe_losses(model, tokenizer, forget, batch_size, progress)
    return [found[i]["truth_ratio"] for i in range(len(forget))]


def score(benchmark, probe, answer, text):
    """One row of "per_example" from the text a model wrote."""
    if benchmark == "rwku":
        text = text.split("\n")[0]
    elif probe.split in ("knowmem", "utility"):
        text = metrics.cut_at(text, MUSE_CUTS)
    text = text.strip()
    recall, f1 = metrics.rouge_l(benchmark, text, answer)
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
        "benchmark": benchmark,
        "summary": summary,
        "per_target": per_target,
        "notes": list(dict.fromkeys([*notes, *more])),
        "per_example": metrics.finite(rows),
    }


# --- command ---------------------------------------------------------------------------------------------------------


@dataclass
class Options:
    """Score a checkpoint on RWKU, MUSE-Books, TOFU or the built-in world; print the paper's columns, write JSON."""

    benchmark: Literal["rwku", "muse", "tofu", "builtin"] = field(metadata={"help": "What to score on."})
    output: str = field(metadata={"help": "JSON file for the columns and every row behind them."})
    model: str = setting("Model folder or Hugging Face id.", "")
    data_dir: str = setting("The benchmark's folder; for RWKU one target's folder or a folder of them.", "")
    from_log: str = setting("Score a stored log, ours or TOFU's own, in place of a model.", "")
    retain_model: str = setting("TOFU: the retained model, which forget quality compares with.", "")
    retain_log: str = setting("TOFU: its log, ours or TOFU's own, in place of the retained model.", "")
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Longest answer in tokens. Unless given: the benchmark's own limit."}
    )
    batch_size: int = setting("Rows in a batch; halved whenever memory runs out.", 32)
    seed: int = setting("Built-in world: its seed.", 0)
    device: Literal["auto", "cpu", "cuda"] = setting("Where to run.", "auto")
    judge_url: str = setting("A judge of naturalness: any OpenAI-compatible URL, as http://localhost:8000/v1.", "")
    judge_model: str = setting("The judge's model name.", "")
    judge_key_env: str = setting("Environment variable that holds the judge's key.", "JUDGE_API_KEY")
    judge_cache: str = setting("JSON-lines file of ratings already paid for. Unless given: <output>.judge.jsonl.", "")
    judge_price: float = setting("Dollars per million tokens of the judge, to show the cost beforehand.", 0.0)


def check_options(o):
    """Raise InputError for flags that do not go together, before anything slow starts."""
    tofu_only = [flag for flag in ("retain_model", "retain_log") if getattr(o, flag)]
    if bool(o.model) == bool(o.from_log):
        raise InputError("expected one of --model and --from_log")
    if len(tofu_only) == 2:
        raise InputError("expected one of --retain_model and --retain_log")
    if tofu_only and o.benchmark != "tofu":
        raise InputError(f"--{tofu_only[0]}: only --benchmark tofu compares with a retained model")
    if o.retain_model and o.from_log:
        raise InputError("--retain_model: --from_log runs no model; give --retain_log")
    if bool(o.judge_url) != bool(o.judge_model):
        raise InputError("--judge_url and --judge_model go together")
    for flag in ("batch_size", "max_new_tokens"):
        if getattr(o, flag) is not None and getattr(o, flag) < 1:
            raise InputError(f"--{flag} {getattr(o, flag)}: expected at least 1")
    if o.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no GPU is available")
    if not Path(o.output).absolute().parent.is_dir() or Path(o.output).is_dir():
        raise InputError(f"--output {o.output}: expected a file in a folder that exists")


def run(o):
    """Options → (result, truth ratios of the retained model or None)."""
    if o.from_log:
        rows, theirs = read_log(o.from_log, o.benchmark)
        retained, retained_theirs = read_retained(o.retain_log) if o.retain_log else (None, False)
        check_lengths(retained, sum(row["split"] == "forget" for row in rows), o.retain_log, theirs and retained_theirs)
        return finish(o.benchmark, rows, retained), retained
    probes = load_probes(o.benchmark, o.data_dir, o.seed)
    retained = read_retained(o.retain_log)[0] if o.retain_log else None
    check_lengths(retained, sum(probe.split == "forget" for probe in probes), o.retain_log)
    on_gpu = o.device == "cuda" or (o.device == "auto" and torch.cuda.is_available())
    device = "cuda" if on_gpu else "cpu"
    with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):  # as in training: the same table for the same weights
        if o.retain_model:
            retained = truth_ratios(*load_model(o.retain_model, device, "retain_model", "auto"), probes, o.batch_size)
        model, tokenizer = load_model(o.model, device, dtype="auto")
        result = evaluate(
            model, tokenizer, o.benchmark, probes, batch_size=o.batch_size, max_new_tokens=o.max_new_tokens,
            retain_log=retained, check_batching=True,
        )  # fmt: skip
    return result, retained


def main(argv=None):
    o = config.parse(Options, argv)
    check_options(o)
    result, retained = run(o)
    if o.judge_url:
        notes = judge.rate_rows(
            [row for row in result["per_example"] if row["forget"] and row["split"] != metrics.UNSEEN],
            url=o.judge_url, model=o.judge_model, key=os.environ.get(o.judge_key_env, ""),
            cache=o.judge_cache or f"{o.output}.judge.jsonl", price=o.judge_price,
        )  # fmt: skip
        result = finish(o.benchmark, result["per_example"], retained, result["notes"] + notes)
    print(metrics.table(result))
    for note in result["notes"]:
        print(note)
    write_json(o.output, result)


if __name__ == "__main__":
    exit_on_input_error(main)
