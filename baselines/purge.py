"""PURGE: GRPO on forget prompts alone, rewarded where no forbidden term is said. The loop is `rerule.stage2`.

Deviations
- A term matches as whole words, in any case. Terms are taken from the forget rows' answers unless they are given."""

import re
from collections import Counter
from dataclasses import replace

from baselines.train import rows_of
from config import InputError
from engine.files import read_rows

CAPITAL = r"[A-Z]\w*(?:[’'-]\w+)*"
NAME = re.compile(rf"{CAPITAL}(?: (?:(?:of|by|the|for|de|von) ){{0,2}}{CAPITAL})*|\d+")


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


def prepare(training, engine, model, tokenizer, config):
    """(forget queries alone, a reward by forbidden terms). model: the original one, as in `rows_of`."""
    forget = [query for query in training.queries if query.kind == "forget"]
    if config.purge_terms:
        terms = tuple(row["term"] for row in read_rows(config.purge_terms, {"term": str}))
    else:
        rows = rows_of("purge", engine, model, tokenizer, training, config)["forget"]
        answers = [tokenizer.decode(answer, skip_special_tokens=True) for _, answer in rows]
        terms = forbidden_terms([(query.question, answer) for query, answer in zip(forget, answers, strict=True)])
    if not terms:
        raise InputError("--method purge: no forbidden terms were found in the answers; give them by --purge_terms")
    return replace(training, queries=forget), lambda query, text: purge_reward(text, terms)
