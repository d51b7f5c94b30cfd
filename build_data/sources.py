"""What a build starts from: the facts to forget, the permitted neighbours, the queries that evaluation asks.

Covers Appendix A's: RWKU's questions, MUSE's passages, TOFU's rows with their authors' names; a user's own besides."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import benchmarks
from build_data import rewrite
from build_data.rewrite import GAP, NOT_WANTED, Fact, found_names, normal
from config import InputError
from engine.files import read_rows
from engine.seeds import derive_seed

# By source: what evaluation reads of a benchmark's folder, copied; a benchmark's own permitted neighbours; words of a
# passage (a user's text is short, and three facts are made of each); RULE's names of the files of Stage 1 and Stage 2.
EVALUATION, NEIGHBOURS, PASSAGE, FILES = json.loads(Path(__file__).with_name("forms.json").read_text("utf-8")).values()
PAIR = {"question": str, "answer": str}
REQUESTS = "{}: at most {} requests in all; none is made twice"


def read_text(path, flag):
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{flag} {path}: cannot be read as UTF-8 text ({error})") from None
    if not rewrite.sentences(text):
        raise InputError(f"{flag} {path}: is empty; expected a text")
    return text


def evaluation_queries(o):
    """{normal form: split} of every query that a benchmark's evaluation asks, and of TOFU's spare retain rows."""
    if o.source not in EVALUATION:
        return {}
    probes = benchmarks.ALL[o.source].probes(SimpleNamespace(data_dir=o.input, seed=o.seed))
    found = {normal(probe.question): probe.split for probe in probes}
    if o.source == "tofu":  # evaluation reads 300 of its 400
        rows = read_rows(Path(o.input) / "retain_perturbed.json", {"question": str})
        found |= {normal(row["question"]): "retain" for row in rows}
    return found


def read_facts(o, ask, rejected):
    """The facts to forget; of MUSE with their completions, the passages' halves. `rejected` is told what gave none."""
    place = Path(o.input)
    if o.source == "tofu":
        rows = read_rows(place / "forget01.json", PAIR)
        named = zip(rows, rewrite.authors(rows), strict=True)
        facts = [Fact(name or o.target, row["question"], row["answer"]) for row, name in named]
    elif o.source == "rwku":
        (intro, *_) = read_rows(place / "intro.json", {"target": str})
        if normal(intro["target"]) != normal(o.target):
            raise InputError(f"--target {o.target!r}: {place / 'intro.json'} is about {intro['target']!r}")
        path = place / "reject_target.json"
        rows = read_rows(path if path.exists() else place / "reject.json", {"instruction": str})
        facts = [Fact(o.target, row["instruction"], "") for row in rows if GAP not in row["instruction"]]
    elif o.source == "qa":
        facts = [Fact(o.target, row["question"], row["answer"]) for row in read_rows(place, PAIR)]
    else:
        path = place / "raw" / "forget.txt" if o.source == "muse" else place
        facts = facts_of_text(o, read_text(path, "--input"), ask, rejected)
    if ask and o.source not in ("text", "muse"):
        print(REQUESTS.format(o.llm_model, 3 * len(facts)), file=sys.stderr)
    blank = next((i for i, fact in enumerate(facts, 1) if not normal(fact.question)), 0)
    if blank:
        raise InputError(f"--input {o.input}: row {blank} has an empty question")
    told = [o.target, *o.aliases] if o.target else [fact.name for fact in facts if fact.name]
    if o.source != "muse" and not any(found_names(f"{fact.question} {fact.answer}", told) for fact in facts):
        what = f"no question names --target {o.target!r}" if o.target else "no author's name is found; give --target"
        raise InputError(f"--input {o.input}: {what}")
    return facts


def facts_of_text(o, text, ask, rejected):
    """Three facts a passage (A.1), a sample of them kept; of a `text`, only what it says of the target."""
    about = [o.target, *o.aliases] if o.source == "text" else []
    parts = [part for part in rewrite.passages(text, PASSAGE[o.source]) if not about or found_names(part, about)]
    if not parts:
        raise InputError(f"--input {o.input}: no sentence names --target {o.target!r}")
    if ask:  # a completion, a neighbour and its completion for each fact; for MUSE the passages complete
        n = len(parts) + min(3 * len(parts), o.sample) * (1 if o.source == "muse" else 3)
        print(REQUESTS.format(o.llm_model, n), file=sys.stderr)
        replies = ask("passages", [{"name": o.target, "text": part} for part in parts])
    rng, found = random.Random(derive_seed(o.seed, "sample")), []
    for i, part in enumerate(parts):
        if ask:
            pairs = replies[i]["pairs"] if replies[i] else []
            if not pairs:
                rejected.append({"reason": "forget: no questions on a passage came in form", "text": part})
            made = [Fact(o.target, pair["question"], pair["answer"], made_by=f"llm {o.llm_model}") for pair in pairs]
        else:
            named = [(s, (found_names(s, about) or [""])[0]) for s in rewrite.sentences(part)]
            made = [rewrite.ask_sentence(s, name, "forget", rejected) for s, name in named if name or not about]
            made = [replace(fact, name=o.target) for fact in made if fact]
            made = rng.sample(made, min(3, len(made)))
        found += [(fact, part) for fact in made]
    if not found:
        raise InputError(f"--input {o.input}: no question could be made of any of {len(parts)} passages")
    found = [found[i] for i in sorted(rng.sample(range(len(found)), min(o.sample, len(found))))]
    facts = [fact for fact, _ in found]
    for i, (fact, part) in enumerate(found if o.source == "muse" else ()):  # each passage is completed once
        (begin, end), by = rewrite.halves(part), "given"
        if i and part == found[i - 1][1]:
            begin, end, by = "", "", NOT_WANTED
        facts[i] = replace(fact, completion=begin, ending=end, completed_by=by)
    return facts


def neighbours_path(o):
    """The file of permitted neighbours: given, or a benchmark's own; "" where there is none."""
    own = Path(o.input) / NEIGHBOURS.get(o.source, "")
    return o.neighbours or (str(own) if o.source in NEIGHBOURS and own.is_file() else "")


def read_neighbours(o, gone, rejected):
    """(permitted facts with known answers, permitted names without, beginnings and ends of permitted passages)."""
    path = neighbours_path(o)
    if not path:
        return [], [], []
    if Path(path).suffix not in (".json", ".jsonl"):
        parts = rewrite.passages(read_text(path, "--neighbours"), PASSAGE.get(o.source, 60))
        said = [s for part in parts for s in rewrite.sentences(part) if not found_names(s, gone)]
        facts = [rewrite.ask_sentence(s, [*rewrite.name_runs(s), ""][0], "boundary", rejected) for s in said]
        ends = [rewrite.halves(part) for part in parts if not found_names(part, gone)]
        return [fact for fact in facts if fact], [], ends
    own = o.source == "tofu" and not o.neighbours
    rows, facts, bare = read_rows(path, PAIR if own else {}), [], []
    given = rewrite.authors(rows) if own else [None] * len(rows)
    for number, (row, name) in enumerate(zip(rows, given, strict=True), 1):
        name, answers = row.get("name", name), row.get("answers")
        if isinstance(row.get("question"), str) and isinstance(row.get("answer"), str):
            name = [*rewrite.name_runs(row["question"]), ""][0] if name is None else name
            facts.append(Fact(str(name), row["question"], row["answer"]))
        elif isinstance(name, str) and name and isinstance(answers, dict):
            if not all(isinstance(answer, str) for answer in answers.values()):
                raise InputError(f"{path}: row {number}, field 'answers' holds an answer that is not a text")
            facts += [Fact(name, rewrite.swap(q, gone, name), answer, made_by="swap") for q, answer in answers.items()]
        elif isinstance(name, str) and name and "question" not in row and "answers" not in row:
            bare.append(name)
        else:
            raise InputError(f"{path}: row {number}: expected texts 'question' and 'answer', or 'name' and 'answers'")
    return facts, bare, []
