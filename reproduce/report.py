"""results/report.md and its figures, from records alone: the same records give the same report.

The text is `template.md`, whose order is that of a reader's questions: what holds, against which controls, then the
paper's tables and figures one by one, each with the command that makes it. What fills a section's blanks is a function
of the records, `r`, and the report's folder; a section that lacks runs says so.
"""

import json
from pathlib import Path
from statistics import fmean, median_high, stdev

from engine.files import write_text
from engine.plots import NAMES, mean, scatter
from reproduce import claims, figures, records
from reproduce.plan import FAMILIES, RATES, SECTIONS
from reproduce.records import paired

PAPER = json.loads(Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))
DIFFERENCES = """\
| Stage 2 | Retain ↑ | difference to RULE | seeds up | hard neighbours ↑ | difference to RULE | \
hard prompts' reward, late ↑ | forget refusal ↑ | over-refusal ↓ | seconds |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"""


def write(folder, o, runs, jobs):
    """report.md and all figures whose runs are there, in `folder`. runs: {name: record}."""
    r, template = records.Results(runs, jobs), Path(__file__).with_name("template.md").read_text(encoding="utf-8")
    first, second, *sections = template.split("\n## ")
    filled = [first.format(**head(r, o, jobs)), second.format(**verdicts(r))]
    for (name, part), section in zip(PARTS.items(), sections, strict=True):
        title, command, *_ = section.split("\n\n")
        if all(r.runs(family) for family in SECTIONS[name] if family != "tofu"):  # Table 7 does without it
            filled.append(section.format(**part(r, Path(folder))))
        else:
            more = ": give the folder with TOFU's files as `--tofu_dir`." if name == "tofu" else " yet."
            filled.append(f"{title}\n\n{command}\n\nNot run{more}\n")
    write_text(Path(folder) / "report.md", "\n## ".join(filled))


def head(r, o, jobs):
    """Where the report comes from, and what it lacks."""
    runs, seeds = r.records.values(), sorted(r.runs("base"))
    commits = ", ".join(sorted({run["commit"] for run in runs}))
    versions = "; ".join(sorted({", ".join(f"{k} {v}" for k, v in run["versions"].items()) for run in runs}))
    missing = sum(job.name not in r.records for job in jobs)
    hours = sum(run["seconds"] for run in runs) / 3600
    command = "python -m reproduce" + (" --quick" if o.quick else f" --seeds {o.seeds}")
    command += " --tofu_dir DATA/tofu" * bool(r.runs("tofu"))
    made_by = (
        f"Command `{command}`; {len(runs)} runs, {hours:.1f} hours of one CPU thread; commit {commits}; {versions}. "
        f"Report seeds {seeds[0]}–{seeds[-1]}." if seeds else "No runs yet."
    )  # fmt: skip
    quick = "\n\n**This is a quick run: few seeds, few steps. It shows that everything works, and nothing else.**"
    lacks = f"\n\n{missing} of {len(jobs)} runs are missing; parts without theirs say so."
    return {"made_by": made_by, "notes": quick * o.quick + lacks * bool(missing)}


def verdicts(r):
    """The claims, one row each."""
    found, rows = [(claim, claims.overall(claim["parts"])) for claim in claims.claims(r)], []
    for claim, verdict in found:
        shown = "<br>".join(filter(None, map(claims.shown, claim["parts"])))
        rows.append([claim["text"], claim["run"], shown, f"**{verdict}**", f"`--only {claim['only']}`"])
    count = {v: sum(v == verdict for _, verdict in found) for v in (*reversed(claims.VERDICTS), "not run")}
    told = ", ".join(f"{n} {verdict}" for verdict, n in count.items() if n)
    return {"counts": f"{len(found)} claims: {told}.", "table": table(rows)}


# --- cells -----------------------------------------------------------------------------------------------------------


def table(rows):
    """Rows of a Markdown table, whose header the template has."""
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def spread(values, digits=1, scale=1):
    """mean ± sd of one value a seed, times `scale`; None left out."""
    values = [scale * value for value in values if value is not None]
    sd = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{sd}" if values else "–"


def column(outcomes, name, digits=1):
    return spread([o.get(name) for o in outcomes.values()], digits)


def interval(stat, digits=1):
    """Paired difference with its interval, in a cell."""
    return f"{stat['mean']:+.{digits}f} [{stat['low']:+.{digits}f}, {stat['high']:+.{digits}f}]" if stat else "–"


def sign(stat):
    """How many seeds went up, and the sign test."""
    return f"{stat['up']} of {stat['n']}, p = {stat['p']:.2g}" if stat else "–"


def difference_table(r, section):
    """Rows of RULE and of a section's families of runs: columns, and what changed against RULE."""
    rule, rows = r.of("base", "rule"), []
    variants = {FAMILIES[family]["label"]: r.of(family, FAMILIES[family]["method"]) for family in SECTIONS[section]}
    for label, own in {"RULE": rule, **variants}.items():
        stat, of_hard = (paired(own, rule, name) for name in ("retain_recall", "hard"))
        change = ("", "", "") if own is rule else (interval(stat), sign(stat), interval(of_hard))
        rows.append([label, column(own, "retain_recall"), *change[:2], column(own, "hard"), change[2],
                     column(own, "late_hard", 2), column(own, "forget_refusal"), column(own, "retain_refusal"),
                     column(own, "seconds_stage2")])  # fmt: skip
    return f"{DIFFERENCES}\n{table(rows)}"


# --- the paper's tables and figures ----------------------------------------------------------------------------------


def table1(r, folder):
    """Tables 1, 2 and 5 in shape, with the paper's figures beside ours."""
    rows = {name: r.of("base", name) for name in ("Original", "Retained")}
    rows |= {name: r.of("baselines", name) for name in next(iter(r.runs("baselines").values()))["rows"]}
    rows |= {"Rej. Steer": r.of("base", "Rej. Steer"), "RULE": r.of("base", "rule"), "ReRULE": r.of("base")}
    rows |= {"RULE, own best rate": r.of("best_rule", "rule"), "ReRULE, own best rate": r.of("best_rerule")}
    theirs = {"table1": ("forget_all", "retain_all"), "table2": ("knowmem", "utility"),
              "table5": ("forget_quality", "model_utility", "forget_rouge_l")}  # fmt: skip
    columns = ("retain_recall", "hard", "easy", "retain_refusal", "forget_refusal", "forget_recall")
    lines, points = [], {}
    for name, outcomes in rows.items():
        seeds = [(o["forget_recall"], o["retain_recall"]) for o in outcomes.values() if o["retain_recall"] is not None]
        if not seeds:
            continue
        stopped = any(o.get("stopped") for o in outcomes.values())
        points[name] = (*map(fmean, zip(*seeds, strict=True)), seeds, stopped)
        tokens = [column(outcomes, key, 0) for key in ("forget_tokens", "retain_tokens")]
        paper = [PAPER[number].get(name, {}).get(key) for number, keys in theirs.items() for key in keys]
        ours = [column(outcomes, key) for key in columns]
        paper = ["" if value is None else f"{value:g}" for value in paper]
        lines.append([name + "†" * stopped, str(len(outcomes)), *tokens, *ours, *paper])
    scatter(points, folder / "methods.png")
    return {"table": table(lines)}


def table3(r, folder):
    """The three hardest cases of each kind."""
    seed, base = min(r.runs("base").items())
    figures.hardest(base, folder / "hardest.png")
    rows = []
    for query, kind, prompt, answer in base["cases"]:
        late = [mean(reward for _, q, reward, _ in records.groups_of(base, m, last=True) if q == query)
                for m in NAMES]  # fmt: skip
        before = mean(records.before_replay(base)[query])
        shown = ["–" if value is None else f"{value:.2f}" for value in (before, *late)]
        rows.append([prompt, answer, "reject" if kind == "forget" else "normal", *shown])
    gain = claims.figure(paired(r.of("base"), r.of("base", "rule"), "late_cases"))
    return {"seed": seed, "gain": gain, "table": table(rows)}


def table4(r, folder):
    """Hard against random storage."""
    pairs = {"separate": ("base", "random"), "combined": ("combined", "combined_random")}
    changes = {name: paired(*map(r.of, pair), "retain_recall") for name, pair in pairs.items()}
    return {name: claims.figure(stat) for name, stat in changes.items()} | {"table": difference_table(r, "table4")}


def table6(r, folder):
    """Share of groups below τ before activation."""
    rows = []
    for family in SECTIONS["table6"]:
        for tau in (0.4, 0.6, 0.8, 1.0):
            shares = ([records.hard_share(run, tau, kind) for run in r.runs(family).values()] for kind in (None, *"fb"))
            rows.append([FAMILIES[family]["world"], f"{tau:g}", *(spread(share, scale=100) for share in shares)])
    return {"table": table(rows)}


def table7(r, folder):
    """Time."""
    rows = []
    for family, label in (("base", "Built-in world"), ("tofu", "TOFU text, tiny model")):
        if r.runs(family):
            stat = records.statistic(claims.extra_time(r, family))
            methods = [run["methods"]["rerule"] for run in r.runs(family).values()]
            seconds = [[ran[f"seconds_{part}"] for part in records.PARTS] for ran in methods]
            parts = [100 * mean(row[at] / sum(row) for row in seconds) for at in range(len(records.PARTS))]
            rows.append([label, *(column(r.of(family, method), "seconds_stage2") + " s" for method in NAMES),
                         f"{interval(stat)} %" if stat else "–", *(f"{part:.0f} %" for part in parts)])  # fmt: skip
    for name, row in PAPER["table7"].items():
        rule, rerule = row["RULE_hours"], row["ReRULE_hours"]
        rows.append([f"*paper: {name}*", f"{rule} h", f"{rerule} h", f"{100 * (rerule / rule - 1):+.1f} %", *[""] * 4])
    return {"table": table(rows)}


def figure3(r, folder):
    """Curves over steps, and instability as a number."""
    figures.over_steps(r, folder / "steps.png")
    rows = []
    for method, name in NAMES.items():
        pairs = [records.instability(base["methods"][method]["evaluations"]) for base in r.runs("base").values()]
        rows.append([name, *(spread([pair[at] for pair in pairs], 2) for at in (0, 1))])
    return {"table": table(rows)}


# --- ours ------------------------------------------------------------------------------------------------------------


def controls(r, folder):
    """What the gain is made of: the first figure, and its table."""
    rows, rule = [], r.of("base", "rule")
    for family in SECTIONS["controls"]:
        method, kind, label = (FAMILIES[family][key] for key in ("method", "kind", "plain"))
        stat = paired(r.of(family, method), rule, "retain_recall")
        if family == "best_rerule":  # at a high rate the buffer may never hold enough
            replayed = sum(run["methods"]["rerule"]["replay_groups"] > 0 for run in r.runs(family).values())
            label += f"\n(replay started on {replayed} of {stat['n']} seeds)" if replayed < stat["n"] else ""
        rows.append((label, kind, stat))
    figures.gains(sorted(rows, key=lambda row: -row[2]["mean"]), folder / "gains.png")
    ours, runs = r.of("base"), r.runs("select").values()
    ratio = median_high([run["methods"]["rerule"]["arithmetic"] / run["methods"]["rule"]["arithmetic"] for run in runs])
    clock = mean(ours[seed]["seconds_stage2"] / o["seconds_stage2"] for seed, o in rule.items())
    steps = next(iter(r.runs("compute").values()))["steps"]
    return {"table": difference_table(r, "controls"), "steps": steps, "ratio": f"{ratio:.2f}", "clock": f"{clock:.2f}"}


def worlds(r, folder):
    """Three worlds."""
    rows = []
    for family in SECTIONS["worlds"]:
        theirs, ours = r.of(family, "rule"), r.of(family)
        shares = [records.hard_share(run, run["tau"]) for run in r.runs(family).values()]
        stat = paired(ours, theirs, "retain_recall")
        recall, refusal = ([column(o, key) for o in (theirs, ours)] for key in ("retain_recall", "forget_refusal"))
        rows.append(
            [FAMILIES[family]["world"], spread(shares, scale=100), *recall, interval(stat), sign(stat), *refusal]
        )
    figures.conditions(r, folder / "conditions.png")
    return {"table": table(rows)}


def tofu(r, folder):
    """Real text."""
    rows, rule = [], r.of("tofu", "rule")
    shown = {"model_utility": 3, "forget_rouge_l": 3, "retain_recall": 1, "retain_refusal": 1, "forget_refusal": 1,
             "forget_paraphrased_recall": 1}  # fmt: skip
    for label, own in (("RULE", rule), ("ReRULE", r.of("tofu")), ("random storage", r.of("tofu_random"))):
        change = "–" if own is rule else interval(paired(own, rule, "model_utility"), 3)
        cells = [column(own, key, digits) for key, digits in shown.items()]
        rows.append([label, str(len(own)), *cells, change, column(own, "seconds_stage2")])
    return {"table": table(rows)}


def rates(r, folder):
    """What the learning rates were chosen on."""
    selection, rows = sorted(r.runs("select")), []
    chosen = records.choose(r.records, selection, RATES)
    for method, by_rate in records.rate_scores(r.records, selection, RATES).items():
        best = chosen and chosen[method]
        cells = [f"**{spread(values)}**" if rate == best else spread(values) for rate, values in by_rate.items()]
        rows.append([NAMES[method], *cells])
    told = {"rates": " | ".join(RATES), "shared": RATES[0], "seeds": ", ".join(map(str, selection))}
    return told | {"table": table(rows)}


def appendix_e(r, folder):
    """The bound's figures, Eq. 4 and Eq. 27."""
    figures.theory(r, folder / "theory.png")
    rule, bases, rows, models = r.of("base", "rule"), r.runs("base"), [], []
    shown = {"p_hard": (2, 1), "kappa_clipped": (3, 1), "kappa_unclipped": (3, 1), "clipped_share": (2, 1),
             "n_on": (1, 1e-3), "n_eff_clipped": (1, 1e-3), "bound_clipped": (2, 1),
             "bound_unclipped": (2, 1)}  # fmt: skip
    for family in claims.HARD_STORES:
        found = [records.bound(run, bases[seed]) for seed, run in r.runs(family).items()]
        change = interval(paired(r.of(family), rule, "late_hard"), 2)
        cells = [spread([bound[key] for bound in found], *look) for key, look in shown.items()]
        rows.append([FAMILIES[family]["label"], *cells, change])
    shown = {"queries": (0, 1), "missed": (1, 100), "false": (1, 100), "norm": (2, 1), "weighted": (2, 1),
             "equal": (1, 100)}  # fmt: skip
    for model in figures.PROBED:
        for region in ("easy", "hard"):
            probes = [run["models"][model] for run in r.runs("probe").values()]
            found = [models_of[region] for models_of in probes if region in models_of]
            cells = [spread([row[key] for row in found], *look) for key, look in shown.items()]
            models.append([model, region, *cells])
    correlation = claims.figure(records.statistic(claims.bound_correlations(r)))
    return {"bounds": table(rows), "models": table(models), "correlation": correlation}


PARTS = {  # what fills each section's blanks, in the template's order
    "controls": controls, "table1": table1, "table3": table3, "table4": table4, "table6": table6, "table7": table7,
    "table8": lambda r, _: {"table": difference_table(r, "table8")},
    "figure1": lambda r, folder: figures.trajectories(r, folder / "trajectories.png") or {},
    "figure2": lambda r, folder: figures.pipeline(folder / "pipeline.png") or {},
    "figure3": figure3, "worlds": worlds, "tofu": tofu, "rates": rates,
    "weights": lambda r, _: {"table": difference_table(r, "weights")}, "appendix_e": appendix_e,
}  # fmt: skip
