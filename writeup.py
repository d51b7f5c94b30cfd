"""results/report.md and its figures, from records alone: the same records give the same report.

The order is that of a reader's questions: what holds, against which controls, then the paper's tables and figures one
by one, each with the command that makes it. A part whose runs are missing says so.
"""

from pathlib import Path

import analysis
import claims
import figures
from experiments import RATES
from files import write_text
from tables import (
    LABELS,
    against,
    column,
    difference_table,
    interval,
    methods,
    scale,
    section,
    sign,
    spread,
    table,
    table3,
    table4,
    table6,
    table7,
    table8,
)  # fmt: skip

RULE_ALONE = ("twice", "double", "compute", "best_rule")
ORDER = (
    "base random recent zero unequal activation combined combined_random twice double compute best_rule best_rerule"
).split()  # of the controls, from ReRULE to what no longer replays


def write(folder, o, records, jobs):
    """report.md and all figures whose runs are there, in `folder`."""
    r = analysis.Results(records, jobs)
    parts = [head(r, o, jobs), verdicts(r), controls(r, folder), methods(r, folder), table3(r, folder), table4(r),
             table6(r), table7(r), table8(r), figure1(r, folder), figure2(folder), figure3(r, folder),
             worlds(r, folder), tofu(r), rates(r), weights(r), appendix_e(r, folder)]  # fmt: skip
    write_text(Path(folder) / "report.md", "\n".join(line for part in parts for line in [*part, ""]).rstrip() + "\n")


def head(r, o, jobs):
    """What this is, where it comes from, how a verdict is reached."""
    runs = [run for run in r.records.values()]
    commits = sorted({run["commit"] for run in runs})
    versions = sorted({", ".join(f"{k} {v}" for k, v in run["versions"].items()) for run in runs})
    seeds = sorted(r.runs("base"))
    missing = [job.name for job in jobs if job.name not in r.records]
    hours = sum(run["seconds"] for run in runs) / 3600
    command = "python reproduce.py" + (" --quick" if o.quick else f" --seeds {o.seeds}")
    command += " --tofu_dir DATA/tofu" * bool(r.runs("tofu"))
    lines = [
        "# The paper in miniature",
        "",
        "Every table, figure and ablation of the ReRULE paper on a made-up world small enough for a laptop, with "
        "controls that the paper lacks. It tells whether the method's claims hold *here*, for a model of 0.5 M "
        "parameters; it cannot tell whether they hold for one of 8 B.",
        "",
        f"Command `{command}`; {len(runs)} runs, {hours:.1f} hours of one CPU thread; commit "
        f"{', '.join(commits) or '–'}; {'; '.join(versions)}. Report seeds {seeds[0]}–{seeds[-1]}."
        if seeds
        else "No runs yet.",
        "",
        "Values are mean ± sd over seeds; differences are paired by seed, with a 95 % bootstrap interval (10,000 "
        "percentile resamples of the seeds, which is somewhat narrow for eight) and a two-sided sign test. No "
        "correction is made for the number of comparisons: of twenty without any effect one would seem to have one.",
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
        shown = "<br>".join(filter(None, map(claims.shown, claim.parts)))
        verdict = claims.overall(claim.parts)
        rows.append([claim.text, claim.run, shown, f"**{verdict}**", f"`--only {claim.only}`"])
    count = {v: sum(row[3] == f"**{v}**" for row in rows) for v in (*reversed(claims.VERDICTS), "not run")}
    told = ", ".join(f"{n} {verdict}" for verdict, n in count.items() if n)
    return [
        "## Do the paper's claims hold here?", "", f"{len(rows)} claims: {told}.", "",
        "| claim, in our words | what was run | figure [95 % interval], seeds, sign test | verdict | command |",
        "|---|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows), "",
        "*Holds*: the whole interval is on the claim's side of the bar (0 unless another is named). *Holds in "
        "direction*: the mean is, the interval is not. *Opposite*: the whole interval is on the other side. *Not "
        "seen*: anything else. Of several figures the worst counts. \"No change\" asks that the interval stays "
        "within the margin on both sides. Commands are `python reproduce.py` with what is shown. Hard and easy "
        "prompts are told apart at τ by mean reward before replay starts, where RULE and ReRULE are the same run.",
    ]  # fmt: skip


def controls(r, folder):
    """What the gain is made of: the first figure, and its table."""
    rows = []
    for family in ORDER:
        stat, own = against(r, family)
        if stat:
            kind = "rule" if family in RULE_ALONE else "paper" if family in ("base", "random") else "control"
            rows.append((LABELS[family], kind, stat))
    if not rows:
        return section("Where the gain comes from", "controls", [], False)
    figures.gains(rows, Path(folder) / "gains.png")
    text = [
        "![Gain in retain quality over RULE of ReRULE, of other kinds of replay and of RULE with other "
        "settings](gains.png)", "",
        *difference_table(r, ORDER), "",
        "Retain: ROUGE-L recall on all neighbours' probes, %. Late: the last third of the steps. All rows of a seed "
        "start from the same Stage 1 model.",
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
        f"RULE with as much arithmetic takes {steps} steps: on the selection seeds ReRULE computed {told:.2f} times "
        "RULE's token positions (sampling and π_ref one forward each, updates three). By the clock it took "
        f"{clock:.2f} times as long here.",
    ]  # fmt: skip


def figure1(r, folder):
    """Reward trajectories."""
    if r.runs("base"):
        figures.trajectories(r, Path(folder) / "trajectories.png")
    return section("Figure 1: reward trajectories", "figure1", [
        "![RULE's mean reward over training, prompts in fifths from hard to easy, forget and "
        "boundary](trajectories.png)", "",
        "RULE. Prompts are sorted by their mean reward before replay would start, so the first point of each line "
        "was part of the sorting and later ones move towards one another by chance alone. Thin lines are seeds.",
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
        "A curve that is still rising has a large sd for that alone, so the second column takes out a straight "
        "line. On the right, part of the rise at the line, in both methods, is regression to the mean: the prompts "
        "are those that had earned little before it.",
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
            cells = [column(theirs, "retain_recall"), column(ours, "retain_recall"), interval(stat), sign(stat)]
            cells += [column(theirs, "forget_refusal"), column(ours, "forget_refusal")]
            rows.append([label, spread(shares), *cells])
    if rows:
        figures.conditions(r, Path(folder) / "conditions.png")
    return section("Three worlds", "worlds", [
        *table(["World", "hard ratio, %", "RULE, retain ↑", "ReRULE ↑", "gain", "seeds up", "RULE, forget refusal ↑",
                "ReRULE ↑"], rows), "",
        "![Gain of replay against the share of hard groups in three worlds; retain quality by τ](conditions.png)",
    ], len(rows) == 3)  # fmt: skip


def tofu(r):
    """Real text."""
    rows = []
    rule = r.of("tofu", "rule")
    shown = {"model_utility": ("Model utility ↑", 3), "forget_rouge_l": ("F-RL ↓", 3),
             "retain_recall": ("Retain recall ↑", 1), "retain_refusal": ("Over-refusal ↓", 1),
             "forget_refusal": ("Forget refusal ↑", 1),
             "forget_paraphrased_recall": ("Recall, paraphrased ↓", 1)}  # fmt: skip
    for label, own in (("RULE", rule), ("ReRULE", r.of("tofu")), ("random storage", r.of("tofu_random"))):
        if own:
            stat = analysis.paired(own, rule, "model_utility") if label != "RULE" else None
            cells = [column(own, key, digits) for key, (_, digits) in shown.items()]
            rows.append([label, str(len(own)), *cells, interval(stat, 3), column(own, "seconds_stage2")])
    return section("TOFU: real text, tiny model", "tofu --tofu_dir DATA/tofu", [
        *table(["forget01", "seeds", *(title for title, _ in shown.values()), "Model utility, difference to RULE",
                "seconds"], rows), "",
        "A small Llama fitted to TOFU's own rows. Forget quality needs a model trained without the forget rows and "
        "is left out. The paper: model utility 0.6151 for RULE, 0.6076 for ReRULE; F-RL 0.1322 for both.",
    ] if rows else ["Not run: give the folder with TOFU's files as `--tofu_dir`."])  # fmt: skip


def rates(r):
    """What the learning rates were chosen on."""
    selection = sorted(r.runs("select"))
    scores = analysis.rate_scores(r.records, selection, RATES)
    chosen = analysis.choose(r.records, selection, RATES)
    rows = []
    for method, by_rate in scores.items():
        best = chosen and chosen[method]
        rows.append([analysis.NAMES[method], *(("**{}**" if rate == best else "{}").format(spread(values))
                                               for rate, values in by_rate.items())])  # fmt: skip
    seeds = ", ".join(map(str, selection))
    return section("Learning rates, chosen on other seeds", "rates", [
        *table(["Balance ↑", *RATES], rows), "",
        f"Balance: harmonic mean of retain recall and 100 − forget recall, as for the baselines. Seeds {seeds}, "
        f"which nothing else in this report uses; the best in bold. {RATES[0]} is the shared rate, at which RULE is "
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
            found = [m[region] for m in own if region in m]
            cells = [spread([scale(m[key], by) for m in found], digits) for key, by, digits in
                     (("queries", 1, 0), ("missed", 100, 1), ("false", 100, 1), ("norm", 1, 2), ("weighted", 1, 2),
                      ("equal", 100, 1))]  # fmt: skip
            rates.append([model, region, *cells])
    correlation = analysis.statistic(claims.bound_correlations(r))
    text = [
        "![The bound against the gain; Eq. 4's two terms; Eq. 27's four rates](theory.png)", "",
        *table(["ReRULE", "p_H", "κ, clipped", "κ, unclipped", "clipped share", "N_on, 1000 tokens", "N_eff",
                "√(N_on/N_eff)", "with κ unclipped", "hard prompts' reward, late, ReRULE − RULE"], rows), "",
        "N_eff exceeds N_on by construction and κ of weights clipped to [0.8, 1.3] cannot fall below 0.943, so the "
        "bound alone "
        "cannot fail. What can is that a tighter one goes with a larger gain: Spearman's ρ over a seed's six runs, "
        f"{claims.figure(correlation)}.", "",
        *table(["Model", "region", "prompts", "forget answered, % ↓", "boundary refused, % ↓", "gradient norm",
                "P(region) × norm", "all-equal groups, %"], rates), "",
        "Eight fresh rollouts to every training prompt. The norm is that of the region's mean policy gradient (Eq. "
        "3 without KL) over those rollouts; a mean over few noisy groups has a norm even where the expected "
        "gradient is 0.",
    ]  # fmt: skip
    return section("Appendix E and Eq. 4, measured", "appendix_e", text)
