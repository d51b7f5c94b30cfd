"""Text from outside that we print or write: it drives no terminal, and breaks neither a table, a card nor a log."""

import csv
import json

import pytest
import torch
from attacked import build_data, ended, evaluate, rerule
from made import byte_tokenizer, make_model, make_rwku, train_rwku, write

from engine.report import write as write_table

torch.set_num_threads(1)
EVIL = "\x1b[2J\x1b]0;x\x07 | a | \r\n# heading\n<script>alert(1)</script> \x9b31m \u202e ![x](http://h) `x` "
SMALL = (
    "--model tiny --tiny_epochs 1 --tiny_hidden 16 --tiny_layers 1 --sft_steps 1 --sft_stop 0 --steps 1 --method rule "
    "--prompts_per_step 4 --group_size 2 --max_new_tokens 3 --save_every 0 --min_groups 1"
).split()


def harmless(text):
    """No control character but the ends of lines, and none that turns the reading direction."""
    assert all(c.isprintable() or c in "\n\t" for c in text.replace("\r", "\n" * ("\x1b[" not in text))), ascii(text)


@pytest.fixture
def rwku(tmp_path):
    """A target whose every text is hostile."""
    folder = train_rwku(tmp_path / "rwku" / "1_x", f"Ada Pole{EVIL}")
    for name in ("reject_target", "rl_rejection_with_fb_neighbor"):
        rows = json.loads((folder / f"{name}.json").read_text())
        for row in rows:
            for field in {"instruction", "prompt", "output"} & row.keys():
                row[field] = f"{EVIL}{row[field]}{EVIL}"
            row["solution"] = (
                [row["solution"][0], *(EVIL + text for text in row["solution"][1:])] if "solution" in row else 0
            )
        write(folder / f"{name}.json", rows)
    rows = json.loads((folder / "forget_level3.json").read_text())
    write(folder / "forget_level3.json", [row | {"type": row["type"] + EVIL} for row in rows])
    return folder


def test_a_runs_words_table_logs_and_cards(rwku, tmp_path):
    done = ended(rerule, "--benchmark", "rwku", "--data_dir", rwku, *SMALL, "--output_dir", tmp_path / "run")
    assert done.code == 0 and " → " in done.out, done
    harmless(done.out + done.err)
    table = (tmp_path / "run" / "table.md").read_text()
    widths = {line.replace("\\|", "").count("|") for line in table.splitlines() if line.startswith("|")}
    assert len(widths) == 1 and "<script" not in table
    harmless(table)
    for path in (tmp_path / "run").rglob("*.jsonl"):  # there a text is kept as it is, on one line
        assert all(isinstance(json.loads(line), dict) for line in path.read_bytes().split(b"\n")[:-1])
    for path in (tmp_path / "run").rglob("README.md"):
        harmless(path.read_text())
    for path in (tmp_path / "run").glob("*.csv"):
        assert len({len(row) for row in csv.reader(path.open())}) == 1


def test_a_card_names_a_model_whose_name_is_hostile_on_one_line(tmp_path):
    place = tmp_path / "a`b | c\n---\nlicense: mit\n# x"
    make_model(context=2048).save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    make_rwku(tmp_path / "rwku")
    train_rwku(tmp_path / "rwku")
    argv = [*SMALL[12:], "--benchmark", "rwku", "--data_dir", tmp_path / "rwku", "--model", place]
    done = ended(rerule, *argv, "--output_dir", tmp_path / "run")
    assert done.code == 0, done
    card = (tmp_path / "run" / "rule" / "README.md").read_text()
    assert card.count("\nlicense:") == 1 and "\n# x" not in card
    harmless(done.out + done.err)


def test_an_evaluations_table_of_targets(rwku, tmp_path):
    make_rwku(tmp_path / "rwku" / "2_y", "Bo Quay")
    rows = json.loads((tmp_path / "rwku" / "2_y" / "forget_level1.json").read_text())
    write(tmp_path / "rwku" / "2_y" / "forget_level1.json", [row | {"subject": EVIL} for row in rows])
    make_model(context=2048).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    argv = [
        "--benchmark",
        "rwku",
        "--data_dir",
        tmp_path / "rwku",
        "--model",
        tmp_path / "model",
        "--max_new_tokens",
        2,
    ]
    done = ended(evaluate, *argv, "--output", tmp_path / "out.json")
    assert done.code == 0, done
    harmless(done.out + done.err)


def test_a_build_shows_its_rows(tmp_path):
    rows = [{"question": f"Who is Orla Finch{EVIL}{i}?", "answer": f"a keeper{EVIL}"} for i in range(6)]
    write(tmp_path / "ask.json", rows)
    answers = {row["question"]: f"b{i}" for i, row in enumerate(rows)}
    write(tmp_path / "near.json", [{"name": "Ben Roth", "answers": answers}])
    argv = [
        "--source",
        "qa",
        "--input",
        tmp_path / "ask.json",
        "--target",
        "Orla Finch",
        "--neighbours",
        tmp_path / "near.json",
    ]
    done = ended(build_data, *argv, "--output_dir", tmp_path / "out")
    assert done.code == 0, done
    harmless(done.out + done.err)


@pytest.mark.parametrize("where", ["a file's content", "a file's name", "a flag", "a server"])
def test_an_error_that_quotes_is_one_printable_line(tmp_path, where):
    if where == "a file's content":
        folder = train_rwku(tmp_path / "rwku")
        write(folder / "rl_rejection_with_fb_neighbor.json", [{"prompt": EVIL, "solution": [EVIL, EVIL]}])
        done = ended(rerule, "--benchmark", "rwku", "--data_dir", folder)
    elif where == "a file's name":
        done = ended(rerule, "--benchmark", "tofu", "--data_dir", tmp_path / EVIL)
    elif where == "a flag":
        done = ended(rerule, "--method", EVIL)
    else:
        argv = ["--benchmark", "tofu", "--model", "x", "--output", tmp_path / "o", "--judge_model", EVIL]
        done = ended(evaluate, *argv, "--judge_url", f"http://{EVIL}/v1")
    assert done.line(most=900)
    harmless(done.err)


def test_a_note_of_a_table_is_one_line(tmp_path):
    write(tmp_path / "config.json", {})
    row = {"notes": [f"judged by {EVIL}"], "forget_recall": 1.0, "stopped": EVIL, "seconds": 1.0}
    write_table(tmp_path, {"forget_recall": "Recall"}, {"original": row, "rule": row}, figures=False)
    harmless((tmp_path / "table.md").read_text())
