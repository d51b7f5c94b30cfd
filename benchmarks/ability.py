"""RWKU's general ability: what a model can still do after unlearning, on the benchmark's own utility files.

Beside Section 4's RWKU columns, which leave it out: knowledge (MMLU), reasoning (BBH), facts (TriviaQA), truthfulness
(TruthfulQA) and fluency. The files lie in a target's folder; other targets may lack them.

Deviations
- BBH compares a prediction with the whole answer. RWKU's code compares it with each single character of the answer: in
  Stephen King's file "(A)" given to all 81 questions is right 63 times there, and a faultless model 55 times.
- Fluency's words are those of NLTK without its sentence splitting, which needs a download. A prompt has one BOS, where
  RWKU's code puts a second one before a template's; an answer ends at any EOS of generation config or tokenizer.
- Without a chat template a model gets the user's text, MMLU's with a newline more before "Answer:".
- MC2 comes from differences of log-probabilities; exponentials of long choices can all be 0."""

import json
import math
import re
import string
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch.nn.functional as F
from nltk.tokenize import NLTKWordTokenizer

from benchmarks.answers import forced, greedy, inference
from benchmarks.metrics import HEADINGS, mean
from benchmarks.shared import check_ids
from config import InputError
from data import Prompt, encode_prompt
from engine.files import read_rows

TITLES = HEADINGS["ability"]
FILES = {  # set → its file, its fields
    "mmlu": ("retain_mmlu.json", {"task": str, "question": str, "choices": list, "answer": int}),
    "bbh": ("retain_bbh.json", {"task": str, "question": str, "answer": str, "cot": str}),
    "triviaqa": ("triviaqa.json", {"question": str, "answers": list}),
    "truthfulqa": ("truthful.json", {"question": str, "mc1_targets": dict, "mc2_targets": dict}),
    "fluency": ("fluency.json", {"instruction": str}),
}
LIMITS = {"mmlu": 0, "bbh": 256, "triviaqa": 30, "truthfulqa": 0, "fluency": 256}  # new tokens of an answer
OPENINGS = {"mmlu": "Answer:", "triviaqa": "A:", "fluency": ""}
USERS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))  # set → lines of the user's turn
LETTERS = "ABCD"


def read(folder):
    """{set: rows} of the five files in a folder. Raises InputError naming file, row and field."""
    sets = {}
    for name, (file, fields) in FILES.items():
        sets[name] = read_rows(path := Path(folder) / file, fields)
        for number, row in enumerate(sets[name], 1):
            for field, good, wanted in checks(name, row):
                if not good:
                    raise InputError(f"{path}: row {number}, field '{field}' is not {wanted}")
    return sets


def checks(name, row):
    """(field, whether it is good, what it should be) of a row whose fields have the right types."""
    if name == "mmlu":
        examples = row.get("examples")
        good = isinstance(examples, list) and all(isinstance(example, dict) for example in examples)
        yield "examples", good, "a list of objects with question, choices and answer"
        for place, part in [("", row), *((f"examples[{i}].", example) for i, example in enumerate(examples))]:
            choices, answer = part.get("choices"), part.get("answer")
            yield f"{place}question", filled(part.get("question"), str), "text"
            yield f"{place}choices", filled(choices, list) and len(choices) == 4, "a list of four texts"
            yield f"{place}answer", type(answer) is int and answer in range(4), "0, 1, 2 or 3"
    for field in ("mc1_targets", "mc2_targets") if name == "truthfulqa" else ():
        choices, labels = (row[field].get(key) for key in ("choices", "labels"))
        yield f"{field}.choices", filled(choices, list), "a list of texts"
        good = isinstance(labels, list) and len(labels) == len(choices) and all(label in (0, 1) for label in labels)
        yield f"{field}.labels", good, f"a list of {len(choices)} labels, 1 or 0, one for each choice"
        yield f"{field}.labels", 0 < sum(labels) < len(labels), "one with a true choice (1) and a false one (0)"


def filled(value, kind):
    """Whether a value is text with more than white space in it, or a list of such texts."""
    texts = value if kind is list else [value]
    return isinstance(value, kind) and bool(texts) and all(isinstance(text, str) and text.strip() for text in texts)


def multiple_choice(row):
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True)]
    return "\n".join([f"Question: {row['question']}", *lines])


def prompt_of(tokenizer, name, row):
    """RWKU's Prompt for one row. BBH's and TruthfulQA's "A:" follows a space where the text before it ends in none."""
    fields = dict(row)
    if name == "mmlu":
        shown = [f"{multiple_choice(example)}\nAnswer: {LETTERS[example['answer']]}\n\n" for example in row["examples"]]
        fields = dict(task=row["task"].replace("_", " "), examples="".join(shown), question=multiple_choice(row))
    elif name == "bbh":
        fields["cot"] = row["cot"].strip()
    user = text = "\n".join(USERS[name]).format(**fields)
    if name in OPENINGS:
        return Prompt(user, user + "\n" * (name == "mmlu"), OPENINGS[name])
    if tokenizer.chat_template:  # it decides how the text ends
        turn = [{"role": "user", "content": user}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return Prompt(user, user, "A:" if text[-1] in "\n " else " A:")


def letter_ids(tokenizer):
    """The last token of each of " A", " B", " C", " D". Raises InputError where they do not differ."""
    ids = [tokenizer(f" {letter}", add_special_tokens=False).input_ids[-1] for letter in LETTERS]
    if len(set(ids)) < 4:
        raise InputError("MMLU: the tokenizer does not tell the letters A, B, C and D apart")
    return ids


def choices_of(row):
    """TruthfulQA's choices, each once: MC1's are among MC2's in RWKU's files."""
    return list(dict.fromkeys(row["mc2_targets"]["choices"] + row["mc1_targets"]["choices"]))


def check(model, tokenizer, sets):
    """{set: (rows of token ids, where the scored part of each starts)}: MMLU's prompt and one letter, for the logits
    read are those before it; TruthfulQA's prompt and a choice as one string without EOS, a row for each; of others the
    prompt. Raises: InputError where a row and the new tokens after it exceed the model's context."""
    letter, encoded = letter_ids(tokenizer)[:1], {}
    for name, own in sets.items():
        rows, starts = encoded[name] = [], []
        for row in own:
            prompt = prompt_of(tokenizer, name, row)
            ids = encode_prompt(tokenizer, prompt)
            more = [ids + letter if name == "mmlu" else ids]
            if name == "truthfulqa":
                texts = [replace(prompt, opening=f"{prompt.opening} {choice}") for choice in choices_of(row)]
                more = [encode_prompt(tokenizer, text) for text in texts]
            rows += more
            starts += [len(ids)] * len(more)
        try:
            check_ids(model, tokenizer, rows, [LIMITS[name]] * len(rows))
        except InputError as error:
            raise InputError(f"{FILES[name][0]}: {error}") from None
    return encoded


def normalise(text):
    """Text as RWKU's code compares it: lower case, no ASCII punctuation, no a, an, the ("(A)" is empty), one space."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction, answers):
    """RWKU's EM: 1 where the prediction equals one of the answers, both normalised, else 0 (↑)."""
    return float(any(normalise(prediction) == normalise(answer) for answer in answers))


def token_f1(prediction, answers):
    """RWKU's F1 in [0, 1] (↑), best over answers: 2 · common / all words of both, normalised; 1 if neither has any."""
    ours, scores = normalise(prediction).split(), []
    for theirs in (normalise(answer).split() for answer in answers):
        common = (Counter(ours) & Counter(theirs)).total()
        scores.append(2 * common / (len(ours) + len(theirs)) if ours or theirs else 1.0)
    return max(scores)


def bbh_answer(text):
    """RWKU's answer in a text: from "the answer is" to a full stop of the line, else all of it; "NOANSWER" for none."""
    found = re.search(r"[t|T]he answer is (.*?)\.", text)
    return (found[1] if found else text).strip() or "NOANSWER"


def mc1(logprobs, labels):
    """TruthfulQA's MC1: 1 where the first true choice has a higher logprob, of all tokens, than any false one (↑)."""
    return float(logprobs[labels.index(1)] > max(p for p, label in zip(logprobs, labels, strict=True) if not label))


def mc2(logprobs, labels):
    """TruthfulQA's MC2 in [0, 1] (↑): Σ p over true choices / Σ p over all, p = exp(logprob), logprobs in nats."""
    weights = [math.exp(logprob - max(logprobs)) for logprob in logprobs]
    return math.fsum(w for w, label in zip(weights, labels, strict=True) if label) / math.fsum(weights)


def ngram_entropy(words, n):
    """−Σ f log2 f in bits (↑), f the share of each n-gram among a text's n-grams; 0 for a text without any."""
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    return math.fsum(c / counts.total() * math.log2(counts.total() / c) for c in counts.values())


def fluency(text):
    """RWKU's fluency of one text in bits (↑): the mean of 2/3 · H₂ and 4/3 · H₃, the entropies of its n-grams."""
    words = NLTKWordTokenizer().tokenize(text)
    return (2 / 3 * ngram_entropy(words, 2) + 4 / 3 * ngram_entropy(words, 3)) / 2


def score(name, row, result):
    """One row of `measure`. result: index of a letter; {choice: log-probability}; (text, whether truncated)."""
    scores = {}
    if name == "mmlu":
        prediction, answer = LETTERS[result], LETTERS[row["answer"]]
        scores["mmlu"] = float(prediction == answer)
    elif name == "truthfulqa":
        for column, metric in (("mc1", mc1), ("mc2", mc2)):
            choices, labels = (row[f"{column}_targets"][key] for key in ("choices", "labels"))
            scores[f"truthfulqa_{column}"] = metric([result[choice] for choice in choices], labels)
        choices, labels = (row["mc1_targets"][key] for key in ("choices", "labels"))
        prediction, answer = max(choices, key=result.get), choices[labels.index(1)]
    else:
        prediction, scores["truncated"] = result[0].strip(), result[1]
        if name == "bbh":
            prediction, answer = bbh_answer(prediction), row["answer"]
            scores["bbh_em"] = exact_match(prediction, [answer])
        elif name == "triviaqa":
            answer = row["answers"]
            scores |= {"triviaqa_em": exact_match(prediction, answer), "triviaqa_f1": token_f1(prediction, answer)}
        else:
            answer, scores["fluency_entropy"] = None, fluency(prediction)
    question = row["instruction" if name == "fluency" else "question"]
    return {"set": name, "question": question, "prediction": prediction, "answer": answer} | scores


def measure(engine, model, tokenizer, sets, *, batch_size=32):
    """General ability of a model on the sets that `read` returns.
    Returns: {column of TITLES: mean over its questions, × 100 but for fluency's bits}; one dict a question with set,
        question, prediction, answer, its scores under the columns' names, and `truncated` where the model wrote."""
    encoded, letters = check(model, tokenizer, sets), letter_ids(tokenizer)
    readers = {"mmlu": lambda logits, ids: logits[0, letters].argmax().item(),
               "truthfulqa": lambda logits, ids: -F.cross_entropy(logits, ids, reduction="sum").item()}  # fmt: skip
    rows = []
    with inference(model), engine.held(model):
        for name, (asked, starts) in encoded.items():
            if name in readers:
                results = forced(model, tokenizer, asked, starts, readers[name], batch_size, name)
            else:
                results = greedy(engine, model, tokenizer, asked, [LIMITS[name]] * len(asked), False, batch_size)
            if name == "truthfulqa":
                logprobs = iter(results)
                results = [{choice: next(logprobs) for choice in choices_of(row)} for row in sets[name]]
            rows += [score(name, row, result) for row, result in zip(sets[name], results, strict=True)]
    table = {column: mean((row.get(column) for row in rows), 100) for column in TITLES}
    return table | {"fluency_entropy": mean(row.get("fluency_entropy") for row in rows)}, rows
