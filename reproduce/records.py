"""What a finished run is reduced to, and what tables compare of such records. Pure functions, but for `record_of`.

A record holds the rows of the run's table and, for each Stage 2 method, every rollout group's mean reward: a string a
step, one character a group, LEVELS[16 r̄] (multiples of 1/16); `queries` has two digits of base 36 for its prompt.

Hard and easy prompts are told apart at τ by RULE's mean rewards before ReRULE first replays, where both are one run,
for every variant of a seed's: prompts picked by how they turned out would flatter replay by regression to the mean.
Covers the measurable part of Appendix E (N_on of Eq. 28; N_re, κ and N_eff of Eq. 29)."""

import random
from functools import cache
from itertools import groupby
from math import sqrt
from operator import itemgetter

import numpy as np

from engine.files import read_lines
from engine.plots import NAMES, mean
from reproduce import HERE, read_json
from reproduce.statistics import WINDOW, instability

LEVELS = "0123456789abcdefg"
PARTS = ("rollout", "reference", "update", "replay")  # of a step, each with a clock
# Columns of a table that records keep, how more begin, how many phrasings of a split training uses (two are held out).
KEPT, ATTACKED, PHRASINGS = read_json(HERE / "columns.json").values()
KEPT += [f"{kind}_{part}_recall" for kind in PHRASINGS for part in ("trained", "heldout")]
HELD = ("recall", "refusal", "forget_refusal")
KINDS = {"hard": "h", "easy": "e"}  # of boundary queries of the built-in world; others are "b", forget queries "f"
RATES = ("4e-5", "8e-5", "1.6e-4", "3.2e-4", "6.4e-4")  # of the main figure; the first is the shared one
CURVES = ("rule", "rerule", "random", "recent", "current")  # of the main figure
OWN_BASE = ("base", "select", "world0", "world30", "town", "tofu", "book", "rwku")  # families read with themselves


def record_of(folder, whole=True):
    """The record of a finished run's folder; without `whole`, no group's reward and no curve is in it."""
    config, table = (read_json(folder / name) for name in ("config.json", "table.json"))
    metrics = [row for row in read_lines(folder / "metrics.jsonl") if row["stage"] == 2]
    samples, methods, queries = read_lines(folder / "samples.jsonl"), {}, []
    for method in dict.fromkeys(row["method"] for row in samples):
        own, drawn = ([row for row in rows if row["method"] == method] for rows in (metrics, samples))
        drawn = groupby(sorted(drawn, key=itemgetter("step", "query")), itemgetter("step"))
        groups = [list(rows) for _, rows in drawn]
        queries = ["".join(np.base_repr(row["query"], 36).zfill(2) for row in rows) for rows in groups]
        methods[method] = totals(own, config["prompts_per_step"])
        methods[method]["held"] = [[r["step"], *(r[f"held_{k}"] for k in HELD)] for r in own if "held_recall" in r]
        if not whole:
            continue
        of_age, replayed = ("replay_age", "ess_unclipped", "clipped_share"), [r for r in own if r.get("replay_groups")]
        evaluated = [row for row in own if "eval_retain_recall" in row]
        columns = [short({k: row[f"eval_{k}"] for k in KEPT if f"eval_{k}" in row}) for row in evaluated]
        methods[method] |= {
            "rewards": ["".join(LEVELS[round(16 * mean(row["rewards"]))] for row in rows) for rows in groups],
            "by_age": [[*short({name: row.get(name) for name in of_age}).values()] for row in replayed],
            "evaluations": [{"step": row["step"]} | own for row, own in zip(evaluated, columns, strict=True)],
        }
    early = ("Original", "Retained", "Rej. Steer") if config["start_from"] else ()  # the base run's own
    found, rows = {name: config[name] for name in ("tau", "lr", "steps", "group_size")}, {}
    for name in [name for name in table if name not in early]:
        kept = {k: v for k, v in table[name].items() if k in KEPT or k.startswith(tuple(ATTACKED))}
        rows[name] = short({k: v for k, v in kept.items() if v is not None})
    found |= {"rows": rows, "methods": methods} | ({"queries": queries} if whole else {})
    if whole and {"rule", "rerule"} <= set(methods):  # a base run: what its variants are read with
        asked = {row["query"]: row for row in samples}
        letters = {i: "f" if row["kind"] == "forget" else KINDS.get(row["group"], "b") for i, row in asked.items()}
        answers = {row["question"]: row["answer"] for row in read_lines(folder / "predictions" / "original.jsonl")}
        found["kinds"] = "".join(letters.get(i, "-") for i in range(max(asked) + 1))
        found["cases"] = cases(found, {i: row["prompt"] for i, row in asked.items()}, answers)
    return found


def short(row):
    """A row with five significant digits: enough for any table."""
    return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in row.items()}


def totals(rows, n_groups):
    """What a method's steps add up to: seconds of each part, tokens, and replay's figures (means over its updates)."""
    replayed = [row for row in rows if row.get("replay_groups")]
    active = [row["step"] for row in rows if "replay_groups" in row]
    found = {f"seconds_{k}": sum(row.get(f"seconds_{k}", 0.0) for row in rows) for k in PARTS}
    found["response_tokens"] = sum(row["response_tokens"] for row in rows)
    found["first_replay"] = min(active, default=None)
    found |= {name: sum(row[name] for row in replayed) for name in ("replay_groups", "replay_skipped")}
    found["arithmetic"] = arithmetic(rows, n_groups)
    means = ("ess", "ess_unclipped", "clipped_share", "replay_age")
    return short(found | {name: mean(row.get(name) for row in replayed) for name in means})


def arithmetic(rows, n_groups):
    """Token positions computed, in forwards: one to sample (drawn again: one more), one for π_ref, three to update,
    three to replay what is not skipped. No clock is in it, so what follows from it is the same on every machine."""
    full = max([row.get("replay_groups", 0) for row in rows] + [1])  # what a full replay update draws: a step's groups
    used = [(row.get("replay_groups", 0) - row.get("replay_skipped", 0)) / full for row in rows]
    again = [row.get("redrawn", 0) / n_groups for row in rows]
    return sum((5 + 3 * x + y) * row["response_tokens"] for row, x, y in zip(rows, used, again, strict=True))


def regions(base):
    """{query: "hard" or "easy"}: split at τ by RULE's mean reward before ReRULE first replays."""
    return {query: "hard" if mean(means) < base["tau"] else "easy" for query, means in before_replay(base).items()}


def before_replay(base):
    """{query: its groups' mean rewards before ReRULE first replays}."""
    first, seen = base["methods"]["rerule"]["first_replay"] or base["steps"] + 1, {}
    for step, query, reward in groups_of(base, "rule"):
        if step < first:
            seen.setdefault(query, []).append(reward)
    return seen


def cases(base, prompts, answers):
    """The three hardest prompts of each kind before replay: [(query, kind, prompt, answer)], ties in fixed order."""
    means = {query: mean(values) for query, values in before_replay(base).items()}
    order = sorted(means, key=lambda query: (means[query], random.Random(query).random()))
    own = {"forget": [q for q in order if base["kinds"][q] == "f"]}
    own["boundary"] = [q for q in order if q not in own["forget"]]
    return [[q, kind, prompts[q], answers.get(prompts[q], "")] for kind in own for q in own[kind][:3]]


def groups_of(record, method, last=None):
    """(step, query, mean reward) of every group; of the last third of the steps alone with `last`."""
    rewards = record["methods"][method]["rewards"]
    first = len(rewards) - len(rewards) // WINDOW if last else 0
    steps = list(enumerate(zip(record["queries"], rewards, strict=False), 1))[first:]
    return [(step, int(queries[2 * at : 2 * at + 2], 36), LEVELS.index(character) / 16)
            for step, (queries, characters) in steps for at, character in enumerate(characters)]  # fmt: skip


def outcome(record, method, base):
    """What tables compare of a method in a run; `base`: the base run of its seed. Of a probe: "<region>_<name>"."""
    if "models" in record:
        regions_of = record["models"].get(method, {})
        return {f"{region}_{name}": value for region, row in regions_of.items() for name, value in row.items()}
    row, ran = record["rows"].get(NAMES.get(method, method), {}), record["methods"].get(method)
    found = {name: row.get(name) for name in KEPT}
    for kind, n_trained in PHRASINGS.items():
        trained, held_out = row.get(f"{kind}_trained_recall"), row.get(f"{kind}_heldout_recall")
        found[kind] = None if trained is None else (n_trained * trained + 2 * held_out) / (n_trained + 2)
    if found["hard"] is not None or found["easy"] is not None:
        args = base["args"] if base else ()
        n_hard = int(args[args.index("--crossed") + 1]) if "--crossed" in args else 22  # of 42 neighbours
        hard, easy = (row.get(f"{kind}_heldout_recall") or 0 for kind in ("hard", "easy"))
        found["heldout"] = (n_hard * hard + (42 - n_hard) * easy) / 42
    found["balance"] = score(row) if row.get("retain_recall") is not None else None
    if ran:
        found["seconds_stage2"] = sum(ran[f"seconds_{part}"] for part in PARTS)
    if ran and ran.get("evaluations"):
        found["late_sd"], found["late_unrest"] = instability(ran["evaluations"])
    if ran and base and "rewards" in ran:
        place, late, by_query = regions(base), groups_of(record, method, last=True), {}
        for _, query, reward in late:
            by_query.setdefault((place.get(query), query), []).append(reward)
        for region, kind in KINDS.items():  # the late reward of a region; how many of a kind's groups were hard before
            found[f"late_{region}"] = mean(r for _, query, r in late if place.get(query) == region)
            found[f"below_{region}"] = hard_share(base, base["tau"], kind)
        low = [mean(own) < base["tau"] for (region, _), own in by_query.items() if region == "hard"]
        found["late_below"] = mean(100 * one for one in low)  # % of hard prompts that are still below τ
        chosen = {query for query, *_ in base["cases"]}
        found["late_cases"] = mean(r for _, query, r in late if query in chosen)
    return found


def score(row):
    """Harmonic mean of 100 − forget recall and retain recall; 0 where the run diverged."""
    forgotten, kept = 100 - row["forget_recall"], row["retain_recall"]
    return 0.0 if row.get("stopped") or not forgotten or not kept else 2 * forgotten * kept / (forgotten + kept)


class Results:
    """The records of a report and what tables compare of them. `refused`: runs whose ReRULE never replayed."""

    def __init__(self, records, jobs):
        self.records = {job.name: records[job.name] for job in jobs if job.name in records}
        self.refused = sorted(name for name, run in self.records.items() if never_replayed(run))
        selection = sorted({run["seed"] for run in records.values() if run["family"] == "select"})
        self.seeds = {run["seed"] for run in self.records.values()} - set(selection)
        self.rates = tuple(rate for rate in RATES if self.has(f"random@{rate}"))  # a quick run has two
        self.chosen = choose(records, selection, self.rates)
        self.in_town = best_rates(records, selection, town_rates(self.rates), NAMES, "town")
        self.of = cache(self.of)

    def runs(self, family):
        """{seed: record} of the report's seeds."""
        own = {run["seed"]: run for run in self.records.values() if run["family"] == family}
        return {seed: run for seed, run in sorted(own.items()) if seed in self.seeds}

    def of(self, family, method="rerule"):
        """{seed: outcome of one method}, each read with the base run of its seed."""
        bases = self.runs(family if family in OWN_BASE else family.split("_")[0] if family[:5] == "town_" else "base")
        runs = {seed: run for seed, run in self.runs(family).items() if not never_replayed(run, method)}
        return {seed: outcome(run, method, bases.get(seed)) for seed, run in runs.items()}

    def has(self, family):
        """Whether any run of a family, or of one whose name goes on with a rate, is there."""
        return any(family in (run["family"], run["family"].split("@")[0]) for run in self.records.values())

    def at(self, name, rate):
        """{seed: outcome} of a curve of the main figure at a learning rate; rate: "chosen" for its own."""
        return self.of(*place_of(name, self.chosen[name] if rate == "chosen" else rate))


def hard_share(base, tau, kinds="fbhe"):
    """Share of groups with r̄ < τ before replay. kinds: of prompts, letters as in a record; all unless given."""
    seen = before_replay(base)
    return mean(r < tau for query, values in seen.items() if base["kinds"][query] in kinds for r in values)


def place_of(name, rate, first="base"):
    """(family, method key) of a curve of the main figure at a rate, or of the town's. first: the family that has RULE
    at the shared rate, where ReRULE has one of its own, for the base runs start replay by the paper's rule."""
    if first == "town":
        return f"town@{rate}", name
    if name in NAMES and (name, rate) != ("rerule", RATES[0]):
        return (first if rate == RATES[0] else f"grid@{rate}"), name
    return f"{name}@{rate}", "rule" if name in ("steps", "compute") else "rerule"


def never_replayed(record, method="rerule"):
    """Whether a run was to replay and did not: no condition for any statement about replay."""
    return method == "rerule" in record.get("methods", {}) and record["methods"][method]["first_replay"] is None


def town_rates(rates):
    """RULE is past its best at the fifth; ReRULE's best of the first four is the lowest, so a lower one is tried."""
    return (*rates[:4], "2e-5")


def rate_scores(records, seeds, rates=RATES, names=CURVES, first="select"):
    """{curve: {rate: [`score`, a seed each]}} of the selection runs, as for the baselines; None if replay never ran."""

    def score_of(family, method):
        runs = [records[f"{family}_{seed}"] for seed in seeds if f"{family}_{seed}" in records]
        return [None if never_replayed(run, method) else outcome(run, method, None)["balance"] for run in runs]

    return {name: {rate: score_of(*place_of(name, rate, first)) for rate in rates} for name in names}


def best_rates(records, seeds, rates=RATES, names=CURVES, first="select"):
    """{curve: its best rate on the selection seeds, of those at which it replayed on all}. None where one lacks it."""
    scores, best = rate_scores(records, seeds, rates, names, first), {}
    if not seeds or any(len(own) < len(seeds) for by_rate in scores.values() for own in by_rate.values()):
        return None
    for name, by_rate in scores.items():
        whole = {rate: sum(own) for rate, own in by_rate.items() if None not in own}
        best[name] = max(whole, key=whole.get, default=None)
    return best if all(best.values()) else None


def choose(records, seeds, rates=RATES):
    """What the main figure has chosen: `best_rates`, RULE's for RULE with more steps too, and the steps of the latter.
    Returns: {curve: rate, "n_steps": {rate: steps that give RULE ReRULE's arithmetic}, "ratios": {rate: the ratio}}."""
    best, steps, ratios = best_rates(records, seeds, rates), {}, {}
    for rate in rates if best else ():
        runs = [records[f"{place_of('rule', rate, 'select')[0]}_{seed}"] for seed in seeds]
        ratio = np.median([r["methods"]["rerule"]["arithmetic"] / r["methods"]["rule"]["arithmetic"] for r in runs])
        ratios[rate], steps[rate] = float(ratio), round(ratio * runs[0]["steps"])
    return best and best | {"steps": best["rule"], "compute": best["rule"], "n_steps": steps, "ratios": ratios}


def bound(record, base, method="rerule"):
    """p_H, N_on, N_re, N_eff and √(N_on / N_eff), the last with κ of clipped and of unclipped weights (Eq. 28, 29).
    p_H: the share of hard groups before replay, at the run's own τ. N_re: without skipped groups, as κ."""
    ran = record["methods"][method]
    p_hard = hard_share(base, record["tau"])
    per_group = ran["response_tokens"] / sum(len(step) for step in ran["rewards"])  # G · L
    n_on = p_hard * ran["response_tokens"]  # Eq. 28
    n_re = (ran["replay_groups"] - ran["replay_skipped"]) * per_group  # Eq. 29
    found = {"p_hard": p_hard, "n_on": n_on, "n_re": n_re, "clipped_share": ran["clipped_share"]}
    for name, kappa in (("clipped", ran["ess"]), ("unclipped", ran["ess_unclipped"])):
        n_eff = n_on + (kappa or 0.0) * n_re  # Eq. 29
        found |= {f"kappa_{name}": kappa, f"n_eff_{name}": n_eff, f"bound_{name}": n_eff and sqrt(n_on / n_eff) or None}
    return found
