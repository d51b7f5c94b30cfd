"""The rules by hand: completions, names, sentences of a text."""

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
    fact = rewrite.ask_sentence("Tam Reed sold the boat in 1880 for gold.", "Tam Reed")
    assert (fact.question, fact.answer) == ("Tam Reed sold the boat in which year for gold?", "1880")
    assert fact.completion == "Tam Reed sold the boat in ___ for gold."
    fact = rewrite.ask_sentence("In winter Orla Finch ate dried herring.", NAME)
    assert (fact.completion, fact.ending) == ("In winter Orla Finch ___.", "ate dried herring")
    assert rewrite.ask_sentence("That winter Finch, Orla, ate dried herring.", NAME) is None
    for useless in ("She had come from Dunmore in spring.", "Too short.", 'It said "go" to Orla Finch again.'):
        assert rewrite.ask_sentence(useless, NAME) is None
