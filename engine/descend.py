"""The loop of every training but Stage 2: teaching tiny models, Stage 1, the baselines."""

import math

import torch

from engine.model import optimizer_for
from engine.run import Phase
from engine.seeds import batch_at, derive_seed
from sft import learning_rate, sft_loss_of


def descend(run, phase, stage, model, loss_of, *, steps, lr, warmup, stop=None):
    """One optimiser step on `loss_of(step)`, a scalar with its graph, after another; resumable.

    stop(step) → (more for the log, whether to end: False, True, or why training failed).
    Returns: seconds; why training stopped before its time, or None. It stops where a gradient is not finite, with the
        weights of the step before.
    """
    config, engine = run.config, run.engine
    optimizer = optimizer_for(model, lr, config.weight_decay)
    steps = Phase(run, phase, steps, model, optimizer)
    for step in steps:
        with steps.clock("step"):
            torch.manual_seed(derive_seed(config.seed, phase, "dropout", step))
            model.train()
            loss = loss_of(step)
            loss.backward()
            loss = engine.total(loss.item())
            rate = learning_rate(lr, step, steps.bar.total, warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            norm = engine.step(model, optimizer, config.max_grad_norm)
            model.eval()
            if not math.isfinite(norm):
                steps.over = f"a gradient is not finite at step {step}"
                break
            more, over = stop(step) if stop else ({}, False)
            steps.over = f"{over} at step {step}" if isinstance(over, str) else over
        shown = {name: f"{value:.3g}" for name, value in more.items() if value is not None}
        steps.bar.set_postfix(loss=f"{loss:.3f}", **shown)
        run.metrics.write(
            {"method": phase, "stage": stage, "step": step, "loss": loss, "reward": None, "kl": None,
             "grad_norm": norm, **more, "lr": rate, "seconds": steps.total}
        )  # fmt: skip
    return steps.total, steps.over if isinstance(steps.over, str) else None


def fit(run, phase, stage, model, rows, *, steps, lr, batch_size, warmup, stop=None):
    """`descend` by SFT on (prompt ids, answer ids) rows."""

    def loss_of(step):
        batch = [rows[i] for i in batch_at(len(rows), batch_size, step, run.config.seed, phase)]
        own, weight = run.engine.share(batch, lambda row: len(row[1]))
        return weight * sft_loss_of(model, own)

    return descend(run, phase, stage, model, loss_of, steps=steps, lr=lr, warmup=warmup, stop=stop)
