"""Stage 1, rejection steering: SFT on forget prompts with refusals, L_RS of Section 3.1.

    L_RS(θ) = − E_(x, y^rej) Σ_t log π_θ(y^rej_t | x, y^rej_<t)

The loop around it is `rerule.stage1`.

Deviations
- The sum over t is averaged over all response tokens of a batch, as Hugging Face trainers (and so RULE's code) do.
- Nothing is cut. RULE cuts at 512 tokens, which could cut the refusal away; a row beyond the context is an error."""

import math

import torch
import torch.nn.functional as F

from grpo import positions


def sft_loss(logits, answers):
    """L_RS: mean of −log π_θ(y_t) over response tokens. logits (N, V), from the position before; answers (N,)."""
    return F.cross_entropy(logits.float(), answers)


def collate_sft(rows, device):
    """(prompt ids, answer ids) pairs → ids, mask and labels, each (B, L), padded on the right."""
    rows = [(prompt, prompt + answer) for prompt, answer in rows]
    width = max(len(ids) for _, ids in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for _, ids in rows], device=device)  # (B, L)
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for _, ids in rows], device=device)
    prompt = torch.tensor([[i < len(prompt) for i in range(width)] for prompt, _ in rows], device=device)
    return ids, mask, ids.masked_fill(prompt | (mask == 0), -100)


def sft_loss_of(model, rows, cache=None, seen=None):
    """L_RS on (prompt ids, answer ids) rows, with its graph. The head sees the positions before answer tokens alone.
    cache, seen: keys of what stands before each row, and the mask (B, C) of their columns."""
    ids, mask, labels = collate_sft(rows, model.device)
    whole = mask if cache is None else torch.cat([seen, mask], 1)
    place, keep = positions(whole)[:, -mask.shape[1] :], cache is not None
    said = labels[:, 1:] != -100  # (B, L − 1)
    heads = [part.get_output_embeddings() for part in getattr(model, "pair", [model])]
    narrow = lambda _, args: args[0][:, :-1][said][None]  # noqa: E731  (B, L, H) → (1, N, H)
    hooks = [head.register_forward_pre_hook(narrow) for head in heads]
    try:
        out = model(input_ids=ids, attention_mask=whole, position_ids=place, past_key_values=cache, use_cache=keep)
    finally:
        for hook in hooks:
            hook.remove()
    return sft_loss(out.logits[0], labels[:, 1:][said])


def learning_rate(lr, step, steps, warmup, cosine=True):
    """Linear warm-up, then constant or a half cosine down to 0 at the last of `steps`, unless it is the only one."""
    scale = min(1.0, step / warmup) if warmup else 1.0
    if cosine and step > warmup and steps > 1:
        scale *= 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return lr * scale
