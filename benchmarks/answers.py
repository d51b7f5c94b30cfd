"""How a model is asked: greedy or sampled answers, and scores of given ones, in batches that shrink when they must."""

import sys
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F

from benchmarks.shared import check_ids
from config import InputError
from data import encode_pair, encode_prompt, stop_ids
from engine.bars import Bar


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


def in_batches(run, lengths, batch_size, title, progress=True, model=None):
    """Results of `run(indices)` for all rows, the longest first; running out of memory halves the batch and goes on.
    run: list of row indices → list of results; lengths: sort key per row; model: one that writes the rows, of lengths
    (tokens to write, …), token by token: the bar moves with each. Returns: results in the rows' own order."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    results, at, part, tokens = [None] * len(order), 0, [], 0

    def wrote(*_):
        nonlocal tokens
        tokens += 1
        done = min(len(part) - 1, len(part) * tokens // lengths[part[0]][0])  # of this batch, as if all took as long
        bar.update(max(0, at + done - bar.n))

    hook = model.register_forward_hook(wrote) if model else nullcontext()
    with Bar(total=len(order), desc=title, disable=not progress, leave=False) as bar, hook:
        while at < len(order):
            part, tokens = order[at : at + batch_size], 0
            try:
                outputs = run(part)
            except torch.OutOfMemoryError:
                outputs = None
            if outputs is None:
                if len(part) == 1:
                    raise InputError("out of memory with a batch of one row: this device is too small for the model")
                batch_size = len(part) // 2
                torch.cuda.empty_cache()
                Bar.write(f"{title}: out of memory, going on with a batch of {batch_size}", file=sys.stderr)
                continue
            for i, output in zip(part, outputs, strict=True):
                results[i] = output
            at += len(part)
            bar.update(at - bar.n)
    return results


def sampled(engine, model, tokenizer, prompts, limits, newline, batch_size, group_size=1, temperature=0.0, rng_of=None,
            title="answers", progress=True):  # fmt: skip
    """Answers in words, `group_size` to each prompt; greedy unless a temperature is given.
    Args: prompts: lists of token ids; limits: new tokens allowed, per row; newline: whether one ends an answer;
        rng_of(row) → the generator of the batch that begins with this row.
    Returns: per prompt, list of (text, whether it was cut at its limit)."""
    ends, stops = set(stop_ids(tokenizer, model)), stop_ids(tokenizer, model, newline)

    def text_of(row, kept, limit):
        tokens = row[kept].tolist()[:limit]
        truncated = tokens[-1] not in stops
        tokens = tokens[:-1] if tokens[-1] in ends else tokens
        return tokenizer.decode(tokens, skip_special_tokens=True), truncated

    def run(part):
        some, longest = [prompts[i] for i in part], max(limits[i] for i in part)
        rng = rng_of and rng_of(part[0])
        ids, mask, _ = engine.sample(model, some, group_size, longest, stops, temperature, rng)  # (N, G, T)
        return [[text_of(*pair, limits[i]) for pair in zip(ids[n], mask[n], strict=True)] for n, i in enumerate(part)]

    lengths = [(limit, len(prompt)) for limit, prompt in zip(limits, prompts, strict=True)]
    return in_batches(run, lengths, batch_size, title, progress, model)


def greedy(engine, model, tokenizer, prompts, limits, newline, batch_size, progress=True):
    """`sampled` without a temperature: one (text, whether it was cut at its limit) per prompt."""
    answers = sampled(engine, model, tokenizer, prompts, limits, newline, batch_size, progress=progress)
    return [answer for (answer,) in answers]


def forced(model, tokenizer, rows, starts, read, batch_size, title="losses", progress=True):
    """read(logits (T, V) in float32, ids (T,)) of each row's tokens from its start on; logits predict the id beside."""
    check_ids(model, tokenizer, rows, [0] * len(rows))

    def run(part):
        width = max(len(rows[i]) for i in part)
        first = min(starts[i] for i in part) - 1  # the first position whose logits are needed
        ids = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in part], device=model.device)  # (N, T)
        lengths = torch.tensor([len(rows[i]) for i in part], device=model.device)
        mask = torch.arange(width, device=model.device) < lengths[:, None]  # (N, T)
        out = model(input_ids=ids, attention_mask=mask.long(), use_cache=False, logits_to_keep=width - first)
        found = []
        for k, i in enumerate(part):
            start, end = starts[i], len(rows[i])
            own = out.logits[k, start - 1 - first : end - 1 - first]  # (end − start, V): each from what comes before
            found.append(read(own.float(), ids[k, start:end]))
        return found

    return in_batches(run, [len(row) for row in rows], batch_size, title, progress)


def pair_rows(tokenizer, pairs):
    """(token ids of prompt and answer as one string; how many the prompt alone has) of each (Prompt, answer)."""
    rows = [encode_pair(tokenizer, prompt, answer) for prompt, answer in pairs]
    return rows, [len(encode_prompt(tokenizer, prompt)) for prompt, _ in pairs]


def answer_losses(model, tokenizer, pairs, batch_size, progress=True):
    """Teacher-forced loss of each (Prompt, answer): mean over answer tokens, EOS included (TOFU)."""
    read = lambda logits, ids: F.cross_entropy(logits, ids).item()  # noqa: E731
    return forced(model, tokenizer, *pair_rows(tokenizer, pairs), read, batch_size, progress=progress)


def limits_of(benchmark, probes, prompts, max_new_tokens=None):
    """New tokens that each answer may have. prompts: the probes' token ids."""
    return [max_new_tokens or benchmark.limit(p.split, len(ids)) for p, ids in zip(probes, prompts, strict=True)]
