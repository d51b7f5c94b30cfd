"""Statistics over seeds: pure functions on lists of one value a seed.

Intervals and tests are Student's t; far from normal by a fixed rule, intervals are BCa bootstrap's (Efron, "Better
bootstrap confidence intervals", 1987). Holm ("A simple sequentially rejective multiple test procedure", 1979)."""

from math import sqrt
from statistics import fmean, stdev

import numpy as np

WINDOW = 3  # "late" is the last third of a run's steps


def scipy_stats():
    import scipy.stats  # takes a second, so not before it is needed

    return scipy.stats


def shape(values):
    """What suits the values: "=" all equal, "BCa" far from normal (Shapiro–Wilk p < 0.01, 8 or more), "t" else."""
    if max(values) - min(values) < 1e-9:
        return "="
    return "BCa" if len(values) >= 8 and scipy_stats().shapiro(values).pvalue < 0.01 else "t"


def interval(values):
    """95 % interval of the mean by the way that suits the values: (low, high, kind). BCa: always the same resamples."""
    kind = shape(values)
    if kind == "=":
        found = [np.mean(values)] * 2
    elif kind == "BCa":
        how = {"n_resamples": 9999, "method": "BCa", "rng": np.random.default_rng(0)}
        found = scipy_stats().bootstrap((values,), np.mean, **how).confidence_interval
    else:
        found = scipy_stats().ttest_1samp(values, 0).confidence_interval()
    return *map(float, found), kind


def p_value(values, bar=0.0, sides=2):
    """p of the hypothesis that the mean is the bar, by Student's t; sides 1: on the side on which the mean lies. Signs
    of eight values cannot give less than 2/256, which no correction survives. Equal values: 1 on the bar, else 0."""
    if shape(values) == "=":
        return float(abs(values[0] - bar) < 1e-9)
    return float(scipy_stats().ttest_1samp(values, bar).pvalue) * sides / 2


def holm(ps):
    """Holm's step-down p-values, in the order given: the k-th smallest of m times m − k + 1, never falling, ≤ 1."""
    order, factors = np.argsort(ps), np.arange(len(ps), 0, -1)
    return np.maximum.accumulate(np.minimum(1, np.take(ps, order) * factors))[np.argsort(order)].tolist()


def statistic(values):
    """Mean, 95 % interval with its kind and p of two or more values that are not None; they are in it too."""
    values = [value for value in values if value is not None]
    if len(values) < 2:
        return None
    found = dict(zip(("low", "high", "kind"), interval(values), strict=True))
    return {"values": values, "mean": float(np.mean(values)), "p": p_value(values)} | found


def half_width(values):
    """Half of a 95 % interval of the mean by Student's t."""
    return scipy_stats().t.ppf(0.975, len(values) - 1) * scipy_stats().sem(values)


def spread(values, digits=1, scale=1, sign="", width=stdev):
    """mean ± sd (or another `width`) of one value a seed, times `scale`; None left out."""
    values = [scale * value for value in values if value is not None]
    wide = f" ± {width(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):{sign}.{digits}f}{wide}" if values else "–"


def difference(a, b):
    return None if a is None or b is None else a - b


def paired(a, b, column):
    """Statistic of a − b over the seeds that both have; a, b: {seed: outcome}."""
    return statistic([difference(a[seed].get(column), b[seed].get(column)) for seed in sorted(a) if seed in b])


def instability(evaluations):
    """(sd of retain recall over the last third of the steps, sd of what a straight line through it leaves)."""
    last = max(row["step"] for row in evaluations)
    late = [(row["step"], row["retain_recall"]) for row in evaluations if row["step"] > last - last / WINDOW]
    if len(late) < 3:
        return None, None
    x, y = np.array(late, float).T
    rest = y - np.polyval(np.polyfit(x, y, 1), x)
    return float(y.std(ddof=1)), float(sqrt((rest**2).sum() / (len(y) - 2)))


def rank_correlation(x, y):
    """Spearman's ρ; None where either side is constant."""
    return None if len(set(x)) < 2 or len(set(y)) < 2 else float(scipy_stats().spearmanr(x, y).statistic)
