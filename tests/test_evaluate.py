"""Evaluation against independent naive computations: greedy answers, losses, the command from model to table."""

import math
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from made import byte_tokenizer, command, make_model, make_muse, make_rwku, make_tofu, probes_of, write, write_lines
from scipy.stats import ks_2samp

import evaluate as ev
from benchmarks import ALL, metrics, tofu
from benchmarks.builtin import BENCHMARK, World
from config import InputError
from data import Prompt, encode_prompt
from engine.process import Engine

ROOT = Path(__file__).resolve().parents[1]
ENGINE = Engine("cpu")

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, another one and the files of all benchmarks."""
    folder = tmp_path_factory.mktemp("place")
    for name, seed in (("model", 0), ("other", 1)):
        make_model(seed).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    make_tofu(folder / "tofu")
    make_muse(folder / "muse")
    make_rwku(folder / "rwku" / "1_Ada_Pole")
    make_rwku(folder / "rwku" / "2_Bo_Quay", "Bo Quay")
    return folder


# --- losses ----------------------------------------------------------------------------------------------------------


def naive_loss(model, tokenizer, prompt, answer):
    """Mean negative log-likelihood of answer tokens and EOS, one row at a time, in float64."""
    start = len(tokenizer(prompt).input_ids)
    ids = tokenizer(prompt + answer).input_ids + [tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().numpy()
    total = 0.0
    for t in range(start, len(ids)):
        z = logits[t - 1]
        total += math.log(np.exp(z - z.max()).sum()) + z.max() - z[ids[t]]
    return total / (len(ids) - start)


def naive_figures(model, probes, split):
    """[(probability, truth ratio)] of a set's rows by the definitions in plain Python."""
    figures = []
    for probe in (p for p in probes if p.split == split):
        answers = (probe.answer, probe.paraphrased or probe.answer, *probe.perturbed)
        gold, other, *wrong = (naive_loss(model, byte_tokenizer(), probe.prompt.plain, a) for a in answers)
        options = [math.exp(-x) for x in (gold, *wrong)]
        chance = options[0] if "forget" in split or split == "retain" else options[0] / sum(options)
        figures.append((chance, math.exp(other - sum(wrong) / len(wrong))))
    return figures


def test_losses_agree_with_a_row_by_row_computation(place):
    model, tokenizer = make_model(), byte_tokenizer()
    pairs = [
        (probe.prompt, answer) for probe in probes_of("tofu", place / "tofu") for answer in probe.perturbed[:2]
    ] + [(Prompt(None, "[INST] ? [/INST]"), ""), (Prompt(None, "[INST] é 東 [/INST]"), "naïve 😀")]
    for batch_size in (1, 5, 64):
        losses = ev.answer_losses(model, tokenizer, pairs, batch_size, progress=False)
        naive = [naive_loss(model, tokenizer, prompt.plain, answer) for prompt, answer in pairs]
        assert np.abs(np.array(losses) - naive).max() < 1e-5


def test_the_loss_under_a_chat_template_has_no_space_and_no_second_bos():
    tokenizer, model = (
        byte_tokenizer(template="{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]"),
        make_model(),
    )
    (loss,) = ev.answer_losses(model, tokenizer, [(Prompt("Who?", "unused"), "Orla")], 1, progress=False)
    assert loss == pytest.approx(naive_loss(model, byte_tokenizer(), "[INST] Who? [/INST]", "Orla"), abs=1e-5)


# --- decoding --------------------------------------------------------------------------------------------------------


def predictions(model, tokenizer, probes, engine=ENGINE, **options):
    result = ev.evaluate(engine, model, tokenizer, BENCHMARK, probes, max_new_tokens=20, progress=False, **options)
    return [r["prediction"] for r in result["per_example"]]


def test_answers_depend_neither_on_the_batch_nor_on_the_order():
    model, tokenizer = make_model(), byte_tokenizer()
    probes = World(0).probes()[::37]
    one = predictions(model, tokenizer, probes, batch_size=1)
    assert len(set(one)) > len(one) // 2  # a model that always says the same would prove nothing
    assert predictions(model, tokenizer, probes, batch_size=3) == one
    assert predictions(model, tokenizer, probes, batch_size=64) == one
    assert predictions(model, tokenizer, probes[::-1], batch_size=7) == one[::-1]


def test_answers_are_those_of_generate():
    model, tokenizer = make_model(), byte_tokenizer()
    prompts = [encode_prompt(tokenizer, probe.prompt) for probe in World(0).probes()[::300]]
    answers = ev.greedy(ENGINE, model, tokenizer, prompts, [20] * len(prompts), False, 4, progress=False)
    for prompt, (text, _) in zip(prompts, answers, strict=True):
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :]
        assert text == tokenizer.decode(ids, skip_special_tokens=True)


def test_evaluation_leaves_modes_and_random_state_alone():
    model, tokenizer = make_model(), byte_tokenizer()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    predictions(model, tokenizer, World(0).probes()[:3])
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_running_out_of_memory_halves_the_batch_and_goes_on():
    model, tokenizer = make_model(), byte_tokenizer()
    probes, sizes = World(0).probes()[::100], []
    expected = predictions(model, tokenizer, probes, batch_size=1)

    class Small(Engine):
        room = 3

        def sample(self, found, prompts, *rest):
            sizes.append(len(prompts))
            if len(prompts) > self.room:
                raise torch.OutOfMemoryError
            return super().sample(found, prompts, *rest)

    small = Small("cpu")
    assert predictions(model, tokenizer, probes, small, batch_size=8) == expected
    assert sizes[:3] == [8, 4, 2] and max(sizes[2:]) == 2
    small.room = 0
    with pytest.raises(InputError, match="out of memory"):
        predictions(model, tokenizer, probes, small)


def test_batched_answers_are_checked_outside_float32():
    model, tokenizer = make_model().to(torch.bfloat16), byte_tokenizer()
    probes = World(0).probes()[::100]
    result = ev.evaluate(ENGINE, model, tokenizer, BENCHMARK, probes, batch_size=8, progress=False, check_batching=True)
    assert "rows decoded alone differ" in result["notes"][0]
    assert ev.evaluate(ENGINE, model, tokenizer, BENCHMARK, probes[:1], progress=False)["notes"] == []


# --- the command -----------------------------------------------------------------------------------------------------


def test_tofu_from_model_to_log_to_table(place, tmp_path, capsys):
    flags = ("--benchmark", "tofu", "--data_dir", place / "tofu", "--device", "cpu")
    first = command(*flags, "--model", place / "model", "--retain_model", place / "other", "--output", tmp_path / "a")
    other = command(*flags, "--model", place / "other", "--output", tmp_path / "b")
    probes = probes_of("tofu", place / "tofu")
    ratios = [[r for _, r in naive_figures(make_model(seed), probes, "forget")] for seed in (0, 1)]
    nine = []
    for split in tofu.UTILITY_SETS:
        figures = naive_figures(make_model(0), probes, split)
        nine += [statistics.mean(p for p, _ in figures), statistics.mean(max(0, 1 - r) for _, r in figures), 0.5]
    rows = [row | {"rouge_l_recall": 0.5} for row in first["per_example"]]  # a random model's own recall is mostly 0
    summary, _, _ = metrics.summarise(tofu.BENCHMARK, rows)
    assert summary["model_utility"] == pytest.approx(statistics.harmonic_mean(nine), abs=1e-6) and min(nine) > 0
    assert first["summary"]["forget_quality"] == pytest.approx(ks_2samp(*ratios).pvalue, abs=1e-6)
    assert other["summary"]["forget_quality"] is None
    output = capsys.readouterr().out
    assert "Model utility ↑" in output and "Over-refusal ↓" in output and "–" in output and "--retain_log" in output

    again = command(
        "--benchmark", "tofu", "--from_log", tmp_path / "a", "--retain_log", tmp_path / "b", "--output", tmp_path / "c"
    )  # fmt: skip
    assert again["summary"] == first["summary"] and again["per_example"] == first["per_example"]
    lines = tmp_path / "rows.jsonl"
    write_lines(lines, first["per_example"])
    assert command("--benchmark", "tofu", "--from_log", lines, "--retain_log", lines, "--output", tmp_path / "d")[
        "summary"
    ] == first["summary"] | {"forget_quality": 1.0, "forget_quality_d": 0.0}
    found = first["per_example"][0]
    assert found["prompt"] == "<s>[INST] What did Pim 0 do? [/INST]" and found["answer"] == "Pim 0 kept 0 lamps"
    assert first["summary"]["forget_paraphrased_recall"] is not None


def test_rwku_and_muse_commands_equal_the_function(place, tmp_path, capsys):
    model, tokenizer = make_model(), byte_tokenizer()
    for benchmark in ("rwku", "muse"):
        out = command(
            "--benchmark", benchmark, "--data_dir", place / benchmark, "--model", place / "model", "--batch_size", 5,
            "--device", "cpu", "--output", tmp_path / "a",
        )  # fmt: skip
        probes = probes_of(benchmark, place / benchmark)
        assert out == ev.evaluate(ENGINE, model, tokenizer, ALL[benchmark], probes, progress=False)
        again = command("--benchmark", benchmark, "--from_log", tmp_path / "a", "--output", tmp_path / "b")
        assert again["summary"] == out["summary"]
    output = capsys.readouterr().out
    assert "Bo Quay" in output and "mean" in output and "Forget FB ↓" in output and "KnowMem ↓" in output


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_are_told_in_one_line(place, tmp_path):
    make_tofu(tmp_path / "missing")
    (tmp_path / "missing" / "world_facts_perturbed.json").unlink()
    make_tofu(tmp_path / "field")
    write_lines(tmp_path / "field" / "world_facts_perturbed.json", [{"question": "?", "answer": "!"}])
    make_tofu(tmp_path / "short", forget_rows=4)
    short = tmp_path / "short.json"
    base = ("--device", "cpu", "--model", place / "model")
    command("--benchmark", "tofu", "--data_dir", tmp_path / "short", *base, "--output", short)
    make_model(vocab=300).save_pretrained(tmp_path / "wider")
    byte_tokenizer().save_pretrained(tmp_path / "wider")
    make_model(vocab=200).save_pretrained(tmp_path / "narrower")
    byte_tokenizer().save_pretrained(tmp_path / "narrower")
    write(tmp_path / "half.json", {"eval_log_forget.json": {"avg_gt_loss": {"0": 1.0}}})
    write(tmp_path / "words.json", {"eval_log_forget.json": {
        "avg_gt_loss": {"0": "x"}, "avg_paraphrased_loss": {"0": 1}, "average_perturb_loss": {"0": [1]},
        "rougeL_recall": {"0": 1}}})  # fmt: skip
    write(tmp_path / "nothing.json", {"a": 1})
    good = ("--benchmark", "tofu", "--data_dir", place / "tofu", *base)
    cases = [
        (("--benchmark", "tofo", *good[2:]), "--benchmark tofo: expected one of builtin, rwku, muse, tofu"),
        (("--benchmark", "tofu", "--data_dir", tmp_path / "nowhere", *base), "nowhere: no such folder"),
        (("--benchmark", "tofu", *base), "needs --data_dir"),
        (("--benchmark", "rwku", "--data_dir", place / "tofu", *base), "forget_level1.json"),
        (("--benchmark", "muse", "--data_dir", place / "tofu", *base), "verbmem"),
        (
            ("--benchmark", "tofu", "--data_dir", tmp_path / "missing", *base),
            "world_facts_perturbed.json: no such file",
        ),
        (("--benchmark", "tofu", "--data_dir", tmp_path / "field", *base), "row 1 has no field 'perturbed_answer'"),
        ((*good, "--retain_log", short), "holds 4 forget rows, the evaluated model has 6"),
        ((*good, "--retain_log", tmp_path / "half.json"), "'avg_paraphrased_loss'"),
        ((*good, "--retain_log", tmp_path / "words.json"), "not a number"),
        ((*good, "--retain_log", tmp_path / "nothing.json"), "is no result of this command"),
        ((*good, "--retain_log", short, "--retain_model", place / "other"), "one of --retain_model and --retain_log"),
        ((*good, "--from_log", short), "one of --model and --from_log"),
        ((*good, "--batch_size", 0), "--batch_size 0"),
        ((*good, "--max_new_tokens", 2000), "context of 1024"),
        ((*good, "--judge_url", "http://localhost:1"), "go together"),
        ((*good, "--retain_model", tmp_path / "nowhere"), "--retain_model"),
        ((*good[:4], "--model", tmp_path / "wider", "--device", "cpu"), "do not belong together"),
        ((*good[:4], "--model", tmp_path / "narrower", "--device", "cpu"), "do not belong together"),
        ((*good[:4], "--model", tmp_path / "nowhere"), "is no model folder"),
        (("--benchmark", "rwku", "--from_log", short), "holds results of tofu, expected rwku"),
        (("--benchmark", "rwku", "--from_log", short, "--retain_log", short), "only --benchmark tofu"),
        (("--benchmark", "tofu", "--from_log", tmp_path / "half.json"), "has no set 'eval_log.json'"),
        ((*good, "--nonsense", 1), "nonsense"),
    ]
    for flags, message in cases:
        with pytest.raises(InputError) as told:
            command(*flags, "--output", tmp_path / "out.json")
        assert message in str(told.value) and "\n" not in str(told.value), flags
    with pytest.raises(InputError, match="--output"):
        command(*good, "--output", tmp_path / "no" / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_a_mistake_exits_with_code_2_and_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "evaluate.py", "--benchmark", "rwku", "--model", "x",
         "--data_dir", tmp_path / "nowhere", "--output", tmp_path / "o.json"], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr and "nowhere: no such folder" in done.stderr
    assert not (tmp_path / "o.json").exists()
