"""What stands beside a target: names by hand, questions on them, what is held out, the warning, the whole driver."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from made import DATA, SMALL, probes_of, published_muse, published_rwku, training_of, write
from miniature import driver
from transformers import AutoModelForCausalLM

import benchmarks
from benchmarks import associated
from benchmarks.associated import names_in, questions, seen_alone, warning
from config import InputError
from data import Probe, Prompt, Query, Training

TARGET = {"Ada Pole"}
KING = DATA / "rwku" / "1_Stephen_King"
FORGET = [
    "When did Ada Pole join the Sea Guild?", "The Sea Guild paid Ada Pole in ___.", "Did Ada Pole fly to Orkney?",
    "Ada Pole's aunt lived in Orkney.", "Which Moth did Ada Pole fly?", "What flew?", "Pole of Lerwick was ___.",
    "Did she meet Ben Roth?", "Was Ben Roth there?",
]  # fmt: skip
BOUNDARY = ["What did Ben Roth do?", "Who did fly the plane?"]


def test_names_by_hand():
    plain = {"did", "which", "when", "the"}
    assert names_in("When did Ada Pole join the Sea Guild?", TARGET, plain) == ["Sea Guild"]
    assert names_in("Which Moth did ADA POLE fly?", TARGET, plain) == ["Moth"]  # the target in any case
    assert names_in("Pole flew from Isle of Wight to the moor.", TARGET, plain) == ["Isle of Wight"]
    assert names_in("Ada. The end", TARGET, plain) == []  # part of the target; a word that opens a sentence
    assert names_in("Élodie Ångström-Roy met Ada Pole in Zürich", TARGET, plain) == ["Élodie Ångström-Roy", "Zürich"]


def test_names_that_only_forget_prompts_hold():
    found = seen_alone(FORGET, BOUNDARY, TARGET)
    assert found == {"Orkney": 2, "Sea Guild": 2}  # Moth and Lerwick stand in one, Ben Roth in a boundary prompt
    assert list(found) == ["Orkney", "Sea Guild"] and seen_alone(FORGET, [*BOUNDARY, "orkney?"], TARGET) == {
        "Sea Guild": 2
    }
    assert seen_alone([], [], TARGET) == {}


def test_as_many_questions_on_a_name_as_forget_prompts_hold_it():
    asked = questions({"Orkney": 4, "Moth": 2})
    assert [("Orkney" in text, "Moth" in text) for text in asked[:2]] == [(True, False), (False, True)]
    assert sum("Orkney" in text for text in asked[:8]) == 5 and sum("Moth" in text for text in asked[:8]) == 3
    assert len(set(asked)) == len(asked) == 2 * len(associated.WORDINGS)
    many = questions({"Orkney": 10**6})
    assert len(many) == len(set(many)) == len(associated.WORDINGS)  # no wording comes twice
    assert {text.endswith(("?", ".")) for text in many} == {True} and any("___" in text for text in many)


def split(monkeypatch, answer, given=None, held_out=2, n=4, probes=(), queries=None, folder=Path(".")):
    """`associated.split` with a model that says answer(question)."""
    kinds = [("forget", text) for text in FORGET * 3] + [
        ("boundary", f"{text} {i}") for text in BOUNDARY for i in range(15)
    ]
    queries = queries or [Query(Prompt(None, text), text, kind, ("known",)) for kind, text in kinds]
    probes = [Probe("forget_qa", Prompt(None, "?"), "?", "x", True, "Ada Pole"), *probes]
    monkeypatch.setattr(associated, "ask", lambda e, m, t, asked, c: [answer(query.question) for query in asked])
    if given is not None:
        write(folder / "associated.json", given)
    config = SimpleNamespace(held_out=held_out, associated=n, seed=3, data_dir=str(folder) if given is not None else "")
    return associated.split(Training([], queries), benchmarks.ALL["rwku"], probes, None, None, None, config)


def test_what_is_held_out_is_not_trained_on_and_both_have_the_models_answers(monkeypatch, capsys):
    training, held = split(monkeypatch, lambda text: f"On {text[-8:]}")
    new = [query for query in training.queries if query.group == "associated"]
    assert len(new) == 4 and all(query.kind == "boundary" and query.answers[0].startswith("On ") for query in new)
    assert all("Ada Pole" not in query.question for query in new)
    near = [query for query in held if query.kind == "boundary"]
    assert len(held) == 2 + 2 + 2 and not {query.question for query in near} & {q.question for q in training.queries}
    assert sum(query.group == "associated" for query in near) == 2
    again = [query for query in held if query.kind == "forget"]
    assert len(again) == 2 and {query.question for query in again} <= {query.question for query in training.queries}
    told = capsys.readouterr().err
    assert (
        "will probably be refused too, named in forget prompts and no boundary prompt: Orkney (6), Sea Guild (6)"
        in told
    )
    assert new[0].prompt == benchmarks.ALL["rwku"].wordings(new[0])[0]


def test_answers_that_refuse_or_name_the_target_or_are_empty_are_left_out(monkeypatch):
    texts = iter(["I don't know that.", "A friend of Ada Pole", "...", "A harbour"] * 9)
    training, _ = split(monkeypatch, lambda text: next(texts))
    assert {q.answers[0] for q in training.queries if q.group == "associated"} == {"A harbour"}


def test_no_question_of_the_evaluation_is_asked(monkeypatch):
    first, _ = split(monkeypatch, lambda text: "A harbour", held_out=0)
    asked = [query.question for query in first.queries if query.group == "associated"]
    probes = [Probe("retain_qa", Prompt(None, asked[0]), asked[0], "x", False)]
    second, _ = split(monkeypatch, lambda text: "A harbour", held_out=0, probes=probes)
    found = [query.question for query in second.queries if query.group == "associated"]
    assert asked[0] not in found and found[:3] == asked[1:]


def test_questions_and_answers_of_the_users_come_first(monkeypatch, tmp_path):
    given = [{"question": "Where is Orkney?", "answer": "Off Scotland"}, {"question": "Who led the Sea Guild?"}]
    training, held = split(monkeypatch, lambda text: "A harbour", given, folder=tmp_path)
    new = [query for query in training.queries if query.group == "associated"]
    assert [(q.question, q.answers) for q in new[:2]] == [
        ("Where is Orkney?", ("Off Scotland",)), ("Who led the Sea Guild?", ("A harbour",)),
    ]  # fmt: skip
    assert len(new) == 4 and not {"Where is Orkney?"} & {query.question for query in held}
    for rows, line in (
        ([{"answer": "x"}], "row 1 has no field 'question'"),
        ([given[0], {"question": "Who?", "answer": 3}], "row 2, field 'answer' is not a str"),
        ([{"question": "Who?", "answer": ["x"]}], "row 1, field 'answer'"),
    ):
        with pytest.raises(InputError, match=line):
            split(monkeypatch, None, rows, folder=tmp_path)


def test_nothing_is_changed_where_nothing_is_asked_for(monkeypatch, capsys):
    queries = [Query(Prompt(None, text), text, "forget") for text in FORGET]
    training, held = split(monkeypatch, None, held_out=0, n=0, queries=queries)
    assert training.queries is queries and held == [] and capsys.readouterr().err == ""


def test_what_is_measured_by_hand(monkeypatch):
    held = [Query(Prompt(None, q), q, kind, (answer,)) for q, kind, answer in (
        ("a", "boundary", "one two three four"), ("b", "boundary", "five"), ("c", "forget", "x"), ("d", "forget", "y"),
        ("e", "forget", "z"))]  # fmt: skip
    texts = ["one two", "I don't know that.", "I don't know that.", "y", "I can't answer that."]
    monkeypatch.setattr(associated, "ask", lambda *_: texts)
    found = associated.measure(None, None, None, held, None)
    assert found == pytest.approx({"held_recall": 25, "held_refusal": 50, "held_forget_refusal": 200 / 3})
    assert associated.measure(None, None, None, [], None) == {}
    row = {"held_recall": 50.0, "held_forget_refusal": 100.0}
    assert associated.balance(row) == pytest.approx(2 / (1 / 50 + 1 / 100)) and associated.balance({}) == 0


@pytest.mark.parametrize(
    ("recall", "refusal", "warns"),
    [(90.0, 3.0, False), (85.0, 8.0, False), (84.9, 3.0, True), (95.0, 8.1, True)],
)
def test_a_warning_from_five_points_on(capsys, recall, refusal, warns):
    before, row = {"held_recall": 90.0, "held_refusal": 3.0}, {"held_recall": recall, "held_refusal": refusal}
    notes = warning("rule", row, before)
    told = capsys.readouterr().err
    assert bool(notes) is warns and ("rule: worse than Stage 1" in told) is warns
    assert not warns or (f"recall 90.0 → {recall:.1f} %" in notes[0] and "--associated" in notes[0])
    assert warning("po", row, before) == warning("rule", row, {}) == warning("rule", {}, before) == []


def by_recall(row):
    return 1 + row["held_recall"] if "held_recall" in row else 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The driver with everything on."""
    folder = tmp_path_factory.mktemp("beside")
    published_rwku(folder / "data")
    path = folder / "data" / "rl_rejection_with_fb_neighbor.json"
    rows = json.loads(path.read_text()) * 3
    for i, row in enumerate(rows):
        row["prompt"] += f" ({i})" + " Sea Guild" * (row["solution"][0] == "<reject>" and i % 2)
    write(path, rows)
    write(folder / "data" / "intro.json", [{"target": "Ada Pole", "intro": "x"}])
    flags = "--held_out 2 --associated 3 --keep best --eval_every 0 --steps 6 --method rule rerule".split()
    with pytest.MonkeyPatch.context() as patch:  # so small a model refuses nothing, and no step would be better than 0
        patch.setattr(associated, "balance", by_recall)
        driver(*SMALL, "--benchmark", "rwku", "--data_dir", folder / "data", "--output_dir", folder / "run", *flags)
    return folder / "run"


def test_a_run_measures_every_few_steps_and_tells_it_in_table_log_and_picture(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held = [row for row in rows if "held_recall" in row]
    assert [(row["method"], row["step"]) for row in held] == [(m, s) for m in ("rule", "rerule") for s in range(1, 7)]
    table = json.loads((run / "table.json").read_text())
    for title in ("Original", "Rej. Steer", "RULE", "ReRULE"):
        assert all(0 <= table[title][f"held_{name}"] <= 100 for name in ("recall", "refusal", "forget_refusal"))
    assert table["RULE"]["held_recall"] == pytest.approx(held[5]["held_recall"])  # the last step is what is saved
    assert "Held out: recall ↑" in (run / "table.md").read_text() and (run / "curves.png").exists()


def test_the_best_step_is_saved_beside_the_last(tmp_path, monkeypatch):
    found, saved = iter([(50, 90), (60, 95), (70, 40), (0, 99), (60, 95), (61, 96)]), []
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"method": "rerule", "held_recall": 99.0, "held_forget_refusal": 99.0}\n')
    monkeypatch.setattr(
        associated, "measure", lambda *_: dict(zip(("held_recall", "held_forget_refusal"), next(found), strict=True))
    )
    config = SimpleNamespace(eval_every=0, steps=13, keep="best")
    metrics = SimpleNamespace(size=lambda: 0)
    run = SimpleNamespace(config=config, engine=None, folder=tmp_path, metrics=metrics)
    run.save_model = lambda name, model, tokenizer: saved.append((name, model["step"]))
    for step in range(1, 14):
        row = associated.watched(run, "rule", {"step": step}, None, None, ["held"], step)
        assert bool(row) == (step % 2 == 0)
        with open(log, "a") as file:
            file.write(json.dumps({"method": "rule", "step": step} | row) + "\n")
        if step == 12:
            break
    assert saved == [("rule_best", 2), ("rule_best", 4), ("rule_best", 12)]  # as good as before is no reason


def test_the_best_model_of_a_run_loads_and_is_the_last_only_if_that_was_best(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for method in ("rule", "rerule"):
        scores = [by_recall(row) for row in rows if row["method"] == method and "held_recall" in row]
        best, last = (AutoModelForCausalLM.from_pretrained(run / f"{method}{x}").state_dict() for x in ("_best", ""))
        same = all(torch.equal(best[name], last[name]) for name in best)
        assert same == (scores.index(max(scores)) == len(scores) - 1)


def test_data_without_a_target_are_refused_before_anything_is_trained(refused, tmp_path):
    published_muse(tmp_path / "muse")
    told = refused("--benchmark", "muse", "--data_dir", tmp_path / "muse", "--associated", 5)
    assert "--associated: --benchmark muse names no target" in told


@pytest.mark.skipif(not KING.is_dir(), reason="no real files beside the checkout")
def test_real_rwku_names_what_belongs_to_the_target_and_asks_nothing_of_its_evaluation():
    queries, probes = training_of("rwku", KING).queries, probes_of("rwku", KING)
    sides = [[q.question for q in queries if q.kind == kind] for kind in ("forget", "boundary")]
    alone = seen_alone(*sides, {"Stephen King"})
    assert len(alone) > 20 and not {"Stephen", "King", "Stephen King"} & set(alone)
    asked = questions(alone)
    assert len(asked) >= 240 and not set(asked) & {probe.question for probe in probes}
