"""results/report.md and its figures, from records alone: the same records give the same report.

The order is that of a reader's questions: what holds, against which controls, then the paper's tables and figures one by
one, each with the command that makes it. A part whose runs are missing says so.
"""

import json
from pathlib import Path

import analysis
import claims
import figures
from files import write_text

LABELS = {
    "base": "ReRULE: hard groups, an extra step", "random": "random groups (the paper's control)",
    "recent": "the previous batch again", "twice": "RULE with two updates a batch, from step 2",
    "zero": "a step on zero gradient: momentum alone", "double": "RULE, twice the learning rate",
    "compute": "RULE, as much arithmetic as ReRULE", "best_rule": "RULE at its own best learning rate",
    "best_rerule": "ReRULE at its own best learning rate", "activation": "storing until activation only",
    "unequal": "all-equal groups not stored", "combined": "hard groups, both losses in one step",
    "combined_random": "random groups, both losses in one step", "tau0.6": "τ = 0.6", "tau0.8": "τ = 0.8",
    "tau1.0": "τ = 1.0", "token": "weights by token", "geometric": "weights by the |y|-th root",
    "surrogate": "PPO's clipped minimum", "normalize": "weights over their mean", "unweighted": "weights all 1",
    "wide": "weights clipped to [0.1, 10]", "replay_kl": "KL on replayed rollouts",
}  # fmt: skip
RULE_ALONE = ("twice", "double", "compute", "best_rule")
COLUMNS = {
    "retain_recall": "Retain ↑", "hard": "hard neighbours ↑", "easy": "easy ↑", "retain_refusal": "Over-refusal ↓",
    "forget_refusal": "Forget refusal ↑", "forget_recall": "Forget recall ↓",
}  # fmt: skip


def write(folder, o, records, jobs):
    """report.md and all figures whose runs are there, in `folder`."""
    r = analysis.Results(records, jobs)
    selection = sorted(r.runs("select"))
    parts = [head(r, o, records, jobs), verdicts(r), controls(r, folder), methods(r, folder), table3(r, folder), table4(r),
             table6(r), table7(r), table8(r), figure1(r, folder), figure2(folder), figure3(r, folder),
             worlds(r, folder), tofu(r, o), rates(r, records, selection), weights(r), appendix_e(r, folder)]  # fmt: skip
    write_text(Path(folder) / "report.md", "\n".join(line for part in parts for line in [*part, ""]).rstrip() + "\n")


# --- cells -----------------------------------------------------------------------------------------------------------


def table(header, rows):
    """Markdown lines; the first column is text, the rest numbers."""
    return ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)] + [
        "| " + " | ".join(row) + " |" for row in rows
    ]


def spread(values, digits=1):
    """mean ± sd of one value a seed; None left out."""
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    mean = sum(values) / len(values)
    sd = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    return f"{mean:.{digits}f} ± {sd:.{digits}f}"


def column(outcomes, name, digits=1):
    return spread([o.get(name) for o in outcomes.values()], digits)


def interval(stat, digits=1):
    """Paired difference with its interval, in a cell."""
    return f"{stat['mean']:+.{digits}f} [{stat['low']:+.{digits}f}, {stat['high']:+.{digits}f}]" if stat else "–"


def sign(stat):
    """How many seeds went up, and the sign test."""
    return f"{stat['up']} of {stat['n']}, p = {stat['p']:.2g}" if stat else "–"


def section(title, only, text, enough=True):
    """A heading with its command, or with the word that it has not been run."""
    lines = [f"## {title}", "", f"`python reproduce.py --only {only}`", ""]
    return lines + (text if enough else ["Not run yet."])


# --- parts -----------------------------------------------------------------------------------------------------------


def head(r, o, records, jobs):
    """What this is, where it comes from, how a verdict is reached."""
    runs = [run for run in r.records.values()]
    commits = sorted({run["commit"] for run in runs})
    versions = sorted({", ".join(f"{k} {v}" for k, v in run["versions"].items()) for run in runs})
    seeds = sorted(r.runs("base"))
    missing = [job.name for job in jobs if job.name not in r.records]
    hours = sum(run["seconds"] for run in runs) / 3600
    command = "python reproduce.py" + (" --quick" if o.quick else f" --seeds {o.seeds}") + " --tofu_dir DATA/tofu"
    lines = [
        "# The paper in miniature",
        "",
        "Every table, figure and ablation of the ReRULE paper on a made-up world small enough for a laptop, with controls that "
        "the paper lacks. It tells whether the method's claims hold *here*, for a model of 0.5 M parameters; it cannot tell "
        "whether they hold for one of 8 B.",
        "",
        f"Command `{command}`; {len(runs)} runs, {hours:.1f} hours of one CPU thread; commit {', '.join(commits) or '–'}; "
        f"{'; '.join(versions)}. Report seeds {seeds[0]}–{seeds[-1]}." if seeds else "No runs yet.",
        "",
        "Values are mean ± sd over seeds; differences are paired by seed, with a 95 % bootstrap interval (10,000 percentile "
        "resamples of the seeds, which is somewhat narrow for eight) and a two-sided sign test. No correction is made for "
        "the number of comparisons: of twenty without any effect one would seem to have one.",
    ]  # fmt: skip
    if o.quick:
        lines += [
            "",
            "**This is a quick run: few seeds, few steps. It shows that everything works, and nothing else.**",
        ]
    if missing:
        lines += ["", f"{len(missing)} of {len(jobs)} runs are missing; parts without theirs say so."]
    return lines


def verdicts(r):
    """The claims, one row each."""
    rows = []
    for claim in claims.claims(r):
        shown = "<br>".join(f"{p.label}: {claims.figure(p.stat, p.unit)}" for p in claim.parts if p.shown)
        verdict = claims.overall(claim.parts)
        rows.append([claim.text, claim.run, shown, f"**{verdict}**", f"`--only {claim.only}`"])
    count = {v: sum(row[3] == f"**{v}**" for row in rows) for v in (*reversed(claims.VERDICTS), "not run")}
    told = ", ".join(f"{n} {verdict}" for verdict, n in count.items() if n)
    return [
        "## Do the paper's claims hold here?", "", f"{len(rows)} claims: {told}.", "",
        "| claim, in our words | what was run | figure [95 % interval], seeds, sign test | verdict | command |", "|---|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows), "",
        "*Holds*: the whole interval is on the claim's side of the bar (0 unless another is named). *Holds in direction*: the "
        "mean is, the interval is not. *Opposite*: the whole interval is on the other side. *Not seen*: anything else. Of several "
        "figures the worst counts. \"No change\" asks that the interval stays within the margin on both sides. Commands are "
        "`python reproduce.py` with what is shown. Hard and easy prompts are told apart at τ by mean reward before replay starts, "
        "where RULE and ReRULE are the same run.",
    ]  # fmt: skip


def against(r, family, method=None, name="retain_recall"):
    """A family's statistic against RULE of the same seeds."""
    method = method or ("rule" if family in ("double", "compute", "best_rule") else "rerule")
    return analysis.paired(r.of(family, method), r.of("base", "rule"), name), r.of(family, method)


def difference_table(r, families):
    """Rows of RULE and of families of runs: columns, and what changed against RULE."""
    rule = r.of("base", "rule")
    rows = [["RULE", column(rule, "retain_recall"), "", "", column(rule, "hard"), "", column(rule, "late_hard", 2),
             column(rule, "forget_refusal"), column(rule, "retain_refusal"), column(rule, "seconds_stage2")]]  # fmt: skip
    for family in families:
        stat, own = against(r, family)
        if own:
            rows.append([LABELS[family], column(own, "retain_recall"), interval(stat), sign(stat), column(own, "hard"),
                         interval(against(r, family, name="hard")[0]), column(own, "late_hard", 2),
                         column(own, "forget_refusal"), column(own, "retain_refusal"),
                         column(own, "seconds_stage2")])  # fmt: skip
    return table(
        ["Stage 2", "Retain ↑", "difference to RULE", "seeds up", "hard neighbours ↑", "difference to RULE",
         "hard prompts' reward, late ↑", "forget refusal ↑", "over-refusal ↓", "seconds"],
        rows,
    )  # fmt: skip


CONTROLS = ("base", "random", "recent", "zero", "unequal", "activation", "combined", "combined_random", "twice", "double",
            "compute", "best_rule", "best_rerule")  # fmt: skip


def controls(r, folder):
    """What the gain is made of: the first figure, and its table."""
    rows = []
    for family in CONTROLS:
        stat, own = against(r, family)
        if stat:
            kind = "rule" if family in RULE_ALONE else "paper" if family in ("base", "random") else "control"
            rows.append((LABELS[family], kind, stat))
    if not rows:
        return section("Where the gain comes from", "controls", [], False)
    figures.gains(rows, Path(folder) / "gains.png")
    text = [
        "![Gain in retain quality over RULE of ReRULE, of other kinds of replay and of RULE with other settings](gains.png)", "",
        *difference_table(r, CONTROLS), "",
        "Retain: ROUGE-L recall on all neighbours' probes, %. Late: the last third of the steps. All rows of a seed start from "
        "the same Stage 1 model.",
        *ratio_line(r),
    ]  # fmt: skip
    return section("Where the gain comes from", "controls", text)


def ratio_line(r):
    """How the step count of RULE with as much arithmetic came about."""
    runs = r.runs("compute")
    if not runs:
        return []
    steps, seconds = next(iter(runs.values()))["steps"], r.of("base")
    clock = analysis.mean(
        seconds[s]["seconds_stage2"] / o["seconds_stage2"] for s, o in r.of("base", "rule").items() if s in seconds
    )
    ratios = [
        run["methods"]["rerule"]["arithmetic"] / run["methods"]["rule"]["arithmetic"]
        for run in r.runs("select").values()
    ]
    told = sorted(ratios)[len(ratios) // 2] if ratios else float("nan")
    return [
        "",
        f"RULE with as much arithmetic takes {steps} steps: on the selection seeds ReRULE computed {told:.2f} times RULE's token "
        f"positions (sampling and π_ref one forward each, updates three). By the clock it took {clock:.2f} times as long here.",
    ]  # fmt: skip


def methods(r, folder):
    """Tables 1, 2 and 5 in shape, with the paper's figures beside ours."""
    paper = json.loads((Path(__file__).parent / "paper.json").read_text(encoding="utf-8"))
    bases, few = r.runs("base"), r.runs("baselines")
    if not bases:
        return section("Tables 1, 2 and 5: methods", "table1", [], False)
    order = ["Original", "Retained", *(name for name in next(iter(few.values()), {"rows": {}})["rows"]
                                       if name not in ("Original", "Retained", "Rej. Steer")), "Rej. Steer"]  # fmt: skip
    rows = {name: r.of("baselines" if name in next(iter(few.values()), {"rows": {}})["rows"] and name not in
                       ("Original", "Retained", "Rej. Steer") else "base", name) for name in order}  # fmt: skip
    rows |= {"RULE": r.of("base", "rule"), "ReRULE": r.of("base"), "RULE, own best rate": r.of("best_rule", "rule"),
             "ReRULE, own best rate": r.of("best_rerule")}  # fmt: skip
    lines = []
    for name, outcomes in rows.items():
        if not outcomes or all(o.get("retain_recall") is None for o in outcomes.values()):
            continue
        stopped = "†" if any(o.get("stopped") for o in outcomes.values()) else ""
        tokens = [column(outcomes, key, 0) for key in ("forget_tokens", "retain_tokens")]
        theirs = [paper["table1"].get(name, {}).get(k) for k in ("forget_all", "retain_all")]
        theirs += [paper["table2"].get(name, {}).get(k) for k in ("knowmem", "utility")]
        theirs += [paper["table5"].get(name, {}).get(k) for k in ("forget_quality", "model_utility", "forget_rouge_l")]
        cells = ["" if v is None else f"{v:g}" for v in theirs]
        lines.append([name + stopped, str(len(outcomes)), *tokens, *(column(outcomes, key) for key in COLUMNS), *cells])
    header = ["", "seeds", "# tokens, forget", "retain", *COLUMNS.values(), "*paper:* RWKU forget ↓", "RWKU retain ↑",
              "MUSE KnowMem ↓", "MUSE utility ↑", "TOFU FQ ↑", "TOFU MU ↑", "TOFU F-RL ↓"]  # fmt: skip
    points = {name: [(o["forget_recall"], o["retain_recall"]) for o in outcomes.values() if o["retain_recall"] is not None]
              for name, outcomes in rows.items()}  # fmt: skip
    figures.methods({name: values for name, values in points.items() if values}, Path(folder) / "methods.png")
    text = [
        "![Recall of what was to be forgotten against recall of what was to be kept, one point a method](methods.png)", "",
        *table(header, lines), "",
        "Ours are % of probes of the built-in world. Baselines are run on three seeds, each at a learning rate chosen on seeds "
        "that no table uses. † at least one seed stopped early because the model broke down. The paper's figures stand where "
        "it has the row; they are of other models and data, so only orders can be compared. Naturalness needs a judge and is "
        "left out.",
    ]  # fmt: skip
    return section("Tables 1, 2 and 5: methods", "table1", text)


def table3(r, folder):
    """The three hardest cases of each kind."""
    if not r.runs("base"):
        return section("Table 3: the hardest cases", "table3", [], False)
    first = min(r.runs("base"))
    base = r.runs("base")[first]
    figures.hardest(r, Path(folder) / "hardest.png")
    rows = []
    for query, kind, prompt, answer in base["cases"]:
        late = [analysis.mean(reward for _, q, reward, _ in analysis.groups_of(base, m, last=True) if q == query)
                for m in ("rule", "rerule")]  # fmt: skip
        before = analysis.mean(analysis.before_replay(base)[query])
        rows.append([prompt, answer, "reject" if kind == "forget" else "normal",
                     *("–" if value is None else f"{value:.2f}" for value in (before, *late))])  # fmt: skip
    stat = analysis.paired(r.of("base"), r.of("base", "rule"), "late_cases")
    text = [
        f"The three hardest forget and boundary prompts of seed {first}, by mean reward before replay. Over all seeds' six, "
        f"ReRULE less RULE in the last third: {claims.figure(stat)}.", "",
        *table(["Question", "Answer", "Type", "before replay", "RULE, late ↑", "ReRULE, late ↑"], rows), "",
        "![Reward of each of the six prompts at every visit, RULE against ReRULE](hardest.png)", "",
        "–: not visited in the last third. The paper's three: two to reject, one to answer; curves in its Figure 3(b).",
    ]  # fmt: skip
    return section("Table 3: the hardest cases", "table3", text)


def table4(r):
    """Hard against random storage."""
    hard, random = r.of("base"), r.of("random")
    if not random:
        return section("Table 4: hard against random storage", "table4", [], False)
    rows = difference_table(r, ("base", "random", "combined", "combined_random"))
    stat = analysis.paired(hard, random, "retain_recall")
    single = analysis.paired(r.of("combined"), r.of("combined_random"), "retain_recall")
    text = [
        *rows, "", f"Hard less random, retain recall: {claims.figure(stat)}; both losses in one step: {claims.figure(single)}. "
        "The paper's utility: RULE 46.3, ReRULE 56.2, random 46.3.",
    ]  # fmt: skip
    return section("Table 4: hard against random storage", "table4", text)


def table6(r):
    """Share of groups below τ before activation."""
    rows = []
    for family, label in (
        ("world0", "no crossed names"),
        ("base", "22 of 42 crossed"),
        ("world30", "30 of 42 crossed"),
    ):
        for tau in (0.4, 0.6, 0.8, 1.0):
            runs = r.runs(family).values()
            cells = [spread([scale(analysis.hard_share(run, tau, kind)) for run in runs]) for kind in (None, "f", "b")]
            if runs:
                rows.append([label, f"{tau:g}", *cells])
    text = [
        *table(["World", "τ", "Hard ratio, %", "forget", "boundary"], rows), "",
        "Groups with mean reward below τ before replay starts. The paper: MUSE 67.5 (τ 0.4), TOFU 47.5 (0.4) and 54.3 (0.6).",
    ]  # fmt: skip
    return section("Table 6: share of hard groups", "table6", text, bool(rows))


def scale(value, by=100):
    return None if value is None else by * value


def table7(r):
    """Time."""
    paper = json.loads((Path(__file__).parent / "paper.json").read_text(encoding="utf-8"))["table7"]
    rows = []
    for family, label in (("base", "Built-in world"), ("tofu", "TOFU text, tiny model")):
        ours, stat = [r.of(family, m) for m in ("rule", "rerule")], claims.extra_time(r, family)
        if ours[0]:
            runs = r.runs(family).values()
            parts = [100 * analysis.mean(run["methods"]["rerule"][f"seconds_{part}"] / sum(
                run["methods"]["rerule"][f"seconds_{p}"] for p in analysis.PARTS) for run in runs) for part in analysis.PARTS]  # fmt: skip
            rows.append([label, *(column(o, "seconds_stage2") + " s" for o in ours),
                         f"{interval(stat)} %" if stat else "–", *(f"{part:.0f} %" for part in parts)])  # fmt: skip
    for name, row in paper.items():
        extra = 100 * (row["ReRULE_hours"] / row["RULE_hours"] - 1)
        rows.append(
            [
                f"*paper: {name}*",
                f"{row['RULE_hours']} h",
                f"{row['ReRULE_hours']} h",
                f"{extra:+.1f} %",
                "",
                "",
                "",
                "",
            ]
        )
    text = [
        *table(["", "RULE", "ReRULE", "extra", "of ReRULE: sampling", "π_ref", "update", "replay"], rows), "",
        "Seconds of Stage 2's steps, evaluations left out, two runs at a time on two cores. Replay's share is large here because a "
        "tiny model's update costs as much as its sampling; where sampling long answers takes most of a step it is small.",
    ]  # fmt: skip
    return section("Table 7: training time", "table7", text, bool(r.runs("base")))


def table8(r):
    """τ."""
    return section("Table 8: the threshold τ", "table8", [
        *difference_table(r, ("base", "tau0.6", "tau0.8", "tau1.0")), "",
        "ReRULE's first row is τ = 0.4. At 1.0 every group is stored that is not perfect. The paper's utility: RULE 46.3; "
        "ReRULE 56.2 at τ = 0.4, then 52.3 and 53.7. Figure: [when replay pays](#three-worlds).",
    ], bool(r.runs("tau1.0")))  # fmt: skip


def figure1(r, folder):
    """Reward trajectories."""
    if r.runs("base"):
        figures.trajectories(r, Path(folder) / "trajectories.png")
    return section("Figure 1: reward trajectories", "figure1", [
        "![RULE's mean reward over training, prompts in fifths from hard to easy, forget and boundary](trajectories.png)", "",
        "RULE. Prompts are sorted by their mean reward before replay would start, so the first point of each line was part of "
        "the sorting and later ones move towards one another by chance alone. Thin lines are seeds.",
    ], bool(r.runs("base")))  # fmt: skip


def figure2(folder):
    """The pipeline."""
    figures.pipeline(Path(folder) / "pipeline.png")
    return section("Figure 2: the pipeline", "figure2", [
        "![One step of Stage 2 as boxes, each with the function that does it](pipeline.png)",
    ])  # fmt: skip


def figure3(r, folder):
    """Curves over steps, and instability as a number."""
    bases = r.runs("base")
    if bases:
        figures.over_steps(r, Path(folder) / "steps.png")
    rows = []
    for method, name in analysis.NAMES.items():
        pairs = [analysis.instability(base["methods"][method]["evaluations"]) for base in bases.values()]
        rows.append([name, *(spread([pair[at] for pair in pairs], 2) for at in (0, 1))])
    return section("Figure 3: over the steps", "figure3", [
        "![Retain quality, forget quality and hard prompts' reward over the steps, RULE against ReRULE](steps.png)", "",
        *table(["sd of retain quality over the last third ↓", "as it is", "about a straight line"], rows), "",
        "A curve that is still rising has a large sd for that alone, so the second column takes out a straight line.",
    ], bool(bases))  # fmt: skip


def worlds(r, folder):
    """Three worlds."""
    rows = []
    for family, label in (
        ("world0", "no crossed names"),
        ("base", "22 of 42 crossed"),
        ("world30", "30 of 42 crossed"),
    ):
        ours, theirs = r.of(family), r.of(family, "rule")
        if ours:
            shares = [scale(analysis.hard_share(run, run["tau"])) for run in r.runs(family).values()]
            stat = analysis.paired(ours, theirs, "retain_recall")
            rows.append([label, spread(shares), column(theirs, "retain_recall"), column(ours, "retain_recall"), interval(stat),
                         sign(stat), column(theirs, "forget_refusal"), column(ours, "forget_refusal")])  # fmt: skip
    if rows:
        figures.conditions(r, Path(folder) / "conditions.png")
    return section("Three worlds", "worlds", [
        *table(["World", "hard ratio, %", "RULE, retain ↑", "ReRULE ↑", "gain", "seeds up", "RULE, forget refusal ↑", "ReRULE ↑"],
               rows), "",
        "![Gain of replay against the share of hard groups in three worlds; retain quality by τ](conditions.png)",
    ], len(rows) == 3)  # fmt: skip


def tofu(r, o):
    """Real text."""
    rows = []
    rule = r.of("tofu", "rule")
    shown = {"model_utility": ("Model utility ↑", 3), "forget_rouge_l": ("F-RL ↓", 3), "retain_recall": ("Retain recall ↑", 1),
             "retain_refusal": ("Over-refusal ↓", 1), "forget_refusal": ("Forget refusal ↑", 1),
             "forget_paraphrased_recall": ("Recall, paraphrased ↓", 1)}  # fmt: skip
    for label, own in (("RULE", rule), ("ReRULE", r.of("tofu")), ("random storage", r.of("tofu_random"))):
        if own:
            stat = analysis.paired(own, rule, "model_utility") if label != "RULE" else None
            cells = [column(own, key, digits) for key, (_, digits) in shown.items()]
            rows.append([label, str(len(own)), *cells, interval(stat, 3), column(own, "seconds_stage2")])
    return section("TOFU: real text, tiny model", "tofu --tofu_dir DATA/tofu", [
        *table(["forget01", "seeds", *(title for title, _ in shown.values()), "Model utility, difference to RULE", "seconds"],
               rows), "",
        "A small Llama fitted to TOFU's own rows. Forget quality needs a model trained without the forget rows and is left out. "
        "The paper: model utility 0.6151 for RULE, 0.6076 for ReRULE; F-RL 0.1322 for both.",
    ] if rows else ["Not run: give the folder with TOFU's files as `--tofu_dir`."])  # fmt: skip


def rates(r, records, selection):
    """What the learning rates were chosen on."""
    from reproduce import RATES

    scores = analysis.rate_scores(r.records, selection, RATES)
    chosen = analysis.choose(r.records, selection, RATES)
    rows = []
    for method, by_rate in scores.items():
        best = chosen and chosen[method]
        rows.append([analysis.NAMES[method], *(("**{}**" if rate == best else "{}").format(spread(values))
                                               for rate, values in by_rate.items())])  # fmt: skip
    seeds = ", ".join(map(str, selection))
    return section("Learning rates, chosen on other seeds", "rates", [
        *table(["Retain less forget recall", *RATES], rows), "",
        f"Seeds {seeds}, which nothing else in this report uses; the best in bold. {RATES[0]} is the shared rate, at which RULE is "
        "not done after its steps and replay has something to add.",
    ], any(any(values) for values in scores["rule"].values()))  # fmt: skip


def weights(r):
    """Importance weights."""
    families = ("base", "token", "geometric", "surrogate", "normalize", "unweighted", "wide", "replay_kl")
    return section("Forms of the importance weight", "weights", [
        *difference_table(r, families), "",
        "The first row of replay: weights by sequence, clipped to [0.8, 1.3].",
    ], bool(r.runs("token")))  # fmt: skip


def appendix_e(r, folder):
    """The bound's figures, Eq. 4 and Eq. 27."""
    probes = r.runs("probe")
    if not probes:
        return section("Appendix E and Eq. 4, measured", "appendix_e", [], False)
    figures.theory(r, Path(folder) / "theory.png")
    rule, rows = r.of("base", "rule"), []
    for family in ("base", "tau0.6", "tau0.8", "tau1.0", "activation", "unequal"):
        runs = r.runs(family)
        found = [analysis.bound(run, r.runs("base")[seed]) for seed, run in runs.items() if seed in r.runs("base")]
        cells = [spread([b[key] for b in found], digits) for key, digits in
                 (("p_hard", 2), ("kappa_clipped", 3), ("kappa_unclipped", 3), ("clipped_share", 2))]  # fmt: skip
        cells += [spread([b[key] and b[key] / 1000 for b in found], 1) for key in ("n_on", "n_eff_clipped")]
        cells += [spread([b[f"bound_{kind}"] for b in found], 2) for kind in ("clipped", "unclipped")]
        if found:
            rows.append([LABELS[family], *cells, interval(analysis.paired(r.of(family), rule, "late_hard"), 2)])
    rates = []
    for model in ("Rej. Steer", "RULE", "ReRULE"):
        own = [run["models"][model] for run in probes.values()]
        for region in ("easy", "hard"):
            cells = [spread([scale(m[region][k], by) for m in own if region in m], digits) for k, by, digits in
                     (("missed", 100, 1), ("false", 100, 1), ("norm", 1, 2), ("weighted", 1, 2), ("equal", 100, 1))]  # fmt: skip
            rates.append([model, region, spread([m[region]["queries"] for m in own if region in m], 0), *cells])
    correlation = analysis.statistic(claims.bound_correlations(r))
    text = [
        "![The bound against the gain; Eq. 4's two terms; Eq. 27's four rates](theory.png)", "",
        *table(["ReRULE", "p_H", "κ, clipped", "κ, unclipped", "clipped share", "N_on, 1000 tokens", "N_eff", "√(N_on/N_eff)",
                "with κ unclipped", "hard prompts' reward, late, ReRULE − RULE"], rows), "",
        "N_eff exceeds N_on by construction and κ of weights clipped to [0.8, 1.3] cannot fall below 0.943, so the bound alone "
        "cannot fail. What can is that a tighter one goes with a larger gain: Spearman's ρ over a seed's six runs, "
        f"{claims.figure(correlation)}.", "",
        *table(["Model", "region", "prompts", "forget answered, % ↓", "boundary refused, % ↓", "gradient norm", "P(region) × norm",
                "all-equal groups, %"], rates), "",
        "Eight fresh rollouts to every training prompt. The norm is that of the region's mean policy gradient (Eq. 3 without "
        "KL) over those rollouts; a mean over few noisy groups has a norm even where the expected gradient is 0.",
    ]  # fmt: skip
    return section("Appendix E and Eq. 4, measured", "appendix_e", text)
