"""Recall of hard and of easy neighbours as one figure: over all of their probes, all six phrasings alike."""

import json
import random
from pathlib import Path

import pytest

from benchmarks import builtin, metrics
from reproduce.records import outcome

FIRST_RUN = Path(__file__).parents[2] / "results" / "first_run.json"


def test_hard_neighbours_are_the_mean_over_all_of_their_probes():
    draw, rows = random.Random(0), []
    for probe in builtin.World(0).probes():
        easier = 0.5 * probe.split.endswith("heldout")  # or every weighting would do
        fields = dict(split=probe.split, forget=probe.forget, target=probe.target, refusal=False, leak=False)
        rows.append(fields | dict(named=None, truncated=False, rouge_l_recall=easier + draw.random() / 2))
    table, *_ = metrics.summarise(builtin.BENCHMARK, rows)
    found = outcome({"rows": {"RULE": table}, "methods": {}}, "rule", None)
    for kind, people in (("hard", 22), ("easy", 20)):
        recalls = [row["rouge_l_recall"] for row in rows if row["split"].startswith(kind)]
        assert len(recalls) == people * 6 * 6 and found[kind] == pytest.approx(100 * sum(recalls) / len(recalls))
        assert found[kind] != pytest.approx((table[f"{kind}_trained_recall"] + table[f"{kind}_heldout_recall"]) / 2)


def test_the_table_of_methods_has_that_figure():
    for row in json.loads(FIRST_RUN.read_text(encoding="utf-8"))["methods"]["rows"]:
        names = [f"{kind}_{part}_recall" for kind in ("hard", "easy") for part in ("trained", "heldout")]
        run = {"rows": {"RULE": dict(zip(names, row["trained_and_held_out"], strict=True))}, "methods": {}}
        found = outcome(run, "rule", None)
        assert (found["hard"], found["easy"]) == pytest.approx((row["hard"], row["easy"]), rel=1e-4)
