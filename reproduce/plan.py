"""The plan of the report: every run, in the order to start them, and what each part of the report needs.

Budget: 90 minutes on two cores, two runs at a time with one thread each, are 10,800 s. In seconds of one thread:
selection 4 seeds × (50 + 4 × 25) = 600; 8 base runs × 70 = 560; 22 variants × 8 × 15 = 2,640; two more worlds
× 8 × 50 = 800; baselines 3 × 100 = 300; probes 8 × 20 = 160; TOFU 3 × (480 + 170) = 1,950. In all about 7,000, an
hour.

Deviations
- Settings are chosen on seeds 11 to 14; the report's seeds are 21 and up, on which nothing was chosen.
- A variant takes over the models before Stage 2 from its seed's base run, so all methods of a seed start alike.
- RULE's steps with ReRULE's compute follow from a count of token positions on the selection seeds, not from a clock.
"""

from dataclasses import dataclass

from baselines import METHODS
from reproduce.records import choose

SELECTION, FIRST_SEED, FEW = (11, 12, 13, 14), 21, 3  # seeds to choose on; first of the report; how many of slow runs
RATES = ("4e-5", "8e-5", "1.6e-4", "3.2e-4", "6.4e-4")  # the first is the shared one
WORLDS = {"world0": 0, "world30": 30}  # neighbours with crossed names; the base runs have 22
BASELINES = [name for name in METHODS if name not in ("rej_steer", "rule", "rerule")]
VARIANTS = {  # family: (method, flags); every other flag is the base run's
    "random": ("rerule", "--replay_store random"),
    "recent": ("rerule", "--replay_store recent"),
    "zero": ("rerule", "--replay_store none"),
    "twice": ("rule as rerule", "--replay_store current --min_groups 1 --warmup_steps 0"),
    "double": ("rule", "--lr 8e-5"),
    "compute": ("rule", "--steps {steps}"),
    "best_rule": ("rule", "--lr {rule}"),
    "best_rerule": ("rerule", "--lr {rerule}"),
    "activation": ("rerule", "--store_until activation"),
    "unequal": ("rerule", "--replay_store unequal"),
    "combined": ("rerule", "--replay_step combined"),
    "combined_random": ("rerule", "--replay_step combined --replay_store random"),
    "tau0.6": ("rerule", "--tau 0.6"),
    "tau0.8": ("rerule", "--tau 0.8"),
    "tau1.0": ("rerule", "--tau 1.0"),
    "token": ("rerule", "--ratio_level token"),
    "geometric": ("rerule", "--ratio_level geometric"),
    "surrogate": ("rerule", "--replay_objective surrogate"),
    "normalize": ("rerule", "--normalize_ratio"),
    "unweighted": ("rerule", "--epsilon_low 0 --epsilon_high 0"),
    "wide": ("rerule", "--epsilon_low 0.9 --epsilon_high 9"),
    "replay_kl": ("rerule", "--replay_kl"),
}
WEIGHTS = ("token", "geometric", "surrogate", "normalize", "unweighted", "wide", "replay_kl")
CONTROLS = ("random", "recent", "zero", "twice", "double", "compute", "best_rule", "best_rerule", "activation",
            "unequal", "combined", "combined_random")  # fmt: skip
TAUS = ("tau0.6", "tau0.8", "tau1.0")
SECTIONS = {  # what `--only` takes: the families of runs that a part of the report needs
    "table1": ("base", "baselines", "best_rule", "best_rerule"),  # and Tables 2 and 5, whose columns are this world's
    "table3": ("base",),
    "table4": ("base", "random", "combined", "combined_random"),
    "table6": ("base", *WORLDS),
    "table7": ("base", "tofu"),
    "table8": ("base", *TAUS),
    "figure1": ("base",),
    "figure2": (),
    "figure3": ("base",),
    "controls": ("base", *CONTROLS),
    "weights": ("base", *WEIGHTS),
    "worlds": ("base", *WORLDS),
    "tofu": ("tofu", "tofu_random"),
    "rates": ("select", "grid"),
    "appendix_e": ("base", "probe", "activation", "unequal", *TAUS),
    "claims": ("base", "baselines", "tofu", "tofu_random", "probe", *CONTROLS, *TAUS, *WEIGHTS, *WORLDS),
}
QUICK = "--steps 14 --warmup_steps 9 --min_groups 20"
QUICK_TOFU = "--steps 4 --warmup_steps 2 --min_groups 8 --tiny_epochs 4"


@dataclass(frozen=True)
class Job:
    """One run of the driver, or one look at a base run's models (`probe`)."""

    name: str
    family: str
    seed: int
    args: tuple[str, ...] | None  # None: waits for what is chosen on the selection seeds
    start: str | None  # the job whose models it needs
    cost: float  # seconds expected


def all_jobs(o, records):
    """Every job in the order to start them; what was chosen on the selection seeds is read off `records`.

    o: the report's options: seeds, quick, tofu_dir.
    """
    selection = SELECTION[:1] if o.quick else SELECTION
    seeds = range(FIRST_SEED, FIRST_SEED + o.seeds)
    chosen = choose(records, selection, RATES)
    jobs = []

    def add(family, seed, flags, start, cost, quick=QUICK, name=None):
        args = None if flags is None else (*(quick.split() if o.quick else ()), *flags.split(), "--seed", str(seed))
        name, start = f"{name or family}_{seed}", f"{start}_{seed}" if start else None
        jobs.append(Job(name, family, seed, args, start, cost / 2 if o.quick else cost))

    for seed in selection:
        add("select", seed, "--eval_every 0", None, 50)
    for seed in seeds:
        add("base", seed, "--eval_every 2", None, 70)
    for seed in seeds[:1] if o.quick else seeds[:FEW]:
        if o.tofu_dir or {f"tofu_{seed}", f"tofu_random_{seed}"} <= set(records):
            common = "--benchmark tofu --data_dir {tofu_dir} --model tiny --eval_every 0"
            add("tofu", seed, common, None, 480, QUICK_TOFU)
            add("tofu_random", seed, f"{common} --method rerule --replay_store random", "tofu", 170, QUICK_TOFU)
    for seed in selection:
        for rate in RATES[1:]:
            add("grid", seed, f"--eval_every 0 --lr {rate}", "select", 25, name=f"grid{rate}")
    for seed in seeds:
        for family, crossed in WORLDS.items():
            add(family, seed, f"--eval_every 0 --crossed {crossed}", None, 50)
    for seed in seeds[:1] if o.quick else seeds[:FEW]:
        add("baselines", seed, f"--eval_every 0 --method {' '.join(BASELINES)}", "base", 100)
    for seed in seeds:
        add("probe", seed, "", "base", 20)
        for family, (method, flags) in VARIANTS.items():
            flags = f"--eval_every 0 --method {method.split()[-1]} {flags}"
            if "{" in flags:
                flags = flags.format(**chosen) if chosen else None
            add(family, seed, flags, "base", 15)
    return jobs


def wanted(o, jobs):
    """The jobs that `--only` asks for, with those that they start from or are chosen by."""
    families = {family for section in o.only or SECTIONS for family in SECTIONS[section]}
    chosen = {family for family, (_, flags) in VARIANTS.items() if "{" in flags}
    families |= {"select", "grid"} if families & chosen or not o.only else set()
    keep = {job.name for job in jobs if job.family in families}
    keep |= {job.start for job in jobs if job.name in keep}
    return [job for job in jobs if job.name in keep]
