"""TOFU forget01: its files, prompts, losses, model utility and forget quality, and logs in its own form.

Covers Section 4's TOFU and Appendix C's probability, truth ratio, model utility and forget quality.

Deviations
- TOFU's completion-style forget prompts (Appendix A.1) and its boundary queries were never published. `build_data`
  makes both; without it they are the questions, and as many retain rows of no evaluation set, drawn by seed.
- The forget rows' paraphrased questions are a split of their own: the only wording that no training stage has seen.
- Real authors and world facts have one right and three wrong answers, so four options; Appendix C says five.
- The truth ratio is the geometric form of Appendix C, exp of a difference of mean losses. One version of TOFU's code
  averages the perturbed probabilities arithmetically inside model utility; its published figures use this form.
- Its limit of 200 tokens, prompt and answer together, is applied to each row; the official code applies it to the
  padded batch, so there an answer depends on its neighbours. Losses are not cut at 200 tokens; no row is longer."""

import math
import random
import re
from collections import Counter

import numpy as np
from rouge_score import rouge_scorer

from benchmarks.metrics import UNSEEN, finite, leaks, mean, names
from benchmarks.shared import PRESET, REFUSALS, TINY, folder_of, rule_training
from config import InputError
from data import Benchmark, Probe, Prompt, Query, Training
from engine.files import is_number, read_rows
from engine.seeds import derive_seed
from refusal import is_refusal

UTILITY_SETS = ("retain", "real_authors", "world_facts")  # the sets of model utility
SETS = (*UTILITY_SETS, "forget")
AUTHORS = 10  # of 20 rows each, held out for membership
LOG = {  # the sets as TOFU's own log names them
    "retain": "eval_log.json", "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json", "forget": "eval_log_forget.json",
}  # fmt: skip
# The sets and columns as open-unlearning names them in TOFU_EVAL.json (locuslab/open-unlearning, src/evals).
OPEN = {"retain": "retain", "real_authors": "ra", "world_facts": "wf", "forget": "forget"}
COLUMNS = {"avg_gt_loss": "Q_A_Prob", "avg_paraphrased_loss": "Q_A_PARA_Prob", "average_perturb_loss": "Q_A_PERT_Prob",
           "rougeL_recall": "Q_A_ROUGE"}  # fmt: skip
ANSWERS = {"input": "question", "ground_truth": "answer", "generation": "prediction", "rougeL_f1": "rouge_l_f1",
           "rougeL_recall": "rouge_l_recall"}  # fmt: skip

LOSSES = {"Q_A_Prob": "answer_loss", "Q_A_PARA_Prob": "paraphrased_loss", "Q_A_PERT_Prob": "perturbed_losses"}


def inst(question):
    """TOFU's prompt: Llama-2's own form where there is no chat template."""
    return Prompt(question, f"[INST] {question} [/INST]")


def train(o):
    """TOFU forget01: `build_data`'s files if there, else refusals of our own and retain rows that are no probe's."""
    folder = folder_of(o, "tofu")
    forget = read_rows(folder / "forget01.json", {"question": str, "answer": str})
    stage1, stage2 = folder / "reject_target.json", folder / "rl_rejection_with_fb_neighbor.json"
    if stage1.exists():
        return rule_training(stage1, stage2, lambda text, row: inst(text))
    rng = random.Random(derive_seed(o.seed, "tofu"))
    evaluated = {row["question"] for row in [*forget, *read_rows(folder / "retain_perturbed.json", {"question": str})]}
    everyone = read_rows(folder / "retain99.json", {"question": str, "answer": str})
    retain = [row for row in everyone if row["question"] not in evaluated]
    if len(retain) < len(forget):
        raise InputError(f"{folder / 'retain99.json'}: fewer than {len(forget)} rows are left for boundary queries")
    asked = {"forget": forget, "boundary": rng.sample(retain, len(forget))}
    whole = {"forget": forget, "retain": everyone}
    return Training(
        [(inst(row["question"]), REFUSALS[i % len(REFUSALS)]) for i, row in enumerate(forget)],
        [Query(inst(r["question"]), r["question"], kind, (r["answer"],)) for kind, rows in asked.items() for r in rows],
        whole={side: [(inst(row["question"]), row["answer"]) for row in rows] for side, rows in whole.items()},
    )


def probes(o):
    """The four sets of model utility and forget quality, then forget01's questions in other words."""
    folder, other = folder_of(o, "tofu"), {"paraphrased_answer": str}
    base = {"question": str, "answer": str, "perturbed_answer": list}
    sets = {
        "retain": read_rows(folder / "retain_perturbed.json", base | other)[:300],
        "real_authors": read_rows(folder / "real_authors_perturbed.json", base),
        "world_facts": read_rows(folder / "world_facts_perturbed.json", base),
        "forget": read_rows(folder / "forget01_perturbed.json", base | other | {"paraphrased_question": str}),
    }
    capitalised = (set(re.findall(r"[A-Z][\w-]*(?: [A-Z][\w-]*)+", row["answer"])) for row in sets["forget"])
    found_in = Counter(name for names_of_row in capitalised for name in names_of_row)
    authors = [name for name, rows in found_in.most_common() if rows >= 15]  # TOFU asks 20 questions about each
    found, unseen = [], []
    for name, rows in sets.items():
        for row in rows:
            question, answer, forget, target = row["question"], row["answer"], name == "forget", ""
            if forget:
                target = next((author for author in authors if names(f"{question} {answer}", author)), "")
                again = row["paraphrased_question"]
                unseen.append(Probe(UNSEEN, inst(again), again, answer, True, target))
            wrong = {"paraphrased": row.get("paraphrased_answer", ""), "perturbed": tuple(row["perturbed_answer"])}
            found.append(Probe(name, inst(question), question, answer, forget, target, **wrong))
    return found + unseen


def membership(o, probes):
    """The forget rows, and holdout01.json where the folder has it; else rows about authors that neither our training
    nor the evaluation asks about. Only a tiny model has never seen those: TOFU's own full model was taught them."""
    folder, fields, note = folder_of(o, "tofu"), {"question": str, "answer": str}, ""
    if (folder / "holdout01.json").exists():
        held_out = read_rows(folder / "holdout01.json", fields)
    else:
        everyone = read_rows(folder / "retain99.json", fields)
        known = {probe.question for probe in probes} | {query.question for query in train(o).queries}
        authors = [everyone[at : at + 20] for at in range(0, len(everyone), 20)]  # TOFU asks 20 questions about each
        authors = [rows for rows in authors if not known & {row["question"] for row in rows}]
        if len(authors) < AUTHORS:
            left = f"retain99.json holds {len(authors)} authors whom neither training nor evaluation asks about"
            raise InputError(f"--attack membership: {folder} has no holdout01.json, and {left}; expected {AUTHORS}")
        some = random.Random(derive_seed(o.seed, "holdout")).sample(authors, AUTHORS)
        held_out = [row for rows in some for row in rows]
        note = "membership: the hold-out rows are of retain99.json; a model that was taught all of TOFU has seen them"
    sides = {"forget": read_rows(folder / "forget01.json", fields), "holdout": held_out}
    return {side: [(inst(row["question"]), row["answer"]) for row in rows] for side, rows in sides.items()}, note


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


def losses(split, gold, paraphrased, perturbed):
    """One row's losses with what follows from them."""
    options = perturbed if split in ("real_authors", "world_facts") else ()
    return {"answer_loss": gold, "paraphrased_loss": paraphrased, "perturbed_losses": perturbed,
            "probability": probability(gold, options), "truth_ratio": truth_ratio(paraphrased, perturbed)}  # fmt: skip


def forget_quality(unlearned, retained):
    """p-value of the two-sample KS test on truth ratios of the forget rows, with D and both sizes (Appendix C)."""
    from scipy.stats import ks_2samp  # here, for it takes most of a second to import

    test = ks_2samp(unlearned, retained)
    return {"forget_quality": float(test.pvalue), "forget_quality_d": float(test.statistic),
            "forget_quality_n": len(unlearned), "forget_quality_m": len(retained)}  # fmt: skip


def attainable(d, n, m):
    """A line for the reader: D moves in steps of 1/lcm(n, m), so few p-values exist; which lie next to this one."""
    start = f"forget_quality: D = {d:.4g} over {n} and {m} rows, in steps of 1/{math.lcm(n, m)}; "
    if n != m:
        return start + "these are not the same questions on both sides"
    from scipy.stats import ks_2samp

    k, near = round(d * n), []
    for j in sorted({max(k - 1, 1), min(k + 1, n)} - {k}):
        p = ks_2samp(range(n), [i + j - 0.5 for i in range(n)]).pvalue  # two sets whose D is j/n
        near.append(f"D = {j / n:.4g} would give {p:.4g}")
    return start + " and ".join(near)


def numbers(rows, field):
    """A field of all rows, NaN where it is missing: a mean over losses must not leave a row out."""
    return [math.nan if row.get(field) is None else row[field] for row in rows]


def summarise(rows, retained):
    """From rows with losses. Per set: probability, rouge_l, truth_ratio; then model utility and forget quality."""
    from scipy.stats import hmean

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
    utility = None if None in nine or any(map(math.isnan, nine)) else float(hmean(nine))
    table = {"model_utility": utility, "forget_quality": None, "forget_rouge_l": table["forget_rouge_l"]} | table
    notes, ratios = [], numbers([row for row in rows if row["split"] == "forget"], "truth_ratio")
    if retained is None:
        notes = ["forget_quality is missing: it needs the retained model (--retain_model) or its log (--retain_log)"]
    elif not ratios or any(math.isnan(ratio) for ratio in (*ratios, *retained)):
        notes.append("forget_quality is missing: some losses on the forget rows are not numbers")
    else:
        table |= forget_quality(ratios, retained)
        notes.append(attainable(table["forget_quality_d"], len(ratios), len(retained)))
    if table["model_utility"] is None:
        notes.append("model_utility is missing: it needs finite losses and answers on " + ", ".join(UTILITY_SETS))
    return table, notes


def more_lines(summary):
    """What is printed below the table: each set's three figures."""
    lines = [[""], ["set", "Probability", "ROUGE-L", "TruthRatio"]]
    for name in SETS:
        figures = [summary[f"{name}_{m}"] for m in ("probability", "rouge_l", "truth_ratio")]
        lines.append([name, *("–" if v is None else f"{v:.4f}" for v in figures)])
    return lines


def own_log(path, log, sets):
    """TOFU's `eval_log_aggregated.json` or open-unlearning's log → rows, None for others. sets: that it must hold."""
    if any(f"{name}_Q_A_Prob" in log for name in OPEN.values()):
        log = from_open_unlearning(path, log, sets or OPEN)
    if not any(name in log for name in LOG.values()):
        return None
    rows = []
    for split in sets or LOG:
        part = log.get(LOG[split])
        if not isinstance(part, dict):
            raise InputError(f"{path}: has no set '{LOG[split]}'")
        names = [*COLUMNS]
        for name in names:
            if not isinstance(part.get(name), dict) or part[name].keys() != part[names[0]].keys() or not part[name]:
                raise InputError(f"{path}: '{LOG[split]}' has no '{name}' for each of its rows")
        for index in part[names[0]]:
            gold, paraphrased, perturbed, recall = (part[name][index] for name in names)
            listed = isinstance(perturbed, list) and perturbed
            if not listed or not all(map(is_number, (gold, paraphrased, recall, *perturbed))) or not 0 <= recall <= 1:
                raise InputError(f"{path}: '{LOG[split]}' row {index} holds something that is not a number")
            row = dict.fromkeys(("rouge_l_f1", "prediction", "refusal", "leak", "named", "truncated"))
            row |= {"split": split, "target": "", "forget": split == "forget", "row": index, "rouge_l_recall": recall}
            row |= part.get("answers", {}).get(index, {})
            rows.append(row | losses(split, gold, paraphrased, perturbed))
    return rows


def from_open_unlearning(path, log, sets):
    """open-unlearning's log in the form of TOFU's own, with its answers. Real authors and facts have no paraphrases."""
    found = {}
    for split in sets:
        part = found[LOG[split]] = {"answers": {}}
        for column, metric in COLUMNS.items():
            metric = "Q_A_Prob" if "PARA" in metric and OPEN[split] in ("ra", "wf") else metric
            stored = log.get(metric := f"{OPEN[split]}_{metric}")
            rows = stored.get("value_by_index") if isinstance(stored, dict) else None
            if not isinstance(rows, dict) or not rows or not all(isinstance(row, dict) for row in rows.values()):
                raise InputError(f"{path}: has no '{metric}' with a 'value_by_index'")
            part[column] = {i: row.get(column if column in ANSWERS else "avg_loss") for i, row in rows.items()}
        for i, row in rows.items():  # of ROUGE, the last
            if isinstance(row.get("generation"), str):
                own = {ours: row[theirs] for theirs, ours in ANSWERS.items() if theirs in row}
                question, answer, text = (str(own.get(name, "")) for name in ("question", "answer", "prediction"))
                part["answers"][i] = own | {"refusal": is_refusal(text), "leak": leaks(text, question, answer)}
    return found


def to_open_unlearning(result):
    """A result in open-unlearning's form: {metric: {"agg_value": figure, "value_by_index": {row: its figures}}}."""
    summary, log = result["summary"], {}
    for split, name in OPEN.items():
        rows = {str(i): row for i, row in enumerate(row for row in result["per_example"] if row["split"] == split)}
        for metric, field in LOSSES.items():
            if metric != "Q_A_PARA_Prob" or name not in ("ra", "wf"):
                probs = {i: np.exp(-np.array(row[field], float)) for i, row in rows.items()}
                cells = {i: {"prob": probs[i].tolist(), "avg_loss": row[field]} for i, row in rows.items()}
                average = mean(float(prob.mean()) for prob in probs.values())
                log[f"{name}_{metric}"] = {"agg_value": average, "value_by_index": cells}
        ratio = "forget_truth_ratio" if split == "forget" else f"{name}_Truth_Ratio"
        more = {f"{name}_Q_A_ROUGE": ("rouge_l", ANSWERS), ratio: ("truth_ratio", {"score": "truth_ratio"})}
        if name in ("ra", "wf"):
            more[f"{name}_Q_A_Prob_normalised"] = ("probability", {"prob": "probability"})
        for metric, (column, fields) in more.items():
            cells = {i: {theirs: row.get(ours) for theirs, ours in fields.items()} for i, row in rows.items()}
            log[metric] = {"agg_value": summary[f"{split}_{column}"], "value_by_index": cells}
    return finite(log | {name: {"agg_value": summary[name]} for name in ("forget_quality", "model_utility")})


BENCHMARK = Benchmark(
    name="tofu", hub="locuslab/TOFU",
    preset=PRESET | dict(steps=11, tau=0.6, min_groups=80, warmup_steps=6, buffer_size=400, max_new_tokens=256,
                         tiny_epochs=20.0),
    tiny=TINY | dict(lr=1e-4, max_new_tokens=96, steps=20, baseline_epochs=20.0),
    columns={"forget_quality": "Forget quality ↑", "model_utility": "Model utility ↑", "forget_rouge_l": "F-RL ↓"},
    train=train, probes=probes, membership=membership, wordings=lambda query: [inst(query.question)],
    limit=lambda split, prompt_length: max(1, 200 - prompt_length),  # prompt and answer together
    scorer=rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True), summarise=summarise, more_lines=more_lines,
    losses=losses, log_splits=SETS, own_log=own_log,
    forget_rows={40, 200, 300},  # forget01, forget05, and what TOFU reads of forget10
)  # fmt: skip
