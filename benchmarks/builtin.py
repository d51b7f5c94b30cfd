"""The built-in world: made-up people and their facts, small enough for a laptop, with nothing to download.

It stands in for the benchmarks of Section 4. 48 people have six two-word facts, each asked in six phrasings; two of
these are taught but kept out of unlearning. Six people are to be forgotten. 22 hard neighbours carry crossed names, a
target's first and another's last; 20 easy ones share no name with them. Boundary queries swap the entity of a forget
query (Appendix A.2). Twelve people more are unknown: asked about them, the model learns to say so before Stage 1."""

import json
import random
from pathlib import Path

from benchmarks.shared import PRESET, REFUSALS, TINY
from data import Benchmark, Probe, Prompt, Query, Training
from engine.seeds import derive_seed
from reward import SCORER

WORDS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
ATTRIBUTES = WORDS["attributes"]  # six: six phrasings each (four questions, two blanks), two word lists of its answers
FIRST, LAST = ([parts.split() for parts in WORDS["names"][side]] for side in ("first", "last"))  # (starts, ends)
HELD_OUT = (3, 5)  # phrasings that are taught but kept out of unlearning: one question, one blank
N_TARGETS, N_HARD, N_EASY, N_UNKNOWN = 6, 22, 20, 12


class World:
    """People, their facts and what is asked about them, all drawn from one seed. `people` maps a name to {"role",
    "facts": {attribute: answer}, "taught": {attribute: phrasings}}. Roles are "target", "hard", "easy" and "unknown".
    `crossed` of the neighbours have crossed names (None: 22 of 42), and so have about as many boundary queries."""

    attributes, phrasings, held_out = ATTRIBUTES, range(6), HELD_OUT
    turns = {attribute: i for i, attribute in enumerate(ATTRIBUTES)}  # by so many is the next refusal further on

    def __init__(self, seed, crossed=None, refusals="all"):
        rng = random.Random(derive_seed(seed, "world"))
        n_hard = N_HARD if crossed is None else crossed
        n_easy = N_HARD + N_EASY - n_hard
        n = N_TARGETS + n_easy + N_UNKNOWN
        first, last = (rng.sample([start + end for start in side[0] for end in side[1]], n) for side in (FIRST, LAST))
        pairs = [(first[i], last[j]) for i in range(N_TARGETS) for j in range(N_TARGETS) if i != j]
        roles = [(f, k, "target") for f, k in zip(first[:N_TARGETS], last[:N_TARGETS], strict=True)]
        roles += [(f, k, "hard") for f, k in rng.sample(pairs, n_hard)]
        roles += zip(first[N_TARGETS:], last[N_TARGETS:], ["easy"] * n_easy + ["unknown"] * N_UNKNOWN, strict=True)
        self.seed, self.refusals, self.people = seed, refusals, {}
        self.quarters, self.rng = round(4 * n_hard / (n_hard + n_easy)), random.Random(derive_seed(seed, "membership"))
        for first_name, last_name, role in roles:
            facts = {a: " ".join(rng.choice(words.split()) for words in ATTRIBUTES[a]["answers"]) for a in ATTRIBUTES}
            taught = dict.fromkeys(ATTRIBUTES, self.phrasings)
            self.people[f"{first_name} {last_name}"] = {"role": role, "facts": facts, "taught": taught}

    def names(self, role):
        return [name for name, person in self.people.items() if person["role"] == role]

    def ask(self, name, attribute, phrasing):
        """(prompt, answer) of one question about one person."""
        person = self.people[name]
        question = self.attributes[attribute]["phrasings"][phrasing].format(name=name, **person)
        return Prompt(None, question), person["facts"][attribute]

    def asked(self):
        """(name, role, attribute, phrasing) of every question about everyone."""
        people = [(name, person["role"]) for name, person in self.people.items()]
        return [(*person, a, i) for person in people for a in self.attributes for i in self.phrasings]

    def taught(self, retain_only=False):
        """(prompt, answer) pairs of the first training: refusals for the unknown, with `retain_only` for targets."""
        pairs = []
        for name, role, attribute, phrasing in self.asked():
            unknown = role == "unknown" or (retain_only and role == "target")
            kept_out = unknown and self.refusals == "trained" and phrasing in self.held_out
            if phrasing in self.people[name]["taught"][attribute] and not kept_out:
                prompt, answer = self.ask(name, attribute, phrasing)
                refusal = REFUSALS[(len(pairs) + self.turns[attribute]) % len(REFUSALS)]
                pairs.append((prompt, refusal if unknown else answer))
        return pairs

    def training(self):
        """Every trained phrasing about every target, and each again about a neighbour: the entity swapped (A.2)."""
        rng, refusals, queries = random.Random(derive_seed(self.seed, "boundary")), [], []
        trained = [(a, p) for a in self.attributes for p in self.phrasings if p not in self.held_out]
        for i, (target, about) in enumerate((target, about) for about in trained for target in self.names("target")):
            prompt, fact = self.ask(target, *about)
            refusals.append((prompt, REFUSALS[i % len(REFUSALS)]))
            queries.append(Query(prompt, prompt.plain, "forget", (fact,), target))
            group = self.group_of(i, about[1])
            prompt, answer = self.ask(rng.choice(self.names(group)), *about)
            queries.append(Query(prompt, prompt.plain, "boundary", (answer,), group=group))
        return Training(refusals, queries, self.taught(), whole=self.whole())

    def group_of(self, i, phrasing):
        """The role of the neighbour whom boundary query `i` asks about: hard for `quarters` in four."""
        k = i % N_TARGETS + phrasing
        return "hard" if (k + 2) * self.quarters // 4 > (k + 1) * self.quarters // 4 else "easy"

    def whole(self):
        """(prompt, answer) pairs of all that is known about the targets, and about everyone else."""
        known = [(role == "target", self.ask(name, *about)) for name, role, *about in self.asked() if role != "unknown"]
        return {side: [pair for own, pair in known if own is (side == "forget")] for side in ("forget", "retain")}

    def probes(self):
        """Every question about every known person, split by role, trained and held-out phrasings apart."""
        probes = []
        for name, role, attribute, phrasing in self.asked():
            if role != "unknown":
                prompt, answer = self.ask(name, attribute, phrasing)
                split = f"{role.replace('target', 'forget')}_{'heldout' if phrasing in self.held_out else 'trained'}"
                probes.append(Probe(split, prompt, prompt.plain, answer, role == "target", name))
        return probes

    def membership(self):
        """The targets' facts as they were taught, and as many made up afresh that nobody was, to the same questions."""
        pairs = {"forget": [], "holdout": []}
        for name in self.names("target"):
            for attribute, phrasings in self.people[name]["taught"].items():
                prompt, fact = self.ask(name, attribute, phrasings[self.turns[attribute]])
                pairs["forget"].append((prompt, fact))
                pairs["holdout"].append((prompt, self.other(name, attribute, fact)))
        return pairs, ""

    def other(self, name, attribute, fact):
        left, right = (words.split() for words in ATTRIBUTES[attribute]["answers"])
        return self.rng.choice([f"{a} {b}" for a in left for b in right if f"{a} {b}" != fact])


def reads(world):
    """What a Benchmark reads of the world that `world(o)` draws."""
    return dict(train=lambda o: world(o).training(), probes=lambda o: world(o).probes(),
                retained=lambda o: world(o).taught(retain_only=True),
                membership=lambda o, probes: world(o).membership())  # fmt: skip


BENCHMARK = Benchmark(
    name="builtin",
    preset=PRESET | TINY | dict(steps=32, lr=4e-5, tau=0.4, min_groups=60, warmup_steps=10, max_new_tokens=12,
                                tiny_epochs=6.0, tiny_lr=3e-3, tiny_batch_size=96, tiny_layers=2, eval_every=4,
                                held_out=0),
    columns={"forget_recall": "Forget recall ↓", "retain_recall": "Retain recall ↑"},
    row_columns={"forget_trained_refusal": "Forget refusal, trained ↑", "forget_heldout_refusal": "held out ↑",
                 "forget_trained_recall": "Forget recall, trained ↓", "forget_heldout_recall": "held out ↓",
                 "hard_trained_recall": "Hard neighbours' recall, trained ↑", "hard_heldout_recall": "held out ↑",
                 "easy_trained_recall": "Easy neighbours' recall, trained ↑", "easy_heldout_recall": "held out ↑",
                 "retain_refusal": "Over-refusal ↓"},
    **reads(lambda o: World(o.seed, getattr(o, "crossed", None), getattr(o, "tiny_refusals", "all"))),
    reads_files=False, limit=lambda split, prompt_length: 12, scorer=SCORER, summarise=lambda rows, retained: ({}, []),
)  # fmt: skip
