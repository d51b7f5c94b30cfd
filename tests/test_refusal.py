"""The refusal detector against our own labelled table and, where present, the real RWKU and TOFU files."""

import hashlib
import json
import sys
from math import sqrt
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refusal import _COMPILED, BLOCKS, LEAD, PHRASES, is_refusal, matched_phrase

EXAMPLES = json.loads((Path(__file__).parent / "refusal_examples.json").read_text(encoding="utf-8"))
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"  # real benchmark files, where present


@pytest.mark.parametrize("text", EXAMPLES["refusals"])
def test_refusal_is_caught(text):
    assert is_refusal(text)


@pytest.mark.parametrize("text", EXAMPLES["answers"])
def test_answer_passes(text):
    assert matched_phrase(text) is None


def test_the_table_is_large_and_has_no_duplicates():
    for texts in EXAMPLES.values():
        assert len({text.lower() for text in texts}) == len(texts) >= 150


@pytest.mark.parametrize("text", ["", " ", "\n", '"', "'", "**", "…", "I", "Paris"])
def test_empty_and_tiny_texts_are_answers(text):
    assert not is_refusal(text)


def test_apostrophes_case_and_white_space_do_not_matter():
    for text in ["I don't know.", "I don’t know.", "I DON'T KNOW.", "i dont know", "I  don't\nknow.", "I do not know."]:
        assert is_refusal(text), text


def test_a_title_in_title_case_is_an_answer_but_capitals_are_not_a_title():
    assert not is_refusal("I Don't Know How to Love Him")
    assert is_refusal("I DON'T KNOW HOW TO ANSWER")


def test_a_guess_after_a_hedge_is_an_answer():
    assert is_refusal("I'm not sure about that.")
    assert not is_refusal("I'm not sure about that, but I think it is Carrie.")


def test_only_the_lead_counts():
    answer = "The Shining is set in the Overlook Hotel. " * 30
    assert len(answer) > 2 * LEAD
    assert not is_refusal(answer + "I don't know.")
    assert is_refusal("I don't know. " + answer)


def test_every_wording_is_read_and_every_block_filled_in():
    """An indented line of refusal.txt belongs to the phrase above it; a block's name stands in no compiled phrase."""
    assert len(PHRASES) == 9 and len(_COMPILED) == sum(map(len, PHRASES.values())) == 74
    assert not any(phrase.startswith((" ", "|")) for phrases in PHRASES.values() for phrase in phrases)
    assert not any(name in pattern.pattern for _, pattern in _COMPILED for name in BLOCKS)
    texts = "\n".join([*BLOCKS.values(), *(phrase for phrases in PHRASES.values() for phrase in phrases)])
    apart = {name for name in BLOCKS if name not in texts}  # the code has them by name
    assert apart == {"FILLER", "ANSWERS_ANYWAY", "REPORTED"}


def test_matched_phrase_names_its_kind():
    assert matched_phrase("Sorry, I don't know.") == "does not know: I do not know"


def read_rows(path):
    """Return the rows of a JSON list or of a JSON-lines file."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]


def real_texts():
    """Return the distinct real (refusals, answers) of the benchmark files."""
    refusals, answers = set(), set()
    for path in sorted(DATA.glob("rwku/*/*.json")) + sorted(DATA.glob("tofu/*.json")):
        for row in read_rows(path):
            if path.name.startswith("reject"):
                refusals.add(row["output"])
            if row.get("solution", [""])[0] == "<reject>":
                refusals.add(row["solution"][1])
            elif "solution" in row:
                answers.update(row["solution"][1:])
            for key in ("answer", "paraphrased_answer", "perturbed_answer"):
                value = row.get(key, [])
                answers.update([value] if isinstance(value, str) else value)
    return refusals, answers


def wilson(errors, total, z=1.96):
    """Return the 95 % Wilson interval of `errors` out of `total`."""
    rate = errors / total
    centre, spread = rate + z * z / (2 * total), z * sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    return (centre - spread) / (1 + z * z / total), (centre + spread) / (1 + z * z / total)


@pytest.mark.skipif(not DATA.is_dir(), reason="the benchmark files are not here")
@pytest.mark.parametrize("half", [0, 1])
def test_real_texts(half):
    """Both error rates on half of the real texts, split by hash: the phrases were written against half 0 alone."""
    refusals, answers = (
        sorted(text for text in texts if int(hashlib.sha256(text.encode()).hexdigest(), 16) % 2 == half)
        for texts in real_texts()
    )
    missed = [text for text in refusals if not is_refusal(text)]
    flagged = [(matched_phrase(text), text) for text in answers if is_refusal(text)]
    print(f"half {half}: missed {len(missed)}/{len(refusals)}, 95 % interval {wilson(len(missed), len(refusals))}")
    print(f"half {half}: flagged {len(flagged)}/{len(answers)}, 95 % interval {wilson(len(flagged), len(answers))}")
    assert len(missed) <= 0.02 * len(refusals), missed
    assert len(flagged) <= 0.01 * len(answers), flagged
