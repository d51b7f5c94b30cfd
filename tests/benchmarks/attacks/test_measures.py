"""Measures of attacks: each against a number worked by hand and a plain computation of another kind, and its errors."""

import itertools
import math
import random
import zlib

import numpy as np
import pytest
import torch
from scipy.stats import norm, rankdata

from benchmarks.attacks import measures

INF, NAN = math.inf, math.nan


def close(value, tolerance=1e-12):
    return pytest.approx(value, abs=tolerance, rel=tolerance)


# --- many samples ----------------------------------------------------------------------------------------------------


def test_best_of_k_by_hand():
    assert measures.best_of_k([0.5, 1.0, 0.0], 2) == close(2.5 / 3)  # three pairs: 0.5, 1, 1
    assert measures.best_of_k([0.0, 0.0, 0.0, 1.0], 2) == 0.5  # the one leak is among two of four in half of the pairs


@pytest.mark.parametrize("n", range(1, 8))
def test_best_of_k_is_the_mean_over_all_subsets(n):
    rng = random.Random(n)
    for scores in ([rng.gauss(0, 3) for _ in range(n)], [rng.randrange(3) / 2 for _ in range(n)]):
        for k in range(1, n + 1):
            best = [max(subset) for subset in itertools.combinations(scores, k)]
            assert measures.best_of_k(scores, k) == close(sum(best) / len(best))


def test_best_of_k_is_unbiased_for_the_best_of_k_fresh_samples():
    values = (0.0, 0.25, 1.0)
    for k in (1, 2, 3, 4):
        found = [measures.best_of_k(sample, k) for sample in itertools.product(values, repeat=4)]
        fresh = [max(sample) for sample in itertools.product(values, repeat=k)]
        assert np.mean(found) == close(np.mean(fresh))


def test_best_of_k_is_exact_for_many_samples():
    rng = random.Random(0)
    scores = [rng.random() for _ in range(64)]
    given = list(scores)
    assert measures.best_of_k(scores, 64) == max(scores) and scores == given
    assert measures.best_of_k(scores, 1) == close(math.fsum(scores) / 64)
    for k in (2, 4, 16, 63):  # P(best > s) for each score, another sum
        steps = zip([0.0, *sorted(scores)], sorted(scores), strict=False)
        wanted = sum((high - low) * (1 - math.comb(i, k) / math.comb(64, k)) for i, (low, high) in enumerate(steps))
        assert measures.best_of_k(scores, k) == close(wanted)
    curve = [measures.best_of_k(scores, k) for k in range(1, 65)]
    assert curve == sorted(curve)
    assert {measures.best_of_k([0.1] * 64, k) for k in range(1, 65)} == {0.1}
    wanted = 1500 * 3001 / 1501 - 1  # mean largest of 1500 of 0 … 2999; C(3000, 1500) is no float
    assert measures.best_of_k(range(3000), 1500) == close(wanted)
    assert measures.best_of_k(torch.tensor([0.0, 1.0]), 1) == 0.5


# --- membership ------------------------------------------------------------------------------------------------------


def test_mink_by_hand():
    values = [-1.0, -4.0, -2.0, -3.0, -5.0]
    wanted = {0.1: -5.0, 0.2: -5.0, 0.39: -5.0, 0.4: -4.5, 0.5: -4.5, 0.6: -4.0, 1.0: -3.0}
    assert {share: measures.mink(values, share) for share in wanted} == wanted
    assert measures.mink(torch.tensor(values), 0.4) == -4.5 and values[0] == -1.0
    assert measures.mink([-1.0, -INF], 0.5) == -INF


def test_mink_removes_the_lowest_one_by_one():
    rng = random.Random(0)
    for length in range(1, 40):
        values = [rng.gauss(-2, 2) for _ in range(length)]
        for share in (0.05, 0.2, 0.4, 1.0):
            left, taken = list(values), []
            while not taken or len(taken) + 1 <= share * length:
                taken.append(min(left))
                left.remove(taken[-1])
            assert measures.mink(values, share) == close(sum(taken) / len(taken))


def plain_z(row, token):
    """One position of Min-K %++ in float64, one word of the vocabulary after another; ruled-out words left out."""
    row = [float(x) for x in row]
    total = sum(math.exp(x - max(row)) for x in row)
    log_p = [x - max(row) - math.log(total) for x in row]
    there = [x for x in log_p if x > -INF]
    mu = sum(math.exp(x) * x for x in there)
    variance = sum(math.exp(x) * (x - mu) ** 2 for x in there)
    return (log_p[token] - mu) / math.sqrt(variance)


def test_standardised_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log().expand(2, 3)  # log₂ p: −1, −2, −2; μ −1.5, σ 0.5
    assert torch.allclose(measures.standardised(logits, torch.tensor([0, 2])), torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_standardised_is_a_loop_over_the_vocabulary(dtype):
    generator, tolerance = torch.Generator().manual_seed(0), 1e-10 if dtype == torch.float64 else 1e-4
    for sharpness, shift in ((0.1, 0), (1, 0), (5, 300), (30, -50)):
        logits = (torch.randn(12, 50, generator=generator) * sharpness + shift).to(dtype)
        logits[::2, :20] = -INF
        ids = torch.randint(20, 50, (12,), generator=generator)
        z = measures.standardised(logits, ids)
        assert z.shape == (12,) and z.dtype == (dtype if dtype == torch.float64 else torch.float32)
        assert z.tolist() == close([plain_z(row, i) for row, i in zip(logits, ids, strict=True)], tolerance)


def test_standardised_where_nothing_varies():
    for vocab, level in ((1, 0.0), (2, 3.3), (3, 100.0), (32000, -1e4)):
        z = measures.standardised(torch.full((2, vocab), level), torch.tensor([0, vocab - 1]))
        assert z.tolist() == [0.0, 0.0]
    certain = torch.tensor([[7.0, -INF, -INF], [7.0, -INF, -INF], [7.0, 7.0, -INF], [0.0, -500.0, -500.0]])
    assert measures.standardised(certain, torch.tensor([0, 1, 1, 0])).tolist() == [0.0, -INF, 0.0, 0.0]
    assert measures.standardised(torch.tensor([[1.0, 0.0, -INF]]), torch.tensor([2])).tolist() == [-INF]


def test_zlib_ratio():
    assert measures.zlib_ratio(2.0, "") == -0.25  # zlib's frame of nothing is 8 bytes
    rng = random.Random(0)
    for length in (1, 50, 500):
        text = "".join(rng.choice("abcdé東😀 ") for _ in range(length))
        packer = zlib.compressobj()
        size = len(packer.compress(text.encode()) + packer.flush())
        assert measures.zlib_ratio(1.5, text) == close(-1.5 / size)
    assert measures.zlib_ratio(1.0, "a" * 50) > measures.zlib_ratio(2.0, "a" * 50)


def test_auc_by_hand():
    assert measures.auc([3, 2], [1, 2]) == 0.875  # three pairs won, one tie
    assert measures.auc([1], [0, 0]) == 1.0 and measures.auc([0, 0], [1]) == 0.0
    assert measures.auc([0.0, INF], [-INF]) == 1.0 and measures.auc(torch.ones(3), torch.ones(5)) == 0.5


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 9), (20, 20), (37, 55)])
def test_auc_counts_pairs(m, n):
    rng = np.random.default_rng(m)
    for members, others in (
        (rng.normal(1, 1, m), rng.normal(0, 2, n)),
        (rng.integers(0, 4, m), rng.integers(0, 3, n)),
    ):
        pairs = sum(float(a > b) + float(a == b) / 2 for a in members for b in others)
        assert measures.auc(members, others) == close(pairs / (m * n))
        above = rankdata([*members, *others])[:m].sum() - m * (m + 1) / 2
        assert measures.auc(members, others) == above / (m * n)  # by ranks, to the last bit
        assert measures.auc(others, members) == close(1 - pairs / (m * n))


def test_auc_interval_of_one_text_a_side_is_wilsons():
    low, high = measures.auc_interval(1.0, 1, 1)
    assert (low, high) == (close(1 / (1 + norm.ppf(0.975) ** 2), 1e-9), 1.0)  # 1 − θ = z² θ
    assert measures.auc_interval(1.0, 1, 1, norm.cdf(1) - norm.cdf(-1))[0] == close(0.5, 1e-9)


@pytest.mark.parametrize(("m", "n"), [(1, 2), (36, 36), (55, 37), (100, 10)])
@pytest.mark.parametrize("auc", [0.0, 0.01, 0.3, 0.5, 0.875, 1.0])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_auc_interval_ends_at_the_roots_of_newcombes_quartic(m, n, auc, level):
    t = np.polynomial.Polynomial([0, 1])
    z2, more = norm.ppf((1 + level) / 2) ** 2, (m + n) / 2 - 1
    bottom = (2 - t) * (1 + t)
    spread = t * (1 - t) * (bottom + more * ((1 - t) * (1 + t) + t * (2 - t)))
    roots = (m * n * (t - auc) ** 2 * bottom - z2 * spread).roots()
    real = [root.real for root in roots if abs(root.imag) < 1e-6 and -1e-6 < root.real < 1 + 1e-6]
    low, high = measures.auc_interval(auc, m, n, level)
    assert (low, high) == (close(min(real), 1e-6), close(max(real), 1e-6))
    assert 0 <= low <= auc <= high <= 1 and high - low > 0.01
    assert measures.auc_interval(1 - auc, m, n, level) == (close(1 - high, 1e-9), close(1 - low, 1e-9))


@pytest.mark.parametrize("true", [0.5, 0.65, 0.2, 0.8, 0.9, 0.95])
def test_auc_interval_covers_the_true_auc_of_normal_scores(true):
    rng = np.random.default_rng(0)
    repeats, shift = 1500, math.sqrt(2) * norm.ppf(true)
    members, others = rng.normal(shift, 1, (repeats, 36)), rng.normal(0, 1, (repeats, 36))
    found = (measures.auc_interval(measures.auc(a, b), 36, 36) for a, b in zip(members, others, strict=True))
    assert 0.92 <= sum(low <= true <= high for low, high in found) / repeats <= 0.99


def test_privleak():
    assert measures.privleak(0.8, 0.5) == close(-60) and measures.privleak(1.0, 0.3) == close(-100)
    assert measures.privleak(0.2, 0.9) == close(700)  # above 100 where the retained model's 1 − AUC is small
    assert measures.privleak(0.4, 0.4) == 0 and measures.privleak(0.5, 1.0) is None
    rng = random.Random(0)
    for _ in range(100):
        auc, retained = rng.random(), rng.random()
        own, reference = 1 - auc, 1 - retained  # MUSE's A
        assert measures.privleak(auc, retained) == close((own - reference) / reference * 100, 1e-9)


# --- the true answer, token by token ---------------------------------------------------------------------------------


def test_hits_by_hand():
    hits = [True, False, True, True]
    assert measures.exact_memorisation(hits) == 0.75 and measures.extraction_strength(hits) == 0.5
    assert measures.exact_memorisation([True] * 3) == 1 and measures.extraction_strength([True] * 3) == 1
    missed = [True, True, True, False]  # open-unlearning: 1/4
    assert measures.exact_memorisation(missed) == 0.75 and measures.extraction_strength(missed) == 0
    assert measures.exact_memorisation([False]) == measures.extraction_strength([False]) == 0


def test_hits_are_read_literally():
    for length in range(1, 9):
        for hits in itertools.product((False, True), repeat=length):
            prefix = next(k for k in range(length + 1) if all(hits[k:]))
            assert measures.extraction_strength(hits) == close(1 - prefix / length)
            assert measures.extraction_strength(torch.tensor(hits)) == close(1 - prefix / length)
            assert measures.exact_memorisation(hits) == close(hits.count(True) / length)


def test_rank():
    assert measures.rank(2.0, [1.0, 2.0, 3.0, 2.0]) == 3.0  # one before it, two beside it
    assert measures.rank(0.5, [1, 2]) == 1 and measures.rank(9, [1, 2, INF]) == 3
    rng = random.Random(0)
    for _ in range(100):
        loss, *others = (rng.randrange(6) for _ in range(rng.randint(2, 9)))
        assert measures.rank(loss, others) == rankdata([loss, *others])[0]


# --- changed weights -------------------------------------------------------------------------------------------------


def test_relearning():
    assert measures.relearning(10, 50, 5, 25) == 0.5  # 20 against 40
    assert measures.relearning(10, 20, 5, 45) == 1 and measures.relearning(10, 90, 30, 30) == 0
    assert measures.relearning(10, 90, 30, 20) == 0  # the retained model lost
    assert measures.relearning(10, 10, 5, 25) == measures.relearning(10, 4, 5, 2) == 1  # nothing came back
    rng = random.Random(0)
    for _ in range(200):
        before, after, retained_before, retained_after = (rng.uniform(0, 100) for _ in range(4))
        gain, retained = after - before, retained_after - retained_before
        if gain <= 0 or retained >= gain:
            wanted = 1
        else:
            wanted = retained / gain if retained > 0 else 0
        assert measures.relearning(before, after, retained_before, retained_after) == close(wanted)


def test_quantisation():
    assert measures.quantisation(80, 60) == 0.75 and measures.quantisation(80, 0) == 0
    assert measures.quantisation(80, 90) == 1 and measures.quantisation(0, 40) is None
    rng = random.Random(0)
    for _ in range(100):
        recall, later = rng.uniform(0, 99), rng.uniform(0, 100)  # in %: of these the rest is forgotten
        lost = max(later - recall, 0) / (100 - recall)  # share that came back
        assert measures.quantisation(100 - recall, 100 - later) == close(1 - lost)


def plain_rounded(weight, bits, block):
    """One float32 weight after another."""
    flat, found = weight.float().flatten().numpy(), []
    for start in range(0, len(flat), block):
        part = flat[start : start + block]
        step = np.max(np.abs(part)) / np.float32(2 ** (bits - 1) - 1)
        found += [np.float32(round(float(w / step))) * step if step else np.float32(0) for w in part]
    return torch.tensor(np.array(found)).reshape(weight.shape).to(weight.dtype)


def test_rounded_by_hand():
    weight = torch.tensor([3.0, -1.4, 0.6, 0.4])
    assert measures.rounded(weight, 3, 4).tolist() == [3, -1, 1, 0]  # three steps of 1 a side
    assert torch.allclose(measures.rounded(weight, 3, 2), torch.tensor([3, -1, 0.6, 0.4]))  # the second block's are 0.2
    assert measures.rounded(weight, 2, 4).tolist() == [3, 0, 0, 0]
    assert weight.tolist() == pytest.approx([3.0, -1.4, 0.6, 0.4])
    blocks = measures.rounded(torch.tensor([9.0] + [1.0] * 70), 2)  # of 64 where nothing else is said
    assert blocks.tolist() == [9.0] + [0.0] * 63 + [1.0] * 7
    assert measures.rounded(torch.zeros(0, 3), 4).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("shape", "block"), [((7, 31), 64), ((128,), 64), ((3, 5, 2), 7), ((2, 2), 64)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounded_is_a_loop_over_weights(dtype, shape, block, bits):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(bits)).to(dtype)
    weight.view(-1)[:4] *= 20  # an outlier spoils its own block alone
    found = measures.rounded(weight, bits, block)
    assert found.dtype == dtype and found.shape == weight.shape and not torch.equal(found, weight)
    assert torch.equal(found, plain_rounded(weight, bits, block))
    assert torch.allclose(measures.rounded(found, bits, block), found, rtol=1e-6)
    turned = weight.T if weight.ndim == 2 else weight
    assert torch.equal(measures.rounded(turned, bits, block), measures.rounded(turned.contiguous(), bits, block))


def test_rounded_errs_by_half_a_step_and_less_with_more_bits():
    weight = torch.nn.Parameter(torch.randn(40, 64, generator=torch.Generator().manual_seed(0)))
    errors = {bits: (measures.rounded(weight, bits) - weight.detach()).abs() for bits in (2, 4, 8)}
    for bits, error in errors.items():
        half = weight.detach().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1) / 2
        assert (error <= half * (1 + 1e-5)).all() and error.max() > 0.4 * half.min()
    assert errors[8].mean() < errors[4].mean() / 10 < errors[2].mean() / 20
    assert not measures.rounded(weight, 4).requires_grad


def test_rounded_leaves_zeros():
    weight = torch.cat([torch.zeros(64), torch.full((64,), 1e-45), torch.ones(64)])
    assert torch.equal(measures.rounded(weight, 8), torch.cat([torch.zeros(128), torch.ones(64)]))


# --- errors ----------------------------------------------------------------------------------------------------------

ROW, ID = torch.zeros(1, 3), torch.tensor([0])
WRONG = {
    measures.floats: [([],), ([NAN],)],
    measures.best_of_k: [([], 1), ([1, NAN], 1)],
    measures.mink: [([], 0.4), ([-1, NAN], 0.4)],
    measures.standardised: [
        (ROW[0], ID), (ROW, ID[0]), (ROW, torch.tensor([0, 0])), (ROW[None], ID), (ROW * NAN, ID), (ROW - INF, ID),
        (ROW + INF, ID),
    ],
    measures.auc: [([], [1]), ([1], []), ([NAN], [1]), ([1], [1, NAN])],
    measures.exact_memorisation: [([],)],
    measures.extraction_strength: [([],)],
    measures.rank: [(1, []), (NAN, [1]), (1, [1, NAN])],
    measures.rounded: [(ROW + INF, 4), (ROW * NAN, 4)],
}  # fmt: skip


@pytest.mark.parametrize(("function", "wrong"), WRONG.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_what_is_wrong_is_an_error(function, wrong):
    for arguments in wrong:
        with pytest.raises(ValueError, match="expected"):
            function(*arguments)
