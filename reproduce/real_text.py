"""What the paper tells of real text, with tiny models: Table 5, Table 2's columns on a book of our own, RWKU's attacks
by type. Cells are means over seeds ± sd.
"""

from math import log10
from statistics import fmean

from reproduce import HERE, WORDS, claims, read_json
from reproduce.statistics import paired, spread

PAPER = read_json(HERE / "paper.json")
MODELS = {name: name for name in ("Original", "Retained", "Rej. Steer")} | {"RULE": "rule", "ReRULE": "rerule"}


def table(rows):
    """Rows of a Markdown table, whose header the template has."""
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def compared(r, family, columns, paper, theirs):
    """A row for each model of a family's runs: seeds, `columns` with their digits, then the paper's `theirs`."""
    rows = []
    for title, own in models_of(r, family).items():
        ours = [spread([o[name] for o in own.values()], *look) for name, look in columns.items()]
        figures = (PAPER[paper].get(title, {}).get(name) for name in theirs)
        rows.append([title, str(len(own)), *ours, *("" if figure is None else f"{figure:g}" for figure in figures)])
    return rows


def models_of(r, family):
    """{title: {seed: outcome}} of the models that a family's runs have."""
    found = {title: r.of(family, method) for title, method in MODELS.items()}
    return {title: own for title, own in found.items() if any(o["retain_recall"] is not None for o in own.values())}


def change(r, family, column, value=lambda figure: figure):
    """ReRULE − RULE in a column, in one line; value: what of the column's figure is compared."""
    pair = [{seed: {column: value(o[column])} for seed, o in r.of(family, m).items()} for m in ("rerule", "rule")]
    return claims.figure(paired(*pair, column))


def table5(r, folder):
    """TOFU: forget quality as the geometric mean of its p-values and as log10; the retained model's own is 1."""
    theirs = ("forget_quality", "model_utility", "forget_rouge_l")
    rows = compared(r, "tofu", WORDS["tofu_columns"], "table5", theirs)
    for row, (title, own) in zip(rows, models_of(r, "tofu").items(), strict=True):
        logs = [0.0 if title == "Retained" else log10(o["forget_quality"]) for o in own.values()]
        row[2:2] = [f"{10 ** fmean(logs):.2g}", spread(logs, 1)]
    told = {"quality": change(r, "tofu", "forget_quality", log10)}
    return {"table": table(rows), **told, "utility": change(r, "tofu", "model_utility", lambda share: 100 * share)}


def book(r, folder):
    """VerbMem, KnowMem and Utility on a book of our own."""
    names = ("verbmem", "knowmem", "utility")
    rows = compared(r, "book", dict.fromkeys([*names, "forget_refusal", "retain_refusal"], []), "table2", names)
    return {"table": table(rows), **{name: change(r, "book", name) for name in names}}


def attacks_by_type(r, folder):
    """RWKU: a row for each of its columns and for each type of attack; in a cell one figure a seed."""
    runs, rows = r.runs("rwku"), []
    titles = [title for title in MODELS if title != "Retained"]
    names = {name for run in runs.values() for name in run["rows"]["Original"] if name.startswith("attack_")}
    for name in (
        *WORDS["rwku_columns"],
        *sorted(name for name in names if "lingual_" not in name),
    ):  # all languages together
        found = [[run["rows"][title].get(name) for run in runs.values()] for title in titles]
        theirs = [PAPER["table1"][title].get(name) for title in titles]
        cells = [" · ".join("–" if x is None else f"{x:.1f}" for x in figures) for figures in found]
        label = WORDS["rwku_columns"].get(name) or name.removeprefix("attack_").replace("_", " ") + " ↓"
        rows.append([label, *cells, *("" if x is None else f"{x:g}" for x in theirs)])
    return {"table": table(rows), "seeds": ", ".join(map(str, runs))}
