"""The reward of Section 3.1 by hand."""

import pytest

from reward import boundary_reward, forget_reward, rouge_l_recall


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
