"""The baselines' training: the rows that each method reads, one loop over its loss, the share of data it used.

Covers the training of Appendix B; PURGE and rejection steering are stages of the driver. Symbols as in `losses.py`.

Deviations
- D_f and D_r are the forget and boundary queries that RULE trains on, with their answers. Where a benchmark publishes
  none to a forget prompt (RWKU), y_f is the original model's own greedy answer.
- Random responses (Eq. 14, 15) are answers to other prompts, of D_r, drawn anew in every step.
- PURGE's terms match as whole words, in any case; they are taken from the answers unless given.
- A batch is one forward, which `--baseline_batch_size` bounds; of several ranks, `--max_tokens` (`Ranks.scored`)."""

import json
import random
import re
from collections import Counter
from dataclasses import replace
from functools import cache, partial
from itertools import cycle
from pathlib import Path

import torch

from baselines.losses import RECIPES, cross_entropy, objective, task_vector
from config import ADAPTED, Config, InputError
from data import encode_answer, encode_prompt, stop_ids
from engine.files import read_rows
from engine.model import Pair
from engine.run import descend
from engine.seeds import batch_at, derive_seed
from grpo import positions, token_logprobs
from sft import collate_sft

RATES = Path(__file__).parent.parent / "results"  # the chosen rates: docs/baselines.md
CAPITAL = r"[A-Z]\w*(?:[’'-]\w+)*"
NAME = re.compile(rf"{CAPITAL}(?: (?:(?:of|by|the|for|de|von) ){{0,2}}{CAPITAL})*|\d+")


def learning_rate(config, method):
    """Of Stage 2 for RULE and ReRULE; of a baseline or PURGE, the flag's or the one chosen for a tiny model."""
    if method in ("rule", "rerule"):
        return config.lr
    if config.baseline_lr:
        return config.baseline_lr
    times = ADAPTED["baseline_lr"] if config.lora_rank else 1
    if config.model != "tiny":
        return times * 1e-5
    chosen = {}
    for benchmark in (Config.benchmark, config.benchmark):  # the default world has a rate for every method
        path = RATES / f"rates_{benchmark}.json"
        chosen |= json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return times * chosen.get(method, {"best": 1e-5})["best"]


def rows_of(method, engine, model, tokenizer, training, config):
    """Token ids (prompt, answer) of every kind of row that `method` reads; all but "retain" are in order of D_f.
    model: the original one, which answers where a benchmark publishes no answer and where SGA wants normal ones."""

    def answer(prompts):
        """The model's own most likely answers, as token ids, 64 at a time."""
        stops, answers = stop_ids(tokenizer, model, training.newline_stops), []
        for at in range(0, len(prompts), 64):
            ids, mask, _ = engine.sample(model, prompts[at : at + 64], 1, config.max_new_tokens, stops, 0.0)
            answers += [row[kept].tolist() for row, kept in zip(ids[:, 0], mask[:, 0], strict=True)]  # of (N, 1, T)
        return answers

    forget = [query for query in training.queries if query.kind == "forget"]
    retain = [query for query in training.queries if query.kind == "boundary"]
    rows = {"retain": [encoded(tokenizer, q.prompt, q.answers[0]) for q in retain]}
    unanswered = [encode_prompt(tokenizer, query.prompt) for query in forget if not query.answers]
    own = zip(unanswered, answer(unanswered), strict=True)
    rows["forget"] = [encoded(tokenizer, q.prompt, q.answers[0]) if q.answers else next(own) for q in forget]
    refusals, spare = dict(training.refusals), cycle(refusal for _, refusal in training.refusals)
    rows["refusal"] = [encoded(tokenizer, q.prompt, refusals.get(q.prompt, next(spare))) for q in forget]
    if method == "sga":
        words = [set(query.question.lower().split()) for query in retain]
        permitted = [prompt for prompt, _ in rows["retain"]]
        normal = list(zip(permitted, answer(permitted), strict=True))
        rows |= {f"normal {k}": [] for k in range(config.sga_k)}
        for query in forget:  # the K permitted prompts that share most words with this one
            own = set(query.question.lower().split())
            closest = sorted(range(len(retain)), key=lambda j: -len(own & words[j]) / len(own | words[j]))
            for k in range(config.sga_k):
                rows[f"normal {k}"].append(normal[closest[k % len(closest)]])
    return rows


def encoded(tokenizer, prompt, answer):
    return encode_prompt(tokenizer, prompt), encode_answer(tokenizer, prompt, answer)


def rows_at(rows, kind, step, config, method):
    """The rows of one kind in the batch of `step`; D_r is passed over at its own pace, beside D_f."""
    side = "retain" if kind == "retain" else "forget"
    at = batch_at(len(rows[side]), config.baseline_batch_size, step, config.seed, method, side)
    if kind == "random":
        rng = random.Random(derive_seed(config.seed, method, "random", step))
        return [(rows["forget"][i][0], rng.choice(rows["retain"])[1]) for i in at]
    return [rows[kind][i] for i in at]


def data_used(method, training, tokenizer):
    """The tables' "# Tokens": {"forget_tokens", "retain_tokens"}, % of the tokens of all such data that training reads;
    {} where the files hold not all. Prompts count where asked, answers where read, refusals and samples never."""
    if not training.whole or method == "retained":
        return {}
    forget, retain = RECIPES.get(method, (None, None))
    queries = {kind: [q for q in training.queries if q.kind == kind] for kind in ("forget", "boundary")}
    used = {"forget": set(), "retain": set()}
    if method in ("rej_steer", "rule", "rerule"):
        used["forget"] |= {(prompt, "") for prompt, _ in training.refusals}
    if method != "rej_steer":
        unread = forget in (None, "refuse", "mismatch")  # None: RULE, ReRULE and PURGE
        used["forget"] |= {(q.prompt, "" if unread else q.answers[0]) for q in queries["forget"]}
    if retain or method in ("rule", "rerule") or forget in ("mismatch", "llmu", "sga"):
        used["retain"] |= {(q.prompt, "" if forget == "sga" else q.answers[0]) for q in queries["boundary"]}

    def tokens(rows):
        return sum(len(encode_prompt(tokenizer, p)) + len(encode_answer(tokenizer, p, a)) * bool(a) for p, a in rows)

    return {f"{kind}_tokens": 100 * tokens(used[kind]) / tokens(training.whole[kind]) for kind in used}


def logprobs_of(model, rows, logits=False):
    """Log-probabilities (B, L − 1) of rows; or the logits (n, V) at their answers' n tokens."""
    ids, attention, labels = collate_sft(rows, model.device)
    out = model(input_ids=ids, attention_mask=attention, position_ids=positions(attention), use_cache=False).logits
    return out[:, :-1][labels[:, 1:] != -100] if logits else token_logprobs(out[:, :-1], ids[:, 1:], 1.0)


def score(engine, model, rows, logits=False):
    """(log-probabilities (B, L − 1), mask) of the answers in rows; or the logits (n, V) at their n tokens."""
    found = engine.scored(partial(logprobs_of, logits=logits), model, rows)
    return found if logits else (found, collate_sft(rows, model.device)[2][:, 1:] != -100)


def loss_at(engine, model, original, rows, step, config, method):
    """The loss of one step on its own rows, with its graph."""

    @cache
    def s(kind, who="u", logits=False):
        batch = rows_at(rows, kind, step, config, method)
        with torch.set_grad_enabled(who == "u"):
            return score(engine, model if who == "u" else original, batch, logits)

    return objective(method, s, config)


def needs_reference(method):
    """Whether a method asks what it starts from, too; all of Stage 2 do."""
    forget, retain = RECIPES.get(method, (None, "klr"))
    return forget in ("dpo", "npo", "reinforce") or retain == "klr"


def train(run, method, model, original, tokenizer, training):
    """Unlearn with one method of `RECIPES`, from the original model. Returns: (model, seconds, why it stopped or None).
    model: a copy of the original one, to be trained; original: another copy, where `needs_reference`."""
    config, engine = run.config, run.engine
    rows = rows_of(method, engine, model, tokenizer, training, config)
    steps = max(1, round(config.baseline_epochs * len(rows["forget"]) / config.baseline_batch_size))
    held = rows["retain"][:: max(1, len(rows["retain"]) // 64)]

    def perplexity(step):
        """exp(L_CE) on some of D_r, ten times in all; past the bound the method has diverged."""
        if step % max(1, steps // 10):
            return {}, False
        with torch.no_grad():
            value = cross_entropy(*score(engine, model, held)).exp().item()
        within = value <= config.max_perplexity
        return {"retain_perplexity": value}, False if within else f"perplexity of the retain rows is {value:.3g}"

    seconds, stopped = descend(
        run, method, 3, model, lambda step: loss_at(engine, model, original, rows, step, config, method), steps=steps,
        lr=learning_rate(config, method), warmup=0, stop=perplexity,
    )  # fmt: skip
    if method == "task_vector":
        for both in zip(model.parameters(), original.parameters(), strict=True):  # of each rank its part
            theta, start = (getattr(p.detach(), "to_local", p.detach)() for p in both)
            theta.copy_(task_vector(start.to(theta.device), theta, config.alpha))
    return (Pair(original, model, config.alpha) if method == "whp" else model), seconds, stopped


def forbidden_terms(pairs, limit=50):
    """PURGE's terms from what is known of the target, at most `limit`, the most frequent first.
    pairs: (question, answer) of the forget rows. An answer of up to four words is a term; of a longer one, the names
    and numbers in it that its own question does not hold, less what only opens a sentence."""
    counts = Counter()
    for question, answer in pairs:
        answer = answer.strip().rstrip(".")
        if 0 < len(answer.split()) <= 4:
            counts[answer] += 1
            continue
        for found in NAME.finditer(answer):
            opens = found.start() == 0 or answer[: found.start()].rstrip()[-1] in ".!?"
            if found.group() not in question and not (opens and " " not in found.group()):
                counts[found.group()] += 1
    return tuple(term for term, _ in counts.most_common(limit))


def purge_reward(response, terms):
    """PURGE: r = 1 if the response mentions none of the forbidden terms as whole words, in any case; else 0."""
    return 0.0 if any(re.search(rf"(?<!\w){re.escape(term)}(?!\w)", response, re.IGNORECASE) for term in terms) else 1.0


def purge_task(training, engine, model, tokenizer, config):
    """PURGE's (forget queries alone, a reward by forbidden terms). model: the original one, as in `rows_of`."""
    forget = [query for query in training.queries if query.kind == "forget"]
    if config.purge_terms:
        terms = tuple(row["term"] for row in read_rows(config.purge_terms, {"term": str}))
    else:
        rows = zip(forget, rows_of("purge", engine, model, tokenizer, training, config)["forget"], strict=True)
        terms = forbidden_terms((q.question, tokenizer.decode(ids, skip_special_tokens=True)) for q, (_, ids) in rows)
    if not terms:
        raise InputError("--method purge: no forbidden terms were found in the answers; give them by --purge_terms")
    return replace(training, queries=forget), lambda query, text: purge_reward(text, terms)
