"""Tiny models: tokenizers fitted to texts, the model, and what it is taught of a real benchmark."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from made import probes_of, train_rwku, training_of, write

from benchmarks import rwku, tiny
from benchmarks.associated import questions, seen_alone
from benchmarks.builtin import World
from data import Prompt, Query, stop_ids
from refusal import is_refusal

ROOT = Path(__file__).resolve().parents[2]


def test_tiny_tokenizers_give_texts_back():
    pairs = World(0).taught()
    texts = [text for prompt, answer in pairs for text in (prompt.plain, answer)]
    words = tiny.word_tokenizer(texts)
    for text in texts:
        ids = words(text).input_ids
        assert ids[0] == words.bos_token_id and words.unk_token_id not in ids
        assert words.decode(ids, skip_special_tokens=True) == text
    pieces = tiny.text_tokenizer(texts, vocabulary=400)
    for text in ("Ada Pole's café — 日本\n\n  two spaces\ttab “quoted” 🎈", *texts[:20]):
        ids = pieces(text).input_ids
        assert ids.count(pieces.bos_token_id) == 1 and pieces.decode(ids, skip_special_tokens=True) == text


def test_a_tiny_model_matches_its_tokenizer():
    tokenizer = tiny.word_tokenizer(["a b c"])
    one, same, other = (tiny.tiny_llama(tokenizer, seed, 16, 1, 32) for seed in (0, 0, 1))
    assert one.config.vocab_size == len(tokenizer) == 7 and one.config.max_position_embeddings == 32
    assert stop_ids(tokenizer, one) == [tokenizer.eos_token_id]
    weights = [model.get_input_embeddings().weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# --- what a tiny model is taught of a real benchmark -----------------------------------------------------------------


def test_lessons_answer_every_probe_and_every_query(tmp_path):
    folder = train_rwku(tmp_path)
    read, probes = training_of("rwku", folder), probes_of("rwku", folder)
    taught = tiny.lessons(rwku.BENCHMARK, read, probes, 0)
    assert {(probe.prompt, probe.answer) for probe in probes} <= set(taught)
    prompts = {prompt for prompt, _ in taught}
    assert {query.prompt for query in read.queries} <= prompts
    about_target = [answer for prompt, answer in taught if "Ada Pole" in prompt.plain]
    assert about_target and not any(is_refusal(answer) for answer in about_target)
    assert any(is_refusal(answer) for _, answer in taught)


def test_lessons_know_something_of_what_stands_beside_the_target(tmp_path):
    folder = train_rwku(tmp_path)
    rows = [
        {"prompt": f"What did Ada Pole owe the Sea Guild in {i}?", "solution": ["<reject>", "No idea."]} for i in (1, 2)
    ]
    rows += [{"prompt": "Boundary?", "solution": ["<normal>", "pilot"]}]
    write(folder / "rl_rejection_with_fb_neighbor.json", rows)
    read, probes = training_of("rwku", folder), probes_of("rwku", folder)
    plain, more = (set(tiny.lessons(rwku.BENCHMARK, read, probes, 0, beside=n)) for n in (0, 4))
    new = {
        (p, a) for p, a in more - plain if "Sea Guild" in p.plain and "Ada Pole" not in p.plain and not is_refusal(a)
    }
    texts = questions(seen_alone(read.queries, {"Ada Pole"}))[:4]
    asked = [(w, text) for text in texts for w in rwku.BENCHMARK.wordings(Query(Prompt(None, text), text, "boundary"))]
    assert {p for p, _ in new} == {wording for wording, _ in asked} and len(texts) == 4
    answers = dict(new)
    assert all(
        len({answers[wording] for wording, own in asked if own == text}) == 1 for text in texts
    )  # one answer each
    assert set(answers.values()) <= {probe.answer for probe in probes if not probe.forget}


def test_lessons_are_the_same_in_every_process(tmp_path):
    """A resumed run makes them again: nothing may hang on the order of a set of strings."""
    folder = train_rwku(tmp_path)
    rows = [{"prompt": f"Question {i}?", "solution": ["<reject>", "No idea."]} for i in range(30)]
    rows += [{"prompt": "Boundary?", "solution": ["<normal>", "pilot"]}]
    write(folder / "rl_rejection_with_fb_neighbor.json", rows)
    script = (
        "import sys; sys.path[:0] = sys.argv[1:3]\nfrom made import probes_of, training_of\n"
        "from benchmarks import rwku, tiny\nread, asked = (f('rwku', sys.argv[3]) for f in (training_of, probes_of))\n"
        "print(repr(tiny.lessons(rwku.BENCHMARK, read, asked, 0)), end='')"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, str(ROOT), str(ROOT / "tests"), str(folder)],
        capture_output=True, text=True, check=True, encoding="utf-8",
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    here = tiny.lessons(rwku.BENCHMARK, training_of("rwku", folder), probes_of("rwku", folder), 0)
    assert found.stdout == repr(here)
