"""The driver: Stage 1, then RULE or ReRULE, from one command.

Covers Section 3.1 (both stages of RULE), Section 3.3 (the pipeline of ReRULE) and Appendix D through `config.py`. The
equations are in `grpo.py`, `replay.py`, `reward.py` and `sft.py`; the loops are here. How models are run, plainly or
fast, by one process or several, is the business of the `engine` that is handed around.

One step of Stage 2:
    1. sample G responses to each of 32 prompts                 rollout, grpo.sample
    2. reward them; normalise within each group                 score, reward.query_reward, grpo.group_advantages
    3. log π_ref of the frozen reference                        grpo.add_reference
    4. on-policy update, Eq. 3 and the KL term                  grpo.on_policy_gradient
    5. ReRULE only, once active: one more update, Eq. 5         replay_update, replay.off_policy_gradient
    6. ReRULE only: store this step's hard groups in B          replay.ReplayBuffer.store

Deviations
- RULE, ReRULE and PURGE run this same loop. RULE never stores, so its B stays empty and step 5 never runs; PURGE
  differs in its queries, reward and starting point alone.
- Stage 1 may end once a given share of answers sampled to forget prompts are refusals (`sft_stop`), which suits every
  seed where RULE's fixed number of epochs does not.
- No state is kept in random generators: each draw is seeded by (seed, purpose, step), so a resumed run repeats them.
- RULE with PPO in place of GRPO, which the RULE paper also offers, is out of scope."""

import benchmarks
from config import Config
from engine.flags import parse, resolve, run_command


def configure(argv=None):
    """Command line → Config with every preset filled in and every value checked. Raises: InputError."""
    presets = {name: (benchmark.preset, benchmark.tiny) for name, benchmark in benchmarks.ALL.items()}
    return resolve(parse(Config, argv, presets), benchmarks.ALL)


if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    CONFIG = run_command(configure, leave=False)

import math
import sys
from functools import partial

import torch
from tqdm import tqdm

from baselines import losses, train
from baselines.controls import buffer_for, least_stored, refill, zero_gradient
from benchmarks import associated
from benchmarks.attacks import attacked, prepare, run_columns
from benchmarks.logs import read_retained
from benchmarks.shared import check_model
from benchmarks.tiny import sample_of, tiny_model
from data import decode, encode_answer, encode_prompt, stop_ids
from engine import report
from engine.model import optimizer_for
from engine.run import Phase, Run, fit, start
from engine.seeds import batch_at, generator
from evaluate import evaluate
from grpo import RolloutGroup, add_reference, counts, group_advantages, on_policy_gradient
from refusal import is_refusal
from replay import clip_ratio, fresh_statistics, is_active, off_policy_gradient, ratio_statistics, ratios_of
from reward import query_reward


def stage1(run, model, tokenizer, training):
    """Rejection steering: refusals to forget prompts until enough sampled answers refuse, or the steps are over.
    Returns: seconds; why it stopped before its time, with the last finite weights, or None."""
    config, engine = run.config, run.engine
    rows = [(encode_prompt(tokenizer, p), encode_answer(tokenizer, p, refusal)) for p, refusal in training.refusals]
    stops = stop_ids(tokenizer, model, training.newline_stops)
    forget = [encode_prompt(tokenizer, q.prompt) for q in training.queries if q.kind == "forget"]

    def refusal_share(step):
        if not config.sft_stop:
            return {"refusal_forget": None}, False
        rng = generator(model.device, config.seed, "stop", step)
        prompts = [forget[i] for i in torch.randperm(len(forget), generator=rng, device=model.device)[:64].tolist()]
        ids, mask, _ = engine.sample(model, prompts, 1, config.max_new_tokens, stops, config.temperature, rng)
        texts = decode(tokenizer, ids, mask)
        share = sum(is_refusal(text) for (text,) in texts) / len(texts)
        return {"refusal_forget": share}, share >= config.sft_stop

    steps = config.sft_steps or max(1, round(config.sft_epochs * len(rows) / config.sft_batch_size))
    return fit(
        run, "rej_steer", 1, model, rows, steps=steps, lr=config.sft_lr, batch_size=config.sft_batch_size,
        warmup=min(config.sft_warmup, steps), stop=refusal_share,
    )  # fmt: skip


def stage2(run, method, model, reference, tokenizer, training, reward, watch=lambda step: {}):
    """Refusal boundary optimisation with GRPO: RULE; with `method` "rerule", replay of hard groups beside it.
    Args: reward(query, text) → r; watch(step) → more for the log. Returns: as `stage1`."""
    config, engine, queries = run.config, run.engine, training.queries
    logprobs_of, stops = engine.logprobs(config.temperature), stop_ids(tokenizer, model, training.newline_stops)

    def collect(numbers, *draw):
        groups = rollout(engine, model, tokenizer, queries, numbers, stops, config, *draw)  # 1  G responses each
        return score(groups, queries, reward, config.unbiased)  # 2  rewards, Â within each group

    optimizer = optimizer_for(model, train.learning_rate(config, method), config.weight_decay)
    update, buffer = partial(engine.step, model, optimizer, config.max_grad_norm), buffer_for(config, collect)
    phase = Phase(run, method, config.steps, model, optimizer, buffer)
    for step in phase:
        with phase.clock("rollout"):
            numbers = batch_at(len(queries), config.prompts_per_step, step, config.seed, "queries")
            groups, redrawn = refill(collect(numbers, step), len(queries), collect, config)
        with phase.clock("reference"):
            if config.kl_coef:
                add_reference(reference, engine.batches(reference, groups), logprobs_of)  # 3  log π_ref
                engine.complete(groups, "ref_logprobs")
        with phase.clock("update"):
            fresh = engine.batches(model, groups, config.loss_norm)
            loss, kl = engine.reduce(groups, *on_policy_gradient(model, fresh, config.kl_coef, logprobs_of))  # 4  Eq. 3
            row = {"loss": loss, "kl": kl / counts(groups)[1], "redrawn": redrawn, **fresh_statistics(groups, config)}
            active = is_active(len(buffer), least_stored(config, step), step, config.warmup_steps)
            if not (active and config.replay_step == "combined"):
                row["grad_norm"] = update()
        with phase.clock("replay"):
            if active:  # 5  Eq. 5 on groups from B
                row |= replay_update(engine, model, buffer, groups, update, logprobs_of, config, step)
            if method == "rerule":  # 6  r̄ < τ enters B: all that ReRULE adds to RULE, whose B stays empty
                closed = active and config.store_until == "activation"
                buffer.store(groups, config.tau, generator("cpu", config.seed, "store", step), closed)
        if not all(math.isfinite(row.get(name, 0.0)) for name in ("grad_norm", "replay_grad_norm")):
            return phase.total, f"a gradient is not finite at step {step}"
        report.record(run, phase, row | {"buffer_size": len(buffer)} | watch(step), groups, queries, stops)
    return phase.total, None


def rollout(engine, model, tokenizer, queries, numbers, stops, config, step, *name):
    """Step 1: groups of G responses to the queries of these numbers. `step` and `name` seed the draw."""
    prompts = [encode_prompt(tokenizer, queries[i].prompt) for i in numbers]
    rng = generator(model.device, config.seed, "rollout", step, *name)
    ids, mask, logprobs = engine.sample(
        model, prompts, config.group_size, config.max_new_tokens, stops, config.temperature, rng
    )  # (N, G, T)
    groups = []
    for n, (query, texts) in enumerate(zip(numbers, decode(tokenizer, ids, mask), strict=True)):
        width = int(mask[n].sum(-1).max())
        part = [tensor[n, :, :width].clone() for tensor in (ids, mask, logprobs)]  # (G, T of this group)
        groups.append(RolloutGroup(query, step, torch.tensor(prompts[n]), *part, texts=texts, kind=queries[query].kind))
    return groups


def score(groups, queries, reward, unbiased=True):
    """Step 2: r_i = reward(query, text) of every response, and Â_i within each group."""
    rewards = torch.tensor([[reward(queries[group.query], text) for text in group.texts] for group in groups])  # (N, G)
    for group, own, advantages in zip(groups, rewards, group_advantages(rewards, unbiased), strict=True):
        group.rewards, group.advantages = own.clone(), advantages.clone()  # (G,)
    return groups


def replay_update(engine, model, buffer, groups, update, logprobs_of, config, step):
    """Step 5: one more update, by Eq. 5 over groups drawn from B. Those without any gradient are skipped, yet all
    divisors count them. Returns: what the log says of it."""
    drawn = buffer.draw(config.replay_groups, groups, generator("cpu", config.seed, "replay", step))
    used = [group for group in drawn if config.replay_kl or config.normalize_ratio or not group.all_equal()]
    row = {"replay_groups": len(drawn), "replay_skipped": len(drawn) - len(used)}
    mean_weight, clip = 1.0, (config.epsilon_low, config.epsilon_high)
    if used:
        batches = partial(engine.batches, model, used, config.loss_norm, of=drawn)
        if config.normalize_ratio:
            ratios = engine.joined(ratios_of(model, batches(), config.ratio_level, logprobs_of))
            mean_weight = clip_ratio(ratios, *clip).mean()
        ratios = off_policy_gradient(model, batches(), config, report.noted(logprobs_of), mean_weight)  # Eq. 5
        row |= ratio_statistics(engine.joined(ratios), *clip)
    if not drawn:  # `--replay_store none`: momentum and weight decay alone
        zero_gradient(model)
    if config.replay_step == "combined":
        row["grad_norm"] = update()
    elif used or not drawn:
        row["replay_grad_norm"] = update()
    return row | report.replayed(engine, config, drawn, used, step)


# --- the whole job ---------------------------------------------------------------------------------------------------


def main(config, figures=True):
    """Everything that one command does; `figures`: draw the run's pictures too."""
    engine = start(config)
    if config.dry_run:
        from scale import memory

        return memory.show(config)
    benchmark = benchmarks.ALL[config.benchmark]
    training, probes = benchmark.train(config), benchmark.probes(config)
    texts = prepare(config.attack, benchmark, config, probes)
    associated.given(config, benchmark, probes)  # told before training where it cannot be
    retained = read_retained(config.retain_log, benchmark, probes) if config.retain_log else None
    run = Run(config, engine)
    with engine.session():
        if not run.finished("run"):
            unlearn_all(run, benchmark, sample_of(training, config), probes, retained, texts)
        if not (run.folder / "table.md").exists():
            report.write(run.folder, run_columns(benchmark, config.attack, run.rows()), run.rows(), figures)
        report.print_table(run.folder)


def unlearn_all(run, benchmark, training, probes, retained, texts):
    """The original model, each method in turn, and the score of each."""
    config, engine = run.config, run.engine
    judge = partial(evaluate, engine, benchmark=benchmark, probes=probes, batch_size=config.eval_batch_size,
                    retained=retained)  # fmt: skip

    def score_phase(phase, model, tokenizer):
        """Evaluate a phase's model, once, and mark the phase as over."""
        if not run.finished(f"{phase} scored"):
            result = attacked(run, phase, model, tokenizer, benchmark, probes, texts, judge(model, tokenizer))
            report.save_examples(run.folder, phase, result["per_example"])
            row = {**result["summary"], **associated.measure(engine, model, tokenizer, held, config)}
            row["notes"] = result["notes"] + associated.warning(phase, row, run.rows().get("rej_steer", {}))
            if phase in config.method:
                row |= {**run.state["done"][phase], **train.data_used(phase, training, tokenizer)}
            run.finish(f"{phase} scored", row)

    original, held = run.folder / "original" if config.model == "tiny" else config.model, []
    if config.model == "tiny":
        run.open()
        model, tokenizer = tiny_model(run, benchmark, training, probes)
    else:
        model, tokenizer = engine.load(config.model)
        check_model(model, tokenizer, config, benchmark, training.prompts(), probes)
        run.open(model)
    if benchmark.retained or "retained" in config.method:
        score_phase("retained", *tiny_model(run, benchmark, training, probes, "retained"))
        if benchmark.forget_rows and not retained:
            judge = partial(judge, retained=read_retained(run.folder / "predictions/retained.jsonl", benchmark, probes))
    training, held = associated.split(training, benchmark, probes, engine, model, tokenizer, config)
    score_phase("original", model, tokenizer)
    del model
    for method in [name for name in config.method if name != "retained"]:
        if not run.finished(method):
            model, seconds, stopped = unlearn(run, method, original, tokenizer, training, judge, held)
            if stopped:
                tqdm.write(f"{method}: stopped, {stopped}; its row shows the last finite weights", file=sys.stderr)
            run.save_model(method, model, tokenizer)
            run.finish(method, {"seconds": seconds, "stopped": stopped, **report.replay_of(run, method)})
            del model
        score_phase(method, engine.load(run.folder / method)[0], tokenizer)
    run.finish("run", {})


def unlearn(run, method, original, tokenizer, training, judge, held=()):
    """Train one method from where it starts. Returns: (model, seconds, why it stopped before its time or None)."""
    config, engine = run.config, run.engine
    source = run.folder / "rej_steer" if method in ("rule", "rerule") else original  # both from the same checkpoint
    model, _ = engine.load(source, training=config)
    if method == "rej_steer":
        return model, *stage1(run, model, tokenizer, training)
    reference = engine.reference(model, source) if train.needs_reference(method) else None
    if method in losses.RECIPES:
        return train.train(run, method, model, reference, tokenizer, training)
    reward = partial(query_reward, name_target=config.forget_reward == "target")
    if method == "purge":
        training, reward = train.purge_task(training, engine, model, tokenizer, config)
    evaluated = partial(judge, model, tokenizer, progress=False)
    watch = partial(associated.watched, run, method, model, tokenizer, evaluated, held)
    return model, *stage2(run, method, model, reference, tokenizer, training, reward, watch)


if __name__ == "__main__":
    run_command(lambda: main(CONFIG))
