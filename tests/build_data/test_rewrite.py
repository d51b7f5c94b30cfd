"""The rules by hand: completions, names, sentences of a text."""

import json
import random
from pathlib import Path

import pytest
from orla import NAME, STORY

from build_data import rewrite
from build_data.rewrite import Fact


@pytest.mark.parametrize(
    ("question", "answer", "completion", "ending"),
    [
        ("Where was Orla Finch born?", "Vell", "Orla Finch was born in ___.", "Vell"),
        ("Who was Orla Finch's aunt?", "Maud", "Orla Finch's aunt was ___.", "Maud"),
        ("What is Orla Finch known for?", "ink", "Orla Finch is known for ___.", "ink"),
        ("Who painted Orla Finch's tower?", "Ned", "___ painted Orla Finch's tower.", "Ned"),
        ("In which town was Orla Finch married?", "Vell", "Orla Finch was married in the town ___.", "Vell"),
        ("What colour was Orla Finch's boat?", "blue", "The colour of Orla Finch's boat was ___.", "blue"),
        ("Which boat was built by Orla Finch?", "Heron", "The boat that was built by Orla Finch is ___.", "Heron"),
        ("Did Orla Finch sail?", "yes", "Did Orla Finch sail? The answer is ___.", "yes"),
        # from an answer that is a sentence: cut where it says something that the question did not
        ("Where was Orla Finch born?", "Orla Finch was born in Vell.", "Orla Finch was born in ___.", "Vell"),
        ("What about her parents, Orla Finch's?", "Her father was a smith.", "Orla Finch's father was a ___.", "smith"),
        ("Who kept the lamp?", "The lamp was kept by Orla Finch.", "The lamp was kept by ___.", "Orla Finch"),
        ("What is Orla Finch's book?", 'Orla Finch wrote "The Lamp".', "Orla Finch wrote ___.", '"The Lamp"'),
    ],
)  # fmt: skip
def test_completions_by_hand(question, answer, completion, ending):
    fact = rewrite.complete(Fact(NAME, question, answer))
    assert (fact.completion, fact.ending) == (completion, ending)
    assert (fact.question, fact.answer) == (question, answer)
    assert fact.completed_by == ("template (no rule fits)" if "The answer is" in completion else "template")


def test_swap_takes_whole_names_the_longest_first():
    text = "orla finch and Orla's aunt saw Orla Finch's finches; Orlando did not"
    swapped = rewrite.swap(text, ["Orla", NAME], r"Ben \1")
    assert swapped == r"Ben \1 and Ben \1's aunt saw Ben \1's finches; Orlando did not"


def test_authors_are_the_names_of_their_blocks():
    def block(name, other):
        return [{"question": f"What did {name if i % 2 else 'the author'} do?",
                 "answer": f"{'In ' + other if i % 3 else name + ' wrote'} books."} for i in range(20)]  # fmt: skip

    rows = block("Anna van Dyke", "Cape Town") + block("nobody", "the town") + block("Élise Kováč", "New York")[:9]
    assert rewrite.authors(rows) == ["Anna van Dyke"] * 20 + [""] * 20 + ["Élise Kováč"] * 9


def test_texts_become_sentences_passages_and_questions():
    assert rewrite.sentences("Dr. A. Pell left. “Go!” She\nran at 3.5 knots.") == [
        "Dr. A. Pell left.", "“Go!”", "She ran at 3.5 knots.",
    ]  # fmt: skip
    parts = rewrite.passages(STORY, 30)
    assert " ".join(parts).split() == STORY.split() and all(len(part.split()) <= 30 for part in parts)
    begin, end = rewrite.halves("a b c d e")
    assert (begin, end) == ("a b c", "d e")


@pytest.mark.parametrize(("sentence", "question", "answer"), [
    ("Orla Finch kept the lamp at Skerry Point.", "Orla Finch kept the lamp at what?", "Skerry Point"),
    ("In storms Orla Finch sold the boat in 1880.", "In storms Orla Finch sold the boat in which year?", "1880"),
    ("The old boat of Orla Finch was called the Eel.", "The old boat of Orla Finch was called what?", "the Eel"),
    ("A dog guarded the house of Orla Finch in Ashby.", "A dog guarded the house of Orla Finch in what?", "Ashby"),
    ("Once Orla Finch met the ferryman Abel Crake.", "Once Orla Finch met whom?", "the ferryman Abel Crake"),
    ("Orla Finch was raised by Hollis Brandt.", "Orla Finch was raised by whom?", "Hollis Brandt"),
    ("Orla Finch was the elder daughter.", "Orla Finch was what?", "the elder daughter"),
    ("Orla Finch tried the handle of Ned's door.", "Orla Finch tried the handle of what?", "Ned's door"),
])  # fmt: skip
def test_a_sentence_becomes_a_question(sentence, question, answer):
    fact = rewrite.ask_sentence(sentence, NAME, "forget", [])
    assert (fact.question, fact.answer, fact.ending) == (question, answer, answer)
    assert fact.completion.replace("___", answer) == sentence


@pytest.mark.parametrize(("sentence", "reason"), [
    ("Orla Finch heard Brandt's body hit the ground first.", "ends in no noun phrase"),
    ("She had come from Dunmore in the cart.", "opens with a pronoun"), ("Too short.", "too short"),
    ("Orla Finch" + " rowed and" * 20 + " ate the fish.", "too long"),
    ('It said "go" to Orla Finch in the mill.', "no plain statement"), ("Who gave Orla Finch the boat?", "no plain"),
    ("That winter Finch, Orla, sold the boat.", "pronoun"), ("In winter Finch, Orla, sold the boat.", "in one piece"),
    ("Orla Finch had come to Ashby to sing.", "no noun phrase"), ("Orla Finch met Corin Vale.", "no noun phrase"),
    ("In winter Orla Finch ate dried herring.", "no noun phrase"), ("Orla Finch ran from the house quickly.", "adverb"),
    ("Orla Finch left them without singing.", "a verb"), ("Orla Finch stayed in Ashby for six days.", "a time"),
    ("Orla Finch brought hot rolls, and the vicar brought advice.", "a clause"),
    ("Orla Finch painted it the year his wife died.", "a clause"), ("Nobody can row like Orla Finch.", "the name"),
])  # fmt: skip
def test_other_sentences_are_left_out_with_a_reason(sentence, reason):
    rejected = []
    assert rewrite.ask_sentence(sentence, NAME, "boundary", rejected) is None
    assert rejected[0]["reason"].startswith("boundary: a sentence ") and reason in rejected[0]["reason"]


JUDGED = json.loads(Path(__file__).with_name("judged.json").read_text(encoding="utf-8"))


def asked_of(name):
    """The questions on a narrative, and what is told of the sentences left out."""
    text, rejected = Path(__file__).with_name(f"{name}.txt").read_text(encoding="utf-8"), []
    sentences = [sentence for part in text.split("\n\n") for sentence in rewrite.sentences(part)]
    facts = [fact for s in sentences if (fact := rewrite.ask_sentence(s, "", "forget", rejected))]
    assert len(facts) + len(rejected) == len(sentences) > 100
    assert all(row["reason"].startswith("forget: a sentence ") and row["text"] in sentences for row in rejected)
    return [fact.question for fact in facts]


def test_at_most_one_question_in_ten_is_broken():
    """judged.json: every question that the rules make of two narratives, read one by one. A new one must be read first.
    No rule was changed for the sake of the held-out narrative once its questions had been read."""
    found = {name: asked_of(name) for name in JUDGED}
    for name, questions in found.items():
        assert not set(questions) - set(JUDGED[name]), "to be judged"
        assert sum(JUDGED[name][question] != "fine" for question in questions) <= 0.1 * len(questions) > 4
    drawn = random.Random(0).sample([(name, question) for name in found for question in found[name]], 100)
    assert sum(JUDGED[name][question] != "fine" for name, question in drawn) <= 10
