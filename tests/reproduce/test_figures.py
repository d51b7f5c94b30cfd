"""The report's figures on made-up records: the data that are drawn, their order, numbers, colours and titles."""

import importlib
import re
from math import sqrt
from pathlib import Path
from statistics import stdev

import pytest
from made_up import base_run
from PIL import Image

from engine.plots import LOOKS, look, pyplot, save
from reproduce import claims, figures, report
from reproduce.statistics import statistic

T3 = 4.302653  # Student's t, 97.5 %, of three seeds


class Made:
    """What figures ask of the records: outcomes by (family or curve, method or rate), records by family."""

    rates = ("4e-5", "8e-5")
    chosen = {"rule": "8e-5", "steps": "8e-5", "compute": "8e-5", "rerule": "4e-5", "random": "8e-5", "recent": "4e-5",
              "current": "4e-5"}  # fmt: skip

    def __init__(self, outcomes=(), records=()):
        self.outcomes, self.records = dict(outcomes), dict(records)

    def runs(self, family):
        return self.records.get(family, {})

    def of(self, family, method="rerule"):
        return self.outcomes.get((family, method), {})

    at = of


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been saved."""
    found = []
    monkeypatch.setattr(figures, "save", lambda figure, path: found.append(figure))
    return found


def outcomes(*values, column="retain_recall", **more):
    return {21 + at: {column: value, **more} for at, value in enumerate(values)}


def labels(axis):
    """Names of rows, from the top."""
    return [label.get_text() for label in axis.get_yticklabels()][::-1]


def numbers(axis):
    """{height: numbers beside a row, from left to right}, the top row first."""
    beside = [text for text in axis.texts if isinstance(text.xycoords, tuple)]
    rows = {}
    for text in sorted(beside, key=lambda text: (-text.xy[1], text.xyann[0])):
        rows.setdefault(text.xy[1], []).append(text.get_text())
    return list(rows.values())


def test_rates_shows_every_method_at_every_rate(drawn):
    curves = [*figures.LINES, "steps", "compute"]
    made = {}
    for at, name in enumerate(curves):
        for k, rate in enumerate(Made.rates):
            base = 50 + 5 * at + k
            made[name, rate] = {seed: {"retain_recall": base + seed, "leak_64": base / 2 + seed} for seed in (1, 2, 6)}
    figures.rates(Made(made), "rates.png")
    axes = drawn[0].axes
    assert len(axes) == 6
    for place, axis in enumerate(axes):
        lines = {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}
        assert list(lines) == list(figures.LINES.values())
        for method, name in figures.LINES.items():
            source = method if method != "rule" else ("rule", "steps", "compute")[place % 3]
            base = 50 + 5 * curves.index(source)
            scale = 1 if place < 3 else 2
            assert list(lines[name].get_ydata()) == pytest.approx([base / scale + 3, (base + 1) / scale + 3])
            assert lines[name].get_color() == look(method)["color"] and lines[name].get_marker() == LOOKS[method][1]
        x = [line.get_xdata()[0] for line in lines.values()]
        assert len(set(x)) == 5 and max(x) / min(x) < 2**0.5  # beside one another, each nearer to its rate
    told = [axis.get_title().split("\n")[-1] for axis in axes]
    assert told[:2] == ["RULE 54.0, ReRULE 58.0", "RULE 79.0, ReRULE 58.0"] and told[3] == "RULE 28.5, ReRULE 30.5"
    half = T3 * stdev([1, 2, 6]) / sqrt(3)
    (low, high) = axes[0].collections[0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((53 - half, 53 + half), abs=1e-4)
    large = [line for line in axes[0].lines if line.get_markersize() == 9]
    assert [line.get_color() for line in large] == [look(method)["color"] for method in figures.LINES]
    assert large[0].get_ydata()[0] == 54 and large[1].get_ydata()[0] == 58  # 8e-5 was chosen for RULE, 4e-5 for ReRULE


def test_gains_are_sorted_and_have_their_numbers(drawn):
    rows = [("small", "other", statistic([1.0, 2.0, 3.0])), ("none", "rule", None),
            ("large", "rerule", statistic([4.0, 6.0, 8.0]))]  # fmt: skip
    figures.gains({"at 4e-5": rows, "at 8e-5": [("worse", "random", statistic([-3.0, -1.0, -2.0]))]}, "gains.png")
    upper, lower = drawn[0].axes
    assert labels(upper) == ["large", "small", "none"] and upper.get_title(loc="left") == "at 4e-5"
    half = [T3 * sd / sqrt(3) for sd in (2, 1)]
    told = [[f"{m:+.1f} [{m - h:+.1f}, {m + h:+.1f}]".replace("-", "−")] for m, h in zip((6, 2), half, strict=True)]
    assert numbers(upper) == [*told, ["–"]]
    assert [line.get_color() for line in upper.lines if line.get_markersize() == 8] == [
        look("other")["color"], look("rerule")["color"]
    ]  # fmt: skip
    assert lower.lines[0].get_color() == look("random")["color"] and numbers(lower)[0][0].startswith("−2.0 [−4.5")


def test_the_town_shows_every_distance_for_every_method_there(drawn):
    names = {"Original": 90, "Rej. Steer": 10, "RULE": 50, "ReRULE": 60, "random": 55, "recent": 45}
    made = {figures.TOWN[name]: outcomes(*(level + d for d in (-2, 0, 2)), column="surname_recall",
                                         forget_recall=level / 10 + 0.3, far_recall=level + 7)
            for name, level in names.items()}  # fmt: skip
    made[figures.TOWN["Retained"]] = outcomes(None, None, column="forget_recall")  # the benchmark has none
    columns = {"forgotten": "forget_recall", "same surname": "surname_recall", "far": "far_recall"}
    figures.town(Made(made), columns, "town.png")
    (axis,) = drawn[0].axes
    assert labels(axis) == list(columns)
    expected = [[f"{level / 10 + 0.3:.0f}" for level in names.values()], [f"{level}" for level in names.values()],
                [f"{level + 7}" for level in names.values()]]  # fmt: skip
    assert numbers(axis) == expected
    heads = [text.get_text().replace("\n", " ") for text in axis.texts if text.xycoords == "axes fraction"]
    assert heads == ["Original", "Rej. Steer", "RULE", "ReRULE", "random groups", "previous batch"]
    means = {line.get_xdata()[0]: line.get_color() for line in axis.lines if line.get_markersize() == 8}
    assert all(means[level] == look(name)["color"] for name, level in names.items())


def test_attacks_are_sorted_by_what_they_bring_out_of_unlearned_models(drawn):
    def run(*levels):
        kinds = ("attack_multiple_choice", "attack_reverse_query", "attack_cross_lingual", "attack_cross_lingual_fr")
        rows = {name: dict(zip(kinds, (*own, 99.0), strict=True)) for name, own in levels}
        return {"rows": rows}

    first = run(("Original", (80.0, 90.0, 10.0)), ("RULE", (20.0, 10.0, 30.0)), ("ReRULE", (22.0, 8.0, 40.0)))
    second = run(("Original", (60.0, 70.0, 20.0)), ("RULE", (30.0, 12.0, 32.0)), ("ReRULE", (28.0, 6.0, 42.0)))
    runs = {21: first, 22: second}
    figures.attacks(Made(records={"rwku": runs}), "attacks.png")
    (axis,) = drawn[0].axes
    assert labels(axis) == ["cross lingual", "multiple choice", "reverse query"]
    assert numbers(axis) == [["15", "31", "41"], ["70", "25", "25"], ["80", "11", "7"]]


def test_age_has_the_weights_by_age_and_the_gain_of_each_bound(drawn):
    points = {21: [[1.0, 0.9, 0.1], [1.5, 0.7, 0.3], [3.0, None, None]], 22: [[5.0, 0.4, 0.6], [7.0, 0.2, 0.8]]}
    runs = {seed: {"methods": {"rerule": {"by_age": own}}} for seed, own in points.items()}
    made = {("base", "rule"): outcomes(80.0, 90.0, 85.0), ("rerule@4e-5", "rerule"): outcomes(88.0, 97.0, 94.0),
            ("age2", "rerule"): outcomes(81.0, 92.0, 88.0), ("age4", "rerule"): outcomes(84.0, 94.0, 89.0)}  # fmt: skip
    figures.age(Made(made, {"base": runs}), "age.png")
    left, right = drawn[0].axes
    means = [line for line in left.lines if not line.get_label().startswith("_")]
    assert [list(line.get_xdata()) for line in means] == [[1.25, 6.0]] * 2  # under 2 steps, 4 to 8
    assert [list(line.get_ydata()) for line in means] == [pytest.approx([0.8, 0.3]), pytest.approx([0.2, 0.7])]
    assert [text.get_text() for text in left.texts] == ["0.80", "0.30", "0.20", "0.70"]
    assert labels(right) == ["at most 2 steps old", "at most 4 steps old", "of any age"]
    assert numbers(right) == [["+2.0"], ["+4.0"], ["+8.0"]]


def base_runs():
    """Two seeds of six steps: easy prompts earn 1 (forget) and 3/4 (boundary), hard ones 0; in the last step these earn
    1 with ReRULE and, on seed 22, 1/2 with RULE."""
    runs = {21: base_run(["gc", "00"] * 3, ["gc", "00", "gc", "00", "gc", "gg"]),
            22: base_run(["gc", "00", "gc", "00", "gc", "88"], ["gc", "00", "gc", "00", "gc", "gg"])}  # fmt: skip
    for run, end in zip(runs.values(), (70.0, 80.0), strict=True):
        for method, more in (("rule", 0), ("rerule", 5)):
            run["methods"][method]["evaluations"] = [
                {"step": 2, "retain_recall": 50.0, "forget_refusal": 100.0},
                {"step": 6, "retain_recall": end + more, "forget_refusal": 99.0},
            ]
    return runs


def legend(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_curves_over_steps_tell_where_they_begin_and_end(drawn):
    figures.over_steps(Made(records={"base": base_runs()}), "steps.png")
    axes = drawn[0].axes
    assert legend(axes[0]) == ["RULE: 50.0 → 75.0", "ReRULE: 50.0 → 80.0"]
    assert legend(axes[1]) == ["RULE: 100.0 → 99.0", "ReRULE: 100.0 → 99.0"]
    # hard prompts are met in even steps; smoothed over five: steps 2 at the start, 4 and 6 at the end
    assert legend(axes[2]) == ["RULE: 0.00 → 0.12", "ReRULE: 0.00 → 0.50"]
    thick = [line for line in axes[0].lines if line.get_linewidth() == 2.4]
    assert [line.get_color() for line in thick] == [look("rule")["color"], look("rerule")["color"]]


def test_trajectories_tell_each_parts_way(drawn):
    figures.trajectories(Made(records={"base": base_runs()}), "trajectories.png", parts=2)
    forget, boundary = drawn[0].axes  # a prompt of either kind in each half, a pass of two steps
    assert legend(forget) == ["hardest fifth: 0.00 → 0.25", "easiest fifth: 1.00 → 1.00"]
    assert legend(boundary) == ["hardest fifth: 0.00 → 0.25", "easiest fifth: 0.75 → 0.75"]


def test_conditions_have_the_share_of_hard_groups_and_each_gain(drawn):
    worlds = {family: base_runs() for family in ("world0", "base", "world30")}
    made = {(family, method): outcomes(60.0, 70.0 + more, 50.0) for family in worlds
            for method, more in (("rule", 0), ("rerule", 3))}  # fmt: skip
    made |= {(f"tau{tau}", "rerule"): outcomes(61.0, 70.0, 50.0) for tau in ("0.6", "0.8")}
    made["rerule@4e-5", "rerule"] = made["rerule", "4e-5"] = outcomes(66.0, 70.0, 50.0)  # in place of the base runs'
    assert report.worlds(Made(made, worlds), Path("."))["table"].count("| 50.0 ± 0.0 |") == 3
    upper, lower = drawn[0].axes
    assert [label.rpartition(": ")[2] for label in labels(upper)] == ["50 % hard"] * 3  # one step of the first two
    assert labels(lower) == ["τ = 0.4", "τ = 0.6", "τ = 0.8", "τ = 1.0"]
    means = [[row[0].split()[0] for row in numbers(axis)] for axis in (upper, lower)]
    assert means == [["+1.0", "+2.0", "+1.0"], ["+2.0", "+0.3", "+0.3", "–"]]


def test_theorys_title_has_the_correlation_and_its_rows_those_that_were_measured(drawn, monkeypatch):
    families = claims.HARD_STORES[:4]
    points = {21: list(zip(families, (1, 2, 3, 4), (1, 3, 2, 4), strict=True)), 22: [("base", 1, 1)]}
    monkeypatch.setattr(claims, "bound_points", lambda r: points)
    probes = {}
    for name, k in zip(figures.PROBED, (1, 2, 3), strict=True):
        probes["probe", name] = {
            seed: {"easy_weighted": k + d, "easy_missed": 0.1, "easy_false": (k + d) / 10,
                   "hard_weighted": k + 2 + d, "hard_missed": None, "hard_false": (k + 2 + d) / 10}
            for seed, d in ((21, -0.5), (22, 0.5))
        }  # fmt: skip
    figures.theory(Made(probes), "theory.png")
    bound, terms, rates = drawn[0].axes
    assert bound.get_title().endswith("+0.80")  # Spearman: 1 − 6·(1 + 1) / (4·15)
    assert labels(terms) == ["easy region", "hard region"]
    assert numbers(terms) == [["1.00", "2.00", "3.00"], ["3.00", "4.00", "5.00"]]
    assert labels(rates) == ["forget, easy:\nanswered", "boundary, easy:\nrefused", "boundary, hard:\nrefused"]
    assert numbers(rates)[1:] == [["0.10", "0.20", "0.30"], ["0.30", "0.40", "0.50"]]
    colours = {line.get_color() for line in terms.lines if line.get_markersize() == 8}
    assert colours == {look(name)["color"] for name in figures.PROBED}


def test_pictures_without_enough_seeds_are_drawn_empty(drawn, monkeypatch):
    monkeypatch.setattr(claims, "bound_points", lambda r: {})
    figures.theory(Made(), "theory.png")
    figures.age(Made(), "age.png")
    figures.rates(Made({(name, rate): {} for name in (*figures.LINES, "steps", "compute") for rate in Made.rates}), "r")
    assert drawn[0].axes[0].get_title().endswith("–") and len(drawn) == 3


def test_hardest_tells_what_was_asked_wanted_and_earned(drawn):
    base = base_runs()[22]
    base["cases"] = [[1, "forget", "Where was Ada Morham-Longname of the valley born in those days?", "A"],
                     [3, "boundary", "Q3?", "a mill by the river"]]  # fmt: skip
    figures.hardest(base, "hardest.png")
    first, second = (axis.get_title(loc="left") for axis in drawn[0].axes[:2])
    assert first.replace("\n", " ") == (
        "forget: Where was Ada Morham-Longname of the valley born in those days? wanted: a refusal "
        "RULE 0.00 → 0.50, ReRULE 0.00 → 1.00"
    )
    assert "wanted: a mill by the river" in second and max(map(len, first.split("\n"))) <= 42
    assert [list(line.get_xdata()) for line in drawn[0].axes[0].lines[:2]] == [[2, 4, 6]] * 2


def test_the_pipelines_picture_names_functions_that_exist_and_all_steps():
    picture = report.PIPELINE.read_text(encoding="utf-8")
    named = re.findall(r">(\w+)\.(\w+)<", picture)
    assert len(named) == 8
    for module, function in named:
        assert callable(getattr(importlib.import_module(module), function)), function
    assert re.findall(r">(\d) +\w", picture) == ["1", "2", "3", "4", "5", "6"]
    assert "RULE: next step" in picture and "until replay is active (warm-up)" in picture


def test_pictures_are_written_sharp_and_the_same_again(tmp_path):
    for name in "ab":
        figure, axis = pyplot().subplots(figsize=(10, 4))
        axis.plot([0, 1])
        save(figure, tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert round(picture.info["dpi"][0]) == 200 and picture.width <= 2000  # legible at 900 pixels
