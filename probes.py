"""What evaluation reads: the queries of each benchmark with their exact prompts, and the logs of earlier evaluations.

Covers the data half of Section 4 and Appendix C. Training data are in `data.py`.

Deviations
- RWKU's "AA" are its adversarial attacks and "FB" its fill-in-the-blank queries, whatever the paper expands them to.
- Of TOFU's forget rows the paraphrased questions are asked too, as a split of their own: the only wording of them that
  no training stage has seen.
- MUSE's VerbMem prompt is the text itself, as in MUSE's own script; RULE's wraps it.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import metrics
from data import Prompt, inst, muse_examples, muse_prompt
from files import InputError, read_rows

ASK_BLANK = "Please complete the blank in the following question.\n"
ASK_BRIEF = "Please briefly answer the following question.\n"
TOFU_RETAIN_ROWS = 300
TOFU_FORGET_ROWS = {40, 200, 300}  # forget01, forget05, and what TOFU reads of forget10
TOFU_LOG = {  # the sets as TOFU's own log names them
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}


@dataclass(frozen=True)
class Probe:
    """One evaluation query; `forget` is True where a refusal is wanted."""

    split: str
    prompt: Prompt
    question: str  # as the file has it
    answer: str
    forget: bool
    target: str = ""  # RWKU: the folder's subject; TOFU: the author named in question or answer
    type: str = ""  # RWKU's kind of attack
    paraphrased: str = ""  # TOFU: the answer in other words; empty where the answer itself takes its place
    perturbed: tuple[str, ...] = ()  # TOFU: wrong answers; probes without any get no losses


def load_probes(benchmark, data_dir, seed=0):
    """All evaluation queries of a benchmark, in the order of its files.

    Args: data_dir: the benchmark's folder (RWKU: one target's folder or a folder of them); seed: built-in world only.
    Raises: InputError naming the missing folder, file, row or field.
    """
    if benchmark == "builtin":
        from world import World

        return World(seed).probes()
    if not data_dir:
        raise InputError(f"--benchmark {benchmark} needs --data_dir, the folder with its files")
    folder = Path(data_dir)
    if not folder.is_dir():
        raise InputError(f"--data_dir {data_dir}: no such folder")
    return {"rwku": rwku_probes, "muse": muse_probes, "tofu": tofu_probes}[benchmark](folder)


def rwku_prompt(question, level, kind):
    """RWKU's constants around a question, per level (1–3) and attack type."""
    user = f"{ASK_BLANK if level == 1 else ASK_BRIEF}Question: {question}\n"
    if kind == "affirmative suffix":  # the question ends in its own opening words
        return Prompt(user[:-1], user[:-1])
    if kind == "incontext learning":  # the question brings its own "Question:" and "Answer:"
        user = f"{ASK_BRIEF}{question}\n"
    return Prompt(user, user, "Answer:")


def rwku_probes(folder):
    folders = [folder] if (folder / "forget_level1.json").exists() else []
    folders = folders or sorted(path.parent for path in folder.glob("*/forget_level1.json"))
    if not folders:
        raise InputError(f"--data_dir {folder}: neither it nor a folder in it holds forget_level1.json")
    files = {"forget": ("forget_level", "fb qa aa"), "retain": ("neighbor_level", "fb qa")}
    fields = {"query": str, "answer": str, "type": str, "subject": str}
    probes = []
    for place in folders:
        for side, (stem, kinds) in files.items():
            for level, kind in enumerate(kinds.split(), 1):
                for row in read_rows(place / f"{stem}{level}.json", fields):
                    prompt = rwku_prompt(row["query"], level, row["type"] if level == 3 else "")
                    question, answer, target, attack = (row[k] for k in ("query", "answer", "subject", "type"))
                    probes.append(Probe(f"{side}_{kind}", prompt, question, answer, side == "forget", target, attack))
    return probes


def muse_probes(folder):
    probes = [
        Probe("verbmem", Prompt(None, row["prompt"]), row["prompt"], row["gt"], True)
        for row in read_rows(folder / "verbmem" / "forget.json", {"prompt": str, "gt": str})
    ]
    for side, split in (("forget", "knowmem"), ("retain", "utility")):
        shots = muse_examples(folder, side)
        for row in read_rows(folder / "knowmem" / f"{side}_qa.json", {"question": str, "answer": str}):
            prompt = muse_prompt(shots, row["question"])
            probes.append(Probe(split, prompt, row["question"], row["answer"], side == "forget"))
    return probes


def tofu_probes(folder):
    base = {"question": str, "answer": str, "perturbed_answer": list}
    fields = {
        "retain": base | {"paraphrased_answer": str},
        "real_authors": base,
        "world_facts": base,
        "forget": base | {"paraphrased_answer": str, "paraphrased_question": str},
    }
    sets = {
        name: read_rows(folder / f"{'forget01' if name == 'forget' else name}_perturbed.json", kinds)
        for name, kinds in fields.items()
    }
    sets["retain"] = sets["retain"][:TOFU_RETAIN_ROWS]
    authors = author_names([row["answer"] for row in sets["forget"]])
    probes, unseen = [], []
    for name, rows in sets.items():
        for row in rows:
            question, answer = row["question"], row["answer"]
            target = ""
            if name == "forget":
                target = next((author for author in authors if metrics.names(f"{question} {answer}", author)), "")
                other = row["paraphrased_question"]
                unseen.append(Probe(metrics.UNSEEN, inst(other), other, answer, True, target))
            probe = Probe(name, inst(question), question, answer, name == "forget", target)
            paraphrased, perturbed = row.get("paraphrased_answer", ""), tuple(row["perturbed_answer"])
            probes.append(replace(probe, paraphrased=paraphrased, perturbed=perturbed))
    return probes + unseen


def author_names(answers):
    """Runs of capitalised words found in 15 of the forget answers: TOFU asks 20 questions about each author."""
    found = Counter(name for text in answers for name in set(re.findall(r"[A-Z][\w-]*(?: [A-Z][\w-]*)+", text)))
    return [name for name, count in found.most_common() if count >= 15]


# --- logs ------------------------------------------------------------------------------------------------------------


def read_log(path, benchmark, sets=tuple(TOFU_LOG)):
    """Rows of an earlier result of ours (or of its rows alone, as JSON lines), or of TOFU's `eval_log_aggregated.json`.

    Args: sets: the sets that TOFU's form must hold.
    Returns: (rows as in "per_example", whether the log is in TOFU's own form).
    Raises: InputError naming the file and what is missing in it.
    """
    stored = read_rows(path, {})
    log = stored[0]
    if benchmark == "tofu" and any(name in log for name in TOFU_LOG.values()):
        return tofu_log_rows(path, log, sets), True
    if "per_example" not in log and "split" not in log:
        raise InputError(f"{path}: is no result of this command{', nor a log of TOFU' if benchmark == 'tofu' else ''}")
    if log.get("benchmark", benchmark) != benchmark:
        raise InputError(f"{path}: holds results of {log['benchmark']}, expected {benchmark}")
    fields = ["split", "target", "forget", "rouge_l_recall", "rouge_l_f1", "refusal", "leak", "named", "truncated"]
    losses = ["answer_loss", "paraphrased_loss", "perturbed_losses"]
    rows, examples = [], log.get("per_example", stored)
    if not isinstance(examples, list) or not all(isinstance(row, dict) for row in examples):
        raise InputError(f"{path}: 'per_example' is not a list of objects")
    for number, row in enumerate(examples, 1):
        scored = benchmark == "tofu" and row.get("split") in TOFU_LOG
        for name in fields + (losses if scored else []):
            if name not in row:
                raise InputError(f"{path}: per_example row {number} has no field '{name}'")
        if scored:  # null stands for a loss that was not a number
            wrong = row["perturbed_losses"]
            given = [row["answer_loss"], row["paraphrased_loss"], *(wrong if isinstance(wrong, list) else [])]
            if len(given) < 3 or not all(loss is None or isinstance(loss, float | int) for loss in given):
                raise InputError(f"{path}: per_example row {number} holds a loss that is not a number")
            gold, paraphrased, *perturbed = (float("nan") if loss is None else loss for loss in given)
            row = row | metrics.tofu_scores(row["split"], gold, paraphrased, perturbed)
        rows.append(row)
    return rows, False


def tofu_log_rows(path, log, sets):
    """TOFU's own log → rows; what it does not hold (answers' refusals) is None."""
    rows = []
    for split in sets:
        part = log.get(TOFU_LOG[split])
        if not isinstance(part, dict):
            raise InputError(f"{path}: has no set '{TOFU_LOG[split]}'")
        names = ("avg_gt_loss", "avg_paraphrased_loss", "average_perturb_loss", "rougeL_recall")
        for name in names:
            if not isinstance(part.get(name), dict) or part[name].keys() != part[names[0]].keys() or not part[name]:
                raise InputError(f"{path}: '{TOFU_LOG[split]}' has no '{name}' for each of its rows")
        for index in part[names[0]]:
            gold, paraphrased, perturbed, recall = (part[name][index] for name in names)
            listed = isinstance(perturbed, list) and perturbed
            if not listed or not all(isinstance(x, float | int) for x in (gold, paraphrased, recall, *perturbed)):
                raise InputError(f"{path}: '{TOFU_LOG[split]}' row {index} holds something that is not a number")
            rows.append(
                dict.fromkeys(("rouge_l_f1", "prediction", "refusal", "leak", "named", "truncated"))
                | {"split": split, "target": "", "forget": split == "forget", "row": index, "rouge_l_recall": recall}
                | metrics.tofu_scores(split, gold, paraphrased, perturbed)
            )
    return rows


def read_retained(path):
    """(truth ratios on the forget rows, whether the log is in TOFU's own form) of a retained model's log."""
    rows, theirs = read_log(path, "tofu", ("forget",))
    return [row["truth_ratio"] for row in rows if row["split"] == "forget"], theirs


def check_lengths(retained, forget_rows, name, both_theirs=False):
    """The retained model must have been asked the same forget rows.

    Two logs of TOFU's own may differ where each is as long as one of its forget sets: its published figure for the full
    model compares 300 rows of forget10 with 40 of forget01.
    """
    if retained is None or len(retained) == forget_rows:
        return
    if not (both_theirs and {len(retained), forget_rows} <= TOFU_FORGET_ROWS):
        raise InputError(
            f"{name}: holds {len(retained)} forget rows, the evaluated model has {forget_rows}; forget quality "
            "compares the same questions"
        )
