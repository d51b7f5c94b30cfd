"""Stage 1, rejection steering: SFT on forget prompts with refusals, L_RS of Section 3.1.

    L_RS(θ) = − E_(x, y^rej) Σ_t log π_θ(y^rej_t | x, y^rej_<t)

The same loop, `descend`, teaches the tiny models their facts before any unlearning and trains Appendix B's baselines.

Deviations
- The sum over t is averaged over all response tokens of a batch, as Hugging Face trainers (and so RULE's code) do.
- Nothing is cut. RULE cuts prompt and answer at 512 tokens, which could cut the refusal away; here a prompt that leaves
  no room for its answer in the model's context is an error.
- RULE takes the checkpoint after a chosen epoch; here Stage 1 may also end once a given share of answers sampled to
  forget prompts are refusals (`sft_stop`), which suits every seed where a fixed count does not.
"""

import math
import random

import torch
import torch.nn.functional as F
from tqdm import tqdm

import parallel
from data import encode_answer, encode_prompt, stop_ids
from files import derive_seed, generator
from grpo import decode, positions, sample
from reward import is_refusal
from run import clock, optimizer_for, optimizer_step


def sft_loss(logits, labels):
    """L_RS: mean of −log π_θ(y_t) over response tokens.

    Args: logits (B, L, V); labels (B, L), −100 on prompt and padding. Returns: scalar.
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


def collate_sft(rows, device):
    """(prompt ids, answer ids) pairs → ids, mask and labels, each (B, L), padded on the right."""
    rows = [(prompt, prompt + answer) for prompt, answer in rows]
    width = max(len(ids) for _, ids in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for _, ids in rows], device=device)  # (B, L)
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for _, ids in rows], device=device)
    prompt = torch.tensor([[i < len(prompt) for i in range(width)] for prompt, _ in rows], device=device)
    return ids, mask, ids.masked_fill(prompt | (mask == 0), -100)


def batch_at(n, batch_size, step, *seed_parts):
    """Row numbers of the batch of `step` (from 1): one shuffled pass over n rows after another, batches running over.

    It depends on nothing but its arguments, so the data position of a resumed run is its step.
    """
    batch = []
    for k in range((step - 1) * batch_size, step * batch_size):
        epoch, place = divmod(k, n)
        if place == 0 or not batch:
            order = list(range(n))
            random.Random(derive_seed(*seed_parts, epoch)).shuffle(order)
        batch.append(order[place])
    return batch


def learning_rate(lr, step, steps, warmup, cosine):
    """Linear warm-up, then constant or a half cosine down to 0 at the last of `steps`."""
    scale = min(1.0, step / warmup) if warmup else 1.0
    if cosine and step > warmup:
        scale *= 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return lr * scale


def sft_loss_of(model, rows):
    """L_RS on (prompt ids, answer ids) rows, with its graph."""
    ids, mask, labels = collate_sft(rows, model.device)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
    return sft_loss(out.logits, labels)


def descend(run, phase, stage, model, loss_of, *, steps, lr, warmup, stop=None):
    """One optimiser step on `loss_of(step)`, a scalar with its graph, after another; resumable.

    stop(step) → (more for the log, whether to end: False, True, or why training failed).
    Returns: seconds; why training stopped before its time, or None. It stops where a gradient is not finite, with the
        weights of the step before.
    """
    config = run.config
    optimizer = optimizer_for(model, lr, config.weight_decay)
    start, payload = run.saved(phase)
    seconds, over = {"phase": 0.0}, False
    if payload:
        run.restore(payload, model, optimizer)
        seconds, over = payload["seconds"], payload["over"]
    bar = tqdm(range(start + 1, steps + 1), desc=phase, initial=start, total=steps, dynamic_ncols=True)
    for step in bar:
        if over:
            break
        with clock(seconds, "phase"):
            torch.manual_seed(derive_seed(config.seed, phase, "dropout", step))
            model.train()
            loss = loss_of(step)
            loss.backward()
            loss = parallel.total([loss.detach()]) / parallel.world()
            rate = learning_rate(lr, step, steps, warmup, cosine=True)
            for group in optimizer.param_groups:
                group["lr"] = rate
            norm = optimizer_step(model, optimizer, config.max_grad_norm)
            model.eval()
            if not math.isfinite(norm):
                over = f"a gradient is not finite at step {step}"
                break
            more, over = stop(step) if stop else ({}, False)
            over = f"{over} at step {step}" if isinstance(over, str) else over
        shown = {name: f"{value:.3g}" for name, value in more.items() if value is not None}
        bar.set_postfix(loss=f"{loss:.3f}", **shown)
        run.metrics.write(
            {"method": phase, "stage": stage, "step": step, "loss": loss, "reward": None, "kl": None,
             "grad_norm": norm, **more, "lr": rate, "seconds": seconds["phase"]}
        )  # fmt: skip
        if config.save_every and step % config.save_every == 0:
            run.save(phase, step, {"seconds": seconds, "over": over}, model, optimizer)
    return seconds["phase"], over if isinstance(over, str) else None


def fit(run, phase, stage, model, rows, *, steps, lr, batch_size, warmup, stop=None):
    """`descend` by SFT on (prompt ids, answer ids) rows."""

    def loss_of(step):
        batch = [rows[i] for i in batch_at(len(rows), batch_size, step, run.config.seed, phase)]
        own, weight = parallel.share(batch, lambda row: len(row[1]))
        return weight * sft_loss_of(model, own)

    return descend(run, phase, stage, model, loss_of, steps=steps, lr=lr, warmup=warmup, stop=stop)


def stage1(run, model, tokenizer, benchmark):
    """Rejection steering: refusals to forget prompts until enough sampled answers refuse, or the steps are over."""
    config = run.config
    rows = [(encode_prompt(tokenizer, p), encode_answer(tokenizer, p, refusal)) for p, refusal in benchmark.refusals]
    stops = stop_ids(tokenizer, model, benchmark.newline_stops)
    forget = [encode_prompt(tokenizer, q.prompt) for q in benchmark.queries if q.kind == "forget"]

    def refusal_share(step):
        if not config.sft_stop:
            return {"refusal_forget": None}, False
        rng = generator(model.device, config.seed, "stop", step)
        prompts = [forget[i] for i in torch.randperm(len(forget), generator=rng, device=model.device)[:64].tolist()]
        ids, mask, _ = sample(model, prompts, 1, config.max_new_tokens, stops, config.temperature, rng)
        texts = decode(tokenizer, ids, mask)
        share = sum(is_refusal(text) for (text,) in texts) / len(texts)
        return {"refusal_forget": share}, share >= config.sft_stop

    steps = config.sft_steps or max(1, round(config.sft_epochs * len(rows) / config.sft_batch_size))
    return fit(
        run, "rej_steer", 1, model, rows, steps=steps, lr=config.sft_lr, batch_size=config.sft_batch_size,
        warmup=min(config.sft_warmup, steps), stop=refusal_share,
    )  # fmt: skip
