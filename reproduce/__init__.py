"""The paper in miniature: a plan of runs, their records, claims with verdicts, tables, figures and a report."""

import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # each of several runs at a time has one core
HERE = Path(__file__).parent


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def table(rows, head=""):
    """Markdown of a table's rows, under the line of its titles unless a template has that."""
    lines = [head, f"|---|{'---:|' * (head.count('|') - 2)}"] if head else []
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def made(records):
    """What a report is made of."""
    commits, seeds = ({record[key] for record in records.values()} for key in ("commit", "seed"))
    hours = sum(record["seconds"] for record in records.values()) / 3600
    ends = "–".join(map(str, sorted({min(seeds), max(seeds)})))
    told = f"seeds {ends}, {hours:.1f} hours of one CPU thread, commit {', '.join(sorted(commits))}"
    return f"{len(records)} runs, {told}"


WORDS = read_json(HERE / "words.json")  # labels of tables and figures; columns of tables with their digits and scale
