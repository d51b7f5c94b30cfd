"""Running the plan: flags, records, a kill and a restart."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from config import InputError
from reproduce.__main__ import main

HERE = Path(__file__).resolve().parent
CHILD = f"""
import sys
sys.path[:0] = [{str(HERE.parents[1])!r}, {str(HERE)!r}]
import made_up
from reproduce import plan
from reproduce.__main__ import main
plan.all_jobs = made_up.small_plan
if __name__ == "__main__":
    main(["--output_dir", sys.argv[1], "--workers", "1", "--only", "table4", "appendix_e"])
"""


@pytest.mark.parametrize(
    "argv, line",
    [(["--only", "table9"], "--only table9: expected some of rates,"),
     (["--seeds", "1"], "--seeds, --workers: expected at least 2 seeds"),
     (["--tofu_dir", "nowhere"], "--tofu_dir nowhere: holds no forget01.json")],
)  # fmt: skip
def test_bad_flags(argv, line, tmp_path):
    with pytest.raises(InputError, match=line.split(":")[0]) as error:
        main([*argv, "--output_dir", str(tmp_path / "out")])
    assert line in str(error.value)
    assert not (tmp_path / "out").exists()


def test_bad_records(tmp_path):
    (tmp_path / "records.json").write_text('{"runs": ')
    with pytest.raises(InputError, match="records.json: cannot be read"):
        main(["--output_dir", str(tmp_path)])
    (tmp_path / "records.json").write_text(
        '{"runs": {"base_21": {"args": ["--steps", "8"], "family": "base", "seed": 21}}}'
    )
    with pytest.raises(InputError, match="holds a quick run"):
        main(["--output_dir", str(tmp_path)])


def reproduce_small(folder, script, until=None):
    """Run the small plan in a process of its own; with `until`, kill it outright once that holds."""
    script.write_text(CHILD)
    process = subprocess.Popen([sys.executable, script, folder], stderr=subprocess.PIPE, text=True)
    while until and process.poll() is None and not until():
        time.sleep(0.02)
    if until:
        assert process.poll() is None, process.communicate()[1]
        os.kill(process.pid, signal.SIGKILL)
    error = process.communicate(timeout=120)[1]
    assert until or process.returncode == 0, error


def figures_of(folder):
    """Records without times and dates."""
    runs = json.loads((folder / "records.json").read_text())["runs"]
    return without_times(runs)


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not k.startswith(("seconds", "time", "date"))}
    return value


def test_killed_and_started_again_it_goes_on(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    reproduce_small(whole, tmp_path / "child.py")
    assert sorted(p.name for p in (whole / "runs" / "base_21").iterdir()) == [
        "config.json", "metrics.jsonl", "record.json", "samples.jsonl", "table.json"]  # fmt: skip

    reproduce_small(parts, tmp_path / "child.py", until=lambda: (parts / "runs" / "base_21" / "rule").exists())
    assert not (parts / "records.json").exists()
    time.sleep(1.5)  # a worker whose parent is gone ends
    reproduce_small(parts, tmp_path / "child.py")
    assert figures_of(parts) == figures_of(whole)

    before = {p.name: p.read_bytes() for p in parts.iterdir() if p.is_file()}
    reproduce_small(parts, tmp_path / "child.py")
    assert {p.name: p.read_bytes() for p in parts.iterdir() if p.is_file()} == before
