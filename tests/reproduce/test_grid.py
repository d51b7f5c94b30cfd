"""The grid of learning rates."""

import json
from statistics import mean

import pytest

from baselines import train
from config import Config, InputError
from reproduce import grid, records
from rerule import configure


def test_the_grid_takes_the_best_mean():
    good, bad = {"forget_recall": 0.0, "retain_recall": 100.0}, {"forget_recall": 50.0, "retain_recall": 50.0}
    assert records.score(good) == 100 and records.score(bad) == 50 and records.score({**good, "stopped": "why"}) == 0
    assert records.score({"forget_recall": 100.0, "retain_recall": 100.0}) == 0
    assert records.score({"forget_recall": 20.0, "retain_recall": 40.0}) == pytest.approx(2 * 80 * 40 / 120)
    o = grid.Options(method=["ga"], rates=[1e-4, 1e-3], seeds=[1, 2])
    found = grid.outcome({(s, r): {"GA": good if (s, r) == (1, 1e-4) else bad} for s in (1, 2) for r in o.rates}, o)
    assert found["ga"]["best"] == 1e-4 and found["ga"]["scores"] == {1e-4: [100, 50], 1e-3: [50, 50]}
    assert "| GA | **100, 50** | 50, 50 |" in grid.shown(found, o)


def test_every_job_is_a_command_that_the_driver_takes():
    o = grid.Options(benchmark="tofu", data_dir="DATA", method=["ga", "npo"], rates=[1e-4, 3e-3], seeds=[11, 12])
    jobs = grid.all_jobs(o, {})
    assert [job.name for job in jobs] == ["base_11", "base_12", "11_0.0001", "11_0.003", "12_0.0001", "12_0.003"]
    configs = {job.name: configure([arg.format(data_dir="DATA") for arg in job.args]) for job in jobs}
    assert all(config.data_dir == "DATA" and config.model == "tiny" for config in configs.values())
    assert configs["base_12"].method == ["rej_steer"] and configs["12_0.003"].seed == 12
    assert configs["12_0.003"].method == ["ga", "npo"] and configs["12_0.003"].baseline_lr == 3e-3
    assert {job.start for job in jobs} == {None, "base_11", "base_12"}
    with pytest.raises(InputError, match="--method gga: expected some of ga,"):
        grid.main(["--method", "gga"])


def test_the_committed_rates_are_the_grids():
    """Of its scores the best mean; a benchmark without a grid of its own takes the built-in world's."""
    for path in train.RATES.glob("rates_*.json"):
        tiny = Config(benchmark=path.stem.removeprefix("rates_"), model="tiny")
        for method, row in json.loads(path.read_text()).items():
            assert row["best"] == float(max(row["scores"], key=lambda rate: mean(row["scores"][rate])))
            assert train.learning_rate(tiny, method) == row["best"]
    tiny, builtin = (Config(benchmark=name, model="tiny") for name in ("rwku", "builtin"))
    assert train.learning_rate(tiny, "npo") == train.learning_rate(builtin, "npo")
    assert train.learning_rate(Config(benchmark="rwku", model="org/model"), "npo") == 1e-5
    assert train.learning_rate(Config(lr=3e-5, baseline_lr=1.0), "rule") == 3e-5


def test_a_partial_grid_writes_over_no_whole_one(tmp_path):
    stored = tmp_path / "rates_builtin.json"
    stored.write_text('{"ga": {"best": 1e-4}, "npo": {"best": 1e-3}}')
    with pytest.raises(InputError, match="rates_builtin.json holds methods that --method leaves out"):
        grid.main(["--method", "ga", "--results", str(tmp_path), "--runs", str(tmp_path / "runs")])
    assert json.loads(stored.read_text())["npo"] == {"best": 1e-3} and not (tmp_path / "runs").exists()
