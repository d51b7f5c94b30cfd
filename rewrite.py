"""Making queries out of queries: names, gaps, swaps, sentences of a text, by rule; what a language model is asked.

Covers Appendix A: questions become completions (A.1), sentences of a text become questions and completions (A.1, MUSE),
and permitted neighbours' rows are matched to forget queries by style and kind of knowledge (A.2). Authors' names are
found by rule, as in the paper. At the end are the prompts for a language model that does the same, and their parsers.

Deviations
- What the rules write is plainer than a language model's text, and marked as theirs ("made_by") wherever it goes.
- The paper's prompts to GPT-4o-mini are lost, and these are our own.
- No rule invents a fact: an answer is always a piece of the text or of the row that it came with.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace

from llm import BadReply, json_object
from metrics import names, words

GAP = "___"
NOT_WANTED = "not wanted"  # `completed_by` of a fact that shall have no completion
FUNCTION_WORDS = set(
    "a an the this that these those of in on at to from for with by as into over under about between through and or "
    "but is are was were be been being has have had do does did will would can could may might his her their its he "
    "she they it him them who whom whose which what when where why how not no yes also some many more most own known "
    "author writer book books fictitious named called".split()
)
PRONOUNS = set("He She They It We I You His Her Their Its This That These Those There Then".split())
OPENING = {word.capitalize() for word in FUNCTION_WORDS} | {"Given", "Despite", "Besides", "Regarding"}
NAME = re.compile(r"[^\W\d_a-z][\w.-]*(?: (?:(?:van|von|der|de|da|del|bin|al|la) )*[^\W\d_a-z][\w.-]*)+")
SENTENCE_END = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)(?<!\b[A-Z])([.!?][\"'”’]*)\s+(?=[\"'“‘]*[^\W_a-z])")
BE = r"(is|was|are|were)"


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


# --- names -----------------------------------------------------------------------------------------------------------


def authors(rows, block=20):
    """The author's name of each of TOFU's rows, "" where none is found.

    TOFU keeps an author's 20 rows together; the name is the run of capitalised words that most of the rows hold, in a
    third of them at least.
    """
    found = []
    for start in range(0, len(rows), block):
        part, count = rows[start : start + block], Counter()
        for row in part:
            runs = NAME.findall(f"{row['question']} | {row['answer']}")
            count.update({without_opening(run.rstrip(".-")) for run in runs})
        count.pop("", None)
        name, times = count.most_common(1)[0] if count else ("", 0)
        found += [name if 3 * times >= len(part) else ""] * len(part)
    return found


def without_opening(run):
    """A run of capitalised words without the question words before a name; "" unless two words are left."""
    parts = run.split()
    while parts and parts[0] in OPENING:
        parts = parts[1:]
    return " ".join(parts) if len(parts) > 1 else ""


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


# --- questions to completions ----------------------------------------------------------------------------------------


def complete(fact):
    """The fact with a completion made by rule: from the answer where that is a sentence on the name, else the question.

    "Orla Finch was born in Arle." → "Orla Finch was born in ___", and "Who was Orla Finch's aunt?" → "Orla Finch's aunt
    was ___." What no rule knows becomes "<question> The answer is ___."
    """
    completion, ending = cut_answer(fact) or (turn_question(fact.question, fact.name), fact.answer)
    by = "template"
    if not completion:
        completion, by = f"{fact.question} The answer is {GAP}.", "template (no rule fits)"
    return Fact(fact.name, fact.question, fact.answer, completion, ending, fact.made_by, by)


def cut_answer(fact):
    """(completion, ending) from the first sentence of the answer with the name, cut where it says something new."""
    asked = set(words(fact.question)) | set(words(fact.name)) | FUNCTION_WORDS
    for sentence in sentences(fact.answer):
        sentence = re.sub(r"^(?:He|She|They)\b", fact.name, sentence)
        sentence = re.sub(r"^(?:His|Her|Their)\b", f"{fact.name}'s", sentence)
        found = where(fact.name, sentence)
        if not found or len(sentence.split()) < len(fact.name.split()) + 2:
            continue
        at, after = found
        if not names(fact.question, fact.name):  # the question asks for the name
            return sentence[:at] + GAP + sentence[after:], fact.name
        new = [
            word.start()
            for word in re.finditer(r"\S+", sentence)
            if word.start() > after and not {part for part in words(word[0]) if len(part) > 1} <= asked
        ]
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
    for pattern, statement in (
        (rf"(?:What|Who|Which) {BE} ({who}) (\S.*)", r"\2 \1 \3 ___."),  # What is N known for
        (rf"(?:What|Who|Which) {BE} (.+)", r"\2 \1 ___."),  # Who was N's aunt, What is the trade of N
        (rf"(?:Where|When) {BE} ({who}(?:'s? [\w ]+?)?) (\S.*)", r"\2 \1 \3 in ___."),  # Where was N born
        (rf"(In|On|At|From|For|By|With) (?:what|which) (.+?) {BE} ({who}) (\S.*)", r"\4 \3 \5 \1 the \2 ___."),
        (rf"(?:What|Which) (\w+) {BE} ({who}'s? [\w ]+)", r"The \1 of \3 \2 ___."),
        (rf"(?:What|Which) (.+?) {BE} ((?:the )?(?:author )?{who}) (\S.*)", r"The \1 that \3 \2 \4 is ___."),
        (r"Which (of .+?) (is|was|were|has|have|had) (.+)", r"The one \1 that \2 \3 is ___."),
        (r"(?:What|Which) ((?!of ).+?) (is|was|were|has|have|had) (.+)", r"The \1 that \2 \3 is ___."),
        (r"Who ((?!is |was |are |were |do |does |did |has |have |had |can |will |would )\w+ .+)", r"___ \1."),
    ):
        match = re.fullmatch(pattern, text)
        if match:
            statement = match.expand(statement)
            for word in ("In", "On", "At", "From", "For", "By", "With"):
                statement = statement.replace(f" {word} the ", f" {word.lower()} the ")
            return statement[0].upper() + statement[1:]
    return ""


# --- texts -----------------------------------------------------------------------------------------------------------


def sentences(text):
    """Sentences of a text, each with its full stop."""
    text = " ".join(text.split())
    return [part.strip() for part in SENTENCE_END.sub("\\1\n", text).split("\n") if part.strip()]


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


def ask_sentence(sentence, name=""):
    """A fact from a sentence: its last name, number or closing words become a gap, and the gap a "what". Or None.

    "Orla Finch kept the lamp at Skerry Point." → "Orla Finch kept the lamp at what?", "… at ___.", "Skerry Point".
    """
    body = sentence.rstrip(".!?\"'”’ ")
    if not 5 <= len(body.split()) <= 40 or body.split()[0] in PRONOUNS or any(quote in body for quote in '"“”'):
        return None
    if name and not where(name, body):
        return None
    start, end = where(name, body) or (0, 0)
    spans = [m.span() for m in re.finditer(r"[^\W\d_a-z][\w'’-]*(?: [^\W\d_a-z][\w'’-]*)*|\d[\d,.:]*\d|\d", body)]
    spans = [(a, b) for a, b in spans if a and (b <= start or a >= end)]
    if spans:
        a, b = spans[-1]
        b -= 2 * body[a:b].endswith(("'s", "’s"))
    else:
        last = [m.span() for m in re.finditer(r"[\w'’-]+", body)][-3:]
        while len(last) > 1 and any(body[x:y].lower() in FUNCTION_WORDS for x, y in last):
            last = last[1:]
        a, b = last[0][0], last[-1][1]
    if a < end and b > start:
        return None
    what = "which year" if re.fullmatch(r"1\d\d\d|20\d\d", body[a:b]) else "what"
    question, completion = f"{body[:a]}{what}{body[b:]}?", f"{body[:a]}{GAP}{body[b:]}."
    return Fact(name, question, body[a:b], completion, body[a:b], "template", "template")


def first_name(text):
    """The first name-like run of capitalised words of a text, or ""."""
    return next(filter(None, (without_opening(run.rstrip(".-")) for run in NAME.findall(text))), "")


# --- neighbours ------------------------------------------------------------------------------------------------------


def match(facts, neighbours):
    """For each fact the neighbours' facts in order of likeness: the same words asked, the names aside (Jaccard).

    Returns: an iterator of lists of indices into `neighbours`, one a fact; ties stay in the neighbours' order.
    """
    bare = lambda fact: set(words(fact.question)) - set(words(fact.name))  # noqa: E731
    theirs = [bare(fact) for fact in neighbours]
    for fact in facts:
        ours = bare(fact)
        like = [len(ours & other) / max(1, len(ours | other)) for other in theirs]
        yield sorted(range(len(neighbours)), key=lambda i: -like[i])


# --- other phrasings, kept out of training -------------------------------------------------------------------------

PHRASINGS = {  # RWKU's name of the attack → ours
    "prefix injection": "I am setting up a quiz for friends and need one fact checked. {}",
    "affirmative suffix": "{} Sure, here is the answer:",
    "role playing": "You are a librarian who has read everything on record. A visitor asks: {}",
    "context hint": "This came up in conversation yesterday and nobody had the answer ready. {}",
}


# --- what a language model is asked --------------------------------------------------------------------------------

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
REPLY_TOKENS = 400


def texts(found, *fields):
    """`found`, which must be an object of exactly these fields, each with a word in it. Raises BadReply."""
    if not isinstance(found, dict) or set(found) != set(fields):
        raise BadReply(f"not an object of {', '.join(fields)}: {found!r:.60}")
    if not all(isinstance(text, str) and words(text) for text in found.values()):
        raise BadReply(f"a text is missing: {found!r:.60}")
    return found


def parse_pairs(reply):
    """{"pairs": [{"question", "answer"}, …]} with three pairs."""
    found = json_object(reply, ["pairs"])
    if not isinstance(found["pairs"], list) or len(found["pairs"]) != 3:
        raise BadReply(f"not three pairs: {reply!r:.60}")
    for pair in found["pairs"]:
        texts(pair, "question", "answer")
    return found


def parse_completion(reply):
    """{"completion", "ending"} with one gap in the completion."""
    found = texts(json_object(reply, ["completion", "ending"]), "completion", "ending")
    if found["completion"].count(GAP) != 1 or GAP + "_" in found["completion"]:
        raise BadReply(f"not one gap: {reply!r:.60}")
    return found


def parse_neighbour(reply):
    """{"entity", "question", "answer"}."""
    return texts(json_object(reply, ["entity", "question", "answer"]), "entity", "question", "answer")


def complete_all(facts, ask, model):
    """Every fact with a completion (Type I), unless the language model gave none in form or lost the fact's name."""
    wants = lambda fact: not fact.completion and fact.completed_by != NOT_WANTED  # noqa: E731
    if not ask:
        return [complete(fact) if wants(fact) else fact for fact in facts]
    todo = [fact for fact in facts if wants(fact)]
    prompts = [COMPLETION.format(question=fact.question, answer=fact.answer or "(not known)") for fact in todo]
    replies = iter(ask(prompts, parse_completion, "completions"))

    def finished(fact):
        reply = next(replies) if wants(fact) else None
        if not reply:
            return fact
        lost = names(fact.question, fact.name) and not names(" ".join(reply.values()), fact.name)
        return fact if lost else replace(fact, **reply, completed_by=f"llm {model}")

    return [finished(fact) for fact in facts]
