"""Attacks by likelihood: how the model scores what it was to forget, whatever it says."""

import math
import random

import torch.nn.functional as F

from benchmarks.answers import forced, inference
from benchmarks.attacks import measures
from benchmarks.metrics import mean
from engine.seeds import derive_seed

MIN_K, MIN_K_PP = 0.4, 0.2  # shares of tokens that MUSE and RWKU take
SCORES = ("loss", "mink", "minkpp", "zlib")
WRONG = 5  # answers of other probes that the true one is ranked among, where the files give none


def extract(case):
    """How likely the true answers are, token by token.
    Columns: `answer_probability` exp(−mean loss) in %; `answer_rank` among wrong answers, 1 the likeliest, and
    `answer_first` how often it is, in %; `extraction_strength` and `exact_memorisation`, 0–1. Rows: one a forget
    probe."""
    probes, eos = case.forget, case.tokenizer.eos_token_id

    def read(logits, ids):  # (T, V), (T,)
        hits = (logits.argmax(-1) == ids).tolist()
        return F.cross_entropy(logits, ids).item(), hits[:-1] if ids[-1] == eos else hits

    def scores(pairs, title):
        return forced(case.model, case.tokenizer, *case.encoded(pairs), read, case.batch_size, title, case.progress)

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
        row["exact_memorisation"] = measures.exact_memorisation(hits)
        rows.append(row)
    ranks = [row["rank"] for row in rows if row["rank"]]
    columns = {"answer_probability": mean((math.exp(-row["answer_loss"]) for row in rows), 100)}
    columns |= {"answer_rank": mean(ranks), "answer_first": mean((float(r == 1) for r in ranks), 100)}
    return columns | {n: mean(row[n] for row in rows) for n in ("extraction_strength", "exact_memorisation")}, rows


def crossed(probe, probes, seed):
    """Up to five wrong answers: those to the same question about other targets, else to other questions of its set."""

    def form(p):
        return p.question.replace(p.target, "_") if p.target else p.question

    same = {p.answer for p in probes if form(p) == form(probe)} - {probe.answer}
    found = sorted(same or {p.answer for p in probes if p.split == probe.split} - {probe.answer})
    return random.Random(derive_seed(seed, "crossed", probe.question)).sample(found, min(WRONG, len(found)))


def membership(case):
    """Can texts that were to be forgotten be told from texts never seen, by how likely they are?
    Columns: `membership_auc`, that of the loss, 0–1, with its 95 % interval; the same by three other scores; `privleak`
    beside a model that never saw the forget set. Where the files hold no unseen texts (RWKU): each side's mean score.
    Rows: every text with its scores, all higher where the text is likelier."""
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
            found = forced(case.model, case.tokenizer, texts, starts, read, case.batch_size, side, case.progress)
            for (_, text), (logprobs, z) in zip(pairs, found, strict=True):
                loss = -sum(logprobs) / len(logprobs)
                row = {"side": side, "text": text, "loss": -loss, "mink": measures.mink(logprobs, MIN_K)}
                rows.append(row | {"minkpp": measures.mink(z, MIN_K_PP), "zlib": measures.zlib_ratio(loss, text)})

    def values(side, score):
        return [row[score] for row in rows if row["side"] == side]

    if "holdout" not in case.texts:
        return {f"{side}_mia_{score}": mean(values(side, score)) for side in case.texts for score in SCORES}, rows
    sides = ("forget", "holdout")
    columns = {f"membership_auc_{score}": measures.auc(*(values(side, score) for side in sides)) for score in SCORES}
    auc = columns["membership_auc"] = columns["membership_auc_loss"]
    ends = measures.auc_interval(auc, *(len(case.texts[side]) for side in sides))
    columns["membership_auc_low"], columns["membership_auc_high"] = ends
    retained = case.retained.get("membership_auc_mink")
    columns["privleak"] = None if retained is None else measures.privleak(columns["membership_auc_mink"], retained)
    if retained is None:
        case.notes.append("privleak is missing: it needs a model that never saw the forget set (--retain_model)")
    elif columns["privleak"] is None or abs(columns["privleak"]) > 100:
        case.notes.append(
            f"privleak divides by {1 - retained:.3g}, 1 − AUC of the retained model: where that is small, as for a "
            "model that saw the hold-out texts, values far above 100 follow, and are no error"
        )
    return columns, rows
