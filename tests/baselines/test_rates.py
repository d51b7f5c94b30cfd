"""The baselines' learning rates: the loop that tried them, as docs/baselines.md has it, and what it chose."""

import json
import re
import subprocess
from pathlib import Path
from statistics import mean

import pytest

from baselines import METHODS, train
from config import Config
from reproduce import records
from rerule import configure

PAGE = Path(__file__).parents[2] / "docs" / "baselines.md"


def test_the_score_of_a_rate():
    good, bad = {"forget_recall": 0.0, "retain_recall": 100.0}, {"forget_recall": 50.0, "retain_recall": 50.0}
    assert records.score(good) == 100 and records.score(bad) == 50 and records.score({**good, "stopped": "why"}) == 0
    assert records.score({"forget_recall": 100.0, "retain_recall": 100.0}) == 0
    assert records.score({"forget_recall": 20.0, "retain_recall": 40.0}) == pytest.approx(2 * 80 * 40 / 120)


def test_the_loop_of_the_page_is_of_commands_that_the_driver_takes():
    loop = re.search(r"```bash\n(all=.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    told = subprocess.run(
        ["bash", "-ec", 'python() { echo "$@"; }\n' + loop], capture_output=True, text=True, check=True
    )
    first, *tried = (configure(line.split()[1:]) for line in told.stdout.splitlines()[:6])
    assert told.stdout.count("rerule.py") == 12 and first.method == ["rej_steer"] and first.seed == 11
    for config, rate in zip(tried, (3e-5, 1e-4, 3e-4, 1e-3, 3e-3), strict=True):
        assert (config.baseline_lr, config.start_from, config.seed) == (rate, first.output_dir, first.seed)
        assert set(config.method) == {*METHODS} - {"rej_steer", "rule", "rerule"}


def test_the_committed_rates_are_the_best_of_their_scores():
    """A benchmark without rates of its own takes the built-in world's."""
    for path in train.RATES.glob("rates_*.json"):
        tiny = Config(benchmark=path.stem.removeprefix("rates_"), model="tiny")
        for method, row in json.loads(path.read_text()).items():
            assert row["best"] == float(max(row["scores"], key=lambda rate: mean(row["scores"][rate])))
            assert train.learning_rate(tiny, method) == row["best"]
    tiny, builtin = (Config(benchmark=name, model="tiny") for name in ("rwku", "builtin"))
    assert train.learning_rate(tiny, "npo") == train.learning_rate(builtin, "npo")
    assert train.learning_rate(Config(benchmark="rwku", model="org/model"), "npo") == 1e-5
    assert train.learning_rate(Config(lr=3e-5, baseline_lr=1.0), "rule") == 3e-5
