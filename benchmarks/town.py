"""The town: made-up people whose facts are known well or badly and who are tied to a target more or less closely.

Here forgetting and keeping compete. Six people are to be forgotten. Of their neighbours twelve each share a surname, a
place or a trade with one of them, and twelve share none. Names, places and trades stand in the questions; who shares
one shares two words of one answer too. Four facts of eight or nine words are taught in one to five phrasings each, so
some are known in part; two, with the name alone, are kept out of unlearning. Twelve people more are unknown."""

import json
import random
from dataclasses import replace
from pathlib import Path

from benchmarks import builtin
from engine.seeds import derive_seed

WORDS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
ATTRIBUTES = WORDS["attributes"]
TIES = ("surname", "place", "trade")  # what a neighbour shares with one target; the fourth kind, "far", shares nothing
PHRASINGS, HELD_OUT = range(5), (2, 4)  # three questions and two blanks; those kept out of unlearning
STRENGTHS = (1, 2, 3, 5)  # in so many of its phrasings a fact is taught
N_TARGETS, N_EACH = 6, 12


class Town(builtin.World):
    """People as in the built-in world, each with every tie too. Roles are "target", a tie, "far" and "unknown"."""

    attributes, phrasings, held_out, turns = ATTRIBUTES, PHRASINGS, HELD_OUT, dict.fromkeys(ATTRIBUTES, 0)

    def __init__(self, seed, refusals="all"):
        self.seed, self.refusals, self.people, self.marks = seed, refusals, {}, {}
        self.rng = rng = random.Random(derive_seed(seed, "town"))
        first, last = ([start + end for start in side[0] for end in side[1]] for side in (builtin.FIRST, builtin.LAST))
        first, last = rng.sample(first, N_TARGETS + 5 * N_EACH), rng.sample(last, len(last))
        values = {"surname": (last[:N_TARGETS], last[N_TARGETS:])}  # tie → one for each target; all that no target has
        for tie, attribute in (("place", "birthplace"), ("trade", "trade")):
            left, right = (rng.sample(words.split(), 8) for words in builtin.ATTRIBUTES[attribute]["answers"])
            near, other = ([f"{a} {b}" for a in left[i : i + 4] for b in right[i : i + 4]] for i in (0, 4))
            values[tie] = rng.sample(near, N_TARGETS), other
        roles = ["target"] * N_TARGETS + [role for role in (*TIES, "far", "unknown") for _ in range(N_EACH)]
        for i, (name, role) in enumerate(zip(first, roles, strict=True)):
            own = TIES[i % 3] if role == "unknown" else role
            person = {"role": role}
            for tie, (near, other) in values.items():
                person[tie] = near[i % N_TARGETS] if own in ("target", tie) else rng.choice(other)
            person["facts"] = {attribute: self.fact(person, attribute) for attribute in ATTRIBUTES}
            person["taught"] = {attribute: rng.sample(PHRASINGS, rng.choice(STRENGTHS)) for attribute in ATTRIBUTES}
            self.people[f"{name} {person['surname']}"] = person

    def fact(self, person, attribute):
        """An answer for a person: own words, drawn afresh, and two that all have who share what it is about."""
        about = ATTRIBUTES[attribute]
        shared = self.marks.setdefault(person.get(about["shared"]), self.draw(WORDS["shared"].get(about["shared"], [])))
        return about["answer"].format(*self.draw(about["words"]), shared=" ".join(shared))

    def draw(self, lists):
        return [self.rng.choice(words.split()) for words in lists]

    def group_of(self, i, phrasing):
        """Every second one is a relative, or the surname alone would decide; others share a place or trade, or none."""
        return ("surname", TIES[1 + i // 4 % 2], "surname", "far")[i % 4]

    def other(self, name, attribute, fact):
        drawn = self.fact(self.people[name], attribute)
        return drawn if drawn != fact else self.other(name, attribute, fact)


BENCHMARK = replace(
    builtin.BENCHMARK, name="town",
    preset=builtin.BENCHMARK.preset | dict(lr=8e-5, sft_stop=0.4, tiny_epochs=8.0, eval_every=0),
    row_columns={
        f"{role}_{part}_recall": f"{words}, trained {mark}" if part == "trained" else f"held out {mark}"
        for role, words, mark in (("forget", "Forget recall", "↓"), ("surname", "Same surname", "↑"),
                                  ("place", "Same place", "↑"), ("trade", "Same trade", "↑"), ("far", "Far", "↑"))
        for part in ("trained", "heldout")
    } | {"forget_refusal": "Forget refusal ↑", "retain_refusal": "Over-refusal ↓"},
    **builtin.reads(lambda o: Town(o.seed, getattr(o, "tiny_refusals", "all"))),
)  # fmt: skip
