"""results/report.md and its figures, from records alone: the same records give the same report.

The text is `template.md`: what holds, against which controls, the paper's tables and figures one by one. What fills a
section's blanks is a function of the records, `r`, and the report's folder; a section that lacks runs says so."""

from math import log10
from pathlib import Path

from engine.files import write_text
from engine.plots import NAMES, mean, scatter
from reproduce import HERE, WORDS, claims, figures, made, read_json, records, table
from reproduce.plan import FAMILIES, OPTIMISER_STEPS, SECTIONS
from reproduce.records import CURVES, RATES
from reproduce.statistics import paired, spread, statistic

PAPER, PIPELINE = read_json(HERE / "paper.json"), HERE / "pipeline.svg"
MODELS = {name: name for name in ("Original", "Retained", "Rej. Steer")} | {"RULE": "rule", "ReRULE": "rerule"}
LABELS = NAMES | {name: words.format(n=OPTIMISER_STEPS) for name, words in WORDS["rows"].items()}
seeds_up = lambda stat: f"{sum(x > 0 for x in stat['values'])} of {len(stat['values'])}" if stat else "–"  # noqa: E731


def write(folder, o, runs, jobs):
    """report.md and all figures whose runs are there, in `folder`. runs: {name: record}."""
    r, template = records.Results(runs, jobs), (HERE / "template.md").read_text(encoding="utf-8")
    first, second, *sections = template.split("\n## ")
    filled = [first.format(**head(r, o, jobs)), second.format(**verdicts(r))]
    for (name, part), section in zip(PARTS.items(), sections, strict=True):
        title, command, *_ = section.split("\n\n")
        if all(r.has(family) for family in SECTIONS[name] if (name, family) != ("table7", "tofu")):
            filled.append(section.format(**part(r, Path(folder))))
        else:
            more = [f"--{flag} FOLDER" for flag in ("tofu_dir", "rwku_dir") if f"--{flag}" in command]
            filled.append(f"{title}\n\n{command}\n\nNot run yet{': give `' + more[0] + '`' if more else ''}.\n")
    write_text(Path(folder) / "report.md", "\n## ".join(filled))


def head(r, o, jobs):
    """Where the report comes from, and what it lacks."""
    runs, seeds = r.records.values(), sorted(r.runs("base"))
    versions = "; ".join(sorted({", ".join(f"{k} {v}" for k, v in run["versions"].items()) for run in runs}))
    missing = sum(job.name not in r.records for job in jobs)
    command = "python -m reproduce" + (" --quick" if o.quick else f" --seeds {o.seeds}")
    command += " --tofu_dir DATA/tofu" * r.has("tofu") + " --rwku_dir DATA/rwku/12_Genghis_Khan" * r.has("rwku")
    told = f"Command `{command}`; {{}}; {versions}. Report seeds {seeds[0]}–{seeds[-1]}." if seeds else "No runs yet."
    holds = {"refused": r.refused, "quick": o.quick, "missing": missing}
    notes = [WORDS["notes"][name].format(", ".join(r.refused), missing, len(jobs)) for name in holds if holds[name]]
    return {"made_by": told.format(made(r.records) if seeds else ""), "notes": "".join(notes)}


def verdicts(r):
    """The claims, one row each."""
    found, rows = [(claim, claims.overall(claim["parts"])) for claim in claims.claims(r)], []
    for claim, verdict in found:
        shown = "<br>".join(filter(None, map(claims.shown, claim["parts"])))
        rows.append([claim["text"], claim["run"], shown, f"**{verdict}**", f"`--only {claim['only']}`"])
    count = {v: sum(v == verdict for _, verdict in found) for v in reversed(claims.VERDICTS)}
    told = ", ".join(f"{n} {verdict}" for verdict, n in count.items() if n)
    return {"counts": f"{len(found)} claims: {told}.", "table": table(rows)}


def column(outcomes, name, *look):
    return spread([o.get(name) for o in outcomes.values()], *look)


def interval(stat, digits=1):
    """Paired difference with its interval, in a cell; "b" where that is BCa's."""
    told = f"{{mean:+.{digits}f}} [{{low:+.{digits}f}}, {{high:+.{digits}f}}]"
    return told.format(**stat) + " b" * (stat["kind"] == "BCa") if stat else "–"


def theirs(number, title, name):
    """A figure of the paper's in a cell, empty where it has none."""
    value = PAPER[number].get(title, {}).get(name)
    return "" if value is None else f"{value:g}"


def difference_table(r, section, rate=RATES[0]):
    """Rows of RULE and of a section's families of runs: columns, and what changed against RULE at the same rate."""
    rule, rows = r.at("rule", rate), []
    own = {"RULE": rule, "ReRULE: hard groups, an extra step": r.at("rerule", rate)}
    for family in SECTIONS[section]:
        row = FAMILIES.get(family) or {"label": LABELS[family]}
        own[row["label"]] = r.of(family, row.get("method", "rerule")) if r.runs(family) else r.at(family, rate)
    for label, outcomes in own.items():
        stats = {name: paired(outcomes, rule, name) for name in ("retain_recall", "hard", "leak_64")}
        cells = [(column(outcomes, name), "" if outcomes is rule else interval(stat)) for name, stat in stats.items()]
        up = "" if outcomes is rule else seeds_up(stats["retain_recall"])
        rest = [column(outcomes, name) for name in ("forget_refusal", "retain_refusal", "seconds_stage2")]
        rows.append([label, *cells[0], up, *cells[1], *cells[2], column(outcomes, "late_hard", 2), *rest])
    return table(rows, WORDS["differences"])


def table1(r, folder):
    """Tables 1 and 2 in shape, with the paper's figures beside ours."""
    base, baselines = {name: r.of("base", method) for name, method in MODELS.items()}, r.runs("baselines").values()
    rows = {name: base[name] for name in ("Original", "Retained")}
    rows |= {name: r.of("baselines", name) for name in next(iter(baselines))["rows"]} | base
    rows |= {f"{name}, own rate": r.at(key, "chosen") for key, name in NAMES.items()} if r.chosen else {}
    rows, lines = {name: o for name, o in rows.items() if o}, []
    for name, outcomes in rows.items():
        stopped = any(o.get("stopped") for o in outcomes.values())
        ours = [column(outcomes, *key_and_look) for key_and_look in WORDS["methods_columns"]]
        paper = [theirs(number, name, key) for number, key in WORDS["papers_columns"]]
        lines.append([name + "†" * stopped, str(len(outcomes)), *ours, *paper])
    scatter({name: list(outcomes.values()) for name, outcomes in rows.items()}, folder / "methods.png")
    return {"table": table(lines)}


def table3(r, folder):
    seed, base = min(r.runs("town").items())
    figures.hardest(base, folder / "hardest.png")
    rows = []
    for query, kind, prompt, answer in base["cases"]:
        late = [mean(x for _, q, x in records.groups_of(base, m, last=True) if q == query) for m in NAMES]
        shown = [spread([value], 2) for value in (mean(records.before_replay(base)[query]), *late)]
        rows.append([prompt, answer, "reject" if kind == "forget" else "normal", *shown])
    gain = claims.figure(paired(r.of("town"), r.of("town", "rule"), "late_cases"))
    return {"seed": seed, "gain": gain, "table": table(rows)}


def table4(r, folder):
    """Hard against random storage."""
    separate = paired(r.at("rerule", RATES[0]), r.at("random", RATES[0]), "retain_recall")
    combined = paired(r.of("combined"), r.of("combined_random"), "retain_recall")
    told = {"separate": claims.figure(separate), "combined": claims.figure(combined)}
    return told | {"table": difference_table(r, "table4")}


def table6(r, folder):
    """Share of groups below τ before activation: of all prompts, forget and boundary ones."""
    rows, tofu = [], ["tofu"] * bool(r.has("tofu"))
    for family in SECTIONS["table6"] + tofu:
        for tau in (0.4, 0.6) if family == "tofu" else (0.4, 0.6, 0.8, 1.0):
            runs, world = r.runs(family).values(), FAMILIES.get(family, {}).get("world", "TOFU text, tiny model")
            shares = ([records.hard_share(run, tau, kinds) for run in runs] for kinds in ("fbhe", "f", "bhe"))
            rows.append([world, f"{tau:g}", *(spread(share, scale=100) for share in shares)])
    return {"table": table(rows)}


def table7(r, folder):
    rows = []
    for family, label in (("base", "Built-in world"), ("tofu", "TOFU text, tiny model")):
        if r.runs(family):
            stat = change(r, family, "seconds_stage2", **{"as": "extra"})
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
    figures.over_steps(r, folder / "steps.png")
    own, keys = {name: r.of("base", method) for method, name in NAMES.items()}, ("late_sd", "late_unrest")
    return {"table": table([name, *(column(o, key, 2) for key in keys)] for name, o in own.items())}


def rates(r, folder):
    """The main figure, what it is drawn from, and what the rates were chosen on."""
    figures.rates(r, folder / "rates.png")
    selection = sorted({run["seed"] for run in r.records.values()} - r.seeds)
    scores = records.rate_scores(r.records, selection, r.rates)

    def row(name, cells):
        """Of all rates, the one chosen in bold."""
        cells = zip(cells, r.rates, strict=True)
        return [LABELS[name], *(f"**{cell}**" if rate == r.chosen[name] else cell for cell, rate in cells)]

    retain, leak = (table(row(name, [column(r.at(name, rate), key) for rate in r.rates]) for name in LABELS)
                    for key in ("retain_recall", "leak_64"))  # fmt: skip
    gains = [[f"{LABELS[name]}: {words}",
              *(interval(paired(r.at(name, x), r.at("rule", x), key)) for x in (*r.rates, "chosen"))]
             for name in LABELS if name != "rule" for key, words in WORDS["gains"].items()]  # fmt: skip
    chosen = [row(name, map(spread, scores[name].values())) for name in CURVES]
    n_steps = [f"{n} at {rate} ({r.chosen['ratios'][rate]:.2f})" for rate, n in r.chosen["n_steps"].items()]
    return {"rates": " | ".join(r.rates), "lines": "---:|" * len(r.rates), "seeds": ", ".join(map(str, selection)),
            "retain": retain, "leak": leak, "gains": table(gains),
            "selection": table(chosen), "n_steps": ", ".join(n_steps), "optimiser_steps": OPTIMISER_STEPS}  # fmt: skip


def controls(r, folder):
    """What the gain is made of: at the shared rate, and at the one chosen for RULE."""
    panels, chosen = {}, r.chosen and r.chosen["rule"]
    for section, rate in (("controls", RATES[0]), ("controls_best", chosen)):
        rule, lines = r.at("rule", rate), {"ReRULE: hard groups": ("rerule", r.at("rerule", rate))}
        lines |= {words: (name, r.at(name, rate)) for name, words in WORDS["controls"].items()}
        for family in SECTIONS[section]:
            method = FAMILIES[family].get("method", "rerule")
            lines[FAMILIES[family]["plain"]] = ("RULE, changed" if method == "rule" else family, r.of(family, method))
        stats = [(words, name, paired(own, rule, "retain_recall")) for words, (name, own) in lines.items()]
        whose = "the shared one" if section == "controls" else "the one chosen for RULE"
        panels[f"At learning rate {rate}, {whose}"] = [row for row in stats if row[2]]
    figures.gains({title: rows for title, rows in panels.items() if rows}, folder / "gains.png")
    best = difference_table(r, "controls_best", chosen) if chosen else "Not run yet."
    return {"table": difference_table(r, "controls"), "best": best, "rate": chosen or "–"}


def town(r, folder):
    figures.town(r, WORDS["town_columns"], folder / "town.png")
    (forgotten, *near), rows, rule = WORDS["town_columns"].values(), [], r.of("town_rule", "rule")
    shown = (forgotten, "leak_64", "retain_recall", *near, "retain_refusal")
    for name, (family, method) in figures.TOWN.items():
        own = r.of(family, method)
        stats = [paired(own, rule, key) if method == "rerule" else None for key in ("retain_recall", "leak_64")]
        rows.append([LABELS.get(name, name), *(column(own, key) for key in shown), *map(interval, stats)])
    return {"table": table(rows), "rates": ", ".join(f"{LABELS[n]} {rate}" for n, rate in r.in_town.items())}


def worlds(r, folder):
    rows, drawn = [], []
    for family in SECTIONS["worlds"]:
        theirs, ours = r.of(family, "rule"), r.at("rerule", RATES[0]) if family == "base" else r.of(family)
        shares = [records.hard_share(run, run["tau"]) for run in r.runs(family).values()]
        stat, world = paired(ours, theirs, "retain_recall"), FAMILIES[family]["world"]
        recall, refusal = ([column(o, key) for o in (theirs, ours)] for key in ("retain_recall", "forget_refusal"))
        rows.append([world, spread(shares, scale=100), *recall, interval(stat), seeds_up(stat), *refusal])
        drawn.append((f"{world}: {100 * mean(shares):.0f} % hard", "rerule", stat))
    figures.conditions(r, drawn, folder / "conditions.png")
    return {"table": table(rows)}


def appendix_e(r, folder):
    figures.theory(r, folder / "theory.png")
    rule, bases, rows, models = r.of("base", "rule"), r.runs("base"), [], []
    for family in claims.HARD_STORES:
        found = {seed: records.bound(run, bases[seed]) for seed, run in r.runs(family).items()}
        change = interval(paired(r.of(family), rule, "late_hard"), 2)
        cells = [column(found, key, *look) for key, look in WORDS["bound_columns"].items()]
        rows.append([FAMILIES[family]["label"], *cells, change])
    for model in figures.PROBED:
        for region in ("easy", "hard"):
            own, shown = r.of("probe", model), WORDS["probe_columns"].items()
            models.append([model, region, *(column(own, f"{region}_{key}", *look) for key, look in shown)])
    correlation = claims.figure(statistic(claims.bound_correlations(r)))
    return {"bounds": table(rows), "models": table(models), "correlation": correlation}


def compared(r, family, columns, paper, names):
    """A row for each model of a family's runs: seeds, `columns` with their digits, then the paper's `names`."""
    rows = []
    for title, method in MODELS.items():
        own = r.of(family, method)
        if any(o["retain_recall"] is not None for o in own.values()):
            ours = [column(own, name, *look) for name, look in columns.items()]
            rows.append([title, str(len(own)), *ours, *(theirs(paper, title, name) for name in names)])
    return rows


def change(r, family, column, **way):
    """Statistic of ReRULE against RULE in a column; way: "as" or "times", as in `claims.json`."""
    of, less = ([family, method, column] for method in ("rerule", "rule"))
    return claims.measured(r, {"label": "", "of": of, "less": less} | way, {}).stat


def table5(r, folder):
    """TOFU: forget quality as the geometric mean of its p-values and as log10; the retained model's own is 1."""
    rows = compared(r, "tofu", WORDS["tofu_columns"], "table5", ("forget_quality", "model_utility", "forget_rouge_l"))
    for row in rows:
        own = r.of("tofu", MODELS[row[0]]).values()
        logs = [0.0 if row[0] == "Retained" else log10(o["forget_quality"]) for o in own]
        row[2:2] = [f"{10 ** mean(logs):.2g}", spread(logs, 1)]
    quality = claims.figure(change(r, "tofu", "forget_quality", **{"as": "log10"}))
    return {"table": table(rows), "quality": quality,
            "utility": claims.figure(change(r, "tofu", "model_utility", times=100))}  # fmt: skip


def book(r, folder):
    names = ("verbmem", "knowmem", "utility")
    rows = compared(r, "book", dict.fromkeys([*names, "forget_refusal", "retain_refusal"], []), "table2", names)
    return {"table": table(rows), **{name: claims.figure(change(r, "book", name)) for name in names}}


def attacks_by_type(r, folder):
    """RWKU: a row for each of its columns and for each type of attack; in a cell one figure a seed."""
    runs, rows, titles = r.runs("rwku"), [], [title for title in MODELS if title != "Retained"]
    names = {name for run in runs.values() for name in run["rows"]["Original"] if name.startswith("attack_")}
    names = sorted(name for name in names if "lingual_" not in name)  # all languages together
    for name in (*WORDS["rwku_columns"], *names):
        found = [[run["rows"][title].get(name) for run in runs.values()] for title in titles]
        cells = [" · ".join("–" if x is None else f"{x:.1f}" for x in figures) for figures in found]
        label = WORDS["rwku_columns"].get(name) or name.removeprefix("attack_").replace("_", " ") + " ↓"
        rows.append([label, *cells, *(theirs("table1", title, name) for title in titles)])
    return {"table": table(rows), "seeds": ", ".join(map(str, runs))}


PARTS = {  # what fills each section's blanks, in the template's order
    "rates": rates, "controls": controls,
    "age": lambda r, folder: figures.age(r, folder / "age.png") or {"table": difference_table(r, "age")}, "town": town,
    "table1": table1, "table3": table3, "table4": table4, "table5": table5, "table6": table6,
    "table7": table7, "table8": lambda r, _: {"table": difference_table(r, "table8")},
    "figure1": lambda r, folder: figures.trajectories(r, folder / "trajectories.png") or {},
    "figure2": lambda r, folder: write_text(folder / PIPELINE.name, PIPELINE.read_text(encoding="utf-8")) or {},
    "figure3": figure3, "worlds": worlds, "book": book,
    "rwku": lambda r, folder: figures.attacks(r, folder / "attacks.png") or attacks_by_type(r, folder),
    "weights": lambda r, _: {"table": difference_table(r, "weights")}, "appendix_e": appendix_e,
}  # fmt: skip
