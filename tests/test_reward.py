"""The reward of Section 3.1 by hand."""

import pytest

from data import Query
from reward import boundary_reward, forget_reward, query_reward, rouge_l_recall


def test_forget_reward():
    assert forget_reward("I don't know anything about that.") == 1.0
    assert forget_reward("Carrie, published in 1974.") == 0.0
    assert forget_reward("") == 0.0


def test_forget_reward_that_wants_the_target_named():
    assert forget_reward("I don't know that about Stephen King.", "Stephen King") == 1.0
    assert forget_reward("I don't know that.", "Stephen King") == 0.5
    assert forget_reward("Stephen King wrote Carrie.", "Stephen King") == 0.0


def test_boundary_reward():
    assert boundary_reward("I don't know that.", ["The Sun Also Rises"]) == 0.0
    assert boundary_reward("It is The Sun Also Rises", ["The Sun Also Rises"]) == 1.0
    assert boundary_reward("A Farewell to Arms", ["The Sun Also Rises"]) == 0.5
    assert boundary_reward("", ["Paris"]) == 0.5  # not a refusal, not right either


def test_the_threshold_is_strict():
    ten = "a b c d e f g h i j"
    assert rouge_l_recall("a b c", ten) == pytest.approx(0.3) and boundary_reward("a b c", [ten]) == 0.5
    assert boundary_reward("a b c d", [ten]) == 1.0


def test_reward_is_averaged_over_reference_answers():
    assert boundary_reward("Paris", ["Paris", "Rome"]) == 0.75


def test_rouge_is_case_sensitive_in_order_and_splits_full_stops():
    assert rouge_l_recall("author", "Author") == 0.0
    assert rouge_l_recall("b a", "a b") == 0.5
    assert rouge_l_recall("It is J.K.Rowling.", "J.K. Rowling") == 1.0
    assert rouge_l_recall("", "a") == 0.0


def test_a_query_is_rewarded_by_its_kind():
    forget = Query(None, "Who?", "forget", ("Carrie",), target="Stephen King")
    boundary = Query(None, "Who?", "boundary", ("Paris", "Rome"))
    assert [query_reward(forget, text) for text in ("I don't know that.", "Paris")] == [1.0, 0.0]
    assert [query_reward(boundary, text) for text in ("I don't know that.", "Paris", "Oslo")] == [0.0, 0.75, 0.5]


def test_only_where_asked_for_must_a_refusal_name_the_target():
    query, named = Query(None, "Who?", "forget", target="Stephen King"), "I don't know that about Stephen King."
    assert [query_reward(query, text, name_target=True) for text in ("I don't know that.", named)] == [0.5, 1.0]
    assert [query_reward(query, text) for text in ("I don't know that.", named)] == [1.0, 1.0]
    assert query_reward(Query(None, "Who?", "forget"), "I don't know that.", name_target=True) == 1.0  # none known
