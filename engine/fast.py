"""Fast ways to sample and to score, with the signatures of the plain ones in `grpo.py`, whose numbers they must give.

A group's prompt is computed once and its G responses attend to its keys and values. No list of names knows which
architectures can do that: `choose` tries each way once on a few tokens of the model itself, takes the plain way where
the numbers differ or the try fails, and says which was taken and why. Symbols and shapes as in `grpo.py`."""

import sys
import time
import warnings
from contextlib import contextmanager
from functools import partial
from os.path import commonprefix
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

import grpo
from engine.bars import Bar
from engine.files import RANK
from grpo import Batch, left_pad, next_token, positions

CHUNK = 256  # tokens whose logits are held at a time
OPENING = 64  # tokens that prompts have in common, at least, before those are computed once
NO_LOGITS = torch.tensor([], dtype=torch.long)  # where models make logits of their own: `head_logprobs` does it
TIMES = {}  # {what and architecture: how many times as fast the fast way is}, where it is timed
CHOSEN = WeakKeyDictionary()  # model → {what: way}, as `choose` has found it


def choose(model, what, told):
    """The fast way for `what` if it gives this model's own numbers, else the plain one. `told`, if new, is printed."""
    if what == "logprobs" and is_recomputed(model):
        what = "logprobs, layers computed twice"  # they keep no cache
    chosen = CHOSEN.setdefault(model, {})
    if what not in chosen:
        fast, plain, attempt = WAYS[what]
        key = f"{what}, {type(model).__name__.removeprefix('FSDP')}"
        wrong, right = compare(model, fast, plain, attempt), "gives the plain numbers"
        if not wrong and attempt is attempt_sample and is_timed(model):
            times = TIMES[key] = TIMES.get(key) or speedup(model, fast, plain)
            right += f", {times:.1f} times as fast as {plain.__name__}"
            wrong = f"takes {1 / times:.1f} times as long" if times < 1 else ""
        chosen[what] = plain if wrong else fast
        line = f"{chosen[what].__name__}: {f'{fast.__name__} {wrong}' if wrong else right}"
        if told.get(key) != line:
            told[key] = line
            if not RANK:
                Bar.write(f"{key}: {line}", file=sys.stderr)  # a bar may be live
    return chosen[what]


def compare(model, fast, plain, attempt):
    """What is wrong with the fast way in one attempt on random tokens; "" where it gives the plain numbers."""
    try:
        with torch.no_grad():
            difference = attempt(model, fast, plain)
    except Exception as error:  # whatever an architecture answers to arguments that it does not know
        return f"fails ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
    precise = model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type)
    bound = 1e-4 if precise else 0.1  # rounding, of which half precision has more
    return "" if difference < bound else f"differs by {difference:.2g} nats a token"


def is_timed(model):
    """Not on a CPU, where the same command gives the same bits: a clock must not choose between two roundings."""
    return model.device.type == "cuda"


def speedup(model, fast, plain):
    """How many times as fast as the plain way a fast one decodes, each once warm."""
    prompts, seconds = random_tokens(model, *[(64,)] * 8), {}
    for way in (plain, fast) * 2:
        start = time.perf_counter()
        way(model, prompts, 8, 32, [], 0.0)  # comes back once its tokens are on the CPU
        seconds[way] = time.perf_counter() - start
    return seconds[plain] / seconds[fast]


class Forced:
    """A model made to say given tokens (N, G, T), which notes how likely it found them: so two ways of sampling are
    compared to the last token. Left to draw, rounding tips one of them, and from there the texts differ."""

    def __init__(self, model, tokens):
        self.model, self.tokens, self.device, self.dtype, self.logprobs = model, tokens, model.device, model.dtype, []

    def __call__(self, **inputs):
        out, wanted = self.model(**inputs), self.tokens[..., len(self.logprobs)]  # (N, G)
        if len(inputs["input_ids"]) < len(wanted):  # what the prompts open with
            return out
        shape = out.logits.shape  # (N·G, 1, V), or packed: (N, 1, V) after the prompt, then (N, G, V)
        logits = out.logits.reshape(len(wanted), -1, shape[-1]).expand(*wanted.shape, -1)  # (N, G, V)
        self.logprobs.append(F.log_softmax(logits.float(), -1).gather(-1, wanted[..., None])[..., 0])
        said = F.one_hot(wanted, shape[-1]).to(logits.dtype)
        out.logits = (said if shape.numel() == said.numel() else said[:, :1]).reshape(shape)
        return out


def attempt_sample(model, fast, plain):
    """Mean difference of the log-probabilities of one forced text."""
    tokens, found = torch.tensor(random_tokens(model, (2, 4, 9))[0], device=model.device), []  # (N, G, T)
    tokens[..., 0] = tokens[:, :1, 0]
    long = getattr(model.config, "max_position_embeddings", 0) > OPENING + 16
    opening, *prompts = random_tokens(model, (OPENING if long else 0,), (3,), (7,))
    for way in (fast, plain):
        forced = Forced(model, tokens)
        ids, _, _ = way(forced, [opening + prompt for prompt in prompts], 4, 9, [], 0.0)
        if not torch.equal(ids, tokens.cpu()):
            return float("inf")
        found.append(torch.stack(forced.logprobs, -1))
    return (found[0] - found[1]).abs().mean().item()


def attempt_logprobs(model, fast, plain):
    """Mean difference over two groups of two responses."""
    ids, *prompts = random_tokens(model, (4, 5), (3,), (7,))
    mask = torch.arange(5) < torch.tensor([[5], [3], [1], [4]])
    ids, mask, old = (x.to(model.device) for x in (torch.tensor(ids), mask, torch.zeros(4, 5)))
    batch = Batch([], *left_pad(prompts, model.device), ids, mask, old, None, None, mask)
    return (fast(model, batch, 1.0) - plain(model, batch, 1.0))[mask].abs().mean().item()


def random_tokens(model, *shapes):
    """Token ids as lists, the same at every call."""
    rng, vocabulary = torch.Generator().manual_seed(0), model.get_input_embeddings().num_embeddings
    return [torch.randint(vocabulary, shape, generator=rng).tolist() for shape in shapes]


@torch.no_grad()
def packed_sample(
    model, prompts, group_size, max_new_tokens, stop_ids, temperature, draw=None, decoder=None, room=None
):
    """`grpo.sample` with one row of the cache for a whole group. A step feeds a row the next token of its W open
    responses and writes their keys beside each other: the prompt's keys exist once, attention is a matrix product.
                x_1 … x_P   y¹_1 y²_1   y¹_2 y²_2       (columns: keys; W = 2)
        y¹_2    all         1    ·      1    ·
        y²_2    all         ·    1      ·    1          every position is P + t, though the columns run on
    Whose response sits where is in `owner` (N, W); that of a finished one is `spare`, an extra row that nobody reads.
    Once a third of the places is spare, those left move together into fewer or narrower rows."""
    device, spare = model.device, len(prompts) * group_size
    run, (rests, cache, seen) = partial(model, use_cache=True), read_openings(model, prompts)
    ids, prompt_mask = left_pad(rests, device)
    prompt_mask = torch.cat([seen, prompt_mask], 1)  # (N, P)
    place, p = positions(prompt_mask)[:, seen.shape[1] :], prompt_mask.shape[1]
    out = run(
        input_ids=ids, attention_mask=prompt_mask.long(), position_ids=place, past_key_values=cache, logits_to_keep=1
    )
    logits, cache = out.logits.expand(-1, group_size, -1), out.past_key_values  # (N, W, V)
    cache.layers = [(room or RoomAhead)(layer) for layer in cache.layers]
    decode = decoder(run, cache) if decoder else lambda **inputs: run(past_key_values=cache, **inputs).logits
    owner = torch.arange(spare, device=device).view(-1, group_size)  # (N, W)
    position = prompt_mask.sum(-1, keepdim=True)  # (N, 1)
    hidden = torch.zeros(prompt_mask.shape, dtype=model.dtype, device=device).masked_fill(~prompt_mask, -torch.inf)

    response = torch.zeros(spare + 1, max_new_tokens, dtype=torch.long, device=device)  # (B + 1, T)
    mask, logprobs = torch.zeros_like(response, dtype=torch.bool), torch.zeros_like(response, dtype=torch.float)
    stops = torch.tensor(stop_ids, device=device)
    for t in range(max_new_tokens):
        token, logprob = next_token(logits, temperature, draw and draw()[owner])  # (N, W)
        response[owner, t], mask[owner, t], logprobs[owner, t] = token, True, logprob
        owner = owner.masked_fill(torch.isin(token, stops), spare)
        n_open = int((owner < spare).sum())
        if t + 1 == max_new_tokens or not n_open:
            break
        if n_open <= 0.67 * owner.numel():
            width = owner.shape[1]
            rows, places, owner = move_together(owner, spare)
            past = torch.arange(t, device=device)[:, None] * width + p  # (t, 1): where a step's keys begin
            columns = torch.arange(p, device=device).expand(len(rows), -1)  # (N', P)
            columns = torch.cat([columns, (past + places[:, None]).flatten(1)], 1)  # (N', P + t·W')
            for layer in cache.layers:
                layer.select(rows, columns)
            token, position, hidden = token[rows].gather(1, places), position[rows], hidden[rows]
        width = owner.shape[1]
        others = torch.full((width, width), -torch.inf, dtype=model.dtype, device=device).fill_diagonal_(0)
        bias = [hidden[:, None, None].expand(-1, 1, width, -1), others.repeat(1, t + 1).expand(len(owner), 1, -1, -1)]
        bias, place = torch.cat(bias, -1), (position + t).expand_as(token)
        logits = decode(input_ids=token, attention_mask=bias, position_ids=place)
    parts = (response[:-1, : t + 1], mask[:-1, : t + 1], logprobs[:-1, : t + 1])
    return tuple(part.unflatten(0, (len(prompts), group_size)).cpu() for part in parts)  # (B, T) → (N, G, T)


def read_openings(model, prompts):
    """What prompts open with alike, `OPENING` tokens at least, as MUSE's ten examples, is computed once for all of them
    where that saves a third of the positions, padding included: a row for each opening, a copy of its keys for each
    prompt.
    Returns: the rests of the prompts; the openings' cache of N rows, or None; the mask (N, C) of its columns."""
    alike, grid = {}, lambda some: len(some) * max(map(len, some))
    for prompt in prompts:
        alike.setdefault(tuple(prompt[:OPENING]), []).append(prompt[:-1])
    openings, number = [commonprefix(some) for some in alike.values()], {begin: i for i, begin in enumerate(alike)}
    rows = [number[tuple(prompt[:OPENING])] for prompt in prompts]
    rests = [prompt[len(openings[i]) :] for prompt, i in zip(prompts, rows, strict=True)]
    saves = max(map(len, openings)) >= OPENING and 3 * (grid(openings) + grid(rests)) <= 2 * grid(prompts)
    if not saves or is_recomputed(model):  # layers that are computed twice keep no cache
        return prompts, None, torch.empty(len(prompts), 0, dtype=torch.bool, device=model.device)
    ids, mask = left_pad(openings, model.device)
    run = partial(model, use_cache=True, logits_to_keep=1)
    cache = run(input_ids=ids, attention_mask=mask.long(), position_ids=positions(mask)).past_key_values
    cache.batch_select_indices(torch.tensor(rows, device=model.device))
    return rests, cache, mask[rows]


class RoomAhead(DynamicLayer):
    """A layer's keys and values (N, heads, columns, D) in room kept ahead: a step writes its own and copies no other's.
    Only stands in for a layer that keeps every key in order: its type is compared, as a window's would not do."""

    def __init__(self, layer):
        super().__init__()
        if type(layer) is not DynamicLayer:
            raise TypeError(f"{type(layer).__name__} keeps more, or less, than every key in order")
        self.keys, self.values, self.length = layer.keys, layer.values, layer.keys.shape[2]
        self.is_initialized = True

    def advance(self, width, blank=torch.Tensor.new_empty):
        """Make room for so many columns more. It is not written to before its step: untouched, it takes no memory."""
        start, self.length = self.length, self.length + width
        if self.length > self.keys.shape[2]:
            room = self.length + max(32 * width, self.length // 2)
            for name, held in (("keys", self.keys), ("values", self.values)):
                setattr(self, name, blank(held, (*held.shape[:2], room, held.shape[3])))
                getattr(self, name)[:, :, :start] = held[:, :, :start]
        return start

    def update(self, keys, values, *args, **kwargs):
        start = self.advance(keys.shape[2])
        self.keys[:, :, start : self.length], self.values[:, :, start : self.length] = keys, values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self):
        return self.length

    def select(self, rows, columns):
        """Keep `columns` (N', L) of `rows` (N',)."""
        heads = torch.arange(self.keys.shape[1], device=rows.device)[:, None]
        at = (rows[:, None, None], heads, columns[:, None])
        self.keys, self.values, self.length = self.keys[at], self.values[at], columns.shape[1]


def move_together(owner, spare):
    """Move open responses together, in the widest rows that leave at most one place in five empty.
    Returns: rows (N',), the row that each new one was cut from; places (N', W') in it; the new owner (N', W')."""
    counts = (owner < spare).sum(1)  # (N,) open responses
    width, most = owner.shape[1], 1.25 * int(counts.sum())
    while width * int((pieces := -(-counts // width)).sum()) > most:  # pieces: (N,) new rows from each
        width -= 1
    rows = torch.arange(len(owner), device=owner.device).repeat_interleave(pieces)  # (N',)
    piece = torch.arange(len(rows), device=owner.device) - (pieces.cumsum(0) - pieces)[rows]
    rank = piece[:, None] * width + torch.arange(width, device=owner.device)  # (N', W'): the how many-th open one
    open_first = (owner == spare).int().argsort(dim=1, stable=True)[rows]  # (N', W)
    places = open_first.gather(1, rank.clamp(max=owner.shape[1] - 1))
    return rows, places, owner[rows].gather(1, places).masked_fill(rank >= counts[rows, None], spare)


def shared_response_logprobs(model, batch, temperature):
    """`grpo.response_logprobs` where the prompt runs once per group. Its last position predicts y_1; the G responses
    then attend to its repeated keys and values, through which gradients flow back into the one prompt pass:
                x_1 … x_P  y_1 … y_T-1          (columns: keys)
        x_1…P   causal     ·                    N rows
        y_1…T-1 all        causal               B = N·G rows"""
    group_size = len(batch.response_ids) // len(batch.prompt_ids)
    run = partial(model, use_cache=True, logits_to_keep=NO_LOGITS, output_hidden_states=True)
    prompt_mask = batch.prompt_mask
    out = run(input_ids=batch.prompt_ids, attention_mask=prompt_mask.long(), position_ids=positions(prompt_mask))
    hidden = out.hidden_states[-1][:, -1:].repeat_interleave(group_size, 0)  # (B, 1, H)
    if batch.response_ids.shape[1] > 1:
        cache = out.past_key_values
        cache.batch_repeat_interleave(group_size)
        mask = torch.cat([prompt_mask.repeat_interleave(group_size, 0), batch.mask[:, :-1]], 1)  # (B, P + T − 1)
        ids, place = batch.response_ids[:, :-1], positions(mask)[:, prompt_mask.shape[1] :]
        rest = run(input_ids=ids, attention_mask=mask.long(), position_ids=place, past_key_values=cache)
        hidden = torch.cat([hidden, rest.hidden_states[-1]], 1)  # (B, T, H)
    return head_logprobs(model, hidden, batch, temperature)


def packed_response_logprobs(model, batch, temperature):
    """The same without a cache, so that layers can be computed twice: one row for a group, N in all.
            x_1 … x_P   y¹_1 … y¹_T   y²_1 … y²_T   (columns: keys; G = 2)
    x       causal      ·             ·
    y¹      all         causal        ·
    y²      all         ·             causal        every y_t has the position P + t − 1"""
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
    """Hidden states (B, T, H) → log-probabilities (B, T), CHUNK tokens at a time, and again for gradients."""
    head = model.get_output_embeddings()

    def chunk_logprobs(hidden, ids):  # (CHUNK, H), (CHUNK,)
        return -F.cross_entropy(head(hidden).float() / temperature, ids, reduction="none")

    chunks = zip(hidden[batch.mask].split(CHUNK), batch.response_ids[batch.mask].split(CHUNK), strict=True)
    parts = [checkpoint(chunk_logprobs, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.zeros_like(batch.old_logprobs).masked_scatter(batch.mask, torch.cat(parts))  # (B, T)


def blocks(model):
    """The decoder layers, which transformers marks as what is worth computing twice."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoint_layers(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers 6 will call it something else
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.checkpoints = True


def is_recomputed(model):
    """Whether this forward's layers are to be computed again on the way back."""
    return getattr(model, "checkpoints", False) and torch.is_grad_enabled()


@contextmanager
def checkpointing(model):
    """Let the layers, which transformers checkpoints in training alone, believe it; their dropout goes on sleeping."""
    layers = blocks(model) if is_recomputed(model) else []
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = model.training


WAYS = {
    "sample": (packed_sample, grpo.sample, attempt_sample),
    "logprobs": (shared_response_logprobs, grpo.response_logprobs, attempt_logprobs),
    "logprobs, layers computed twice": (packed_response_logprobs, grpo.response_logprobs, attempt_logprobs),
}
