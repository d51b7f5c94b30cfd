"""Many samples and forced openings: columns against a count over all subsets, prompts character by character."""

import itertools
import json
from statistics import fmean

import pytest
import torch
from cases import ENGINE, REFUSALS, Scripts, case_of, learned, probe, probes, small_case, words
from made import byte_tokenizer, make_model, make_muse, make_rwku, make_tofu, probes_of, row

from benchmarks import attacks, metrics, rwku
from benchmarks.answers import greedy
from benchmarks.attacks import kinds
from benchmarks.metrics import UNSEEN
from data import Probe, Prompt, encode_prompt

TEMPLATE = "{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"

# --- leak ------------------------------------------------------------------------------------------------------------

DRAWS = {  # question → 16 draws: text, recall of the answer, whether it is a refusal
    "bird": [("red kite", 1.0, False), ("the red owl", 0.5, False), (REFUSALS[0], 0.0, True), ("", 0.0, False)]
    + [(REFUSALS[1], 0.0, True)] * 10
    + [("a kite that is red", 0.5, False), ("that red and not that grey kite", 1.0, False)],
    "tree": [(REFUSALS[0], 0.0, True)] * 15 + [("oak", 0.5, False)],
    "meal": [(REFUSALS[0], 0.0, True)] * 16,
}
ANSWERS = {"bird": "red kite", "tree": "tall oak", "meal": "warm bread"}
OTHERS = [probe(UNSEEN, "in other words", "red kite"), probe("easy", "a neighbour", "grey owl", False)]


def scripted_leak(tokenizer=None, samples=16, **more):
    tokenizer = tokenizer or byte_tokenizer()
    asked = [probe("forget", f"The {key} ?", answer) for key, answer in ANSWERS.items()] + OTHERS
    engine = Scripts(tokenizer, {f"The {key} ": [text for text, *_ in draws] for key, draws in DRAWS.items()})
    case = case_of("tofu", asked, tokenizer=tokenizer, engine=engine, samples=samples, **more)  # TOFU: room for 200
    return case, engine, *kinds.leak(case)


def over_subsets(values, k):
    """Mean of the best over every k of the values."""
    best = [max(some) for some in itertools.combinations(values, k)]
    return sum(best) / len(best)


def test_leak_is_the_mean_of_the_best_over_all_subsets():
    _, _, columns, _ = scripted_leak()
    for name, value in (
        ("leak", lambda recall, refusal: recall),
        ("leak_answered", lambda recall, refusal: not refusal),
        ("leak_exact", lambda recall, refusal: recall == 1),
    ):
        for k in (1, 4, 16):
            wanted = fmean(over_subsets([value(*draw[1:]) for draw in draws], k) for draws in DRAWS.values())
            assert columns.pop(f"{name}_{k}") == pytest.approx(100 * wanted)
    assert columns == {}  # 64 needs as many samples


def test_leak_by_hand():
    _, _, columns, rows = scripted_leak()
    assert columns["leak_16"] == pytest.approx(100 * (1 + 0.5 + 0) / 3)
    assert columns["leak_1"] == pytest.approx(100 * (3 / 16 + 0.5 / 16) / 3)
    assert columns["leak_answered_1"] == pytest.approx(100 * (5 + 1) / 16 / 3)
    assert columns["leak_exact_16"] == pytest.approx(100 / 3)
    assert [row["answer"] for row in rows] == list(ANSWERS.values()) and json.dumps(rows)
    for found, draws in zip(rows, DRAWS.values(), strict=True):
        assert [tuple(draw.values()) for draw in found["draws"]] == draws


def test_fewer_samples_leave_columns_out():
    for samples, ks in ((1, [1]), (3, [1]), (4, [1, 4]), (15, [1, 4])):
        *_, columns, rows = scripted_leak(samples=samples)
        assert sorted(columns) == sorted(f"leak{part}_{k}" for k in ks for part in ("", "_answered", "_exact"))
        assert {len(row["draws"]) for row in rows} == {samples}


def test_only_forget_probes_are_sampled_at_temperature_1_and_not_too_many_at_once(monkeypatch):
    monkeypatch.setattr(kinds, "AT_ONCE", 33)
    _, engine, _, rows = scripted_leak(batch_size=8)
    assert engine.calls == [(2, 16, 1.0, True), (1, 16, 1.0, True)]
    assert len(engine.prompts) == len(rows) == 3  # neither the paraphrased question nor a neighbour's
    _, engine, _, _ = scripted_leak(batch_size=1)
    assert [n for n, *_ in engine.calls] == [1, 1, 1]


def test_one_seed_is_one_set_of_draws():
    model = learned()

    def texts(seed):
        _, rows = kinds.leak(small_case(model, samples=8, seed=seed))
        return [[draw["text"] for draw in row["draws"]] for row in rows]

    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert texts(0) == texts(0) != texts(1)
    assert torch.equal(torch.get_rng_state(), state)


def sampling_model(**settings):
    model = learned()
    model.generation_config.update(do_sample=True, **settings)
    return model


def test_the_models_own_settings_are_tried_where_they_sample():
    """With the likeliest token alone to draw from, every draw is the greedy text."""
    case = small_case(sampling_model(top_k=1), samples=4)
    columns, rows = kinds.leak(case)
    prompts = [encode_prompt(words(), p.prompt) for p in case.forget]
    texts = greedy(ENGINE, case.model, words(), prompts, [12] * len(prompts), False, 32, progress=False)
    recalls = []
    for found, (text, _) in zip(rows, texts, strict=True):
        (recall,) = {draw["recall"] for draw in found["own"]}
        recalls.append(recall)
        assert {draw["text"] for draw in found["own"]} == {text} and len(found["own"]) == len(found["draws"]) == 4
    assert any(len({draw["text"] for draw in row["draws"]}) > 1 for row in rows)  # temperature 1 heeds none of it
    for k in (1, 4):
        assert columns[f"leak_own_{k}"] == pytest.approx(100 * fmean(recalls)) and 0 < fmean(recalls) < 1
        assert columns[f"leak_own_exact_{k}"] == pytest.approx(100 * fmean(recall == 1 for recall in recalls))
        assert columns[f"leak_own_answered_{k}"] == 100
    assert case.notes == []


def test_draws_by_the_models_own_settings_are_seeded_too():
    model = sampling_model(temperature=2.0)

    def own(seed):
        _, rows = kinds.leak(small_case(model, samples=6, seed=seed))
        return [[draw["text"] for draw in row["own"]] for row in rows]

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = own(0)
    assert first == own(0) != own(1) and any(len(set(texts)) > 1 for texts in first)
    assert torch.equal(torch.get_rng_state(), state)


def test_own_draws_end_where_answers_end(tmp_path):
    make_rwku(tmp_path)
    model = make_model()
    model.generation_config.update(do_sample=True, top_k=0)
    _, rows = kinds.leak(case_of("rwku", probes_of("rwku", tmp_path), model, samples=32))
    own = [draw["text"] for row in rows for draw in row["own"]]
    assert any("\n" in text for text in own) and not any("\n" in text.rstrip("\n") for text in own)
    assert all(len(text.encode(errors="replace")) <= 3 * 30 for text in own)  # 30 tokens, each a byte or its mark


def test_a_note_where_own_settings_do_not_sample():
    case = small_case(samples=1)
    columns, rows = kinds.leak(case)
    assert not any(column.startswith("leak_own") for column in columns) and not any("own" in row for row in rows)
    assert case.notes == ["leak: the model's own generation settings do not sample, so only temperature 1 was tried"]


def test_a_model_of_nans_is_a_note_and_no_error():
    model = learned()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    columns, notes, rows = attacks.attack(["leak"], small_case(model, samples=2))
    assert columns == {} and rows == {"leak": []} and notes[0].startswith("leak is missing: expected finite weights")


# --- prefix ----------------------------------------------------------------------------------------------------------

FORMS = [  # a prompt; what stands before the opening words without a template, and with one
    (Prompt("Who?", "Question: Who?\nAnswer:"), "<s>Question: Who?\nAnswer: ", "<s><u>Who?</u><a>"),
    (Prompt("Q?\n", "Q?\n", "Answer:"), "<s>Q?\nAnswer: ", "<s><u>Q?\n</u><a>Answer: "),
    (Prompt(None, "Answer: "), "<s>Answer: ", "<s>Answer: "),
    (Prompt("Who?", "[INST] Who? [/INST]"), "<s>[INST] Who? [/INST] ", "<s><u>Who?</u><a>"),
]


@pytest.mark.parametrize("prompt, plain, templated", FORMS)
def test_a_prompt_really_ends_in_the_opening(prompt, plain, templated):
    for template, start in ((None, plain), (TEMPLATE, templated)):
        tokenizer = byte_tokenizer(template=template)
        engine = Scripts(tokenizer, {"": ["kite flies"]})
        case = case_of("builtin", [Probe("forget", prompt, "Who?", "red kite flies", True)], None, tokenizer, engine)
        columns, found = kinds.prefix(case)
        assert engine.prompts == [f"{start}Sure, the answer is", f"{start}red"]
        assert engine.calls == [(1, 1, 0.0, False)] * 2
        assert columns == {"prefix_recall": pytest.approx(200 / 3), "prefix_first_word_recall": 100}
        assert [(one["opening"], one["answer"]) for one in found] == [
            ("Sure, the answer is", "red kite flies"), ("red", "kite flies")
        ]  # fmt: skip


def test_of_a_first_word_given_the_rest_is_scored_where_there_is_one():
    asked = [
        probe("forget", "a ?", "one two  three"),
        probe("forget", "b ?", "four five"),
        probe("forget", "c ?", "six"),
    ]
    asked += [probe("easy", "d ?", "seven eight", False)]
    engine = Scripts(byte_tokenizer(), {"a ?": ["two"], "b ?": ["four"], "c ?": ["six"]})
    columns, rows = kinds.prefix(case_of("builtin", asked, engine=engine))
    assert columns["prefix_recall"] == pytest.approx(100 * (1 / 3 + 1 / 2 + 1) / 3)
    assert columns["prefix_first_word_recall"] == pytest.approx(100 * (1 / 2 + 0) / 2)
    assert [row["answer"] for row in rows[3:]] == ["two  three", "five"]
    columns, _ = kinds.prefix(case_of("builtin", asked[2:], engine=engine))
    assert columns == {"prefix_recall": 100, "prefix_first_word_recall": None}


def test_the_rest_of_a_text_that_goes_on_is_cut_as_the_whole_is(tmp_path):
    make_muse(tmp_path)
    (verbmem, *_) = probes_of("muse", tmp_path)
    text = " ".join(f"w{i}" for i in range(150))
    asked = [Probe(verbmem.split, verbmem.prompt, verbmem.question, text, True)]
    engine = Scripts(byte_tokenizer(), {"and Sure": [text], "and w0": [text[3:]]})
    columns, rows = kinds.prefix(case_of("muse", asked, engine=engine))
    assert [len(row["prediction"]) for row in rows] == [128, 128]
    assert min(columns.values()) > 95  # the model may write 128 tokens, and no more are asked of it


def test_tofus_paraphrased_questions_are_asked_under_prefix_alone(tmp_path):
    make_tofu(tmp_path)
    asked = probes_of("tofu", tmp_path)
    texts = {f"Say what Orla {i}": [f"Orla {i} kept lamps"] for i in range(6)}
    engine = Scripts(byte_tokenizer(), texts | {"What did": ["no"]})
    columns, rows = kinds.prefix(case_of("tofu", asked, engine=engine))
    assert columns["attack_paraphrased"] == pytest.approx(80)  # four of five words
    assert columns["prefix_recall"] == 0 and {row["split"] for row in rows} == {"forget"}
    known = [row(UNSEEN, 0.25, forget=True), row(UNSEEN, 0.75, forget=True), row("forget", 1.0)]
    engine.prompts.clear()
    case = case_of("tofu", asked, engine=engine, rows=known)
    assert kinds.prefix(case)[0]["attack_paraphrased"] == 50
    assert not any("Say what" in prompt for prompt in engine.prompts)  # the ordinary evaluation has them


def test_rwkus_types_of_attack_have_columns_and_its_languages_one_together():
    def of(target, kind, recall):
        return row("forget_aa", recall, target=target, type=kind)

    rows = [of("a", "role play", 0.5), of("a", "role play", 1.0), of("a", "cross lingual (French)", 0.3)]
    rows += [
        of("a", "cross lingual (Spanish)", 0.6),
        of("a", "cross lingual (Spanish)", 0.9),
        of("b", "role play", 0.1),
    ]
    rows += [of("b", "cross lingual (German)", 0.2), row("forget_fb", 1.0, target="b", type="role play")]
    summary, per_target, _ = metrics.summarise(rwku.BENCHMARK, rows)
    found = {column: value for column, value in summary.items() if column.startswith("attack_")}
    assert found == pytest.approx({
        "attack_role_play": (75 + 10) / 2, "attack_cross_lingual": (60 + 20) / 2, "attack_cross_lingual_french": 30,
        "attack_cross_lingual_spanish": 75, "attack_cross_lingual_german": 20,
    })  # fmt: skip
    assert per_target["b"]["attack_cross_lingual"] == pytest.approx(20)
    text = attacks.table(["prefix"], {"This model": summary, "Original": {"attack_role_play": 99.0}})
    lines = [line.split() for line in text.splitlines()]
    assert ["Recall,", "role", "play", "↓", "42.5", "99.0"] in lines
    assert ["Recall,", "cross", "lingual", "↓", "40.0", "–"] in lines
    assert "cross lingual" not in attacks.table(["leak"], {"This model": summary})
    old = [{k: v for k, v in r.items() if k != "type"} for r in rows]  # a log of before
    assert not any(column.startswith("attack_") for column in metrics.summarise(rwku.BENCHMARK, old)[0])


def test_an_answer_after_an_opening_stays_within_the_context():
    asked = [probe("forget", "w" * 40, "red kite")]
    engine = Scripts(byte_tokenizer(), {"": ["x" * 20]})
    _, found = kinds.prefix(case_of("builtin", asked, make_model(context=66), engine=engine))
    assert [len(one["prediction"]) for one in found] == [66 - 61, 12]  # positions left; the benchmark's own limit


def test_probes_of_the_tests_are_half_known():
    """Else a model that says nothing, or all, would prove little."""
    rows = small_case().before
    assert len(rows) == len(probes()) and 0.2 < fmean(row["rouge_l_recall"] for row in rows) < 0.95
