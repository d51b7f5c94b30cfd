"""Fast products on a CPU: the same numbers, and turned down where they would be rounded."""

import copy

import pytest
import torch
from conftest import make_groups

import grpo
from engine import fast
from engine import model as models


@pytest.fixture
def plain_products():
    """Products as torch makes them unless told otherwise; what a test sets is taken back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def test_fast_products_change_nothing_but_the_time(any_model, plain_products):
    groups, other = make_groups(any_model), copy.deepcopy(any_model)
    batch, found = grpo.collate(groups, "cpu"), []
    for model in (any_model, other):
        logprobs = fast.shared_response_logprobs(model, batch, 1.0)
        (logprobs * batch.mask * batch.advantages).sum().backward()
        found.append((logprobs[batch.mask], [p.grad for p in model.parameters()]))
        models.fast_products.__wrapped__()
        models.quicken(other, "cpu")
    assert any_model.config._attn_implementation == "sdpa"
    assert other.config._attn_implementation == ("eager" if models.fast_products() else "sdpa")
    (logprobs, grads), (others, other_grads) = found
    assert torch.allclose(logprobs, others, atol=1e-5)
    for a, b in zip(grads, other_grads, strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-4)
    a, b = torch.randn(300, 500), torch.randn(500, 200)
    assert torch.allclose(a @ b, (a.double() @ b.double()).float(), atol=1e-3)  # bf16: 0.1


def test_products_that_would_be_rounded_are_turned_down(model, plain_products, monkeypatch):
    """As on a processor with matrix units for bf16, where "medium" means what it says."""

    def product(a, b):
        rounded = a.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium"
        return torch.matmul(*(x.bfloat16().float() if rounded else x for x in (a, b)))

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    monkeypatch.setattr(models, "fast_products", models.fast_products.__wrapped__)
    models.quicken(model, "cpu")
    assert torch.get_float32_matmul_precision() == "highest"
    assert model.config._attn_implementation == "sdpa"
