"""Verdicts: each rule by hand."""

import pytest

from reproduce import claims


def stat(mean, low, high):
    return {"values": [1.0] * 5 + [-1.0] * 3, "mean": mean, "low": low, "high": high, "n": 8}


def test_verdicts():
    assert claims.verdict(stat(2, 1, 3)) == "holds"
    assert claims.verdict(stat(2, -1, 3)) == "holds in direction"
    assert claims.verdict(stat(-2, -3, 1)) == "not seen"
    assert claims.verdict(stat(-2, -3, -1)) == "opposite"
    assert claims.verdict(stat(2, 1, 3), bar=1.5) == "holds in direction"
    assert claims.verdict(stat(0, 0, 0)) == "not seen" and claims.verdict(stat(0, 0, 0), -1) == "holds"


def test_the_worst_part_counts():
    good, weak = claims.Part("", stat(2, 1, 3)), claims.Part("", stat(2, -1, 3))
    assert claims.overall([good, weak]) == "holds in direction"
    assert claims.overall([good, claims.Part("", None)]) == "not run"


@pytest.mark.parametrize(
    "found, expected",
    [((0, -1, 1), "holds"), ((1, -1, 3), "holds in direction"), ((3, 1, 5), "not seen"), ((5, 3, 7), "opposite"),
     ((-5, -7, -3), "opposite")],
)  # fmt: skip
def test_no_change_has_two_sides(found, expected):
    assert claims.overall(claims.unchanged("", stat(*found))) == expected


def test_a_figure_is_one_line():
    assert claims.figure(stat(8.61, 5.2, 11.93), " points") == "+8.6 points [+5.2, +11.9], 5 up 3 down, p = 0.73"
    assert claims.figure(stat(0.123, -0.2, 0.3)) == "+0.12 [-0.20, +0.30], 5 up 3 down, p = 0.73"
    told = claims.shown(claims.Part("x", stat(0.5, -1, 1), -1))
    assert told == "x: +0.5 [-1.0, +1.0], 5 above and 0 below -1, p = 0.062"
    pair = claims.unchanged("x", stat(0.5, -1, 1), "")
    assert claims.shown(pair[0]).endswith("5 up 3 down, p = 0.73") and claims.shown(pair[1]) == ""
