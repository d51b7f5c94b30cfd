"""What is made of the facts: forget and boundary queries, and the rows of the files.

Covers Appendix A: questions (Type II) and completions (Type I) of facts to forget (A.1) and of neighbours (A.2).

Deviations
- Neighbours come from the user (`--neighbours`), else from the language model, else from a benchmark's retain data.
- Type I for MUSE are first halves of passages, as raw text is what was trained on; elsewhere statements with a gap.
- For `qa` and `text` a share of the facts is held out of training for evaluation, with its neighbours, and every fact
  is asked again in a phrasing that training never uses.
- The refusals are worded by us (`wording.json`), without and with the name of what is to be forgotten."""

import random
from collections import namedtuple
from dataclasses import replace
from itertools import cycle

from benchmarks.metrics import words
from build_data.rewrite import NOT_WANTED, WORDING, Fact, complete_all, found_names, normal, swap
from config import InputError
from engine.seeds import derive_seed
from refusal import is_refusal

REFUSALS = {kind: WORDING[kind] for kind in ("plain", "named")}
PHRASINGS = WORDING["phrasings"]  # RWKU's name of the attack → ours, kept out of training
Item = namedtuple("Item", "query answer name mode made_by")  # mode: "qa" (Type II) or "completion" (Type I)


def items_of(fact):
    """The question of a fact, and its completion unless none is wanted."""
    question = Item(fact.question, fact.answer, fact.name, "qa", fact.made_by)
    completion = Item(fact.completion, fact.ending, fact.name, "completion", fact.completed_by)
    return [question] if fact.completed_by == NOT_WANTED else [question, completion]


class Check:
    """What a query must not be; keeps count of what it has turned away and of what it has let in.
    gone: names that no boundary query or answer may hold; evaluated: {normal form: split} of evaluation's queries;
    free: splits that forget queries may share (TOFU evaluates on the questions that it trains on)."""

    def __init__(self, gone, evaluated, free, rejected):
        self.gone, self.evaluated, self.free = gone, evaluated, free
        self.forget, self.boundary, self.rejected = set(), set(), rejected

    def reject(self, reason, text):
        self.rejected.append({"reason": reason, "text": text})

    def lets_in(self, kind, item):
        """Whether the item passes as a "forget" or "boundary" query; it is then remembered, else rejected."""
        form, split, boundary = normal(item.query), self.evaluated.get(normal(item.query)), kind == "boundary"
        faults = (
            (f"no usable {item.mode} came", not form),
            ("an evaluation query", split and (boundary or split not in self.free)),
            ("a forget query" if boundary else "twice", form in self.forget),
            ("twice", boundary and form in self.boundary),
            ("no answer known", boundary and not normal(item.answer)),
            ("still names the target", boundary and found_names(f"{item.query} {item.answer}", self.gone)),
            ("its answer reads as a refusal", boundary and is_refusal(item.answer)),
        )
        fault = next((fault for fault, holds in faults if holds), "")
        if fault:
            self.reject(f"{kind}: {fault}", item.query or item.name)
        else:
            (self.boundary if boundary else self.forget).add(form)
        return not fault

    def let_in(self, kind, facts):
        """(number of the fact, item) of every query of the facts that passes; a fact may be None."""
        return [(i, x) for i, fact in enumerate(facts) if fact for x in items_of(fact) if self.lets_in(kind, x)]


def find_neighbours(o, facts, neighbours, ask, check):
    """For each fact to forget the fact of a permitted neighbour that asks the same, or None (A.2)."""
    permitted, bare, ends = neighbours
    write = ask and not (permitted and o.neighbours)  # the user's own answers come before a language model's
    found = written(o, facts, bare, ask, check) if write else matched(o, facts, permitted, bare, check)
    if o.source == "muse":  # permitted passages, one for each that is to be forgotten
        ends = iter(ends)
        for i, (fact, other) in enumerate(zip(facts, found, strict=True)):
            begin, end = next(ends, ("", "")) if other and fact.completion else ("", "")
            by = "given" if fact.completion else NOT_WANTED
            found[i] = other and replace(other, completion=begin, ending=end, completed_by=by)
        return found
    made = iter(complete_all([fact for fact in found if fact], ask, o.llm_model))
    return [fact and next(made) for fact in found]


def written(o, facts, bare, ask, check):
    """Neighbours by a language model, one of those named in `bare` where there are any."""
    some = f", one of {', '.join(sorted(bare)[:20])}" if bare else ""
    about, found = dict(permitted=some, names=", ".join(check.gone)), []
    blanks = [{"name": fact.name or "its subject", "question": fact.question, **about} for fact in facts]
    for fact, reply in zip(facts, ask("neighbours", blanks), strict=True):
        if not reply:
            check.reject("boundary: no neighbour came in form", fact.question)
        found.append(reply and Fact(reply["entity"], reply["question"], reply["answer"], made_by=f"llm {o.llm_model}"))
    return found


def matched(o, facts, permitted, bare, check):
    """Neighbours out of permitted facts: for each fact in turn the likest that is left."""
    first = Check(check.gone, check.evaluated, (), check.rejected)  # turn away now what would be turned away later
    first.forget = check.forget
    permitted = [fact for fact in permitted if first.lets_in("boundary", items_of(fact)[0])]
    random.Random(derive_seed(o.seed, "neighbours")).shuffle(permitted)
    found, used = [], set()
    for i, order in enumerate(match(facts, permitted)):
        best = next((j for j in order if j not in used), None)
        used.add(best)
        found.append(None if best is None else permitted[best])
        if best is None:
            asked = swap(facts[i].question, check.gone, bare[i % len(bare)]) if bare else facts[i].question
            check.reject(f"boundary: {'no answer known' if bare else 'no neighbour is left'}", asked)
    return found


def match(facts, neighbours):
    """For each fact the neighbours' facts in order of likeness: the same words asked, the names aside (Jaccard).
    Returns: an iterator of lists of indices into `neighbours`, one a fact; ties stay in the neighbours' order."""
    asked, theirs = ([{*words(f.question)} - {*words(f.name)} for f in own] for own in (facts, neighbours))
    for ours in asked:
        like = [len(ours & other) / max(1, len(ours | other)) for other in theirs]
        yield sorted(range(len(neighbours)), key=lambda i: -like[i])


def hold_out(o, facts, found, check):
    """qa, text: facts and neighbours kept out of training, and RWKU's evaluation files made of them. Only a fact whose
    four queries, two of them its neighbour's, are in order is held out. Returns: {file: rows}, numbers of the facts."""

    def asked(fact):
        return {normal(fact.question), normal(fact.completion)}

    def row(query, answer, level, kind, **more):
        return {"query": query, "answer": answer, "level": str(level), "type": kind, "subject": o.target, **more}

    whole = [i for i, (fact, other) in enumerate(zip(facts, found, strict=True)) if other and fact.answer]
    whole = [i for i in whole if asked(facts[i]) <= check.forget and asked(found[i]) <= check.boundary]
    if len(whole) < 2:
        have = f"{len(whole)} of {len(facts)} facts have a permitted neighbour whose answer is known"
        wanted = "2 or more, one to train on and one to evaluate (give more --neighbours)"
        raise InputError(f"--input {o.input}: {have}; expected {wanted}")
    n = min(len(whole) - 1, max(1, round(o.held_out * len(whole))))
    held = sorted(random.Random(derive_seed(o.seed, "held out")).sample(whole, n))
    files = {"intro.json": [{"target": o.target, "intro": f"Please forget {o.target}."}]}
    for level, kind in ((1, "cloze"), (2, "simple question")):
        items, near = ([items_of(side[i])[2 - level] for i in held] for side in (facts, found))
        files[f"forget_level{level}.json"] = [row(i.query, i.answer, level, kind) for i in items]
        files[f"neighbor_level{level}.json"] = [row(i.query, i.answer, level, kind, neighbor=i.name) for i in near]
    turns = zip(facts, cycle(PHRASINGS.items()), strict=False)
    asked_again = [(fact, kind, phrasing.format(fact.question)) for fact, (kind, phrasing) in turns if fact.answer]
    files["forget_level3.json"] = [row(question, fact.answer, 3, kind) for fact, kind, question in asked_again]
    return files, held


def refusals(names, seed):
    """One refusal, that `is_refusal` recognises, for each name ("" for none), by turns without and with the name."""
    rng, left, given = random.Random(derive_seed(seed, "refusals")), {"plain": [], "named": []}, []
    for i, name in enumerate(names):
        kind = "named" if name and i % 2 else "plain"
        left[kind] = left[kind] or rng.sample(REFUSALS[kind], len(REFUSALS[kind]))
        said = left[kind].pop().format(name=name)
        given.append(said if is_refusal(said) else rng.choice(REFUSALS["plain"]))
    return given


def training_rows(forget, boundary, seed):
    """Rows of RULE's two files: of Stage 1, and of Stage 2 with the forget queries first."""
    stage1, stage2 = [], []
    for item, refusal in zip(forget, refusals([item.name for item in forget], seed), strict=True):
        marks = {"mode": item.mode, "made_by": item.made_by}
        row = {"instruction": item.query, "input": "", "output": refusal, "subject": item.name}
        stage1.append(row | {"org_answer": item.answer} | marks)
        stage2.append({"prompt": item.query, "solution": ["<reject>", refusal, item.name]} | marks)
    stage2 += [{"prompt": item.query, "solution": ["<normal>", item.answer], "neighbor": item.name, "mode": item.mode,
                "made_by": item.made_by} for item in boundary]  # fmt: skip
    return stage1, stage2
