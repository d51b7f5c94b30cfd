"""TOFU: files, prompts and lengths; probability, truth ratio, model utility and forget quality, its published logs."""

import json
import math
import statistics
from collections import Counter

import pytest
from made import DATA, Scripted, byte_tokenizer, command, make_model, make_tofu, probes_of, row, train_tofu, training_of

import evaluate as ev
from benchmarks import metrics, tofu
from benchmarks.tofu import BENCHMARK
from data import encode_prompt
from engine.files import read_rows

LOGS = DATA / "tofu" / "logs"


def test_tofu(tmp_path):
    read = training_of("tofu", train_tofu(tmp_path), 0)
    forget = [q for q in read.queries if q.kind == "forget"]
    boundary = [q for q in read.queries if q.kind == "boundary"]
    assert [prompt.plain for prompt, _ in read.refusals] == [f"[INST] What did Orla {i} do? [/INST]" for i in range(4)]
    assert [q.prompt for q in forget] == [prompt for prompt, _ in read.refusals]
    assert len(boundary) == len({q.question for q in boundary}) == 4
    for query in boundary:  # rows 0 to 6 of Pim are asked in evaluation
        number = int(query.question.split()[3])
        assert number >= 7 and query.answers == (f"Pim {number} kept lamps",)
    assert training_of("tofu", tmp_path, 0) == read != training_of("tofu", tmp_path, 1)


def test_tofu_probes(tmp_path):
    make_tofu(tmp_path)
    probes = probes_of("tofu", tmp_path)
    sizes = {split: sum(p.split == split for p in probes) for split in [*tofu.LOG, metrics.UNSEEN]}
    assert sizes == {"retain": 7, "real_authors": 4, "world_facts": 5, "forget": 6, "forget_paraphrased": 6}
    forget = [p for p in probes if p.split == "forget"]
    unseen = [p for p in probes if p.split == metrics.UNSEEN]
    assert forget[2].prompt.plain == "[INST] What did Orla 2 do? [/INST]"
    assert unseen[2].question == "Say what Orla 2 did" and unseen[2].answer == forget[2].answer
    assert all(p.perturbed for p in forget) and not any(p.perturbed for p in unseen)


def test_tofu_writes_200_tokens_with_the_prompt(tmp_path):
    model, tokenizer = make_model(), byte_tokenizer()
    make_tofu(tmp_path)
    probes = probes_of("tofu", tmp_path)  # prompts of several lengths in one batch
    engine = Scripted(tokenizer, "x" * 300, eos=False)
    rows = ev.evaluate(engine, model, tokenizer, BENCHMARK, probes, progress=False)["per_example"]
    for probe, found in zip(probes, rows, strict=True):
        assert len(encode_prompt(tokenizer, probe.prompt)) + len(found["prediction"]) == 200
        assert found["truncated"]


def test_ratios_and_probabilities_by_hand():
    assert tofu.truth_ratio(math.log(2), [math.log(4), 0.0]) == pytest.approx(1.0)  # the mean is of losses
    assert tofu.truth_ratio(math.log(8), [math.log(2)] * 5) == pytest.approx(4.0)
    assert tofu.probability(math.log(2)) == pytest.approx(0.5)
    assert tofu.probability(math.log(2), [math.log(4), math.log(8), math.log(8)]) == pytest.approx(0.5)
    assert tofu.probability(math.inf, [math.inf]) == 0.0


def test_model_utility_and_forget_quality_by_hand():
    """One row a set with R = 1/2 (retain), 1/4 (authors), 2 (facts: clipped to 0.5 by a second row), 4 (forget)."""

    def losses(split, ratio):
        return tofu.losses(split, math.log(2), math.log(ratio), [0.0, 0.0])

    rows = [row("retain", 0.8) | losses("retain", 0.5), row("real_authors", 0.6) | losses("real_authors", 0.25)]
    rows += [row("world_facts", 1.0) | losses("world_facts", r) for r in (2.0, 0.5)]
    rows += [row("forget", 0.4) | losses("forget", r) for r in (4.0, 0.5)]
    rows += [row(metrics.UNSEEN, 1.0, True)]  # in no official figure, nor in the common ones
    summary, _, notes = metrics.summarise(BENCHMARK, rows)
    assert summary["retain_probability"] == pytest.approx(0.5)
    assert summary["real_authors_probability"] == pytest.approx(0.5 / 2.5)
    assert summary["world_facts_truth_ratio"] == pytest.approx((0 + 0.5) / 2)
    assert summary["forget_truth_ratio"] == pytest.approx((0.25 + 0.5) / 2)
    assert summary["forget_rouge_l"] == pytest.approx(0.4)
    assert summary["forget_recall"] == pytest.approx(40) and summary["forget_refusal"] == 0
    assert summary["forget_paraphrased_recall"] == summary["forget_paraphrased_refusal"] == 100
    assert summary["retain_recall"] == pytest.approx(100 * (0.8 + 0.6 + 1 + 1) / 4)  # over all sets to be retained
    nine = [0.5, 0.8, 0.5, 0.2, 0.6, 0.75, 0.2, 1.0, 0.25]
    assert summary["model_utility"] == pytest.approx(statistics.harmonic_mean(nine), abs=1e-12)
    assert summary["forget_quality"] is None and "--retain_log" in notes[0]
    summary, _, notes = metrics.summarise(BENCHMARK, rows, [0.1, 0.2])
    assert summary["forget_quality"] == pytest.approx(1 / 3)  # D = 1 with two rows a side: 2 of the 6 orders
    assert (summary["forget_quality_d"], summary["forget_quality_n"], summary["forget_quality_m"]) == (1.0, 2, 2)


@pytest.mark.parametrize(("k", "p"), [(10, 0.1650), (15, 0.0068), (16, 0.0030)])
def test_forget_quality_takes_the_papers_values_at_40_rows(k, p):
    found = tofu.forget_quality(list(range(40)), [i + k - 0.5 for i in range(40)])
    assert found["forget_quality_d"] == pytest.approx(k / 40)
    assert found["forget_quality"] == pytest.approx(p, abs=5e-5)
    assert f"D = {(k - 1) / 40:.4g} would give" in tofu.attainable(k / 40, 40, 40)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_model_gets_no_figure_silently(bad):
    rows = [row(s, 0.5) | tofu.losses(s, 1.0, 1.0, [1.0]) for s in tofu.SETS]
    rows += [row(s, 0.5) | tofu.losses(s, bad, bad, [bad]) for s in tofu.SETS]
    summary, _, notes = metrics.summarise(BENCHMARK, rows, [1.0, 1.0])
    assert summary["model_utility"] is None and summary["forget_quality"] is None and len(notes) == 2
    assert "NaN" not in json.dumps(metrics.finite(ev.finish(BENCHMARK, rows, [1.0, 1.0])))


@pytest.mark.skipif(not LOGS.is_dir(), reason="no published logs beside the checkout")
def test_official_tofu_figures(tmp_path):
    full, retain = LOGS / "llama2-7b_full.json", LOGS / "llama2-7b_retain99.json"
    out = command("--benchmark", "tofu", "--from_log", full, "--retain_log", retain, "--output", tmp_path / "a.json")
    assert out["summary"]["model_utility"] == pytest.approx(0.6226773637, abs=1e-9)
    assert out["summary"]["forget_rouge_l"] == pytest.approx(0.9854496939, abs=1e-9)
    assert out["summary"]["forget_quality"] == pytest.approx(2.3451772528e-06, rel=1e-9)
    assert out["summary"]["forget_refusal"] is None  # the log holds no answers
    out = command("--benchmark", "tofu", "--from_log", retain, "--retain_log", retain, "--output", tmp_path / "b.json")
    assert out["summary"]["model_utility"] == pytest.approx(0.6207444756, abs=1e-9)
    assert out["summary"]["forget_rouge_l"] == pytest.approx(0.3972374909, abs=1e-9)
    assert out["summary"]["forget_quality"] == 1.0


@pytest.mark.skipif(not (DATA / "tofu").is_dir(), reason="no real files beside the checkout")
def test_real_tofu_asks_nothing_that_evaluation_asks():
    for seed in (0, 1):
        read = training_of("tofu", DATA / "tofu", seed)
        assert len(read.refusals) == 40 and Counter(q.kind for q in read.queries) == {"forget": 40, "boundary": 40}
        evaluated = {probe.question for probe in probes_of("tofu", DATA / "tofu")}
        evaluated |= {row["question"] for row in read_rows(DATA / "tofu" / "retain_perturbed.json", {})}
        assert not evaluated & {q.question for q in read.queries if q.kind == "boundary"}


def test_real_files_where_present():
    if not DATA.is_dir():
        pytest.skip("no benchmark files beside the checkout")
    probes = probes_of("tofu", DATA / "tofu")
    assert [sum(p.split == s for p in probes) for s in tofu.SETS] == [300, 100, 117, 40]
    named = {p.target for p in probes if p.forget}
    assert named == {"Basil Mahfouz Al-Kuwaiti", "Nikolai Abilov"}
