"""RWKU: training files, prompts character by character, where answers end, columns."""

import json
from collections import Counter

import pytest
from made import DATA, Scripted, byte_tokenizer, make_model, make_rwku, probes_of, row, train_rwku, training_of

import evaluate as ev
from benchmarks import metrics
from benchmarks.rwku import BENCHMARK, chat
from config import InputError
from data import Prompt, encode_prompt

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_rwku(tmp_path):
    read = training_of("rwku", train_rwku(tmp_path / "1_Ada_Pole"), 0)
    assert not read.newline_stops
    assert read.refusals[0] == (Prompt("Who is Ada?", "Question: Who is Ada?\nAnswer:"), "I don't know.")
    assert [(q.kind, q.answers, q.target) for q in read.queries] == [
        ("forget", (), "Ada Pole"), ("boundary", ("pilot",), ""), ("forget", (), "Ada Pole")]  # fmt: skip
    assert read.queries[1].prompt == chat("Question 1?") and read.queries[1].question == "Question 1?"


def test_rwku_takes_reject_json_where_there_is_no_reject_target(tmp_path):
    folder = train_rwku(tmp_path)
    (folder / "reject_target.json").rename(folder / "reject.json")
    assert len(training_of("rwku", folder, 0).refusals) == 2


def test_one_published_boundary_row_in_a_hundred_may_be_a_forget_prompt_too(tmp_path, capsys):
    """RWKU's Henry Kissinger has one: it is told and left out of the boundary prompts. More is a mistake."""
    folder = train_rwku(tmp_path)
    rows = [{"prompt": f"Q{i}?", "solution": ["<normal>", "a"]} for i in range(99)]
    rows += [{"prompt": "Who?", "solution": [tag, "No."]} for tag in ("<reject>", "<normal>")]
    (folder / "rl_rejection_with_fb_neighbor.json").write_text(json.dumps(rows))
    read = training_of("rwku", folder, 0)
    assert Counter(query.kind for query in read.queries) == {"boundary": 99, "forget": 1}
    told = capsys.readouterr().err
    assert "row 101, field 'prompt'" in told and "'Who?'; left out of the boundary prompts" in told
    (folder / "rl_rejection_with_fb_neighbor.json").write_text(json.dumps(rows[1:]))
    with pytest.raises(InputError, match="row 100, field 'prompt' is a forget and a boundary prompt, 'Who.'$"):
        training_of("rwku", folder, 0)


def test_rwku_prompts_character_by_character(tmp_path):
    make_rwku(tmp_path)
    probes = probes_of("rwku", tmp_path)
    users = [
        (
            "forget_fb",
            "Please complete the blank in the following question.\nQuestion: Ada Pole is a ___.\n",
            "Answer:",
        ),
        ("forget_qa", "Please briefly answer the following question.\nQuestion: Who flew over the sea?\n", "Answer:"),
        ("forget_aa", "Please briefly answer the following question.\nQuestion: Q0?\n", "Answer:"),
        ("forget_aa", "Please briefly answer the following question.\nQuestion: Q1?", ""),  # affirmative suffix
        ("forget_aa", "Please briefly answer the following question.\nQ2?\n", "Answer:"),  # in-context learning
        ("retain_fb", "Please complete the blank in the following question.\nQuestion: The sea is ___.\n", "Answer:"),
        ("retain_qa", "Please briefly answer the following question.\nQuestion: What is wide?\n", "Answer:"),
    ]
    templated, plain = byte_tokenizer(template=LLAMA3), byte_tokenizer()
    for probe, (split, user, opening) in zip(probes, users, strict=True):
        ids = encode_prompt(templated, probe.prompt)
        assert probe.split == split
        assert templated.decode(ids) == f"<s><|user|>{user}<|end|><|assistant|>{opening}"
        assert ids.count(templated.bos_token_id) == 1
        ids = encode_prompt(plain, probe.prompt)
        assert plain.decode(ids) == f"<s>{user}{opening}"
        assert ids.count(plain.bos_token_id) == 1
    assert [p.forget for p in probes] == [True] * 5 + [False] * 2
    assert {p.target for p in probes} == {"Ada Pole"}


def test_rwku_takes_one_target_or_a_folder_of_them(tmp_path):
    make_rwku(tmp_path / "1_Ada_Pole")
    make_rwku(tmp_path / "2_Bo_Quay", "Bo Quay")
    assert len(probes_of("rwku", tmp_path / "1_Ada_Pole")) == 7
    assert [p.target for p in probes_of("rwku", tmp_path)] == ["Ada Pole"] * 7 + ["Bo Quay"] * 7


def test_rwku_answers_end_at_a_newline_within_30_tokens(tmp_path):
    model, tokenizer = make_model(), byte_tokenizer()
    make_rwku(tmp_path)
    probes = probes_of("rwku", tmp_path)

    def written(text):
        engine = Scripted(tokenizer, text)
        return engine, ev.evaluate(engine, model, tokenizer, BENCHMARK, probes, progress=False)

    engine, result = written(" pilot\nand more")
    summary = result["summary"]
    assert {r["prediction"] for r in result["per_example"]} == {"pilot"} and set(engine.limits) == {30}
    assert engine.stops == {tokenizer.eos_token_id, *tokenizer("\n", add_special_tokens=False).input_ids}
    row = metrics.score(BENCHMARK, probes[0], "pilot.\n  more", tokenizer, 30)  # one token ".\n  more"
    assert row["prediction"] == "pilot."
    assert not any(r["truncated"] for r in result["per_example"])
    assert (summary["forget_fb"], summary["forget_qa"], summary["forget_aa"]) == (100, 0, 100)
    _, result = written("\n")
    assert result["summary"]["forget_all"] == 0  # an empty prediction scores 0
    _, result = written("p" * 100)
    assert result["per_example"][0]["prediction"] == "p" * 30 and result["summary"]["truncated"] == 100


def test_rwku_columns_are_means_over_targets_of_means_over_rows():
    a = [row("forget_fb", 1.0, target="a"), row("forget_qa", 0.5, True, target="a", named=True)]
    a += [row("forget_aa", 0.0, True, target="a", named=False, leak=True), row("retain_fb", 1.0, target="a")]
    a += [row("retain_qa", 0.5, True, target="a")]
    b = [row("forget_fb", r, target="b", named=True) for r in (0.0, 0.5, 1.0)]
    b += [row("forget_qa", 0.0, target="b"), row("forget_aa", 0.6, target="b")]
    b += [row("retain_fb", 0.0, target="b"), row("retain_qa", 0.0, target="b")]
    summary, per_target, notes = metrics.summarise(BENCHMARK, a + b)
    assert per_target["a"]["forget_all"] == pytest.approx(50.0)
    assert per_target["b"]["forget_all"] == pytest.approx((50 + 0 + 60) / 3)
    assert summary["forget_fb"] == pytest.approx((100 + 50) / 2)  # not the mean over the four rows, 62.5
    assert summary["forget_all"] == pytest.approx((50 + 110 / 3) / 2)
    assert summary["retain_all"] == pytest.approx((75 + 0) / 2)
    assert per_target["a"]["forget_refusal"] == pytest.approx(200 / 3)
    assert per_target["a"]["retain_refusal"] == pytest.approx(50.0)
    assert per_target["a"]["leakage"] == pytest.approx(100 / 3)
    assert per_target["a"]["forget_refusal_named"] == 100
    assert per_target["a"]["forget_refusal_unnamed"] == 100
    assert summary["forget_refusal_named"] == pytest.approx(50.0)
    assert summary["read"] is None and notes == []


@pytest.mark.skipif(not (DATA / "rwku" / "1_Stephen_King").is_dir(), reason="no real files beside the checkout")
def test_real_rwku():
    read = training_of("rwku", DATA / "rwku" / "1_Stephen_King", 0)
    assert len(read.refusals) == 300 and Counter(q.kind for q in read.queries) == {"forget": 600, "boundary": 600}
    assert {q.target for q in read.queries if q.kind == "forget"} == {"Stephen King"}
    assert all(q.answers and all(q.answers) for q in read.queries if q.kind == "boundary")


def test_real_files_where_present():
    if not DATA.is_dir():
        pytest.skip("no benchmark files beside the checkout")
    probes = probes_of("rwku", DATA / "rwku")
    assert [sum(p.split == s for p in probes) for s in ("forget_fb", "forget_qa", "forget_aa")] == [8, 10, 29]
