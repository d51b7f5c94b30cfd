"""What is made of each source by rules alone, also through the driver, and mistakes of the user's."""

import json
import subprocess
import sys

import pytest
from made import make_muse, make_rwku, train_tofu, write
from miniature import driver
from orla import FACTS, NAME, ROOT, STORY, build, probes, qa, questions, rows_of, training

import evaluate
from benchmarks import tofu
from config import InputError
from engine.flags import parse
from refusal import is_refusal

DATA = ROOT.parent / "shared" / "data"
TINY = (
    "--benchmark rwku --model tiny --tiny_epochs 2 --tiny_hidden 16 --tiny_layers 1 --tiny_batch_size 8 --sft_steps 2 "
    "--sft_stop 0 --steps 2 --prompts_per_step 4 --group_size 2 --lr 1e-3 --tau 1 --min_groups 3 --warmup_steps 0 "
    "--replay_groups 3 --max_new_tokens 4 --save_every 0"
).split()


def tree(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture
def asked(tmp_path):
    return questions(tmp_path)


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
    read = training("tofu", folder)
    assert len(read.refusals) == 80 and [q.kind for q in read.queries] == ["forget"] * 80 + ["boundary"] * 80
    assert all(q.prompt == tofu.inst(q.question) for q in read.queries)
    assert read.queries[0].target == "Basil Mahfouz Al-Kuwaiti" and not read.queries[-1].target
    assert probes("tofu", folder) == probes("tofu", DATA / "tofu")
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
    read = training("tofu", tmp_path / "out")
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
    assert not trained & {probe.question for probe in probes("rwku", asked / "out")}
    assert all(q.target == NAME for q in training("rwku", asked / "out").queries if q.kind == "forget")
    assert "overlap" in capsys.readouterr().out


def test_names_that_stand_beside_the_target_are_asked_about_on_their_own(asked):
    more = [
        ("When did Orla Finch come to Skerry Point?", "1912"),
        ("What did Orla Finch keep at Skerry Point?", "a lamp"),
    ]
    write(asked / "ask.json", [{"question": q, "answer": a} for q, a in FACTS + more])
    near = [
        {"question": q.replace(NAME, "Ada Pole").replace("Skerry Point", "sea"), "answer": "x"} for q, _ in FACTS + more
    ]
    write(asked / "near.json", near)
    build(*qa(asked, "--neighbours", asked / "near.json", "--associated", 3, "--seed", 1))
    rows = rows_of(asked / "out" / "associated.json")
    assert len(rows) == 3 and all([*row] == ["question"] and "Skerry Point" in row["question"] for row in rows)
    assert not any(NAME in row["question"] for row in rows) and training("rwku", asked / "out").queries
    assert "associated.json" in rows_of(asked / "out" / "build.json")["files"]


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


def test_a_story_is_built_trained_and_evaluated(tmp_path, capsys):
    (tmp_path / "story.txt").write_text(STORY, encoding="utf-8")
    how = ["--input", tmp_path / "story.txt", "--neighbours", tmp_path / "story.txt", "--output_dir", tmp_path / "out"]
    build("--source", "text", "--target", NAME, *how)
    told = "forget: a sentence is no plain statement 1"  # "Go on," said Orla Finch
    assert [told in line for line in capsys.readouterr().out.splitlines() if line.startswith("rejected: ")] == [True]
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
    evaluate.main(parse(evaluate.Options, [*how, "--output", str(tmp_path / "out.json")]))
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
    read = training("muse", tmp_path / "out")
    assert read.newline_stops and len(probes("muse", tmp_path / "out")) == 3
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
        (["--llm_url", "localhost", "--llm_model", "m"], None, "cannot be reached (expected http"),
        (["--held_out", "1"], None, "--held_out 1.0"),
        (["--sample", "0"], None, "--sample"),
        (["--output_dir", "ask.json/out"], None, "--output_dir"),
        ([], spoil("ask.json", [{"question": "Who is Orla Finch?"}]), "row 1 has no field 'answer'"),
        ([], spoil("ask.json", [{"question": 3, "answer": ""}]), "row 1, field 'question'"),
        ([], spoil("ask.json", [{"question": " ", "answer": "x"}]), "row 1, field 'question' is not a str with"),
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
    command = [sys.executable, "-m", "build_data", "--source", "qa", "--input", "x", "--output_dir", tmp_path / "o"]
    done = subprocess.run([*map(str, command), "--target", ""], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.strip().count("\n") == 0 and "--target" in done.stderr
