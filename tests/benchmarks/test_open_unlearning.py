"""open-unlearning's TOFU_EVAL.json: written, read back with the same scores, and read as its own code writes it."""

import math

import pytest
from made import command, make_tofu, write

import evaluate
from config import InputError
from engine.flags import parse

METRICS = {"forget_quality", "model_utility", "forget_truth_ratio", "retain_Truth_Ratio", "ra_Truth_Ratio",
           "wf_Truth_Ratio", "ra_Q_A_Prob_normalised", "wf_Q_A_Prob_normalised"}  # fmt: skip
METRICS |= {f"{s}_Q_A_{m}" for s in ("forget", "retain", "ra", "wf") for m in ("Prob", "PERT_Prob", "ROUGE")}
METRICS |= {"forget_Q_A_PARA_Prob", "retain_Q_A_PARA_Prob"}
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


def test_written_and_read_back(saved, tmp_path):
    make_tofu(tmp_path / "data")
    of = [*TOFU, "--data_dir", tmp_path / "data", "--model", saved / "good"]
    ours = command(*of, "--output", tmp_path / "ours.json")
    log = ["--retain_log", tmp_path / "ours.json"]
    ours = command(*TOFU, "--from_log", tmp_path / "ours.json", *log, "--output", tmp_path / "again.json")["summary"]
    stored = command(*TOFU, "--from_log", tmp_path / "ours.json", *log, "--output", tmp_path / "TOFU_EVAL.json")
    assert set(stored) == METRICS and stored["forget_quality"]["agg_value"] == ours["forget_quality"] == 1.0
    assert stored["model_utility"]["agg_value"] == ours["model_utility"]
    rows = stored["forget_Q_A_PERT_Prob"]["value_by_index"]
    assert [*rows] == [str(i) for i in range(6)] and len(rows["0"]["prob"]) == len(rows["0"]["avg_loss"])
    assert stored["forget_truth_ratio"]["value_by_index"]["0"]["score"] == pytest.approx(
        math.exp(stored["forget_Q_A_PARA_Prob"]["value_by_index"]["0"]["avg_loss"]
                 - sum(rows["0"]["avg_loss"]) / len(rows["0"]["avg_loss"])))  # fmt: skip
    theirs = ["--from_log", tmp_path / "TOFU_EVAL.json", "--retain_log", tmp_path / "TOFU_EVAL.json"]
    read = command(*TOFU, *theirs, "--output", tmp_path / "read.json")["summary"]
    lost = {"truncated", "forget_refusal_named", "forget_refusal_unnamed"}
    for column, value in ours.items():
        if column not in lost and not column.startswith("forget_paraphrased"):
            assert read[column] == value, column


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


def test_the_name_is_of_tofu_alone(tmp_path):
    output = ["--output", str(tmp_path / "TOFU_EVAL.json"), "--benchmark", "rwku", "--from_log", "x.json"]
    with pytest.raises(InputError, match="TOFU_EVAL.json: is the name of a log of --benchmark tofu"):
        evaluate.main(parse(evaluate.Options, output))
