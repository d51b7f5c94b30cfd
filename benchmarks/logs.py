"""Earlier evaluations, ours or in a benchmark's own form, read back as rows."""

from types import NoneType

from config import InputError
from engine.files import is_number, read_rows

TEXT, BOOL, SHARE = (str, NoneType), (bool, NoneType), (float, int, NoneType)
FIELDS = {"split": str, "target": TEXT, "forget": bool, "rouge_l_recall": SHARE, "rouge_l_f1": SHARE, "refusal": BOOL,
          "leak": BOOL, "named": BOOL, "truncated": BOOL}  # fmt: skip
LOSSES = ("answer_loss", "paraphrased_loss", "perturbed_losses")


def read_log(path, benchmark, sets=()):
    """Rows of an earlier result of ours (or of its rows alone, as JSON lines), or of a log in the benchmark's own form.
    Args: sets: the sets that a log in its own form must hold; all unless given. Returns: (rows as in "per_example",
    whether the log is in the benchmark's own form). Raises: InputError naming the file and what is missing in it."""
    stored = read_rows(path, {})
    log = stored[0]
    theirs = benchmark.own_log(path, log, sets)
    if theirs is not None:
        return theirs, True
    if "per_example" not in log and "split" not in log:
        raise InputError(f"{path}: is no result of this command{', nor a log of TOFU' if benchmark.log_splits else ''}")
    if log.get("benchmark", benchmark.name) != benchmark.name:
        raise InputError(f"{path}: holds results of {log['benchmark']}, expected {benchmark.name}")
    rows, examples = [], log.get("per_example", stored)
    if not examples or not isinstance(examples, list) or not all(isinstance(row, dict) for row in examples):
        raise InputError(f"{path}: 'per_example' is not a list of objects, one or more")
    for number, row in enumerate(examples, 1):
        scored = row.get("split") in benchmark.log_splits
        for name, kind in {**FIELDS, **dict.fromkeys(LOSSES if scored else (), object)}.items():
            if name not in row:
                raise InputError(f"{path}: per_example row {number} has no field '{name}'")
            share = row[name] is None or (is_number(row[name]) and 0 <= row[name] <= 1)
            if not isinstance(row[name], kind) or (kind == SHARE and not share):
                raise InputError(f"{path}: per_example row {number}, field '{name}' is {row[name]!r:.40}")
        if scored:  # null stands for a loss that was not a number
            wrong = row["perturbed_losses"]
            given = [row["answer_loss"], row["paraphrased_loss"], *(wrong if isinstance(wrong, list) else [])]
            if len(given) < 3 or not all(loss is None or is_number(loss) for loss in given):
                raise InputError(f"{path}: per_example row {number} holds a loss that is not a number")
            gold, paraphrased, *perturbed = (float("nan") if loss is None else loss for loss in given)
            row = row | benchmark.losses(row["split"], gold, paraphrased, perturbed)
        rows.append(row)
    return rows, False


def read_retained(path, benchmark, asked, theirs=False):
    """Truth ratios of a retained model's log on the forget rows, which must be those `asked` of the evaluated model.
    Two logs of TOFU's own may differ where each is as long as one of its forget sets: its published figure for the full
    model compares 300 rows of forget10 with 40 of forget01.
    asked: the evaluated model's probes, or the rows of its log, which is in TOFU's own form if `theirs`."""
    rows, own_form = read_log(path, benchmark, ("forget",))
    ratios = [row["truth_ratio"] for row in rows if row["split"] == "forget"]
    expected = [row["split"] if isinstance(row, dict) else row.split for row in asked].count("forget")
    published = theirs and own_form and {len(ratios), expected} <= benchmark.forget_rows
    if len(ratios) != expected and not published:
        held = f"holds {len(ratios)} forget rows, the evaluated model has {expected}"
        raise InputError(f"--retain_log {path}: {held}; forget quality compares the same questions")
    return ratios
