"""A benchmark that is added from outside: one module in `benchmarks.ALL`, and both commands know it."""

import json

import pytest
import toy
from made import command, write

import benchmarks
import rerule
from config import InputError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The toy's files; the toy is one of the benchmarks."""
    monkeypatch.setitem(benchmarks.ALL, "toy", toy.BENCHMARK)
    names = ("Orland", "Pimia", "Quill", "Rosk", "Tavia", "Umber", "Vell", "Wend")
    write(
        tmp_path / "toy" / "capitals.json",
        [{"country": name, "capital": f"{name} City", "forget": i % 2 == 0} for i, name in enumerate(names)],
    )
    return tmp_path / "toy"


def test_a_benchmark_from_outside_is_trained_on_scored_and_shown(folder, tmp_path):
    of, run = ["--benchmark", "toy", "--data_dir", str(folder)], tmp_path / "run"
    small = "--model tiny --prompts_per_step 4 --group_size 3 --replay_groups 2 --method rerule po".split()
    rerule.main(rerule.configure([*of, *small, "--output_dir", str(run)]), figures=False)
    heading, _, *lines = [line for line in (run / "table.md").read_text().splitlines() if line.startswith("|")]
    titles = [cell.strip() for cell in heading.strip("|").split("|")]
    assert titles[:3] == ["Model", "Capitals refused ↑", "Others refused ↓"] and "Over-refusal ↓" in titles
    assert [line.split("|")[1].strip() for line in lines] == ["Original", "PO", "Rej. Steer", "ReRULE"]
    assert "every row: these countries are made up" in (run / "table.md").read_text()
    assert not list(run.glob("*.png"))
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in logged if row["method"] == "rerule"]
    assert [row["step"] for row in steps] == [1, 2, 3] and any(row.get("replay_groups") for row in steps)
    assert steps[1]["eval_capitals_refused"] is not None  # eval_every is the toy's own
    table = json.loads((run / "table.json").read_text())

    found = command(*of, "--model", run / "rerule", "--output", tmp_path / "out.json")
    assert found["benchmark"] == "toy" and found["notes"] == ["these countries are made up"]
    assert list(found["summary"])[:2] == list(toy.BENCHMARK.columns)
    for column, value in found["summary"].items():
        assert table["ReRULE"][column] == pytest.approx(value, abs=1e-5), column
    assert [(row["split"], row["answer"]) for row in found["per_example"][:2]] == [
        ("lost", "Orland City"), ("kept", "Pimia City"),
    ]  # fmt: skip
    again = command("--benchmark", "toy", "--from_log", tmp_path / "out.json", "--output", tmp_path / "again.json")
    assert again["summary"] == found["summary"]


def test_its_presets_and_mistakes_are_told_like_everyones(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        rerule.configure(["--help"])
    assert "tofu 0.6, town 0.4, toy 0.9]" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(InputError, match="--benchmark tofo: expected one of builtin, rwku, muse, tofu, town, toy"):
        rerule.configure(["--benchmark", "tofo"])
    output = ["--benchmark", "toy", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(InputError, match="--benchmark toy needs --data_dir"):
        rerule.main(rerule.configure(output))
    write(folder / "capitals.json", [{"country": "Orland", "capital": "Orland City"}])
    with pytest.raises(InputError, match="capitals.json: row 1 has no field 'forget'"):
        rerule.main(rerule.configure([*output, "--data_dir", str(folder)]))
    with pytest.raises(InputError, match="--retain_log: only --benchmark tofu"):
        rerule.configure([*output, "--retain_log", "log.json"])
