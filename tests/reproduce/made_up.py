"""Records of runs that never ran, options of the command, and a plan small enough to run in a test."""

import numpy as np

from reproduce import plan
from reproduce.__main__ import Options
from reproduce.plan import Job
from reproduce.records import KEPT, PARTS

SMALL = (
    "--tiny_epochs 0.3 --tiny_hidden 32 --tiny_layers 1 --sft_steps 2 --sft_stop 0 --steps 4 --group_size 8 "
    "--prompts_per_step 8 --tau 1 --min_groups 4 --warmup_steps 1 --replay_groups 4 --max_new_tokens 4 --save_every 1"
)


def packed(*queries):
    return "".join(np.base_repr(query, 36).zfill(2) for query in queries)


def base_run(rule, rerule, first_replay=3, tau=0.5, kinds="ffbb"):
    """A base run of two groups a step; rule, rerule: one string of two characters a step."""
    steps = [packed(0, 2), packed(1, 3)] * (len(rule) // 2)

    def method(rewards, first):
        seconds = {f"seconds_{part}": 1.0 for part in PARTS}
        return {
            "rewards": rewards, "first_replay": first, "response_tokens": 100, "replay_groups": 6 if first else 0,
            "replay_skipped": 0, "ess": 0.95, "ess_unclipped": 0.5, "clipped_share": 0.7, "evaluations": [], **seconds,
        }  # fmt: skip

    return {
        "family": "base", "seed": 21, "args": ["--seed", "21"], "tau": tau, "steps": len(rule), "queries": steps,
        "kinds": kinds, "rows": {}, "methods": {"rule": method(rule, None), "rerule": method(rerule, first_replay)},
        "cases": [[0, "forget", "Q0?", "A"], [2, "boundary", "Q2?", "B"]],
    }  # fmt: skip


def options(**changes):
    return Options(tofu_dir="DATA", rwku_dir="DATA", **changes)


def made_up(job):
    """A record for a job that never ran, with plausible shapes and values that differ from seed to seed."""
    rng = np.random.default_rng(sum(map(ord, job.name)))
    about = {"family": job.family, "seed": job.seed, "args": list(job.args or ()), "commit": "c0ffee", "seconds": 9.0,
             "versions": {"python": "3", "torch": "2"}}  # fmt: skip
    if job.family == "probe":
        figures = {"queries": 4, "norm": 1.0, "weighted": float(rng.random()), "equal": 0.5, "missed": 0.1,
                   "false": 0.2}  # fmt: skip
        return about | {"models": {m: {"easy": figures, "hard": figures} for m in ("Rej. Steer", "RULE", "ReRULE")}}
    names = ["Rej. Steer", "Original", "Retained", "RULE", "ReRULE"]
    names = ["GA", "PO", "PURGE"] if job.family == "baselines" else names

    def row(name):
        """Some columns differ by method, are the same on all seeds but some, or small: every kind of statistic."""
        found = {k: float(rng.uniform(40, 60)) for k in (*KEPT, "leak_64", "utility") if k != "stopped"}
        found["retain_recall"] += 40 * (name == "ReRULE") if "@" in job.family else 2 * (name == "ReRULE")
        found |= {"forget_refusal": 100.0, "forget_recall": 0.7 * (name == "ReRULE" and job.seed in (22, 25))}
        return found | {"forget_quality": float(10 ** rng.uniform(-3, 0))}

    early = ["gg840g8400"] * 2  # ten prompts, all asked in each of twelve steps
    late = lambda: ["".join(rng.choice(list("048cg"), 10)) for _ in range(10)]  # noqa: E731
    run = base_run(early + late(), early + late(), kinds="fffffhheee") | {"queries": [packed(*range(10))] * 12}
    run["cases"] = [[4, "forget", "Q4?", "A"], [9, "boundary", "Q9?", "B"]]
    for method in run["methods"].values():
        method["evaluations"] = [
            {"step": s, "retain_recall": float(rng.random()), "forget_refusal": 99.0} for s in range(1, 13)
        ]
        method["arithmetic"] = 100.0
        method["by_age"] = [[float(age), 1 / (1 + age / 8), 0.5] for age in range(1, 20)] + [[3.0, None, None]]
    run["methods"]["rerule"] |= {"seconds_replay": float(rng.uniform(1, 2)), "replay_groups": int(rng.integers(4, 9))}
    return run | about | {"rows": {name: row(name) for name in names}, "lr": 4e-5}


def everything(seeds=8, **changes):
    """(records, jobs) of the whole plan; what is chosen on the selection seeds is chosen from made-up records."""
    o = options(seeds=seeds, **changes)
    first = {job.name: made_up(job) for job in plan.all_jobs(o, {})}
    jobs = plan.all_jobs(o, first)
    return {job.name: made_up(job) for job in jobs}, jobs


def small_plan(o, records):
    """In place of `plan.all_jobs`."""
    base = (*SMALL.split(), "--eval_every", "2", "--seed", "21")
    variant = (*SMALL.split(), *"--eval_every 0 --method rerule --replay_store random --seed 21".split())
    return [
        Job("base_21", "base", 21, base, None, 9),
        Job("random_21", "random", 21, variant, "base_21", 3),
        Job("probe_21", "probe", 21, ("--seed", "21"), "base_21", 3),
    ]
