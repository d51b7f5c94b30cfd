"""Metrics that benchmarks share, against the official scorers and a plain recursion."""

import pytest
from rouge_score import rouge_scorer

from benchmarks import ALL, metrics

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


def rouge(name, prediction, answer):
    return metrics.rouge_l(ALL[name].scorer, prediction, answer)


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
    stemmed = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True).score(answer, prediction)["rougeL"]
    plain = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=False).score(answer, prediction)["rougeL"]
    assert rouge("tofu", prediction, answer) == (stemmed.recall, stemmed.fmeasure)
    assert rouge("muse", prediction, answer) == (plain.recall, plain.fmeasure)
    said, true = (text.replace(".", " ").split() for text in (prediction, answer))
    recall = longest_common(said, true) / len(true) if said and true else 0
    assert rouge("rwku", prediction, answer)[0] == pytest.approx(recall, abs=1e-12)


def test_awkward_strings_are_enough_and_tell_the_scorers_apart():
    assert len(AWKWARD) >= 50
    assert rouge("rwku", "Author", "author")[0] == 0  # case-sensitive
    assert rouge("muse", "Author", "author")[0] == 1
    assert rouge("muse", "lamps", "lamp")[0] == 0  # no stemmer
    assert rouge("tofu", "lamps", "lamp")[0] == 1
    recall, f1 = rouge("muse", "It is Carrie", "Carrie")
    assert (recall, f1) == (1, pytest.approx(2 * 1 * (1 / 3) / (1 + 1 / 3)))


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
