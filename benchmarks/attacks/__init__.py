"""Attacks on a checkpoint: is what it does not say gone, or hidden?

The paper reports greedy answers alone. Each attack is a function `(case) → (columns, rows)` in `kinds.py`, its formulas
in `measures.py`. The checkpoint is never written to, and the model in memory is changed in copies only.

Deviations
- A figure is the mean over the forget probes of all targets, where RWKU's own columns are means over targets.
- TOFU's paraphrased questions, a split of their own, are answered under "prefix" and left out of all others."""

import math
from dataclasses import dataclass, field
from functools import cached_property

from benchmarks import metrics
from benchmarks.answers import greedy, inference, limits_of, pair_rows
from benchmarks.attacks.kinds import extract, leak, membership, prefix, quantize, relearn
from benchmarks.shared import check_ids
from config import InputError
from data import encode_answer, encode_prompt
from engine.files import write_json

ATTACKS = {attack.__name__: attack for attack in (leak, extract, membership, prefix, quantize, relearn)}
TITLES = metrics.HEADINGS["attacks"]  # of the columns shown in tables; JSON has more


@dataclass
class Case:
    """What an attack is made on: one checkpoint, with the benchmark's probes. `notes` is for readers of the figures."""

    engine: object
    model: object
    tokenizer: object
    benchmark: object
    probes: list
    texts: dict = field(default_factory=dict)  # {side: [(Prompt or None, text)]}, from the benchmark's `membership`
    note: str = ""  # on these texts
    samples: int = 64
    batch_size: int = 32
    relearn_lr: float | None = None
    seed: int = 0
    retained: dict = field(default_factory=dict)  # columns of a model that never saw the forget set, where there is one
    rows: list | None = None  # of the ordinary evaluation of the same probes

    def __post_init__(self):
        """Raises InputError where a text is too long for the model, before anything is computed."""
        self.notes = [self.note] * bool(self.note)
        prompts = [encode_prompt(self.tokenizer, probe.prompt) for probe in self.probes]
        check_ids(self.model, self.tokenizer, prompts, limits_of(self.benchmark, self.probes, prompts))
        rows, _ = self.encoded([(p.prompt, answer) for p in self.probes for answer in (p.answer, *p.perturbed)])
        check_ids(self.model, self.tokenizer, rows, [0] * len(rows))

    forget = property(lambda self: [p for p in self.probes if p.forget and p.split != metrics.UNSEEN])
    retain = property(lambda self: [p for p in self.probes if not p.forget])

    @cached_property
    def before(self):
        """Rows of the greedy answers of the model as it is."""
        return self.rows or self.answered(self.model, self.probes)

    def answered(self, model, probes, openings=None):
        """Scored rows of greedy answers. openings: the prompts, with words put in the model's mouth."""
        prompts = [encode_prompt(self.tokenizer, probe.prompt) for probe in probes]
        limits = limits_of(self.benchmark, probes, prompts)
        if openings:
            prompts = [encode_prompt(self.tokenizer, prompt) for prompt in openings]
            context = getattr(model.config, "max_position_embeddings", None) or math.inf
            limits = [max(1, min(n, context - len(ids))) for n, ids in zip(limits, prompts, strict=True)]
        with inference(model), self.engine.held(model):
            newline = self.benchmark.newline_ends
            texts = greedy(self.engine, model, self.tokenizer, prompts, limits, newline, self.batch_size)
        rows = zip(probes, texts, limits, strict=True)
        return [metrics.score(self.benchmark, probe, text, self.tokenizer, limit) for probe, (text, _), limit in rows]

    def encoded(self, pairs):
        """(token ids, where what is scored starts) of each (Prompt, answer); of (None, text) all but one token."""
        if self.benchmark.losses and all(prompt for prompt, _ in pairs):
            return pair_rows(self.tokenizer, pairs)
        rows, starts = [], []
        for prompt, text in pairs:
            start = encode_prompt(self.tokenizer, prompt) if prompt else []
            answer = encode_answer(self.tokenizer, prompt, text) if prompt else self.tokenizer(text).input_ids
            rows.append(start + answer)
            starts.append(len(start) or 1)
        return rows, starts


def prepare(names, benchmark, o, probes):
    """(texts, note) of `membership`. Raises InputError for an attack that the benchmark or its files cannot have."""
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
    case = Case(run.engine, model, tokenizer, benchmark, probes, *texts, batch_size=config.eval_batch_size,
                seed=config.seed, retained=run.rows().get("retained", {}), rows=result["per_example"])  # fmt: skip
    columns, notes, rows = attack(config.attack, case)
    (run.folder / "attacks").mkdir(exist_ok=True)
    write_json(run.folder / "attacks" / f"{phase}.json", {"summary": columns, "notes": notes, "rows": rows})
    return result | {"summary": result["summary"] | columns, "notes": result["notes"] + notes}


def titles(names, models):
    """{column: heading} for a table of {model: its columns}: the attacks' own, then one a type of question."""
    found = {column: title for name in ATTACKS if name in names for column, title in TITLES[name].items()}
    kinds = dict.fromkeys(c for own in models.values() for c in own if c.startswith("attack_") and "prefix" in names)
    return found | {c: f"Recall, {c.removeprefix('attack_').replace('_', ' ')} ↓" for c in kinds}


def run_columns(benchmark, names, models):
    """{column: heading} of a run's table, the attacks' after the benchmark's own."""
    return (benchmark.row_columns or benchmark.columns | metrics.BESIDE | metrics.NAMED) | titles(names, models)


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
