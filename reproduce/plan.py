"""The plan of the report: every run, in the order to start them, and what each part of the report needs.

`families.json` has a row for each family of runs: its method and flags, its label in tables, its kind and plain name in
the first figure, its name where Appendix E's bound or a world is shown; and for each part of the report its families.

Budget: 90 minutes on two cores, two runs at a time with one thread each, are 10,800 s. In seconds of one thread:
selection 4 seeds × (50 + 4 × 25) = 600; 8 base runs × 70 = 560; 22 variants × 8 × 15 = 2,640; two more worlds
× 8 × 50 = 800; baselines 3 × 100 = 300; probes 8 × 20 = 160; TOFU 3 × (480 + 170) = 1,950. In all about 7,000, an
hour.

Deviations
- Settings are chosen on seeds 11 to 14; the report's seeds are 21 and up, on which nothing was chosen.
- A variant takes over the models before Stage 2 from its seed's base run, so all methods of a seed start alike.
- RULE's steps with ReRULE's compute follow from a count of token positions on the selection seeds, not from a clock.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from baselines import METHODS
from reproduce.records import choose

SELECTION, FIRST_SEED, FEW = (11, 12, 13, 14), 21, 3  # seeds to choose on; first of the report; how many of slow runs
RATES = ("4e-5", "8e-5", "1.6e-4", "3.2e-4", "6.4e-4")  # the first is the shared one
BASELINES = [name for name in METHODS if name not in ("rej_steer", "rule", "rerule")]
FAMILIES, SECTIONS = json.loads(Path(__file__).with_name("families.json").read_text(encoding="utf-8")).values()
SECTIONS["claims"] = {family for section, own in SECTIONS.items() if section != "rates" for family in own}
VARIANTS = {family: row["flags"] for family, row in FAMILIES.items() if "flags" in row}  # other flags: the base run's
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
    few = seeds[: 1 if o.quick else FEW]
    chosen, jobs = choose(records, selection, RATES), []

    def add(seeds, family, flags, start, cost, quick=QUICK, name=None):
        for seed in seeds:
            args = None if flags is None else (*(quick.split() if o.quick else ()), *flags.split(), "--seed", str(seed))
            names = f"{name or family}_{seed}", family, seed, args, f"{start}_{seed}" if start else None
            jobs.append(Job(*names, cost / 2 if o.quick else cost))

    add(selection, "select", "--eval_every 0", None, 50)
    add(seeds, "base", "--eval_every 2", None, 70)
    tofu = [seed for seed in few if o.tofu_dir or {f"tofu_{seed}", f"tofu_random_{seed}"} <= set(records)]
    flags = "--benchmark tofu --data_dir {tofu_dir} --model tiny --eval_every 0"
    add(tofu, "tofu", flags, None, 480, QUICK_TOFU)
    add(tofu, "tofu_random", f"{flags} --method rerule --replay_store random", "tofu", 170, QUICK_TOFU)
    for rate in RATES[1:]:
        add(selection, "grid", f"--eval_every 0 --lr {rate}", "select", 25, name=f"grid{rate}")
    for crossed in (0, 30):  # neighbours with crossed names; the base runs have 22
        add(seeds, f"world{crossed}", f"--eval_every 0 --crossed {crossed}", None, 50)
    add(few, "baselines", f"--eval_every 0 --method {' '.join(BASELINES)}", "base", 100)
    for seed in seeds:
        add([seed], "probe", "", "base", 20)
        for family, own in VARIANTS.items():
            flags = f"--eval_every 0 --method {FAMILIES[family]['method']} {own}"
            add([seed], family, flags.format(**chosen) if chosen else None if "{" in own else flags, "base", 15)
    return jobs


def wanted(o, jobs):
    """The jobs that `--only` asks for, with those that they start from or are chosen by."""
    families = {family for section in o.only or SECTIONS for family in SECTIONS[section]}
    if any("{" in VARIANTS.get(family, "") for family in families):
        families |= {"select", "grid"}
    keep = {job.name for job in jobs if job.family in families}
    keep |= {job.start for job in jobs if job.name in keep}
    return [job for job in jobs if job.name in keep]
