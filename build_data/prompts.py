"""What a language model is asked in place of the rules, and the strict parsers of its replies.

Covers Appendix A: questions on a passage and completions (A.1), permitted neighbours (A.2).

Deviation: the paper's prompts to GPT-4o-mini are lost. These are our own, and each asks for one thing.
"""

import os
from dataclasses import replace

from benchmarks.metrics import names, words
from build_data.rewrite import GAP, NOT_WANTED, complete
from engine.llm import BadReply, ask_all, json_object

PAIRS = """\
Read the passage and write three questions about {name} that it answers, each with its answer. Every question must be
understood without the passage, so name who or what it is about. Answers are short and use the passage's own words.

Passage: {text}

Reply with one JSON object and nothing else:
{{"pairs": [{{"question": "...", "answer": "..."}}, {{...}}, {{...}}]}}"""
COMPLETION = """\
Rewrite the question as a statement in which the answer is left out, as it might stand in a book or an encyclopedia.
Keep what is asked and every name; write ___ (three underscores) exactly once, where the answer belongs.

Question: {question}
Answer: {answer}

Reply with one JSON object and nothing else: {{"completion": "... ___ ...", "ending": "what belongs at the ___"}}"""
NEIGHBOUR = """\
The question below is about {name}. Put someone or something else of the same kind in its place{permitted}, and change
details only where they would otherwise be wrong. Keep the wording, the style and the kind of knowledge. The new
question must have one true answer that you are sure of, and neither may mention any of: {names}.

Question: {question}

Reply with one JSON object and nothing else:
{{"entity": "who or what it is about now", "question": "the new question", "answer": "its short true answer"}}"""


def language_model(o, folder):
    """`ask(prompts, parse, desc)` → for each prompt a reply or None, kept in `<folder>.llm.jsonl`; None without one."""

    def ask(prompts, parse, desc):
        folder.parent.mkdir(parents=True, exist_ok=True)
        replies = ask_all(
            prompts, parse, url=o.llm_url, model=o.llm_model, key=os.environ.get(o.llm_key_env, ""),
            cache=folder.with_name(folder.name + ".llm.jsonl"), flag="--llm_url", field="reply",
            max_tokens=400, once=True, price=o.llm_price, timeout=o.llm_timeout, temperature=0.7, desc=desc,
        )  # fmt: skip
        return [replies[prompt] for prompt in prompts]

    return None if o.llm_url == "none" else ask


def texts(found, fields):
    """`found`, which must be an object of exactly these fields, each with a word in it. Raises BadReply."""
    whole = isinstance(found, dict) and set(found) == set(fields)
    if not whole or not all(isinstance(text, str) and words(text) for text in found.values()):
        raise BadReply(f"not an object of texts {', '.join(fields)}: {found!r:.60}")
    return found


def parse_pairs(reply):
    """{"pairs": [{"question", "answer"}, …]} with three pairs."""
    found = json_object(reply, ["pairs"])
    if not isinstance(found["pairs"], list) or len(found["pairs"]) != 3:
        raise BadReply(f"not three pairs: {reply!r:.60}")
    for pair in found["pairs"]:
        texts(pair, ("question", "answer"))
    return found


def parse_completion(reply, fields=("completion", "ending")):
    found = texts(json_object(reply, fields), fields)
    if found["completion"].count(GAP) != 1 or GAP + "_" in found["completion"]:
        raise BadReply(f"not one gap: {reply!r:.60}")
    return found


def parse_neighbour(reply, fields=("entity", "question", "answer")):
    return texts(json_object(reply, fields), fields)


def complete_all(facts, ask, model):
    """Every fact with a completion (Type I), unless the language model gave none in form or lost the fact's name."""
    facts = list(facts)
    todo = [i for i, fact in enumerate(facts) if not fact.completion and fact.completed_by != NOT_WANTED]
    if not ask:
        for i in todo:
            facts[i] = complete(facts[i])
        return facts
    prompts = [COMPLETION.format(question=facts[i].question, answer=facts[i].answer or "(not known)") for i in todo]
    for i, reply in zip(todo, ask(prompts, parse_completion, "completions"), strict=True):
        question, name = facts[i].question, facts[i].name
        if reply and (names(" ".join(reply.values()), name) or not names(question, name)):
            facts[i] = replace(facts[i], **reply, completed_by=f"llm {model}")
    return facts
