"""The losses of Appendix B, each a function of log-probabilities and masks, and what each method adds up.

Covers Eq. 6–20; WHP's pair of models is in `engine/model.py`. Symbols: u the current model, o the original one; D_f the
forget rows (x, y_f), y_rej a refusal to the same x; D_r the retain rows. Shapes: logprobs, mask (B, T), mask True on
response tokens only; log-ratios of responses (B,); logits (n, V).

Deviations
- Public code's weights: 0.125 of SimNPO's forget term (`--forget_weight`), LLMU's 0.5, 1, 1 (`--llmu_weights`).
- FLAT's v ranges over mean probabilities in [0, 1], as in its public code; TV then never reaches f*'s bounds."""

import torch
import torch.nn.functional as F


def cross_entropy(logprobs, mask):
    """L_CE: mean −log p over response tokens."""
    return -(logprobs * mask).sum() / mask.sum()


def log_ratio(logprobs, original, mask):
    """log[p_u(y|x) / p_o(y|x)] of whole responses, summed over tokens: (B,)."""
    return ((logprobs - original) * mask).sum(-1)


def ga(logprobs, mask):
    """Unlearn by ascent on the forget rows' own loss."""
    return -cross_entropy(logprobs, mask)  # Eq. 6


def klr(logits, original):
    """Retain by staying close: mean KL(p_o ‖ p_u) over response positions and the whole vocabulary."""
    p_o = F.log_softmax(original.float(), -1)  # (n, V)
    return F.kl_div(F.log_softmax(logits.float(), -1), p_o, reduction="batchmean", log_target=True)  # Eq. 8


def dpo(refusal_ratio, forget_ratio, beta):
    """Prefer the refusal to the answer."""
    return -2 / beta * F.logsigmoid(beta * (refusal_ratio - forget_ratio)).mean()  # Eq. 10


def npo(forget_ratio, beta):
    """DPO's losing half alone; its gradient tends to that of ascent on summed log-probabilities as β → 0."""
    return -2 / beta * F.logsigmoid(-beta * forget_ratio).mean()  # Eq. 12


def simnpo(logprobs, mask, beta, gamma):
    """NPO by length, without a reference."""
    mean = (logprobs * mask).sum(-1) / mask.sum(-1)  # (B,)
    return -2 / beta * F.logsigmoid(-beta * mean - gamma).mean()  # Eq. 20


def mean_probability(logprobs, mask):
    """FLAT's P: mean token probability of each response, (B,)."""
    return (logprobs.exp() * mask).sum(-1) / mask.sum(-1)


def flat(forget, safe, divergence):
    """Bound an f-divergence between safe and forget responses. Args: their P, each (B,)."""
    g = {"pearson": lambda v: v, "kl": lambda v: v, "tv": lambda v: torch.tanh(v) / 2}[divergence]
    conjugate = {"pearson": lambda t: t**2 / 4 + t, "kl": lambda t: torch.exp(t - 1), "tv": lambda t: t}[divergence]
    return (conjugate(g(forget)) - g(safe)).mean()  # Eq. 18


def sga(forget, normal, r):
    """Ascent smoothed by `normal`: K losses, of the model's own answers to similar permitted prompts. r = 0 is GA."""
    return -(1 - r) * forget + r * torch.stack(normal).mean()  # Eq. 19


def llmu(ascent, mismatch, epsilon1, epsilon2):
    """Ascent and random answers; `klr`, weighted by ε3, is the third term."""
    return epsilon1 * ascent + epsilon2 * mismatch  # Eq. 15


def task_vector(original, reinforced, alpha):
    """θ_u = θ_o − α (θ_reinforced − θ_o), of one weight."""
    return original - alpha * (reinforced - original)  # Eq. 16


def interpolate(original, reinforced, alpha):
    """WHP: lower the logits that the reinforced model raised, as public code; the paper speaks of distributions."""
    return original - alpha * torch.relu(reinforced - original)  # Eq. 17


# s(kind): log-probabilities of u on this step's rows of a kind, and their mask; s(kind, "o"): those of o.

FORGET = {
    "ga": lambda s, c: ga(*s("forget")),
    "refuse": lambda s, c: cross_entropy(*s("refusal")),  # Eq. 9
    "dpo": lambda s, c: dpo(ratio(s, "refusal"), ratio(s, "forget"), c.beta or 0.1),
    "npo": lambda s, c: npo(ratio(s, "forget"), c.beta or 0.1),
    "simnpo": lambda s, c: simnpo(*s("forget"), c.beta or 4.5, c.gamma),
    "mismatch": lambda s, c: cross_entropy(*s("random")),  # Eq. 14
    "llmu": lambda s, c: llmu(ga(*s("forget")), cross_entropy(*s("random")), *c.llmu_weights[:2]),
    "flat": lambda s, c: flat(mean_probability(*s("forget")), mean_probability(*s("refusal")), c.flat_divergence),
    "sga": lambda s, c: sga(cross_entropy(*s("forget")), [cross_entropy(*s(f"normal {k}")) for k in range(c.sga_k)],
                            c.sga_r),
    "reinforce": lambda s, c: cross_entropy(*s("forget")),  # what Eq. 16 and 17 start from
}  # fmt: skip
RECIPES = {  # method: (forget term, retain term)
    "ga": ("ga", None), "gd": ("ga", "gdr"), "kl": ("ga", "klr"), "po": ("refuse", "gdr"), "dpo": ("dpo", None),
    "dpo_rt": ("dpo", "gdr"), "npo": ("npo", None), "npo_gdr": ("npo", "gdr"), "npo_klr": ("npo", "klr"),
    "simnpo": ("simnpo", None), "simnpo_gdr": ("simnpo", "gdr"), "simnpo_klr": ("simnpo", "klr"),
    "mismatch": ("mismatch", "gdr"), "llmu": ("llmu", "klr"), "task_vector": ("reinforce", None),
    "whp": ("reinforce", None), "flat": ("flat", None), "sga": ("sga", None),
}  # fmt: skip


def ratio(s, kind):
    logprobs, mask = s(kind)
    return log_ratio(logprobs, s(kind, "o")[0], mask)


def objective(method, s, config):
    """The loss of `method`: its weighted forget term, and its retain term."""
    forget, retain = RECIPES[method]
    weight = config.forget_weight or (0.125 if forget == "simnpo" else 1.0)
    retain_weight = config.llmu_weights[2] if forget == "llmu" else config.retain_weight
    loss = weight * FORGET[forget](s, config)
    if retain == "gdr":
        loss = loss + retain_weight * cross_entropy(*s("retain"))  # Eq. 7, 9, 11, 13, 14
    if retain == "klr":
        loss = loss + retain_weight * klr(s("retain", logits=True), s("retain", "o", logits=True))  # Eq. 8, 15
    return loss
