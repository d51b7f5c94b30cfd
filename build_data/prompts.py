"""What a language model is asked in place of the rules, and the strict parser of its replies.

Covers Appendix A: questions on a passage and completions (A.1), permitted neighbours (A.2).

Deviation: the paper's prompts to GPT-4o-mini are lost. These are our own (`prompts.md`), and each asks for one thing.
"""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.metrics import names, words
from build_data.rewrite import GAP, NOT_WANTED, complete
from engine.llm import BadReply, ask_all, json_object

TEXT = Path(__file__).with_name("prompts.md").read_text(encoding="utf-8")
PROMPTS = {kind: prompt.strip() for kind, prompt in (part.split("\n", 1) for part in TEXT[2:].split("\n# "))}
FIELDS = {"passages": ["pairs"], "completions": ["completion", "ending"],
          "neighbours": ["entity", "question", "answer"]}  # fmt: skip


def language_model(o, folder):
    """`ask(kind, blanks)` → for each prompt of a kind a reply or None, kept in `<folder>.llm.jsonl`; None without one.

    blanks: what fills the prompt's blanks, a dict a prompt.
    """

    def ask(kind, blanks):
        prompts = [PROMPTS[kind].format(**blank) for blank in blanks]
        folder.parent.mkdir(parents=True, exist_ok=True)
        replies = ask_all(
            prompts, partial(parse, kind), url=o.llm_url, model=o.llm_model, key=os.environ.get(o.llm_key_env, ""),
            cache=folder.with_name(folder.name + ".llm.jsonl"), flag="--llm_url", field="reply",
            max_tokens=400, once=True, price=o.llm_price, timeout=o.llm_timeout, temperature=0.7, desc=kind,
        )  # fmt: skip
        return [replies[prompt] for prompt in prompts]

    return None if o.llm_url == "none" else ask


def parse(kind, reply):
    """The reply's JSON object of texts with a word in each: three pairs, a completion with one gap, or a neighbour."""
    found, fields = json_object(reply, FIELDS[kind]), FIELDS[kind]
    rows = [found]
    if kind == "passages":
        rows, fields = found["pairs"], ["question", "answer"]
        if not isinstance(rows, list) or len(rows) != 3:
            raise BadReply(f"not three pairs: {reply!r:.60}")
    for row in rows:
        whole = isinstance(row, dict) and set(row) == set(fields)
        if not whole or not all(isinstance(text, str) and words(text) for text in row.values()):
            raise BadReply(f"not an object of texts {', '.join(fields)}: {row!r:.60}")
    if kind == "completions" and (found["completion"].count(GAP) != 1 or GAP + "_" in found["completion"]):
        raise BadReply(f"not one gap: {reply!r:.60}")
    return found


def complete_all(facts, ask, model):
    """Every fact with a completion (Type I), unless the language model gave none in form or lost the fact's name."""
    facts = list(facts)
    todo = [i for i, fact in enumerate(facts) if not fact.completion and fact.completed_by != NOT_WANTED]
    blanks = [{"question": facts[i].question, "answer": facts[i].answer or "(not known)"} for i in todo]
    replies = ask("completions", blanks) if ask else [None] * len(todo)
    for i, reply in zip(todo, replies, strict=True):
        if not ask:
            facts[i] = complete(facts[i])
        elif reply and (names(" ".join(reply.values()), facts[i].name) or not names(facts[i].question, facts[i].name)):
            facts[i] = replace(facts[i], **reply, completed_by=f"llm {model}")
    return facts
