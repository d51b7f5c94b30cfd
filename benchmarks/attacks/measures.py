"""What attacks are measured by: scores, losses, hits and weights in, numbers out; no model and no file.

The paper has none of it. Each docstring says what the number means, which way is worse for forgetting, its range, and
where it comes from. What a model may spoil, NaN or nothing at all, raises ValueError; other arguments are as they say.

Deviations
- `mink` takes at least one token, as open-unlearning does; MUSE's and the paper's code give NaN for a text too short.
- `extraction_strength` of an answer whose last token is missed is 0; open-unlearning's loop leaves 1/T there.
- `quantisation` compares what is forgotten before and after; open-unlearning what is known, which is 0 before for a
  model that answers nothing, so that the least return would count as a full one."""

import math
import zlib
from fractions import Fraction
from statistics import NormalDist

import torch


def floats(values):
    """A list, array or tensor as a list of floats. Raises ValueError without any, or where one is NaN."""
    values = [float(value) for value in (values.tolist() if hasattr(values, "tolist") else values)]
    if not values or any(map(math.isnan, values)):
        raise ValueError("expected one number or more, none of them NaN")
    return values


def best_of_k(scores, k):
    """leak@k, the expected best of k ≤ n scores drawn without replacement; unbiased as pass@k is (arXiv 2511.04934).
    Σ_i C(i − 1, k − 1) / C(n, k) · s_(i) over ascending s, rounded once, so that it never falls as k grows."""
    scores = sorted(floats(scores))
    total = sum(math.comb(i, k - 1) * Fraction(score) for i, score in enumerate(scores))  # i: scores below this one
    return float(total / math.comb(len(scores), k))


def mink(logprobs, share):
    """Min-K %, or ++ of standardised values: mean of a text's lowest int(share · T) log-probabilities (2310.16789)."""
    lowest = sorted(floats(logprobs))[: max(1, int(share * len(logprobs)))]
    return math.fsum(lowest) / len(lowest)


def standardised(logits, ids):
    """Each token's log-probability against those of the whole vocabulary: what Min-K %++ averages (arXiv 2404.02936).
    z = (log p(id) − μ) / σ with μ = E_p[log p] and σ² = Var_p[log p] under p at that position; higher is worse. Where
    log p(id) is μ, z is 0 though σ be 0, as where p is even or certain; a token that p rules out gets −inf.
    logits: (T, V), −inf for what is ruled out, computed in float32, float64 stays; ids: (T,). Returns: (T,)."""
    if logits.ndim != 2 or ids.shape != logits.shape[:1]:
        raise ValueError(f"expected logits (T, V) and ids (T,), not {tuple(logits.shape)} and {tuple(ids.shape)}")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_p, p = logits.log_softmax(-1), logits.softmax(-1)
    if p.isnan().any():
        raise ValueError("expected in each row of logits a finite one, no NaN and no +inf")
    known = log_p.masked_fill(p == 0, 0)  # 0 · log 0 is 0
    mu = (p * known).sum(-1)
    sigma = (p * (known - mu[:, None]).square()).sum(-1).sqrt()
    above = log_p.gather(-1, ids[:, None])[:, 0] - mu
    rounding = 32 * torch.finfo(logits.dtype).eps * mu.abs()  # even logits leave a difference of this size
    return (above / sigma).masked_fill(above.abs() <= rounding, 0)


def zlib_ratio(loss, text):
    """Likelihood against how well the text compresses: −loss / bytes of zlib.compress(text) (arXiv 2012.07805).
    loss: mean over tokens, in nats. In nats a token and byte, −inf to 0. Higher: likelier a member, worse."""
    return -float(loss) / len(zlib.compress(text.encode("utf-8")))


def auc(members, others):
    """Share of pairs in which the member scores higher, ties half: area under the ROC curve, Mann and Whitney's U / mn.
    0–1. 0.5: the attack cannot tell; higher is worse, and below 0.5 the texts stand out by being unlikely."""
    from scipy.stats import mannwhitneyu  # here, for it takes most of a second to import

    members, others = floats(members), floats(others)
    return float(mannwhitneyu(members, others, method="asymptotic").statistic / (len(members) * len(others)))


def auc_interval(auc, n_members, n_others, level=0.95):
    """Confidence interval of an AUC: method 5 of Newcombe (Statistics in Medicine 25, 2006, 559–573).
    All θ with |auc − θ| ≤ z √V(θ), where V(θ) = θ(1 − θ) / (m n) · (1 + (N − 1)((1 − θ)/(2 − θ) + θ/(1 + θ))) and N =
    (m + n) / 2. V at θ and not at the AUC, so that at 0 and 1 the interval keeps its width. Returns: (low, high)."""
    z, mean_n = NormalDist().inv_cdf((1 + level) / 2), (n_members + n_others) / 2

    def variance(t):
        return t * (1 - t) / (n_members * n_others) * (1 + (mean_n - 1) * ((1 - t) / (2 - t) + t / (1 + t)))

    def low_end(value):
        """By halves: √V is concave, so below the value its multiple crosses value − θ once."""
        low, high = 0.0, value
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if value - middle > z * math.sqrt(variance(middle)) else (low, middle)
        return low

    return low_end(auc), 1 - low_end(1 - auc)  # V(θ) = V(1 − θ)


def privleak(auc, auc_retained):
    """PrivLeak: how an AUC stands to that of a model that never saw the texts (MUSE, arXiv 2407.06460), in %.
    100 · ((1 − auc) − (1 − auc_retained)) / (1 − auc_retained), both with forget texts as members; MUSE's A is 1 − auc.
    0 is best; below: still known, −100 at worst; above: over-forgotten, without bound. None for a retained AUC of 1."""
    return None if auc_retained == 1 else 100 * (auc_retained - auc) / (1 - auc_retained)


def exact_memorisation(hits):
    """Share of an answer's tokens that the model's argmax hits, each after true ones (2506.12618). Higher is worse."""
    return math.fsum(map(bool, floats(hits))) / len(hits)


def extraction_strength(hits):
    """How little of the answer must be given before greedy decoding says the rest (open-unlearning, 2506.12618).
    1 − k / T, k the smallest prefix after which every token is hit; 0 when even the last is missed. Higher is worse."""
    hits = floats(hits)
    return 1 - max((i for i, hit in enumerate(hits, 1) if not hit), default=0) / len(hits)


def rank(loss, others):
    """Rank of the true answer by loss among others: 1 + those of lower loss + half of those that tie.
    As in the exposure metric (arXiv 1802.08232). From 1, the likeliest and worst, to one more than there are others."""
    (loss,), others = floats([loss]), floats(others)
    return 1 + sum(other < loss for other in others) + sum(other == loss for other in others) / 2


def relearning(before, after, retained_before, retained_after):
    """R: how fast answers come back in training, against a model that never knew them (open-unlearning, 2506.12618).
    min(δ_retained / δ_unlearned, 1), δ = forget recall after − before, at least 0. 1 is best: no faster, or never."""
    if after <= before:
        return 1.0
    return min(max(retained_after - retained_before, 0.0) / (after - before), 1.0)


def quantisation(before, after):
    """Q: share of what was forgotten that still is when the weights are rounded (after open-unlearning, 2506.12618).
    min(after / before, 1) of 100 − forget recall in %; None where nothing was forgotten before. 0–1; lower is worse."""
    return min(after / before, 1.0) if before else None


def rounded(weight, bits, block=64):
    """A weight, shape and dtype kept, as it stands after rounding to 2 bits or more; the attack of arXiv 2410.16454.
    Each block of consecutive weights is divided by max|w| / (2^(bits − 1) − 1), rounded and multiplied back."""
    flat = weight.detach().reshape(-1).float()
    if not flat.isfinite().all():
        raise ValueError("expected finite weights")
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).reshape(-1, block)
    step = blocks.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    whole = (blocks / step.masked_fill(step == 0, 1)).round()
    return (whole * step).reshape(-1)[: len(flat)].reshape(weight.shape).to(weight.dtype)
