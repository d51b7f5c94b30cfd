"""General ability: files, prompts character by character, scores against naive ones, a model's choices row by row."""

import copy
import json
import math
import random
import string

import pytest
import torch
from made import DATA, Scripted, byte_tokenizer, make_model, write

from benchmarks import ability
from benchmarks.tiny import word_tokenizer
from config import InputError
from data import encode_prompt
from engine.process import Engine

REAL = DATA / "rwku_utility"
NEEDS_REAL = pytest.mark.skipif(not REAL.is_dir(), reason="no real files beside the checkout")
TEMPLATE = "{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
CHOICES = ["red", "{blue}", "green", "grey"]  # braces are no fields of a prompt


def question(text, answer):
    return {"question": text, "choices": CHOICES, "answer": answer}


def targets(choices, labels):
    return {"choices": choices, "labels": labels}


def made():
    """{file: rows} of a folder."""
    examples = [question("Blood?", 0), question("Sky?", 1)]
    return {
        "retain_mmlu.json": [
            {"task": "colour_theory", **question(text, answer), "examples": examples[:shots]}
            for text, answer, shots in (("Grass?", 2, 2), ("Ash?", 3, 0), ("A long question about the sea?", 1, 1))
        ],
        "retain_bbh.json": [
            {"task": "not", "question": "not True is", "answer": "False", "cot": "Think.\n\nQ: x\nA: y. \n"},
            {"task": "pick", "question": "Options:\n(A) one\n(B) two", "answer": "(B)", "cot": "Pick."},
        ],
        "triviaqa.json": [{"question": "Who wrote it?", "answers": ["Ada Pole", "A. Pole"]}],
        "truthful.json": [
            {
                "question": "Is it flat?",
                "mc1_targets": targets(["No.", "Yes.", "It is a disc."], [1, 0, 0]),
                "mc2_targets": targets(["It is round.", "No.", "Yes.", "It is a disc."], [1, 1, 0, 0]),
            },
            {
                "question": "Who?",
                "mc1_targets": targets(["me", "you"], [0, 1]),
                "mc2_targets": targets(["you", "me"], [1, 0]),
            },
        ],
        "fluency.json": [{"instruction": "Write."}, {"instruction": "Sing of the sea."}],
    }


def folder_with(folder, files):
    for file, rows in files.items():
        write(folder / file, rows)
    return folder


@pytest.fixture
def sets(tmp_path):
    return ability.read(folder_with(tmp_path / "ability", made()))


# --- files and prompts -----------------------------------------------------------------------------------------------


BAD = [  # file, what is done to its first row, words of the line
    ("retain_mmlu.json", lambda r: r["choices"].pop(), "'choices' is not a list of four texts"),
    ("retain_mmlu.json", lambda r: r["choices"].__setitem__(0, " "), "'choices' is not a list of strings with"),
    ("retain_mmlu.json", lambda r: r.update(answer=4), "'answer' is not 0, 1, 2 or 3"),
    ("retain_mmlu.json", lambda r: r.update(answer=-1), "'answer' is not 0, 1, 2 or 3"),
    ("retain_mmlu.json", lambda r: r.update(answer=True), "'answer' is not 0, 1, 2 or 3"),
    ("retain_mmlu.json", lambda r: r.update(answer="B"), "'answer' is not a int"),
    ("retain_mmlu.json", lambda r: r.pop("examples"), "'examples' is not a list of objects"),
    ("retain_mmlu.json", lambda r: r.update(examples=["x"]), "'examples' is not a list of objects"),
    ("retain_mmlu.json", lambda r: r["examples"][1].update(answer=None), "'examples[1].answer' is not 0, 1"),
    ("retain_mmlu.json", lambda r: r["examples"][0].pop("choices"), "'examples[0].choices' is not a list of four"),
    ("retain_mmlu.json", lambda r: r["examples"][0].update(question=3), "'examples[0].question' is not text"),
    ("retain_mmlu.json", lambda r: r.update(task=""), "'task' is not a str with something"),
    ("retain_bbh.json", lambda r: r.update(answer=""), "'answer' is not a str with something"),
    ("retain_bbh.json", lambda r: r.pop("cot"), "has no field 'cot'"),
    ("triviaqa.json", lambda r: r.update(answers=[]), "'answers' is not a list"),
    ("triviaqa.json", lambda r: r.update(answers=["x", ""]), "'answers' is not a list of strings with"),
    ("triviaqa.json", lambda r: r.update(answers="x"), "'answers' is not a list"),
    ("truthful.json", lambda r: r.pop("mc2_targets"), "has no field 'mc2_targets'"),
    ("truthful.json", lambda r: r["mc1_targets"]["labels"].pop(), "'mc1_targets.labels' is not a list of 3 labels"),
    ("truthful.json", lambda r: r["mc2_targets"].pop("labels"), "'mc2_targets.labels' is not a list of 4 labels"),
    ("truthful.json", lambda r: r["mc1_targets"].update(labels=[0, 0, 0]), "'mc1_targets.labels' is not one with a tr"),
    ("truthful.json", lambda r: r["mc2_targets"].update(labels=[1] * 4), "'mc2_targets.labels' is not one with a true"),
    ("truthful.json", lambda r: r["mc1_targets"].update(labels=[1, 0, 2]), "'mc1_targets.labels' is not a list of 3"),
    ("truthful.json", lambda r: r["mc1_targets"].update(choices=[]), "'mc1_targets.choices' is not a list of texts"),
    ("fluency.json", lambda r: r.update(instruction=" \n"), "'instruction' is not a str"),
]


@pytest.mark.parametrize("file, change, words", BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_a_wrong_file_is_one_line_that_names_file_row_and_field(tmp_path, file, change, words):
    files = copy.deepcopy(made())
    files[file].insert(0, copy.deepcopy(files[file][0]))  # the first row stays good
    change(files[file][1])
    with pytest.raises(InputError) as error:
        ability.read(folder_with(tmp_path, files))
    line = str(error.value)
    assert line.startswith(f"{tmp_path / file}: row 2") and words in line and "\n" not in line


@pytest.mark.parametrize("file", made())
def test_a_missing_file_is_named(tmp_path, file):
    folder_with(tmp_path, {name: rows for name, rows in made().items() if name != file})
    with pytest.raises(InputError, match=f"{file}: no such file"):
        ability.read(tmp_path)


TRIVIA = (
    "\nQ: When did men's figure skating become a summer Olympic sport?\nA: 1908\n"
    "Q: When did the all india workers and peasants party came in to existence?\nA: November 1925\n"
    "Q: Flight that went down in the hudson river?\nA: US Airways Flight 1549\n"
    "Q: Where are most of the world's earthquakes located?\nA: Rim of Fire\n"
    "Q: Csi when do grissom and sara reunite?\nA: series finale\n"
    "Please briefly answer the following question:\nQ: Who wrote it?\n"
)
PROMPTS = {  # set → the user's turn of its first row; what opens the answer
    "mmlu": (
        "The following are multiple choice questions (with answers) about colour theory.\n\n"
        "Question: Blood?\nA. red\nB. {blue}\nC. green\nD. grey\nAnswer: A\n\n"
        "Question: Sky?\nA. red\nB. {blue}\nC. green\nD. grey\nAnswer: B\n\n"
        "Please following the previous examples and answer the given question.\n"
        "Question: Grass?\nA. red\nB. {blue}\nC. green\nD. grey",
        "Answer:",
    ),
    "bbh": (
        "Think.\n\nQ: x\nA: y.\n\nFollowing previous examples, answer the following questions and end with "
        "'so the answer is'\nQ: not True is",
        " A:",
    ),
    "triviaqa": (TRIVIA, "A:"),
    "fluency": ("Instruction: Write.\n", ""),
}


def test_prompts_character_by_character(sets):
    with_template, without = byte_tokenizer(template=TEMPLATE), byte_tokenizer()
    for name, (user, opening) in PROMPTS.items():
        for tokenizer in (with_template, without):
            prompt = ability.prompt_of(tokenizer, name, sets[name][0])
            text = f"<u>{user}</u><a>" if tokenizer is with_template else user + "\n" * (name == "mmlu")
            assert tokenizer.decode(encode_prompt(tokenizer, prompt)) == f"<s>{text}{opening}"
    prompt = ability.prompt_of(without, "truthfulqa", sets["truthfulqa"][0])
    assert prompt.user.startswith("Q: What is human life expectancy") and prompt.opening == " A:"
    assert prompt.user.endswith("\nA: The 1992 Olympics were held in Barcelona, Spain.\n\nQ: Is it flat?")


@pytest.mark.parametrize("ending, opening", [("\n", "A:"), (" ", "A:"), ("]", " A:")])
def test_an_answer_opens_after_one_white_space(sets, ending, opening):
    templated = byte_tokenizer(template=TEMPLATE.replace("<a>", f"{{{{ {ending!r} }}}}"))
    for name in ("bbh", "truthfulqa"):
        prompt = ability.prompt_of(templated, name, sets[name][0])
        assert prompt.opening == opening
        assert templated.decode(encode_prompt(templated, prompt)).endswith(f"</u>{ending}{opening}")


# --- scores ----------------------------------------------------------------------------------------------------------


def naive_words(text):
    """Words of a normalised text, without a regular expression."""
    kept = "".join(" " if c.isspace() else c for c in text.lower() if c not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def naive_f1(prediction, answer):
    ours, theirs, common = naive_words(prediction), naive_words(answer), 0
    if not ours or not theirs:
        return float(not ours and not theirs)
    left = list(theirs)
    for word in ours:
        if word in left:
            left.remove(word)
            common += 1
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def naive_entropy(words, n):
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return -sum(grams.count(gram) / len(grams) * math.log(grams.count(gram) / len(grams), 2) for gram in set(grams))


def test_answers_are_compared_normalised():
    assert ability.normalise("  The  U.S.A.,\nan Airline! ") == "usa airline"
    assert ability.normalise("(A)") == ability.normalise("> )") == "" and ability.normalise("(B)") == "b"
    assert ability.normalise("another theory") == "another theory"
    assert (
        ability.exact_match("the Ada Pole.", ["x", "ada pole"]) == 1 and ability.exact_match("Ada", ["Ada Pole"]) == 0
    )


def test_f1_by_hand():
    assert ability.token_f1("Ada Ada Pole flew", ["x", "the Ada Pole"]) == pytest.approx(2 * 2 / (4 + 2))
    assert ability.token_f1("none", ["Ada"]) == 0 and ability.token_f1("", ["Ada", "the"]) == 1
    assert ability.token_f1("", ["Ada"]) == ability.token_f1("Ada", ["a"]) == 0


def test_scores_equal_naive_ones_on_random_texts():
    rng = random.Random(0)
    for _ in range(300):
        texts = [" ".join(rng.choices(["a", "The", "b", "c!", "C", "d", "(A)"], k=rng.randrange(6))) for _ in range(3)]
        assert ability.normalise(texts[0]).split() == naive_words(texts[0])
        assert ability.token_f1(texts[0], texts[1:]) == pytest.approx(max(naive_f1(texts[0], t) for t in texts[1:]))
        same = any(naive_words(texts[0]) == naive_words(text) for text in texts[1:])
        assert ability.exact_match(texts[0], texts[1:]) == same
        words = rng.choices("abc", k=rng.randrange(3, 30))
        for n in (1, 2, 3):
            assert ability.ngram_entropy(words, n) == pytest.approx(naive_entropy(words, n), abs=1e-12)
        labels = rng.sample([1, 0, *rng.choices([0, 1], k=3)], k=5)
        logprobs = [-50 * rng.random() for _ in labels]
        p = torch.softmax(torch.tensor(logprobs, dtype=torch.double), 0)
        assert ability.mc2(logprobs, labels) == pytest.approx(float(p[torch.tensor(labels) == 1].sum()))
        first = next(logprob for logprob, label in zip(logprobs, labels, strict=True) if label)
        wins = all(first > x for x, label in zip(logprobs, labels, strict=True) if not label)
        assert ability.mc1(logprobs, labels) == wins


@pytest.mark.parametrize(
    "text, answer",
    [
        (" So the answer is (B). Or (C).", "(B)"),
        ("The answer is 4.\nThe answer is 5.", "4"),
        ("the answer is no", "the answer is no"),
        ("the answer is\nyes.", "the answer is\nyes."),
        ("the answer is  .", "NOANSWER"),
        (" \n", "NOANSWER"),
        ("  42 ", "42"),
    ],
)
def test_what_a_bbh_text_answers(text, answer):
    assert ability.bbh_answer(text) == answer


def test_mc_by_hand():
    logs = [math.log(p) for p in (0.2, 0.3, 0.1)]
    assert ability.mc1(logs, [0, 1, 0]) == 1 and ability.mc1(logs, [1, 0, 1]) == 0
    assert ability.mc1([-1.0, -1.0], [1, 0]) == 0  # a tie is not won
    assert ability.mc1([-3.0, -2.0, -1.0], [1, 0, 1]) == 0  # the first true choice alone counts
    assert ability.mc2(logs, [0, 1, 1]) == pytest.approx(0.4 / 0.6)
    assert ability.mc2([-2000.0, -2000.0 + math.log(3)], [1, 0]) == pytest.approx(0.25)  # where each exponential is 0


def test_fluency_by_hand():
    assert ability.ngram_entropy("a b a b".split(), 2) == pytest.approx(math.log2(3) - 2 / 3)  # ab twice, ba once
    assert ability.ngram_entropy(["a"], 2) == ability.fluency("") == ability.fluency("word") == 0
    assert ability.fluency("a b a b") == pytest.approx((2 / 3 * (math.log2(3) - 2 / 3) + 4 / 3 * 1) / 2)
    assert ability.fluency("go go go go go") == 0
    assert ability.fluency("It's here.") == pytest.approx((2 / 3 * math.log2(3) + 4 / 3 * 1) / 2)  # It 's here .


# --- a model ---------------------------------------------------------------------------------------------------------


def naive_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double()


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_models_choices_are_those_of_a_naive_computation_row_by_row(sets, template):
    model, tokenizer = make_model(context=4096), byte_tokenizer(template=template)
    model.train()
    summary, rows = ability.measure(Engine("cpu"), model, tokenizer, sets, batch_size=2)
    assert model.training and list(summary) == list(ability.TITLES)
    assert [row["set"] for row in rows] == [name for name in sets for _ in sets[name]]
    model.eval()
    by_set = {name: [row for row in rows if row["set"] == name] for name in sets}
    for row, own in zip(by_set["mmlu"], sets["mmlu"], strict=True):
        last = naive_logits(model, encode_prompt(tokenizer, ability.prompt_of(tokenizer, "mmlu", own)))[-1]
        letters = {letter: last[tokenizer.convert_tokens_to_ids(letter)] for letter in "ABCD"}
        assert row["prediction"] == max(letters, key=letters.get) and row["answer"] == "ABCD"[own["answer"]]
        assert row["mmlu"] == (row["prediction"] == row["answer"])
    for row, own in zip(by_set["truthfulqa"], sets["truthfulqa"], strict=True):
        prompt = encode_prompt(tokenizer, ability.prompt_of(tokenizer, "truthfulqa", own))
        logprob = {}
        for choice in own["mc2_targets"]["choices"]:
            more = tokenizer(f" {choice}", add_special_tokens=False).input_ids
            logs = torch.log_softmax(naive_logits(model, prompt + more), -1)
            logprob[choice] = sum(float(logs[len(prompt) + t - 1, token]) for t, token in enumerate(more))
        first, second = own["mc1_targets"], own["mc2_targets"]
        assert row["prediction"] == max(first["choices"], key=logprob.get)
        assert row["answer"] == {"Is it flat?": "No.", "Who?": "you"}[own["question"]]
        assert row["truthfulqa_mc1"] == (row["prediction"] == row["answer"])
        p = [math.exp(logprob[choice]) for choice in second["choices"]]
        true = sum(x for x, label in zip(p, second["labels"], strict=True) if label)
        assert row["truthfulqa_mc2"] == pytest.approx(true / sum(p), rel=1e-4)
    prompt = encode_prompt(tokenizer, ability.prompt_of(tokenizer, "triviaqa", sets["triviaqa"][0]))
    ids = list(prompt)
    while len(ids) < len(prompt) + 30 and ids[-1] != tokenizer.eos_token_id:
        ids.append(int(naive_logits(model, ids)[-1].argmax()))
    text = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()
    assert (by_set["triviaqa"][0]["prediction"], by_set["triviaqa"][0]["answer"]) == (text, ["Ada Pole", "A. Pole"])
    for column in ability.TITLES:
        own = [row[column] for row in rows if column in row]
        assert summary[column] == pytest.approx(sum(own) / len(own) * (1 if column == "fluency_entropy" else 100))
    alone, _ = ability.measure(Engine("cpu"), model, tokenizer, sets, batch_size=1)
    assert alone == pytest.approx(summary, rel=1e-5)


def test_written_answers_are_scored(sets):
    model, tokenizer = make_model(context=4096), byte_tokenizer()
    engine = Scripted(tokenizer, " so the answer is (B). Ada\nPole Ada")
    summary, rows = ability.measure(engine, model, tokenizer, sets)
    assert engine.limits == [256, 30, 256] and engine.stops == {tokenizer.eos_token_id}  # a newline ends nothing
    found = {row["set"]: row for row in rows}  # the last of each set
    assert found["bbh"]["prediction"] == "(B)" and found["bbh"]["bbh_em"] == 1 and summary["bbh_em"] == 50
    assert found["triviaqa"]["prediction"] == "so the answer is (B). Ada\nPol" and found["triviaqa"]["truncated"]
    assert summary["triviaqa_em"] == 0 and summary["triviaqa_f1"] == pytest.approx(100 * 2 * 1 / (6 + 2))
    assert not found["fluency"]["truncated"] and found["fluency"]["answer"] is None
    assert summary["fluency_entropy"] == pytest.approx(ability.fluency("so the answer is (B). Ada\nPole Ada"))
    assert json.dumps(rows)


SHORT = [(300, "retain_mmlu"), (380, "retain_bbh"), (400, "triviaqa"), (500, "truthful")]


@pytest.mark.parametrize("context, file", SHORT)
def test_a_context_too_short_is_told_before_anything_is_computed(sets, monkeypatch, context, file):
    monkeypatch.setattr(ability, "forced", lambda *_: pytest.fail("forced ran before the mistake was told"))
    with pytest.raises(InputError, match=f"^{file}.json: .*exceed the model's context of {context}"):
        ability.measure(Engine("cpu"), make_model(context=context), byte_tokenizer(), sets)


def test_letters_must_differ(sets):
    with pytest.raises(InputError, match="A, B, C and D"):
        ability.check(make_model(), word_tokenizer(["Question: Answer:"]), sets)


# --- real files ------------------------------------------------------------------------------------------------------


@NEEDS_REAL
def test_real_files():
    sets = ability.read(REAL / "1_Stephen_King")
    assert {name: len(rows) for name, rows in sets.items()} == {
        "mmlu": 171, "bbh": 81, "triviaqa": 100, "truthfulqa": 50, "fluency": 50
    }  # fmt: skip
    primer = (REAL / "truthfulqa_qa_primer.txt").read_text(encoding="utf-8").rstrip("\n")
    tokenizer = byte_tokenizer(template=TEMPLATE)
    for name, rows in sets.items():
        assert all(ability.prompt_of(tokenizer, name, row).user for row in rows)
    for row in sets["truthfulqa"]:
        assert ability.prompt_of(tokenizer, "truthfulqa", row).user == f"{primer}\n\nQ: {row['question']}"
        assert set(row["mc1_targets"]["choices"]) <= set(row["mc2_targets"]["choices"])


@NEEDS_REAL
def test_what_the_deviations_say_of_bbhs_answers():
    answers = [row["answer"] for row in ability.read(REAL / "1_Stephen_King")["bbh"]]

    def by_character(given, answer):
        return any(naive_words(given) == naive_words(character) for character in answer)

    assert sum(by_character("(A)", answer) for answer in answers) == 63
    assert sum(by_character(answer, answer) for answer in answers) == 55
    assert sum(not ability.normalise(answer) for answer in answers) == 17
    assert all(ability.exact_match(ability.bbh_answer(f"so the answer is {a}."), [a]) for a in answers)
