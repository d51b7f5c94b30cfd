"""Metrics that benchmarks share, as their official code computes them: strings and losses in, numbers out.

Covers Appendix C; what only one benchmark has is in its own module. Beside them the refusal and leakage rates, which
the paper does not report. A "row" is one evaluated query, a dict as `evaluate.py` writes it under "per_example"."""

import json
import math
import re
from pathlib import Path

from engine.files import printable
from refusal import is_refusal

UNSEEN = "forget_paraphrased"  # forget prompts in words that no training stage uses: in no official figure
NATURALNESS = ("read", "help", "truth")
HEADINGS = json.loads(Path(__file__).with_name("headings.json").read_text(encoding="utf-8"))  # {column: heading}
BESIDE, NAMED = HEADINGS["of every benchmark"], HEADINGS["more of a run"]
FUNCTION_WORDS = frozenset(
    "a an and are as at be been by for from had has have he her his i in is it its of on or she that the their they "
    "this to was were which who with".split()
)


def rouge_l(scorer, prediction, answer):
    """(recall, F1) of ROUGE-L in [0, 1] with a benchmark's own scorer; an empty text on either side gives 0."""
    score = scorer.score(answer, prediction)["rougeL"]
    return float(score.recall), float(score.fmeasure)


def words(text):
    return re.findall(r"\w+", text.casefold())


def leaks(prediction, question, answer):
    """A refusal that gives the answer all the same: at least half of the answer's own words stand in it. Its own words
    are those that neither the question holds nor are mere function words; without any, nothing can leak."""
    own = set(words(answer)) - set(words(question)) - FUNCTION_WORDS
    return bool(own) and is_refusal(prediction) and 2 * len(own & set(words(prediction))) >= len(own)


def names(question, target):
    """Whether a question holds every word of the target's name ("Stephen Edwin King" names Stephen King)."""
    return set(words(target)) <= set(words(question))


def score(benchmark, probe, text, tokenizer, limit):
    """One row of "per_example" from the text a model wrote; a true answer that goes on is cut after `limit` tokens."""
    text, answer = benchmark.cut(probe.split, text).strip(), probe.answer
    if probe.split in benchmark.continued:
        answer = tokenizer.decode(tokenizer(answer).input_ids[:limit], skip_special_tokens=True)
    recall, f1 = rouge_l(benchmark.scorer, text, answer)
    return {"split": probe.split, "target": probe.target, "type": probe.type, "forget": probe.forget,
            "question": probe.question, "answer": answer, "prediction": text,
            "rouge_l_recall": recall, "rouge_l_f1": f1, "refusal": is_refusal(text),
            "leak": leaks(text, probe.question, answer),
            "named": names(probe.question, probe.target) if probe.forget and probe.target else None}  # fmt: skip


def mean(values, scale=1.0):
    """Mean × scale of the values that are there; None without any."""
    values = [value for value in values if value is not None]
    return scale * math.fsum(values) / len(values) if values else None


def mean_of(summary, columns):
    """Mean of columns, None where one of them is missing."""
    values = [summary.get(column) for column in columns]
    return None if None in values else mean(values)


def common_columns(rows):
    """What every benchmark gets, in %: recall, refusals, leakage, truncation, naturalness; then recall by split."""
    forget = [row for row in rows if row["forget"] and row["split"] != UNSEEN]
    retain = [row for row in rows if not row["forget"]]
    unseen = [row for row in rows if row["split"] == UNSEEN]

    def percent(part, field):
        return mean((row[field] for row in part), 100)

    fields, sides = {"recall": "rouge_l_recall", "refusal": "refusal"}, {"forget": forget, "retain": retain}
    table = {f"{side}_{name}": percent(sides[side], field) for name, field in fields.items() for side in sides}
    table |= {"leakage": percent(forget, "leak"), "truncated": percent(rows, "truncated")}
    for label, part in (("forget", forget), (UNSEEN, unseen)):
        if any(row["named"] is not None for row in part):
            for suffix, named in (("named", True), ("unnamed", False)):
                table[f"{label}_refusal_{suffix}"] = percent([r for r in part if r["named"] is named], "refusal")
    table |= {key: mean((row.get("judge") or {}).get(key) for row in forget) for key in NATURALNESS}
    table["naturalness_all"] = mean_of(table, NATURALNESS)
    for split in dict.fromkeys(row["split"] for row in rows):
        part = [row for row in rows if row["split"] == split]
        table.setdefault(f"{split}_recall", percent(part, "rouge_l_recall"))  # TOFU's "retain" set keeps to the columns
        table.setdefault(f"{split}_refusal", percent(part, "refusal"))  # above, which cover all its retain queries
    return table


def summarise(benchmark, rows, retained=None):
    """All columns of one evaluation. rows: those of `score` with `truncated` and what the benchmark's losses add, None
    where a log does not hold a value; retained: truth ratios of the retained model on the forget rows, where compared.
    Returns: (summary {column: value or None}, {target: its summary} where it is by target, notes for the reader)."""
    notes, per_target = [], {}
    for target in dict.fromkeys(row["target"] for row in rows) if benchmark.by_target else []:
        part = [row for row in rows if row["target"] == target]
        per_target[target] = benchmark.summarise(part, retained)[0] | common_columns(part)
    if per_target:  # mean over targets of each target's mean over rows
        keys = dict.fromkeys(key for table in per_target.values() for key in table)
        summary = {key: mean(table.get(key) for table in per_target.values()) for key in keys}
    else:
        columns, notes = benchmark.summarise(rows, retained)
        summary = columns | common_columns(rows)
    return {k: None if v is not None and math.isnan(v) else v for k, v in summary.items()}, per_target, notes


def finite(value):
    """The same with null for every number that JSON cannot hold."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def table(benchmark, result):
    """The paper's columns with their directions, one line a target and their mean; "–" where there is no value."""
    columns = benchmark.columns | BESIDE

    def text(column, value):
        digits = 4 if column in ("forget_quality", "model_utility", "forget_rouge_l") else 1
        kind = "e" if column == "forget_quality" and (value or 0) < 1e-3 else "f"
        return "–" if value is None else f"{value:.{digits}{kind}}"

    lines = [["", *columns.values()]]
    named = result["per_target"] if len(result["per_target"]) > 1 else {}
    for name, values in [*named.items(), ("mean" if named else benchmark.name, result["summary"])]:
        lines.append([printable(name), *(text(column, values.get(column)) for column in columns)])
    lines += benchmark.more_lines(result["summary"])
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=False)).rstrip() for line in lines)
