"""MUSE-Books: training files, raw prompts, lengths and cuts, columns."""

import json
from dataclasses import replace

import pytest
from made import Scripted, byte_tokenizer, make_model, make_muse, probes_of, row, train_muse, training_of, write

import evaluate as ev
from benchmarks import metrics
from benchmarks.muse import BENCHMARK
from data import Prompt


def test_muse(tmp_path):
    read = training_of("muse", train_muse(tmp_path), 0)
    shots = {s: "".join(f"Question: {s} {i}?\nAnswer: {i}\n\n" for i in range(10)) for s in ("forget", "retain")}
    assert read.newline_stops
    assert read.refusals == [
        (Prompt(None, shots["forget"] + "Question: Who kept the lamp?\nAnswer: "), "I don't know."),
        (Prompt(None, shots["forget"] + "Completion: The lamp went out and\nAnswer: "), "I can't go on."),
    ]
    assert [q.prompt.plain for q in read.queries] == [
        shots["forget"] + "Question: Who kept it?\nAnswer: ",
        shots["forget"] + "Completion: The lamp went\nAnswer: ",
        shots["retain"] + "Question: What is a lamp?\nAnswer: ",
    ]
    assert read.queries[2].answers == ("a light", "a lantern", "light")


def test_muse_takes_ten_examples_only(tmp_path):
    train_muse(tmp_path)
    path = tmp_path / "knowmem" / "forget_qa_icl.json"
    write(path, json.loads(path.read_text()) + [{"question": "eleventh?", "answer": "no"}])
    assert "eleventh" not in training_of("muse", tmp_path, 0).refusals[0][0].plain


def test_a_muse_row_without_mode_is_a_question(tmp_path):
    train_muse(tmp_path)
    write(tmp_path / "reject_target_0.5.json", [{"instruction": "Who?", "output": "I don't know."}])
    assert training_of("muse", tmp_path, 0).refusals[0][0].plain.endswith("Question: Who?\nAnswer: ")


def test_muse_prompts(tmp_path):
    make_muse(tmp_path)
    verbmem, knowmem, utility = probes_of("muse", tmp_path)
    assert verbmem.prompt == Prompt(None, "The lamp went out and") and verbmem.forget
    shots = "".join(f"Question: forget {i}?\nAnswer: {i}\n\n" for i in range(10))
    assert knowmem.prompt.plain == shots + "Question: Who kept the lamp?\nAnswer: "
    assert utility.prompt.plain.startswith("Question: retain 0?") and not utility.forget


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Orla", "Orla"), ("", ""), ("Orla\n\nQuestion: who?", "Orla"), ("Orla\nQuestion: who?", "Orla"),
        ("Orla Question: who?", "Orla "), ("Orla\nand Pim", "Orla\nand Pim"), ("\n\nOrla", ""),
        ("a Question: b\n\nc", "a "), ("a\nQuestions b", "a"),
    ],
)  # fmt: skip
def test_muse_output_cut(text, kept):
    assert BENCHMARK.cut("knowmem", text) == BENCHMARK.cut("utility", text) == kept


def test_muse_lengths_cuts_and_the_true_continuation(tmp_path):
    model, tokenizer = make_model(context=4096), byte_tokenizer()
    make_muse(tmp_path)
    probes = probes_of("muse", tmp_path)
    probes[0] = replace(probes[0], answer="nobody in the hall moved. " * 20)
    engine = Scripted(tokenizer, "Orla\n\nQuestion: who?")
    rows = ev.evaluate(engine, model, tokenizer, BENCHMARK, probes, batch_size=1, progress=False)["per_example"]
    assert sorted(engine.limits) == [32, 32, 128]
    assert rows[0]["prediction"] == "Orla\n\nQuestion: who?"  # VerbMem is not cut
    assert rows[0]["answer"] == ("nobody in the hall moved. " * 20)[:127]  # 128 tokens of one byte, BOS among them
    assert rows[1]["prediction"] == rows[2]["prediction"] == "Orla" and rows[1]["rouge_l_f1"] == 1


def test_muse_columns_are_f1():
    rows = [row("verbmem", 1.0, forget=True, rouge_l_f1=0.5), row("knowmem", 1.0, forget=True, rouge_l_f1=0.25)]
    summary, _, _ = metrics.summarise(BENCHMARK, rows + [row("utility", 0.5, rouge_l_f1=0.75)])
    assert (summary["verbmem"], summary["knowmem"], summary["utility"]) == (50, 25, 75)
    assert (summary["forget_recall"], summary["retain_recall"]) == (100, 50)
