"""RWKU, MUSE-Books and TOFU through the whole driver, on made-up files; its table against the command's."""

import json

import pytest
from made import SMALL, command, published_muse, published_rwku, published_tofu
from miniature import driver

MAKE = {"rwku": published_rwku, "muse": published_muse, "tofu": published_tofu}


@pytest.mark.parametrize("name", MAKE)
def test_the_drivers_table_is_the_commands_on_the_saved_model(name, tmp_path):
    MAKE[name](tmp_path / "data")
    of, flags = ["--benchmark", name, "--data_dir", tmp_path / "data"], []
    if name == "tofu":  # a log of the command, taken as the retained model's
        driver(*SMALL, *of, "--output_dir", tmp_path / "first", "--steps", 1)
        command(*of, "--model", tmp_path / "first" / "rej_steer", "--output", tmp_path / "log.json")
        flags = ["--retain_log", tmp_path / "log.json"]
    driver(*SMALL, *of, "--output_dir", tmp_path / "run", *flags)
    table = json.loads((tmp_path / "run" / "table.json").read_text())
    assert list(table) == ["Original", "Rej. Steer", "RULE", "ReRULE"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(row.get("replay_groups") for row in rows)
    for title, phase in (("Original", "original"), ("ReRULE", "rerule")):
        where = ["--model", tmp_path / "run" / phase, "--output", tmp_path / "out.json"]
        result = command(*of, *where, "--batch_size", 3, *flags)
        for column, value in result["summary"].items():
            assert table[title][column] == pytest.approx(value, abs=1e-5), column
        stored = [
            json.loads(line) for line in (tmp_path / "run" / "predictions" / f"{phase}.jsonl").read_text().splitlines()
        ]
        assert [row["prediction"] for row in stored] == [row["prediction"] for row in result["per_example"]]
    if name == "tofu":
        assert 0 < table["ReRULE"]["forget_quality"] <= 1 and table["ReRULE"]["notes"]
