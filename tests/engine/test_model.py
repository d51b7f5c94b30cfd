"""Fast products on a CPU: the same numbers, turned down where they would be rounded. Shared keys without copies."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import make_groups, tiny
from transformers import AttentionInterface
from transformers.integrations import sdpa_attention

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


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("size", [8, 16])
def test_a_few_queries_share_keys_as_if_each_head_had_its_copy(width, size, monkeypatch):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, width, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, size)
    mask = torch.zeros(2, 1, width, 20).masked_fill(torch.rand(2, 1, width, 20) < 0.4, -torch.inf)
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    scores = torch.einsum("nhwd,nhld->nhwl", query, key.repeat_interleave(3, 1)) * 0.3 + mask
    expected = torch.einsum("nhwl,nhld->nwhd", scores.softmax(-1), value.repeat_interleave(3, 1))
    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda *_: 1 / 0)
    with torch.no_grad():
        found, _ = AttentionInterface()["sdpa"](module, query, key, value, mask, scaling=0.3, dropout=0.0)
    assert found.shape == (2, width, 6, size) and torch.allclose(found, expected, atol=1e-5)


def test_no_key_is_copied_while_a_model_with_grouped_queries_is_sampled_from(monkeypatch):
    model = tiny("qwen2")
    model.set_attn_implementation("sdpa")
    lengths, repeat = [], sdpa_attention.repeat_kv
    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda x, g: lengths.append(x.shape[2]) or repeat(x, g))
    fast.packed_sample(model, [[3, 4, 5] * 9, [7]], 4, 6, [], 0.0)
    assert set(lengths) <= {27}  # the prompt's own pass
