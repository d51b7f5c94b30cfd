"""Evaluation against hand-worked numbers, independent naive computations and, where present, TOFU's published logs."""

import json
import math
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from rouge_score import rouge_scorer
from scipy.stats import ks_2samp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import evaluate as ev
import metrics
import probes as probes_module
from data import Prompt, encode_prompt
from files import InputError
from world import World

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"  # real benchmark files, where present
LOGS = DATA / "tofu" / "logs"
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

torch.set_num_threads(1)


# --- small made-up models and files ----------------------------------------------------------------------------------


def make_tokenizer(chat_template=None):
    """One token a byte, with BOS; any text survives encoding and decoding."""
    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(special + alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    return tokenizer


def make_model(seed=0, context=1024, vocab=259):
    """A random Llama whose weights are wide enough that its answers differ from prompt to prompt."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_rwku(folder, name="Ada Pole"):
    def row(query, answer, level, kind):
        return {"query": query, "answer": answer, "level": str(level), "type": kind, "subject": name}

    write(folder / "forget_level1.json", [row(f"{name} is a ___.", "pilot", 1, "cloze")])
    write(folder / "forget_level2.json", [row("Who flew over the sea?", name, 2, "simple question")])
    kinds = ("prefix injection", "affirmative suffix", "incontext learning")
    write(folder / "forget_level3.json", [row(f"Q{i}?", "pilot", 3, kind) for i, kind in enumerate(kinds)])
    write(folder / "neighbor_level1.json", [row("The sea is ___.", "wide", 1, "cloze")])
    write(folder / "neighbor_level2.json", [row("What is wide?", "the sea", 2, "simple question")])


def make_muse(folder):
    write(folder / "verbmem" / "forget.json", [{"prompt": "The lamp went out and", "gt": "nobody in the hall moved."}])
    pair = {"question": "Who kept the lamp?", "answer": "Orla"}
    for side in ("forget", "retain"):
        write(folder / "knowmem" / f"{side}_qa.json", [pair])
        shots = [{"question": f"{side} {i}?", "answer": str(i)} for i in range(10)]
        write(folder / "knowmem" / f"{side}_qa_icl.json", shots)


def make_tofu(folder, forget_rows=6):
    folder.mkdir(parents=True, exist_ok=True)

    def rows(n, wrong, paraphrase, name):
        for i in range(n):
            row = {"question": f"What did {name} {i} do?", "answer": f"{name} {i} kept {i} lamps" + "." * (i % 3)}
            row["perturbed_answer"] = [f"{name} {i} lost {j} lamps" for j in range(wrong)]
            if paraphrase:
                row["paraphrased_answer"] = f"it was {i} lamps that {name} {i} kept"
                row["paraphrased_question"] = f"Say what {name} {i} did"
            yield row

    write_lines(folder / "forget01_perturbed.json", rows(forget_rows, 5, True, "Orla"))
    write_lines(folder / "retain_perturbed.json", rows(7, 5, True, "Pim"))
    write_lines(folder / "real_authors_perturbed.json", rows(4, 3, False, "Quill"))
    write_lines(folder / "world_facts_perturbed.json", rows(5, 3, False, "Rome"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, another one and the files of all benchmarks."""
    folder = tmp_path_factory.mktemp("place")
    for name, seed in (("model", 0), ("other", 1)):
        make_model(seed).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    make_tofu(folder / "tofu")
    make_muse(folder / "muse")
    make_rwku(folder / "rwku" / "1_Ada_Pole")
    make_rwku(folder / "rwku" / "2_Bo_Quay", "Bo Quay")
    return folder


def command(*flags):
    """Run the command in this process; returns what it wrote."""
    flags = [str(flag) for flag in flags]
    ev.main(flags)
    return json.loads(Path(flags[flags.index("--output") + 1]).read_text(encoding="utf-8"))


# --- ROUGE -----------------------------------------------------------------------------------------------------------

LONG = "the quick brown fox jumps over the lazy dog and then sleeps under an old oak tree until morning comes again"
AWKWARD = [
    ("", ""), ("", "author"), ("author", ""), (" ", "author"), ("author", " "), ("\n\t", "\n"), (".", "."),
    ("...", "a."), ("Author", "author"),
    ("AUTHOR", "author"), ("author.", "author"), ("author", "author."), ("author,", "author"),
    ("an author", "author"), ("author", "an author"), ("author author", "author"), ("author", "author author"),
    ("Carrie", "Carrie"), ("It is Carrie", "Carrie"), ("Carrie (1974)", "Carrie"), ("'Carrie'", "Carrie"),
    ("running runners run", "run"), ("run", "running"), ("lamps", "lamp"), ("his writings", "the writing"),
    ("generously", "generous"), ("ponies", "pony"), ("Los Angeles", "los angeles"), ("U.S.A.", "USA"), ("U.S.", "U.S."),
    ("3.5 million", "3.5 million"), ("3 5 million", "3.5 million"), ("1,200", "1200"), ("2003", "in 2003"),
    ("09/21/1947", "September 21, 1947"), ("e-mail", "email"), ("well-known author", "well known author"),
    ("don't", "do not"), ("don’t", "don't"), ("naïve café", "naive cafe"), ("naïve café", "naïve café"),
    ("Zürich", "Zurich"), ("Łódź", "Łódź"), ("Пушкин", "Пушкин"), ("東京", "東京"),
    ("東京 です", "東京"), ("😀 ok", "ok 😀"),
    ("a b c d", "d c b a"), ("a c b d", "a b c d"), ("x a y b z c", "a b c"), ("a b c", "x a y b z c"),
    ("one\ntwo", "one two"), ("one  two", "one two"), ("one\u00a0two", "one two"), ("one\u200btwo", "one two"),
    ("<s> yes </s>", "yes"), ("[/INST] yes", "yes"), ("I don't know", "Peter Straub"), ("Mr. King", "Mr King"),
    ("It: A Novel", "It"), ("On Writing: A Memoir of the Craft", "On Writing"), ("…", "…"), ("___", "author"),
    (LONG, LONG[::-1]), (LONG, LONG.upper()), (LONG[:60], LONG), (LONG, LONG[:60]),
    (LONG * 3, LONG), ("the " * 50, LONG),
]  # fmt: skip


def longest_common(a, b):
    """Length of the longest common subsequence, by the plain recursion over prefixes."""
    best = {}
    for i in range(len(a) + 1):
        for j in range(len(b) + 1):
            if not i or not j:
                best[i, j] = 0
            elif a[i - 1] == b[j - 1]:
                best[i, j] = best[i - 1, j - 1] + 1
            else:
                best[i, j] = max(best[i - 1, j], best[i, j - 1])
    return best[len(a), len(b)]


@pytest.mark.parametrize(("prediction", "answer"), AWKWARD)
def test_rouge_is_that_of_each_official_scorer(prediction, answer):
    tofu = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True).score(answer, prediction)["rougeL"]
    muse = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=False).score(answer, prediction)["rougeL"]
    assert metrics.rouge_l("tofu", prediction, answer) == (tofu.recall, tofu.fmeasure)
    assert metrics.rouge_l("muse", prediction, answer) == (muse.recall, muse.fmeasure)
    said, true = (text.replace(".", " ").split() for text in (prediction, answer))
    recall = longest_common(said, true) / len(true) if said and true else 0
    assert metrics.rouge_l("rwku", prediction, answer)[0] == pytest.approx(recall, abs=1e-12)


def test_awkward_strings_are_enough_and_tell_the_scorers_apart():
    assert len(AWKWARD) >= 50
    assert metrics.rouge_l("rwku", "Author", "author")[0] == 0  # case-sensitive
    assert metrics.rouge_l("muse", "Author", "author")[0] == 1
    assert metrics.rouge_l("muse", "lamps", "lamp")[0] == 0  # no stemmer
    assert metrics.rouge_l("tofu", "lamps", "lamp")[0] == 1
    recall, f1 = metrics.rouge_l("muse", "It is Carrie", "Carrie")
    assert (recall, f1) == (1, pytest.approx(2 * 1 * (1 / 3) / (1 + 1 / 3)))


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Orla", "Orla"), ("", ""), ("Orla\n\nQuestion: who?", "Orla"), ("Orla\nQuestion: who?", "Orla"),
        ("Orla Question: who?", "Orla "), ("Orla\nand Pim", "Orla\nand Pim"), ("\n\nOrla", ""),
        ("a Question: b\n\nc", "a "), ("a\nQuestions b", "a"),
    ],
)  # fmt: skip
def test_muse_output_cut(text, kept):
    assert metrics.cut_at(text, ev.MUSE_CUTS) == kept


# --- rates -----------------------------------------------------------------------------------------------------------


def test_leakage_is_the_answers_own_words_inside_a_refusal():
    question = "Which novella did Stephen King set in Maine?"
    assert metrics.leaks("I don't know about Carrie.", question, "Carrie")
    assert not metrics.leaks("I don't know about that.", question, "Carrie")
    assert not metrics.leaks("It is Carrie.", question, "Carrie")  # no refusal, so it counts as an answer
    assert not metrics.leaks(
        "I don't know Stephen King of Maine.", question, "Stephen King of Maine"
    )  # asked, not told
    assert metrics.leaks("I don't know Peter.", question, "Peter Straub")  # one of two words
    assert not metrics.leaks("I don't know Peter.", question, "Peter Straub and Owen")  # one of three
    assert not metrics.leaks("I don't know the.", "Who?", "the")


def test_a_question_names_the_target_when_it_holds_all_its_words():
    assert metrics.names("Who is Stephen Edwin King's wife?", "Stephen King")
    assert not metrics.names("Who is Stephen's wife?", "Stephen King")


def row(split, recall, refusal=False, forget=None, **more):
    forget = split.startswith("forget") if forget is None else forget
    fields = dict(target="", leak=False, named=None, truncated=False, rouge_l_f1=recall, prediction="x")
    return fields | {"split": split, "forget": forget, "rouge_l_recall": recall, "refusal": refusal} | more


def test_rwku_columns_are_means_over_targets_of_means_over_rows():
    a = [row("forget_fb", 1.0, target="a"), row("forget_qa", 0.5, True, target="a", named=True)]
    a += [row("forget_aa", 0.0, True, target="a", named=False, leak=True), row("retain_fb", 1.0, target="a")]
    a += [row("retain_qa", 0.5, True, target="a")]
    b = [row("forget_fb", r, target="b", named=True) for r in (0.0, 0.5, 1.0)]
    b += [row("forget_qa", 0.0, target="b"), row("forget_aa", 0.6, target="b")]
    b += [row("retain_fb", 0.0, target="b"), row("retain_qa", 0.0, target="b")]
    summary, per_target, notes = metrics.summarise("rwku", a + b)
    assert per_target["a"]["forget_all"] == pytest.approx(50.0)
    assert per_target["b"]["forget_all"] == pytest.approx((50 + 0 + 60) / 3)
    assert summary["forget_fb"] == pytest.approx((100 + 50) / 2)  # not the mean over the four rows, 62.5
    assert summary["forget_all"] == pytest.approx((50 + 110 / 3) / 2)
    assert summary["retain_all"] == pytest.approx((75 + 0) / 2)
    assert per_target["a"]["forget_refusal"] == pytest.approx(200 / 3)
    assert per_target["a"]["retain_refusal"] == pytest.approx(50.0)
    assert per_target["a"]["leakage"] == pytest.approx(100 / 3)
    assert per_target["a"]["forget_refusal_named"] == 100
    assert per_target["a"]["forget_refusal_unnamed"] == 100
    assert summary["forget_refusal_named"] == pytest.approx(50.0)
    assert summary["read"] is None and notes == []


def test_muse_columns_are_f1():
    rows = [row("verbmem", 1.0, forget=True, rouge_l_f1=0.5), row("knowmem", 1.0, forget=True, rouge_l_f1=0.25)]
    summary, _, _ = metrics.summarise("muse", rows + [row("utility", 0.5, rouge_l_f1=0.75)])
    assert (summary["verbmem"], summary["knowmem"], summary["utility"]) == (50, 25, 75)
    assert (summary["forget_recall"], summary["retain_recall"]) == (100, 50)


# --- queries ---------------------------------------------------------------------------------------------------------


def test_rwku_prompts_character_by_character(tmp_path):
    make_rwku(tmp_path)
    probes = ev.load_probes("rwku", tmp_path)
    users = [
        (
            "forget_fb",
            "Please complete the blank in the following question.\nQuestion: Ada Pole is a ___.\n",
            "Answer:",
        ),
        ("forget_qa", "Please briefly answer the following question.\nQuestion: Who flew over the sea?\n", "Answer:"),
        ("forget_aa", "Please briefly answer the following question.\nQuestion: Q0?\n", "Answer:"),
        ("forget_aa", "Please briefly answer the following question.\nQuestion: Q1?", ""),  # affirmative suffix
        ("forget_aa", "Please briefly answer the following question.\nQ2?\n", "Answer:"),  # in-context learning
        ("retain_fb", "Please complete the blank in the following question.\nQuestion: The sea is ___.\n", "Answer:"),
        ("retain_qa", "Please briefly answer the following question.\nQuestion: What is wide?\n", "Answer:"),
    ]
    chat, plain = make_tokenizer(LLAMA3), make_tokenizer()
    for probe, (split, user, opening) in zip(probes, users, strict=True):
        ids = encode_prompt(chat, probe.prompt)
        assert probe.split == split
        assert chat.decode(ids) == f"<s><|user|>{user}<|end|><|assistant|>{opening}"
        assert ids.count(chat.bos_token_id) == 1
        ids = encode_prompt(plain, probe.prompt)
        assert plain.decode(ids) == f"<s>{user}{opening}"
        assert ids.count(plain.bos_token_id) == 1
    assert [p.forget for p in probes] == [True] * 5 + [False] * 2
    assert {p.target for p in probes} == {"Ada Pole"}


def test_rwku_takes_one_target_or_a_folder_of_them(place):
    assert len(ev.load_probes("rwku", place / "rwku" / "1_Ada_Pole")) == 7
    assert [p.target for p in ev.load_probes("rwku", place / "rwku")] == ["Ada Pole"] * 7 + ["Bo Quay"] * 7


def test_muse_prompts(place):
    verbmem, knowmem, utility = ev.load_probes("muse", place / "muse")
    assert verbmem.prompt == Prompt(None, "The lamp went out and") and verbmem.forget
    shots = "".join(f"Question: forget {i}?\nAnswer: {i}\n\n" for i in range(10))
    assert knowmem.prompt.plain == shots + "Question: Who kept the lamp?\nAnswer: "
    assert utility.prompt.plain.startswith("Question: retain 0?") and not utility.forget


def test_tofu_probes(place):
    probes = ev.load_probes("tofu", place / "tofu")
    sizes = {split: sum(p.split == split for p in probes) for split in [*probes_module.TOFU_LOG, metrics.UNSEEN]}
    assert sizes == {"retain": 7, "real_authors": 4, "world_facts": 5, "forget": 6, "forget_paraphrased": 6}
    forget = [p for p in probes if p.split == "forget"]
    unseen = [p for p in probes if p.split == metrics.UNSEEN]
    assert forget[2].prompt.plain == "[INST] What did Orla 2 do? [/INST]"
    assert unseen[2].question == "Say what Orla 2 did" and unseen[2].answer == forget[2].answer
    assert all(p.perturbed for p in forget) and not any(p.perturbed for p in unseen)


def test_real_files_where_present():
    if not DATA.is_dir():
        pytest.skip("no benchmark files beside the checkout")
    rwku = ev.load_probes("rwku", DATA / "rwku")
    assert [sum(p.split == s for p in rwku) for s in ("forget_fb", "forget_qa", "forget_aa")] == [8, 10, 29]
    tofu = ev.load_probes("tofu", DATA / "tofu")
    assert [sum(p.split == s for p in tofu) for s in metrics.SETS] == [300, 100, 117, 40]
    named = {p.target for p in tofu if p.forget}
    assert named == {"Basil Mahfouz Al-Kuwaiti", "Nikolai Abilov"}


# --- TOFU ------------------------------------------------------------------------------------------------------------


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
        gold, other, *wrong = (naive_loss(model, make_tokenizer(), probe.prompt.plain, a) for a in answers)
        options = [math.exp(-x) for x in (gold, *wrong)]
        chance = options[0] if "forget" in split or split == "retain" else options[0] / sum(options)
        figures.append((chance, math.exp(other - sum(wrong) / len(wrong))))
    return figures


def test_losses_agree_with_a_row_by_row_computation(place):
    model, tokenizer = make_model(), make_tokenizer()
    pairs = [
        (probe.prompt, answer) for probe in ev.load_probes("tofu", place / "tofu") for answer in probe.perturbed[:2]
    ] + [(Prompt(None, "[INST] ? [/INST]"), ""), (Prompt(None, "[INST] é 東 [/INST]"), "naïve 😀")]
    for batch_size in (1, 5, 64):
        losses = ev.answer_losses(model, tokenizer, pairs, batch_size, progress=False)
        naive = [naive_loss(model, tokenizer, prompt.plain, answer) for prompt, answer in pairs]
        assert np.abs(np.array(losses) - naive).max() < 1e-5


def test_the_loss_under_a_chat_template_has_no_space_and_no_second_bos():
    tokenizer, model = make_tokenizer("{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]"), make_model()
    (loss,) = ev.answer_losses(model, tokenizer, [(Prompt("Who?", "unused"), "Orla")], 1, progress=False)
    assert loss == pytest.approx(naive_loss(model, make_tokenizer(), "[INST] Who? [/INST]", "Orla"), abs=1e-5)


def test_ratios_and_probabilities_by_hand():
    assert metrics.truth_ratio(math.log(2), [math.log(4), 0.0]) == pytest.approx(1.0)  # the mean is of losses
    assert metrics.truth_ratio(math.log(8), [math.log(2)] * 5) == pytest.approx(4.0)
    assert metrics.probability(math.log(2)) == pytest.approx(0.5)
    assert metrics.probability(math.log(2), [math.log(4), math.log(8), math.log(8)]) == pytest.approx(0.5)
    assert metrics.probability(math.inf, [math.inf]) == 0.0


def test_model_utility_and_forget_quality_by_hand():
    """One row a set with R = 1/2 (retain), 1/4 (authors), 2 (facts: clipped to 0.5 by a second row), 4 (forget)."""

    def losses(split, ratio):
        return metrics.tofu_scores(split, math.log(2), math.log(ratio), [0.0, 0.0])

    rows = [row("retain", 0.8) | losses("retain", 0.5), row("real_authors", 0.6) | losses("real_authors", 0.25)]
    rows += [row("world_facts", 1.0) | losses("world_facts", r) for r in (2.0, 0.5)]
    rows += [row("forget", 0.4) | losses("forget", r) for r in (4.0, 0.5)]
    rows += [row(metrics.UNSEEN, 1.0, True)]  # in no official figure, nor in the common ones
    summary, _, notes = metrics.summarise("tofu", rows)
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
    summary, _, notes = metrics.summarise("tofu", rows, [0.1, 0.2])
    assert summary["forget_quality"] == pytest.approx(1 / 3)  # D = 1 with two rows a side: 2 of the 6 orders
    assert (summary["forget_quality_d"], summary["forget_quality_n"], summary["forget_quality_m"]) == (1.0, 2, 2)


@pytest.mark.parametrize(("k", "p"), [(10, 0.1650), (15, 0.0068), (16, 0.0030)])
def test_forget_quality_takes_the_papers_values_at_40_rows(k, p):
    found = metrics.forget_quality(list(range(40)), [i + k - 0.5 for i in range(40)])
    assert found["forget_quality_d"] == pytest.approx(k / 40)
    assert found["forget_quality"] == pytest.approx(p, abs=5e-5)
    assert f"D = {(k - 1) / 40:.4g} would give" in metrics.attainable(k / 40, 40, 40)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_model_gets_no_figure_silently(bad):
    rows = [row(s, 0.5) | metrics.tofu_scores(s, 1.0, 1.0, [1.0]) for s in metrics.SETS]
    rows += [row(s, 0.5) | metrics.tofu_scores(s, bad, bad, [bad]) for s in metrics.SETS]
    summary, _, notes = metrics.summarise("tofu", rows, [1.0, 1.0])
    assert summary["model_utility"] is None and summary["forget_quality"] is None and len(notes) == 2
    assert "NaN" not in json.dumps(metrics.finite(ev.finish("tofu", rows, [1.0, 1.0])))


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


# --- decoding --------------------------------------------------------------------------------------------------------


def predictions(model, tokenizer, probes, **options):
    result = ev.evaluate(model, tokenizer, "builtin", probes, max_new_tokens=20, progress=False, **options)
    return [r["prediction"] for r in result["per_example"]]


def test_answers_depend_neither_on_the_batch_nor_on_the_order():
    model, tokenizer = make_model(), make_tokenizer()
    probes = World(0).probes()[::37]
    one = predictions(model, tokenizer, probes, batch_size=1)
    assert len(set(one)) > len(one) // 2  # a model that always says the same would prove nothing
    assert predictions(model, tokenizer, probes, batch_size=3) == one
    assert predictions(model, tokenizer, probes, batch_size=64) == one
    assert predictions(model, tokenizer, probes[::-1], batch_size=7) == one[::-1]


def test_answers_are_those_of_generate():
    model, tokenizer = make_model(), make_tokenizer()
    prompts = [encode_prompt(tokenizer, probe.prompt) for probe in World(0).probes()[::300]]
    answers = ev.decode(model, tokenizer, prompts, [20] * len(prompts), False, 4, progress=False)
    for prompt, (text, _) in zip(prompts, answers, strict=True):
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :]
        assert text == tokenizer.decode(ids, skip_special_tokens=True)


def test_evaluation_leaves_modes_and_random_state_alone():
    model, tokenizer = make_model(), make_tokenizer()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    predictions(model, tokenizer, World(0).probes()[:3])
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_running_out_of_memory_halves_the_batch_and_goes_on(monkeypatch):
    model, tokenizer = make_model(), make_tokenizer()
    probes = World(0).probes()[::100]
    expected = predictions(model, tokenizer, probes, batch_size=1)
    sample, sizes = ev.grpo.sample, []

    def small(model, prompts, *rest):
        sizes.append(len(prompts))
        if len(prompts) > 3:
            raise torch.OutOfMemoryError
        return sample(model, prompts, *rest)

    monkeypatch.setattr(ev.grpo, "sample", small)
    assert predictions(model, tokenizer, probes, batch_size=8) == expected
    assert sizes[:3] == [8, 4, 2] and max(sizes[2:]) == 2

    def nothing(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(ev.grpo, "sample", nothing)
    with pytest.raises(InputError, match="out of memory"):
        predictions(model, tokenizer, probes)


def test_batched_answers_are_checked_outside_float32(monkeypatch):
    model, tokenizer = make_model().to(torch.bfloat16), make_tokenizer()
    probes = World(0).probes()[::100]
    result = ev.evaluate(model, tokenizer, "builtin", probes, batch_size=8, progress=False, check_batching=True)
    assert "rows decoded alone differ" in result["notes"][0]
    assert ev.evaluate(model, tokenizer, "builtin", probes[:1], progress=False)["notes"] == []


def scripted(monkeypatch, tokenizer, text, eos=True):
    """Make the sampler write this text for every prompt, cut at the first stop token and at the limit."""

    def sample(model, prompts, group_size, max_new_tokens, stop_ids, temperature):
        assert group_size == 1 and temperature == 0
        ids = tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] * eos
        end = next((t + 1 for t, token in enumerate(ids) if token in stop_ids), len(ids))
        ids = ids[: min(end, max_new_tokens)]
        seen.append(max_new_tokens)
        stops.update(stop_ids)
        ids = torch.tensor(ids).expand(len(prompts), 1, -1)  # (N, 1, T)
        return ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(ids.shape)

    seen, stops = [], set()
    monkeypatch.setattr(ev.grpo, "sample", sample)
    return seen, stops


def test_rwku_answers_end_at_a_newline_within_30_tokens(monkeypatch, place):
    model, tokenizer = make_model(), make_tokenizer()
    probes = ev.load_probes("rwku", place / "rwku")
    limits, stops = scripted(monkeypatch, tokenizer, " pilot\nand more")
    result = ev.evaluate(model, tokenizer, "rwku", probes, progress=False)
    assert {r["prediction"] for r in result["per_example"]} == {"pilot"} and set(limits) == {30}
    assert stops == {tokenizer.eos_token_id, *tokenizer("\n", add_special_tokens=False).input_ids}
    assert ev.score("rwku", probes[0], "pilot", "pilot.\n  more")["prediction"] == "pilot."  # one token ".\n  more"
    assert not any(r["truncated"] for r in result["per_example"])
    assert (result["summary"]["forget_fb"], result["summary"]["forget_qa"], result["summary"]["forget_aa"]) == (
        100,
        0,
        100,
    )
    scripted(monkeypatch, tokenizer, "\n")
    result = ev.evaluate(model, tokenizer, "rwku", probes, progress=False)
    assert result["summary"]["forget_all"] == 0  # an empty prediction scores 0
    scripted(monkeypatch, tokenizer, "p" * 100)
    result = ev.evaluate(model, tokenizer, "rwku", probes, progress=False)
    assert result["per_example"][0]["prediction"] == "p" * 30 and result["summary"]["truncated"] == 100


def test_muse_lengths_cuts_and_the_true_continuation(monkeypatch, place):
    model, tokenizer = make_model(context=4096), make_tokenizer()
    probes = ev.load_probes("muse", place / "muse")
    probes[0] = replace(probes[0], answer="nobody in the hall moved. " * 20)
    limits, _ = scripted(monkeypatch, tokenizer, "Orla\n\nQuestion: who?")
    rows = ev.evaluate(model, tokenizer, "muse", probes, batch_size=1, progress=False)["per_example"]
    assert sorted(limits) == [32, 32, 128]
    assert rows[0]["prediction"] == "Orla\n\nQuestion: who?"  # VerbMem is not cut
    assert rows[0]["answer"] == ("nobody in the hall moved. " * 20)[:127]  # 128 tokens of one byte, BOS among them
    assert rows[1]["prediction"] == rows[2]["prediction"] == "Orla" and rows[1]["rouge_l_f1"] == 1


def test_tofu_writes_200_tokens_with_the_prompt(monkeypatch, place):
    model, tokenizer = make_model(), make_tokenizer()
    probes = ev.load_probes("tofu", place / "tofu")  # prompts of several lengths in one batch
    scripted(monkeypatch, tokenizer, "x" * 300, eos=False)
    rows = ev.evaluate(model, tokenizer, "tofu", probes, progress=False)["per_example"]
    for probe, found in zip(probes, rows, strict=True):
        assert len(encode_prompt(tokenizer, probe.prompt)) + len(found["prediction"]) == 200
        assert found["truncated"]


def test_context_needed_is_enough_and_no_more(place):
    tokenizer = make_tokenizer()
    for benchmark in ("rwku", "muse", "tofu"):
        probes = ev.load_probes(benchmark, place / benchmark)
        needed = ev.context_needed(tokenizer, benchmark, probes)
        ev.evaluate(make_model(context=needed), tokenizer, benchmark, probes, progress=False)
        with pytest.raises(InputError, match="context"):
            ev.evaluate(make_model(context=needed - 1), tokenizer, benchmark, probes, progress=False)


# --- the command -----------------------------------------------------------------------------------------------------


def test_tofu_from_model_to_log_to_table(place, tmp_path, capsys):
    flags = ("--benchmark", "tofu", "--data_dir", place / "tofu", "--device", "cpu")
    first = command(*flags, "--model", place / "model", "--retain_model", place / "other", "--output", tmp_path / "a")
    other = command(*flags, "--model", place / "other", "--output", tmp_path / "b")
    probes = ev.load_probes("tofu", place / "tofu")
    ratios = [[r for _, r in naive_figures(make_model(seed), probes, "forget")] for seed in (0, 1)]
    nine = []
    for split in metrics.UTILITY_SETS:
        figures = naive_figures(make_model(0), probes, split)
        nine += [statistics.mean(p for p, _ in figures), statistics.mean(max(0, 1 - r) for _, r in figures), 0.5]
    rows = [row | {"rouge_l_recall": 0.5} for row in first["per_example"]]  # a random model's own recall is mostly 0
    summary, _, _ = metrics.summarise("tofu", rows)
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
    model, tokenizer = make_model(), make_tokenizer()
    for benchmark in ("rwku", "muse"):
        out = command(
            "--benchmark", benchmark, "--data_dir", place / benchmark, "--model", place / "model", "--batch_size", 5,
            "--device", "cpu", "--output", tmp_path / "a",
        )  # fmt: skip
        probes = ev.load_probes(benchmark, place / benchmark)
        assert out == ev.evaluate(model, tokenizer, benchmark, probes, progress=False)
        again = command("--benchmark", benchmark, "--from_log", tmp_path / "a", "--output", tmp_path / "b")
        assert again["summary"] == out["summary"]
    output = capsys.readouterr().out
    assert "Bo Quay" in output and "mean" in output and "Forget FB ↓" in output and "KnowMem ↓" in output


def test_builtin_probes_get_the_common_columns():
    model, tokenizer = make_model(), make_tokenizer()
    result = ev.evaluate(model, tokenizer, "builtin", ev.load_probes("builtin", None, 5)[::49], progress=False)
    for column in ("forget_recall", "retain_recall", "forget_refusal", "retain_refusal", "leakage"):
        assert 0 <= result["summary"][column] <= 100
    assert "hard_heldout_recall" in result["summary"] and "easy_trained_refusal" in result["summary"]


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
    make_tokenizer().save_pretrained(tmp_path / "wider")
    make_model(vocab=200).save_pretrained(tmp_path / "narrower")
    make_tokenizer().save_pretrained(tmp_path / "narrower")
    write(tmp_path / "half.json", {"eval_log_forget.json": {"avg_gt_loss": {"0": 1.0}}})
    write(tmp_path / "words.json", {"eval_log_forget.json": {
        "avg_gt_loss": {"0": "x"}, "avg_paraphrased_loss": {"0": 1}, "average_perturb_loss": {"0": [1]},
        "rougeL_recall": {"0": 1}}})  # fmt: skip
    write(tmp_path / "nothing.json", {"a": 1})
    tofu = ("--benchmark", "tofu", "--data_dir", place / "tofu", *base)
    cases = [
        (("--benchmark", "tofu", "--data_dir", tmp_path / "nowhere", *base), "nowhere: no such folder"),
        (("--benchmark", "tofu", *base), "needs --data_dir"),
        (("--benchmark", "rwku", "--data_dir", place / "tofu", *base), "forget_level1.json"),
        (("--benchmark", "muse", "--data_dir", place / "tofu", *base), "verbmem"),
        (
            ("--benchmark", "tofu", "--data_dir", tmp_path / "missing", *base),
            "world_facts_perturbed.json: no such file",
        ),
        (("--benchmark", "tofu", "--data_dir", tmp_path / "field", *base), "row 1 has no field 'perturbed_answer'"),
        ((*tofu, "--retain_log", short), "holds 4 forget rows, the evaluated model has 6"),
        ((*tofu, "--retain_log", tmp_path / "half.json"), "'avg_paraphrased_loss'"),
        ((*tofu, "--retain_log", tmp_path / "words.json"), "not a number"),
        ((*tofu, "--retain_log", tmp_path / "nothing.json"), "is no result of this command"),
        ((*tofu, "--retain_log", short, "--retain_model", place / "other"), "one of --retain_model and --retain_log"),
        ((*tofu, "--from_log", short), "one of --model and --from_log"),
        ((*tofu, "--batch_size", 0), "--batch_size 0"),
        ((*tofu, "--max_new_tokens", 2000), "context of 1024"),
        ((*tofu, "--judge_url", "http://localhost:1"), "go together"),
        ((*tofu, "--retain_model", tmp_path / "nowhere"), "--retain_model"),
        ((*tofu[:4], "--model", tmp_path / "wider", "--device", "cpu"), "do not belong together"),
        ((*tofu[:4], "--model", tmp_path / "narrower", "--device", "cpu"), "do not belong together"),
        ((*tofu[:4], "--model", tmp_path / "nowhere"), "is no model folder"),
        (("--benchmark", "rwku", "--from_log", short), "holds results of tofu, expected rwku"),
        (("--benchmark", "rwku", "--from_log", short, "--retain_log", short), "only --benchmark tofu"),
        (("--benchmark", "tofu", "--from_log", tmp_path / "half.json"), "has no set 'eval_log.json'"),
        ((*tofu, "--nonsense", 1), "nonsense"),
    ]
    for flags, message in cases:
        with pytest.raises(InputError) as told:
            command(*flags, "--output", tmp_path / "out.json")
        assert message in str(told.value) and "\n" not in str(told.value), flags
    with pytest.raises(InputError, match="--output"):
        command(*tofu, "--output", tmp_path / "no" / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_a_mistake_exits_with_code_2_and_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "evaluate.py", "--benchmark", "rwku", "--model", "x",
         "--data_dir", tmp_path / "nowhere", "--output", tmp_path / "o.json"], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr and "nowhere: no such folder" in done.stderr
    assert not (tmp_path / "o.json").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"per_example": 3}, "is not a list of objects"),
        ({"per_example": ["x"]}, "is not a list of objects"),
        ({"answer_loss": "low"}, "row 1 holds a loss that is not a number"),
        ({"perturbed_losses": 2.0}, "row 1 holds a loss that is not a number"),
        ({"perturbed_losses": []}, "row 1 holds a loss that is not a number"),
    ],
)
def test_a_damaged_log_is_told_in_one_line(change, said, tmp_path):
    row = dict.fromkeys(("target", "rouge_l_recall", "rouge_l_f1", "refusal", "leak", "named", "truncated"))
    row |= {"split": "forget", "forget": True, "answer_loss": 1.0, "paraphrased_loss": 1.0, "perturbed_losses": [2.0]}
    log = {"benchmark": "tofu", "per_example": [row | change]}
    write(tmp_path / "log.json", log | change if "per_example" in change else log)
    with pytest.raises(InputError, match=said) as error:
        probes_module.read_log(tmp_path / "log.json", "tofu")
    assert "\n" not in str(error.value)
