"""Stage 1's batches, its loss and its learning rate, against hand-worked numbers."""

import math

import pytest
import torch

import sft


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


def test_learning_rate_by_hand():
    """Four steps of warm-up, then half a cosine over four: cos 45°, 90°, 135°, 180°."""
    rates = [sft.learning_rate(2.0, step, 8, 4, cosine=True) for step in range(1, 9)]
    half = math.sqrt(0.5)
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 1 + half, 1.0, 1 - half, 0.0])
    assert [sft.learning_rate(2.0, step, 8, 4, cosine=False) for step in (2, 4, 8)] == [1.0, 2.0, 2.0]
    assert sft.learning_rate(2.0, 1, 2, 0, cosine=True) == pytest.approx(1.0)
    assert sft.learning_rate(2.0, 3, 3, 3, cosine=True) == 2.0  # all of it warm-up: never divides by 0
