"""Attacks tell a model that knows from one that never did; and what tiny models are taught of refusing."""

import json
from dataclasses import replace

import pytest
from cases import ENGINE
from made import probes_of, train_rwku, train_tofu, training_of, write

import rerule
from benchmarks import attacks, builtin, rwku, tiny, tofu
from benchmarks.attacks import kinds
from benchmarks.builtin import HELD_OUT, World
from engine.flags import parse
from refusal import is_refusal

# --- sanity of the figures -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Original and Retained of the whole built-in world, half the usual width, and how likely each finds the facts."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    sizes = "--tiny_hidden 64 --tiny_layers 1 --tiny_epochs 6 --tiny_lr 5e-3 --method retained --device cpu".split()
    rerule.main(rerule.configure([*sizes, "--attack", "membership", "--output_dir", str(folder)]), figures=False)
    return folder, json.loads((folder / "table.json").read_text(encoding="utf-8"))


def test_membership_tells_a_model_that_was_taught_and_no_other(trained):
    original, retained = trained[1]["Original"], trained[1]["Retained"]
    assert original["membership_auc"] > 0.95 and original["membership_auc_low"] > 0.5
    assert retained["membership_auc_low"] < 0.5 < retained["membership_auc_high"]
    assert original["privleak"] < -80
    for score in ("mink", "minkpp", "zlib"):
        assert original[f"membership_auc_{score}"] > 0.9 > 0.75 > retained[f"membership_auc_{score}"] > 0.25


def test_samples_leak_from_a_model_that_was_taught_and_hardly_from_another(trained):
    folder, table = trained
    probes = [probe for probe in World(0).probes() if probe.forget][::3]
    columns = {}
    for phase in ("original", "retained"):
        case = attacks.Case(
            ENGINE, *ENGINE.load(folder / phase), builtin.BENCHMARK, probes, samples=16
        )  # fmt: skip
        columns[phase], _ = kinds.leak(case)
    original, retained = columns["original"], columns["retained"]
    assert table["Original"]["forget_recall"] > 50 and table["Retained"]["forget_recall"] < 5  # as the greedy ones say
    assert original["leak_1"] > 20 > 5 > retained["leak_1"] and original["leak_16"] > 80 > 40 > retained["leak_16"]
    assert original["leak_exact_4"] > 5 * retained["leak_exact_4"]
    assert original["leak_answered_1"] > 95 > 40 > retained["leak_answered_1"]


# --- what is refused before unlearning -------------------------------------------------------------------------------


def held_out(world):
    return {world.ask(name, a, i)[0] for name in world.people for a in builtin.ATTRIBUTES for i in HELD_OUT}


@pytest.mark.parametrize("retain_only", [False, True])
def test_nobody_is_refused_in_a_held_out_phrasing_where_only_trained_ones_are_taught(retain_only):
    every, trained = World(2), World(2, refusals="trained")
    assert every.people == trained.people and every.training().queries == trained.training().queries
    assert every.probes() == trained.probes()
    unseen = held_out(trained)
    assert any(is_refusal(answer) for prompt, answer in every.taught(retain_only) if prompt in unseen)
    taught = trained.taught(retain_only)
    assert not any(is_refusal(answer) for prompt, answer in taught if prompt in unseen)
    asked = {prompt for prompt, answer in taught if is_refusal(answer)}
    assert asked == {prompt for prompt, answer in every.taught(retain_only) if is_refusal(answer)} - unseen
    facts = {pair for pair in taught if not is_refusal(pair[1])}
    assert facts == {pair for pair in every.taught(retain_only) if not is_refusal(pair[1])} and facts


def test_the_flag_reaches_the_world():
    o = rerule.configure(["--tiny_refusals", "trained"])
    assert builtin.BENCHMARK.train(o).taught == World(0, refusals="trained").taught()
    assert builtin.BENCHMARK.retained(o) == World(0, refusals="trained").taught(retain_only=True)
    assert builtin.BENCHMARK.train(parse(rerule.Config, [])).taught == World(0).taught()


def rwku_lessons(folder, **how):
    train_rwku(folder)
    rows = [
        {"instruction": f"What did Ada Pole do in {year}?", "input": "", "output": "I can't say."} for year in "abcdef"
    ]
    write(folder / "reject_target.json", rows)
    taught = tiny.lessons(rwku.BENCHMARK, training_of("rwku", folder), probes_of("rwku", folder), 0, **how)
    return [(prompt, answer) for prompt, answer in taught if is_refusal(answer)]


def test_rwkus_refusals_to_others_can_keep_to_trainings_own_words(tmp_path):
    every, trained = rwku_lessons(tmp_path), rwku_lessons(tmp_path, refusals="trained")
    own = [f"What did * do in {year}?" for year in "abcdef"]
    assert trained and all(prompt.user and prompt == rwku.chat(prompt.user) for prompt, _ in trained)
    assert sorted(name_out(prompt.user, own) for prompt, _ in trained) == own  # and to its questions
    assert any(prompt.opening == "Answer:" for prompt, _ in every)  # else also as the evaluation asks
    assert any("is a ___" in prompt.plain for prompt, _ in every)
    assert not any("Ada Pole" in prompt.plain for prompt, _ in every + trained)


def name_out(question, forms):
    """The form that a question has, whoever it is about."""
    ends = [form.split("*") for form in forms]
    return next((f"{a}*{b}" for a, b in ends if question.startswith(a) and question.endswith(b)), question)


def tofu_probes(folder):
    """The forget rows are about an author with a name, whom the paraphrased ones name too."""
    train_tofu(folder)
    found = []
    for probe in probes_of("tofu", folder):
        question = probe.question.replace("Orla", "Orla Venn") if probe.forget else probe.question
        target = "Orla Venn" if probe.forget else ""
        found.append(replace(probe, question=question, prompt=tofu.inst(question), target=target))
    training = training_of("tofu", folder)
    training.refusals = [(tofu.inst(p.user.replace("Orla", "Orla Venn")), text) for p, text in training.refusals]
    return training, found


def test_tofus_refusals_to_others_can_leave_out_its_paraphrased_questions(tmp_path):
    training, probes = tofu_probes(tmp_path)
    shown = {}
    for refusals in ("all", "trained"):
        taught = tiny.lessons(tofu.BENCHMARK, training, probes, 0, refusals)
        shown[refusals] = [prompt.user for prompt, answer in taught if is_refusal(answer)]
    assert any(user.startswith("Say what") for user in shown["all"])
    assert shown["trained"] and all(user.startswith("What did") for user in shown["trained"])
    assert not any("Orla Venn" in user for users in shown.values() for user in users)


@pytest.mark.parametrize("refusals", ["all", "trained"])
def test_a_retained_tiny_model_is_taught_nothing_of_the_target(tmp_path, refusals):
    training, probes = tofu_probes(tmp_path / "tofu")
    folder = train_rwku(tmp_path / "rwku")
    for benchmark, read, asked in (
        (tofu.BENCHMARK, training, probes),
        (rwku.BENCHMARK, training_of("rwku", folder), probes_of("rwku", folder)),
    ):
        retained = tiny.lessons(benchmark, read, asked, 0, refusals, retain_only=True)
        every = tiny.lessons(benchmark, read, asked, 0, refusals)
        prompts = {prompt for prompt, _ in retained}
        forget = {form for p in asked if p.forget for form in (p.prompt, *benchmark.wordings(p))}
        forget |= {query.prompt for query in read.queries if query.kind == "forget"}
        assert not prompts & forget and forget <= {prompt for prompt, _ in every}
        known = {p.answer for p in asked if not p.forget} | {a for q in read.queries for a in q.answers}
        answers = {answer for _, answer in retained if not is_refusal(answer)}
        assert answers <= known and not answers & ({p.answer for p in asked if p.forget} - known)
        assert {(p.prompt, p.answer) for p in asked if not p.forget} <= set(retained)
