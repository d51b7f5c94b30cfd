"""Appendix B: every loss against a naive one written token by token, and what each method adds up."""

import math

import pytest
import torch

from baselines import METHODS, losses
from config import Config

B, L, V = 4, 7, 11
LENGTHS = [(2, 3), (3, 4), (1, 1), (2, 5)]  # prompt and response tokens of each row; the rest is padding


@pytest.fixture
def batch():
    """Logits of u and o (B, L, V) with ids (B, L) and mask (B, L − 1) of what is predicted and counted."""
    rng = torch.Generator().manual_seed(3)
    logits, other = (torch.randn(B, L, V, generator=rng) for _ in range(2))
    ids = torch.randint(V, (B, L), generator=rng)
    mask = torch.zeros(B, L - 1, dtype=torch.bool)
    for row, (prompt, response) in zip(mask, LENGTHS, strict=True):
        row[prompt - 1 : prompt + response - 1] = True
    return logits.requires_grad_(), other, ids, mask


def logprobs_of(logits, ids):
    return torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]


def tokens(logits, ids):
    """Naive: for each row the list of log p of its response tokens, one softmax at a time."""
    rows = []
    for b, (prompt, response) in enumerate(LENGTHS):
        row = []
        for t in range(prompt, prompt + response):
            scores = logits[b, t - 1]
            row.append(scores[ids[b, t]] - torch.log(sum(torch.exp(s) for s in scores)))
        rows.append(row)
    return rows


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def naive(name, logits, other, ids):
    u, o = tokens(logits, ids), tokens(other, ids)
    flat_u = [x for row in u for x in row]
    ratios = [sum(a) - sum(b) for a, b in zip(u, o, strict=True)]
    if name == "ce":
        return -sum(flat_u) / len(flat_u)
    if name == "ga":
        return sum(flat_u) / len(flat_u)
    if name == "npo":
        return sum(-2 / 0.1 * torch.log(sigmoid(-0.1 * r)) for r in ratios) / B
    if name == "simnpo":
        return sum(-2 / 4.5 * torch.log(sigmoid(-4.5 / len(row) * sum(row) - 0.3)) for row in u) / B
    if name == "probability":
        return [sum(torch.exp(x) for x in row) / len(row) for row in u]
    total, count = 0.0, 0  # klr
    for b, (prompt, response) in enumerate(LENGTHS):
        for t in range(prompt, prompt + response):
            p, q = (torch.softmax(x[b, t - 1], -1) for x in (other, logits))
            total, count = total + sum(p[v] * (p[v].log() - q[v].log()) for v in range(V)), count + 1
    return total / count


def same(ours, theirs, logits):
    """Values and gradients to 1e-5, and no gradient where nothing is predicted."""
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    mine, naive_one = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (ours, theirs))
    assert torch.allclose(mine, naive_one, atol=1e-5)
    for b, (prompt, response) in enumerate(LENGTHS):
        assert not mine[b, : prompt - 1].any() and not mine[b, prompt + response - 1 :].any()
        assert mine[b, prompt - 1].any()


def test_cross_entropy_and_ga(batch):
    logits, other, ids, mask = batch
    same(losses.cross_entropy(logprobs_of(logits, ids), mask), naive("ce", logits, other, ids), logits)
    same(losses.ga(logprobs_of(logits, ids), mask), naive("ga", logits, other, ids), logits)


def test_klr(batch):
    logits, other, ids, mask = batch
    same(losses.klr(logits[:, :-1][mask], other[:, :-1][mask]), naive("klr", logits, other, ids), logits)
    assert losses.klr(other[:, :-1][mask], other[:, :-1][mask]).item() == pytest.approx(0, abs=1e-6)


def test_npo(batch):
    logits, other, ids, mask = batch
    ratio = losses.log_ratio(logprobs_of(logits, ids), logprobs_of(other, ids), mask)
    same(losses.npo(ratio, 0.1), naive("npo", logits, other, ids), logits)


def test_the_gradient_of_npo_tends_to_that_of_ascent_on_summed_logprobs(batch):
    logits, other, ids, mask = batch
    ratio = losses.log_ratio(logprobs_of(logits, ids), logprobs_of(other, ids), mask)
    summed = (logprobs_of(logits, ids) * mask).sum(-1).mean()
    ascent, *npo = (
        torch.autograd.grad(x, logits, retain_graph=True)[0]
        for x in (summed, losses.npo(ratio, 1e-4), losses.npo(ratio, 1.0))
    )
    assert torch.allclose(npo[0], ascent, atol=1e-4) and not torch.allclose(npo[1], ascent, atol=1e-2)
    assert abs(losses.npo(ratio, 1e-4).item() - summed.item()) > 1  # its value does not


def test_simnpo(batch):
    logits, other, ids, mask = batch
    same(losses.simnpo(logprobs_of(logits, ids), mask, 4.5, 0.3), naive("simnpo", logits, other, ids), logits)


def test_dpo_by_hand():
    # log-ratios 1 and −2 of refusals, 0.5 and 0 of answers: margins 0.5 and −2, β 0.1
    loss = losses.dpo(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.0]), 0.1)
    expected = -20 * (math.log(1 / (1 + math.exp(-0.05))) + math.log(1 / (1 + math.exp(0.2)))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    refusal, forget = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    losses.dpo(refusal, forget, 0.1).backward()  # −(2/β)·β·σ(0)/n = −1/2: refusals rise, answers fall
    assert refusal.grad.tolist() == pytest.approx([-0.5, -0.5]) and forget.grad.tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(
    "divergence, term",
    [
        ("pearson", lambda f, s: f * f / 4 + f - s),
        ("kl", lambda f, s: math.exp(f - 1) - s),
        ("tv", lambda f, s: math.tanh(f) / 2 - math.tanh(s) / 2),
    ],
)
def test_flat(batch, divergence, term):
    logits, other, ids, mask = batch
    forget = losses.mean_probability(logprobs_of(logits, ids), mask)
    assert forget.tolist() == pytest.approx([p.item() for p in naive("probability", logits, other, ids)], abs=1e-6)
    safe = torch.tensor([0.1, 0.5, 0.9, 0.3])
    expected = sum(term(f, s) for f, s in zip(forget.tolist(), safe.tolist(), strict=True)) / B
    assert losses.flat(forget, safe, divergence).item() == pytest.approx(expected, abs=1e-6)


def test_sga_llmu_and_task_vector_by_hand():
    forget, normal = torch.tensor(2.0), [torch.tensor(1.0), torch.tensor(4.0), torch.tensor(1.0)]
    assert losses.sga(forget, normal, 0.4).item() == pytest.approx(-0.6 * 2 + 0.4 / 3 * 6)
    assert losses.sga(forget, normal, 0.0).item() == -2.0  # r = 0: GA
    assert losses.llmu(torch.tensor(-2.0), torch.tensor(3.0), 0.5, 1.0).item() == 2.0
    moved = losses.task_vector(torch.tensor([1.0, 2.0]), torch.tensor([1.5, 1.0]), 2.0)
    assert moved.tolist() == [0.0, 4.0]


def test_whp_lowers_only_what_the_reinforced_model_raised():
    v_o, v_r = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 1.0, 3.5])
    assert losses.interpolate(v_o, v_r, 2.0).tolist() == [-1.0, 2.0, 2.0]


# --- what each method adds up ----------------------------------------------------------------------------------------

SCORES = {"forget": -1.0, "refusal": -2.0, "random": -3.0, "retain": -0.25, "normal 0": -1.5, "normal 1": -0.5}


def fake(kind, who="u", logits=False):
    """One row of two tokens; every token of a kind has the log-probability above, of o half of it."""
    if logits:
        return torch.tensor([[0.0, 1.0]]) if who == "o" else torch.tensor([[0.0, 0.0]])
    value = SCORES[kind] / (2 if who == "o" else 1)
    return torch.full((1, 2), value), torch.ones(1, 2, dtype=torch.bool)


def test_every_method_is_the_sum_that_its_equation_says():
    ce = {kind: -value for kind, value in SCORES.items()}
    kl = math.log(0.5) * -1 - (-sum(p * math.log(p) for p in (1 / (1 + math.e), math.e / (1 + math.e))))
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    npo = 20 * softplus(0.1 * (SCORES["forget"] * 2 - SCORES["forget"]))
    dpo = 20 * softplus(-0.1 * (SCORES["refusal"] - SCORES["forget"]))
    simnpo = 0.125 * 2 / 4.5 * softplus(4.5 * SCORES["forget"])
    p_f, p_s = math.exp(SCORES["forget"]), math.exp(SCORES["refusal"])
    expected = {
        "ga": -ce["forget"], "gd": -ce["forget"] + ce["retain"], "kl": -ce["forget"] + kl,
        "po": ce["refusal"] + ce["retain"], "dpo": dpo, "dpo_rt": dpo + ce["retain"],
        "npo": npo, "npo_gdr": npo + ce["retain"], "npo_klr": npo + kl,
        "simnpo": simnpo, "simnpo_gdr": simnpo + ce["retain"], "simnpo_klr": simnpo + kl,
        "mismatch": ce["random"] + ce["retain"], "llmu": -0.5 * ce["forget"] + ce["random"] + kl,
        "task_vector": ce["forget"], "whp": ce["forget"], "flat": p_f**2 / 4 + p_f - p_s,
        "sga": -0.6 * ce["forget"] + 0.2 * (ce["normal 0"] + ce["normal 1"]),
    }  # fmt: skip
    assert set(expected) == set(losses.RECIPES)
    for method, value in expected.items():
        found = losses.objective(method, fake, Config(sga_k=2)).item()
        assert found == pytest.approx(value, abs=1e-5), method


def test_weights_and_betas_are_flags():
    loss = lambda method, **flags: losses.objective(method, fake, Config(**flags)).item()  # noqa: E731
    assert loss("gd", forget_weight=3.0, retain_weight=2.0) == pytest.approx(-3 * 1.0 + 2 * 0.25)
    assert loss("llmu", llmu_weights=[0.0, 0.0, 2.0]) == pytest.approx(2 * loss("kl") + 2.0, abs=1e-5)
    assert loss("npo", beta=0.5) != pytest.approx(loss("npo")) and loss("simnpo", gamma=1.0) != loss("simnpo")
    assert loss("flat", flat_divergence="tv") != loss("flat")


def test_every_named_method_is_trained_somewhere():
    assert set(METHODS) - {"purge", "rej_steer", "rule", "rerule"} == set(losses.RECIPES)
