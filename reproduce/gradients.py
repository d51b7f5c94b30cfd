"""Eq. 4 and Eq. 27 measured: gradient norms and mis-refusal rates on Easy(τ) and Hard(τ), for the models of a base run.

Covers Section 3.2's decomposition of the gradient and the four rates of Appendix E (27). Each model answers every
training query with G fresh rollouts; queries keep the region that they had before replay.

Deviations
- The gradient is Eq. 3's without the KL term. Its norm in a region is that of the mean over the region's groups; a mean
  over noisy groups has a norm above 0 even where the expected gradient is 0, so their number stands beside it."""

from functools import partial
from types import SimpleNamespace

from baselines import TITLES
from benchmarks.builtin import World
from data import stop_ids
from engine.plots import mean
from engine.process import Engine
from grpo import on_policy_gradient
from refusal import is_refusal
from reproduce import read_json
from reproduce.records import regions, short
from reproduce.statistics import difference
from rerule import rollout, score
from reward import query_reward


def probe(folder, base):
    """{"models": {name: {region: figures}}} of the models in a base run's folder; `base` is its record."""
    config = SimpleNamespace(**read_json(folder / "config.json"))
    engine = Engine("cpu", config.max_tokens, config.rollout_prompts)
    training, place, found = World(config.seed, config.crossed).training(), regions(base), {}
    for phase in ("rej_steer", "rule", "rerule"):
        found[TITLES[phase]] = regions_of(engine, *engine.load(folder / phase), training, place, config)
    return {"models": found}


def regions_of(engine, model, tokenizer, training, place, config):
    """{region: queries, norm of the mean gradient, P(region) · norm, share of equal groups, mis-refusal rates}."""
    queries, stops, found = training.queries, stop_ids(tokenizer, model, training.newline_stops), {}
    reward = partial(query_reward, name_target=config.forget_reward == "target")
    for region in ("easy", "hard"):
        numbers = [i for i in range(len(queries)) if place.get(i) == region]
        if not numbers:
            continue
        groups = rollout(engine, model, tokenizer, queries, numbers, stops, config, f"probe {region}")
        score(groups, queries, reward, config.unbiased)
        batches = engine.batches(model, groups, config.loss_norm)
        on_policy_gradient(model, batches, 0.0, engine.logprobs(config.temperature))  # Eq. 3 alone
        squares = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
        model.zero_grad(set_to_none=True)
        refused = {"forget": [], "boundary": []}  # "missed" are forget prompts answered, "false" boundary ones refused
        for group in groups:
            refused[queries[group.query].kind] += [is_refusal(text) for text in group.texts]
        found[region] = short({
            "queries": len(numbers), "norm": squares**0.5, "weighted": len(numbers) / len(place) * squares**0.5,
            "equal": sum(group.all_equal() for group in groups) / len(groups),
            "missed": difference(1, mean(refused["forget"])), "false": mean(refused["boundary"]),
        })  # fmt: skip
    return found
