"""Eq. 4 and Eq. 27 measured: gradient norms and mis-refusal rates on Easy(τ) and Hard(τ), for the models of a base run.

Covers Section 3.2's decomposition of the gradient and the four rates of Appendix E (27). Each model answers every
training query with G fresh rollouts; queries keep the region that they had before replay.

Deviations
- The gradient is Eq. 3's without the KL term. Its norm in a region is that of the mean over the region's groups; a mean
  over noisy groups has a norm above 0 even where the expected gradient is 0, so their number stands beside it.
"""

import json
from types import SimpleNamespace

import analysis
from data import stop_ids
from rerule import counts_of, on_policy_gradient, rollout
from reward import is_refusal
from run import load_model
from world import World

MODELS = {"rej_steer": "Rej. Steer", "rule": "RULE", "rerule": "ReRULE"}


def probe(folder, base):
    """{"models": {name: {region: figures}}} of the models in a base run's folder; `base` is its record."""
    config = SimpleNamespace(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    benchmark, place = World(config.seed, config.crossed).benchmark(), analysis.regions(base)
    return {
        "models": {
            name: regions_of(*load_model(folder / phase, "cpu"), benchmark, place, config)
            for phase, name in MODELS.items()
        }
    }


def regions_of(model, tokenizer, benchmark, place, config):
    """{region: queries, norm of the mean gradient, P(region) · norm, share of equal groups, mis-refusal rates}."""
    queries, stops = benchmark.queries, stop_ids(tokenizer, model, benchmark.newline_stops)
    found = {}
    for region in ("easy", "hard"):
        numbers = [i for i in range(len(queries)) if place.get(i) == region]
        if not numbers:
            continue
        groups, texts, _ = rollout(model, tokenizer, queries, numbers, stops, config, f"probe {region}")
        on_policy_gradient(model, groups, config, counts_of(groups, config))  # no reference: Eq. 3 alone
        squares = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
        model.zero_grad(set_to_none=True)
        refused = {"forget": [], "boundary": []}
        for i, answers in zip(numbers, texts, strict=True):
            refused[queries[i].kind] += [is_refusal(text) for text in answers]
        shares = {kind: sum(values) / len(values) if values else None for kind, values in refused.items()}
        found[region] = {
            "queries": len(numbers), "norm": squares**0.5, "weighted": len(numbers) / len(place) * squares**0.5,
            "equal": sum(group.all_equal() for group in groups) / len(groups),
            "missed": None if shares["forget"] is None else 1 - shares["forget"],  # forget prompts answered
            "false": shares["boundary"],  # boundary prompts refused
            "n_forget": len(refused["forget"]), "n_boundary": len(refused["boundary"]),
        }  # fmt: skip
    return {region: {k: analysis.short(v) for k, v in row.items()} for region, row in found.items()}
