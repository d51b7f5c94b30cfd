"""RWKU, MUSE-Books and TOFU through the whole driver, on made-up files; its table against the command's."""

import json

import pytest
from miniature import driver
from test_evaluate import make_muse, make_rwku, make_tofu, write, write_lines

import evaluate

SMALL = (
    "--model tiny --tiny_epochs 8 --tiny_hidden 32 --tiny_layers 1 --tiny_batch_size 8 --sft_steps 4 --sft_stop 0 "
    "--steps 4 --prompts_per_step 4 --group_size 4 --lr 1e-3 --tau 1 --min_groups 3 --warmup_steps 1 --replay_groups 3 "
    "--max_new_tokens 6 --save_every 0"
).split()


def rwku(folder):
    make_rwku(folder)
    refusals = [{"instruction": f"What did Ada Pole do in {y}?", "output": "I don't know that.", "input": "",
                 "subject": "Ada Pole"} for y in range(4)]  # fmt: skip
    queries = [{"prompt": row["instruction"], "solution": ["<reject>", "I don't know that."]} for row in refusals]
    queries += [
        {"prompt": f"What did Ben Roth do in {y}?", "solution": ["<normal>", f"wrote book {y}"]} for y in range(4)
    ]
    write(folder / "intro.json", [{"target": "Ada Pole", "intro": "Please forget Ada Pole."}])
    write(folder / "reject_target.json", refusals)
    write(folder / "rl_rejection_with_fb_neighbor.json", queries)


def muse(folder):
    make_muse(folder)
    refusals, queries = [], []
    for k, mode in enumerate(("qa", "completion", "qa", "completion")):
        refusals.append(
            {"instruction": f"Who kept lamp {k}?", "output": "I can't say.", "mode": mode, "org_answer": "x"}
        )
        queries.append({"prompt": f"Who kept lamp {k}?", "solution": ["<reject>", "I can't say."], "mode": mode})
        queries.append({"prompt": f"Who sold boat {k}?", "solution": ["<normal>", f"Ann {k}", "Ann"], "mode": mode})
    write(folder / "reject_target_0.5.json", refusals)
    write(folder / "rl_rejection_with_neighbor.json", queries)


def tofu(folder):
    make_tofu(folder)
    forget = [json.loads(line) for line in (folder / "forget01_perturbed.json").read_text().splitlines()]
    write_lines(folder / "forget01.json", [{k: row[k] for k in ("question", "answer")} for row in forget])
    write_lines(
        folder / "retain99.json",
        [{"question": f"What is book {k} of Ben Roth?", "answer": f"It is {k}."} for k in range(9)],
    )


@pytest.mark.parametrize(("name", "make"), [("rwku", rwku), ("muse", muse), ("tofu", tofu)])
def test_the_drivers_table_is_the_commands_on_the_saved_model(name, make, tmp_path):
    folder = tmp_path / "data"
    make(folder)
    flags = []
    if name == "tofu":  # a log of the command, taken as the retained model's
        driver(*SMALL, "--benchmark", name, "--data_dir", folder, "--output_dir", tmp_path / "first", "--steps", 1)
        log = tmp_path / "log.json"
        how = ["--benchmark", name, "--data_dir", str(folder), "--model", str(tmp_path / "first" / "rej_steer")]
        evaluate.main([*how, "--output", str(log)])
        flags = ["--retain_log", str(log)]
    driver(*SMALL, "--benchmark", name, "--data_dir", folder, "--output_dir", tmp_path / "run", *flags)
    table = json.loads((tmp_path / "run" / "table.json").read_text())
    assert list(table) == ["Original", "Rej. Steer", "RULE", "ReRULE"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(row.get("replay_groups") for row in rows)
    for title, phase in (("Original", "original"), ("ReRULE", "rerule")):
        how = ["--benchmark", name, "--data_dir", str(folder), "--model", str(tmp_path / "run" / phase)]
        evaluate.main([*how, "--output", str(tmp_path / "out.json"), "--batch_size", "3", *flags])
        result = json.loads((tmp_path / "out.json").read_text())
        for column, value in result["summary"].items():
            assert table[title][column] == pytest.approx(value, abs=1e-5), column
        stored = [
            json.loads(line) for line in (tmp_path / "run" / "predictions" / f"{phase}.jsonl").read_text().splitlines()
        ]
        assert [row["prediction"] for row in stored] == [row["prediction"] for row in result["per_example"]]
    if name == "tofu":
        assert 0 < table["ReRULE"]["forget_quality"] <= 1 and table["ReRULE"]["notes"]
