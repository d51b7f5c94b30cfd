"""Stage 2's on-policy half: sampling rollout groups, group-normalised advantages, the KL term and Eq. 3.

Covers Section 3.1 (Eq. 2 and its KL term) and Section 3.2 (Eq. 3). Sampling and log-probabilities stand here the plain
way, one row of the model for each response; `engine/fast.py` computes the same faster, and is tested against these.

Symbols: x prompt, y_i the i-th of G responses, r_i its reward, Â_i its advantage, π_θ the policy, π_old the policy that
sampled y, π_ref the frozen model after Stage 1, β the KL weight, T the temperature. Shapes: N groups, G responses each,
B = N·G rows, P prompt tokens, T response tokens (the temperature is always spelt out).

Deviations
- No PPO clip on fresh rollouts: one optimiser step per batch makes π_θ/π_old exactly 1, so Eq. 3 is computed as it is
  written. RULE's code carries the clip, where it never acts.
- KL is GRPO's k3 estimate, clamped at 10 as in RULE's code. Differentiated through samples held fixed, its expected
  gradient is that of KL(π_ref ‖ π_θ), not of the KL(π_θ ‖ π_ref) that Eq. 2 writes.
- The policy runs in eval mode throughout: dropout would make the sampler's π_old and the training forward disagree."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F


@dataclass
class RolloutGroup:
    """One prompt's G responses and all that any update of them needs, now or many steps later.
    It travels unchanged from sampling to update to buffer; nothing in it is ever decoded and encoded again."""

    query: int  # index of x among the training queries
    step: int  # when it was sampled
    prompt_ids: torch.Tensor  # (P,)
    response_ids: torch.Tensor  # (G, T), padded on the right
    mask: torch.Tensor  # (G, T) bool, True on every sampled token, the final EOS included
    old_logprobs: torch.Tensor  # (G, T) log π_old as the sampler saw them
    ref_logprobs: torch.Tensor | None = None  # (G, T) log π_ref, or None where no KL term reads them
    rewards: torch.Tensor | None = None  # (G,) from step 2 on
    advantages: torch.Tensor | None = None  # (G,)
    texts: list[str] = field(default_factory=list)  # the G responses in words
    kind: str = ""  # of x: "forget" or "boundary"
    train_logprobs: torch.Tensor | None = None  # (G, T) log π_θ of step 4's forward, until its ratios are told

    def all_equal(self):
        """All rewards the same: Â = 0, no policy gradient."""
        return bool((self.rewards == self.rewards[0]).all())


@dataclass
class Batch:
    """Some groups side by side. Prompts are padded on the left (N, P), responses on the right (B, T)."""

    groups: list[RolloutGroup]  # N, whose rows follow one another
    prompt_ids: torch.Tensor  # (N, P)
    prompt_mask: torch.Tensor  # (N, P) bool
    response_ids: torch.Tensor  # (B, T)
    mask: torch.Tensor  # (B, T) bool
    old_logprobs: torch.Tensor  # (B, T)
    ref_logprobs: torch.Tensor | None  # (B, T)
    advantages: torch.Tensor | None  # (B, 1)
    weights: torch.Tensor  # (B, T) of `token_weights`; all 0 in a batch that shall not count


# --- equations -------------------------------------------------------------------------------------------------------


def group_advantages(rewards, unbiased=True):
    """Â_i = (r_i − mean(r)) / (std(r) + 1e-6) within each group (Section 3.2).
    Args: rewards (N, G); unbiased: divide the variance by G − 1, as RULE's code does.
    Returns: (N, G); exactly 0 in a group whose rewards are all equal.
    Raises: ValueError for groups of one, whose standard deviation does not exist."""
    if rewards.shape[-1] < 2:
        raise ValueError("a group needs at least 2 responses to normalise its rewards")
    mean = rewards.mean(-1, keepdim=True)  # (N, 1)
    std = rewards.std(-1, keepdim=True, unbiased=unbiased)  # (N, 1)
    equal = (rewards == rewards[..., :1]).all(-1, keepdim=True)  # (N, 1)
    return torch.where(equal, 0.0, (rewards - mean) / (std + 1e-6))


def k3(logprobs, ref_logprobs):
    """Per-token KL estimate exp(Δ) − Δ − 1 with Δ = log π_ref − log π_θ: never negative, 0 where the two agree."""
    delta = (ref_logprobs - logprobs).clamp(max=20.0)  # exp of more overflows, whose gradient is NaN
    return (delta.exp() - delta - 1).clamp(max=10.0)


def policy_gradient_loss(logprobs, advantages):
    """Per-token loss whose gradient is −Â_i ∇log π_θ(y_i,t | x, y_i,<t), the bracket of Eq. 3.
    exp(log π − sg[log π]) has the value 1 and the gradient of log π, so the value is −Â_i: that is why the policy loss
    of a whole group is 0 though its gradient is not.
    Args: logprobs (B, T), advantages (B, 1). Returns: (B, T)."""
    return -advantages * torch.exp(logprobs - logprobs.detach())  # Eq. 3


def token_weights(mask, loss_norm, n_responses, n_tokens):
    """What each token counts for in the mean over a batch, so that partial sums over micro-batches add up exactly.
    Args:
        mask: (B, T) bool, any part of the batch.
        loss_norm: "sequence" (GRPO: 1/G Σ_i 1/|y_i| Σ_t), "token" (one mean over all tokens, RULE's code) or
            "sum" (1/G Σ_i Σ_t, Eq. 3 to the letter).
        n_responses, n_tokens: counts over the whole batch (N·G and Σ|y|), whatever the split.
    Returns: (B, T), 0 on padding."""
    if loss_norm == "token":
        return mask / n_tokens
    lengths = mask.sum(-1, keepdim=True) if loss_norm == "sequence" else 1  # (B, 1)
    return mask / lengths / n_responses


def on_policy_gradient(model, batches, kl_coef, logprobs_of):
    """Step 4: add to the gradients those of Eq. 3 and of β KL; fill in `train_logprobs` of the groups.
    Args: batches: `Batch`es of fresh groups; logprobs_of(model, batch) → (B, T).
    Returns, over these batches: the loss; the sum of k3 over tokens."""
    kl = []

    def token_loss(batch, logprobs):
        fill(batch, "train_logprobs", logprobs.detach())
        loss = policy_gradient_loss(logprobs, batch.advantages)  # Eq. 3
        if kl_coef and batch.ref_logprobs is not None:
            divergence = k3(logprobs, batch.ref_logprobs)
            kl.append(divergence.detach()[batch.weights > 0].sum())
            loss = loss + kl_coef * divergence  # Eq. 2
        return loss

    loss = accumulate_gradient(model, batches, token_loss, logprobs_of)
    return loss, torch.stack(kl).sum().item() if kl else 0.0


def accumulate_gradient(model, batches, token_loss, logprobs_of):
    """Add to the gradients that of Σ weights · token_loss over all batches, and return the loss's value.
    token_loss(batch, logprobs (B, T)) → (B, T). Weights are those of the whole update, so the result depends neither on
    the split into batches nor on groups left out because they carry no gradient."""
    total = 0.0
    for batch in batches:
        loss = (batch.weights * token_loss(batch, logprobs_of(model, batch))).sum()
        loss.backward()
        total += loss.item()
    return total


@torch.no_grad()
def add_reference(reference, batches, logprobs_of):
    """Step 3: fill in log π_ref of fresh groups with the frozen reference model."""
    for batch in batches:
        fill(batch, "ref_logprobs", logprobs_of(reference, batch))


def fill(batch, name, logprobs):
    """Hand the rows of logprobs (B, T) to the groups that they belong to."""
    for group, rows in zip(batch.groups, logprobs.cpu().split(len(batch.groups[0].mask)), strict=True):
        setattr(group, name, rows[:, : group.mask.shape[1]].clone())  # (G, T of this group)


# --- the model, plainly ----------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(model, prompts, group_size, max_new_tokens, stop_ids, temperature, draw=None):
    """Step 1: y_1 … y_G ∼ π_old(·|x) for each prompt; the most likely tokens where the temperature is 0.
    Args: model in eval mode; prompts: N lists of token ids; draw() → numbers in [0, 1), called once a token: one for
        every response (B,) or more, also for those that are over, so no draw depends on another's length.
    Returns (on the CPU, N × G × T): ids; mask, True up to and with the stop token; the sampler's own log π_old(y_t)."""
    inputs, seen = left_pad([prompt for prompt in prompts for _ in range(group_size)], model.device)  # (B, P)
    stops, cache, steps = torch.tensor(stop_ids, device=model.device), None, []
    is_open = torch.ones(len(inputs), dtype=torch.bool, device=model.device)  # (B,)
    for _ in range(max_new_tokens):
        out = model(
            input_ids=inputs, attention_mask=seen.long(), position_ids=positions(seen)[:, -inputs.shape[1] :],
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        token, logprob = next_token(out.logits[:, -1], temperature, draw and draw()[: len(inputs)])  # (B,)
        steps.append((token.masked_fill(~is_open, 0), is_open, logprob.masked_fill(~is_open, 0.0)))
        is_open = is_open & ~torch.isin(token, stops)
        if not is_open.any():
            break
        cache, inputs, seen = out.past_key_values, token[:, None], F.pad(seen, (0, 1), value=True)
    parts = [torch.stack(part, 1) for part in zip(*steps, strict=True)]  # (B, T)
    return tuple(part.unflatten(0, (len(prompts), group_size)).cpu() for part in parts)  # (N, G, T)


def next_token(logits, temperature, uniform):
    """(token (…), its log-probability), by inverting the distribution function of logits (…, V) at `uniform` (…)."""
    log_p = F.log_softmax(logits.float() / (temperature or 1.0), -1)  # (…, V)
    if temperature:
        cdf = log_p.exp().cumsum(-1, dtype=torch.double)  # NaN of a model gone astray gives the last token
        token = torch.searchsorted(cdf, uniform[..., None] * cdf[..., -1:], right=True).clamp(max=log_p.shape[-1] - 1)
    else:
        token = log_p.argmax(-1, keepdim=True)
    return token[..., 0], log_p.gather(-1, token)[..., 0]


def response_logprobs(model, batch, temperature):
    """log π(y_i,t | x, y_i,<t) at the sampling temperature, (B, T), by one forward over [x, y_i] for every row."""
    group_size = len(batch.response_ids) // len(batch.prompt_ids)
    prompt_ids = batch.prompt_ids.repeat_interleave(group_size, 0)  # (B, P)
    mask = torch.cat([batch.prompt_mask.repeat_interleave(group_size, 0), batch.mask], 1)  # (B, P + T)
    ids = torch.cat([prompt_ids, batch.response_ids], 1)
    logits = model(input_ids=ids, attention_mask=mask.long(), position_ids=positions(mask), use_cache=False).logits
    return token_logprobs(logits[:, prompt_ids.shape[1] - 1 : -1], batch.response_ids, temperature)


def token_logprobs(logits, ids, temperature):
    """log softmax(logits / temperature) at `ids`: (B, T, V), (B, T) → (B, T)."""
    return F.log_softmax(logits.float() / temperature, -1).gather(-1, ids[..., None])[..., 0]


def collate(groups, device, loss_norm="sequence", of=None):
    """Groups of any lengths → one Batch on the device; `of`: all groups over which the update takes its mean."""
    ids, prompt_mask = left_pad([g.prompt_ids.tolist() for g in groups], device)
    width = max(g.mask.shape[1] for g in groups)

    def stack(name):
        parts = [getattr(g, name) for g in groups]  # N × (G, T_g)
        if any(part is None for part in parts):
            return None
        return torch.cat([F.pad(part, (0, width - part.shape[1])) for part in parts]).to(device)  # (B, T)

    fields = [stack(name) for name in ("response_ids", "mask", "old_logprobs", "ref_logprobs")]
    scored = groups[0].advantages is not None
    advantages = torch.cat([g.advantages for g in groups])[:, None].to(device) if scored else None  # (B, 1)
    return Batch(
        groups, ids, prompt_mask, *fields, advantages, token_weights(fields[1], loss_norm, *counts(of or groups))
    )


def counts(groups):
    """(responses, tokens) of groups: what a mean over them divides by."""
    return sum(len(group.mask) for group in groups), sum(int(group.mask.sum()) for group in groups)


def left_pad(prompts, device):
    """Token id lists → ids (N, P) and mask (N, P), True on real tokens. Pad ids are 0 and are never attended to."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)  # (N, P)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    return ids, torch.arange(width, device=device) >= width - lengths[:, None]


def positions(mask):
    """Position ids (N, P) under left padding: the first real token is 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
