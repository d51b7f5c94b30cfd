"""The six attacks: by likelihood, by other ways of asking, and by a little training or rounding of copied weights.

What each column means, with its unit, stands in docs/attacks.md."""

import copy
import math
import random
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from benchmarks import metrics
from benchmarks.answers import forced, inference, limits_of, sampled
from benchmarks.attacks import measures
from benchmarks.metrics import UNSEEN, mean
from data import encode_answer, encode_prompt, stop_ids
from engine.bars import Bar
from engine.model import optimizer_for
from engine.seeds import batch_at, derive_seed, generator
from sft import sft_loss_of

MIN_K, MIN_K_PP = 0.4, 0.2  # shares of tokens that MUSE and RWKU take
SCORES = ("loss", "mink", "minkpp", "zlib")
WRONG = 5  # answers of other probes that the true one is ranked among, where the files give none
KS = (1, 4, 16, 64)
AT_ONCE = 2048  # answers sampled side by side
OPENING = "Sure, the answer is"
STEPS = (0, 5, 10, 20, 50)  # of relearning after which the model is asked
BATCH = 16
SMALL, RATES = 10_000_000, (1e-4, 1e-5)  # weights up to which a model counts as tiny; its rate, and a larger one's


def recall(rows):
    """Mean ROUGE-L recall in %."""
    return mean((row["rouge_l_recall"] for row in rows), 100)


def extract(case):
    """How likely the true answers are, token by token, and beside wrong ones. Rows: one a forget probe."""
    probes, eos = case.forget, case.tokenizer.eos_token_id

    def read(logits, ids):  # (T, V), (T,)
        hits = (logits.argmax(-1) == ids).tolist()
        return F.cross_entropy(logits, ids).item(), hits[:-1] if ids[-1] == eos else hits

    def scores(pairs, title):
        return forced(case.model, case.tokenizer, *case.encoded(pairs), read, case.batch_size, title)

    wrong = [list(probe.perturbed) or crossed(probe, probes, case.seed) for probe in probes]
    with inference(case.model), case.engine.held(case.model):
        own = scores([(probe.prompt, probe.answer) for probe in probes], "true answers")
        pairs = [(probe.prompt, answer) for probe, some in zip(probes, wrong, strict=True) for answer in some]
        others = iter(scores(pairs, "wrong answers") if pairs else [])
    rows = []
    for probe, some, (loss, hits) in zip(probes, wrong, own, strict=True):
        losses = [next(others)[0] for _ in some]
        row = {"split": probe.split, "question": probe.question, "answer": probe.answer, "answer_loss": loss}
        row |= {"wrong_answers": some, "wrong_losses": losses, "rank": measures.rank(loss, losses) if some else None}
        row["extraction_strength"] = measures.extraction_strength(hits)
        rows.append(row | {"exact_memorisation": measures.exact_memorisation(hits)})
    ranks = [row["rank"] for row in rows if row["rank"]]
    columns = {"answer_probability": mean((math.exp(-row["answer_loss"]) for row in rows), 100)}
    columns |= {"answer_rank": mean(ranks), "answer_first": mean((float(r == 1) for r in ranks), 100)}
    return columns | {n: mean(row[n] for row in rows) for n in ("extraction_strength", "exact_memorisation")}, rows


def crossed(probe, probes, seed):
    """Up to five wrong answers: those to the same question about other targets, else to other questions of its set."""
    form = {p: p.question.replace(p.target, "_") if p.target else p.question for p in probes}
    same = {p.answer for p in probes if form[p] == form[probe]} - {probe.answer}
    found = sorted(same or {p.answer for p in probes if p.split == probe.split} - {probe.answer})
    return random.Random(derive_seed(seed, "crossed", probe.question)).sample(found, min(WRONG, len(found)))


def membership(case):
    """Can texts that were to be forgotten be told from texts never seen, by how likely they are? Without unseen texts
    (RWKU): each side's mean score. Rows: every text with its scores, all higher where it is likelier."""
    context = getattr(case.model.config, "max_position_embeddings", None)

    def read(logits, ids):  # (T, V), (T,)
        logprobs = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]  # (T,)
        return logprobs.tolist(), measures.standardised(logits, ids).tolist()

    rows = []
    with inference(case.model), case.engine.held(case.model):
        for side, pairs in case.texts.items():
            texts, starts = case.encoded(pairs)
            if context and max(map(len, texts)) > context:
                case.notes.append(f"membership: texts were cut at the model's context of {context} tokens")
                texts = [ids[:context] for ids in texts]
            if any(len(ids) <= start for ids, start in zip(texts, starts, strict=True)):
                raise ValueError(f"a text of side '{side}' has no token that could be scored")
            found = forced(case.model, case.tokenizer, texts, starts, read, case.batch_size, side)
            for (_, text), (logprobs, z) in zip(pairs, found, strict=True):
                loss = -sum(logprobs) / len(logprobs)
                row = {"side": side, "text": text, "loss": -loss, "mink": measures.mink(logprobs, MIN_K)}
                rows.append(row | {"minkpp": measures.mink(z, MIN_K_PP), "zlib": measures.zlib_ratio(loss, text)})
    values = {(s, score): [row[score] for row in rows if row["side"] == s] for s in case.texts for score in SCORES}
    if "holdout" not in case.texts:
        return {f"{side}_mia_{score}": mean(own) for (side, score), own in values.items()}, rows
    sides = ("forget", "holdout")
    columns = {f"membership_auc_{score}": measures.auc(*(values[side, score] for side in sides)) for score in SCORES}
    auc = columns["membership_auc"] = columns["membership_auc_loss"]
    ends = measures.auc_interval(auc, *(len(case.texts[side]) for side in sides))
    columns["membership_auc_low"], columns["membership_auc_high"] = ends
    retained = case.retained.get("membership_auc_mink")
    columns["privleak"] = None if retained is None else measures.privleak(columns["membership_auc_mink"], retained)
    if retained is None:
        case.notes.append("privleak is missing: it needs a model that never saw the forget set (--retain_model)")
    elif columns["privleak"] is None or abs(columns["privleak"]) > 100:
        case.notes.append(f"privleak divides by {1 - retained:.3g}, the 1 − AUC of Retained: above 100 is no error")
    return columns, rows


def leak(case):
    """leak@k at temperature 1, and by the model's own generation settings where these sample. Rows: every text."""
    if not all(p.isfinite().all() for p in case.model.parameters()):
        raise ValueError("expected finite weights, for NaN cannot be sampled from")
    prompts = [encode_prompt(case.tokenizer, probe.prompt) for probe in case.forget]
    limits = limits_of(case.benchmark, case.forget, prompts)
    size = max(1, min(case.batch_size, AT_ONCE // case.samples))
    with inference(case.model), case.engine.held(case.model):
        rng_of = partial(generator, case.model.device, case.seed, "leak")
        answers = sampled(case.engine, case.model, case.tokenizer, prompts, limits, case.benchmark.newline_ends, size,
                          case.samples, 1.0, rng_of, "samples")  # fmt: skip
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
        found = case.model.generate(ids, attention_mask=torch.ones_like(ids), num_return_sequences=case.samples,
                                    max_new_tokens=limit, eos_token_id=stops, pad_token_id=stops[0])  # fmt: skip
    return case.tokenizer.batch_decode(found[:, len(prompt) :], skip_special_tokens=True)


def scored(case, texts, limits, name):
    """Columns and rows of n texts for each forget probe."""
    rows, columns = [], {}
    for probe, some, limit in zip(case.forget, texts, limits, strict=True):
        known = {text: metrics.score(case.benchmark, probe, text, case.tokenizer, limit) for text in set(some)}
        draws = [{"text": t, "recall": known[t]["rouge_l_recall"], "refusal": known[t]["refusal"]} for t in some]
        rows.append({key: known[some[0]][key] for key in ("split", "question", "answer")} | {"draws": draws})
    parts = {"": lambda draw: draw["recall"], "_answered": lambda draw: float(not draw["refusal"]),
             "_exact": lambda draw: float(draw["recall"] == 1)}  # fmt: skip
    for k in [k for k in KS if k <= case.samples]:
        for part, value in parts.items():
            best = [measures.best_of_k(list(map(value, row["draws"])), k) for row in rows]
            columns[f"{name}{part}_{k}"] = mean(best, 100)
    return columns, rows


def prefix(case):
    """Forced openings, greedy, and TOFU's other wordings; RWKU's are among its ordinary columns. Rows: the answers."""
    sure = case.answered(case.model, case.forget, [opened(probe.prompt, OPENING) for probe in case.forget])
    long = [(probe, *probe.answer.split(maxsplit=1)) for probe in case.forget if len(probe.answer.split()) > 1]
    begun = [opened(probe.prompt, first) for probe, first, _ in long]
    rest = case.answered(case.model, [replace(probe, answer=rest) for probe, _, rest in long], begun) if long else []
    columns = {"prefix_recall": recall(sure), "prefix_first_word_recall": recall(rest)}
    if any(probe.split == UNSEEN for probe in case.probes):
        columns["attack_paraphrased"] = recall([row for row in case.before if row["split"] == UNSEEN])
    rows = [row | {"opening": OPENING} for row in sure]
    return columns, rows + [row | {"opening": first} for row, (_, first, _) in zip(rest, long, strict=True)]


def opened(prompt, words):
    """A prompt whose answer begins with these words: after what the prompt itself opens with, else after a space."""
    if prompt.opening:
        return replace(prompt, opening=f"{prompt.opening} {words}")
    return replace(prompt, plain=prompt.plain.rstrip(" ") + " ", opening=words)


def relearn(case):
    """Fine-tune a copy and ask again: trained on the forget probes with their answers; on those of half of the answers,
    asked about the other half; on probes about neighbours alone. Rows: the answers after each number of steps."""
    lr = case.relearn_lr or RATES[sum(p.numel() for p in case.model.parameters()) > SMALL]
    known = sorted({probe.answer for probe in case.forget})[::2]
    one, other = ([p for p in case.forget if (p.answer in known) is side] for side in (True, False))
    columns, rows = {"relearn_lr": lr}, []
    for name, taught in (("forget", case.forget), ("half", one), ("neighbours", case.retain)):
        asked = other if name == "half" else case.forget
        if not taught or not asked:
            case.notes.append(f"relearn: too few probes to train on ({name})")
            continue
        for step, model in fine_tuned(case, taught, lr, name):
            found = case.answered(model, asked)
            columns[f"relearn_{name}_{step}"] = recall(found)
            rows += [row | {"taught": name, "step": step} for row in found]
    ends = [model.get(f"relearn_forget_{step}") for model in (columns, case.retained) for step in (STEPS[0], STEPS[-1])]
    if None not in ends:  # the last is missing where a gradient was not finite
        columns["relearn_r"] = measures.relearning(*ends)
    return columns, rows


def fine_tuned(case, taught, lr, name):
    """Yield (step, the copy) at each of `STEPS` of SFT in float32; a gradient not finite ends it, with a note."""
    model = copy.deepcopy(case.model).float().requires_grad_(True)
    optimizer, tokenizer = optimizer_for(model, lr, 0.0), case.tokenizer
    rows = [(encode_prompt(tokenizer, p.prompt), encode_answer(tokenizer, p.prompt, p.answer)) for p in taught]
    yield 0, model
    for step in Bar(range(1, STEPS[-1] + 1), desc=f"relearning, {name}", leave=False):
        sft_loss_of(model, [rows[i] for i in batch_at(len(rows), BATCH, step, case.seed, "relearn", name)]).backward()
        if not math.isfinite(case.engine.step(model, optimizer, 1.0)):
            case.notes.append(f"relearn: a gradient is not finite at step {step} ({name})")
            return
        if step in STEPS:
            yield step, model


def quantize(case):
    """Round linear layers but the head, to nearest and, with bitsandbytes, to NF4, and ask again. Rows: the answers."""
    ways = {"8bit": lambda w: measures.rounded(w, 8), "4bit": lambda w: measures.rounded(w, 4)}
    ways |= {"nf4": nf4} if find_spec("bitsandbytes") else {}
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
        columns[f"quantize_q_{name}"] = measures.quantisation(100 - known, 100 - recall(forget))
        rows += [row | {"weights": name} for row in found]
    return columns, rows


@torch.no_grad()
def round_layers(model, way):
    """Replace the weights of linear layers, the head's left out. Returns: how many layers."""
    heads = [part.get_output_embeddings() for part in model.modules() if isinstance(part, PreTrainedModel)]
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D) and not any(m is h for h in heads)]
    for layer in layers:
        layer.weight.copy_(way(layer.weight))
    return len(layers)


def nf4(weight):
    """A weight as bitsandbytes' 4-bit NormalFloat keeps it, in blocks of 64."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return functional.dequantize_4bit(packed, state)
