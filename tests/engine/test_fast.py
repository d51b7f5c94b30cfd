"""The fast ways against the plain ones: the same draws, log-probabilities and gradients; which is taken, and why."""

import copy

import pytest
import torch
from conftest import SIZES, drawing, make_groups, naive_logprobs, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import grpo
from engine import fast
from engine.process import Engine

FAST = [fast.shared_response_logprobs, fast.packed_response_logprobs]


def chosen(model, what="logprobs"):
    return fast.choose(model, what, {})


# --- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", FAST)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.9])
def test_fast_logprobs_equal_a_naive_forward(any_model, temperature, way):
    same_as_naive(any_model, temperature, way, fast.packed_sample)


def same_as_naive(model, temperature, way, sample):
    groups = make_groups(model, temperature=temperature, sample=sample)
    with torch.no_grad():
        found = way(model, grpo.collate(groups, "cpu"), temperature)
        rows = [(g.prompt_ids.tolist(), r[m].tolist(), o[m]) for g in groups
                for r, m, o in zip(g.response_ids, g.mask, g.old_logprobs, strict=True)]  # fmt: skip
        for i, (prompt, response, old) in enumerate(rows):
            naive = naive_logprobs(model, prompt, response, temperature)
            for got in (found[i, : len(response)], old):
                assert torch.allclose(got, naive, atol=1e-5)


@pytest.mark.parametrize("way", FAST)
def test_shared_prompt_gradients_equal_plain_ones(any_model, way):
    same_gradients(any_model, way)


def same_gradients(model, way):
    groups, other = make_groups(model), copy.deepcopy(model)
    for each, logprobs_of in ((model, way), (other, grpo.response_logprobs)):
        batch = grpo.collate(groups, "cpu")
        each.zero_grad()
        (logprobs_of(each, batch, 1.0) * batch.mask * batch.advantages).sum().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_chunked_logprobs_and_gradients_equal_plain_ones(any_model, monkeypatch, chunk):
    monkeypatch.setattr(fast, "CHUNK", chunk)
    assert chosen(any_model) is fast.shared_response_logprobs
    for way in FAST:
        same_gradients(any_model, way)


class LongestLogits(TorchDispatchMode):
    """The largest number of positions for which a tensor of the vocabulary's width exists at once."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.positions = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == self.vocabulary:
                self.positions = max(self.positions, tensor.numel() // self.vocabulary)
        return out


def test_logits_of_all_positions_never_exist_at_once(model, monkeypatch):
    monkeypatch.setattr(fast, "CHUNK", 8)
    batch = grpo.collate(make_groups(model, max_new=20, stops=(39,)), "cpu")
    n_rows, longest = batch.mask.shape
    assert chosen(model) is fast.shared_response_logprobs
    for way in (*FAST, grpo.response_logprobs):
        with LongestLogits(40) as watch:
            (way(model, batch, 1.0) * batch.mask).sum().backward()
        if way in FAST:
            assert watch.positions == max(8, model.config.hidden_size)  # the latter: the head, transposed
        else:
            assert watch.positions >= n_rows * longest


@pytest.mark.parametrize("way", FAST)
def test_the_head_sees_each_sampled_token_once(any_model, way):
    batch, seen = grpo.collate(make_groups(any_model), "cpu"), []
    any_model.get_output_embeddings().register_forward_hook(lambda head, args, out: seen.append(out[..., 0].numel()))
    with torch.no_grad():
        way(any_model, batch, 1.0)
    assert sum(seen) == batch.mask.sum()


@pytest.mark.parametrize("way", FAST)
def test_a_row_of_a_fast_way_does_not_depend_on_its_batch(any_model, way):
    groups = make_groups(any_model)
    with torch.no_grad():
        together, alone = (way(any_model, grpo.collate(part, "cpu"), 1.0) for part in (groups, groups[:1]))
    mask = groups[0].mask
    assert torch.allclose(together[:3, : mask.shape[1]][mask], alone[mask], atol=1e-5)


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("group_size", [1, 3, 8])
def test_the_packed_sampler_draws_what_the_plain_one_draws(any_model, group_size, temperature):
    """Also when responses end early and those left are moved together, on prompts of mixed length."""
    prompts = [[3, 4], [5, 6, 7, 8, 9], [8], [4, 4, 4], [9, 9], [3, 3, 3, 3, 3, 3]]
    for stops in ([], [2], list(range(2, 12)), list(range(2, 30))):
        packed, plain = (
            sample(any_model, prompts, group_size, 20, stops, temperature, drawing(6 * group_size, 1))
            for sample in (fast.packed_sample, grpo.sample)
        )
        assert torch.equal(packed[0], plain[0]) and torch.equal(packed[1], plain[1])
        assert torch.allclose(packed[2], plain[2], atol=1e-5)


def test_moving_together_keeps_every_open_response_once_beside_its_prompt():
    rng = torch.Generator().manual_seed(0)
    for share in (0.1, 0.3, 0.6):
        owner = torch.arange(40).view(5, 8).masked_fill(torch.rand(5, 8, generator=rng) > share, 40)
        rows, places, new = fast.move_together(owner, 40)
        left = new[new < 40]
        assert sorted(left.tolist()) == sorted(owner[owner < 40].tolist())
        assert new.numel() <= 1.25 * len(left)
        assert torch.equal(owner[rows[:, None], places][new < 40], left)
        assert (new // 8 == rows[:, None])[new < 40].all()  # 8 responses to a prompt


# --- which way -------------------------------------------------------------------------------------------------------

TINY = dict(
    vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, **SIZES,
)  # fmt: skip
BLOOM = dict(vocab_size=40, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3, **SIZES)
WINDOW = "packed_sample fails (TypeError: DynamicSlidingWindowLayer keeps more, or less, than every key in order)"
DIFFERS = "shared_response_logprobs differs by "
ODD = {  # architecture → (what makes it, why it does not pack, why it does not share; "": it does)
    "window": (lambda: MistralForCausalLM(MistralConfig(**TINY, sliding_window=4)), WINDOW, ""),
    "no position_ids": (lambda: BloomForCausalLM(BloomConfig(**BLOOM)), "packed_sample fails (", ""),
    "logit_scale": (lambda: CohereForCausalLM(CohereConfig(**TINY, logit_scale=0.25)), "", DIFFERS),
    "logits_scaling": (lambda: GraniteForCausalLM(GraniteConfig(**TINY, logits_scaling=4.0)), "", DIFFERS),
}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_model_that_can_takes_the_fast_ways(kind):
    model = tiny(kind)
    assert chosen(model, "sample") is fast.packed_sample and chosen(model) is fast.shared_response_logprobs
    fast.checkpoint_layers(model)
    assert chosen(model) is fast.packed_response_logprobs
    with torch.no_grad():  # nothing is computed twice then
        assert chosen(model) is fast.shared_response_logprobs


@pytest.mark.parametrize("kind", ODD)
def test_a_model_that_cannot_takes_the_plain_way(kind):
    """And says why; the way that it takes gives its own numbers."""
    make, unpacked, unshared = ODD[kind]
    torch.manual_seed(0)
    model, told = make().eval(), {}
    before = torch.get_rng_state()
    sample, way = fast.choose(model, "sample", told), fast.choose(model, "logprobs", told)
    assert sample is (grpo.sample if unpacked else fast.packed_sample)
    assert way is (grpo.response_logprobs if unshared else fast.shared_response_logprobs)
    assert torch.equal(torch.get_rng_state(), before)  # trying takes nothing from the global generator
    name = type(model).__name__
    assert list(told) == [f"sample, {name}", f"logprobs, {name}"]
    for line, plain, quick, why in zip(
        told.values(), ("sample", "response_logprobs"), ("packed_sample", "shared_response_logprobs"),
        (unpacked, unshared), strict=True,
    ):  # fmt: skip
        assert line.startswith(f"{plain}: {why}") if why else line == f"{quick}: gives the plain numbers"
        assert why != DIFFERS or line.endswith(" nats a token")
    same_as_naive(model, 0.7, way, sample)
    same_gradients(model, way)


def test_a_choice_and_its_reason_are_printed_once_however_many_models_take_it(capsys):
    told, line = {}, "packed_sample: gives the plain numbers"
    first, second = tiny("llama"), tiny("llama")
    for model in (first, first, second):
        assert fast.choose(model, "sample", told) is fast.packed_sample
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == f"sample, LlamaForCausalLM: {line}\n"
    assert told == {"sample, LlamaForCausalLM": line}
    fast.choose(first, "logprobs", told)
    fast.choose(tiny("gpt2"), "sample", told)
    assert list(told) == ["sample, LlamaForCausalLM", "logprobs, LlamaForCausalLM", "sample, GPT2LMHeadModel"]
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_way_is_tried_once_for_each_model(model, monkeypatch):
    tried, attempt = [], fast.attempt_sample
    monkeypatch.setitem(fast.WAYS, "sample", (*fast.WAYS["sample"][:2], lambda *a: tried.append(0) or attempt(*a)))
    for _ in range(3):
        chosen(model, "sample")
    assert len(tried) == 1


@pytest.mark.parametrize(
    "what, broken, why",
    [
        ("sample", lambda *_: 1 / 0, "fails (ZeroDivisionError: division by zero)"),
        ("sample", lambda model, prompts, *how: grpo.sample(model, prompts[::-1], *how), "differs by 0."),
        ("sample", lambda *how: [part + 1 for part in grpo.sample(*how)], "differs by inf nats"),
        ("logprobs", lambda *how: 1 / 0, "fails (ZeroDivisionError: division by zero)"),
        ("logprobs", lambda model, batch, t: grpo.response_logprobs(model, batch, t) + 0.25, "differs by 0.25 nats"),
    ],
)
def test_a_way_that_fails_or_differs_tells_why_and_is_not_taken(model, monkeypatch, capsys, what, broken, why):
    told, (_, plain, attempt) = {}, fast.WAYS[what]
    broken.__name__ = "broken"
    monkeypatch.setitem(fast.WAYS, what, (broken, plain, attempt))
    assert fast.choose(model, what, told) is plain
    (line,) = told.values()
    assert line.startswith(f"{plain.__name__}: broken {why}") and line in capsys.readouterr().err


# --- layers computed twice -------------------------------------------------------------------------------------------


def test_the_packed_way_is_the_plain_one_and_can_be_computed_twice(any_model):
    batch = grpo.collate(make_groups(any_model, prompts=((3, 4), (5, 6, 7), (8,))), "cpu")
    twice = Engine("cpu").logprobs(1.3)
    weight = torch.randn(batch.mask.shape) * batch.mask
    found = []
    for way in (grpo.response_logprobs, fast.packed_response_logprobs, "twice"):
        if way == "twice":
            fast.checkpoint_layers(any_model)
            assert chosen(any_model) is fast.packed_response_logprobs
        any_model.zero_grad()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t.numel()), t)[1], lambda t: t):
            logprobs = twice(any_model, batch) if way == "twice" else way(any_model, batch, 1.3)
        (logprobs * weight).sum().backward()
        found.append((logprobs[batch.mask], [p.grad.clone() for p in any_model.parameters()], sum(kept)))
    for logprobs, gradients, _ in found[1:]:
        assert torch.allclose(logprobs, found[0][0], atol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(gradients, found[0][1], strict=True))
    assert found[2][2] < 0.5 * found[1][2]  # checkpointing keeps less
    assert not any(module.training for module in any_model.modules())


def test_layers_are_in_training_mode_only_while_they_are_computed_twice(model):
    fast.checkpoint_layers(model)
    layers = fast.blocks(model)
    with fast.checkpointing(model):
        assert len(layers) == 2 and all(layer.training for layer in layers)
        assert not any(part.training for layer in layers for part in layer.children())  # dropout sleeps
    with torch.no_grad(), fast.checkpointing(model):
        assert not any(layer.training for layer in layers)
    assert not any(module.training for module in model.modules())
