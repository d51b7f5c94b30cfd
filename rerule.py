"""The driver: Stage 1, then RULE or ReRULE, from one command.

Covers Section 3.1 (both stages of RULE), Section 3.3 (the pipeline of ReRULE) and Appendix D through `config.py`. The
equations are in `grpo.py`, `replay.py`, `reward.py` and `sft.py`; the loop, models, optimisers and files are here.

One step of Stage 2:
    1. sample G responses to each of 32 prompts                        sampling.sample
    2. reward them; normalise within each group                        reward.py, grpo.group_advantages
    3. log π_ref of the frozen reference                               grpo.add_reference
    4. on-policy update, Eq. 3 and the KL term                         grpo.policy_gradient_loss, grpo.k3
    5. ReRULE only, once active: one more update from B, Eq. 5         replay.off_policy_loss
    6. ReRULE only: store this step's hard groups in B                 replay.groups_to_store

Deviations
- RULE, ReRULE and PURGE run this same loop; what ReRULE adds is behind `if method == "rerule"`, and PURGE differs in
  its queries, reward and starting point alone.
- No state is kept in random generators: each draw is seeded by (seed, purpose, step), so a resumed run repeats them.
- RULE with PPO in place of GRPO, which the RULE paper also offers, is out of scope.
"""

import config as settings  # first: it sets OMP_WAIT_POLICY before torch is imported

# isort: split
import math
import sys

import torch
from tqdm import tqdm

import baselines
import memory
import parallel
import report
from data import encode_prompt, stop_ids
from evaluate import evaluate
from files import InputError, exit_on_input_error, generator
from grpo import (
    RolloutGroup,
    accumulate_gradient,
    add_reference,
    collate,
    decode,
    group_advantages,
    k3,
    micro_batches,
    policy_gradient_loss,
    response_logprobs,
    sample,
)
from prepare import check_model, load_data, tiny_model
from replay import (
    ReplayBuffer,
    clip_ratio,
    draw,
    groups_to_store,
    importance_ratio,
    is_active,
    is_hard,
    off_policy_loss,
    one_each,
    ratio_statistics,
)
from reward import boundary_reward, forget_reward, is_refusal, purge_reward
from run import Run, clock, load_model, optimizer_for, optimizer_step
from sft import batch_at, stage1


def rollout(model, tokenizer, queries, numbers, stops, config, step):
    """Steps 1 and 2: sample, reward, normalise. Returns groups, their texts and the share cut at the length limit."""
    prompts = [encode_prompt(tokenizer, queries[i].prompt) for i in numbers]
    rng = generator(model.device, config.seed, "rollout", step)
    ids, mask, logprobs = sample(
        model, prompts, config.group_size, config.max_new_tokens, stops, config.temperature, rng, config.rollout_prompts
    )  # (N, G, T)
    texts = decode(tokenizer, ids, mask)
    rewards = torch.tensor(
        [[reward(queries[i], text, config) for text in group] for i, group in zip(numbers, texts, strict=True)]
    )  # (N, G)
    advantages = group_advantages(rewards, config.unbiased)  # (N, G)
    ended = (torch.isin(ids, torch.tensor(stops)) & mask).any(-1)  # (N, G)
    groups = []
    for n, number in enumerate(numbers):
        width = int(mask[n].sum(-1).max())
        part = [tensor[n, :, :width].clone() for tensor in (ids, mask, logprobs)]
        groups.append(
            RolloutGroup(number, torch.tensor(prompts[n]), *part, None, rewards[n].clone(), advantages[n].clone(), step)
        )
    return groups, texts, 1 - ended.float().mean().item()


def reward(query, text, config):
    if query.forbidden:
        return purge_reward(text, query.forbidden)
    if query.kind == "forget":
        return forget_reward(text, query.target if config.forget_reward == "target" else "")
    return boundary_reward(text, query.answers)


def on_policy_gradient(model, groups, config, counts):
    """Step 4: the gradient of Eq. 3 and of β KL. Returns loss, mean k3 and the largest |log π_θ − log π_old|."""
    kl, gap = [], []

    def token_loss(batch, logprobs):
        gap.append((logprobs.detach() - batch.old_logprobs)[batch.mask].abs().max())
        loss = policy_gradient_loss(logprobs, batch.advantages)  # Eq. 3
        if batch.ref_logprobs is not None:
            divergence = k3(logprobs, batch.ref_logprobs)
            kl.append(divergence.detach()[batch.mask].sum())
            loss = loss + config.kl_coef * divergence  # Eq. 2
        return loss

    loss = accumulate_gradient(model, groups, token_loss, **counts)
    return loss, parallel.total(kl) / counts["n_tokens"], parallel.largest(gap)


def off_policy_gradient(model, drawn, config, counts):
    """Step 5: the gradient of Eq. 5 over the drawn groups. Those without any are skipped, yet all divisors count them.

    Returns: the number of groups used; statistics of their importance ratios.
    """
    keep_all = config.replay_kl or config.is_normalize
    used = [group for group in drawn if keep_all or not group.all_equal()]
    if not used:
        return 0, {}
    mean_weight, ratios = 1.0, []

    def ratio_of(batch, logprobs):
        ratio = importance_ratio(logprobs.detach(), batch.old_logprobs, batch.mask, config.is_level)  # (B, T)
        ratios.append(one_each(ratio, batch.mask, config.is_level))
        return ratio

    if config.is_normalize:  # the mean weight must be known before the first gradient
        with torch.no_grad():
            for part, counts_here in parallel.turns(model, micro_batches(used, config.max_tokens)):
                batch = collate(part, model.device)
                logprobs = response_logprobs(model, batch, config.temperature)
                if counts_here:
                    ratio_of(batch, logprobs)
        mean_weight = clip_ratio(parallel.joined(ratios), config.clip_low, config.clip_high).mean()
        ratios.clear()

    def token_loss(batch, logprobs):
        ratio = ratio_of(batch, logprobs)
        loss = off_policy_loss(
            logprobs, ratio, batch.advantages, config.clip_low, config.clip_high, config.is_objective, mean_weight
        )  # Eq. 5
        return loss + config.kl_coef * k3(logprobs, batch.ref_logprobs) if config.replay_kl else loss

    accumulate_gradient(model, used, token_loss, **counts)
    return len(used), ratio_statistics(parallel.joined(ratios), config.clip_low, config.clip_high)


def counts_of(groups, config):
    """What an update over these groups divides by, and how it is computed: keywords of `accumulate_gradient`."""
    return {
        "n_responses": sum(len(group.mask) for group in groups),
        "n_tokens": sum(int(group.mask.sum()) for group in groups),
        "loss_norm": config.loss_norm,
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
    }


def stage2(run, method, model, reference, tokenizer, benchmark, probes):
    """Refusal boundary optimisation with GRPO (RULE); with `method` "rerule", replay of hard groups beside it.

    Returns: seconds; why it stopped before its time, with the last finite weights, or None.
    """
    config, queries = run.config, benchmark.queries
    stops = stop_ids(tokenizer, model, benchmark.newline_stops)
    optimizer = optimizer_for(model, settings.learning_rate(config, method), config.weight_decay)
    buffer, previous, total = ReplayBuffer(config.buffer_size), [], {"phase": 0.0}
    start, payload = run.saved(method)
    if payload:
        run.restore(payload, model, optimizer)
        buffer.add(RolloutGroup(**group) for group in payload["buffer"])
        previous, total = [RolloutGroup(**group) for group in payload["previous"]], payload["seconds"]

    def update():
        return optimizer_step(model, optimizer, config.max_grad_norm)

    bar = tqdm(range(start + 1, config.steps + 1), desc=method, initial=start, total=config.steps, dynamic_ncols=True)
    for step in bar:
        seconds = {}
        with clock(total, "phase"):
            numbers = batch_at(len(queries), config.prompts_per_step, step, config.seed, "queries")
            with clock(seconds, "rollout"):
                groups, texts, truncated = rollout(model, tokenizer, queries, numbers, stops, config, step)
            with clock(seconds, "reference"):
                if config.kl_coef:
                    add_reference(reference, groups, config.temperature, config.max_tokens)
            with clock(seconds, "update"):
                loss, kl, gap = on_policy_gradient(model, groups, config, counts_of(groups, config))
                replaying = method == "rerule" and is_active(len(buffer), config.min_groups, step, config.warmup_steps)
                combined = replaying and config.replay_step == "combined"
                norm = None if combined else update()
            row = {"method": method, "stage": 2, "step": step, **group_metrics(groups, texts, queries, config)}
            row |= {"loss": loss, "kl": kl, "logprob_gap": gap, "truncation": truncated}
            if method == "rerule":
                with clock(seconds, "replay"):
                    if replaying:
                        rng, n = generator("cpu", config.seed, "replay", step), config.replay_groups
                        controls = {"recent": previous, "current": groups, "none": []}
                        store = config.replay_store
                        drawn = draw(controls[store], n, rng) if store in controls else buffer.sample(n, rng)
                        used, ratios = off_policy_gradient(model, drawn, config, counts_of(drawn, config))
                        age = sum(step - group.step for group in drawn) / max(1, len(drawn))
                        row |= {"replay_groups": len(drawn), "replay_skipped": len(drawn) - used, "replay_age": age}
                        row |= ratios
                        if store == "none":  # momentum and weight decay alone
                            for p in model.parameters():
                                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                        if combined:
                            norm = update()
                        elif used or store == "none":
                            row["replay_grad_norm"] = update()
                if not (replaying and config.store_until == "activation"):
                    rng = generator("cpu", config.seed, "store", step)
                    buffer.add(groups_to_store(groups, config.tau, config.replay_store, rng))
                previous = groups
            row |= {"grad_norm": norm, "buffer_size": len(buffer)}
        if not all(math.isfinite(row.get(name, 0.0)) for name in ("grad_norm", "replay_grad_norm")):
            return total["phase"], f"a gradient is not finite at step {step}"
        row |= {f"seconds_{name}": value for name, value in seconds.items()}
        if config.eval_every and step % config.eval_every == 0:
            summary = evaluate_model(run, model, tokenizer, probes, progress=False)["summary"]
            row |= {f"eval_{name}": value for name, value in summary.items() if isinstance(value, (int, float))}
        run.metrics.write(row)
        for group, completions in zip(groups, texts, strict=True):
            query = queries[group.query]
            run.samples.write(
                {"method": method, "step": step, "query": group.query, "kind": query.kind, "group": query.group,
                 "prompt": query.question, "completions": completions, "rewards": group.rewards.tolist()}
            )  # fmt: skip
        bar.set_postfix(reward=f"{row['reward']:.2f}", kl=f"{kl:.3f}", buffer=len(buffer))
        if step == start + 1 or step % max(1, config.steps // 4) == 0:
            show_samples(bar, method, step, groups, texts, queries)
        if config.save_every and step % config.save_every == 0:
            stored = {"buffer": [vars(g) for g in buffer.ring], "previous": [vars(g) for g in previous]}
            run.save(method, step, {"seconds": total, **stored}, model, optimizer)
    return total["phase"], None


def group_metrics(groups, texts, queries, config):
    """Rewards and refusals of a step's rollouts, together and by the kind of query, and shares of kinds of group."""
    row = {
        "reward": torch.stack([group.rewards.mean() for group in groups]).mean().item(),
        "equal_groups": sum(group.all_equal() for group in groups) / len(groups),
        "hard_groups": sum(is_hard(group, config.tau) for group in groups) / len(groups),
        "response_tokens": sum(int(group.mask.sum()) for group in groups),
    }
    for kind in ("forget", "boundary"):
        of_kind = [(g, t) for g, t in zip(groups, texts, strict=True) if queries[g.query].kind == kind]
        refusals = [is_refusal(text) for _, completions in of_kind for text in completions]
        rewards = [group.rewards.mean().item() for group, _ in of_kind]
        row[f"reward_{kind}"] = sum(rewards) / len(rewards) if rewards else None
        row[f"refusal_{kind}"] = sum(refusals) / len(refusals) if refusals else None
    return row


def show_samples(bar, method, step, groups, texts, queries):
    """One completion for a forget and one for a boundary prompt, with its reward: numbers alone hide reward hacking."""
    for kind in ("forget", "boundary"):
        for group, completions in zip(groups, texts, strict=True):
            if queries[group.query].kind == kind:
                question, answer = queries[group.query].question[-60:], completions[0][:70]
                bar.write(
                    f"{method:>7} {step:>4} {kind:>8}  r = {group.rewards[0].item():.1f}  {question} → {answer!r}"
                )
                break


def evaluate_model(run, model, tokenizer, probes, progress=True):
    config = run.config
    return evaluate(
        model, tokenizer, config.benchmark, probes, batch_size=config.eval_batch_size,
        retain_log=config.retain_log or None, progress=progress,
    )  # fmt: skip


# --- the whole job ---------------------------------------------------------------------------------------------------


def main():
    config = settings.resolve(settings.parse(settings.Config))
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no GPU is available")
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    if config.dry_run:
        return memory.show(config)
    device = torch.device("cuda" if on_gpu else "cpu")
    benchmark, probes, retained = load_data(config)
    run = Run(config)
    with parallel.session(device, config.offload):
        # a cache of autocast's would outlive an update; sharded weights are put together in bf16 already
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu and not parallel.active(), cache_enabled=False):
            if not run.finished("run"):
                train(run, device, benchmark, probes, retained)
        if not (run.folder / "table.md").exists():
            report.write(run.folder, config, run.rows())
        report.print_table(run.folder)


def train(run, device, benchmark, probes, retained):
    config = run.config

    def score(phase, model, tokenizer):
        """Evaluate a phase's model, once, and mark the phase as over."""
        if not run.finished(f"{phase} scored"):
            result = evaluate_model(run, model, tokenizer, probes)
            report.save_examples(run.folder, phase, result["per_example"])
            row = {"notes": result["notes"], **result["summary"]}
            if phase in config.method:
                row |= {**run.state["done"][phase], **baselines.data_used(phase, benchmark, tokenizer)}
            run.finish(f"{phase} scored", row)

    if config.model == "tiny":
        run.open()
        model, tokenizer = tiny_model(run, device, benchmark, benchmark.taught, probes)
    else:
        model, tokenizer = load_model(config.model, device)
        check_model(model, tokenizer, config, benchmark, probes)
        run.open()
    start = run.folder / "original" if config.model == "tiny" else config.model
    score("original", model, tokenizer)
    del model
    if retained:
        retained_model, _ = tiny_model(run, device, benchmark, retained, probes, "retained")
        score("retained", retained_model, tokenizer)
    for method in config.method:
        if not run.finished(method):
            model, seconds, stopped = unlearn(run, method, start, device, tokenizer, benchmark, probes)
            if stopped:
                tqdm.write(f"{method}: stopped, {stopped}; its row shows the last finite weights", file=sys.stderr)
            run.save_model(method, model, tokenizer)
            run.finish(method, {"seconds": seconds, "stopped": stopped})
            del model
        score(method, load_model(run.folder / method, device)[0], tokenizer)
    report.write(run.folder, config, run.rows())
    run.finish("run", {})


def unlearn(run, method, start, device, tokenizer, benchmark, probes):
    """Train one method from where it starts. Returns: (model, seconds, why it stopped before its time or None)."""

    def load(path, training=run.config):
        return load_model(path, device, training=training)[0]

    if method == "rej_steer":
        model = load(start)
        return model, *stage1(run, model, tokenizer, benchmark)
    if method in baselines.RECIPES:
        original = load(start).requires_grad_(False) if baselines.needs_original(method) else None
        return baselines.train(run, method, load(start), original, tokenizer, benchmark)
    source = start if method == "purge" else run.folder / "rej_steer"  # RULE and ReRULE: one and the same checkpoint
    model, reference = load(source), load(source, training=None).requires_grad_(False)
    if method == "purge":
        benchmark = baselines.purge_benchmark(benchmark, model, tokenizer, run.config)
    return model, *stage2(run, method, model, reference, tokenizer, benchmark, probes)


if __name__ == "__main__":
    exit_on_input_error(main)
