"""What an attack is made on: one model, the benchmark's probes, and how the model answers them before any attack.

Deviations
- A figure is the mean over the forget probes of all targets, where RWKU's own columns are means over targets.
- TOFU's paraphrased questions, a split of their own, are answered under "prefix" and left out of all others."""

import math
from dataclasses import dataclass, field
from functools import cached_property

from benchmarks import metrics
from benchmarks.answers import gold_answer, greedy, inference, limits_of, pair_rows
from benchmarks.fits import check_ids
from benchmarks.metrics import UNSEEN, mean
from data import encode_answer, encode_prompt


@dataclass
class Case:
    """One checkpoint under attack. `notes` collects what a reader of the figures must know."""

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
    progress: bool = True

    def __post_init__(self):
        """Raises InputError where a text is too long for the model, before anything is computed."""
        self.notes = [self.note] * bool(self.note)
        prompts = [encode_prompt(self.tokenizer, probe.prompt) for probe in self.probes]
        check_ids(self.model, self.tokenizer, prompts, limits_of(self.benchmark, self.probes, prompts))
        rows, _ = self.encoded([(p.prompt, answer) for p in self.probes for answer in (p.answer, *p.perturbed)])
        check_ids(self.model, self.tokenizer, rows, [0] * len(rows))

    @property
    def forget(self):
        return [probe for probe in self.probes if probe.forget and probe.split != UNSEEN]

    @property
    def retain(self):
        return [probe for probe in self.probes if not probe.forget]

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
            texts = greedy(self.engine, model, self.tokenizer, prompts, limits, newline, self.batch_size, self.progress)
        rows = zip(probes, limits, texts, strict=True)
        return [metrics.score(self.benchmark, probe, self.gold(probe, n), text) for probe, n, (text, _) in rows]

    def gold(self, probe, limit):
        return gold_answer(self.tokenizer, self.benchmark, probe, limit)

    def encoded(self, pairs):
        """(token ids, where what is scored starts) of each (Prompt, answer), as the benchmark puts both together; of
        (None, text) the whole text but its first token."""
        if self.benchmark.losses and all(prompt for prompt, _ in pairs):
            return pair_rows(self.tokenizer, pairs)
        rows, starts = [], []
        for prompt, text in pairs:
            start = encode_prompt(self.tokenizer, prompt) if prompt else []
            answer = encode_answer(self.tokenizer, prompt, text) if prompt else self.tokenizer(text).input_ids
            rows.append(start + answer)
            starts.append(len(start) or 1)
        return rows, starts


def recall(rows):
    """Mean ROUGE-L recall in %."""
    return mean((row["rouge_l_recall"] for row in rows), 100)
