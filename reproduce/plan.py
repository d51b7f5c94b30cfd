"""The plan of the report: every run, in the order to start them, and what each part of the report needs.

`families.json` has a row for each family of runs that differs from its base run by flags alone, with its names in
tables and figures; each part's families; and all other runs. A family of the main figure is named with its rate.

Deviations
- Settings are chosen on seeds 11 to 14; the report's seeds are 21 and up, on which nothing was chosen.
- A variant takes over the models before Stage 2 from its seed's base run, so all methods of a seed start alike.
- In the main figure and every variant replay starts at 5 % of the groups sampled so far, in base runs by their number.
- RULE's steps with ReRULE's compute follow from a count of token positions on the selection seeds, not from a clock."""

from dataclasses import dataclass

from baselines import METHODS
from reproduce import HERE, read_json
from reproduce.jobs import TEXTS
from reproduce.records import NAMES, RATES, best_rates, choose, town_rates

SELECTION, FIRST_SEED = (11, 12, 13, 14), 21  # seeds to choose on; first of the report
BASELINES = [name for name in METHODS if name not in ("rej_steer", "rule", "rerule")]
REPLAY, FAMILIES, SECTIONS, ROWS = read_json(HERE / "families.json").values()
SECTIONS["claims"] = list(dict.fromkeys(family for own in SECTIONS.values() for family in own))
LEAKED = {*SECTIONS["controls"], *SECTIONS["controls_best"]}  # the variants whose leakage is told
OPTIMISER_STEPS = 54  # of a run that replays: 32 on-policy and, from step 11 on, 22 off-policy ones
LEAK = " --attack leak"
QUICK = "--steps 8 --warmup_steps 5 --min_groups 10"
VARIANTS = [  # rows of the families that take over the base run's models, with other flags
    {"family": family, "seeds": "few", "start": "base", "cost": 14,
     "flags": f"--eval_every 0 --method {row.get('method', 'rerule')} {row['flags']} {REPLAY}"
              + LEAK * (family in LEAKED) + " --lr {rule_chosen}" * ("at" in row)}
    for family, row in FAMILIES.items() if "flags" in row
]  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One run of the driver, or one look at a base run's models (`probe`)."""

    name: str
    family: str
    seed: int
    args: tuple[str, ...] | None  # None: waits for what is chosen on the selection seeds
    start: str | None  # the job whose models it needs
    cost: float  # seconds of one thread, as measured with nothing else running


def jobs_of_row(o, records, family, row, seeds, args):
    """The jobs of one of a plan's rows; real text whose folder is not given has those alone that were run before."""
    given = all(getattr(o, name) for name in TEXTS if f"{{{name}}}" in row["flags"])
    seeds = [seed for seed in seeds[: row.get("first")] if given or f"{family}_{seed}" in records]
    starts = {seed: f"{row['start']}_{seed}" if "start" in row else None for seed in seeds}
    own = {seed: None if args is None else (*args, "--seed", str(seed)) for seed in seeds}
    return [Job(f"{family}_{seed}", family, seed, own[seed], starts[seed], row["cost"]) for seed in seeds]


def all_jobs(o, records):
    """Every job, by the report's options, in the order to start them; rates chosen are read off `records`."""
    selection, rates = (SELECTION[:1], RATES[:2]) if o.quick else (SELECTION, RATES)
    seeds = range(FIRST_SEED, FIRST_SEED + o.seeds)
    places = {"selection": selection, "report": seeds, "few": seeds[:1] if o.quick else seeds}
    some = {"all": rates, "later": rates[1:], "town": [rate for rate in town_rates(rates) if rate != RATES[0]]}
    chosen, jobs = choose(records, selection, rates), []
    best = best_rates(records, selection, town_rates(rates), NAMES, "town") or dict.fromkeys(NAMES)
    known = {f"{name}_in_town": rate for name, rate in best.items()} | {"rule_chosen": chosen and chosen["rule"]}
    known |= {"replay": REPLAY, "leak": LEAK, "baselines": " ".join(BASELINES)}
    known |= {name: f"{{{name}}}" for name in ("tofu_dir", "rwku_dir", "book_dir")}  # the worker's to fill in
    known["steps"] = 11 if o.quick else OPTIMISER_STEPS
    for row in ROWS + VARIANTS:
        for rate in some.get(row.get("rates"), [""]):
            blanks = known | {"rate": rate, "compute": chosen and chosen["n_steps"].get(rate)}
            waits = any(f"{{{name}}}" in row["flags"] and value is None for name, value in blanks.items())
            flags = " ".join([QUICK, row["flags"], row.get("quick", "")] if o.quick else [row["flags"]])
            args = None if waits else flags.format(**blanks).split()
            jobs += jobs_of_row(o, records, row["family"].format(rate=rate), row, places[row["seeds"]], args)
    return jobs


def wanted(o, jobs):
    """The jobs that `--only` asks for, with those that they start from or are chosen by."""
    families = {family for section in o.only or SECTIONS for family in SECTIONS[section]}
    if "compute" in families or any("at" in FAMILIES.get(family, ()) for family in families):
        families |= {"select", "grid", "random", "recent", "current"}
    if families & {"select", "world0", *(row["family"] for row in VARIANTS)}:
        families |= {"rerule"}  # it stands beside them
    keep = {job.name for job in jobs if job.family.split("@")[0] in families}
    keep |= {job.start for job in jobs if job.name in keep}
    return [job for job in jobs if job.name in keep]
