"""Equations and traps of the on-policy half, each against a hand-worked number or a naive implementation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import SIZES, tiny
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
import run
import sampling


def make_groups(model, prompts=((3, 4), (5, 6, 7, 8, 9)), temperature=1.0, seed=0, group_size=3, max_new=6, stops=(2,)):
    generator = torch.Generator().manual_seed(seed)
    ids, mask, old = grpo.sample(model, prompts, group_size, max_new, list(stops), temperature, generator)
    rewards = torch.rand(len(prompts), group_size, generator=generator)
    advantages = grpo.group_advantages(rewards)
    return [
        grpo.RolloutGroup(n, torch.tensor(p), ids[n], mask[n], old[n], None, rewards[n], advantages[n], 1)
        for n, p in enumerate(prompts)
    ]


def naive_logprobs(model, prompt, response, temperature):
    """One unpadded row at a time, one full forward, a Python loop over tokens."""
    logits = model(torch.tensor([list(prompt) + list(response)])).logits[0]
    out = []
    for t, token in enumerate(response):
        row = logits[len(prompt) + t - 1] / temperature
        out.append(row[token] - torch.logsumexp(row, 0))
    return torch.stack(out)


# --- advantages, KL, loss --------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    # mean 0.5, deviations ±0.5, sample variance 4·0.25/3, so std = 0.57735 and Â = ±0.86602 (less 1e-6's trace)
    got = grpo.group_advantages(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    assert torch.allclose(got, torch.tensor([[-0.866024, -0.866024, 0.866024, 0.866024]]), atol=1e-5)
    got = grpo.group_advantages(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), unbiased=False)
    assert torch.allclose(got, torch.tensor([[-1.0, -1.0, 1.0, 1.0]]), atol=1e-5)


def test_seven_ones_and_a_half():
    got = grpo.group_advantages(torch.tensor([[1.0] * 7 + [0.5]]))[0]
    assert got[0] == pytest.approx(0.354, abs=1e-3) and got[-1] == pytest.approx(-2.475, abs=1e-3)
    assert (got**2).sum() == pytest.approx(7, abs=1e-3)  # Σ Â² = G − 1 for any unequal group


@pytest.mark.parametrize("value", [0.0, 0.1, 0.5, 2 / 3, 1.0])
def test_equal_rewards_give_exactly_zero(value):
    assert (grpo.group_advantages(torch.full((2, 7), value)) == 0).all()


def test_a_group_of_one_is_an_error():
    with pytest.raises(ValueError, match="at least 2"):
        grpo.group_advantages(torch.ones(4, 1))


def test_k3_by_hand():
    log_p, log_ref = torch.log(torch.tensor([0.5, 0.25])), torch.log(torch.tensor([0.25, 0.5]))
    # Δ = −ln 2 and ln 2: 0.5 + 0.6931 − 1 and 2 − 0.6931 − 1
    assert torch.allclose(grpo.k3(log_p, log_ref), torch.tensor([0.193147, 0.306853]), atol=1e-6)
    assert (grpo.k3(log_p, log_p) == 0).all()
    assert grpo.k3(torch.tensor(-30.0), torch.tensor(0.0)) == 10  # clamped


def test_k3_is_unbiased_for_the_kl_of_its_sampler():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    expected = (p * grpo.k3(p.log(), q.log())).sum()
    assert expected.item() == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-6)


def test_policy_gradient_is_eq_3():
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    advantages = torch.tensor([[2.0], [-1.0]])
    loss = grpo.policy_gradient_loss(logprobs, advantages)
    assert torch.equal(loss.detach(), torch.tensor([[-2.0, -2.0], [1.0, 1.0]]))  # value −Â
    loss.sum().backward()
    assert torch.equal(logprobs.grad, torch.tensor([[-2.0, -2.0], [1.0, 1.0]]))  # gradient −Â ∇log π


def test_token_weights_by_hand():
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    assert torch.allclose(grpo.token_weights(mask, "sequence", 2, 6)[:, 0], torch.tensor([1 / 8, 1 / 4]))
    assert torch.allclose(grpo.token_weights(mask, "token", 2, 6)[:, 0], torch.tensor([1 / 6, 1 / 6]))
    assert torch.allclose(grpo.token_weights(mask, "sum", 2, 6)[:, 0], torch.tensor([1 / 2, 1 / 2]))
    for norm in ("sequence", "token", "sum"):
        assert (grpo.token_weights(mask, norm, 2, 6)[1, 2:] == 0).all()


# --- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.9])
def test_logprobs_equal_a_naive_forward(any_model, temperature):
    groups = make_groups(any_model, temperature=temperature)
    batch = grpo.collate(groups, "cpu")
    with torch.no_grad():
        shared = grpo.response_logprobs(any_model, batch, temperature)
        plain = grpo.plain_response_logprobs(any_model, batch, temperature)
        rows = [(g.prompt_ids.tolist(), r[m].tolist(), o[m]) for g in groups
                for r, m, o in zip(g.response_ids, g.mask, g.old_logprobs, strict=True)]  # fmt: skip
        for i, (prompt, response, old) in enumerate(rows):
            naive = naive_logprobs(any_model, prompt, response, temperature)
            for got in (shared[i, : len(response)], plain[i, : len(response)], old):
                assert torch.allclose(got, naive, atol=1e-5)


def test_shared_prompt_gradients_equal_plain_ones(any_model):
    groups = make_groups(any_model)
    other = copy.deepcopy(any_model)
    for model, logprobs_of in ((any_model, grpo.response_logprobs), (other, grpo.plain_response_logprobs)):
        batch = grpo.collate(groups, "cpu")
        (logprobs_of(model, batch, 1.0) * batch.mask * batch.advantages).sum().backward()
    for a, b in zip(any_model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_chunked_logprobs_and_gradients_equal_plain_ones(any_model, monkeypatch, chunk):
    monkeypatch.setattr(grpo, "CHUNK", chunk)
    assert grpo.shares(any_model)
    test_shared_prompt_gradients_equal_plain_ones(any_model)


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
        logprobs = grpo.response_logprobs(model, batch, 1.0)
        (logprobs * batch.mask * batch.advantages).sum().backward()
        found.append((logprobs[batch.mask], [p.grad for p in model.parameters()]))
        run.fast_products.__wrapped__()
        run.quicken(other, "cpu")
    assert any_model.config._attn_implementation == "sdpa"
    assert other.config._attn_implementation == ("eager" if run.fast_products() else "sdpa")
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
    monkeypatch.setattr(run, "fast_products", run.fast_products.__wrapped__)
    run.quicken(model, "cpu")
    assert torch.get_float32_matmul_precision() == "highest"
    assert model.config._attn_implementation == "sdpa"


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
    monkeypatch.setattr(grpo, "CHUNK", 8)
    batch = grpo.collate(make_groups(model, max_new=20, stops=(39,)), "cpu")
    n_rows, longest = batch.mask.shape
    seen = {}
    for logprobs_of in (grpo.response_logprobs, grpo.plain_response_logprobs):
        grpo.shares(model)
        with LongestLogits(40) as watch:
            (logprobs_of(model, batch, 1.0) * batch.mask).sum().backward()
        seen[logprobs_of] = watch.positions
    assert seen[grpo.response_logprobs] == max(8, model.config.hidden_size)  # the latter: the head, transposed
    assert seen[grpo.plain_response_logprobs] >= n_rows * longest


@pytest.mark.parametrize("way", [grpo.shared_response_logprobs, grpo.packed_response_logprobs])
def test_the_head_sees_each_sampled_token_once(any_model, way):
    batch, seen = grpo.collate(make_groups(any_model), "cpu"), []
    any_model.get_output_embeddings().register_forward_hook(lambda head, args, out: seen.append(out[..., 0].numel()))
    with torch.no_grad():
        way(any_model, batch, 1.0)
    assert sum(seen) == batch.mask.sum()


def test_a_row_does_not_depend_on_its_batch(any_model):
    groups = make_groups(any_model)
    with torch.no_grad():
        together = grpo.response_logprobs(any_model, grpo.collate(groups, "cpu"), 1.0)
        alone = grpo.response_logprobs(any_model, grpo.collate(groups[:1], "cpu"), 1.0)
    mask = groups[0].mask
    assert torch.allclose(together[:3, : mask.shape[1]][mask], alone[mask], atol=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 30, 10_000])
@pytest.mark.parametrize("norm", ["sequence", "token", "sum"])
def test_loss_and_gradient_do_not_depend_on_the_split(model, norm, max_tokens):
    groups = make_groups(model, prompts=((3, 4), (5, 6, 7, 8, 9), (8,), (4, 4, 4)))
    grpo.add_reference(tiny("llama"), groups, 1.0, 30)
    counts = dict(n_responses=12, n_tokens=sum(int(g.mask.sum()) for g in groups), loss_norm=norm, temperature=1.0)

    def token_loss(batch, logprobs):
        return grpo.policy_gradient_loss(logprobs, batch.advantages) + 0.1 * grpo.k3(logprobs, batch.ref_logprobs - 0.3)

    value = grpo.accumulate_gradient(model, groups, token_loss, max_tokens=max_tokens, **counts)
    # the same by one row at a time
    other, total = tiny("llama"), 0.0
    for group in groups:
        for i in range(3):
            tokens = group.response_ids[i][group.mask[i]].tolist()
            log_p = naive_logprobs(other, group.prompt_ids.tolist(), tokens, 1.0)
            delta = group.ref_logprobs[i][group.mask[i]] - 0.3 - log_p
            per_token = -group.advantages[i] * (log_p - log_p.detach() + 1) + 0.1 * (delta.exp() - delta - 1)
            weight = {"sequence": 1 / 12 / len(tokens), "token": 1 / counts["n_tokens"], "sum": 1 / 12}[norm]
            total = total + weight * per_token.sum()
    total.backward()
    assert value == pytest.approx(total.item(), abs=1e-5)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=2e-5, rtol=1e-3)


def test_micro_batches_hold_every_group_once_and_the_budget(model):
    groups = make_groups(model, prompts=[tuple(range(3, 3 + n)) for n in (1, 9, 4, 2, 7)])
    parts = grpo.micro_batches(groups, 60)
    assert sorted(g.query for part in parts for g in part) == [0, 1, 2, 3, 4]
    for part in parts:
        width = max(len(g.prompt_ids) + g.mask.numel() for g in part)
        assert len(part) == 1 or len(part) * width <= 60


# --- sampling and its traps ------------------------------------------------------------------------------------------


def test_mask_comes_from_generated_length_not_from_token_ids(model):
    """Pad = EOS = 0 here, and the stop token's own log-probability is trained."""
    ids, mask, logprobs = grpo.sample(model, [[3, 4]] * 4, 8, 12, [0], 1.0, torch.Generator().manual_seed(1))
    lengths = mask.sum(-1)
    assert (lengths > 0).all() and len(lengths.unique()) > 1
    for row, keep, log_p in zip(ids.flatten(0, 1), mask.flatten(0, 1), logprobs.flatten(0, 1), strict=True):
        n = int(keep.sum())
        assert keep[:n].all() and not keep[n:].any()
        assert (row[: n - 1] != 0).all()
        assert n == len(row) or row[n - 1] == 0  # the stop token is inside the mask
        assert (log_p[:n] < 0).all()


def test_several_stop_ids(model):
    ids, mask, _ = grpo.sample(model, [[3, 4]], 64, 12, [2, 5, 7], 1.0, torch.Generator().manual_seed(0))
    last = {int(row[keep][-1]) for row, keep in zip(ids[0], mask[0], strict=True) if not keep.all()}
    assert len(last) > 1 and last <= {2, 5, 7}


def test_greedy_equals_generate_and_ignores_padding(any_model):
    prompts = [[3, 4, 5], [6], [7, 8, 9, 10, 11]]
    ids, mask, _ = grpo.sample(any_model, prompts, 1, 8, [2], 0.0)
    for n, prompt in enumerate(prompts):
        out = any_model.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0
        )
        assert ids[n, 0][mask[n, 0]].tolist() == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("group_size", [1, 3, 8])
def test_the_packed_sampler_draws_what_the_plain_one_draws(any_model, group_size, temperature):
    """Also when responses end early and those left are moved together, on prompts of mixed length."""
    prompts = [[3, 4], [5, 6, 7, 8, 9], [8], [4, 4, 4], [9, 9], [3, 3, 3, 3, 3, 3]]
    for stops in ([], [2], list(range(2, 12)), list(range(2, 30))):
        packed, plain = (
            sample(any_model, prompts, group_size, 20, stops, temperature, torch.Generator().manual_seed(1))
            for sample in (sampling.packed_sample, sampling.plain_sample)
        )
        assert torch.equal(packed[0], plain[0]) and torch.equal(packed[1], plain[1])
        assert torch.allclose(packed[2], plain[2], atol=1e-5)


def test_moving_together_keeps_every_open_response_once_beside_its_prompt():
    rng = torch.Generator().manual_seed(0)
    for share in (0.1, 0.3, 0.6):
        owner = torch.arange(40).view(5, 8).masked_fill(torch.rand(5, 8, generator=rng) > share, 40)
        rows, places, new = sampling.closer(owner, 40)
        left = new[new < 40]
        assert sorted(left.tolist()) == sorted(owner[owner < 40].tolist())
        assert new.numel() <= 1.25 * len(left)
        assert torch.equal(owner[rows[:, None], places][new < 40], left)
        assert (new // 8 == rows[:, None])[new < 40].all()  # 8 responses to a prompt


TINY = dict(
    vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, **SIZES,
)  # fmt: skip
BLOOM = dict(vocab_size=40, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3, **SIZES)
ODD = {  # architecture → (what makes it, whether it packs, whether it shares)
    "window": (lambda: MistralForCausalLM(MistralConfig(**TINY, sliding_window=4)), False, True),
    "no position_ids": (lambda: BloomForCausalLM(BloomConfig(**BLOOM)), False, True),
    "logit_scale": (lambda: CohereForCausalLM(CohereConfig(**TINY, logit_scale=0.25)), True, False),
    "logits_scaling": (lambda: GraniteForCausalLM(GraniteConfig(**TINY, logits_scaling=4.0)), True, False),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_model_that_cannot_takes_the_plain_way(kind):
    make, packs, shares = ODD[kind]
    torch.manual_seed(0)
    model = make().eval()
    before = torch.get_rng_state()
    assert (sampling.packs(model), grpo.shares(model)) == (packs, shares)
    assert torch.equal(torch.get_rng_state(), before)  # trying takes nothing from the global generator
    test_logprobs_equal_a_naive_forward(model, 0.7)
    test_shared_prompt_gradients_equal_plain_ones(model)


def test_sampling_follows_the_models_distribution(model):
    """Chi-square of 8,000 two-token responses against the exact probabilities, at a temperature other than 1."""
    from scipy.stats import chisquare

    small = tiny("llama", vocab=6)
    ids, mask, _ = grpo.sample(small, [[3, 4]], 8000, 2, [2], 0.8, torch.Generator().manual_seed(3))
    with torch.no_grad():
        first = F.softmax(small(torch.tensor([[3, 4]])).logits[0, -1] / 0.8, -1)
        then = F.softmax(small(torch.tensor([[3, 4, a] for a in range(6)])).logits[:, -1] / 0.8, -1)
    expected, counted = [], []
    for a in range(6):
        for b in range(6) if a != 2 else [0]:
            expected.append(first[a] if a == 2 else first[a] * then[a, b])
            counted.append(((ids[0, :, 0] == a) & ((ids[0, :, 1] == b) | (a == 2))).sum())
    expected, counted = torch.stack(expected), torch.stack(counted)
    assert expected.sum().item() == pytest.approx(1, abs=1e-5)
    large = expected * 8000 > 5
    observed = torch.cat([counted[large], counted[~large].sum()[None]]).double()
    wanted = torch.cat([expected[large], expected[~large].sum()[None]]).double() * 8000
    assert chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-3
    assert not mask[0, :, 1][ids[0, :, 0] == 2].any()


def test_the_same_generator_gives_the_same_rollouts(model):
    first, second = (make_groups(model, seed=5) for _ in range(2))
    assert all(torch.equal(a.response_ids, b.response_ids) for a, b in zip(first, second, strict=True))
    assert not torch.equal(make_groups(model, seed=6)[0].response_ids[:, :1], first[0].response_ids[:, :1])


def test_collate_keeps_padding_out(model):
    groups = make_groups(model)
    batch = grpo.collate(groups, "cpu")
    assert batch.prompt_ids.shape == (2, 5) and batch.prompt_mask[0].tolist() == [False] * 3 + [True] * 2
    assert batch.response_ids.shape == batch.mask.shape == batch.old_logprobs.shape
    assert batch.ref_logprobs is None and batch.advantages.shape == (6, 1)
    assert grpo.positions(batch.prompt_mask)[0].tolist() == [0, 0, 0, 0, 1]
