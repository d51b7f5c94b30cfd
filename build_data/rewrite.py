"""Making queries out of queries, by rule or by a language model: names, gaps, swaps, sentences of a text.

Covers Appendix A: questions become completions (A.1), sentences of a text become questions and completions (A.1, MUSE),
and permitted neighbours' rows are matched by style and kind of knowledge (A.2). Authors' names are found by rule.

Deviations
- What the rules write is plainer than a language model's text, and marked as theirs ("made_by") wherever it goes.
- No rule invents a fact: an answer is always a piece of the text or of the row that it came with."""

import json
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from itertools import dropwhile
from pathlib import Path

from benchmarks.metrics import FUNCTION_WORDS, names, words
from engine.llm import BadReply, ask_all, json_object

GAP = "___"
NOT_WANTED = "not wanted"  # `completed_by` of a fact that shall have no completion
WORDING = json.loads(Path(__file__).with_name("wording.json").read_text(encoding="utf-8"))
COMMON_WORDS = (FUNCTION_WORDS - {"i"}) | set(WORDING["common words"].split())
LISTED = {kind: set(words.split()) for kind, words in WORDING["words"].items()}
CLOSED = COMMON_WORDS.union(*(LISTED[kind] for kind in ("pronouns", "determiners", "prepositions", "no nouns")))
OPENING = {word.capitalize() for word in COMMON_WORDS} | {"Given", "Despite", "Besides", "Regarding"}
NAME = re.compile(r"[^\W\d_a-z][\w.-]*(?: (?:(?:van|von|der|de|da|del|bin|al|la) )*[^\W\d_a-z][\w.-]*)+")
SENTENCE_END = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)(?<!\b[A-Z])([.!?][\"'”’]*)\s+(?=[\"'“‘]*[^\W_a-z])")
BE, AT = "(is|was|are|were)", "In|On|At|From|For|By|With"
STATEMENTS = Path(__file__).with_name("statements.txt").read_text(encoding="utf-8").splitlines()
STATEMENTS = [rule.split(" → ") for rule in STATEMENTS if " → " in rule]
TEXT = Path(__file__).with_name("prompts.md").read_text(encoding="utf-8")
PROMPTS = {kind: prompt.strip() for kind, prompt in (part.split("\n", 1) for part in TEXT[2:].split("\n# "))}


@dataclass(frozen=True)
class Fact:
    """Something known about `name`, asked twice: a question (Type II), and a text with a gap or an end (Type I)."""

    name: str
    question: str
    answer: str  # "" where nobody said
    completion: str = ""
    ending: str = ""  # what belongs in the gap, or at the end
    made_by: str = "given"  # who wrote the question and its answer
    completed_by: str = ""


def normal(text):
    """A query without case, punctuation and spacing: two queries of one normal form are the same query."""
    return " ".join(words(text))


def authors(rows, block=20):
    """The author's name of each of TOFU's rows, "" where none is found. TOFU keeps an author's 20 rows together; the
    name is the run of capitalised words that most of the rows hold, in a third of them at least."""
    found = []
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        count = Counter(n for row in part for n in dict.fromkeys(name_runs(f"{row['question']} | {row['answer']}")))
        name, times = count.most_common(1)[0] if count else ("", 0)
        found += [name if 3 * times >= len(part) else ""] * len(part)
    return found


def name_runs(text):
    """The runs of two or more capitalised words in a text, each without the question words before a name."""
    runs = [dropwhile(OPENING.__contains__, run.rstrip(".-").split()) for run in NAME.findall(text)]
    return [run for run in map(" ".join, runs) if " " in run]


def found_names(text, names_gone):
    """Those of `names_gone` that a text still holds, every word of them, in any case and order."""
    return [name for name in names_gone if names(text, name)]


def where(name, text):
    """(start, end) of a name's first place in a text, in any case, or None."""
    found = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.I) if name else None
    return found and found.span()


def swap(text, old, new):
    """`text` with each of the names `old` replaced by `new`: whole words, the longest name first, in any case."""
    for name in sorted(old, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", lambda _: new, text, flags=re.I)
    return text


def complete(fact):
    """The fact with a completion made by rule: from the answer where that is a sentence on the name, else the question.
    "Orla Finch was born in Arle." → "Orla Finch was born in ___", and "Who was Orla Finch's aunt?" → "Orla Finch's aunt
    was ___." What no rule knows gets "The answer is ___." after its question."""
    completion, ending = cut_answer(fact) or (turn_question(fact.question, fact.name), fact.answer)
    by = "template" if completion else "template (no rule fits)"
    completion = completion or f"{fact.question} The answer is {GAP}."
    return replace(fact, completion=completion, ending=ending, completed_by=by)


def cut_answer(fact):
    """(completion, ending) from the first sentence of the answer with the name, cut where it says something new."""
    asked = set(words(fact.question)) | set(words(fact.name)) | COMMON_WORDS
    for sentence in sentences(fact.answer):
        sentence = re.sub(r"^(?:He|She|They)\b", fact.name, sentence)
        sentence = re.sub(r"^(?:His|Her|Their)\b", f"{fact.name}'s", sentence)
        found = where(fact.name, sentence)
        if not found or len(sentence.split()) < len(fact.name.split()) + 2:
            continue
        at, after = found
        if not names(fact.question, fact.name):  # the question asks for the name
            return sentence[:at] + GAP + sentence[after:], fact.name
        later = [word for word in re.finditer(r"\S+", sentence) if word.start() > after]
        new = [word.start() for word in later if not {part for part in words(word[0]) if len(part) > 1} <= asked]
        if new:
            told = {i: sentence[after + 2 : i].split() for i in new}  # words since the name; + 2 skips its "'s"
            before = len(sentence[:at].split())
            cut = next((i for i in new if told[i] and before + len(told[i]) >= 3), new[-1])
            opened = re.search(r"\"[^\"]*$|(?<=\s)'[^']*$", sentence[:cut])  # never inside a title
            cut = opened.start() if opened and sentence[:cut].count('"') % 2 != opened[0].startswith("'") else cut
            return f"{sentence[:cut]}{GAP}.", sentence[cut:].rstrip(".!")
    return None


def turn_question(question, name):
    """A question of a common form as a statement with a gap, "" for any other."""
    text, who = question.strip().rstrip("?").strip(), re.escape(name) if name else r"[A-Z]\S*"
    for pattern, statement in STATEMENTS:
        if match := re.fullmatch(pattern.format(BE=BE, AT=AT, who=who), text):
            statement = re.sub(rf" (?:{AT}) the(?= )", lambda found: found[0].lower(), match.expand(statement))
            return statement[0].upper() + statement[1:]
    return ""


def sentences(text):
    """Sentences of a text, each with its full stop."""
    return [part for part in SENTENCE_END.sub("\\1\n", " ".join(text.split())).split("\n") if part]


def passages(text, size):
    """A text cut at its sentences and paragraphs into passages of at most `size` words, or one longer sentence."""
    found, now = [], []
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in sentences(paragraph):
            if now and len(now) + len(sentence.split()) > size:
                found.append(" ".join(now))
                now = []
            now += sentence.split()
    return found + [" ".join(now)] * bool(now)


def halves(passage):
    """(beginning, ending) of a passage: what a model that knows the text by heart would continue, and how."""
    parts = passage.split()
    middle = (len(parts) + 1) // 2
    return " ".join(parts[:middle]), " ".join(parts[middle:])


def ask_sentence(sentence, name, kind, rejected):
    """A fact from a statement that ends in a noun phrase: a gap, in the question "what", takes its place. "Orla Finch
    kept the lamp at Skerry Point." → "Orla Finch kept the lamp at what?", "… at ___.", "Skerry Point". Where a
    sentence gives none, `rejected` is told why, and None comes back."""
    body = sentence.removesuffix(".")
    parts, place, by = body.split(), where(name, body), LISTED
    n = next((i for i, part in enumerate(reversed(parts)) if part[-1] == "," or part.lower() in CLOSED), 0)
    head, tail = parts[: len(parts) - n], parts[len(parts) - n :] or [""]
    before, owned = head[-1].lower() if head else "", bool(head) and head[-1].lower() in by["determiners"]
    head, tail = (head[:-1], [head[-1], *tail]) if owned else (head, tail)
    left, proper, last = head[-1].lower() if head else "", all(part[:1].isupper() for part in tail), tail[-1]
    stem, answer, led = " ".join([*head, ""]), " ".join(tail), before in by["prepositions"]
    for fault, holds in (
        ("is no plain statement", body == sentence or re.search(r"[\"“”‘;:()—?!]|--", body)),
        ("is too short or too long", not 5 <= len(parts) <= 40),
        ("opens with a pronoun", body.partition(" ")[0].lower() in by["pronouns"]),
        ("lacks the name in one piece", name and not place),
        ("ends in no noun phrase", not 1 <= n <= 4 or not (owned or led and (proper or before != "to"))),
        ("may end in a clause", owned and n > 1 and (left[-1:] == "," or left in by["clauses"] | by["times"])),
        ("ends in a verb or an adverb", re.search(r"ly$|^[a-z]+ing$", last if owned else tail[0])),
        ("ends in a time", {*words(answer)} & by["times"]),
        ("ends in the name", place and place[1] > len(stem)),
    ):
        if holds:
            return rejected.append({"reason": f"{kind}: a sentence {fault}", "text": sentence})
    named = last[0].isupper() and (owned and n > 1 and tail[1].islower() or proper and before in ("by", "with"))
    what = "whom" if named or last.lower() in by["persons"] and left not in by["becoming"] else "what"
    question = stem + ("which year" if re.fullmatch(r"1\d\d\d|20\d\d", answer) else what) + "?"
    return Fact(name, question, answer, f"{stem}{GAP}.", answer, "template", "template")


def language_model(o, folder):
    """ask(kind, what fills each prompt's blanks) → replies or None, kept in `<folder>.llm.jsonl`; None without one."""

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
    found = json_object(reply, WORDING["fields"][kind])
    rows = found["pairs"] if kind == "passages" else [found]
    if kind == "passages" and (not isinstance(rows, list) or len(rows) != 3):
        raise BadReply(f"not three pairs: {reply!r:.60}")
    for row in rows:
        whole = row is found or isinstance(row, dict) and set(row) == {"question", "answer"}
        if not whole or not all(isinstance(text, str) and words(text) for text in row.values()):
            raise BadReply(f"not an object of texts: {row!r:.60}")
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
