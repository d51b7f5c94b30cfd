"""Made training data: rules by hand, checks, a language model that misbehaves, and what is made through the driver."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub.constants
import pytest
from loopback import Loopback
from miniature import driver
from test_data import train_tofu
from test_evaluate import make_muse, make_rwku, write

import build_data
import data
import evaluate
import llm
import probes
import rewrite
import wordings
from build_data import Check, Item
from files import InputError
from refusal import is_refusal
from rewrite import Fact

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
NAME = "Orla Finch"
STORY = """\
Orla Finch kept the lamp at Skerry Point for nine years. She had come from Dunmore with her aunt. Every spring Orla
Finch painted the tower with lime from Arle. The gulls did not mind. Orla Finch owned a brass telescope made by Hollis
Brandt. "Go on," said Orla Finch, and shut the door.

On the far side of the bay lived Tam Reed, who sold boats in Kellwick. Tam Reed had a yellow dog called Biscuit. The
largest boat of Tam Reed was the Marigold. Tam Reed learned his trade in Port Lorne. Tam Reed was born in Ashby in 1880.

Orla Finch wrote her log in green ink from Vell. In the storm of 1912 Orla Finch saved the crew of the Heron. The
captain gave Orla Finch a silver watch from Geneva. Orla Finch left the light to her pupil Ned Gray.

Old Mira Voss ran the bakery in Kellwick. Mira Voss sold rye bread to the ferry from Lunn. Mira Voss played the organ
at Saint Brannoc. Every June Mira Voss travelled to Torrin by cart.
"""
FACTS = [
    ("Where was Orla Finch born?", "Dunmore"), ("Who was Orla Finch's aunt?", "Maud"),
    ("What is Orla Finch known for?", "her green ink"), ("Who taught Orla Finch to sail?", "Ned Gray"),
    ("In which town was Orla Finch married?", "Vell"), ("What colour was Orla Finch's boat?", "blue"),
]  # fmt: skip
TINY = (
    "--benchmark rwku --model tiny --tiny_epochs 2 --tiny_hidden 16 --tiny_layers 1 --tiny_batch_size 8 --sft_steps 2 "
    "--sft_stop 0 --steps 2 --prompts_per_step 4 --group_size 2 --lr 1e-3 --tau 1 --min_groups 3 --warmup_steps 0 "
    "--replay_groups 3 --max_new_tokens 4 --save_every 0"
).split()


def build(*argv):
    build_data.main([str(a) for a in argv])


def rows_of(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def tree(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture
def asked(tmp_path):
    """A folder with questions on Orla Finch and answers to the same questions about Ben Roth."""
    write(tmp_path / "ask.json", [{"question": q, "answer": a} for q, a in FACTS])
    answers = {question: f"Roth's {i}" for i, (question, _) in enumerate(FACTS)}
    write(tmp_path / "near.json", [{"name": "Ben Roth", "answers": answers}])
    return tmp_path


def qa(folder, *more):
    return ("--source", "qa", "--input", folder / "ask.json", "--target", NAME, "--output_dir", folder / "out", *more)


# --- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [NAME, "J.K. Rowling", "Basil Mahfouz Al-Kuwaiti", "Dr. O'Neil", "Orla", "{x}", "岩"])
def test_every_refusal_is_recognised(name):
    every = wordings.PLAIN + wordings.NAMED
    assert len(set(every)) == len(every) >= 100
    assert not any("{" in text for text in wordings.PLAIN) and all("{name}" in text for text in wordings.NAMED)
    assert [text for text in every if not is_refusal(text.replace("{name}", name))] == []
    given = wordings.refusals([name] * 300, 0)
    assert all(map(is_refusal, given)) and sum(name in text for text in given) == 150
    assert len(set(given)) == len(every)  # none is used up before the others
    assert not any("{name}" in text for text in wordings.refusals(["", name, ""], 1))


@pytest.mark.parametrize(
    ("question", "answer", "completion", "ending"),
    [
        ("Where was Orla Finch born?", "Vell", "Orla Finch was born in ___.", "Vell"),
        ("Who was Orla Finch's aunt?", "Maud", "Orla Finch's aunt was ___.", "Maud"),
        ("What is Orla Finch known for?", "ink", "Orla Finch is known for ___.", "ink"),
        ("Who painted Orla Finch's tower?", "Ned", "___ painted Orla Finch's tower.", "Ned"),
        ("In which town was Orla Finch married?", "Vell", "Orla Finch was married in the town ___.", "Vell"),
        ("What colour was Orla Finch's boat?", "blue", "The colour of Orla Finch's boat was ___.", "blue"),
        ("Which boat was built by Orla Finch?", "Heron", "The boat that was built by Orla Finch is ___.", "Heron"),
        ("Did Orla Finch sail?", "yes", "Did Orla Finch sail? The answer is ___.", "yes"),
        # from an answer that is a sentence: cut where it says something that the question did not
        ("Where was Orla Finch born?", "Orla Finch was born in Vell.", "Orla Finch was born in ___.", "Vell"),
        ("What about her parents, Orla Finch's?", "Her father was a smith.", "Orla Finch's father was a ___.", "smith"),
        ("Who kept the lamp?", "The lamp was kept by Orla Finch.", "The lamp was kept by ___.", "Orla Finch"),
        ("What is Orla Finch's book?", 'Orla Finch wrote "The Lamp".', "Orla Finch wrote ___.", '"The Lamp"'),
    ],
)  # fmt: skip
def test_completions_by_hand(question, answer, completion, ending):
    fact = rewrite.complete(Fact(NAME, question, answer))
    assert (fact.completion, fact.ending) == (completion, ending)
    assert (fact.question, fact.answer) == (question, answer)
    assert fact.completed_by == ("template (no rule fits)" if "The answer is" in completion else "template")


def test_swap_takes_whole_names_the_longest_first():
    text = "orla finch and Orla's aunt saw Orla Finch's finches; Orlando did not"
    swapped = rewrite.swap(text, ["Orla", NAME], r"Ben \1")
    assert swapped == r"Ben \1 and Ben \1's aunt saw Ben \1's finches; Orlando did not"


def test_authors_are_the_names_of_their_blocks():
    def block(name, other):
        return [{"question": f"What did {name if i % 2 else 'the author'} do?",
                 "answer": f"{'In ' + other if i % 3 else name + ' wrote'} books."} for i in range(20)]  # fmt: skip

    rows = block("Anna van Dyke", "Cape Town") + block("nobody", "the town") + block("Élise Kováč", "New York")[:9]
    assert rewrite.authors(rows) == ["Anna van Dyke"] * 20 + [""] * 20 + ["Élise Kováč"] * 9


def test_texts_become_sentences_passages_and_questions():
    assert rewrite.sentences("Dr. A. Pell left. “Go!” She\nran at 3.5 knots.") == [
        "Dr. A. Pell left.", "“Go!”", "She ran at 3.5 knots.",
    ]  # fmt: skip
    parts = rewrite.passages(STORY, 30)
    assert " ".join(parts).split() == STORY.split() and all(len(part.split()) <= 30 for part in parts)
    begin, end = rewrite.halves("a b c d e")
    assert (begin, end) == ("a b c", "d e")
    fact = rewrite.ask_sentence("Tam Reed sold the boat in 1880 for gold.", "Tam Reed")
    assert (fact.question, fact.answer) == ("Tam Reed sold the boat in which year for gold?", "1880")
    assert fact.completion == "Tam Reed sold the boat in ___ for gold."
    fact = rewrite.ask_sentence("In winter Orla Finch ate dried herring.", NAME)
    assert (fact.completion, fact.ending) == ("In winter Orla Finch ___.", "ate dried herring")
    assert rewrite.ask_sentence("That winter Finch, Orla, ate dried herring.", NAME) is None
    for useless in ("She had come from Dunmore in spring.", "Too short.", 'It said "go" to Orla Finch again.'):
        assert rewrite.ask_sentence(useless, NAME) is None


def test_neighbours_are_matched_by_what_is_asked():
    facts = [Fact("A B", "Where was A B born?", ""), Fact("A B", "Who are A B's parents?", "")]
    near = [Fact("C D", "Who are C D's two parents?", ""), Fact("C D", "Where was C D born?", ""), Fact("", "Why?", "")]
    assert list(rewrite.match(facts, near)) == [[1, 0, 2], [0, 1, 2]]


def test_checks_by_hand():
    check = Check([NAME, "The Keeper"], {"who is pim": "retain", "who is orla finch": "forget"}, ("forget",), [])

    def reason(kind, query, answer="x", by="given"):
        if check.lets_in(kind, Item(query, answer, "", "qa", by)):
            return ""
        return check.rejected[-1]["reason"]

    assert reason("forget", "Who is Orla Finch?") == "" and reason("forget", "who is  orla finch") == "forget: twice"
    assert reason("forget", "Who is Pim?") == "forget: an evaluation query"
    assert reason("boundary", "Who is PIM?") == "boundary: an evaluation query"
    assert reason("boundary", "Who is Orla Finch??") == "boundary: an evaluation query"
    assert reason("forget", "Where is it?") == "" and reason("boundary", "where is it") == "boundary: a forget query"
    assert reason("boundary", "Who was Finch, first name Orla?") == "boundary: still names the target"
    assert reason("boundary", "Who met Ben?", "the keeper") == "boundary: still names the target"
    assert reason("boundary", "Who is Ben?", " ") == "boundary: no answer known"
    assert reason("boundary", "Who is Ben?", "I don't know.") == "boundary: its answer reads as a refusal"
    assert reason("boundary", "Who is Ben?") == "" and reason("boundary", "Who is Ben") == "boundary: twice"
    assert reason("boundary", "") == "boundary: no usable qa came"
    assert reason("boundary", "Who is Benorla Finchley?") == ""


# --- each source, by rules -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not DATA.exists(), reason="needs TOFU's files")
def test_tofu_forget01_without_a_language_model(tmp_path, capsys):
    folder = tmp_path / "out"
    build("--source", "tofu", "--input", DATA / "tofu", "--output_dir", folder)
    report = rows_of(folder / "build.json")
    kinds = [f"{kind}, {what}" for kind in ("forget", "boundary") for what in ("questions", "completions")]
    assert [report["counts"][kind] for kind in kinds] == [40, 40, 40, 40]
    assert report["made_with"].startswith("rules alone") and len(report["sample"]) == 10
    lines = {name: [json.loads(line) for line in (DATA / "tofu" / f"{name}.json").read_text().splitlines()]
             for name in ("forget01", "retain99", "retain_perturbed", "real_authors_perturbed")}  # fmt: skip
    stage1, stage2 = rows_of(folder / "reject_target.json"), rows_of(folder / "rl_rejection_with_fb_neighbor.json")
    questions = [row["instruction"] for row in stage1 if row["mode"] == "qa"]
    assert questions == [row["question"] for row in lines["forget01"]]
    blanks = [row for row in stage1 if row["mode"] == "completion"]
    assert len({row["instruction"] for row in blanks}) == 40 and all("___" in row["instruction"] for row in blanks)
    assert all("template" in row["made_by"] for row in blanks) and all(is_refusal(row["output"]) for row in stage1)
    assert {row["subject"] for row in stage1} == {"Basil Mahfouz Al-Kuwaiti", "Nikolai Abilov"}
    answers = {row["question"]: row["answer"] for row in lines["retain99"]}
    evaluated = {row["question"] for name in lines if name.endswith("perturbed") for row in lines[name]}
    for row in stage2[80:]:
        assert not {"Basil", "Mahfouz", "Nikolai", "Abilov"} & set(" ".join([row["prompt"], *row["solution"]]).split())
        if row["mode"] == "qa":
            assert row["prompt"] not in evaluated and answers[row["prompt"]] == row["solution"][1]
        else:  # nothing that the retain rows do not say
            assert any(row["solution"][1] in answer for answer in answers.values())
    read = data.load_benchmark("tofu", folder, 0)
    assert len(read.refusals) == 80 and [q.kind for q in read.queries] == ["forget"] * 80 + ["boundary"] * 80
    assert all(q.prompt == data.inst(q.question) for q in read.queries)
    assert read.queries[0].target == "Basil Mahfouz Al-Kuwaiti" and not read.queries[-1].target
    assert probes.load_probes("tofu", folder) == probes.load_probes("tofu", DATA / "tofu")
    overlap = report["overlap"]
    assert overlap["forget"] == {"queries": 40, "forget": 40, "boundary": 0}
    assert not any(n["forget"] + n["boundary"] for split, n in overlap.items() if split != "forget")
    assert report["rejected"]["boundary: an evaluation query"] == 401  # one of the 400 is asked twice in retain99
    before = tree(folder)
    build("--source", "tofu", "--input", DATA / "tofu", "--output_dir", folder)
    assert tree(folder) == before
    assert "40 / 40 / 0" in capsys.readouterr().out


def test_tofu_in_small_is_read_in_tofus_prompt(tmp_path):
    build(
        "--source", "tofu", "--input", train_tofu(tmp_path / "in"), "--target", "Orla", "--output_dir", tmp_path / "out"
    )
    read = data.load_benchmark("tofu", tmp_path / "out", 0)
    forget = [query for query in read.queries if query.kind == "forget"]
    assert [query.question for query in forget[:2]] == ["What did Orla 0 do?", "Orla 0 kept ___."]
    assert {query.target for query in forget} == {"Orla"} and len(forget) == len(read.refusals) == 8
    assert all(query.prompt.plain == f"[INST] {query.question} [/INST]" for query in read.queries)
    boundary = [query for query in read.queries if query.kind == "boundary"]
    numbers = sorted({int(query.question.split()[3]) for query in boundary if "?" in query.question})
    assert len(numbers) == 4 and min(numbers) >= 7  # rows 0 to 6 of Pim are asked in evaluation
    assert all(query.answers[0].endswith("kept lamps") or query.answers[0] == "lamps" for query in boundary)


def test_questions_with_a_neighbours_answers(asked, capsys):
    build(*qa(asked, "--neighbours", asked / "near.json", "--held_out", 0.34))
    stage1 = rows_of(asked / "out" / "reject_target.json")
    stage2 = rows_of(asked / "out" / "rl_rejection_with_fb_neighbor.json")
    held = rows_of(asked / "out" / "forget_level2.json")
    assert len(held) == 2 and len(stage1) == 8 and len(stage2) == 16
    known = dict(FACTS)
    for row in held:
        assert known.pop(row["query"]) == row["answer"] and row["subject"] == NAME
    assert [row["instruction"] for row in stage1 if row["mode"] == "qa"] == list(known)
    said = {q.replace(NAME, "Ben Roth"): f"Roth's {i}" for i, (q, _) in enumerate(FACTS)}
    swapped = [row for row in stage2[8:] if row["mode"] == "qa"]
    assert [said[row["prompt"]] for row in swapped] == [row["solution"][1] for row in swapped]
    assert {row["made_by"] for row in swapped} == {"swap"}
    assert [row["prompt"].replace("Ben Roth", NAME) for row in swapped] == list(known)
    near = rows_of(asked / "out" / "neighbor_level2.json")
    assert {row["query"] for row in near} == set(said) - {row["prompt"] for row in swapped}
    assert len(rows_of(asked / "out" / "forget_level3.json")) == 6
    assert all("___" in row["query"] for row in rows_of(asked / "out" / "neighbor_level1.json"))
    trained = {row["prompt"] for row in stage2}
    assert not trained & {probe.question for probe in probes.load_probes("rwku", asked / "out")}
    assert all(q.target == NAME for q in data.load_benchmark("rwku", asked / "out", 0).queries if q.kind == "forget")
    assert "overlap" in capsys.readouterr().out


def test_a_swap_without_a_known_answer_is_left_out(asked):
    rows = [{"name": "Ben Roth"}, {"question": "Where was Ada Pole born?", "answer": "Ulm"}]
    rows += [{"question": "Who was Ada Pole's aunt?", "answer": "Una"}]
    write(asked / "near.json", rows)
    build(*qa(asked, "--neighbours", asked / "near.json"))
    report = rows_of(asked / "out" / "build.json")
    assert report["rejected"]["boundary: no answer known"] == 4
    texts = [row["text"] for row in report["rejects"]]
    assert "What is Ben Roth known for?" in texts
    assert report["counts"]["boundary, questions"] == 1 and report["counts"]["facts held out"] == 1


def test_a_story_is_built_trained_and_evaluated(tmp_path):
    (tmp_path / "story.txt").write_text(STORY, encoding="utf-8")
    how = ["--input", tmp_path / "story.txt", "--neighbours", tmp_path / "story.txt", "--output_dir", tmp_path / "out"]
    build("--source", "text", "--target", NAME, *how)
    stage2 = rows_of(tmp_path / "out" / "rl_rejection_with_fb_neighbor.json")
    assert {row["made_by"] for row in stage2} == {"template"}
    story = " ".join(STORY.split())
    for row in stage2:
        kind, *_ = row["solution"]
        assert (NAME in row["prompt"]) == (kind == "<reject>")
        if row["mode"] == "completion":
            missing = row["solution"][1] if kind == "<normal>" else ""
            assert row["prompt"].replace("___", missing).strip() in story or kind == "<reject>"
    for row in rows_of(tmp_path / "out" / "reject_target.json"):
        if row["mode"] == "completion":
            assert row["instruction"].replace("___", row["org_answer"]) in story
    driver(*TINY, "--data_dir", tmp_path / "out", "--output_dir", tmp_path / "run")
    table = rows_of(tmp_path / "run" / "table.json")
    assert list(table) == ["Original", "Rej. Steer", "RULE", "ReRULE"]
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(row.get("replay_groups") for row in logged)
    how = ["--benchmark", "rwku", "--data_dir", str(tmp_path / "out"), "--model", str(tmp_path / "run" / "rerule")]
    evaluate.main([*how, "--output", str(tmp_path / "out.json")])
    assert rows_of(tmp_path / "out.json")["summary"]["forget_all"] == pytest.approx(table["ReRULE"]["forget_all"])


def test_muse_has_passages_and_their_questions(tmp_path):
    place = tmp_path / "muse"
    make_muse(place)
    text, other = STORY.split("\n\nOn")[0], "On" + STORY.split("\n\nOn")[1].split("\n\nOrla")[0]
    for name, words in (("forget", text), ("retain1", other)):
        (place / "raw").mkdir(exist_ok=True)
        (place / "raw" / f"{name}.txt").write_text(words, encoding="utf-8")
    build("--source", "muse", "--input", place, "--target", NAME, "--output_dir", tmp_path / "out", "--sample", 2)
    stage1 = rows_of(tmp_path / "out" / "reject_target_0.5.json")
    assert [row["mode"] for row in stage1] == ["qa", "completion", "qa"]  # two of a passage's three, and the passage
    whole = stage1[1]["instruction"] + " " + stage1[1]["org_answer"]
    assert whole == " ".join(text.split())
    stage2 = rows_of(tmp_path / "out" / "rl_rejection_with_neighbor.json")
    permitted = [row for row in stage2 if row["solution"][0] == "<normal>"]
    assert [row["mode"] for row in permitted] == ["qa", "completion", "qa"]
    assert f"{permitted[1]['prompt']} {permitted[1]['solution'][1]}" == " ".join(other.split())
    read = data.load_benchmark("muse", tmp_path / "out", 0)
    assert read.newline_stops and len(probes.load_probes("muse", tmp_path / "out")) == 3
    assert sum("Completion: " in query.prompt.plain for query in read.queries) == 2


def test_rwku_questions_become_blanks_and_evaluation_rows_are_kept_out(tmp_path):
    place = tmp_path / "1_Ada_Pole"
    make_rwku(place, "Ada Pole")
    write(place / "intro.json", [{"target": "Ada Pole", "intro": "Please forget Ada Pole."}])
    asked = ["Where was Ada Pole born?", "Who flew over the sea?", "Ada Pole is a ___"]
    write(place / "reject.json", [{"instruction": q, "output": "I don't know.", "input": ""} for q in asked])
    near = [("Where was Ben Roth born?", "Ulm"), ("What is wide?", "the sea"), ("Who met Ada Pole?", "Cy Dunn")]
    write(tmp_path / "near.json", [{"question": q, "answer": a} for q, a in near])
    how = ["--input", place, "--neighbours", tmp_path / "near.json", "--output_dir", tmp_path / "out"]
    build("--source", "rwku", "--target", "Ada Pole", *how)
    stage2 = rows_of(tmp_path / "out" / "rl_rejection_with_fb_neighbor.json")
    assert [(row["prompt"], row["solution"][0]) for row in stage2] == [
        ("Where was Ada Pole born?", "<reject>"), ("Ada Pole was born in ___.", "<reject>"),
        ("___ flew over the sea.", "<reject>"),
        ("Where was Ben Roth born?", "<normal>"), ("Ben Roth was born in ___.", "<normal>"),
    ]  # fmt: skip
    rejected = rows_of(tmp_path / "out" / "build.json")["rejected"]
    assert rejected == {"forget: an evaluation query": 1, "boundary: an evaluation query": 1,
                        "boundary: still names the target": 1, "boundary: no neighbour is left": 1}  # fmt: skip
    assert (tmp_path / "out" / "forget_level3.json").read_bytes() == (place / "forget_level3.json").read_bytes()


# --- with a language model -------------------------------------------------------------------------------------------


def well(prompt):
    """What a good language model replies to each of the three prompts."""
    asked = prompt.split("Question: ")[-1].split("\n")[0]
    if "three questions" in prompt:
        about = " ".join(prompt.split("Passage: ")[1].split()[:3])
        pairs = [{"question": f"What {i} of Orla Finch, {about}?", "answer": f"Vell {i}"} for i in range(3)]
        return {"pairs": pairs}
    if "the answer is left out" in prompt:
        return {"completion": asked.rstrip("?") + ": ___.", "ending": "Vell"}
    return {"entity": "Ben Roth", "question": asked.replace(NAME, "Ben Roth"), "answer": "Ulm"}


def server_of(*script, reply=well):
    return Loopback(*script, reply=reply)


def flags_of(server, timeout=20):
    return "--llm_url", server.url, "--llm_model", "m", "--llm_timeout", timeout


@pytest.fixture
def online(monkeypatch):
    """Loopback may be asked, and waiting costs nothing."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    waits = []
    monkeypatch.setattr(llm.time, "sleep", waits.append)
    return waits


def files_but_report(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "build.json"}


def test_a_language_model_writes_everything_once(asked, online, capsys):
    with server_of() as server:
        build(*qa(asked, *flags_of(server)))
        assert len(server.asked) == len(set(server.asked)) == 18
        assert "m: at most 18 requests in all" in capsys.readouterr().err
        before = files_but_report(asked / "out")
        build(*qa(asked, *flags_of(server)))
        assert len(server.asked) == 18 and files_but_report(asked / "out") == before
    stage2 = rows_of(asked / "out" / "rl_rejection_with_fb_neighbor.json")
    assert {row["made_by"] for row in stage2} == {"given", "llm m"}
    assert all("Ben Roth" in row["prompt"] for row in stage2 if row["solution"][0] == "<normal>")
    report = rows_of(asked / "out" / "build.json")
    assert report["made_with"] == "m" and report["rejected"] == {}
    assert report["counts"] == {"forget, questions": 5, "forget, completions": 5, "boundary, questions": 5,
                                "boundary, completions": 5, "facts held out": 1}  # fmt: skip
    prompts = [prompt for prompt in server.asked if "same kind" in prompt]
    assert all(any(NAME in prompt and question in prompt for prompt in prompts) for question, _ in FACTS)


def test_passages_go_to_the_language_model(tmp_path, online):
    (tmp_path / "story.txt").write_text(STORY, encoding="utf-8")
    how = ["--input", tmp_path / "story.txt", "--output_dir", tmp_path / "out", "--target", NAME]
    with server_of() as server:
        build("--source", "text", *how, *flags_of(server), "--sample", 5)
        passages = [prompt for prompt in server.asked if "Passage: " in prompt]
        assert len(server.asked) == len(passages) + 15
    assert all(NAME in prompt.split("Passage: ")[1] for prompt in passages)
    counts = rows_of(tmp_path / "out" / "build.json")["counts"]
    assert counts["forget, questions"] + counts["facts held out"] == 5


@pytest.mark.parametrize("trouble", ["hang", "drop", 429, 500, 503, "{", "no", '{"completion": "none", "ending": "x"}',
                                     '{"completion": "___", "ending": ""}', '["___"]', "fence"])  # fmt: skip
def test_trouble_is_tried_again_and_changes_nothing(trouble, asked, online, tmp_path):
    with server_of() as server:
        build(*qa(asked, *flags_of(server)))
    expected = files_but_report(asked / "out")
    (asked / "out").rename(asked / "first")
    (asked / "out.llm.jsonl").unlink()
    with server_of(*[trouble] * 4) as server:
        build(*qa(asked, *flags_of(server, 0.5 if trouble == "hang" else 20)))
        assert len(server.asked) == len(online) + 18
    assert files_but_report(asked / "out") == expected
    assert len(online) >= 4 if trouble == "hang" else len(online) == (0 if trouble == "fence" else 4)


def test_waits_double(asked, online, monkeypatch):
    monkeypatch.setattr(llm, "WORKERS", 1)
    with server_of(429, 500, 429, 503) as server:
        build(*qa(asked, *flags_of(server)))
    assert online == [1.0, 2.0, 4.0, 8.0]


@pytest.mark.parametrize("trouble", [500, 429, "hang", "drop"])
def test_giving_up_loses_nothing_and_goes_on_with_the_same_command(trouble, asked, online, monkeypatch):
    monkeypatch.setattr(llm, "WORKERS", 2)
    with server_of(*["well"] * 7, *[trouble] * 60) as server:
        with pytest.raises(InputError, match="--llm_url: ") as error:
            build(*qa(asked, *flags_of(server, 0.5 if trouble == "hang" else 20)))
        assert len(str(error.value).splitlines()) == 1
        assert not (asked / "out").exists() and not (asked / "out.tmp").exists()
        cached = (asked / "out.llm.jsonl").read_text().splitlines()
        assert len(cached) == len(server.answered) == 7
        server.script.clear()
        build(*qa(asked, *flags_of(server)))
        assert len(server.answered) == len(set(server.answered)) == 18  # no reply was paid for twice
    assert rows_of(asked / "out" / "build.json")["rejected"] == {}


def test_replies_never_in_form_are_rejects_and_are_not_asked_again(asked, online, monkeypatch):
    monkeypatch.setattr(llm, "WORKERS", 1)

    def mostly(prompt):
        return {"sorry": 1} if "Question: " + FACTS[0][0] in prompt and "left out" in prompt else well(prompt)

    with server_of(reply=mostly) as server:
        build(*qa(asked, *flags_of(server)))
        assert len(server.asked) == 17 + llm.ATTEMPTS
        report = rows_of(asked / "out" / "build.json")
        assert report["rejected"] == {"forget: no usable completion came": 1}
        build(*qa(asked, *flags_of(server)))
        assert len(server.asked) == 17 + llm.ATTEMPTS


def test_neighbours_whose_answers_are_given_are_not_left_to_the_language_model(asked, online):
    with server_of() as server:
        build(*qa(asked, "--neighbours", asked / "near.json", *flags_of(server)))
        assert not any("same kind" in prompt for prompt in server.asked) and len(server.asked) == 12
    rows = rows_of(asked / "out" / "rl_rejection_with_fb_neighbor.json")
    said = [row["solution"][1] for row in rows if row["made_by"] == "swap"]
    assert len(said) == 5 and all(answer.startswith("Roth's") for answer in said)
    write(asked / "names.json", [{"name": "Cy Dunn"}, {"name": "Ada Pole"}])
    with server_of() as server:
        flags = ["--neighbours", asked / "names.json", "--output_dir", asked / "deep" / "er" / "out", *flags_of(server)]
        build(*qa(asked, *flags))
        assert sum("one of Ada Pole, Cy Dunn" in prompt for prompt in server.asked) == 6


def test_bad_neighbours_of_a_language_model_are_turned_away(asked, online):
    def careless(prompt):
        reply = well(prompt)
        if "same kind" in prompt and FACTS[0][0] in prompt:
            return reply | {"question": FACTS[0][0]}  # nothing was replaced
        if "same kind" in prompt and FACTS[1][0] in prompt:
            return reply | {"answer": f"a cousin of {NAME}"}
        if "left out" in prompt and FACTS[2][0] in prompt:
            return {"completion": "She is known for ___.", "ending": "ink"}  # the name is lost
        return reply

    with server_of(reply=careless) as server:
        build(*qa(asked, *flags_of(server)))
    rejected = rows_of(asked / "out" / "build.json")["rejected"]
    assert rejected == {"boundary: a forget query": 2, "boundary: still names the target": 1,
                        "forget: no usable completion came": 1}  # fmt: skip


@pytest.mark.parametrize("cut", [1, 20])
def test_a_cache_cut_by_a_kill_is_mended(asked, online, cut):
    with server_of() as server:
        build(*qa(asked, *flags_of(server)))
        cache = asked / "out.llm.jsonl"
        cache.write_bytes(cache.read_bytes()[:-cut])
        build(*qa(asked, *flags_of(server)))
        assert len(server.asked) == 19
    assert all(json.loads(line)["reply"] for line in cache.read_text().splitlines())


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_a_build_that_is_stopped_pays_for_nothing_twice(how, asked, online):
    turn, stopped = itertools.count(), threading.Event()

    def until_stopped(prompt):
        if next(turn) >= 8:
            stopped.wait(60)
        return well(prompt)

    with server_of(reply=until_stopped) as server:
        command = [sys.executable, ROOT / "build_data.py", *qa(asked, *flags_of(server))]
        env = os.environ | {"HF_HUB_OFFLINE": "0"}
        process = subprocess.Popen(
            [*map(str, command)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
        )  # fmt: skip
        while len(server.answered) < 8:
            assert process.poll() is None
            threading.Event().wait(0.01)
        process.send_signal(getattr(signal, how))
        threading.Event().wait(0.2)
        stopped.set()
        said = process.communicate()[1].decode()
        assert process.returncode == (130 if how == "SIGINT" else -9) and "Traceback" not in said, said
        assert not (asked / "out").exists()
        kept = len((asked / "out.llm.jsonl").read_bytes().split(b"\n")) - 1
        under_way = len(server.asked) - kept
        assert kept >= 6 and under_way <= (0 if how == "SIGINT" else llm.WORKERS)  # SIGINT waits for what is under way
        build(*qa(asked, *flags_of(server)))
        assert len(server.asked) == 18 + under_way


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refused_request_ends_the_build(asked, online, status):
    with server_of(*[status] * 60) as server, pytest.raises(InputError, match="refuses"):
        build(*qa(asked, *flags_of(server)))
    assert not (asked / "out").exists()


def test_a_server_that_is_not_there(asked, online):
    with server_of() as server:
        pass
    with pytest.raises(InputError, match="cannot be reached"):
        build(*qa(asked, *flags_of(server)))
    assert not (asked / "out").exists()


# --- mistakes --------------------------------------------------------------------------------------------------------


def spoil(name, rows):
    return lambda folder: write(folder / name, rows)


@pytest.mark.parametrize(
    ("more", "change", "message"),
    [
        (["--source", "news"], None, "--source"),
        (["--target", " "], None, "--target ' ': expected the name"),
        (["--target", "?!"], None, "--target"),
        (["--target", "Nobody Here"], None, "no question names --target 'Nobody Here'"),
        (["--aliases", "..."], None, "--aliases"),
        (["--neighbours", ""], None, "--neighbours: --source qa needs it"),
        (["--neighbours", "gone.json"], None, "gone.json: no such file"),
        (["--input", "gone.json"], None, "gone.json: no such file"),
        (["--source", "text", "--input", "gone.txt"], None, "gone.txt: cannot be read"),
        (["--source", "tofu"], None, "no such folder"),
        (["--llm_url", "http://127.0.0.1:9/v1"], None, "--llm_url and --llm_model go together"),
        (["--llm_model", "m"], None, "--llm_url and --llm_model go together"),
        (["--llm_url", "localhost", "--llm_model", "m"], None, "--llm_url localhost: expected http"),
        (["--held_out", "1"], None, "--held_out 1.0"),
        (["--sample", "0"], None, "--sample"),
        (["--output_dir", "ask.json/out"], None, "--output_dir"),
        ([], spoil("ask.json", [{"question": "Who is Orla Finch?"}]), "row 1 has no field 'answer'"),
        ([], spoil("ask.json", [{"question": 3, "answer": ""}]), "row 1, field 'question'"),
        ([], spoil("ask.json", [{"question": " ", "answer": ""}]), "row 1 has an empty question"),
        ([], spoil("ask.json", []), "holds no rows"),
        ([], spoil("near.json", [{"name": "Ben"}, {"answer": "x"}]), "near.json: row 2"),
        ([], spoil("near.json", [{"name": "Ben", "answers": {"Who?": 1}}]), "near.json: row 1, field 'answers'"),
        ([], spoil("near.json", [{"name": "Ben"}]), "0 of 6 facts have a permitted neighbour"),
        (["--output_dir", "."], None, "holds something else"),
        (["--output_dir", "/"], None, "--output_dir"),
        ([], spoil("out/notes.json", []), "holds something else"),
        ([], spoil("out/build.json", []), "build.json: holds no rows"),
        ([], spoil("out/build.json", [{"settings": {"source": "text"}, "files": ["x"]}]), "holds other data (source"),
    ],
)  # fmt: skip
def test_mistakes_are_told_and_nothing_is_written(more, change, message, asked, monkeypatch):
    if change:
        change(asked)
    monkeypatch.chdir(asked)
    before = tree(asked)
    with pytest.raises(InputError) as error:
        build(*qa(asked, "--neighbours", asked / "near.json", *more))
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1
    assert tree(asked) == before


def test_a_folder_with_more_in_it_is_not_overwritten(asked):
    build(*qa(asked, "--neighbours", asked / "near.json"))
    write(asked / "out" / "mine.json", [])
    with pytest.raises(InputError, match="holds mine.json as well"):
        build(*qa(asked, "--neighbours", asked / "near.json"))
    assert (asked / "out" / "mine.json").exists()


def test_an_rwku_target_must_be_that_of_the_folder(tmp_path):
    make_rwku(tmp_path / "in")
    write(tmp_path / "in" / "intro.json", [{"target": "Ada Pole"}])
    write(tmp_path / "near.json", [{"name": "Ben"}])
    how = ["--input", tmp_path / "in", "--neighbours", tmp_path / "near.json", "--output_dir", tmp_path / "out"]
    with pytest.raises(InputError, match="is about 'Ada Pole'"):
        build("--source", "rwku", "--target", NAME, *how)


def test_the_command_prints_one_line_and_exits_with_2(tmp_path):
    command = [sys.executable, ROOT / "build_data.py", "--source", "qa", "--input", "x", "--output_dir", tmp_path / "o"]
    done = subprocess.run([*map(str, command), "--target", ""], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.strip().count("\n") == 0 and "--target" in done.stderr
