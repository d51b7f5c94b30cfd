"""Sampling from a causal model with several responses to each prompt: Stage 2's rollouts, evaluation's greedy answers.

Symbols and shapes as in `grpo.py`. Nothing of the paper is decided here: `sample` draws from π_old as it is, and
`plain_sample`, the yardstick for its faster way, draws the same responses from the same generator.
"""

from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicLayer

import parallel

CHECKED = WeakKeyDictionary()  # model → what `packs` found


def sample(model, prompts, group_size, max_new_tokens, stop_ids, temperature, generator=None, side_by_side=0):
    """Sample `group_size` responses to each prompt; greedy where the temperature is 0.

    Each of several ranks samples its share of the prompts, so many side by side (0: all), and all are given the whole.
    What is drawn depends on neither.
    Args: model in eval mode; prompts: N lists of token ids; generator: on the model's device, None if greedy.
    Returns (on the CPU): ids (N, G, T); mask (N, G, T), True up to and with the stop token; logprobs (N, G, T), the
        sampler's own log π_old(y_t) at this temperature.
    """
    first, end = parallel.span(len(prompts))
    size, state, parts = side_by_side or len(prompts), generator and generator.get_state(), []
    try:
        with parallel.gathered(model):
            way = packed_sample if packs(model) else plain_sample
            for at in range(first, end, size):
                own, within = prompts[at : min(end, at + size)], (at, len(prompts))
                if generator:
                    generator.set_state(state)
                parts.append(way(model, own, group_size, max_new_tokens, stop_ids, temperature, generator, within))
    except torch.OutOfMemoryError:  # every rank's, or the others would wait for this one
        if parallel.world() == 1:
            raise
        parts = None
    found = parallel.everyone(parts)
    if None in found:
        raise torch.OutOfMemoryError("out of memory while sampling")
    parts = [part for parts in found for part in parts]
    width = max(ids.shape[-1] for ids, *_ in parts)
    return tuple(torch.cat([F.pad(t, (0, width - t.shape[-1])) for t in kind]) for kind in zip(*parts, strict=True))


@torch.no_grad()
def packed_sample(
    model, prompts, group_size, max_new_tokens, stop_ids, temperature, generator=None, within=(0, 0)
):  # fmt: skip
    """`sample` with one row of the cache for a whole group. A step feeds a row the next token of its W open responses
    and writes their keys beside each other, so the prompt's keys exist once and attention is a matrix product:

                x_1 … x_P   y¹_1 y²_1   y¹_2 y²_2       (columns: keys; W = 2)
        y¹_2    all         1    ·      1    ·
        y²_2    all         ·    1      ·    1          every position is P + t, though the columns run on

    Whose response sits where is in `owner` (N, W); that of a finished one is `spare`, an extra row that nobody reads.
    Once a third of the places is spare, those left move together into fewer or narrower rows.
    """
    device, spare = model.device, len(prompts) * group_size  # within: the number of the first prompt, and of how many
    numbers = within[0] * group_size, max(within[1], len(prompts)) * group_size
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
        token, logprob = next_token(logits, temperature, generator, owner, *numbers)  # (N, W)
        response[owner, t], mask[owner, t], logprobs[owner, t] = token, True, logprob
        owner = owner.masked_fill(torch.isin(token, stops), spare)
        n_open = int((owner < spare).sum())
        if t + 1 == max_new_tokens or not n_open:
            break
        if n_open <= 0.67 * owner.numel():
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


def next_token(logits, temperature, generator, owner, first, n_responses):
    """Draw by inverting the distribution function; the most likely token where the temperature is 0.

    Every response has a number of its own in each step, also when it is over: a draw does not depend on its neighbours.
    Args: logits (…, V); owner (…): index of the response, counted from the `first` of `n_responses` in all.
    Returns: token (…) and its log-probability (…).
    """
    log_p = F.log_softmax(logits.float() / (temperature or 1.0), -1)  # (…, V)
    if temperature:
        uniform = torch.rand(n_responses + 1, dtype=torch.double, device=logits.device, generator=generator)
        cdf = log_p.exp().cumsum(-1, dtype=torch.double)
        token = torch.searchsorted(cdf, uniform[first + owner][..., None] * cdf[..., -1:], right=True)
    else:
        token = log_p.argmax(-1, keepdim=True)
    return token[..., 0], log_p.gather(-1, token)[..., 0]


@torch.no_grad()
def plain_sample(
    model, prompts, group_size, max_new_tokens, stop_ids, temperature, generator=None, within=(0, 0)
):  # fmt: skip
    """`sample` with a row of the model's own cache for every response; rows that have stopped are dropped."""
    device, numbers = model.device, (within[0] * group_size, max(within[1], len(prompts)) * group_size)
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
        token, logprob = next_token(logits, temperature, generator, rows, *numbers)  # (rows,)
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


def packs(model):
    """Whether `packed_sample` draws from this model's own distribution: tried once on random prompts.

    An architecture may keep only a window of keys, take no mask of four dimensions or place tokens by other means than
    `position_ids`. No list of names knows; an error, or another log-probability than the plain way's, tells.
    """
    if model not in CHECKED:
        rng, vocabulary = torch.Generator().manual_seed(0), model.get_input_embeddings().num_embeddings
        prompts = [torch.randint(vocabulary, (n,), generator=rng).tolist() for n in (3, 7)]
        try:
            packed, plain = (
                way(model, prompts, 2, 5, [], 1.0, torch.Generator(model.device).manual_seed(0))
                for way in (packed_sample, plain_sample)
            )
            same = (packed[0] == plain[0]).cumprod(-1).bool()  # rounding may tip a draw; from there texts differ
            CHECKED[model] = same.float().mean() > 0.5 and agree(model, packed[2][same], plain[2][same])
        except Exception:  # whatever an architecture answers to arguments that it does not know
            CHECKED[model] = False
    return CHECKED[model]


def agree(model, logprobs, others):
    """Equal but for rounding, of which half precision has more."""
    precise = model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type)
    return (logprobs - others).abs().mean().item() < (1e-4 if precise else 0.1)


def left_pad(prompts, device):
    """Token id lists → ids (N, P) and mask (N, P), True on real tokens. Pad ids are 0 and are never attended to."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)  # (N, P)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    return ids, torch.arange(width, device=device) >= width - lengths[:, None]


def positions(mask):
    """Position ids (N, P) under left padding: the first real token is 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
