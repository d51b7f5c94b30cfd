"""Relearning and rounding: always in copies, on the right probes, in the right layers; WHP's pair and bf16 too."""

import json
import sys
from importlib.machinery import ModuleSpec
from statistics import fmean
from types import ModuleType, SimpleNamespace

import pytest
import torch
from cases import ENGINE, learned, probe, probes, small_case, unchanged, words
from conftest import tiny
from made import byte_tokenizer, make_model, make_rwku, probes_of

import evaluate as ev
from benchmarks import ALL, attacks, builtin
from benchmarks.attacks import kinds
from benchmarks.attacks.measures import rounded
from benchmarks.metrics import UNSEEN
from config import InputError
from data import encode_answer, encode_prompt
from engine.model import Pair

STEPS = (0, 5, 10, 20, 50)

# --- relearning ------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained_on(monkeypatch):
    """The rows of every step of SFT, (prompt ids, answer ids)."""
    seen, loss_of = [], kinds.sft_loss_of

    def spy(model, rows):
        seen.append(rows)
        return loss_of(model, rows)

    monkeypatch.setattr(kinds, "sft_loss_of", spy)
    return seen


@pytest.fixture
def brief(monkeypatch):
    """Relearning of two steps."""
    monkeypatch.setattr(kinds, "STEPS", (0, 2))


def encoded(some):
    return {(*encode_prompt(words(), p.prompt), *encode_answer(words(), p.prompt, p.answer)) for p in some}


def test_relearning_leaves_the_model_and_begins_with_its_greedy_answers():
    model = learned()
    same, case = unchanged(model), small_case(model)
    columns, rows = kinds.relearn(case)
    assert same() and all(p.grad is None for p in model.parameters())
    found = ev.evaluate(ENGINE, model, words(), builtin.BENCHMARK, probes(), progress=False)
    assert columns["relearn_forget_0"] == pytest.approx(found["summary"]["forget_recall"])
    assert columns["relearn_neighbours_0"] == columns["relearn_forget_0"] > 0
    first = [row["prediction"] for row in rows if (row["taught"], row["step"]) == ("forget", 0)]
    assert first == [row["prediction"] for row in found["per_example"] if row["forget"]]
    expected = [f"relearn_{name}_{step}" for name in ("forget", "half", "neighbours") for step in STEPS]
    assert sorted(columns) == sorted(["relearn_lr", *expected]) and columns["relearn_lr"] == 1e-4
    for name in ("forget", "half", "neighbours"):
        for step in STEPS:
            own = [r["rouge_l_recall"] for r in rows if (r["taught"], r["step"]) == (name, step)]
            assert columns[f"relearn_{name}_{step}"] == pytest.approx(100 * fmean(own))
    assert json.dumps(rows)


def test_the_copy_is_trained_in_float32_and_learns():
    model = learned(1)
    case = small_case(model, relearn_lr=1e-2)
    copies = []
    for step, copy in kinds.fine_tuned(case, case.forget, 1e-2, "forget"):
        copies.append((step, {name: p.detach().clone() for name, p in copy.named_parameters()}))
        assert copy is not model and all(p.dtype == torch.float32 for p in copy.parameters())
    assert [step for step, _ in copies] == [*STEPS]
    for (_, one), (_, other) in zip(copies, copies[1:], strict=False):
        assert all(not torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(p, dict(copies[0][1])[name]) for name, p in model.named_parameters())
    columns, _ = kinds.relearn(case)
    assert columns["relearn_forget_50"] == 100 > columns["relearn_forget_0"] and columns["relearn_lr"] == 1e-2


def flat(step):
    return {tuple(prompt + answer) for prompt, answer in step}


def test_halves_are_disjoint_in_answers(trained_on):
    case = small_case()
    case.probes.append(probe("forget", "Which bird has Ada ?", "red kite", target="Ada"))  # an answer asked for twice
    _, rows = kinds.relearn(case)
    asked, half = (
        {row["answer"] for row in rows if row["taught"] == "half"},
        set().union(*map(flat, trained_on[50:100])),
    )
    known = {p.answer for p in case.forget if encoded([p]) <= half}
    assert known and asked and not known & asked and known | asked == {p.answer for p in case.forget}
    assert half == encoded(p for p in case.forget if p.answer in known) and abs(len(known) - len(asked)) <= 1


def test_each_part_trains_on_its_own_probes(trained_on):
    case = small_case()
    case.probes.append(probe(UNSEEN, "Which bird , in other words ?", "red kite", target="Ada"))
    kinds.relearn(case)
    steps, forget, retain = list(map(flat, trained_on)), encoded(case.forget), encoded(case.retain)
    assert len(steps) == 150 and all(len(step) <= kinds.BATCH for step in trained_on)
    assert set().union(*steps[:50]) == forget and set().union(*steps[50:100]) < forget
    assert set().union(*steps[100:]) == retain and not retain & forget


def test_r_compares_with_a_retained_model():
    known = {"relearn_forget_0": 10.0, "relearn_forget_50": 20.0}
    columns, _ = kinds.relearn(small_case(relearn_lr=1e-2, retained=known))
    gain = columns["relearn_forget_50"] - columns["relearn_forget_0"]
    assert columns["relearn_r"] == pytest.approx(10 / gain) and gain > 10


def test_one_seed_is_one_relearning(monkeypatch):
    monkeypatch.setattr(kinds, "STEPS", (0, 8))
    monkeypatch.setattr(kinds, "BATCH", 3)  # of nine: the order tells

    def weights_of(seed, name="forget"):
        *_, (_, copy) = kinds.fine_tuned(small_case(seed=seed), probes()[:9], 1e-2, name)
        return torch.cat([p.detach().flatten() for p in copy.parameters()])

    assert torch.equal(weights_of(0), weights_of(0)) and not torch.equal(weights_of(0), weights_of(1))
    assert not torch.equal(weights_of(0), weights_of(0, "half"))
    assert kinds.relearn(small_case(relearn_lr=1e-2)) == kinds.relearn(small_case(relearn_lr=1e-2))


@pytest.mark.parametrize("retained", [{}, {"relearn_forget_0": 1.0, "relearn_forget_10": 2.0}])
def test_a_gradient_that_is_not_finite_ends_it_with_a_note(monkeypatch, retained):
    loss_of, calls = kinds.sft_loss_of, []

    def broken(model, rows):
        calls.append(model)
        return loss_of(model, rows) * (torch.nan if len(calls) == 7 else 1.0)

    monkeypatch.setattr(kinds, "sft_loss_of", broken)
    monkeypatch.setattr(kinds, "STEPS", (0, 5, 10))
    case = small_case(retained=retained)
    columns, _ = kinds.relearn(case)
    assert case.notes == ["relearn: a gradient is not finite at step 7 (forget)"] and len(calls) == 7 + 10 + 10
    assert "relearn_forget_5" in columns and "relearn_forget_10" not in columns and "relearn_half_10" in columns
    assert "relearn_r" not in columns


def test_what_cannot_be_halved_or_has_no_neighbours_is_left_out_with_a_note(brief):
    case = small_case()
    case.probes = [p for p in case.forget if p.answer == "red kite"]
    columns, _ = kinds.relearn(case)
    assert case.notes == [f"relearn: too few probes to train on ({name})" for name in ("half", "neighbours")]
    assert "relearn_forget_2" in columns and "relearn_half_0" not in columns


def test_larger_models_get_a_smaller_rate(brief, monkeypatch):
    case = small_case()
    case.probes = case.probes[:1]
    assert kinds.relearn(case)[0]["relearn_lr"] == 1e-4
    monkeypatch.setattr(kinds, "SMALL", sum(p.numel() for p in case.model.parameters()) - 1)
    assert kinds.relearn(case)[0]["relearn_lr"] == 1e-5


def test_answers_too_long_to_train_on_are_told_before_anything_is_computed():
    for forget in (True, False):
        asked = [probe("forget", "who ?", "red kite"), probe("other", "long ?", "w" * 60, forget)]
        with pytest.raises(InputError, match="exceed the model's context of 64"):
            attacks.Case(ENGINE, make_model(context=64), byte_tokenizer(), builtin.BENCHMARK, asked)


# --- rounding --------------------------------------------------------------------------------------------------------


def layers_of(model):
    return {n: m for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and n != "lm_head"}


@pytest.mark.parametrize("bits", [4, 8])
def test_linear_layers_are_rounded_and_nothing_else(any_model, bits):
    before = {name: p.detach().clone() for name, p in any_model.named_parameters()}
    n = kinds.round_layers(any_model, lambda w: rounded(w, bits))
    layers = layers_of(any_model)
    assert n == len(layers) == {"llama": 14, "qwen2": 14, "gpt2": 8}[any_model.config.model_type]
    for name, p in any_model.named_parameters():
        if name.endswith(".weight") and name.removesuffix(".weight") in layers:
            assert torch.equal(p, rounded(before[name], bits)) and not torch.equal(p, before[name])
        else:
            assert torch.equal(p, before[name]), name
    if any_model.config.model_type == "gpt2":
        assert {type(layer).__name__ for layer in layers.values()} == {"Conv1D"}


def test_rounding_leaves_the_model_and_asks_again(monkeypatch):
    model, used = learned(), []
    monkeypatch.setattr(kinds.measures, "rounded", lambda w, *how: (used.append(how), rounded(w, *how))[1])
    same, case = unchanged(model), small_case(model)
    columns, rows = kinds.quantize(case)
    assert same() and used == [how for how in ((8,), (4,)) for _ in layers_of(model)]
    known = fmean(row["rouge_l_recall"] for row in case.before if row["forget"]) * 100
    for bits in (8, 4):
        copy = learned()
        kinds.round_layers(copy, lambda w, bits=bits: rounded(w, bits))
        found = ev.evaluate(ENGINE, copy, words(), builtin.BENCHMARK, probes(), progress=False)["summary"]
        for side, measure in (("forget", "recall"), ("retain", "recall"), ("forget", "refusal")):
            assert columns[f"{side}_{measure}_{bits}bit"] == pytest.approx(found[f"{side}_{measure}"])
        q = min((100 - found["forget_recall"]) / (100 - known), 1)
        assert columns[f"quantize_q_{bits}bit"] == pytest.approx(q)
    assert len(rows) == 2 * len(probes()) and {row["weights"] for row in rows} == {"4bit", "8bit"}


def test_q_is_the_share_of_what_was_forgotten_that_still_is(monkeypatch):
    """Half of it was; what then comes back is this model's own knowledge, or nothing from a head of zeros."""
    rows = [{"forget": True, "split": split, "rouge_l_recall": r} for split, r in (("a", 0.5), (UNSEEN, 1.0))]
    rows.append({"forget": False, "split": "b", "rouge_l_recall": 1.0})
    monkeypatch.setattr(kinds, "round_layers", lambda model, way: 1)
    columns, _ = kinds.quantize(small_case(rows=rows))
    after = columns["forget_recall_4bit"]  # of this model, for nothing was rounded
    assert after > 60 and columns["quantize_q_4bit"] == pytest.approx((100 - after) / 50)
    monkeypatch.setattr(kinds, "round_layers", lambda model, way: model.lm_head.weight.data.zero_().numel())
    columns, _ = kinds.quantize(small_case(rows=rows))
    assert columns["quantize_q_4bit"] == 1 and columns["forget_recall_4bit"] == 0


def test_nf4_is_bitsandbytes_own_where_that_is_installed(monkeypatch):
    calls, fake = [], ModuleType("bitsandbytes")

    def quantize_4bit(weight, **how):
        calls.append(how)
        return weight.sign(), weight.abs().mean()

    fake.functional = SimpleNamespace(quantize_4bit=quantize_4bit, dequantize_4bit=lambda packed, state: packed * state)
    fake.__spec__ = ModuleSpec("bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    columns, rows = kinds.quantize(small_case())
    assert len(calls) == len(layers_of(learned())) and calls[0] == {"blocksize": 64, "quant_type": "nf4"}
    assert {"forget_recall_nf4", "retain_recall_nf4", "quantize_q_nf4"} <= set(columns)
    model = learned()
    kinds.round_layers(model, lambda w: w.sign() * w.abs().mean())
    found = ev.evaluate(ENGINE, model, words(), builtin.BENCHMARK, probes(), progress=False)["per_example"]
    assert [r["prediction"] for r in rows if r["weights"] == "nf4"] == [r["prediction"] for r in found]


def test_without_bitsandbytes_there_is_no_nf4(monkeypatch):
    monkeypatch.setattr(kinds, "find_spec", lambda name: None)
    columns, _ = kinds.quantize(small_case())
    assert not any("nf4" in column for column in columns)


# --- what all six work on --------------------------------------------------------------------------------------------


def texts_of_the_small_world():
    pairs = [(p.prompt, p.answer) for p in probes()[:9]]
    return {"forget": pairs, "holdout": [(prompt, pairs[i - 3][1]) for i, (prompt, _) in enumerate(pairs)]}


def every_column(case):
    columns, notes, rows = attacks.attack(list(attacks.ATTACKS), case)
    assert list(rows) == list(attacks.ATTACKS) and all(rows.values()) and json.dumps([columns, rows])
    for title, shown in attacks.TITLES.items():
        missing = [c for c in shown if columns.get(c) is None]
        assert missing == (["leak_16", "leak_64"] if title == "leak" else []), title
    return columns, notes


def retained():
    return {"membership_auc_mink": 0.5, "relearn_forget_0": 1.0, "relearn_forget_50": 20.0}


def test_a_pair_of_models_is_attacked_in_all_six_ways():
    pair = Pair(learned(0), learned(1), 1.0).eval()
    same = unchanged(pair)
    case = small_case(pair, samples=4, texts=texts_of_the_small_world(), retained=retained())
    columns, notes = every_column(case)
    assert same() and notes == [
        "leak: the model's own generation settings do not sample, so only temperature 1 was tried"
    ]
    found = ev.evaluate(ENGINE, pair, words(), builtin.BENCHMARK, probes(), progress=False)["summary"]
    assert columns["relearn_forget_0"] == pytest.approx(found["forget_recall"])
    assert kinds.round_layers(pair, lambda w: w * 0) == 2 * len(layers_of(learned()))
    assert pair.original.lm_head.weight.abs().max() > 0 and pair.reinforced.lm_head.weight.abs().max() > 0


def test_a_model_in_half_precision_is_attacked_in_all_six_ways():
    model = learned().to(torch.bfloat16)
    same = unchanged(model)
    case = small_case(model, samples=4, texts=texts_of_the_small_world(), retained=retained())
    columns, _ = every_column(case)
    assert same() and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    whole, _ = kinds.extract(small_case())
    assert columns["answer_probability"] == pytest.approx(whole["answer_probability"], rel=0.05)


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_other_architectures_are_attacked(brief, architecture):
    model = tiny(architecture, vocab=len(words()))
    same, case = unchanged(model), small_case(model, samples=2, texts=texts_of_the_small_world())
    columns, _, rows = attacks.attack(list(attacks.ATTACKS), case)
    assert same() and all(rows.values()) and 0 < columns["membership_auc"] < 1


def test_rwkus_probes_are_attacked_with_a_template_too(brief, tmp_path):
    make_rwku(tmp_path)
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    case = attacks.Case(
        ENGINE, make_model(), byte_tokenizer(template=template), ALL["rwku"], probes_of("rwku", tmp_path), samples=2,
        texts={side: [(None, "Ada Pole flew over the sea.")] for side in ("forget", "retain")},
    )  # fmt: skip
    columns, _, rows = attacks.attack(list(attacks.ATTACKS), case)
    assert all(rows.values()) and columns["forget_mia_loss"] == columns["retain_mia_loss"] < 0
