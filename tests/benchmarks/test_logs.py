"""Damaged logs of earlier evaluations."""

import pytest
from made import write

from benchmarks import tofu
from benchmarks.logs import read_log
from config import InputError


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"per_example": 3}, "is not a list of objects"),
        ({"per_example": ["x"]}, "is not a list of objects"),
        ({"answer_loss": "low"}, "row 1 holds a loss that is not a number"),
        ({"perturbed_losses": 2.0}, "row 1 holds a loss that is not a number"),
        ({"perturbed_losses": []}, "row 1 holds a loss that is not a number"),
    ],
)
def test_a_damaged_log_is_told_in_one_line(change, said, tmp_path):
    row = dict.fromkeys(("target", "rouge_l_recall", "rouge_l_f1", "refusal", "leak", "named", "truncated"))
    row |= {"split": "forget", "forget": True, "answer_loss": 1.0, "paraphrased_loss": 1.0, "perturbed_losses": [2.0]}
    log = {"benchmark": "tofu", "per_example": [row | change]}
    write(tmp_path / "log.json", log | change if "per_example" in change else log)
    with pytest.raises(InputError, match=said) as error:
        read_log(tmp_path / "log.json", tofu.BENCHMARK)
    assert "\n" not in str(error.value)
