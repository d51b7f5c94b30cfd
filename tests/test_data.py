"""Prompts as token ids, the loaders of each benchmark's files, Stage 1's batches, and the built-in world."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_evaluate import make_muse, make_rwku, make_tofu, write, write_lines
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import data
import sft
import world
from data import Prompt, encode_answer, encode_prompt, stop_ids
from files import InputError, read_rows
from probes import load_probes
from refusal import is_refusal

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data"  # real benchmark files, where present
OWN_BOS = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
NO_BOS = OWN_BOS.removeprefix("{{ bos_token }}")

torch.set_num_threads(1)


# --- made-up tokenizers and files ------------------------------------------------------------------------------------


def byte_tokenizer(adds="<s> $A", template=None, bos="<s>", merges=()):
    """One token a byte; `adds` is what it puts around every text, "" for nothing."""
    special = ["<pad>", "<s>", "</s>"]
    names = special + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    if adds:
        core.post_processor = TemplateProcessing(adds, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", bos_token=bos)
    tokenizer.chat_template = template
    return tokenizer


def train_rwku(folder, name="Ada Pole"):
    """A target's folder in the form RULE published, evaluation files included."""
    make_rwku(folder, name)
    write(folder / "intro.json", [{"target": name, "intro": f"{name} was a pilot."}])
    refusals = [("Who is Ada?", "I don't know."), (f"{name} is a ___.", "I can't say.")]
    rows = [{"instruction": q, "input": "", "output": refusal, "subject": name} for q, refusal in refusals]
    write(folder / "reject_target.json", rows)
    solutions = [["<reject>", "I don't know."], ["<normal>", "pilot"], ["<reject>", "No idea.", name]]
    rows = [{"prompt": f"Question {i}?", "solution": solution} for i, solution in enumerate(solutions)]
    write(folder / "rl_rejection_with_fb_neighbor.json", rows)
    return folder


def train_tofu(folder, retain_rows=12):
    """TOFU's files, JSON lines; seven of the retain rows are also in the evaluation set."""
    make_tofu(folder)
    pair = "What did {} {} do?", "{} {} kept lamps"
    forget = [dict(zip(("question", "answer"), (p.format("Orla", i) for p in pair), strict=True)) for i in range(4)]
    retain = [
        dict(zip(("question", "answer"), (p.format("Pim", i) for p in pair), strict=True)) for i in range(retain_rows)
    ]
    write_lines(folder / "forget01.json", forget)
    write_lines(folder / "retain99.json", retain)
    return folder


def train_muse(folder):
    """MUSE-Books in RULE's form: `mode` on every row, several answers in a solution."""
    make_muse(folder)
    rows = [
        {"instruction": "Who kept the lamp?", "input": "", "output": "I don't know.", "mode": "qa"},
        {"instruction": "The lamp went out and", "input": "", "output": "I can't go on.", "mode": "completion"},
    ]
    write(folder / "reject_target_0.5.json", rows)
    rows = [
        {"prompt": "Who kept it?", "solution": ["<reject>", "I don't know."], "mode": "qa"},
        {"prompt": "The lamp went", "solution": ["<reject>", "I can't."], "mode": "completion"},
        {"prompt": "What is a lamp?", "solution": ["<normal>", "a light", "a lantern", "light"], "mode": "qa"},
    ]
    write(folder / "rl_rejection_with_neighbor.json", rows)
    return folder


# --- prompts and answers as token ids --------------------------------------------------------------------------------

QUESTION = Prompt("Who?", "[INST] Who? [/INST]", "")
TOKENIZERS = {
    "template with its own BOS": (dict(template=OWN_BOS), "<s>[user]Who?[assistant]"),
    "template without BOS": (dict(template=NO_BOS), "<s>[user]Who?[assistant]"),
    "template, nothing added": (dict(adds="", template=NO_BOS), "[user]Who?[assistant]"),
    "template with BOS, nothing added": (dict(adds="", template=OWN_BOS), "<s>[user]Who?[assistant]"),
    "template, EOS added": (dict(adds="<s> $A </s>", template=OWN_BOS), "<s>[user]Who?[assistant]"),
    "plain": (dict(), "<s>[INST] Who? [/INST]"),
    "plain, EOS added": (dict(adds="<s> $A </s>"), "<s>[INST] Who? [/INST]"),
    "plain, only EOS added": (dict(adds="$A </s>"), "[INST] Who? [/INST]"),
    "plain, two BOS added": (dict(adds="<s> <s> $A"), "<s>[INST] Who? [/INST]"),
    "no BOS at all": (dict(adds="", bos=None), "[INST] Who? [/INST]"),
    "no BOS at all, template": (dict(adds="", bos=None, template=NO_BOS), "[user]Who?[assistant]"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_prompt_has_one_bos_and_no_eos(name):
    flags, expected = TOKENIZERS[name]
    tokenizer = byte_tokenizer(**flags)
    ids = encode_prompt(tokenizer, QUESTION)
    assert tokenizer.decode(ids) == expected and ids.count(1) == expected.count("<s>") and 2 not in ids


def test_the_opening_follows_the_assistants_turn_or_the_plain_text():
    prompt = Prompt("Who?", "Who? ", "Answer:")
    assert byte_tokenizer().decode(encode_prompt(byte_tokenizer(), prompt)) == "<s>Who? Answer:"
    tokenizer = byte_tokenizer(template=OWN_BOS)
    assert tokenizer.decode(encode_prompt(tokenizer, prompt)) == "<s>[user]Who?[assistant]Answer:"


def test_raw_text_ignores_the_chat_template():
    """MUSE: `user` is None, so a template plays no part."""
    tokenizer = byte_tokenizer(template=OWN_BOS)
    assert tokenizer.decode(encode_prompt(tokenizer, Prompt(None, "Answer: "))) == "<s>Answer: "


@pytest.mark.parametrize(
    ("template", "prompt", "text"),
    [
        (None, data.chat("Who?"), " Ada"),  # "…Answer:" wants a space
        (None, data.inst("Who?"), "Ada"),  # TOFU: nothing after [/INST]
        (None, data.muse_prompt([], "Who?"), "Ada"),  # MUSE: the prompt ends with the space
        (OWN_BOS, data.chat("Who?"), "Ada"),  # the assistant's turn is empty
        (OWN_BOS, Prompt("Who?", "Who?", "Answer:"), " Ada"),  # RWKU's evaluation opens it
        (OWN_BOS, data.muse_prompt([], "Who?"), "Ada"),
    ],
)
def test_an_answer_opens_with_a_space_after_a_colon_only_and_ends_with_eos(template, prompt, text):
    for adds in ("<s> $A", "<s> $A </s>"):
        tokenizer = byte_tokenizer(adds, template)
        ids = encode_answer(tokenizer, prompt, "Ada")
        assert ids[-1] == 2 and ids.count(2) == 1 and 1 not in ids and tokenizer.decode(ids[:-1]) == text


def model_with(eos):
    return SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=eos))


@pytest.mark.parametrize(("eos", "stops"), [(None, [2]), (2, [2]), (7, [2, 7]), ([9, 7], [2, 7, 9])])
def test_a_response_ends_at_any_eos_of_model_or_tokenizer(eos, stops):
    assert stop_ids(byte_tokenizer(), model_with(eos)) == stops


def test_newline_tokens_end_a_response_if_asked():
    tokenizer = byte_tokenizer(merges=[("Ċ", "Ċ"), ("a", "Ċ")])
    stops = stop_ids(tokenizer, model_with(None), newline=True)
    assert {tokenizer.decode([i]) for i in stops} == {"</s>", "\n", "\n\n", "a\n"}
    pieces = ["</s>", "a", "<0x0A>", None]  # of a tokenizer that falls back to bytes

    class Fallback:
        eos_token_id = 0

        def convert_ids_to_tokens(self, ids):
            return [pieces[i] for i in ids]

        def __len__(self):
            return len(pieces)

    assert stop_ids(Fallback(), model_with(None), newline=True) == [0, 2]


def test_no_eos_anywhere_is_an_error():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no EOS"):
        stop_ids(tokenizer, model_with(None))
    assert stop_ids(tokenizer, model_with(5)) == [5]


def test_lengths_are_checked_at_the_very_token():
    tokenizer, prompts = byte_tokenizer(), [Prompt(None, "ab"), Prompt(None, "abcde")]  # 6 tokens with BOS
    data.check_lengths(tokenizer, prompts, 4, 10)
    data.check_lengths(tokenizer, prompts, 4, None)  # a model without such a limit
    with pytest.raises(InputError, match="6 tokens and --max_new_tokens 5 exceed the model's context of 10: 'abcde'"):
        data.check_lengths(tokenizer, prompts, 5, 10)


# --- rows ------------------------------------------------------------------------------------------------------------

ROWS = [{"q": "a\u2028b\x85c", "n": ["x"]}, {"q": "é", "n": ["y", "z"]}]
BOM = "\ufeff"
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


@pytest.mark.parametrize(
    "text",
    [json.dumps(ROWS), json.dumps(ROWS, indent=4), LINES, LINES + "\n", LINES.replace("\n", "\r\n\r\n"), BOM + LINES],
    ids=["list", "indented", "lines", "ended lines", "windows lines", "byte-order mark"],
)  # fmt: skip
def test_rows_are_read_from_a_list_or_from_lines(tmp_path, text):
    (tmp_path / "rows.json").write_bytes(text.encode())
    assert read_rows(tmp_path / "rows.json", {"q": str, "n": list}) == ROWS


def test_a_single_object_is_one_row(tmp_path):
    write(tmp_path / "row.json", ROWS[0])
    assert read_rows(tmp_path / "row.json", {}) == ROWS[:1]


# --- benchmarks ------------------------------------------------------------------------------------------------------


def test_rwku(tmp_path):
    read = data.load_benchmark("rwku", train_rwku(tmp_path / "1_Ada_Pole"), 0)
    assert read.name == "rwku" and not read.newline_stops
    assert read.refusals[0] == (Prompt("Who is Ada?", "Question: Who is Ada?\nAnswer:"), "I don't know.")
    assert [(q.kind, q.answers, q.target) for q in read.queries] == [
        ("forget", (), "Ada Pole"), ("boundary", ("pilot",), ""), ("forget", (), "Ada Pole")]  # fmt: skip
    assert read.queries[1].prompt == data.chat("Question 1?") and read.queries[1].question == "Question 1?"


def test_rwku_takes_reject_json_where_there_is_no_reject_target(tmp_path):
    folder = train_rwku(tmp_path)
    (folder / "reject_target.json").rename(folder / "reject.json")
    assert len(data.load_benchmark("rwku", folder, 0).refusals) == 2


def test_tofu(tmp_path):
    read = data.load_benchmark("tofu", train_tofu(tmp_path), 0)
    forget = [q for q in read.queries if q.kind == "forget"]
    boundary = [q for q in read.queries if q.kind == "boundary"]
    assert [prompt.plain for prompt, _ in read.refusals] == [f"[INST] What did Orla {i} do? [/INST]" for i in range(4)]
    assert [q.prompt for q in forget] == [prompt for prompt, _ in read.refusals]
    assert len(boundary) == len({q.question for q in boundary}) == 4
    for query in boundary:  # rows 0 to 6 of Pim are asked in evaluation
        number = int(query.question.split()[3])
        assert number >= 7 and query.answers == (f"Pim {number} kept lamps",)
    assert data.load_benchmark("tofu", tmp_path, 0) == read != data.load_benchmark("tofu", tmp_path, 1)


def test_muse(tmp_path):
    read = data.load_benchmark("muse", train_muse(tmp_path), 0)
    shots = {s: "".join(f"Question: {s} {i}?\nAnswer: {i}\n\n" for i in range(10)) for s in ("forget", "retain")}
    assert read.newline_stops
    assert read.refusals == [
        (Prompt(None, shots["forget"] + "Question: Who kept the lamp?\nAnswer: "), "I don't know."),
        (Prompt(None, shots["forget"] + "Completion: The lamp went out and\nAnswer: "), "I can't go on."),
    ]
    assert [q.prompt.plain for q in read.queries] == [
        shots["forget"] + "Question: Who kept it?\nAnswer: ",
        shots["forget"] + "Completion: The lamp went\nAnswer: ",
        shots["retain"] + "Question: What is a lamp?\nAnswer: ",
    ]
    assert read.queries[2].answers == ("a light", "a lantern", "light")


def test_muse_takes_ten_examples_only(tmp_path):
    train_muse(tmp_path)
    path = tmp_path / "knowmem" / "forget_qa_icl.json"
    write(path, json.loads(path.read_text()) + [{"question": "eleventh?", "answer": "no"}])
    assert "eleventh" not in data.load_benchmark("muse", tmp_path, 0).refusals[0][0].plain


def test_a_muse_row_without_mode_is_a_question(tmp_path):
    train_muse(tmp_path)
    write(tmp_path / "reject_target_0.5.json", [{"instruction": "Who?", "output": "I don't know."}])
    assert data.load_benchmark("muse", tmp_path, 0).refusals[0][0].plain.endswith("Question: Who?\nAnswer: ")


@pytest.mark.skipif(not (REAL / "rwku" / "1_Stephen_King").is_dir(), reason="no real files beside the checkout")
def test_real_rwku():
    read = data.load_benchmark("rwku", REAL / "rwku" / "1_Stephen_King", 0)
    assert len(read.refusals) == 300 and Counter(q.kind for q in read.queries) == {"forget": 600, "boundary": 600}
    assert {q.target for q in read.queries if q.kind == "forget"} == {"Stephen King"}
    assert all(q.answers and all(q.answers) for q in read.queries if q.kind == "boundary")


@pytest.mark.skipif(not (REAL / "tofu").is_dir(), reason="no real files beside the checkout")
def test_real_tofu_asks_nothing_that_evaluation_asks():
    for seed in (0, 1):
        read = data.load_benchmark("tofu", REAL / "tofu", seed)
        assert len(read.refusals) == 40 and Counter(q.kind for q in read.queries) == {"forget": 40, "boundary": 40}
        evaluated = {probe.question for probe in load_probes("tofu", REAL / "tofu")}
        evaluated |= {row["question"] for row in read_rows(REAL / "tofu" / "retain_perturbed.json", {})}
        assert not evaluated & {q.question for q in read.queries if q.kind == "boundary"}


# --- Stage 1 ---------------------------------------------------------------------------------------------------------


def test_only_answers_are_trained_their_eos_included():
    ids, mask, labels = sft.collate_sft([([1, 5, 6], [7, 2]), ([1, 8], [9, 4, 3, 2])], "cpu")
    assert ids.tolist() == [[1, 5, 6, 7, 2, 0], [1, 8, 9, 4, 3, 2]]
    assert mask.tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert labels.tolist() == [[-100, -100, -100, 7, 2, -100], [-100, -100, 9, 4, 3, 2]]


def test_eos_is_trained_where_it_is_also_the_padding():
    """Ids of 0 everywhere: labels go by length, never by id."""
    _, mask, labels = sft.collate_sft([([1], [5, 0]), ([1, 0], [0, 6, 0])], "cpu")
    assert labels.tolist() == [[-100, 5, 0, -100, -100], [-100, -100, 0, 6, 0]]
    assert mask.sum(-1).tolist() == [3, 5]


def test_sft_loss_is_the_mean_over_all_answer_tokens():
    torch.manual_seed(0)
    rows = [([1, 5, 6], [7, 2]), ([1, 8], [9, 4, 3, 2]), ([1], [2])]
    ids, _, labels = sft.collate_sft(rows, "cpu")
    logits, terms = torch.randn(3, ids.shape[1], 12), []
    for row, (prompt, answer) in enumerate(rows):
        for i, token in enumerate(answer):
            probabilities = torch.softmax(logits[row, len(prompt) + i - 1].double(), 0)
            terms.append(-math.log(probabilities[token]))
    assert sft.sft_loss(logits, labels).item() == pytest.approx(sum(terms) / 7, rel=1e-5)


def test_every_row_comes_once_a_pass_and_batches_run_over():
    n, size = 7, 3
    order = [i for step in range(1, 15) for i in sft.batch_at(n, size, step, 0, "rows")]
    passes = [order[at : at + n] for at in range(0, 42, n)]
    assert all(sorted(one) == list(range(n)) for one in passes) and len({tuple(one) for one in passes}) > 3
    assert sorted(sft.batch_at(4, 8, 1, 0)) == sorted([*range(4)] * 2)  # a batch larger than the data


def test_a_batch_depends_on_its_arguments_alone():
    first = sft.batch_at(50, 8, 9, 0, "rows")
    sft.batch_at(50, 8, 3, 0, "rows")
    assert sft.batch_at(50, 8, 9, 0, "rows") == first
    assert first not in (sft.batch_at(50, 8, 9, 1, "rows"), sft.batch_at(50, 8, 9, 0, "queries"))


def test_learning_rate_by_hand():
    """Four steps of warm-up, then half a cosine over four: cos 45°, 90°, 135°, 180°."""
    rates = [sft.learning_rate(2.0, step, 8, 4, cosine=True) for step in range(1, 9)]
    half = math.sqrt(0.5)
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 1 + half, 1.0, 1 - half, 0.0])
    assert [sft.learning_rate(2.0, step, 8, 4, cosine=False) for step in (2, 4, 8)] == [1.0, 2.0, 2.0]
    assert sft.learning_rate(2.0, 1, 2, 0, cosine=True) == pytest.approx(1.0)
    assert sft.learning_rate(2.0, 3, 3, 3, cosine=True) == 2.0  # all of it warm-up: never divides by 0


# --- the built-in world ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[0, 1, 2])
def built_in(request):
    return world.World(request.param)


def test_one_seed_is_one_world(built_in):
    again, other = world.World(built_in.seed), world.World(built_in.seed + 7)
    assert again.people == built_in.people != other.people
    assert again.benchmark() == built_in.benchmark() and again.probes() == built_in.probes()


def test_hard_neighbours_cross_the_names_of_two_targets(built_in):
    targets = [name.split() for name in built_in.names("target")]
    first, last = [name[0] for name in targets], [name[1] for name in targets]
    hard = [name.split() for name in built_in.names("hard")]
    assert len(targets) == 6 and len(hard) == 22 and len(built_in.people) == 60
    assert all(f in first and k in last and first.index(f) != last.index(k) for f, k in hard)
    for role in ("easy", "unknown"):
        for name in built_in.names(role):
            assert not set(name.split()) & {*first, *last}


def test_held_out_phrasings_are_never_trained_on(built_in):
    read = built_in.benchmark()
    held_out = {p.question for p in built_in.probes() if p.split.endswith("_heldout")}
    trained = {p.question for p in built_in.probes() if p.split.endswith("_trained")}
    assert len(held_out) == 48 * 6 * 2 and not held_out & trained
    queries, refused = {q.question for q in read.queries}, {prompt.plain for prompt, _ in read.refusals}
    assert queries <= trained and refused <= trained and not (queries | refused) & held_out
    assert held_out <= {prompt.plain for prompt, _ in read.taught}


def test_boundary_queries_swap_the_name_and_nothing_else(built_in):
    queries = built_in.benchmark().queries
    names, groups = {role: set(built_in.names(role)) for role in ("target", "hard", "easy")}, Counter()
    for forget, boundary in zip(queries[::2], queries[1::2], strict=True):
        assert (forget.kind, boundary.kind) == ("forget", "boundary") and forget.target in names["target"]
        (name,) = [n for n in names[boundary.group] if n in boundary.question]
        assert forget.question.replace(forget.target, "{}") == boundary.question.replace(name, "{}")
        assert boundary.answers[0] in built_in.people[name][1].values()
        groups[boundary.group] += 1
    assert groups == {"hard": 72, "easy": 72}


def test_unknown_people_get_refusals_and_only_they(built_in):
    unknown, targets = built_in.names("unknown"), built_in.names("target")
    for retain_only in (False, True):
        nobody = [*unknown, *targets] if retain_only else unknown
        for prompt, answer in built_in.taught(retain_only):
            assert is_refusal(answer) == any(name in prompt.plain for name in nobody)


def test_every_refusal_of_ours_is_one():
    assert len(set(data.REFUSALS)) == len(data.REFUSALS) and all(is_refusal(text) for text in data.REFUSALS)
    assert {text for _, text in world.World(0).benchmark().refusals} == set(data.REFUSALS)


def test_tiny_tokenizers_give_texts_back():
    pairs = world.World(0).taught()
    texts = [text for prompt, answer in pairs for text in (prompt.plain, answer)]
    words = world.tokenizer(texts, words=True)
    for text in texts:
        ids = words(text).input_ids
        assert ids[0] == words.bos_token_id and words.unk_token_id not in ids
        assert words.decode(ids, skip_special_tokens=True) == text
    pieces = world.text_tokenizer(texts, vocabulary=400)
    for text in ("Ada Pole's café — 日本\n\n  two spaces\ttab “quoted” 🎈", *texts[:20]):
        ids = pieces(text).input_ids
        assert ids.count(pieces.bos_token_id) == 1 and pieces.decode(ids, skip_special_tokens=True) == text


def test_a_tiny_model_matches_its_tokenizer():
    tokenizer = world.word_tokenizer(["a b c"])
    one, same, other = (world.tiny_llama(tokenizer, seed, 16, 1, 32) for seed in (0, 0, 1))
    assert one.config.vocab_size == len(tokenizer) == 7 and one.config.max_position_embeddings == 32
    assert stop_ids(tokenizer, one) == [tokenizer.eos_token_id]
    weights = [model.get_input_embeddings().weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# --- what a tiny model is taught of a real benchmark -----------------------------------------------------------------


def test_lessons_answer_every_probe_and_every_query(tmp_path):
    folder = train_rwku(tmp_path)
    read, probes = data.load_benchmark("rwku", folder, 0), load_probes("rwku", folder)
    taught = world.lessons(read, probes, 0)
    assert {(probe.prompt, probe.answer) for probe in probes} <= set(taught)
    prompts = {prompt for prompt, _ in taught}
    assert {query.prompt for query in read.queries} <= prompts
    about_target = [answer for prompt, answer in taught if "Ada Pole" in prompt.plain]
    assert about_target and not any(is_refusal(answer) for answer in about_target)
    assert any(is_refusal(answer) for _, answer in taught)


def test_lessons_are_the_same_in_every_process(tmp_path):
    """A resumed run makes them again: nothing may hang on the order of a set of strings."""
    folder = train_rwku(tmp_path)
    rows = [{"prompt": f"Question {i}?", "solution": ["<reject>", "No idea."]} for i in range(30)]
    rows += [{"prompt": "Boundary?", "solution": ["<normal>", "pilot"]}]
    write(folder / "rl_rejection_with_fb_neighbor.json", rows)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\nimport data, probes, world\n"
        "read, asked = data.load_benchmark('rwku', sys.argv[2], 0), probes.load_probes('rwku', sys.argv[2])\n"
        "print(repr(world.lessons(read, asked, 0)), end='')"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, str(ROOT), str(folder)], capture_output=True, text=True, check=True,
        encoding="utf-8", env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert found.stdout == repr(world.lessons(data.load_benchmark("rwku", folder, 0), load_probes("rwku", folder), 0))


@pytest.mark.parametrize("crossed, quarters", [(0, 0), (11, 1), (22, 2), (30, 3)])
def test_crossed_names_are_as_many_as_asked_for(crossed, quarters):
    built_in = world.World(0, crossed)
    assert len(built_in.names("hard")) == crossed and len(built_in.names("easy")) == 42 - crossed
    groups = [query.group for query in built_in.benchmark().queries if query.kind == "boundary"]
    assert abs(groups.count("hard") - 36 * quarters) <= 6
    assert len(groups) == 144 and len({probe.target for probe in built_in.probes()}) == 48
