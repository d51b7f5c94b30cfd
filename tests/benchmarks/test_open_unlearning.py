"""open-unlearning's TOFU_EVAL.json, read as its own code writes it."""

import math

import pytest
from made import command, write

from config import InputError

TOFU = ("--benchmark", "tofu")


def prob(*losses):
    return {"prob": [math.exp(-loss) for loss in losses], "avg_loss": [*losses]}


def theirs():
    """Two rows a set, as its evaluators leave them: wrong answers are lists, `ra` and `wf` have no PARA_Prob."""
    log, wrong = {}, {"0": prob(2.0, 4.0), "7": prob(2.0, 1.0)}
    for name in ("forget", "retain", "ra", "wf"):
        single = {"0": {"prob": math.exp(-1.0), "avg_loss": 1.0}, "7": {"prob": math.exp(-2.0), "avg_loss": 2.0}}
        text = {"rouge1_recall": 0.5, "rougeL_f1": 0.25, "input": "Who is Orla?", "ground_truth": "A keen baker"}
        rouge = {"0": text | {"rougeL_recall": 1.0, "generation": "A keen baker"},
                 "7": text | {"rougeL_recall": 0.0, "generation": "I don't know the answer to that."}}  # fmt: skip
        log |= {f"{name}_Q_A_Prob": {"agg_value": 0.3, "value_by_index": single},
                f"{name}_Q_A_PERT_Prob": {"agg_value": 0.1, "value_by_index": wrong},
                f"{name}_Q_A_ROUGE": {"agg_value": 0.5, "value_by_index": rouge}}  # fmt: skip
    return log | {f"{name}_Q_A_PARA_Prob": log[f"{name}_Q_A_Prob"] for name in ("forget", "retain")}


def test_their_own_log(tmp_path):
    write(tmp_path / "TOFU_EVAL.json", theirs())
    found = command(*TOFU, "--from_log", tmp_path / "TOFU_EVAL.json", "--output", tmp_path / "out.json")["summary"]
    assert found["forget_rouge_l"] == 0.5 and found["forget_refusal"] == found["retain_refusal"] == 50
    ratios = [math.exp(1 - 3), math.exp(2 - 1.5)]
    assert found["forget_truth_ratio"] == pytest.approx((ratios[0] + 1 / ratios[1]) / 2)
    assert found["retain_truth_ratio"] == found["real_authors_truth_ratio"] == pytest.approx((1 - ratios[0]) / 2)
    p = [math.exp(-a) / (math.exp(-a) + math.exp(-b) + math.exp(-c)) for a, b, c in ((1, 2, 4), (2, 2, 1))]
    assert found["world_facts_probability"] == pytest.approx(sum(p) / 2)
    only = {name: values for name, values in theirs().items() if name.startswith("forget")}
    write(tmp_path / "retained.json", only)  # a retained model's log needs no more
    more = ["--retain_log", tmp_path / "retained.json", "--output", tmp_path / "out.json"]
    assert command(*TOFU, "--from_log", tmp_path / "TOFU_EVAL.json", *more)["summary"]["forget_quality"] == 1.0


@pytest.mark.parametrize(
    ("metric", "value", "said"),
    [
        ("wf_Q_A_PERT_Prob", None, "has no 'wf_Q_A_PERT_Prob' with a 'value_by_index'"),
        ("forget_Q_A_PARA_Prob", {"agg_value": 1}, "has no 'forget_Q_A_PARA_Prob' with a 'value_by_index'"),
        ("ra_Q_A_ROUGE", {"value_by_index": {"0": 3}}, "has no 'ra_Q_A_ROUGE' with a 'value_by_index'"),
        ("forget_Q_A_Prob", {"value_by_index": {"0": {"avg_loss": "x"}}}, "for each of its rows"),
        ("forget_Q_A_Prob", {"value_by_index": {"0": {"avg_loss": None}, "7": {}}}, "is not a number"),
    ],
)
def test_a_damaged_one(metric, value, said, tmp_path):
    write(tmp_path / "TOFU_EVAL.json", theirs() | {metric: value})
    with pytest.raises(InputError, match=said):
        command(*TOFU, "--from_log", tmp_path / "TOFU_EVAL.json", "--output", tmp_path / "out.json")
