"""The town: who is tied to whom, what is taught how often, and a run of the driver on a small one."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
from made import byte_tokenizer, make_model, probes_of
from miniature import FLAGS, driver

import benchmarks
import evaluate as ev
from baselines.train import forbidden_terms
from benchmarks import town as room
from benchmarks.town import ATTRIBUTES, BENCHMARK, HELD_OUT, STRENGTHS, TIES, Town
from engine.process import Engine
from refusal import is_refusal
from reward import rouge_l_recall

ROLES = ("target", *TIES, "far", "unknown")


@pytest.fixture(scope="module", params=[0, 1, 2])
def town(request):
    return Town(request.param)


def shared(person, other):
    return [tie for tie in TIES if person[tie] == other[tie]]


def test_one_seed_is_one_town(town):
    again, other = Town(town.seed), Town(town.seed + 7)
    assert again.people == town.people != other.people
    assert again.training() == town.training() and again.probes() == town.probes()


def test_a_neighbour_shares_its_tie_with_one_target_and_nothing_else_with_any(town):
    assert [len(town.names(role)) for role in ROLES] == [6, 12, 12, 12, 12, 12]
    assert len({name.split()[0] for name in town.people}) == len(town.people) == 66  # first names are unique
    targets = [town.people[name] for name in town.names("target")]
    for tie in TIES:
        assert len({target[tie] for target in targets}) == 6
    for name, person in town.people.items():
        assert name.split()[1] == person["surname"]
        ties = [tie for target in targets for tie in shared(person, target)]
        expected = {"target": [*TIES], "far": [], "unknown": ties[:1]}.get(person["role"], [person["role"]])
        assert ties == expected and (person["role"] != "unknown" or len(ties) == 1)
    of_unknown = [shared(town.people[name], target) for name in town.names("unknown") for target in targets]
    assert Counter(tie for ties in of_unknown for tie in ties) == dict.fromkeys(TIES, 4)


def test_who_shares_a_tie_shares_two_words_of_the_answer_to_it(town):
    attribute_of = {about["shared"]: attribute for attribute, about in ATTRIBUTES.items()}
    targets = [town.people[name] for name in town.names("target")]
    for person in town.people.values():
        for attribute, answer in person["facts"].items():
            about = ATTRIBUTES[attribute]
            assert len(answer.split()) in (8, 9) and not is_refusal(answer)
            assert sum(answer.split().count(word) for part in about["words"] for word in part.split()) >= 4
        for target in targets:
            for tie in shared(person, target):
                both = [set(p["facts"][attribute_of[tie]].split()) for p in (person, target)]
                marks = {word for words in room.WORDS["shared"][tie] for word in words.split()}
                assert len(both[0] & both[1] & marks) == 2
    asked = [(q.question, q.answers[0]) for q in town.training().queries if q.kind == "forget"]
    terms = forbidden_terms(asked)  # PURGE's: what is shared, as the only names in an answer
    assert len(terms) > 6 and all(len(term.split()) == 2 for term in terms)
    for about in ATTRIBUTES.values():  # the fixed words alone are no right answer to the reward, which asks for > 0.3
        template = about["answer"].replace("{shared}", "{} {}")
        fixed = " ".join(word for word in template.split() if word != "{}")
        assert rouge_l_recall(fixed, template.format(*"abcdefgh")) <= 0.3


def test_a_fact_is_taught_in_one_to_five_of_its_phrasings(town):
    taught = Counter()
    for prompt, answer in town.taught():
        if not is_refusal(answer):
            (name,) = [name for name in town.people if name in prompt.plain]
            (attribute,) = [a for a, fact in town.people[name]["facts"].items() if fact == answer]
            taught[name, attribute] += 1
            assert town.people[name]["role"] != "unknown"
    assert len(taught) == 54 * 4 and set(taught.values()) == set(STRENGTHS)
    assert all(30 <= list(taught.values()).count(strength) <= 80 for strength in STRENGTHS)
    assert len(set(town.taught())) == len(town.taught())


@pytest.mark.parametrize("retain_only", [False, True])
@pytest.mark.parametrize("refusals", ["all", "trained"])
def test_unknown_people_get_refusals_and_only_they(retain_only, refusals):
    town = Town(3, refusals)
    nobody = town.names("unknown") + town.names("target") * retain_only
    held_out = {town.ask(name, a, i)[0] for name in nobody for a in ATTRIBUTES for i in HELD_OUT}
    taught = {prompt: is_refusal(answer) for prompt, answer in town.taught(retain_only)}
    assert all(refused == any(name in prompt.plain for name in nobody) for prompt, refused in taught.items())
    refused = {prompt for prompt, refused in taught.items() if refused}
    assert bool(refused & held_out) == (refusals == "all")


def test_held_out_phrasings_have_the_name_alone_and_are_never_trained_on(town):
    read, probes = town.training(), town.probes()
    assert len(probes) == 54 * 4 * 5 and len({probe.question for probe in probes}) == len(probes)
    held_out = {probe.question for probe in probes if probe.split.endswith("_heldout")}
    assert len(held_out) == 54 * 4 * 2 and held_out & {prompt.plain for prompt, _ in read.taught}
    asked = {query.question for query in read.queries} | {prompt.plain for prompt, _ in read.refusals}
    assert asked <= {probe.question for probe in probes} - held_out
    for probe in probes:
        person = town.people[probe.target]
        assert any(person[tie] in probe.question for tie in ("place", "trade")) != (probe.question in held_out)
        assert probe.split.split("_")[0] == {"target": "forget"}.get(person["role"], person["role"])
        assert probe.forget == (person["role"] == "target") and probe.answer in person["facts"].values()


def test_a_boundary_query_is_its_forget_query_about_a_neighbour_half_of_them_relatives(town):
    queries, groups = town.training().queries, Counter()
    for forget, boundary in zip(queries[::2], queries[1::2], strict=True):
        (name,) = [name for name in town.people if name in boundary.question]
        person, target = town.people[name], town.people[forget.target]
        assert (forget.kind, boundary.kind) == ("forget", "boundary") and person["role"] == boundary.group
        swapped = forget.question.replace(forget.target, name)
        for tie in ("place", "trade"):
            swapped = swapped.replace(target[tie], person[tie])
        assert swapped == boundary.question and boundary.answers[0] in person["facts"].values()
        assert forget.answers[0] in target["facts"].values()
        groups[boundary.group] += 1
    assert groups == {"surname": 36, "place": 9, "trade": 9, "far": 18}


def test_membership_has_taught_facts_and_others_that_nobody_was_taught(town):
    o = SimpleNamespace(seed=town.seed)
    texts, note = BENCHMARK.membership(o, [])
    forget, holdout = texts["forget"], texts["holdout"]
    assert note == "" and len(forget) == 6 * 4 and [p for p, _ in forget] == [p for p, _ in holdout]
    taught = set(town.taught())
    assert set(forget) <= taught and not {fact for _, fact in holdout} & {answer for _, answer in taught}


def test_its_columns_are_split_by_tie():
    probes = probes_of("town", seed=5)[::49]
    result = ev.evaluate(Engine("cpu"), make_model(context=128), byte_tokenizer(), BENCHMARK, probes, progress=False)
    assert set(BENCHMARK.row_columns) <= set(result["summary"]) and benchmarks.ALL["town"] is BENCHMARK


def test_the_driver_runs_on_a_small_town(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "N_TARGETS", 2)
    monkeypatch.setattr(room, "N_EACH", 3)
    driver(*FLAGS, "--benchmark", "town", "--output_dir", tmp_path / "run", "--attack", "membership")
    table = json.loads((tmp_path / "run" / "table.json").read_text(encoding="utf-8"))
    assert [*table] == ["Original", "Retained", "Rej. Steer", "RULE", "ReRULE"]
    for row in table.values():
        assert set(BENCHMARK.row_columns) <= set(row) and 0 <= row["place_heldout_recall"] <= 100
        assert 0 <= row["membership_auc"] <= 1
