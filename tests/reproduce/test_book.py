"""The book of our own: what its files hold, read back by MUSE's own reader."""

import json

import pytest
from made import probes_of, training_of

from benchmarks.builtin import World
from benchmarks.shared import REFUSALS
from refusal import is_refusal
from reproduce import book


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return book.write(tmp_path_factory.mktemp("book"), 3)


def rows(folder, name):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def test_a_chapter_tells_six_facts_and_verbmem_asks_for_the_last_four(folder):
    world, passages = World(3), rows(folder, "verbmem/forget")
    assert len(passages) == 18  # six people, three chapters
    name, person = next((name, person) for name, person in world.people.items() if person["role"] == "target")
    facts = person["facts"]
    first, second = f"{name} was born in {facts['birthplace']}.", f"The profession of {name} is {facts['trade']}."
    assert passages[0]["prompt"] == f"{first} {second}"
    assert passages[0]["gt"].startswith(f"{name} keeps a {facts['pet']}. The favourite dish of {name} is")
    for passage in passages:
        text = f"{passage['prompt']} {passage['gt']}"
        person = next(person for name, person in world.people.items() if text.count(name) == 6)
        assert text.count(".") == 6 and passage["prompt"].count(".") == 2 and "_" not in text
        assert person["role"] == "target" and all(text.count(f" {fact}.") == 1 for fact in person["facts"].values())


def test_every_fact_is_asked_once_and_in_words_of_its_own(folder):
    world, trained = World(3), {query.question for query in training_of("muse", folder, 3).queries}
    for side, roles in (("forget", ("target",)), ("retain", ("hard", "easy"))):
        asked = rows(folder, f"knowmem/{side}_qa")
        assert len(asked) == {"forget": 36, "retain": 84}[side] and not trained & {row["question"] for row in asked}
        for row in asked:
            person = next(person for name, person in world.people.items() if name in row["question"])
            assert person["role"] in roles and row["answer"] in person["facts"].values()


def test_examples_are_the_same_on_both_sides_and_of_nobody_else(folder):
    shots = rows(folder, "knowmem/forget_qa_icl")
    assert shots == rows(folder, "knowmem/retain_qa_icl") and len(shots) == 2
    world, training = World(3), training_of("muse", folder, 3)
    name = next(name for name in world.people if name in shots[0]["question"])
    assert world.people[name]["role"] == "unknown"
    assert all(name not in query.question for query in training.queries)
    opening = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in shots)
    assert all(query.prompt.plain.startswith(opening) for query in training.queries)
    prompts = [probe.prompt.plain for probe in probes_of("muse", folder) if probe.split != "verbmem"]
    assert len(prompts) == 120 and all(prompt.startswith(opening) for prompt in prompts)


def test_training_asks_for_facts_chapters_and_people_of_no_book(folder):
    world, training = World(3), training_of("muse", folder, 3)
    kinds = {kind: [q for q in training.queries if q.kind == kind] for kind in ("forget", "boundary")}
    assert {kind: len(own) for kind, own in kinds.items()} == {"forget": 144 + 18 + 36, "boundary": 144 + 18}
    roles = {"forget": [], "boundary": []}
    for kind, queries in kinds.items():
        for query in queries:
            person = next(person for name, person in world.people.items() if name in query.question)
            role, facts = person["role"], person["facts"]
            roles[kind].append(role)
            (answer,) = query.answers
            if role == "unknown":
                assert answer in REFUSALS
            elif query.question.count(".") == 3:  # half a chapter
                assert sum(fact in query.question for fact in facts.values()) == 3
                assert sum(fact in answer for fact in facts.values()) == 3 and answer.count(".") == 3
            else:
                assert answer in facts.values()
    assert {kind: set(own) for kind, own in roles.items()} == {
        "forget": {"target", "unknown"}, "boundary": {"hard", "easy"},
    }  # fmt: skip
    assert roles["forget"].count("unknown") == 36
    refused = [(prompt, is_refusal(refusal)) for prompt, refusal in training.refusals]
    assert refused == [(query.prompt, True) for query in kinds["forget"]]
    modes = {row["mode"] for row in rows(folder, "rl_rejection_with_neighbor")}
    assert modes == {"qa", "completion"} and all("_" not in q.question for q in training.queries)


def test_a_book_follows_from_its_seed(folder, tmp_path):
    book.write(tmp_path / "again", 3)
    book.write(tmp_path / "other", 4)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.json"))
    assert len(files) == 7
    assert all((tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes() for name in files)
    assert all((tmp_path / "other" / name).read_bytes() != (folder / name).read_bytes() for name in files)
