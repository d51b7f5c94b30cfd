"""What a finished run is reduced to, and the statistics over such records. Pure functions, but for `record_of`.

A record holds the rows of the run's table and, for each Stage 2 method, every rollout group's mean reward: a string a
step, one character a group, LEVELS[16 r̄] (rewards of 8 rollouts are multiples of 1/16), and "=" for a group whose
rewards are all 0.5. A group of LEVELS' first or last character has equal rewards too. Which prompts these were stands
in `queries`, two digits of base 36 each.

Hard and easy prompts are told apart at τ by RULE's mean rewards before the step at which ReRULE first replays, where
both methods are the same run, once a seed and for every variant of it: prompts picked by how they turned out would
flatter replay by regression to the mean.

Covers the measurable part of Appendix E (Eq. 28, 29, 31). Symbols as there.
"""

import json
import random
from math import sqrt

import numpy as np

from baselines.grid import score
from engine.files import read_lines
from engine.plots import NAMES, mean

LEVELS = "0123456789abcdefg"
PARTS = ("rollout", "reference", "update", "replay")  # of a step, each with a clock
KEPT = (
    "forget_recall forget_refusal forget_trained_recall forget_heldout_recall forget_trained_refusal "
    "forget_heldout_refusal retain_recall retain_refusal hard_trained_recall hard_heldout_recall easy_trained_recall "
    "easy_heldout_recall leakage seconds stopped forget_tokens retain_tokens forget_quality model_utility "
    "forget_rouge_l forget_paraphrased_recall forget_paraphrased_refusal"
).split()  # columns of a table that records keep
ATTACKED = ("leak_", "answer_", "extraction_", "exact_", "membership_", "privleak", "prefix_", "relearn_", "quantize_",
            "forget_recall_", "retain_recall_")  # how more of them begin  # fmt: skip
WINDOW = 3  # "late" is the last third of a run's steps


# --- records ---------------------------------------------------------------------------------------------------------


def record_of(folder):
    """The record of a finished run's folder."""
    config, table = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("config.json", "table.json"))
    metrics = [row for row in read_lines(folder / "metrics.jsonl") if row["stage"] == 2]
    samples, methods, queries = read_lines(folder / "samples.jsonl"), {}, []
    for method in dict.fromkeys(row["method"] for row in samples):
        own, steps = [row for row in metrics if row["method"] == method], {}
        for row in samples:
            if row["method"] == method:
                steps.setdefault(row["step"], []).append(row)
        groups = [steps[step] for step in sorted(steps)]
        queries = [
            "".join(np.base_repr(row["query"], 36).zfill(2) for row in rows) for rows in groups
        ]  # of every method
        methods[method] = {
            "rewards": ["".join(level(row["rewards"]) for row in rows) for rows in groups],
            **totals(own),
        }
        methods[method]["evaluations"] = [
            {"step": row["step"]} | {k: short(row[f"eval_{k}"]) for k in KEPT if f"eval_{k}" in row}
            for row in own if "eval_retain_recall" in row
        ]  # fmt: skip
    early = ("Original", "Retained", "Rej. Steer") if config["start_from"] else ()  # the base run's own
    rows = {name: row for name, row in table.items() if name not in early}
    found = {name: config[name] for name in ("tau", "lr", "steps", "group_size")}
    found["rows"] = {
        name: {k: short(row[k]) for k in row if is_kept(k) and row[k] is not None} for name, row in rows.items()
    }
    found |= {"methods": methods, "queries": queries}
    if {"rule", "rerule"} <= set(methods):  # a base run: what its variants are read with
        asked = {row["query"]: row for row in samples}
        answers = {row["question"]: row["answer"] for row in read_lines(folder / "predictions" / "original.jsonl")}
        found["kinds"] = "".join(asked[i]["kind"][0] if i in asked else "-" for i in range(max(asked) + 1))
        found["cases"] = cases(found, {i: row["prompt"] for i, row in asked.items()}, answers)
    return found


def is_kept(column):
    return column in KEPT or column.startswith(ATTACKED)


def short(value):
    """Five significant digits: enough for any table."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def level(rewards):
    """A group's rewards as one character."""
    average = sum(rewards) / len(rewards)
    return "=" if average == 0.5 and len(set(rewards)) == 1 else LEVELS[round(16 * average)]


def mean_reward(character):
    """The mean reward that a character stands for."""
    return 0.5 if character == "=" else LEVELS.index(character) / 16


def all_equal(character):
    """Whether the group had no policy gradient."""
    return character in "=0g"


def totals(rows):
    """What a method's steps add up to: seconds of each part, tokens, and replay's figures (means over its updates)."""
    replayed = [row for row in rows if row.get("replay_groups")]
    active = [row["step"] for row in rows if "replay_groups" in row]
    found = {f"seconds_{k}": sum(row.get(f"seconds_{k}", 0.0) for row in rows) for k in PARTS}
    found["response_tokens"] = sum(row["response_tokens"] for row in rows)
    found["first_replay"] = min(active, default=None)
    found["replay_groups"] = sum(row["replay_groups"] for row in replayed)
    found["replay_skipped"] = sum(row["replay_skipped"] for row in replayed)
    found["arithmetic"] = arithmetic(rows)
    for name in ("ess", "ess_unclipped", "clipped_share", "replay_age"):
        found[name] = mean(row.get(name) for row in replayed)
    return {name: short(value) for name, value in found.items()}


def arithmetic(rows):
    """Token positions computed, in forwards: one to sample, one for π_ref, three to update, three to replay.

    Replayed groups have about as many tokens as the step's own; those skipped cost nothing. No clock is in it, so a
    number of steps that follows from it is the same on every machine.
    """
    full = max([row.get("replay_groups", 0) for row in rows] + [1])  # what a full replay update draws: a step's groups
    used = [(row.get("replay_groups", 0) - row.get("replay_skipped", 0)) / full for row in rows]
    return sum((5 + 3 * share) * row["response_tokens"] for row, share in zip(rows, used, strict=True))


def regions(base):
    """{query: "hard" or "easy"}: split at τ by RULE's mean reward before ReRULE first replays."""
    return {query: "hard" if mean(means) < base["tau"] else "easy" for query, means in before_replay(base).items()}


def before_replay(base):
    """{query: its groups' mean rewards before ReRULE first replays}."""
    first, seen = base["methods"]["rerule"]["first_replay"] or base["steps"] + 1, {}
    for step, query, reward, _ in groups_of(base, "rule"):
        if step < first:
            seen.setdefault(query, []).append(reward)
    return seen


def cases(base, prompts, answers):
    """The three hardest forget and the three hardest boundary prompts before replay: [(query, kind, prompt, answer)].

    Equals stand in an order that is arbitrary but fixed.
    """
    means = {query: mean(values) for query, values in before_replay(base).items()}
    order = sorted(means, key=lambda query: (means[query], random.Random(query).random()))
    return [
        [query, kind, prompts[query], answers.get(prompts[query], "")]
        for kind in ("forget", "boundary")
        for query in [q for q in order if base["kinds"][q] == kind[0]][:3]
    ]


def groups_of(record, method, last=None):
    """(step, query, mean reward, all equal) of every group; of the last third of the steps alone with `last`."""
    rewards = record["methods"][method]["rewards"]
    first = len(rewards) - len(rewards) // WINDOW if last else 0
    steps = list(enumerate(zip(record["queries"], rewards, strict=False), 1))[first:]
    return [(step, int(queries[2 * at : 2 * at + 2], 36), mean_reward(character), all_equal(character))
            for step, (queries, characters) in steps for at, character in enumerate(characters)]  # fmt: skip


def outcome(record, method, base):
    """The figures of one method in one run that tables compare; `base` is the base run of its seed."""
    row, ran = record["rows"].get(NAMES.get(method, method), {}), record["methods"].get(method)
    found = {name: row.get(name) for name in KEPT}
    for kind in ("hard", "easy"):
        trained, held_out = row.get(f"{kind}_trained_recall"), row.get(f"{kind}_heldout_recall")
        found[kind] = None if trained is None else (4 * trained + 2 * held_out) / 6  # six phrasings, two held out
    if found["hard"] is not None or found["easy"] is not None:
        args = base["args"] if base else ()
        n_hard = int(args[args.index("--crossed") + 1]) if "--crossed" in args else 22  # of 42 neighbours
        hard, easy = (row.get(f"{kind}_heldout_recall") or 0 for kind in ("hard", "easy"))
        found["heldout"] = (n_hard * hard + (42 - n_hard) * easy) / 42
    found["balance"] = score(row) if row.get("retain_recall") is not None else None
    if ran and base:
        place, late = regions(base), groups_of(record, method, last=True)
        for region in ("hard", "easy"):
            found[f"late_{region}"] = mean(r for _, query, r, _ in late if place.get(query) == region)
        chosen = {query for query, *_ in base["cases"]}
        found["late_cases"] = mean(r for _, query, r, _ in late if query in chosen)
        found["seconds_stage2"] = sum(ran[f"seconds_{part}"] for part in PARTS)
    return found


class Results:
    """The records of a report, by family of runs and seed, and what tables compare of them."""

    def __init__(self, records, jobs):
        self.records = {job.name: records[job.name] for job in jobs if job.name in records}

    def runs(self, family):
        """{seed: record}."""
        return {run["seed"]: run for run in self.records.values() if run["family"] == family}

    def of(self, family, method="rerule"):
        """{seed: outcome of one method}, each read with the base run of its seed."""
        own = {"tofu": "tofu", "tofu_random": "tofu", "world0": "world0", "world30": "world30"}
        bases = self.runs(own.get(family, "base"))
        return {seed: outcome(run, method, bases.get(seed)) for seed, run in sorted(self.runs(family).items())}


def difference(a, b):
    return None if a is None or b is None else a - b


# --- statistics ------------------------------------------------------------------------------------------------------


def bootstrap(values, draws=10000):
    """95 % percentile interval of the mean of `values`, resampled with replacement; the same for the same values."""
    values = np.asarray(values, float)
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(draws, len(values)))].mean(1)
    return tuple(float(x) for x in np.percentile(means, [2.5, 97.5]))


def signs(values, bar=0.0):
    """How many values lie above and below the bar, and the two-sided sign test's p; equals count on neither side."""
    from scipy.stats import binomtest

    up, down = sum(value > bar for value in values), sum(value < bar for value in values)
    return up, down, float(binomtest(up, up + down).pvalue) if up + down else 1.0


def statistic(values):
    """Mean, sd (n − 1), bootstrap interval and sign test against 0 of one value a seed, None left out."""
    values = [value for value in values if value is not None]
    if len(values) < 2:
        return None
    (low, high), (up, down, p) = bootstrap(values), signs(values)
    return {
        "values": values, "n": len(values), "mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)),
        "low": low, "high": high, "up": up, "down": down, "p": p,
    }  # fmt: skip


def paired(a, b, column):
    """Statistic of a − b over the seeds that both have; a, b: {seed: outcome}."""
    return statistic([difference(a[seed].get(column), b[seed].get(column)) for seed in sorted(a) if seed in b])


def instability(evaluations):
    """(sd of retain recall over the last third of the steps, sd of what a straight line through it leaves)."""
    last = max(row["step"] for row in evaluations)
    late = [(row["step"], row["retain_recall"]) for row in evaluations if row["step"] > last - last / WINDOW]
    if len(late) < 3:
        return None, None
    x, y = np.array(late, float).T
    rest = y - np.polyval(np.polyfit(x, y, 1), x)
    return float(y.std(ddof=1)), float(sqrt((rest**2).sum() / (len(y) - 2)))


def slope(points):
    """Least-squares slope of (x, y) points."""
    x, y = np.array(points, float).T
    return float(np.polyfit(x, y, 1)[0])


def rank_correlation(x, y):
    """Spearman's ρ; None where either side is constant."""
    from scipy.stats import spearmanr

    return None if len(set(x)) < 2 or len(set(y)) < 2 else float(spearmanr(x, y).statistic)


def hard_share(base, tau, kind=None):
    """Share of groups with r̄ < τ before replay, of one kind of prompt or of all."""
    seen = before_replay(base)
    return mean(r < tau for query, values in seen.items() if kind in (None, base["kinds"][query]) for r in values)


def rate_scores(records, seeds, rates):
    """{method: {rate: [`grid.score`, a seed each]}} of the selection runs that are there, as for the baselines."""
    names = {rate: "select" if rate == rates[0] else f"grid{rate}" for rate in rates}

    def score_of(name, method):
        runs = [records[f"{name}_{seed}"] for seed in seeds if f"{name}_{seed}" in records]
        return [outcome(run, method, None)["balance"] for run in runs]

    return {method: {rate: score_of(name, method) for rate, name in names.items()} for method in NAMES}


def choose(records, seeds, rates):
    """Each method's best learning rate on the selection seeds, and the steps that give RULE ReRULE's arithmetic.

    Returns: {"rule": rate, "rerule": rate, "steps": int, "ratio": float}, or None until all selection runs are there.
    """
    scores = rate_scores(records, seeds, rates)
    if not seeds or any(len(values) < len(seeds) for by_rate in scores.values() for values in by_rate.values()):
        return None
    best = {method: max(by_rate, key=lambda rate: sum(by_rate[rate])) for method, by_rate in scores.items()}
    runs = [records[f"select_{seed}"] for seed in seeds]
    ratio = float(np.median([r["methods"]["rerule"]["arithmetic"] / r["methods"]["rule"]["arithmetic"] for r in runs]))
    return best | {"steps": round(ratio * runs[0]["steps"]), "ratio": ratio}


def bound(record, base, method="rerule"):
    """p_H, N_on, N_re, N_eff and √(N_on / N_eff), the last with κ of clipped and of unclipped weights (Eq. 28, 29).

    L is the run's mean rollout length; p_H the share of hard groups before replay, at the run's own τ.
    """
    ran = record["methods"][method]
    p_hard = hard_share(base, record["tau"])
    n_groups = sum(len(step) for step in ran["rewards"])
    per_group = ran["response_tokens"] / n_groups  # G · L
    n_on, n_re = p_hard * ran["response_tokens"], ran["replay_groups"] * per_group  # Eq. 28
    found = {"p_hard": p_hard, "n_on": n_on, "n_re": n_re, "clipped_share": ran["clipped_share"]}
    for name, kappa in (("clipped", ran["ess"]), ("unclipped", ran["ess_unclipped"])):
        n_eff = n_on + (kappa or 0.0) * n_re  # Eq. 29
        found |= {f"kappa_{name}": kappa, f"n_eff_{name}": n_eff, f"bound_{name}": n_eff and sqrt(n_on / n_eff) or None}
    return found
