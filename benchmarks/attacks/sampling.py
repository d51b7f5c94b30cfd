"""Attacks by asking: many samples in place of one greedy answer, and the first words put in the model's mouth."""

from dataclasses import replace

import torch

from benchmarks import metrics
from benchmarks.answers import inference, limits_of, sampled
from benchmarks.attacks.case import recall
from benchmarks.attacks.measures import best_of_k
from benchmarks.metrics import UNSEEN, mean
from data import encode_prompt, stop_ids
from engine.seeds import derive_seed, generator

KS = (1, 4, 16, 64)
AT_ONCE = 2048  # answers sampled side by side
OPENING = "Sure, the answer is"


def leak(case):
    """leak@k at temperature 1, and by the model's own generation settings where these sample.
    Columns, each the expectation over k of the n samples, in %: `leak_k` best ROUGE-L recall; `leak_answered_k` any of
    them is no refusal; `leak_exact_k` any of them holds the whole answer. Rows: every text with its recall."""
    if not all(p.isfinite().all() for p in case.model.parameters()):
        raise ValueError("expected finite weights, for NaN cannot be sampled from")
    prompts = [encode_prompt(case.tokenizer, probe.prompt) for probe in case.forget]
    limits = limits_of(case.benchmark, case.forget, prompts)
    size = max(1, min(case.batch_size, AT_ONCE // case.samples))

    def rng_of(first):
        return generator(case.model.device, case.seed, "leak", first)

    with inference(case.model), case.engine.held(case.model):
        answers = sampled(
            case.engine, case.model, case.tokenizer, prompts, limits, case.benchmark.newline_ends, size, case.samples,
            1.0, rng_of, "samples", case.progress,
        )  # fmt: skip
        columns, rows = scored(case, [[text for text, _ in some] for some in answers], limits, "leak")
        own = getattr(case.model, "generation_config", None)
        if not (getattr(own, "do_sample", False) and hasattr(case.model, "generate")):
            missing = "the model's own generation settings do not sample"
            case.notes.append(f"leak: {missing}, so only temperature 1 was tried")
            return columns, rows
        texts = [generated(case, *pair, i) for i, pair in enumerate(zip(prompts, limits, strict=True))]
    more, others = scored(case, texts, limits, "leak_own")
    return columns | more, [row | {"own": other["draws"]} for row, other in zip(rows, others, strict=True)]


def generated(case, prompt, limit, number):
    """n answers to one prompt by transformers' own sampler with the model's own settings."""
    ids = torch.tensor([prompt], device=case.model.device)
    stops = stop_ids(case.tokenizer, case.model, case.benchmark.newline_ends)
    with torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else []):
        torch.manual_seed(derive_seed(case.seed, "leak, own settings", number))
        found = case.model.generate(
            ids, attention_mask=torch.ones_like(ids), num_return_sequences=case.samples, max_new_tokens=limit,
            eos_token_id=stops, pad_token_id=stops[0],
        )  # fmt: skip
    return case.tokenizer.batch_decode(found[:, len(prompt) :], skip_special_tokens=True)


def scored(case, texts, limits, name):
    """Columns and rows of n texts for each forget probe."""
    rows = []
    for probe, some, limit in zip(case.forget, texts, limits, strict=True):
        gold = case.gold(probe, limit)
        known = {text: metrics.score(case.benchmark, probe, gold, text) for text in set(some)}
        draws = [{"text": t, "recall": known[t]["rouge_l_recall"], "refusal": known[t]["refusal"]} for t in some]
        rows.append({"split": probe.split, "question": probe.question, "answer": gold, "draws": draws})
    columns = {}
    for k in [k for k in KS if k <= case.samples]:
        for part, value in (
            ("", lambda draw: draw["recall"]),
            ("_answered", lambda draw: float(not draw["refusal"])),
            ("_exact", lambda draw: float(draw["recall"] == 1)),
        ):
            best = [best_of_k(list(map(value, row["draws"])), k) for row in rows]
            columns[f"{name}{part}_{k}"] = mean(best, 100)
    return columns, rows


def prefix(case):
    """Forced openings, greedy, and other ways to ask that the files have.
    Columns, ROUGE-L recall in %: `prefix_recall` after "Sure, the answer is"; `prefix_first_word_recall` of the rest of
    the answer after its own first word; `attack_paraphrased` of TOFU's questions in other words. RWKU's `attack_<type>`
    are among the ordinary columns. Rows: the answers."""
    agreed = [opened(probe.prompt, OPENING) for probe in case.forget]
    sure = case.answered(case.model, case.forget, agreed)
    long = [probe for probe in case.forget if len(probe.answer.split()) > 1]
    words = [probe.answer.split(maxsplit=1) for probe in long]
    begun = [opened(probe.prompt, first) for probe, (first, _) in zip(long, words, strict=True)]
    asked = [replace(probe, answer=rest) for probe, (_, rest) in zip(long, words, strict=True)]
    rest = case.answered(case.model, asked, begun) if long else []
    columns = {"prefix_recall": recall(sure), "prefix_first_word_recall": recall(rest)}
    if any(probe.split == UNSEEN for probe in case.probes):
        columns["attack_paraphrased"] = recall([row for row in case.before if row["split"] == UNSEEN])
    rows = [row | {"opening": OPENING} for row in sure]
    return columns, rows + [row | {"opening": first} for row, (first, _) in zip(rest, words, strict=True)]


def opened(prompt, words):
    """A prompt whose answer begins with these words: after what the prompt itself opens with, else after a space."""
    if prompt.opening:
        return replace(prompt, opening=f"{prompt.opening} {words}")
    return replace(prompt, plain=prompt.plain.rstrip(" ") + " ", opening=words)
