"""MUSE's real size on a laptop: fewer rows by a stated draw, answers no longer than they are read, openings shared."""

import copy
from dataclasses import replace

import muse_books
import pytest
from made import probes_of, training_of

import benchmarks
import rerule
from benchmarks import tiny
from benchmarks.answers import greedy, limits_of
from data import encode_prompt
from engine import fast
from engine.files import read_lines
from engine.process import Engine
from engine.run import fit


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    return muse_books.write(tmp_path_factory.mktemp("muse"), raw=False)


@pytest.fixture(scope="module")
def config(book):
    return rerule.configure(["--benchmark", "muse", "--data_dir", str(book), "--seed", "1"])


def test_the_stand_in_has_the_counts_and_lengths_of_muse_books(book, tmp_path):
    read, probes = training_of("muse", book), probes_of("muse", book)
    asked = [row for row in read.queries if row.kind == "forget"]
    assert len(asked) == len(read.refusals) == len(read.queries) - len(asked) == 841 + 799
    assert [sum(p.split == split for p in probes) for split in benchmarks.ALL["muse"].columns] == [100, 100, 100]
    assert all(3290 < len(probe.answer) <= 3300 for probe in probes if probe.split == "verbmem")
    files = {path: path.read_bytes() for path in book.rglob("*.json")}
    again = muse_books.write(tmp_path, raw=False)
    assert {path: (again / path.relative_to(book)).read_bytes() for path in files} == files


def test_a_tiny_model_keeps_a_stated_sample_of_rows(config, book, capsys):
    read = training_of("muse", book)
    kept = tiny.sample_of(read, config)
    told = capsys.readouterr().err
    assert "100 of 1640 forget queries and 100 of 1640 boundary queries" in told and "--tiny_rows 0 keeps all" in told
    assert [sum(q.kind == kind for q in kept.queries) for kind in ("forget", "boundary")] == [100, 100]
    assert set(kept.queries) <= set(read.queries) and kept.queries == tiny.sample_of(read, config).queries
    assert kept.queries != tiny.sample_of(read, replace(config, seed=2)).queries
    assert {prompt for prompt, _ in kept.refusals} == {q.prompt for q in kept.queries if q.kind == "forget"}
    capsys.readouterr()
    assert tiny.sample_of(read, replace(config, tiny_rows=0)) is read and capsys.readouterr().err == ""
    apart = replace(read, refusals=[(replace(p, plain=p.plain + "x"), y) for p, y in read.refusals])
    assert len(tiny.sample_of(apart, config).refusals) == 100


def test_nothing_is_taught_further_than_it_is_read(config, book, tmp_path, monkeypatch):
    """VerbMem's continuations have a thousand tokens, of which evaluation reads 128."""
    rows = []
    monkeypatch.setattr(tiny, "fit", lambda run, phase, stage, model, given, **how: rows.extend(given) or (0.0, None))
    config = replace(config, output_dir=str(tmp_path / "run"), tiny_hidden=8, tiny_rows=5, tiny_vocabulary=400)
    run = rerule.Run(config, Engine("cpu"))
    run.open()
    read, probes = tiny.sample_of(training_of("muse", book), config), probes_of("muse", book)
    model, tokenizer = tiny.tiny_model(run, benchmarks.ALL["muse"], read, probes)
    assert len(tokenizer) == model.config.vocab_size == 400
    assert len(rows) == 310 and max(len(answer) for _, answer in rows) == 128
    assert sum(len(answer) == 128 for _, answer in rows) >= 100
    assert model.config.max_position_embeddings > max(len(tokenizer(p.answer).input_ids) for p in probes)


@pytest.fixture(scope="module")
def asked(book):
    """A small model, a tokenizer, KnowMem's and Utility's prompts, their limits."""
    probes = [probe for probe in probes_of("muse", book) if probe.split != "verbmem"][60:140]
    tokenizer = tiny.text_tokenizer([probe.prompt.plain for probe in probes], 400)
    prompts = [encode_prompt(tokenizer, probe.prompt) for probe in probes]
    model = tiny.tiny_llama(tokenizer, 0, 32, 2, 900).eval()
    return model, tokenizer, prompts, limits_of(benchmarks.ALL["muse"], probes, prompts)


def test_evaluation_computes_the_ten_examples_once_a_set(asked, monkeypatch):
    """The same answers from a seventh of the positions; the prompts are the official ones, examples and all."""
    model, tokenizer, prompts, limits = asked
    found, counts = [], []
    for least in (10**6, 64):
        seen = []
        hook = model.register_forward_pre_hook(
            lambda _, a, k, s=seen: s.append(k["input_ids"].numel()), with_kwargs=True
        )
        monkeypatch.setattr(fast, "OPENING", least)
        fast.CHOSEN[model] = {"sample": fast.packed_sample}
        found.append(greedy(Engine("cpu"), model, tokenizer, prompts, limits, False, 256, progress=False))
        counts.append(seen)
        hook.remove()
    assert found[0] == found[1] and all(text.count("Question: ") == 11 for text in map(tokenizer.decode, prompts))
    assert counts[0][0] == len(prompts) * max(map(len, prompts)) and counts[1][2:] == counts[0][1:]
    assert sum(counts[1][:2]) < counts[0][0] / 7


def test_lessons_compute_the_ten_examples_once_a_batch(asked, config, tmp_path):
    """A tiny model's; a given model's Stage 1 stays as it was. The losses are the same."""
    found = []
    for kind in ("tiny", "given"):
        model = copy.deepcopy(asked[0])
        run = rerule.Run(replace(config, model=kind, output_dir=str(tmp_path / kind)), Engine("cpu"))
        run.open()
        seen = []
        model.register_forward_pre_hook(lambda _, a, k, s=seen: s.append(k["input_ids"].numel()), with_kwargs=True)
        rows = [(prompt, prompt[-3:] + [2]) for prompt in asked[2]]
        fit(run, "original", 0, model, rows, steps=2, lr=1e-3, batch_size=32, warmup=0)
        run.metrics.size()
        found.append((sum(seen), [row["loss"] for row in read_lines(run.folder / "metrics.jsonl")]))
    (shared, losses), (whole, plain) = found
    assert shared < whole / 4 and losses == pytest.approx(plain, rel=1e-4)


def test_an_ordinary_run_writes_no_carriage_return(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    import miniature

    miniature.main("--output_dir", tmp_path / "run", "--method", "rule")
    out, err = capfd.readouterr()
    assert "\r" not in out + err
    lines = err.splitlines()
    for phase in ("original: 0 of ", "rej_steer: 6 of 6", "rule: 0 of 7", "rule: 7 of 7", "answers: "):
        assert any(line.startswith(phase) for line in lines), phase
    assert out.splitlines()[-1].startswith("Score a model: python evaluate.py --benchmark builtin")
