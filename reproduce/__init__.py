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


WORDS = read_json(HERE / "words.json")  # labels of tables and figures; columns of tables with their digits and scale
