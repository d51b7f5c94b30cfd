"""What fills the blanks of the report's template: the paper's tables and ours, and the figures drawn beside them.

Each part of the report is a function of the records, `r`, and the report's folder. It returns what its section's blanks
stand for, or nothing where its runs are missing.
"""

import json
from pathlib import Path
from statistics import fmean, stdev

from engine.plots import NAMES, mean, scatter
from reproduce import claims, figures, records
from reproduce.plan import RATES
from reproduce.records import PARTS, paired

PAPER = json.loads(Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))
LABELS = {
    "base": "ReRULE: hard groups, an extra step", "random": "random groups (the paper's control)",
    "recent": "the previous batch again", "twice": "RULE with two updates a batch, from step 2",
    "zero": "a step on zero gradient: momentum alone", "double": "RULE, twice the learning rate",
    "compute": "RULE, as much arithmetic as ReRULE", "best_rule": "RULE at its own best learning rate",
    "best_rerule": "ReRULE at its own best learning rate", "activation": "storing until activation only",
    "unequal": "all-equal groups not stored", "combined": "hard groups, both losses in one step",
    "combined_random": "random groups, both losses in one step", "tau0.6": "τ = 0.6", "tau0.8": "τ = 0.8",
    "tau1.0": "τ = 1.0", "token": "weights by token", "geometric": "weights by token, averaged in the exponent",
    "surrogate": "PPO's clipped minimum", "normalize": "weights over their mean", "unweighted": "weights all 1",
    "wide": "weights clipped to [0.1, 10]", "replay_kl": "KL on replayed rollouts",
}  # fmt: skip
CONTROLS = {  # in the table's order, from ReRULE to what no longer replays: kind and plain name in the figure
    "base": ("rerule", "ReRULE, as in the paper"), "random": ("replay", "replay of random groups"),
    "recent": ("replay", "replay of the previous batch"), "zero": ("replay", "an extra step on no gradient at all"),
    "unequal": ("replay", "ReRULE, groups of equal rewards not stored"),
    "activation": ("replay", "ReRULE, storing only until replay starts"),
    "combined": ("replay", "replay of hard groups without an extra step"),
    "combined_random": ("replay", "replay of random groups without an extra step"),
    "twice": ("rule", "RULE, two updates on every batch"), "double": ("rule", "RULE at twice the learning rate"),
    "compute": ("rule", "RULE, longer: as much computation as ReRULE"),
    "best_rule": ("rule", "RULE at its best learning rate"),
    "best_rerule": ("rerule", "ReRULE at its best learning rate"),
}  # fmt: skip
COLUMNS = {
    "retain_recall": "Retain ↑", "hard": "hard neighbours ↑", "easy": "easy ↑", "retain_refusal": "Over-refusal ↓",
    "forget_refusal": "Forget refusal ↑", "forget_recall": "Forget recall ↓",
}  # fmt: skip


# --- cells -----------------------------------------------------------------------------------------------------------


def table(header, rows):
    """Markdown; the first column is text, the rest numbers."""
    first, *rest = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    return "\n".join([first, "|---|" + "---:|" * (len(header) - 1), *rest])


def spread(values, digits=1):
    """mean ± sd of one value a seed; None left out."""
    values = [value for value in values if value is not None]
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


def scale(value, by=100):
    return None if value is None else by * value


def against(r, family, name="retain_recall"):
    """A family's statistic against RULE of the same seeds, and its outcomes."""
    own = r.of(family, "rule" if family in ("double", "compute", "best_rule") else "rerule")
    return paired(own, r.of("base", "rule"), name), own


def difference_table(r, families):
    """Rows of RULE and of families of runs: columns, and what changed against RULE."""

    def row(label, own, change, of_hard):
        return [label, column(own, "retain_recall"), *change, column(own, "hard"), of_hard, column(own, "late_hard", 2),
                *(column(own, key) for key in ("forget_refusal", "retain_refusal", "seconds_stage2"))]  # fmt: skip

    rows = [row("RULE", r.of("base", "rule"), ("", ""), "")]
    for family in families:
        stat, own = against(r, family)
        if own:
            rows.append(row(LABELS[family], own, (interval(stat), sign(stat)), interval(against(r, family, "hard")[0])))
    return table(
        ["Stage 2", "Retain ↑", "difference to RULE", "seeds up", "hard neighbours ↑", "difference to RULE",
         "hard prompts' reward, late ↑", "forget refusal ↑", "over-refusal ↓", "seconds"],
        rows,
    )  # fmt: skip


# --- the paper's tables -----------------------------------------------------------------------------------------------


def methods(r, folder):
    """Tables 1, 2 and 5 in shape, with the paper's figures beside ours."""
    if not r.runs("base"):
        return None
    few = next(iter(r.runs("baselines").values()), {"rows": {}})["rows"]
    rows = {name: r.of("base", name) for name in ("Original", "Retained")}
    rows |= {name: r.of("baselines", name) for name in few}
    rows |= {"Rej. Steer": r.of("base", "Rej. Steer"), "RULE": r.of("base", "rule"), "ReRULE": r.of("base")}
    rows |= {"RULE, own best rate": r.of("best_rule", "rule"), "ReRULE, own best rate": r.of("best_rerule")}
    theirs = {"table1": ("forget_all", "retain_all"), "table2": ("knowmem", "utility"),
              "table5": ("forget_quality", "model_utility", "forget_rouge_l")}  # fmt: skip
    lines, points = [], {}
    for name, outcomes in rows.items():
        seeds = [(o["forget_recall"], o["retain_recall"]) for o in outcomes.values() if o["retain_recall"] is not None]
        if not seeds:
            continue
        stopped = any(o.get("stopped") for o in outcomes.values())
        points[name] = (*map(fmean, zip(*seeds, strict=True)), seeds, stopped)
        tokens = [column(outcomes, key, 0) for key in ("forget_tokens", "retain_tokens")]
        paper = [PAPER[number].get(name, {}).get(key) for number, keys in theirs.items() for key in keys]
        lines.append([name + "†" * stopped, str(len(outcomes)), *tokens, *(column(outcomes, key) for key in COLUMNS),
                      *("" if value is None else f"{value:g}" for value in paper)])  # fmt: skip
    scatter(points, folder / "methods.png")
    header = ["", "seeds", "# tokens, forget", "retain", *COLUMNS.values(), "*paper:* RWKU forget ↓", "RWKU retain ↑",
              "MUSE KnowMem ↓", "MUSE utility ↑", "TOFU FQ ↑", "TOFU MU ↑", "TOFU F-RL ↓"]  # fmt: skip
    return {"table": table(header, lines)}


def table3(r, folder):
    """The three hardest cases of each kind."""
    if not r.runs("base"):
        return None
    seed, base = min(r.runs("base").items())
    figures.hardest(base, folder / "hardest.png")
    rows = []
    for query, kind, prompt, answer in base["cases"]:
        late = [mean(reward for _, q, reward, _ in records.groups_of(base, m, last=True) if q == query)
                for m in NAMES]  # fmt: skip
        shown = [mean(records.before_replay(base)[query]), *late]
        shown = ["–" if value is None else f"{value:.2f}" for value in shown]
        rows.append([prompt, answer, "reject" if kind == "forget" else "normal", *shown])
    gain = claims.figure(paired(r.of("base"), r.of("base", "rule"), "late_cases"))
    header = ["Question", "Answer", "Type", "before replay", "RULE, late ↑", "ReRULE, late ↑"]
    return {"seed": seed, "gain": gain, "table": table(header, rows)}


def table4(r, folder):
    """Hard against random storage."""
    separate = paired(r.of("base"), r.of("random"), "retain_recall")
    combined = paired(r.of("combined"), r.of("combined_random"), "retain_recall")
    rows = difference_table(r, ("base", "random", "combined", "combined_random"))
    return r.of("random") and {
        "table": rows, "separate": claims.figure(separate), "combined": claims.figure(combined)
    }  # fmt: skip


def table6(r, folder):
    """Share of groups below τ before activation."""
    rows = []
    for family, label in figures.WORLDS.items():
        runs = r.runs(family).values()
        for tau in (0.4, 0.6, 0.8, 1.0) if runs else ():
            cells = [spread([scale(records.hard_share(run, tau, kind)) for run in runs]) for kind in (None, "f", "b")]
            rows.append([label, f"{tau:g}", *cells])
    return rows and {"table": table(["World", "τ", "Hard ratio, %", "forget", "boundary"], rows)}


def table7(r, folder):
    """Time."""
    rows = []
    for family, label in (("base", "Built-in world"), ("tofu", "TOFU text, tiny model")):
        ours, stat = [r.of(family, method) for method in NAMES], claims.extra_time(r, family)
        if ours[0]:
            runs = r.runs(family).values()
            seconds = [[run["methods"]["rerule"][f"seconds_{part}"] for part in PARTS] for run in runs]
            parts = [100 * mean(row[at] / sum(row) for row in seconds) for at in range(len(PARTS))]
            rows.append([label, *(column(o, "seconds_stage2") + " s" for o in ours),
                         f"{interval(stat)} %" if stat else "–", *(f"{part:.0f} %" for part in parts)])  # fmt: skip
    for name, row in PAPER["table7"].items():
        rule, rerule = row["RULE_hours"], row["ReRULE_hours"]
        rows.append([f"*paper: {name}*", f"{rule} h", f"{rerule} h", f"{100 * (rerule / rule - 1):+.1f} %", *[""] * 4])
    header = ["", "RULE", "ReRULE", "extra", "of ReRULE: sampling", "π_ref", "update", "replay"]
    return r.runs("base") and {"table": table(header, rows)}


def table8(r, folder):
    """τ."""
    return r.runs("tau1.0") and {"table": difference_table(r, ("base", "tau0.6", "tau0.8", "tau1.0"))}


# --- ours ------------------------------------------------------------------------------------------------------------


def controls(r, folder):
    """What the gain is made of: the first figure, and its table."""
    rows = []
    for family, (kind, label) in CONTROLS.items():
        stat = against(r, family)[0]
        if stat and family == "best_rerule":  # at a high rate the buffer may never hold enough
            replayed = sum(run["methods"]["rerule"]["replay_groups"] > 0 for run in r.runs(family).values())
            label += f"\n(replay started on {replayed} of {stat['n']} seeds)" if replayed < stat["n"] else ""
        if stat:
            rows.append((label, kind, stat))
    if not rows:
        return None
    figures.gains(sorted(rows, key=lambda row: -row[2]["mean"]), folder / "gains.png")
    return {"table": difference_table(r, CONTROLS), "longer": longer(r)}


def longer(r):
    """How the step count of RULE with as much arithmetic came about."""
    runs, ours = r.runs("compute"), r.of("base")
    if not runs:
        return ""
    clock = [ours[s]["seconds_stage2"] / o["seconds_stage2"] for s, o in r.of("base", "rule").items() if s in ours]
    methods = [run["methods"] for run in r.runs("select").values()]
    ratios = [found["rerule"]["arithmetic"] / found["rule"]["arithmetic"] for found in methods]
    steps, ratio = next(iter(runs.values()))["steps"], sorted(ratios)[len(ratios) // 2] if ratios else float("nan")
    return (
        f"\n\nRULE with as much arithmetic takes {steps} steps: on the selection seeds ReRULE computed {ratio:.2f} "
        "times RULE's token positions (sampling and π_ref one forward each, updates three). By the clock it took "
        f"{mean(clock):.2f} times as long here."
    )


def worlds(r, folder):
    """Three worlds."""
    rows = []
    for family, label in figures.WORLDS.items():
        theirs, ours = r.of(family, "rule"), r.of(family)
        if ours:
            shares = [scale(records.hard_share(run, run["tau"])) for run in r.runs(family).values()]
            stat = paired(ours, theirs, "retain_recall")
            recall, refusal = ([column(o, key) for o in (theirs, ours)] for key in ("retain_recall", "forget_refusal"))
            rows.append([label, spread(shares), *recall, interval(stat), sign(stat), *refusal])
    if rows:
        figures.conditions(r, folder / "conditions.png")
    header = ["World", "hard ratio, %", "RULE, retain ↑", "ReRULE ↑", "gain", "seeds up", "RULE, forget refusal ↑",
              "ReRULE ↑"]  # fmt: skip
    return len(rows) == 3 and {"table": table(header, rows)}


def tofu(r, folder):
    """Real text."""
    rows, rule = [], r.of("tofu", "rule")
    shown = {"model_utility": ("Model utility ↑", 3), "forget_rouge_l": ("F-RL ↓", 3),
             "retain_recall": ("Retain recall ↑", 1), "retain_refusal": ("Over-refusal ↓", 1),
             "forget_refusal": ("Forget refusal ↑", 1),
             "forget_paraphrased_recall": ("Recall, paraphrased ↓", 1)}  # fmt: skip
    for label, own in (("RULE", rule), ("ReRULE", r.of("tofu")), ("random storage", r.of("tofu_random"))):
        if own:
            stat = paired(own, rule, "model_utility") if label != "RULE" else None
            cells = [column(own, key, digits) for key, (_, digits) in shown.items()]
            rows.append([label, str(len(own)), *cells, interval(stat, 3), column(own, "seconds_stage2")])
    header = [
        "forget01",
        "seeds",
        *(title for title, _ in shown.values()),
        "Model utility, difference to RULE",
        "seconds",
    ]
    return rows and {"table": table(header, rows)}


def rates(r, folder):
    """What the learning rates were chosen on."""
    selection = sorted(r.runs("select"))
    scores, chosen = records.rate_scores(r.records, selection, RATES), records.choose(r.records, selection, RATES)
    rows = []
    for method, by_rate in scores.items():
        best = chosen and chosen[method]
        cells = [f"**{spread(values)}**" if rate == best else spread(values) for rate, values in by_rate.items()]
        rows.append([NAMES[method], *cells])
    found = {"table": table(["Balance ↑", *RATES], rows), "seeds": ", ".join(map(str, selection)), "shared": RATES[0]}
    return found if any(scores["rule"].values()) else None


def weights(r, folder):
    """Importance weights."""
    families = ("base", "token", "geometric", "surrogate", "normalize", "unweighted", "wide", "replay_kl")
    return r.runs("token") and {"table": difference_table(r, families)}
