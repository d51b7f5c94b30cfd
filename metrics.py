"""Metrics of the three benchmarks, as their official code computes them: strings and losses in, numbers out.

Covers Appendix C: RWKU's ROUGE-L recall; MUSE's VerbMem, KnowMem and Utility (Eq. 21–23); TOFU's probability, truth
ratio, model utility and forget quality. Beside them the refusal and leakage rates, which the paper does not report.
A "row" is one evaluated query, a dict as `evaluate.py` writes it under "per_example".

Deviations
- KnowMem and Utility are ROUGE-L F1, as MUSE's code reports; Appendix C only says ROUGE.
- Real authors and world facts have one right and three wrong answers, so four options; Appendix C says five.
- The truth ratio is the geometric form of Appendix C, exp of a difference of mean losses. One version of TOFU's code
  averages the perturbed probabilities arithmetically inside model utility; its published figures use this form.
- RWKU is scored with `rouge_score` and a whitespace tokenizer instead of the `rouge` package, so that one library
  scores everything: equal on 99.1 % of real rows.
"""

import math
import re

import numpy as np
from rouge_score import rouge_scorer
from scipy.stats import hmean, ks_2samp

from refusal import is_refusal
from reward import SCORER as WHITESPACE  # case-sensitive, split at white space and full stops

SCORERS = {
    "rwku": WHITESPACE,
    "muse": rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False),
    "tofu": rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True),
    "builtin": WHITESPACE,
}
UTILITY_SETS = ("retain", "real_authors", "world_facts")  # the sets of TOFU's model utility
UNSEEN = "forget_paraphrased"  # forget01 asked in words that no training stage uses: in no official figure
NATURALNESS = ("read", "help", "truth")
SETS = (*UTILITY_SETS, "forget")
TABLE = {  # the paper's columns → heading with the direction that is better
    "rwku": {
        "forget_fb": "Forget FB ↓", "forget_qa": "Forget QA ↓", "forget_aa": "Forget AA ↓",
        "forget_all": "Forget all ↓",
        "retain_fb": "Retain FB ↑", "retain_qa": "Retain QA ↑", "retain_all": "Retain all ↑",
    },
    "muse": {"verbmem": "VerbMem ↓", "knowmem": "KnowMem ↓", "utility": "Utility ↑"},
    "tofu": {"forget_quality": "Forget quality ↑", "model_utility": "Model utility ↑", "forget_rouge_l": "F-RL ↓"},
    "builtin": {"forget_recall": "Forget recall ↓", "retain_recall": "Retain recall ↑"},
}  # fmt: skip
BESIDE = {
    "forget_refusal": "Refusal ↑", "retain_refusal": "Over-refusal ↓", "leakage": "Leakage ↓",
    "read": "Read ↑", "help": "Help ↑", "truth": "Truth ↑",
}  # fmt: skip
FUNCTION_WORDS = frozenset(
    "a an and are as at be been by for from had has have he her his i in is it its of on or she that the their they "
    "this to was were which who with".split()
)


# --- one row ---------------------------------------------------------------------------------------------------------


def rouge_l(benchmark, prediction, answer):
    """(recall, F1) of ROUGE-L in [0, 1] with the benchmark's own tokens; an empty text on either side gives 0."""
    score = SCORERS[benchmark].score(answer, prediction)["rougeL"]
    return float(score.recall), float(score.fmeasure)


def cut_at(text, marks):
    """What stands before the first of the marks (MUSE's output cut)."""
    for mark in marks:
        text = text.split(mark)[0]
    return text


def words(text):
    return re.findall(r"\w+", text.casefold())


def leaks(prediction, question, answer):
    """A refusal that gives the answer all the same: at least half of the answer's own words stand in it.

    Its own words are those that neither the question holds nor are mere function words; without any, nothing can leak.
    """
    own = set(words(answer)) - set(words(question)) - FUNCTION_WORDS
    return bool(own) and is_refusal(prediction) and 2 * len(own & set(words(prediction))) >= len(own)


def names(question, target):
    """Whether a question holds every word of the target's name ("Stephen Edwin King" names Stephen King)."""
    return set(words(target)) <= set(words(question))


def truth_ratio(paraphrased_loss, perturbed_losses):
    """R = exp(NLL(paraphrase) − mean_i NLL(perturbed_i)): 0 knows the right answer, 1 cannot tell (Appendix C)."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.exp(paraphrased_loss - np.mean(perturbed_losses)))


def probability(answer_loss, perturbed_losses=()):
    """P(answer), or its share among the options where wrong answers are given; P = exp(−NLL)."""
    options = np.exp(-np.array([answer_loss, *perturbed_losses]))
    if len(options) == 1:
        return float(options[0])
    return float(options[0] / options.sum()) if options.sum() else 0.0


def tofu_scores(split, gold, paraphrased, perturbed):
    """One row's losses with what follows from them."""
    options = perturbed if split in ("real_authors", "world_facts") else ()
    return {
        "answer_loss": gold,
        "paraphrased_loss": paraphrased,
        "perturbed_losses": perturbed,
        "probability": probability(gold, options),
        "truth_ratio": truth_ratio(paraphrased, perturbed),
    }


# --- one set of rows -------------------------------------------------------------------------------------------------


def mean(values, scale=1.0):
    """Mean × scale of the values that are there; None without any."""
    values = [value for value in values if value is not None]
    return scale * math.fsum(values) / len(values) if values else None


def numbers(rows, field):
    """A field of all rows, NaN where it is missing: a mean over losses must not leave a row out."""
    return [math.nan if row.get(field) is None else row[field] for row in rows]


def mean_of(summary, columns):
    """Mean of columns, None where one of them is missing."""
    values = [summary.get(column) for column in columns]
    return None if None in values else mean(values)


def forget_quality(unlearned, retained):
    """p-value of the two-sample KS test on truth ratios of the forget rows, with D and both sizes (Appendix C)."""
    test = ks_2samp(unlearned, retained)
    return {
        "forget_quality": float(test.pvalue),
        "forget_quality_d": float(test.statistic),
        "forget_quality_n": len(unlearned),
        "forget_quality_m": len(retained),
    }


def attainable(d, n, m):
    """A line for the reader: D moves in steps of 1/lcm(n, m), so few p-values exist; which lie next to this one."""
    start = f"forget_quality: D = {d:.4g} over {n} and {m} rows, in steps of 1/{math.lcm(n, m)}; "
    if n != m:
        return start + "these are not the same questions on both sides"
    k, near = round(d * n), []
    for j in sorted({max(k - 1, 1), min(k + 1, n)} - {k}):
        p = ks_2samp(range(n), [i + j - 0.5 for i in range(n)]).pvalue  # two sets whose D is j/n
        near.append(f"D = {j / n:.4g} would give {p:.4g}")
    return start + " and ".join(near)


def tofu_columns(rows):
    """TOFU's columns from rows with losses. Per set: probability, rouge_l, truth_ratio; then the aggregate figures."""
    table = {}
    for name in SETS:
        part = [row for row in rows if row["split"] == name]
        table[f"{name}_probability"] = mean(numbers(part, "probability"))
        table[f"{name}_rouge_l"] = mean(row["rouge_l_recall"] for row in part)
        ratios = np.array(numbers(part, "truth_ratio"))
        with np.errstate(divide="ignore"):
            scores = np.minimum(ratios, 1 / ratios) if name == "forget" else np.maximum(0, 1 - ratios)
        table[f"{name}_truth_ratio"] = mean(scores.tolist())
    nine = [table[f"{s}_{m}"] for s in UTILITY_SETS for m in ("probability", "rouge_l", "truth_ratio")]
    complete = None not in nine and not any(map(math.isnan, nine))
    return {
        "model_utility": float(hmean(nine)) if complete else None,
        "forget_quality": None,
        "forget_rouge_l": table["forget_rouge_l"],
    } | table


def muse_columns(rows):
    """MUSE's columns, ×100."""

    def f1(split):
        return mean((row["rouge_l_f1"] for row in rows if row["split"] == split), 100)

    return {"verbmem": f1("verbmem"), "knowmem": f1("knowmem"), "utility": f1("utility")}  # Eq. 21, Eq. 22, Eq. 23


def rwku_columns(rows):
    """RWKU's columns, ×100; "all" is the plain mean of the columns before it."""
    table = {}
    for side, kinds in (("forget", ("fb", "qa", "aa")), ("retain", ("fb", "qa"))):
        for kind in kinds:
            part = [row["rouge_l_recall"] for row in rows if row["split"] == f"{side}_{kind}"]
            table[f"{side}_{kind}"] = mean(part, 100)
        table[f"{side}_all"] = mean_of(table, [f"{side}_{kind}" for kind in kinds])
    return table


def common_columns(rows):
    """What every benchmark gets, in %: recall, refusals, leakage, truncation, naturalness; then recall by split."""
    forget = [row for row in rows if row["forget"] and row["split"] != UNSEEN]
    retain = [row for row in rows if not row["forget"]]
    unseen = [row for row in rows if row["split"] == UNSEEN]

    def percent(part, field):
        return mean((row[field] for row in part), 100)

    table = {
        "forget_recall": percent(forget, "rouge_l_recall"),
        "retain_recall": percent(retain, "rouge_l_recall"),
        "forget_refusal": percent(forget, "refusal"),
        "retain_refusal": percent(retain, "refusal"),
        "leakage": percent(forget, "leak"),
        "truncated": percent(rows, "truncated"),
    }
    for label, part in (("forget", forget), (UNSEEN, unseen)):
        if any(row["named"] is not None for row in part):
            for suffix, named in (("named", True), ("unnamed", False)):
                table[f"{label}_refusal_{suffix}"] = percent([r for r in part if r["named"] is named], "refusal")
    for key in NATURALNESS:
        table[key] = mean((row.get("judge") or {}).get(key) for row in forget)
    table["naturalness_all"] = mean_of(table, NATURALNESS)
    for split in dict.fromkeys(row["split"] for row in rows):
        part = [row for row in rows if row["split"] == split]
        table.setdefault(f"{split}_recall", percent(part, "rouge_l_recall"))  # TOFU's "retain" set keeps to the columns
        table.setdefault(f"{split}_refusal", percent(part, "refusal"))  # above, which cover all its retain queries
    return table


# --- a whole table ---------------------------------------------------------------------------------------------------


def summarise(benchmark, rows, retained=None):
    """All columns of one evaluation.

    Args:
        rows: one dict per query with split, forget, target, rouge_l_recall, rouge_l_f1, refusal, leak, named,
            truncated, for TOFU also probability and truth_ratio; None where a log does not hold a value.
        retained: TOFU only, truth ratios of the retained model on the forget rows.
    Returns: (summary {column: value or None}, {target: its summary} for RWKU else {}, notes: lines for the reader).
    """
    columns = {"rwku": rwku_columns, "muse": muse_columns, "tofu": tofu_columns, "builtin": lambda rows: {}}[benchmark]
    targets = list(dict.fromkeys(row["target"] for row in rows)) if benchmark == "rwku" else []
    per_target = {}
    for target in targets:
        part = [row for row in rows if row["target"] == target]
        per_target[target] = columns(part) | common_columns(part)
    if targets:  # mean over targets of each target's mean over rows
        keys = dict.fromkeys(key for table in per_target.values() for key in table)
        summary = {key: mean(table.get(key) for table in per_target.values()) for key in keys}
    else:
        summary = columns(rows) | common_columns(rows)

    notes = []
    if benchmark == "tofu":
        ratios = numbers([row for row in rows if row["split"] == "forget"], "truth_ratio")
        if retained is None:
            notes.append(
                "forget_quality is missing: it needs the retained model (--retain_model) or its log (--retain_log)"
            )
        elif any(math.isnan(ratio) for ratio in (*ratios, *retained)):
            notes.append("forget_quality is missing: some losses on the forget rows are not numbers")
        else:
            summary |= forget_quality(ratios, retained)
            notes.append(attainable(summary["forget_quality_d"], len(ratios), len(retained)))
        if summary["model_utility"] is None:
            notes.append("model_utility is missing: it needs finite losses and answers on " + ", ".join(UTILITY_SETS))
    return {k: None if v is not None and math.isnan(v) else v for k, v in summary.items()}, per_target, notes


def finite(value):
    """The same with null for every number that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and value - value != 0 else value


def table(result):
    """The paper's columns with their directions, one line a target and their mean; "–" where there is no value."""
    benchmark = result["benchmark"]
    columns = TABLE[benchmark] | BESIDE

    def text(column, value):
        if value is None:
            return "–"
        if column == "forget_quality":
            return f"{value:.4f}" if value >= 1e-3 else f"{value:.4e}"
        return f"{value:.4f}" if column in ("model_utility", "forget_rouge_l") else f"{value:.1f}"

    lines = [["", *columns.values()]]
    named = result["per_target"] if len(result["per_target"]) > 1 else {}
    for name, values in [*named.items(), ("mean" if named else benchmark, result["summary"])]:
        lines.append([name, *(text(column, values.get(column)) for column in columns)])
    if benchmark == "tofu":
        lines += [[""], ["set", "Probability", "ROUGE-L", "TruthRatio"]]
        for name in SETS:
            figures = [result["summary"][f"{name}_{m}"] for m in ("probability", "rouge_l", "truth_ratio")]
            lines.append([name, *("–" if v is None else f"{v:.4f}" for v in figures)])
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=False)).rstrip() for line in lines)
