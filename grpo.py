"""Stage 2's on-policy half: sampling rollout groups, group-normalised advantages, the KL term and Eq. 3.

Covers Section 3.1 (Eq. 2 and its KL term), Section 3.2 (Eq. 3, the regions Easy(τ) and Hard(τ)).

Symbols: x prompt, y_i the i-th of G responses, r_i its reward, Â_i its advantage, π_θ the policy, π_old the policy that
sampled y, π_ref the frozen model after Stage 1, β the KL weight, T the temperature. Shapes: N groups, G responses each,
B = N·G rows, P prompt tokens, T response tokens (the temperature is always spelt out).

Deviations
- No PPO clip on fresh rollouts: one optimiser step per batch makes π_θ/π_old exactly 1, so Eq. 3 is computed as it is
  written. RULE's code carries the clip, where it never acts.
- KL is GRPO's k3 estimate, clamped at 10 as in RULE's code. Differentiated through samples held fixed, its expected
  gradient is that of KL(π_ref ‖ π_θ), not of the KL(π_θ ‖ π_ref) that Eq. 2 writes.
- The policy runs in eval mode throughout: dropout would make the sampler's π_old and the training forward disagree.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import parallel
from sampling import agree, left_pad, positions
from sampling import sample as sample  # so that callers need this module alone

CHUNK = 256  # tokens whose logits are held at a time
NO_LOGITS = torch.tensor([], dtype=torch.long)  # where models make logits of their own: `head_logprobs` does it
CHECKED = WeakKeyDictionary()  # model → what `shares` found


@dataclass
class RolloutGroup:
    """One prompt's G responses and all that any update of them needs, now or after months in the buffer.

    It travels unchanged from sampling to reward to update to buffer; nothing in it is ever decoded and encoded again.
    """

    query: int  # index of x among the training queries
    prompt_ids: torch.Tensor  # (P,)
    response_ids: torch.Tensor  # (G, T), padded on the right
    mask: torch.Tensor  # (G, T) bool, True on every sampled token, the final EOS included
    old_logprobs: torch.Tensor  # (G, T) log π_old as the sampler saw them
    ref_logprobs: torch.Tensor | None  # (G, T) log π_ref, or None where no KL term reads them
    rewards: torch.Tensor  # (G,)
    advantages: torch.Tensor  # (G,)
    step: int  # when it was sampled

    def all_equal(self):
        """All rewards the same: Â = 0, no policy gradient."""
        return bool((self.rewards == self.rewards[0]).all())


@dataclass
class Batch:
    """Some groups side by side. Prompts are padded on the left (N, P), responses on the right (B, T)."""

    prompt_ids: torch.Tensor  # (N, P)
    prompt_mask: torch.Tensor  # (N, P) bool
    response_ids: torch.Tensor  # (B, T)
    mask: torch.Tensor  # (B, T) bool
    old_logprobs: torch.Tensor  # (B, T)
    ref_logprobs: torch.Tensor | None  # (B, T)
    advantages: torch.Tensor  # (B, 1)


# --- equations -------------------------------------------------------------------------------------------------------


def group_advantages(rewards, unbiased=True):
    """Â_i = (r_i − mean(r)) / (std(r) + 1e-6) within each group (Section 3.2).

    Args: rewards (N, G); unbiased: divide the variance by G − 1, as RULE's code does.
    Returns: (N, G); exactly 0 in a group whose rewards are all equal.
    Raises: ValueError for groups of one, whose standard deviation does not exist.
    """
    if rewards.shape[-1] < 2:
        raise ValueError("a group needs at least 2 responses to normalise its rewards")
    mean = rewards.mean(-1, keepdim=True)  # (N, 1)
    std = rewards.std(-1, keepdim=True, unbiased=unbiased)  # (N, 1)
    equal = (rewards == rewards[..., :1]).all(-1, keepdim=True)  # (N, 1)
    return torch.where(equal, 0.0, (rewards - mean) / (std + 1e-6))


def k3(logprobs, ref_logprobs):
    """Per-token KL estimate exp(Δ) − Δ − 1 with Δ = log π_ref − log π_θ: never negative, 0 where the two agree."""
    delta = ref_logprobs - logprobs
    return (delta.exp() - delta - 1).clamp(max=10.0)


def policy_gradient_loss(logprobs, advantages):
    """Per-token loss whose gradient is −Â_i ∇log π_θ(y_i,t | x, y_i,<t), the bracket of Eq. 3.

    exp(log π − sg[log π]) has the value 1 and the gradient of log π, so the value is −Â_i: that is why the policy loss
    of a whole group is 0 though its gradient is not.
    Args: logprobs (B, T), advantages (B, 1). Returns: (B, T).
    """
    return -advantages * torch.exp(logprobs - logprobs.detach())  # Eq. 3


def token_weights(mask, loss_norm, n_responses, n_tokens):
    """What each token counts for in the mean over a batch, so that partial sums over micro-batches add up exactly.

    Args:
        mask: (B, T) bool, any part of the batch.
        loss_norm: "sequence" (GRPO: 1/G Σ_i 1/|y_i| Σ_t), "token" (one mean over all tokens, RULE's code) or
            "sum" (1/G Σ_i Σ_t, Eq. 3 to the letter).
        n_responses, n_tokens: counts over the whole batch (N·G and Σ|y|), whatever the split.
    Returns: (B, T), 0 on padding.
    """
    if loss_norm == "token":
        return mask / n_tokens
    lengths = mask.sum(-1, keepdim=True) if loss_norm == "sequence" else 1  # (B, 1)
    return mask / lengths / n_responses


# --- log-probabilities and gradients ---------------------------------------------------------------------------------


def decode(tokenizer, ids, mask):
    """Sampled ids and mask (N, G, T) → N lists of G texts."""
    return [
        [tokenizer.decode(row[keep], skip_special_tokens=True).strip() for row, keep in zip(*group, strict=True)]
        for group in zip(ids, mask, strict=True)
    ]


def collate(groups, device):
    """Groups of any prompt and response lengths → one Batch on the device."""
    ids, prompt_mask = left_pad([g.prompt_ids.tolist() for g in groups], device)
    width = max(g.mask.shape[1] for g in groups)

    def stack(name):
        parts = [getattr(g, name) for g in groups]  # N × (G, T_g)
        if any(part is None for part in parts):
            return None
        return torch.cat([F.pad(part, (0, width - part.shape[1])) for part in parts]).to(device)  # (B, T)

    advantages = torch.cat([g.advantages for g in groups])[:, None].to(device)  # (B, 1)
    fields = [stack(name) for name in ("response_ids", "mask", "old_logprobs", "ref_logprobs")]
    return Batch(ids, prompt_mask, *fields, advantages)


def response_logprobs(model, batch, temperature):
    """log π(y_i,t | x, y_i,<t) at the sampling temperature, (B, T); what padding holds is meaningless."""
    if getattr(model, "checkpoints", False) and torch.is_grad_enabled():  # layers computed twice keep no cache
        way = packed_response_logprobs if shares(model, packed_response_logprobs) else plain_response_logprobs
        with parallel.checkpointing(model):
            return way(model, batch, temperature)
    way = shared_response_logprobs if shares(model) else plain_response_logprobs
    return way(model, batch, temperature)


def shared_response_logprobs(model, batch, temperature):
    """The prompt runs once per group. Its last position predicts y_1; the G responses then attend to its repeated keys
    and values, through which gradients flow back into the one prompt pass:

                x_1 … x_P  y_1 … y_T-1          (columns: keys)
        x_1…P   causal     ·                    N rows
        y_1…T-1 all        causal               B = N·G rows
    """
    group_size = len(batch.response_ids) // len(batch.prompt_ids)
    out = model(
        input_ids=batch.prompt_ids, attention_mask=batch.prompt_mask.long(), position_ids=positions(batch.prompt_mask),
        use_cache=True, logits_to_keep=NO_LOGITS, output_hidden_states=True,
    )  # fmt: skip
    hidden = out.hidden_states[-1][:, -1:].repeat_interleave(group_size, 0)  # (B, 1, H)
    if batch.response_ids.shape[1] > 1:
        cache = out.past_key_values
        cache.batch_repeat_interleave(group_size)
        prompt_mask = batch.prompt_mask.repeat_interleave(group_size, 0)  # (B, P)
        mask = torch.cat([prompt_mask, batch.mask[:, :-1]], 1)  # (B, P + T − 1)
        rest = model(
            input_ids=batch.response_ids[:, :-1], attention_mask=mask.long(),
            position_ids=positions(mask)[:, prompt_mask.shape[1] :], past_key_values=cache, use_cache=True,
            logits_to_keep=NO_LOGITS, output_hidden_states=True,
        )  # fmt: skip
        hidden = torch.cat([hidden, rest.hidden_states[-1]], 1)  # (B, T, H)
    return head_logprobs(model, hidden, batch, temperature)


def packed_response_logprobs(model, batch, temperature):
    """The same without a cache, so that layers can be computed twice: one row for a group, N in all.

            x_1 … x_P   y¹_1 … y¹_T   y²_1 … y²_T   (columns: keys; G = 2)
    x       causal      ·             ·
    y¹      all         causal        ·
    y²      all         ·             causal        every y_t has the position P + t − 1
    """
    (n, p), (rows, t) = batch.prompt_ids.shape, batch.response_ids.shape
    group_size, device = rows // n, batch.mask.device
    real = torch.cat([batch.prompt_mask, batch.mask.view(n, -1)], 1)  # (N, L), L = P + G·T
    owner = torch.cat([torch.zeros(p), torch.arange(1, group_size + 1).repeat_interleave(t)]).to(device)  # (L,)
    place = torch.arange(len(owner), device=device)
    seen = (place[:, None] >= place) & ((owner == 0) | (owner[:, None] == owner))  # (L, L)
    seen = (seen & real[:, None]) | (place[:, None] == place)  # (N, L, L); padding sees itself, for it must see some
    later = batch.prompt_mask.sum(-1, keepdim=True) + torch.arange(t, device=device)  # (N, T)
    hidden = model(
        input_ids=torch.cat([batch.prompt_ids, batch.response_ids.view(n, -1)], 1),
        attention_mask=torch.where(seen, 0.0, -torch.inf).to(model.dtype)[:, None],
        position_ids=torch.cat([positions(batch.prompt_mask), later.repeat(1, group_size)], 1),
        use_cache=False, logits_to_keep=NO_LOGITS, output_hidden_states=True,
    ).hidden_states[-1]  # fmt: skip
    first = hidden[:, p - 1 : p, None].expand(-1, -1, group_size, -1).reshape(rows, 1, -1)  # (B, 1, H): predicts y_1
    rest = hidden[:, p:].reshape(rows, t, -1)[:, :-1]
    return head_logprobs(model, torch.cat([first, rest], 1), batch, temperature)


def head_logprobs(model, hidden, batch, temperature):
    """Hidden states (B, T, H) → log-probabilities (B, T), CHUNK tokens at a time and, when gradients flow, each chunk
    computed again on the way back: logits (B, T, V) never exist."""
    head = model.get_output_embeddings()

    def chunk_logprobs(hidden, ids):  # (CHUNK, H), (CHUNK,)
        return -F.cross_entropy(head(hidden).float() / temperature, ids, reduction="none")

    parts = [
        checkpoint(chunk_logprobs, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(hidden[batch.mask].split(CHUNK), batch.response_ids[batch.mask].split(CHUNK), strict=True)
    ]
    return torch.zeros_like(batch.old_logprobs).masked_scatter(batch.mask, torch.cat(parts))  # (B, T)


def plain_response_logprobs(model, batch, temperature):
    """The same by one ordinary forward over [x, y_i] for every row: slower; the yardstick for the function above."""
    group_size = len(batch.response_ids) // len(batch.prompt_ids)
    prompt_ids = batch.prompt_ids.repeat_interleave(group_size, 0)  # (B, P)
    mask = torch.cat([batch.prompt_mask.repeat_interleave(group_size, 0), batch.mask], 1)  # (B, P + T)
    ids = torch.cat([prompt_ids, batch.response_ids], 1)
    logits = model(input_ids=ids, attention_mask=mask.long(), position_ids=positions(mask), use_cache=False).logits
    return token_logprobs(logits[:, prompt_ids.shape[1] - 1 : -1], batch.response_ids, temperature)


def token_logprobs(logits, ids, temperature):
    """log softmax(logits / temperature) at `ids`: (B, T, V), (B, T) → (B, T)."""
    return F.log_softmax(logits.float() / temperature, -1).gather(-1, ids[..., None])[..., 0]


def shares(model, way=shared_response_logprobs):
    """Whether a fast way gives this model's own log-probabilities: tried once on a few tokens.

    It would not where a model scales or caps its logits after the head, or where its cache cannot be repeated.
    """
    known = CHECKED.setdefault(model, {})
    if way not in known:
        rng, vocabulary = torch.Generator().manual_seed(0), model.get_input_embeddings().num_embeddings
        ids = torch.randint(vocabulary, (4, 5), generator=rng)
        prompts = [torch.randint(vocabulary, (n,), generator=rng).tolist() for n in (3, 7)]
        mask = torch.arange(5) < torch.tensor([[5], [3], [1], [4]])
        tensors = (x.to(model.device) for x in (ids, mask, torch.zeros(4, 5)))
        batch = Batch(*left_pad(prompts, model.device), *tensors, None, None)
        try:
            with torch.no_grad():
                fast, plain = (f(model, batch, 1.0) for f in (way, plain_response_logprobs))
            known[way] = agree(model, fast[batch.mask], plain[batch.mask])
        except Exception:  # whatever an architecture answers to arguments that it does not know
            known[way] = False
    return known[way]


def micro_batches(groups, max_tokens):
    """Split groups, sorted by length, so that a part computes at most `max_tokens` positions (one group at least)."""
    parts, width, size = [], 0, 0
    for group in sorted(groups, key=lambda g: (len(g.prompt_ids), g.mask.shape[1])):
        cost = len(group.prompt_ids) + group.mask.numel()  # P + G·T
        if not parts or (size + 1) * max(width, cost) > max_tokens:
            parts, width, size = [*parts, []], 0, 0
        parts[-1].append(group)
        width, size = max(width, cost), size + 1
    return parts


def accumulate_gradient(model, groups, token_loss, *, loss_norm, n_responses, n_tokens, temperature, max_tokens):
    """Add to the gradients that of Σ token_weights · token_loss over the groups, and return the loss's value.

    token_loss(batch, logprobs (B, T)) → (B, T). The counts are those of the whole update, so the result depends
    neither on the split into micro-batches nor on groups left out because they carry no gradient.
    """
    total = 0.0
    for part, counts in parallel.turns(model, micro_batches(groups, max_tokens)):
        batch = collate(part, model.device)
        logprobs = response_logprobs(model, batch, temperature)
        weights = token_weights(batch.mask, loss_norm, n_responses, n_tokens)
        loss = (weights * token_loss(batch, logprobs)).sum() if counts else 0 * logprobs[batch.mask].sum()
        (loss * parallel.world()).backward()  # FSDP takes the mean over ranks
        total += loss.item()
    return sum(parallel.everyone(total))


@torch.no_grad()
def add_reference(model, groups, temperature, max_tokens):
    """Fill in `ref_logprobs` of fresh groups with the frozen reference model."""
    for part, counts in parallel.turns(model, micro_batches(groups, max_tokens)):
        logprobs = response_logprobs(model, collate(part, model.device), temperature).cpu()  # (B, T)
        for group, rows in zip(part, logprobs.split(len(part[0].mask)), strict=True):
            group.ref_logprobs = rows[:, : group.mask.shape[1]].clone() if counts else group.ref_logprobs
    found = parallel.everyone([group.ref_logprobs for group in groups])
    for group, each in zip(groups, zip(*found, strict=True), strict=True):
        group.ref_logprobs = next(logprobs for logprobs in each if logprobs is not None)
