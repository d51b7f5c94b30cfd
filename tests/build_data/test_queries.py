"""Refusals, the neighbour that asks most alike, and what is turned away, by hand."""

import pytest
from orla import NAME

from build_data import queries
from build_data.queries import Check, Item
from build_data.rewrite import Fact
from refusal import is_refusal


@pytest.mark.parametrize("name", [NAME, "J.K. Rowling", "Basil Mahfouz Al-Kuwaiti", "Dr. O'Neil", "Orla", "{x}", "岩"])
def test_every_refusal_is_recognised(name):
    plain, named = queries.REFUSALS["plain"], queries.REFUSALS["named"]
    every = plain + named
    assert len(set(every)) == len(every) >= 100
    assert not any("{" in text for text in plain) and all("{name}" in text for text in named)
    assert [text for text in every if not is_refusal(text.replace("{name}", name))] == []
    given = queries.refusals([name] * 300, 0)
    assert all(map(is_refusal, given)) and sum(name in text for text in given) == 150
    assert len(set(given)) == len(every)  # none is used up before the others
    assert not any("{name}" in text for text in queries.refusals(["", name, ""], 1))


def test_neighbours_are_matched_by_what_is_asked():
    facts = [Fact("A B", "Where was A B born?", ""), Fact("A B", "Who are A B's parents?", "")]
    near = [Fact("C D", "Who are C D's two parents?", ""), Fact("C D", "Where was C D born?", ""), Fact("", "Why?", "")]
    assert list(queries.match(facts, near)) == [[1, 0, 2], [0, 1, 2]]


def test_checks_by_hand():
    check = Check([NAME, "The Keeper"], {"who is pim": "retain", "who is orla finch": "forget"}, ("forget",), [])

    def reason(kind, query, answer="x", by="given"):
        if check.lets_in(kind, Item(query, answer, "", "qa", by)):
            return ""
        return check.rejected[-1]["reason"]

    assert reason("forget", "Who is Orla Finch?") == "" and reason("forget", "who is  orla finch") == "forget: twice"
    assert reason("forget", "Who is Pim?") == "forget: an evaluation query"
    assert reason("boundary", "Who is PIM?") == "boundary: an evaluation query"
    assert reason("boundary", "Who is Orla Finch??") == "boundary: an evaluation query"
    assert reason("forget", "Where is it?") == "" and reason("boundary", "where is it") == "boundary: a forget query"
    assert reason("boundary", "Who was Finch, first name Orla?") == "boundary: still names the target"
    assert reason("boundary", "Who met Ben?", "the keeper") == "boundary: still names the target"
    assert reason("boundary", "Who is Ben?", " ") == "boundary: no answer known"
    assert reason("boundary", "Who is Ben?", "I don't know.") == "boundary: its answer reads as a refusal"
    assert reason("boundary", "Who is Ben?") == "" and reason("boundary", "Who is Ben") == "boundary: twice"
    assert reason("boundary", "") == "boundary: no usable qa came"
    assert reason("boundary", "Who is Benorla Finchley?") == ""
