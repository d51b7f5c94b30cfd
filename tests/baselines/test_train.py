"""Baselines through the driver: the rows that each reads, every method to its end, resumed, and where one diverges."""

import dataclasses
import json
import math
from pathlib import Path

import miniature
import pytest
import torch
from made import command, two_forgotten
from transformers import AutoModelForCausalLM

import data
import rerule
from baselines import ALIASES, METHODS, train
from benchmarks.shared import rule_training
from config import Config, InputError
from engine.process import Engine

ENGINE = Engine("cpu")


# --- rows ------------------------------------------------------------------------------------------------------------


def test_scores_of_padded_rows_are_those_of_each_row_alone(model):
    rows = [([1, 5, 6], [7, 2]), ([1, 8], [9, 4, 3, 2]), ([1], [5])]
    logprobs, mask = train.score(ENGINE, model, rows)
    logits = train.score(ENGINE, model, rows, logits=True)
    assert mask.sum().item() == len(logits) == 7
    at = 0
    for row, kept, (prompt, answer) in zip(logprobs, mask, rows, strict=True):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        alone = alone[len(prompt) - 1 : -1]
        expected = torch.log_softmax(alone, -1)[range(len(answer)), answer]
        assert torch.allclose(row[kept], expected, atol=1e-5)
        assert torch.allclose(logits[at : at + len(answer)], alone, atol=1e-5)
        at += len(answer)


def test_rows(words, model):
    asked = two_forgotten()
    tokenizer, config = words, Config(max_new_tokens=3, sga_k=2, baseline_batch_size=2)
    rows = train.rows_of("sga", ENGINE, model, tokenizer, asked, config)
    stops = data.stop_ids(tokenizer, model, asked.newline_stops)

    def greedy(prompt):
        ids, mask, _ = ENGINE.sample(model, [prompt], 1, 3, stops, 0.0)
        return ids[0, 0][mask[0, 0]].tolist()

    text = lambda row: tuple(tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in row)  # noqa: E731
    for kind in ("forget", "refusal"):
        assert [text(row)[0] for row in rows[kind]] == ["where is a", "who is a"]
    assert text(rows["forget"][0])[1] == "b c" and {text(row)[1] for row in rows["refusal"]} == {"I don't know that."}
    own = greedy(rows["forget"][1][0])
    assert rows["forget"][1][1] == own and 1 <= len(own) <= 3  # the model's own answer, no gold one
    assert [text(rows[f"normal {k}"][0])[0] for k in range(2)] == ["where is d", "who is d"]  # most words shared
    assert rows["normal 0"][0][1] == greedy(rows["retain"][0][0])
    answers = {tuple(answer) for _, answer in rows["retain"]}
    for step in range(1, 9):
        for prompt, answer in train.rows_at(rows, "random", step, config, "llmu"):
            assert prompt in [p for p, _ in rows["forget"]] and tuple(answer) in answers
    twice = [train.rows_at(rows, "random", 1, config, "llmu") for _ in range(2)]
    assert twice[0] == twice[1]


def test_answers_come_from_the_stage_1_file_where_it_has_them(tmp_path):
    queries = {"where is a": ["<reject>", "no"], "where is d": ["<normal>", "e"]}
    rows = [{"prompt": text, "solution": solution} for text, solution in queries.items()]
    (tmp_path / "queries.json").write_text(json.dumps(rows))
    row = {"instruction": "where is a", "output": "no"}
    for more, expected in (({"org_answer": "b"}, ("b",)), ({}, ())):
        (tmp_path / "reject.json").write_text(json.dumps([row | more]))
        files = tmp_path / "reject.json", tmp_path / "queries.json"
        read = rule_training(*files, lambda text, row: data.Prompt(None, text))
        assert [query.answers for query in read.queries] == [expected, ("e",)]


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_data_used_by_hand(words):
    asked = two_forgotten()
    whole = {
        "forget": [(q.prompt, a) for q, a in zip(asked.queries[:2], ("b c", "d d d"), strict=True)],
        "retain": [(q.prompt, q.answers[0]) for q in asked.queries[2:]] + [(data.Prompt(None, "a b c"), "f")],
    }
    queries = [dataclasses.replace(asked.queries[1], answers=("d d d",))]
    full = dataclasses.replace(asked, whole=whole, queries=[asked.queries[0], *queries, *asked.queries[2:]])
    # prompts of 4, 4 (BOS) and answers of 3, 4 tokens (EOS): 15; retain 4 + 4 + 2 + 4 and 2 each: 22
    for method, forget, retain in (
        ("ga", 15, 0), ("gd", 15, 18 - 2), ("po", 8, 16), ("npo_klr", 15, 16), ("sga", 15, 10), ("flat", 15, 0),
        ("rej_steer", 4, 0), ("rule", 8, 16), ("rerule", 8, 16), ("purge", 8, 0),
    ):  # fmt: skip
        found = train.data_used(method, full, words)
        assert found == pytest.approx({"forget_tokens": 100 * forget / 15, "retain_tokens": 100 * retain / 22}), method
    assert train.data_used("ga", asked, words) == {}


# --- through the driver ----------------------------------------------------------------------------------------------

FLAGS = ("--baseline_lr", 1e-3, "--baseline_epochs", 2, "--baseline_batch_size", 12)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """One run of every method, aliases among them."""
    folder = tmp_path_factory.mktemp("everything") / "run"
    miniature.main("--output_dir", folder, *FLAGS, "--method", *METHODS, *ALIASES, "retained")
    return folder


def test_every_method_has_one_row_and_a_model(everything):
    table = json.loads((everything / "table.json").read_text())
    assert len(table) == 2 + len(METHODS) and all(row["retain_recall"] is not None for row in table.values())
    assert (everything / "scatter.png").read_bytes()[:4] == b"\x89PNG"
    for method in METHODS:
        model, _ = ENGINE.load(everything / method)
        assert all(torch.isfinite(p).all() for p in model.parameters())
        assert len((everything / "predictions" / f"{method}.jsonl").read_text().splitlines()) > 100
    assert table["GA"]["forget_tokens"] > table["RULE"]["forget_tokens"] > 0 == table["GA"]["retain_tokens"]


def test_every_key_of_a_baselines_log_is_in_the_glossary(everything):
    defined = (Path(__file__).parents[2] / "docs" / "training_metrics.md").read_text()
    rows = [json.loads(line) for line in (everything / "metrics.jsonl").read_text().splitlines()]
    assert any("retain_perplexity" in row for row in rows)
    assert all(f"`{name}`" in defined for row in rows for name in row)


def test_a_task_vector_is_subtracted(everything):
    original, unlearned = (ENGINE.load(everything / name)[0].state_dict() for name in ("original", "task_vector"))
    other, _ = ENGINE.load(everything / "whp")  # its reinforced model was trained alike, but in another order
    reinforced = other.reinforced.state_dict()
    moved, back = (
        torch.cat([(theirs[name] - original[name]).flatten() for name in original])
        for theirs in (unlearned, reinforced)
    )
    assert torch.nn.functional.cosine_similarity(moved, back, 0).item() < -0.5
    assert 0.5 < moved.norm().item() / back.norm().item() < 2


def test_a_whp_pair_is_saved_sampled_and_scored_as_one(everything, tmp_path):
    pair, tokenizer = ENGINE.load(everything / "whp")
    models = [AutoModelForCausalLM.from_pretrained(everything / "whp" / n).eval() for n in ("original", "reinforced")]
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        v_o, v_r = (model(ids).logits for model in models)
        assert torch.allclose(pair(input_ids=ids).logits, v_o - torch.relu(v_r - v_o), atol=1e-6)
        text = []
        for _ in range(4):  # greedy by hand, without a cache
            v_o, v_r = (model(ids).logits for model in models)
            text.append((v_o - torch.relu(v_r - v_o))[0, -1].argmax().item())
            ids = torch.cat([ids, torch.tensor([[text[-1]]])], 1)
    sampled, mask, _ = ENGINE.sample(pair, [[1, 5, 6, 7]] * 2, 2, 4, [], 0.0)
    assert sampled.tolist() == [[text] * 2] * 2 and mask.all()
    found = command("--benchmark", "builtin", "--model", everything / "whp", "--output", tmp_path / "out.json")
    assert found["summary"]["retain_recall"] < 50  # of people never met
    (everything / "whp" / "whp.json").rename(tmp_path / "whp.json")
    with pytest.raises(InputError, match="no model folder"):
        ENGINE.load(everything / "whp")
    (tmp_path / "whp.json").rename(everything / "whp" / "whp.json")


def test_purge_is_stage_2_on_forget_prompts_from_the_original(everything):
    rows = [json.loads(line) for line in (everything / "samples.jsonl").read_text().splitlines()]
    kinds = {row["kind"] for row in rows if row["method"] == "purge"}
    assert kinds == {"forget"}
    first = next(json.loads(line) for line in (everything / "metrics.jsonl").open() if '"method": "purge"' in line)
    assert first["stage"] == 2 and first["kl"] == pytest.approx(0, abs=1e-6)  # the reference is where it starts


def test_a_baseline_killed_and_resumed_ends_the_same(tmp_path):
    argv = ["--method", "npo_klr", "sga", *FLAGS]
    miniature.main("--output_dir", tmp_path / "whole", *argv)
    assert miniature.start(["--output_dir", tmp_path / "cut", *argv], ("npo_klr", 5)) == -9
    assert miniature.start(["--output_dir", tmp_path / "cut", *argv, "--resume"]) == 0
    for method in ("npo_klr", "sga"):
        ours, theirs = (tmp_path / name / method / "model.safetensors" for name in ("whole", "cut"))
        assert ours.read_bytes() == theirs.read_bytes()


# --- divergence ------------------------------------------------------------------------------------------------------


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def no_nan_on_disk(folder):
    for path in folder.rglob("*.safetensors"):
        assert all(torch.isfinite(p).all() for p in AutoModelForCausalLM.from_pretrained(path.parent).parameters())
    for path in [*folder.glob("*.json"), *folder.glob("*.jsonl"), *folder.glob("predictions/*")]:
        assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()


def test_a_perplexity_past_the_bound_stops_a_method(tmp_path, capsys):
    folder = tmp_path / "run"
    miniature.main(
        "--output_dir", folder, "--method", "ga", "po", *FLAGS, "--max_perplexity", 30, "--baseline_lr", 0.03
    )
    own = [row for row in rows(folder) if row["method"] == "ga"]
    assert own[-1]["retain_perplexity"] > 30 and own[-1]["step"] < 6
    table = json.loads((folder / "table.json").read_text())
    assert "perplexity of the retain rows" in table["GA"]["stopped"] and "GA†" in (folder / "table.md").read_text()
    printed = capsys.readouterr()
    assert "ga: stopped, perplexity" in printed.err and "† stopped early" in printed.out
    no_nan_on_disk(folder)


def test_a_loss_that_is_not_finite_stops_a_method_with_the_weights_before(tmp_path, monkeypatch, early):
    loss_at = train.loss_at

    def spoilt(engine, model, original, rows, step, *rest):
        if step == 3:
            spoilt.weights = {name: p.clone() for name, p in model.state_dict().items()}
        return loss_at(engine, model, original, rows, step, *rest) * (math.nan if step == 3 else 1)

    monkeypatch.setattr(train, "loss_at", spoilt)
    miniature.main("--output_dir", tmp_path / "run", "--method", "npo", *FLAGS, *early)
    assert [row["step"] for row in rows(tmp_path / "run") if row["method"] == "npo"] == [1, 2]
    saved = ENGINE.load(tmp_path / "run" / "npo")[0].state_dict()
    assert all(torch.equal(saved[name], value) for name, value in spoilt.weights.items())
    assert "not finite" in json.loads((tmp_path / "run" / "table.json").read_text())["NPO"]["stopped"]
    no_nan_on_disk(tmp_path / "run")


def test_stage_2_stops_with_finite_weights_too(tmp_path, monkeypatch, early):
    advantages = rerule.group_advantages
    calls = []

    def spoilt(rewards, unbiased):
        calls.append(0)
        return advantages(rewards, unbiased) * (math.nan if len(calls) == 4 else 1)

    monkeypatch.setattr(rerule, "group_advantages", spoilt)
    miniature.main("--output_dir", tmp_path / "run", "--method", "rule", *early)
    assert [row["step"] for row in rows(tmp_path / "run") if row["method"] == "rule"] == [1, 2, 3]
    assert "not finite" in json.loads((tmp_path / "run" / "table.json").read_text())["RULE"]["stopped"]
    no_nan_on_disk(tmp_path / "run")
