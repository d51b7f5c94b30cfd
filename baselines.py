"""The baselines of Appendix B: every loss a function of log-probabilities and masks, one table, one training loop.

Covers Eq. 6–20, and PURGE's forbidden terms; PURGE itself and rejection steering are stages of the driver. Symbols: u
the current model, o the original one; D_f the forget rows (x, y_f), y_rej a refusal to the same x; D_r the retain rows.
Shapes: logprobs, mask (B, T), mask True on response tokens only; log-ratios of responses (B,); logits (n, V).

Deviations
- D_f and D_r are the prompts that RULE trains on too: forget queries with their answers, boundary queries with theirs.
  Where a benchmark publishes no answer to a forget prompt (RWKU), y_f is the original model's own greedy answer.
- SimNPO's forget term is weighted by 0.125 and LLMU's three by 0.5, 1, 1, as public code does (`--forget_weight`,
  `--llmu_weights`).
- Random responses (Eq. 14, 15) are answers to other prompts, of D_r, drawn anew in every step.
- FLAT's v ranges over mean probabilities in [0, 1], as in its public code; its TV form then never reaches f*'s bounds.
- A batch is one forward: no micro-batches. `--baseline_batch_size` bounds memory.
"""

import random
import re
from collections import Counter
from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F

import config as settings
from data import encode_answer, encode_prompt, stop_ids
from files import InputError, derive_seed, read_rows
from grpo import positions, sample, token_logprobs
from sft import batch_at, collate_sft, descend
from whp import Pair

# --- equations -------------------------------------------------------------------------------------------------------


def cross_entropy(logprobs, mask):
    """L_CE: mean −log p over response tokens."""
    return -(logprobs * mask).sum() / mask.sum()


def log_ratio(logprobs, original, mask):
    """log[p_u(y|x) / p_o(y|x)] of whole responses, summed over tokens: (B,)."""
    return ((logprobs - original) * mask).sum(-1)


def ga(logprobs, mask):
    """Unlearn by ascent on the forget rows' own loss."""
    return -cross_entropy(logprobs, mask)  # Eq. 6


def klr(logits, original):
    """Retain by staying close: mean KL(p_o ‖ p_u) over response positions and the whole vocabulary."""
    p_o = F.log_softmax(original.float(), -1)  # (n, V)
    return F.kl_div(F.log_softmax(logits.float(), -1), p_o, reduction="batchmean", log_target=True)  # Eq. 8


def dpo(refusal_ratio, forget_ratio, beta):
    """Prefer the refusal to the answer."""
    return -2 / beta * F.logsigmoid(beta * (refusal_ratio - forget_ratio)).mean()  # Eq. 10


def npo(forget_ratio, beta):
    """DPO's losing half alone; its gradient tends to that of ascent on summed log-probabilities as β → 0."""
    return -2 / beta * F.logsigmoid(-beta * forget_ratio).mean()  # Eq. 12


def simnpo(logprobs, mask, beta, gamma):
    """NPO by length, without a reference."""
    mean = (logprobs * mask).sum(-1) / mask.sum(-1)  # (B,)
    return -2 / beta * F.logsigmoid(-beta * mean - gamma).mean()  # Eq. 20


def mean_probability(logprobs, mask):
    """FLAT's P: mean token probability of each response, (B,)."""
    return (logprobs.exp() * mask).sum(-1) / mask.sum(-1)


def flat(forget, safe, divergence):
    """Bound an f-divergence between safe and forget responses. Args: their P, each (B,)."""
    g = {"pearson": lambda v: v, "kl": lambda v: v, "tv": lambda v: torch.tanh(v) / 2}[divergence]
    conjugate = {"pearson": lambda t: t**2 / 4 + t, "kl": lambda t: torch.exp(t - 1), "tv": lambda t: t}[divergence]
    return (conjugate(g(forget)) - g(safe)).mean()  # Eq. 18


def sga(forget, normal, r):
    """Ascent smoothed by `normal`: K losses, of the model's own answers to similar permitted prompts. r = 0 is GA."""
    return -(1 - r) * forget + r * torch.stack(normal).mean()  # Eq. 19


def llmu(ascent, mismatch, epsilon1, epsilon2):
    """Ascent and random answers; `klr`, weighted by ε3, is the third term."""
    return epsilon1 * ascent + epsilon2 * mismatch  # Eq. 15


def task_vector(original, reinforced, alpha):
    """θ_u = θ_o − α (θ_reinforced − θ_o), of two state dicts."""
    return {name: theta - alpha * (reinforced[name] - theta) for name, theta in original.items()}  # Eq. 16


# --- what each method adds up ----------------------------------------------------------------------------------------
# s(kind): log-probabilities of u on this step's rows of a kind, and their mask; s(kind, "o"): those of o.

FORGET = {
    "ga": lambda s, c: ga(*s("forget")),
    "refuse": lambda s, c: cross_entropy(*s("refusal")),  # Eq. 9
    "dpo": lambda s, c: dpo(ratio(s, "refusal"), ratio(s, "forget"), c.beta or 0.1),
    "npo": lambda s, c: npo(ratio(s, "forget"), c.beta or 0.1),
    "simnpo": lambda s, c: simnpo(*s("forget"), c.beta or 4.5, c.gamma),
    "mismatch": lambda s, c: cross_entropy(*s("random")),  # Eq. 14
    "llmu": lambda s, c: llmu(ga(*s("forget")), cross_entropy(*s("random")), *c.llmu_weights[:2]),
    "flat": lambda s, c: flat(mean_probability(*s("forget")), mean_probability(*s("refusal")), c.flat_divergence),
    "sga": lambda s, c: sga(
        cross_entropy(*s("forget")), [cross_entropy(*s(f"normal {k}")) for k in range(c.sga_k)], c.sga_r
    ),
    "reinforce": lambda s, c: cross_entropy(*s("forget")),  # what Eq. 16 and 17 start from
}  # fmt: skip
RECIPES = {  # method: (forget term, retain term)
    "ga": ("ga", None), "gd": ("ga", "gdr"), "kl": ("ga", "klr"), "po": ("refuse", "gdr"), "dpo": ("dpo", None),
    "dpo_rt": ("dpo", "gdr"), "npo": ("npo", None), "npo_gdr": ("npo", "gdr"), "npo_klr": ("npo", "klr"),
    "simnpo": ("simnpo", None), "simnpo_gdr": ("simnpo", "gdr"), "simnpo_klr": ("simnpo", "klr"),
    "mismatch": ("mismatch", "gdr"), "llmu": ("llmu", "klr"), "task_vector": ("reinforce", None),
    "whp": ("reinforce", None), "flat": ("flat", None), "sga": ("sga", None),
}  # fmt: skip


def ratio(s, kind):
    logprobs, mask = s(kind)
    return log_ratio(logprobs, s(kind, "o")[0], mask)


def objective(method, s, config):
    """The loss of `method`: its weighted forget term, and its retain term."""
    forget, retain = RECIPES[method]
    weight = config.forget_weight or (0.125 if forget == "simnpo" else 1.0)
    retain_weight = config.llmu_weights[2] if forget == "llmu" else config.retain_weight
    loss = weight * FORGET[forget](s, config)
    if retain == "gdr":
        loss = loss + retain_weight * cross_entropy(*s("retain"))  # Eq. 7, 9, 11, 13, 14
    if retain == "klr":
        loss = loss + retain_weight * klr(s("retain", logits=True), s("retain", "o", logits=True))  # Eq. 8, 15
    return loss


# --- rows ------------------------------------------------------------------------------------------------------------


def greedy(model, tokenizer, prompts, benchmark, max_new_tokens, batch_size=64):
    """The model's own most likely answers to prompts (token ids), as token ids."""
    stops, answers = stop_ids(tokenizer, model, benchmark.newline_stops), []
    for at in range(0, len(prompts), batch_size):
        ids, mask, _ = sample(model, prompts[at : at + batch_size], 1, max_new_tokens, stops, 0.0)  # (N, 1, T)
        answers += [row[kept].tolist() for row, kept in zip(ids[:, 0], mask[:, 0], strict=True)]
    return answers


def rows_of(method, model, tokenizer, benchmark, config):
    """Token ids (prompt, answer) of every kind of row that `method` reads; all but "retain" are in order of D_f.

    model: the original one, which answers where a benchmark publishes no answer and where SGA wants normal ones.
    """
    forget = [query for query in benchmark.queries if query.kind == "forget"]
    retain = [query for query in benchmark.queries if query.kind == "boundary"]
    prompts = [encode_prompt(tokenizer, query.prompt) for query in forget]
    rows = {"retain": [encoded(tokenizer, q.prompt, q.answers[0]) for q in retain]}
    unanswered = [i for i, query in enumerate(forget) if not query.answers]
    own = greedy(model, tokenizer, [prompts[i] for i in unanswered], benchmark, config.max_new_tokens)
    own = dict(zip(unanswered, own, strict=True))
    rows["forget"] = [
        (prompts[i], own[i]) if i in own else encoded(tokenizer, query.prompt, query.answers[0])
        for i, query in enumerate(forget)
    ]
    refusals = dict(benchmark.refusals)
    spare = [refusal for _, refusal in benchmark.refusals]
    rows["refusal"] = [
        encoded(tokenizer, query.prompt, refusals.get(query.prompt, spare[i % len(spare)]))
        for i, query in enumerate(forget)
    ]
    if method == "sga":
        words = [set(query.question.lower().split()) for query in retain]
        answers = greedy(model, tokenizer, [prompt for prompt, _ in rows["retain"]], benchmark, config.max_new_tokens)
        normal = [(prompt, answer) for (prompt, _), answer in zip(rows["retain"], answers, strict=True)]
        for k in range(config.sga_k):
            rows[f"normal {k}"] = []
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
    size, source = config.baseline_batch_size, rows["retain" if kind == "retain" else "forget"]
    at = batch_at(len(source), size, step, config.seed, method, "retain" if kind == "retain" else "forget")
    if kind == "random":
        rng = random.Random(derive_seed(config.seed, method, "random", step))
        return [(rows["forget"][i][0], rng.choice(rows["retain"])[1]) for i in at]
    return [rows[kind][i] for i in at]


CAPITAL = r"[A-Z]\w*(?:[’'-]\w+)*"
NAME = re.compile(rf"{CAPITAL}(?: (?:(?:of|by|the|for|de|von) ){{0,2}}{CAPITAL})*|\d+")


def forbidden_terms(pairs, limit=50):
    """PURGE's terms from what is known of the target, at most `limit`, the most frequent first.

    pairs: (question, answer) of the forget rows. An answer of up to four words is a term; of a longer one, the names
    and numbers in it that its own question does not hold, less what only opens a sentence.
    """
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


def purge_benchmark(benchmark, model, tokenizer, config):
    """Forget queries alone, each with the forbidden terms: those of `--purge_terms`, or of the forget rows' answers.

    model: the original one, whose own answers serve where a benchmark publishes none. Raises: InputError.
    """
    forget = [query for query in benchmark.queries if query.kind == "forget"]
    if config.purge_terms:
        terms = tuple(row["term"] for row in read_rows(config.purge_terms, {"term": str}))
    else:
        rows = rows_of("purge", model, tokenizer, benchmark, config)["forget"]
        answers = [tokenizer.decode(answer, skip_special_tokens=True) for _, answer in rows]
        terms = forbidden_terms([(query.question, answer) for query, answer in zip(forget, answers, strict=True)])
    if not terms:
        raise InputError("--method purge: no forbidden terms were found in the answers; give them by --purge_terms")
    return replace(benchmark, queries=[replace(query, forbidden=terms) for query in forget])


def data_used(method, benchmark, tokenizer):
    """The tables' "# Tokens": % of the tokens of all forget and all retain data that a method's training reads.

    Prompts count where they are asked, answers where they are read; refusals, random and sampled texts do not.
    Returns: {"forget_tokens", "retain_tokens"}, or {} where the files do not hold all the data.
    """
    if not benchmark.whole or method == "retained":
        return {}
    forget, retain = RECIPES.get(method, (None, None))
    queries = {kind: [q for q in benchmark.queries if q.kind == kind] for kind in ("forget", "boundary")}
    used = {"forget": set(), "retain": set()}
    if method in ("rej_steer", "rule", "rerule"):
        used["forget"] |= {(prompt, "") for prompt, _ in benchmark.refusals}
    if method in ("rule", "rerule", "purge"):
        used["forget"] |= {(query.prompt, "") for query in queries["forget"]}
    if forget:
        used["forget"] |= {
            (q.prompt, "" if forget in ("refuse", "mismatch") else q.answers[0]) for q in queries["forget"]
        }
    if retain or method in ("rule", "rerule") or forget in ("mismatch", "llmu", "sga"):
        used["retain"] |= {(q.prompt, "" if forget == "sga" else q.answers[0]) for q in queries["boundary"]}

    def tokens(rows):
        return sum(len(encode_prompt(tokenizer, p)) + len(encode_answer(tokenizer, p, a)) * bool(a) for p, a in rows)

    return {f"{kind}_tokens": 100 * tokens(used[kind]) / tokens(benchmark.whole[kind]) for kind in used}


# --- training --------------------------------------------------------------------------------------------------------


def score(model, rows, logits=False):
    """(log-probabilities (B, L − 1), mask) of the answers in rows; or the logits (n, V) at their n tokens."""
    ids, attention, labels = collate_sft(rows, model.device)
    out = model(input_ids=ids, attention_mask=attention, position_ids=positions(attention), use_cache=False).logits
    mask = labels[:, 1:] != -100  # (B, L − 1)
    if logits:
        return out[:, :-1][mask]
    return token_logprobs(out[:, :-1], ids[:, 1:], 1.0), mask


def loss_at(model, original, rows, step, config, method):
    """The loss of one step on its own rows, with its graph."""

    @cache
    def s(kind, who="u", logits=False):
        batch = rows_at(rows, kind, step, config, method)
        if who == "u":
            return score(model, batch, logits)
        with torch.no_grad():
            return score(original, batch, logits)

    return objective(method, s, config)


def needs_original(method):
    forget, retain = RECIPES[method]
    return forget in ("dpo", "npo", "reinforce") or retain == "klr"


def train(run, method, model, original, tokenizer, benchmark):
    """Unlearn with one method of `RECIPES`, from the original model. Returns: (model, seconds, why it stopped or None).

    model: a copy of the original one, to be trained; original: another copy, where `needs_original`.
    """
    config = run.config
    rows = rows_of(method, model, tokenizer, benchmark, config)
    steps = max(1, round(config.baseline_epochs * len(rows["forget"]) / config.baseline_batch_size))
    held = rows["retain"][:: max(1, len(rows["retain"]) // 64)]

    def perplexity(step):
        """exp(L_CE) on some of D_r, ten times in all; past the bound the method has diverged."""
        if step % max(1, steps // 10):
            return {}, False
        with torch.no_grad():
            value = cross_entropy(*score(model, held)).exp().item()
        within = value <= config.max_perplexity
        return {"retain_perplexity": value}, False if within else f"perplexity of the retain rows is {value:.3g}"

    seconds, stopped = descend(
        run, method, 3, model, lambda step: loss_at(model, original, rows, step, config, method), steps=steps,
        lr=settings.learning_rate(config, method), warmup=0, stop=perplexity,
    )  # fmt: skip
    if method == "task_vector":
        model.load_state_dict(task_vector(original.state_dict(), model.state_dict(), config.alpha))
    return (Pair(original, model, config.alpha) if method == "whp" else model), seconds, stopped
