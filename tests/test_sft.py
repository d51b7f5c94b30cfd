"""Stage 1's batches, its loss and its learning rate, against hand-worked numbers."""

import math

import pytest
import torch
import transformers

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
    logits, answers = torch.randn(7, 12), [7, 2, 9, 4, 3, 2, 2]
    terms = [-math.log(torch.softmax(row.double(), 0)[token]) for row, token in zip(logits, answers, strict=True)]
    assert sft.sft_loss(logits, torch.tensor(answers)).item() == pytest.approx(sum(terms) / 7, rel=1e-5)


SIZES = dict(vocab_size=12, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
    "gemma2": transformers.Gemma2Config(  # caps the logits after its head
        **SIZES, num_key_value_heads=1, head_dim=4, final_logit_softcapping=0.1, pad_token_id=0
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_of_a_batch_is_that_of_its_rows_one_by_one(name):
    """The head is asked for answer positions alone; what the model does to its logits afterwards still counts."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    rows = [([1, 5, 6], [7, 2]), ([1, 8], [9, 4, 3, 2]), ([1], [2])]
    terms, asked = [], []
    for prompt, answer in rows:
        logits = model(torch.tensor([prompt + answer])).logits[0].double()
        terms += [-torch.log_softmax(logits[len(prompt) + i - 1], 0)[token] for i, token in enumerate(answer)]
    hook = model.get_output_embeddings().register_forward_hook(lambda head, given, out: asked.append(out.shape[:2]))
    loss = sft.sft_loss_of(model, rows)
    assert loss.item() == pytest.approx((sum(terms) / 7).item(), rel=1e-5) and asked == [(1, 7)]
    (got,) = torch.autograd.grad(loss, model.get_input_embeddings().weight)
    (wanted,) = torch.autograd.grad(sum(terms) / 7, model.get_input_embeddings().weight)
    assert torch.allclose(got, wanted.float(), atol=1e-6)
    hook.remove()
    assert model(torch.tensor([[1, 5, 6]])).logits.shape == (1, 3, 12)  # as before


def test_learning_rate_by_hand():
    """Four steps of warm-up, then half a cosine over four: cos 45°, 90°, 135°, 180°."""
    rates = [sft.learning_rate(2.0, step, 8, 4, cosine=True) for step in range(1, 9)]
    half = math.sqrt(0.5)
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 1 + half, 1.0, 1 - half, 0.0])
    assert [sft.learning_rate(2.0, step, 8, 4, cosine=False) for step in (2, 4, 8)] == [1.0, 2.0, 2.0]
    assert sft.learning_rate(2.0, 1, 2, 0, cosine=True) == pytest.approx(1.0)
    assert sft.learning_rate(2.0, 1, 1, 0, cosine=True) == 2.0  # the only step trains
    assert sft.learning_rate(2.0, 3, 3, 3, cosine=True) == 2.0  # all of it warm-up: never divides by 0
