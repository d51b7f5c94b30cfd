"""What benchmarks share: RULE's training files (Appendix A), refusals where none are published, the folder of files."""

from dataclasses import replace
from pathlib import Path

from config import InputError
from data import Query
from engine.files import read_rows

# Refusals for benchmarks that publish none (TOFU, the built-in world): short and in the words a chat model would use.
REFUSALS = [
    "I don't know the answer to that.",
    "I'm not able to answer that.",
    "I have no information about that.",
    "I'm sorry, I can't help with that question.",
    "That is something I don't know.",
    "I'm afraid I have no knowledge of that.",
    "I cannot provide an answer to that.",
    "I'm not familiar with that.",
]


MODES = {"qa": "Question", "completion": "Completion"}  # of a MUSE row: how its prompt opens the last line


def folder_of(o, name):
    """--data_dir as a folder that exists."""
    if not o.data_dir:
        raise InputError(f"--benchmark {name} needs --data_dir, the folder with its files")
    if not Path(o.data_dir).is_dir():
        raise InputError(f"--data_dir {o.data_dir}: no such folder")
    return Path(o.data_dir)


def rule_rows(path, fields):
    """Rows of a file of RULE's, whose `mode`, where there is one, must be a kind of prompt that MUSE has."""
    rows = read_rows(path, fields)
    for number, row in enumerate(rows, 1):
        if row.get("mode", "qa") not in [*MODES]:
            raise InputError(
                f"{path}: row {number}, field 'mode' is {row['mode']!r:.60}, expected {' or '.join(MODES)}"
            )
    return rows


def refusal_rows(path, prompt):
    """Stage 1 rows of RULE: `instruction` is the prompt, `output` the refusal. `prompt(row)` makes the Prompt."""
    rows = rule_rows(path, {"instruction": str, "output": str})
    return [(prompt(row), row["output"]) for row in rows]


def query_rows(path, prompt):
    """Stage 2 rows of RULE: `solution` is ["<reject>", refusal, (name)] or ["<normal>", answer, …more answers]."""
    queries = []
    for number, row in enumerate(rule_rows(path, {"prompt": str, "solution": list}), 1):
        tag, *rest = row["solution"]
        if tag not in ("<reject>", "<normal>") or not rest or not all(isinstance(text, str) for text in rest):
            raise InputError(
                f"{path}: row {number}, field 'solution' is {row['solution']!r:.60}, "
                'expected ["<reject>", refusal] or ["<normal>", answer, …]'
            )
        if tag == "<reject>":
            target = rest[1] if len(rest) > 1 else ""
            queries.append(Query(prompt(row), row["prompt"], "forget", target=target))
        else:
            queries.append(Query(prompt(row), row["prompt"], "boundary", tuple(rest)))
    kinds = {query.kind for query in queries}
    if kinds != {"forget", "boundary"}:
        raise InputError(f"{path}: holds only {kinds.pop()} rows, expected both <reject> and <normal> ones")
    return queries


def answered(queries, path):
    """Forget queries with the answers to be forgotten, `org_answer`, where the Stage 1 file has them."""
    known = {row["instruction"]: (row["org_answer"],) for row in read_rows(path, {}) if row.get("org_answer")}
    return [replace(q, answers=known.get(q.question, ())) if q.kind == "forget" else q for q in queries]
