"""Attacks on a checkpoint: is what it does not say gone, or hidden?

The paper reports greedy answers alone. Each attack is a function `(case) → (columns, rows)`; the formulas are in
`measures.py`. The checkpoint is never written to, and the model in memory is changed in copies only."""

from benchmarks import metrics
from benchmarks.attacks.case import Case
from benchmarks.attacks.likelihood import extract, membership
from benchmarks.attacks.sampling import leak, prefix
from benchmarks.attacks.weights import quantize, relearn
from config import InputError
from engine.files import write_json

ATTACKS = {attack.__name__: attack for attack in (leak, extract, membership, prefix, quantize, relearn)}
TITLES = metrics.HEADINGS["attacks"]  # of the columns shown in tables; JSON has more


def prepare(names, benchmark, o, probes):
    """What attacks need of the files: (texts, note) of `membership`. Raises InputError for an attack that is unknown
    or that the benchmark or its files cannot have."""
    for name in names:
        if name not in ATTACKS:
            raise InputError(f"--attack {name}: expected some of {', '.join(ATTACKS)}")
    if names and not any(probe.forget for probe in probes):
        raise InputError(f"--attack {names[0]}: --benchmark {benchmark.name} has no forget probes")
    if "membership" not in names:
        return {}, ""
    if not benchmark.membership:
        raise InputError(f"--attack membership: --benchmark {benchmark.name} names no texts to compare")
    return benchmark.membership(o, probes)


def attack(names, case):
    """Run some attacks, in the order of `ATTACKS`. Returns: ({column: value or None}, notes, {attack: its rows})."""
    columns, rows = {}, {}
    for name in [name for name in ATTACKS if name in names]:
        try:
            found, rows[name] = ATTACKS[name](case)
        except ValueError as error:  # of a measure: the model's numbers are none
            found, rows[name] = {}, []
            case.notes.append(f"{name} is missing: {error}")
        columns |= found
    return metrics.finite(columns), list(dict.fromkeys(case.notes)), metrics.finite(rows)


def attacked(run, phase, model, tokenizer, benchmark, probes, texts, result):
    """The evaluation of a phase of a run, with the columns of --attack; every row is in attacks/<phase>.json."""
    config = run.config
    if not config.attack:
        return result
    case = Case(
        run.engine, model, tokenizer, benchmark, probes, *texts, batch_size=config.eval_batch_size, seed=config.seed,
        retained=run.rows().get("retained", {}), rows=result["per_example"],
    )  # fmt: skip
    columns, notes, rows = attack(config.attack, case)
    (run.folder / "attacks").mkdir(exist_ok=True)
    write_json(run.folder / "attacks" / f"{phase}.json", {"summary": columns, "notes": notes, "rows": rows})
    return result | {"summary": result["summary"] | columns, "notes": result["notes"] + notes}


def titles(names, models):
    """{column: heading} for a table of {model: its columns}: the attacks' own, then one a type of question."""
    columns = dict.fromkeys(column for columns in models.values() for column in columns)
    found = {column: title for name in ATTACKS if name in names for column, title in TITLES[name].items()}
    kinds = [c for c in columns if c.startswith("attack_")] if "prefix" in names else []
    return found | {c: f"Recall, {c.removeprefix('attack_').replace('_', ' ')} ↓" for c in kinds}


def run_columns(benchmark, names, models):
    """{column: heading} of a run's table, the attacks' after the benchmark's own."""
    return metrics.run_columns(benchmark) | titles(names, models)


def table(names, models):
    """A line a column, a column a model: {title: its columns}; "–" where there is no value."""
    lines = [["", *models]]
    for column, title in titles(names, models).items():
        values = [columns.get(column) for columns in models.values()]
        if any(value is not None for value in values):
            digits = 2 if column in ("membership_auc", "extraction_strength", "exact_memorisation") else 1
            lines.append([title, *("–" if value is None else f"{value:.{digits}f}" for value in values)])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)
