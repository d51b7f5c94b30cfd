"""Statistics over seeds: numbers worked by hand, values printed in tables, and known answers."""

import math

import pytest
import scipy.stats

from reproduce import statistics as st

SKEWED = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -0.7, -0.7]


def test_t_interval_by_hand():
    # mean 3, sd √2.5, t(4) for 95 % is 2.776 in every table
    low, high, kind = st.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764 * math.sqrt(2.5) / math.sqrt(5)
    assert (low, high) == pytest.approx((3 - half, 3 + half), abs=1e-3) and kind == "t"
    low, high, _ = st.interval([0.0, 2.0])  # t(1) is 12.706; the standard error is 1
    assert (low, high) == pytest.approx((-11.706, 13.706), abs=1e-3)


def test_three_seeds_get_more_than_their_range():
    low, high, _ = st.interval([-3.9, -1.9, 0.1])
    assert low < -3.9 and high > 0.1


def test_equal_values_are_a_point_and_one_has_no_interval():
    assert st.interval([2.0] * 8) == (2, 2, "=") and st.interval([0.1 + 0.2, 0.3])[2] == "="
    assert st.statistic([1.0, None]) is None


def test_far_from_normal_needs_eight_values():
    assert st.shape(SKEWED) == "BCa" and st.shape(SKEWED[1:]) == "t"
    assert st.shape([1.0, 2.5, 0.5, 4.0, 3.0, 2.0, -1.0, 1.5]) == "t"


def test_bca_is_shifted_towards_the_long_tail_and_is_the_same_again():
    low, high, kind = st.interval(SKEWED)
    mean = sum(SKEWED) / 8
    assert kind == "BCa" and mean - low > high - mean > 0 and -0.7 < low and high <= 0
    assert st.interval(SKEWED) == (low, high, kind)


def test_p_of_t_by_hand():
    # one degree of freedom is Cauchy's: t = 1 leaves a quarter on each side
    assert st.p_value([0.0, 2.0]) == pytest.approx(0.5) and st.p_value([0.0, 2.0], sides=1) == pytest.approx(0.25)
    assert st.p_value([0.0, 2.0], bar=1) == pytest.approx(1)
    # mean 3, standard error √0.5, bar 3 − 2.776 √0.5
    bar = 3 - 2.7764451 * math.sqrt(0.5)
    assert st.p_value([1.0, 2.0, 3.0, 4.0, 5.0], bar) == pytest.approx(0.05, abs=1e-6)


def test_p_of_skewed_and_of_equal_values_by_hand():
    n, mean, sd = 8, -0.175, math.sqrt(8 / 7 * (0.75 * 0.0**2 + 0.25 * 0.7**2 - 0.175**2))
    assert SKEWED.count(0) == 6 and sum(SKEWED) / n == pytest.approx(mean)
    t = (mean + 1) / (sd / math.sqrt(n))  # BCa's interval, and still Student's t
    assert st.interval(SKEWED)[2] == "BCa" and st.p_value(SKEWED, -1) == pytest.approx(2 * scipy.stats.t.sf(t, 7))
    assert st.p_value([5.0] * 3) == 0 and st.p_value([5.0] * 3, bar=5) == 1


def test_holm_by_hand():
    # sorted 0.01, 0.02, 0.03, 0.9 times 4, 3, 2, 1; the third is raised to the second's 0.06
    assert st.holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])
    assert st.holm([0.5, 0.6]) == [1, 1] and st.holm([]) == []


def test_statistic_by_hand():
    stat = st.statistic([1.0, 2.0, None, 3.0, -1.0, 0.0])
    assert (len(stat["values"]), stat["mean"], stat["kind"]) == (5, 1.0, "t")
    assert stat["p"] == st.p_value(stat["values"])
    assert stat["low"] == pytest.approx(1 - 2.7764 * math.sqrt(0.5), abs=1e-3)


def test_differences_are_paired_by_seed():
    a, b = {1: {"x": 5.0}, 2: {"x": 7.0}, 3: {"x": 1.0}, 9: {"x": 0.0}}, {1: {"x": 4.0}, 2: {"x": 4.0}, 3: {"x": None}}
    assert st.paired(a, b, "x")["values"] == [1, 3]


def test_instability_is_over_the_last_third():
    evaluations = [{"step": s, "retain_recall": v} for s, v in ((2, 0), (4, 90), (6, 10), (8, 50), (10, 54), (12, 55))]
    assert st.instability(evaluations) == (None, None)  # steps 10 and 12 of 12, too few for a line
    rising = [{"step": s, "retain_recall": 10.0 * s} for s in range(1, 13)]
    sd, rest = st.instability(rising)  # steps 9 to 12: 90, 100, 110, 120
    assert sd == pytest.approx(math.sqrt(500 / 3)) and rest == pytest.approx(0, abs=1e-9)
    bent = [{"step": s, "retain_recall": v} for s, v in ((1, 0), (2, 0), (3, 0), (7, 1), (8, 4), (9, 1))]
    assert st.instability(bent)[1] == pytest.approx(math.sqrt(6))  # level line at 2: squares 1 + 4 + 1 over 3 − 2


def test_rank_correlation():
    assert st.rank_correlation([1, 2, 3], [5, 9, 100]) == pytest.approx(1)
    assert st.rank_correlation([1, 2, 3], [4, 4, 4]) is None
