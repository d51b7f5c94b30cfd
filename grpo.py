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
from transformers.cache_utils import DynamicLayer

CHUNK = 256  # tokens whose logits are held at a time
CHECKED = WeakKeyDictionary()  # model → what `fast_ways` found


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


# --- sampling --------------------------------------------------------------------------------------------------------


def left_pad(prompts, device):
    """Token id lists → ids (N, P) and mask (N, P), True on real tokens. Pad ids are 0 and are never attended to."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)  # (N, P)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    return ids, torch.arange(width, device=device) >= width - lengths[:, None]


def sample(model, prompts, group_size, max_new_tokens, stop_ids, temperature, generator=None):
    """Sample `group_size` responses to each prompt; greedy where the temperature is 0.

    Args: model in eval mode; prompts: N lists of token ids; generator: on the model's device, None if greedy.
    Returns (on the CPU): ids (N, G, T); mask (N, G, T), True up to and with the stop token; logprobs (N, G, T), the
        sampler's own log π_old(y_t) at this temperature.
    """
    way = packed_sample if fast_ways(model)["sample"] else plain_sample
    return way(model, prompts, group_size, max_new_tokens, stop_ids, temperature, generator)


@torch.no_grad()
def packed_sample(model, prompts, group_size, max_new_tokens, stop_ids, temperature, generator=None):
    """`sample` with one row of the cache for a whole group. A step feeds a row the next token of its W open responses
    and writes their keys beside each other, so the prompt's keys exist once and attention is a matrix product:

                x_1 … x_P   y¹_1 y²_1   y¹_2 y²_2       (columns: keys; W = 2)
        y¹_2    all         1    ·      1    ·
        y²_2    all         ·    1      ·    1          every position is P + t, though the columns run on

    Whose response sits where is in `owner` (N, W); that of a finished one is `spare`, an extra row that nobody reads.
    Once a quarter of the places is spare, those left move together into fewer or narrower rows.
    """
    device, spare = model.device, len(prompts) * group_size
    ids, prompt_mask = left_pad(prompts, device)
    out = model(
        input_ids=ids, attention_mask=prompt_mask.long(), position_ids=positions(prompt_mask), use_cache=True,
        logits_to_keep=1,
    )  # fmt: skip
    logits, cache = out.logits.expand(-1, group_size, -1), out.past_key_values  # (N, W, V)
    cache.layers = [Places(layer) for layer in cache.layers]
    owner = torch.arange(spare, device=device).view(-1, group_size)  # (N, W)
    position = prompt_mask.sum(-1, keepdim=True)  # (N, 1)
    hidden = torch.zeros(prompt_mask.shape, dtype=model.dtype, device=device).masked_fill(~prompt_mask, -torch.inf)

    response = torch.zeros(spare + 1, max_new_tokens, dtype=torch.long, device=device)  # (B + 1, T)
    mask, logprobs = torch.zeros_like(response, dtype=torch.bool), torch.zeros_like(response, dtype=torch.float)
    stops = torch.tensor(stop_ids, device=device)
    for t in range(max_new_tokens):
        token, logprob = next_token(logits, temperature, generator, owner, spare)  # (N, W)
        response[owner, t], mask[owner, t], logprobs[owner, t] = token, True, logprob
        owner = owner.masked_fill(torch.isin(token, stops), spare)
        n_open = int((owner < spare).sum())
        if t + 1 == max_new_tokens or not n_open:
            break
        if n_open <= 0.75 * owner.numel():
            width = owner.shape[1]
            rows, places, owner = closer(owner, spare)
            past = torch.arange(t, device=device)[:, None] * width + ids.shape[1]  # (t, 1): where a step's keys begin
            columns = torch.arange(ids.shape[1], device=device).expand(len(rows), -1)  # (N', P)
            columns = torch.cat([columns, (past + places[:, None]).flatten(1)], 1)  # (N', P + t·W')
            for layer in cache.layers:
                layer.select(rows, columns)
            token, position, hidden = token[rows].gather(1, places), position[rows], hidden[rows]
        width = owner.shape[1]
        others = torch.full((width, width), -torch.inf, dtype=model.dtype, device=device).fill_diagonal_(0)
        bias = [hidden[:, None, None].expand(-1, 1, width, -1), others.repeat(1, t + 1).expand(len(owner), 1, -1, -1)]
        logits = model(
            input_ids=token, attention_mask=torch.cat(bias, -1), position_ids=(position + t).expand_as(token),
            past_key_values=cache, use_cache=True,
        ).logits  # fmt: skip
    parts = (response[:-1, : t + 1], mask[:-1, : t + 1], logprobs[:-1, : t + 1])
    return tuple(part.unflatten(0, (len(prompts), group_size)).cpu() for part in parts)  # (B, T) → (N, G, T)


class Places(DynamicLayer):
    """A layer's keys and values (N, heads, columns, D) in room kept ahead: a step writes its own and copies no other's.

    Only stands in for a layer that keeps every key in order: its type is compared, as a window's would not do.
    """

    def __init__(self, layer):
        super().__init__()
        if type(layer) is not DynamicLayer:
            raise TypeError(f"{type(layer).__name__} keeps more, or less, than every key in order")
        self.keys, self.values, self.length = layer.keys, layer.values, layer.keys.shape[2]
        self.is_initialized = True

    def update(self, keys, values, *args, **kwargs):
        start, self.length = self.length, self.length + keys.shape[2]
        if self.length > self.keys.shape[2]:
            room = max(32 * keys.shape[2], self.length // 2)
            self.keys, self.values = (
                torch.cat([held[:, :, :start], held.new_empty(*held.shape[:2], room, held.shape[3])], 2)
                for held in (self.keys, self.values)
            )
        self.keys[:, :, start : self.length], self.values[:, :, start : self.length] = keys, values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self):
        return self.length

    def select(self, rows, columns):
        """Keep `columns` (N', L) of `rows` (N',)."""
        heads = torch.arange(self.keys.shape[1], device=rows.device)[:, None]
        at = (rows[:, None, None], heads, columns[:, None])
        self.keys, self.values, self.length = self.keys[at], self.values[at], columns.shape[1]


def closer(owner, spare):
    """Move open responses together, in the widest rows that leave at most one place in five empty.

    Returns: rows (N',), the row that each new one was cut from; places (N', W') in it; the new owner (N', W').
    """
    counts = (owner < spare).sum(1)  # (N,) open responses
    width = owner.shape[1]
    while width * int((counts + width - 1).div(width, rounding_mode="floor").sum()) > 1.25 * int(counts.sum()):
        width -= 1
    pieces = (counts + width - 1).div(width, rounding_mode="floor")  # (N,) new rows from each
    rows = torch.arange(len(owner), device=owner.device).repeat_interleave(pieces)  # (N',)
    piece = torch.arange(len(rows), device=owner.device) - (pieces.cumsum(0) - pieces)[rows]
    rank = piece[:, None] * width + torch.arange(width, device=owner.device)  # (N', W'): the how many-th open one
    open_first = (owner == spare).int().argsort(dim=1, stable=True)[rows]  # (N', W)
    places = open_first.gather(1, rank.clamp(max=owner.shape[1] - 1))
    return rows, places, owner[rows].gather(1, places).masked_fill(rank >= counts[rows, None], spare)


def next_token(logits, temperature, generator, owner, n_responses):
    """Draw by inverting the distribution function; the most likely token where the temperature is 0.

    Every response has a number of its own in each step, also when it is over: a draw does not depend on its neighbours.
    Args: logits (…, V); owner (…): index of the response, `n_responses` for none.
    Returns: token (…) and its log-probability (…).
    """
    log_p = F.log_softmax(logits.float() / (temperature or 1.0), -1)  # (…, V)
    if temperature:
        uniform = torch.rand(n_responses + 1, dtype=torch.double, device=logits.device, generator=generator)
        cdf = log_p.exp().cumsum(-1, dtype=torch.double)
        token = torch.searchsorted(cdf, uniform[owner][..., None] * cdf[..., -1:], right=True)
    else:
        token = log_p.argmax(-1, keepdim=True)
    return token[..., 0], log_p.gather(-1, token)[..., 0]


@torch.no_grad()
def plain_sample(model, prompts, group_size, max_new_tokens, stop_ids, temperature, generator=None):
    """`sample` with a row of the model's own cache for every response; rows that have stopped are dropped."""
    device = model.device
    ids, prompt_mask = left_pad(prompts, device)
    out = model(
        input_ids=ids, attention_mask=prompt_mask.long(), position_ids=positions(prompt_mask), use_cache=True,
        logits_to_keep=1,
    )  # fmt: skip
    cache, logits = out.past_key_values, out.logits[:, -1].repeat_interleave(group_size, 0)  # (B, V)
    cache.batch_repeat_interleave(group_size)
    attention = prompt_mask.long().repeat_interleave(group_size, 0)  # (B, P)
    position = attention.sum(-1, keepdim=True)  # (B, 1)
    stops = torch.tensor(stop_ids, device=device)

    rows = torch.arange(len(attention), device=device)  # rows still being written
    response = torch.zeros(len(rows), max_new_tokens, dtype=torch.long, device=device)  # (B, T)
    mask, logprobs = torch.zeros_like(response, dtype=torch.bool), torch.zeros_like(response, dtype=torch.float)
    for t in range(max_new_tokens):
        token, logprob = next_token(logits, temperature, generator, rows, len(response))  # (rows,)
        response[rows, t], mask[rows, t], logprobs[rows, t] = token, True, logprob
        keep = (~torch.isin(token, stops)).nonzero()[:, 0]
        if t + 1 == max_new_tokens or not len(keep):
            break
        if len(keep) < len(rows):
            cache.batch_select_indices(keep)
            rows, token, attention, position = rows[keep], token[keep], attention[keep], position[keep]
        attention = F.pad(attention, (0, 1), value=1)
        logits = model(
            input_ids=token[:, None], attention_mask=attention, position_ids=position + t, past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]  # fmt: skip
    parts = (response[:, : t + 1], mask[:, : t + 1], logprobs[:, : t + 1])
    return tuple(part.unflatten(0, (len(prompts), group_size)).cpu() for part in parts)  # (B, T) → (N, G, T)


def decode(tokenizer, ids, mask):
    """Sampled ids and mask (N, G, T) → N lists of G texts."""
    return [
        [tokenizer.decode(row[keep], skip_special_tokens=True).strip() for row, keep in zip(*group, strict=True)]
        for group in zip(ids, mask, strict=True)
    ]


def positions(mask):
    """Position ids (N, P) under left padding: the first real token is 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


# --- log-probabilities and gradients ---------------------------------------------------------------------------------


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
    way = shared_response_logprobs if fast_ways(model)["logprobs"] else plain_response_logprobs
    return way(model, batch, temperature)


def shared_response_logprobs(model, batch, temperature):
    """The prompt runs once per group. Its last position predicts y_1; the G responses then attend to its repeated keys
    and values, through which gradients flow back into the one prompt pass:

                x_1 … x_P  y_1 … y_T-1          (columns: keys)
        x_1…P   causal     ·                    N rows
        y_1…T-1 all        causal               B = N·G rows

    The head then turns hidden states into log-probabilities CHUNK tokens at a time and, when gradients flow, computes
    each chunk again on the way back: logits (B, T, V) never exist.
    """
    group_size = len(batch.response_ids) // len(batch.prompt_ids)
    out = model(
        input_ids=batch.prompt_ids, attention_mask=batch.prompt_mask.long(), position_ids=positions(batch.prompt_mask),
        use_cache=True, logits_to_keep=1, output_hidden_states=True,
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
            logits_to_keep=1, output_hidden_states=True,
        )  # fmt: skip
        hidden = torch.cat([hidden, rest.hidden_states[-1]], 1)  # (B, T, H)
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


def fast_ways(model):
    """{"sample", "logprobs": whether packing and sharing give this model's own log-probabilities}, tried out once.

    An architecture may restrict its keys to a window, take no mask of four dimensions, place its tokens by other means
    or scale its logits after the head. No list of names knows; a few random tokens show it.
    """
    if model not in CHECKED:
        CHECKED[model] = {"sample": agrees(model, packed_sample), "logprobs": agrees(model, shared_response_logprobs)}
    return CHECKED[model]


@torch.no_grad()
def agrees(model, way):
    """Whether `way`, a sampler or a function like `response_logprobs`, agrees with the plain forward on two groups."""
    rng = torch.Generator(model.device).manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    prompts = [torch.randint(vocabulary, (n,), generator=rng, device=model.device).tolist() for n in (3, 7)]
    try:
        sampler = plain_sample if way is shared_response_logprobs else way
        ids, mask, logprobs = (x.flatten(0, 1).to(model.device) for x in sampler(model, prompts, 2, 5, [], 1.0, rng))
        batch = Batch(*left_pad(prompts, model.device), ids, mask, logprobs, None, None)
        if way is shared_response_logprobs:
            logprobs = way(model, batch, 1.0)
        wanted = plain_response_logprobs(model, batch, 1.0)
    except Exception:  # whatever an architecture answers to arguments that it does not know
        return False
    precise = model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type)
    return (logprobs - wanted).abs().mean().item() < (1e-4 if precise else 0.1)


def token_logprobs(logits, ids, temperature):
    """log softmax(logits / temperature) at `ids`: (B, T, V), (B, T) → (B, T)."""
    return F.log_softmax(logits.float() / temperature, -1).gather(-1, ids[..., None])[..., 0]


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
    for part in micro_batches(groups, max_tokens):
        batch = collate(part, model.device)
        logprobs = response_logprobs(model, batch, temperature)
        weights = token_weights(batch.mask, loss_norm, n_responses, n_tokens)
        loss = (weights * token_loss(batch, logprobs)).sum()
        loss.backward()
        total += loss.item()
    return total


@torch.no_grad()
def add_reference(model, groups, temperature, max_tokens):
    """Fill in `ref_logprobs` of fresh groups with the frozen reference model."""
    for part in micro_batches(groups, max_tokens):
        logprobs = response_logprobs(model, collate(part, model.device), temperature).cpu()  # (B, T)
        for group, rows in zip(part, logprobs.split(len(part[0].mask)), strict=True):
            group.ref_logprobs = rows[:, : group.mask.shape[1]].clone()
