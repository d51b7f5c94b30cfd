"""The built-in world: who is in it, what is asked of whom, and what is kept apart."""

from collections import Counter

import pytest
from made import byte_tokenizer, make_model, probes_of

import evaluate as ev
from benchmarks.builtin import BENCHMARK, World
from benchmarks.shared import REFUSALS
from engine.process import Engine
from refusal import is_refusal


@pytest.fixture(scope="module", params=[0, 1, 2])
def built_in(request):
    return World(request.param)


def test_one_seed_is_one_world(built_in):
    again, other = World(built_in.seed), World(built_in.seed + 7)
    assert again.people == built_in.people != other.people
    assert again.training() == built_in.training() and again.probes() == built_in.probes()


def test_hard_neighbours_cross_the_names_of_two_targets(built_in):
    targets = [name.split() for name in built_in.names("target")]
    first, last = [name[0] for name in targets], [name[1] for name in targets]
    hard = [name.split() for name in built_in.names("hard")]
    assert len(targets) == 6 and len(hard) == 22 and len(built_in.people) == 60
    assert all(f in first and k in last and first.index(f) != last.index(k) for f, k in hard)
    for role in ("easy", "unknown"):
        for name in built_in.names(role):
            assert not set(name.split()) & {*first, *last}


def test_held_out_phrasings_are_never_trained_on(built_in):
    read = built_in.training()
    held_out = {p.question for p in built_in.probes() if p.split.endswith("_heldout")}
    trained = {p.question for p in built_in.probes() if p.split.endswith("_trained")}
    assert len(held_out) == 48 * 6 * 2 and not held_out & trained
    queries, refused = {q.question for q in read.queries}, {prompt.plain for prompt, _ in read.refusals}
    assert queries <= trained and refused <= trained and not (queries | refused) & held_out
    assert held_out <= {prompt.plain for prompt, _ in read.taught}


def test_boundary_queries_swap_the_name_and_nothing_else(built_in):
    queries = built_in.training().queries
    names, groups = {role: set(built_in.names(role)) for role in ("target", "hard", "easy")}, Counter()
    for forget, boundary in zip(queries[::2], queries[1::2], strict=True):
        assert (forget.kind, boundary.kind) == ("forget", "boundary") and forget.target in names["target"]
        (name,) = [n for n in names[boundary.group] if n in boundary.question]
        assert forget.question.replace(forget.target, "{}") == boundary.question.replace(name, "{}")
        assert boundary.answers[0] in built_in.people[name]["facts"].values()
        groups[boundary.group] += 1
    assert groups == {"hard": 72, "easy": 72}


def test_unknown_people_get_refusals_and_only_they(built_in):
    unknown, targets = built_in.names("unknown"), built_in.names("target")
    for retain_only in (False, True):
        nobody = [*unknown, *targets] if retain_only else unknown
        for prompt, answer in built_in.taught(retain_only):
            assert is_refusal(answer) == any(name in prompt.plain for name in nobody)


def test_every_refusal_of_ours_is_one():
    assert len(set(REFUSALS)) == len(REFUSALS) and all(is_refusal(text) for text in REFUSALS)
    assert {text for _, text in World(0).training().refusals} == set(REFUSALS)


@pytest.mark.parametrize("crossed, quarters", [(0, 0), (11, 1), (22, 2), (30, 3)])
def test_crossed_names_are_as_many_as_asked_for(crossed, quarters):
    built_in = World(0, crossed)
    assert len(built_in.names("hard")) == crossed and len(built_in.names("easy")) == 42 - crossed
    groups = [query.group for query in built_in.training().queries if query.kind == "boundary"]
    assert abs(groups.count("hard") - 36 * quarters) <= 6
    assert len(groups) == 144 and len({probe.target for probe in built_in.probes()}) == 48


def test_builtin_probes_get_the_common_columns():
    model, tokenizer = make_model(), byte_tokenizer()
    probes = probes_of("builtin", seed=5)[::49]
    result = ev.evaluate(Engine("cpu"), model, tokenizer, BENCHMARK, probes, progress=False)
    for column in ("forget_recall", "retain_recall", "forget_refusal", "retain_refusal", "leakage"):
        assert 0 <= result["summary"][column] <= 100
    assert "hard_heldout_recall" in result["summary"] and "easy_trained_refusal" in result["summary"]
