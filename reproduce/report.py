"""results/report.md and its figures, from records alone: the same records give the same report.

The text is `template.md`, whose order is that of a reader's questions: what holds, against which controls, then the
paper's tables and figures one by one, each with the command that makes it. A part whose runs are missing says so.
"""

from pathlib import Path

from engine.files import write_text
from engine.plots import NAMES
from reproduce import claims, figures, records, tables
from reproduce.tables import LABELS, interval, scale, spread, table


def write(folder, o, runs, jobs):
    """report.md and all figures whose runs are there, in `folder`. runs: {name: record}."""
    r, template = records.Results(runs, jobs), Path(__file__).with_name("template.md").read_text(encoding="utf-8")
    first, second, *sections = template.split("\n## ")
    filled = [first.format(**head(r, o, jobs)), second.format(**verdicts(r))]
    for part, section in zip(PARTS, sections, strict=True):
        blanks, (title, command, *_) = part(r, Path(folder)), section.split("\n\n")
        not_run = (
            "Not run: give the folder with TOFU's files as `--tofu_dir`." if part is tables.tofu else "Not run yet."
        )
        filled.append(section.format(**blanks) if blanks else f"{title}\n\n{command}\n\n{not_run}\n")
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
    rows = ["| claim, in our words | what was run | figure [95 % interval], seeds, sign test | verdict | command |",
            "|---|---|---|---|---|"]  # fmt: skip
    found = [(claim, claims.overall(claim.parts)) for claim in claims.claims(r)]
    for claim, verdict in found:
        shown = "<br>".join(filter(None, map(claims.shown, claim.parts)))
        rows.append(f"| {claim.text} | {claim.run} | {shown} | **{verdict}** | `--only {claim.only}` |")
    count = {v: sum(v == verdict for _, verdict in found) for v in (*reversed(claims.VERDICTS), "not run")}
    told = ", ".join(f"{n} {verdict}" for verdict, n in count.items() if n)
    return {"counts": f"{len(found)} claims: {told}.", "table": "\n".join(rows)}


# --- the paper's figures ---------------------------------------------------------------------------------------------


def figure1(r, folder):
    """Reward trajectories."""
    if r.runs("base"):
        figures.trajectories(r, folder / "trajectories.png")
    return r.runs("base") and {"picture": "trajectories.png"}


def figure2(r, folder):
    """The pipeline."""
    figures.pipeline(folder / "pipeline.png")
    return {"picture": "pipeline.png"}


def figure3(r, folder):
    """Curves over steps, and instability as a number."""
    bases = r.runs("base").values()
    if not bases:
        return None
    figures.over_steps(r, folder / "steps.png")
    rows = []
    for method, name in NAMES.items():
        pairs = [records.instability(base["methods"][method]["evaluations"]) for base in bases]
        rows.append([name, *(spread([pair[at] for pair in pairs], 2) for at in (0, 1))])
    return {"table": table(["sd of retain quality over the last third ↓", "as it is", "about a straight line"], rows)}


def appendix_e(r, folder):
    """The bound's figures, Eq. 4 and Eq. 27."""
    probes, bases = r.runs("probe"), r.runs("base")
    if not probes:
        return None
    figures.theory(r, folder / "theory.png")
    rule, rows, models = r.of("base", "rule"), [], []
    for family in claims.HARD_STORES:
        found = [records.bound(run, bases[seed]) for seed, run in r.runs(family).items() if seed in bases]
        shown = {"p_hard": 2, "kappa_clipped": 3, "kappa_unclipped": 3, "clipped_share": 2}
        cells = [spread([b[key] for b in found], digits) for key, digits in shown.items()]
        cells += [spread([scale(b[key], 1e-3) for b in found]) for key in ("n_on", "n_eff_clipped")]
        cells += [spread([b[f"bound_{kind}"] for b in found], 2) for kind in ("clipped", "unclipped")]
        if found:
            rows.append([LABELS[family], *cells, interval(records.paired(r.of(family), rule, "late_hard"), 2)])
    shown = (("queries", 1, 0), ("missed", 100, 1), ("false", 100, 1), ("norm", 1, 2), ("weighted", 1, 2),
             ("equal", 100, 1))  # fmt: skip
    for model in figures.PROBED:
        for region in ("easy", "hard"):
            found = [run["models"][model][region] for run in probes.values() if region in run["models"][model]]
            cells = [spread([scale(row[key], by) for row in found], digits) for key, by, digits in shown]
            models.append([model, region, *cells])
    of_bound = ["ReRULE", "p_H", "κ, clipped", "κ, unclipped", "clipped share", "N_on, 1000 tokens", "N_eff",
                "√(N_on/N_eff)", "with κ unclipped", "hard prompts' reward, late, ReRULE − RULE"]  # fmt: skip
    of_models = ["Model", "region", "prompts", "forget answered, % ↓", "boundary refused, % ↓", "gradient norm",
                 "P(region) × norm", "all-equal groups, %"]  # fmt: skip
    correlation = claims.figure(records.statistic(claims.bound_correlations(r)))
    return {"bounds": table(of_bound, rows), "models": table(of_models, models), "correlation": correlation}


PARTS = (tables.controls, tables.methods, tables.table3, tables.table4, tables.table6, tables.table7, tables.table8,
         figure1, figure2, figure3, tables.worlds, tables.tofu, tables.rates, tables.weights, appendix_e)  # fmt: skip
