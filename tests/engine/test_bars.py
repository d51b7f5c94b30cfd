"""Live lines on a terminal, whole lines in a file."""

import io
import sys

import pytest

from engine import bars
from engine.bars import Bar


class Stream(io.StringIO):
    def __init__(self, is_terminal):
        super().__init__()
        self.isatty = lambda: is_terminal


@pytest.fixture
def shown(monkeypatch):
    """shown(is_terminal, seconds a step, steps, **how) → what a bar over these steps writes to stderr."""

    def show(is_terminal, pace, steps=40, stop=None, **how):
        stream, now = Stream(is_terminal), [0.0]
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
        monkeypatch.delenv("TQDM_DISABLE", raising=False)
        bar = Bar(range(steps), desc="rule", mininterval=0, miniters=1, **how)
        for step in bar:
            if step == stop:
                break
            now[0] += pace
            bar.set_postfix(reward=step)
        bar.close()
        return stream.getvalue()

    return show


def test_a_file_gets_whole_lines_at_the_start_each_quarter_and_the_end(shown):
    text = shown(False, 5.0)
    assert "\r" not in text and text.endswith("\n")
    assert [line.split(",")[0] for line in text.splitlines()] == [f"rule: {n} of 40" for n in (0, 10, 20, 30, 40)]
    assert "to go" in text and text.splitlines()[-1].endswith("reward=39")


def test_a_short_phase_leaves_its_start_and_end_alone(shown):
    assert [line.split(",")[0] for line in shown(False, 0.1).splitlines()] == ["rule: 0 of 40", "rule: 40 of 40"]
    assert shown(False, 5.0, leave=False).count("\n") == 1
    assert shown(False, 5.0, stop=7).splitlines()[-1].startswith("rule: 7 of 40")
    assert shown(False, 5.0, disable=True) == ""


def test_a_terminal_keeps_its_live_line(shown):
    text = shown(True, 5.0)
    assert text.count("\r") > 3 and text.count("\n") == 1 and "40/40" in text
