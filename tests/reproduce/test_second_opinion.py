"""Every interval, p and verdict of a report's claims, and every difference to RULE in its tables, worked out again."""

import json
import re
from pathlib import Path

import pytest
import scipy.stats
from made_up import everything
from second_opinion import RATES, Records, interval, mean, opinion, p_value, shapiro

from reproduce import report
from reproduce.records import Results

ROOT = Path(__file__).resolve().parents[2]
NUMBER = r"[+-][\d.]+"
PART = re.compile(
    rf"(?P<label>.+): (?P<mean>{NUMBER})(?: [^\[,;]+)? \[(?P<low>{NUMBER}), (?P<high>{NUMBER})\] (?P<kind>t|BCa|=)"
    r"(?:, p = (?P<p>\S+) \(Holm (?P<holm>\S+)\)(?: for ±(?P<margin>\S+))?)?"
    r", (?P<up>\d+) (?:up (?P<down>\d+) down|above (?P<below>\d+) below (?P<bar>\S+?))(?:; (?P<why>.+))?"
)
COLUMNS = {"Retain ↑": "retain_recall", "hard neighbours ↑": "hard", "leak@64 ↓": "leak_64"}
TABLES = ("controls", "controls_best", "age", "table4", "table8", "weights")  # of differences to RULE, in their order


def claimed(text):
    """[(claim, its parts' lines, verdict)] of the rows of the claims' table."""
    rows = re.findall(r"^\| (.+?) \| .+ \| (.+?) \| \*\*(.+?)\*\* \| `--only .+` \|$", text, re.M)
    return [(claim, parts.split("<br>"), verdict) for claim, parts, verdict in rows]


def is_shown(number, text):
    """Whether a text shows a number, rounded to the digits that it has."""
    mantissa = text.split("e")[0]
    digits = len(mantissa.partition(".")[2])
    size = 10.0 ** (int(text.split("e")[1]) if "e" in text else 0)
    return abs(number - float(text)) <= (0.5 + 1e-6) * size * 10.0**-digits


def compare(text, folder):
    """How many parts of how many claims agree; fails at the first that does not."""
    rows, expected, n = claimed(text), opinion(folder), 0
    assert [row[0] for row in rows] == [row[0] for row in expected]
    for (claim, lines, shown), (_, verdict, parts) in zip(rows, expected, strict=True):
        assert shown == verdict, claim
        for line, part in zip(lines, parts, strict=True):
            found = PART.fullmatch(line)
            assert (found is None) == ("mean" not in part), (claim, line)
            if found:
                check(found, part, claim)
                n += 1
    return n


def check(found, part, claim):
    """One line against the second opinion of it."""
    for name in ("mean", "low", "high"):
        assert is_shown(part[name], found[name]), (claim, name, part[name], found[0])
    assert found["kind"] == part["kind"], (claim, found[0])
    one = len(part["edges"]) == 1
    bar = part["edges"][0] if one else 0
    sides = [sum(x > bar for x in part["values"]), sum(x < bar for x in part["values"])]
    assert [int(found["up"]), int(found["down"] or found["below"] or 0)] == sides, (claim, found[0])
    assert float(found["bar"] or 0) == bar and (found["p"] is None) == ("p" not in part), (claim, found[0])
    if found["p"]:
        at = 0 if one or part["mean"] < 0 else 1  # the nearer edge of ± margin
        assert is_shown(part["p"][at], found["p"]) and is_shown(part["adjusted"][at], found["holm"]), (claim, found[0])
        assert one or float(found["margin"]) == part["edges"][1]


def compare_tables(text, folder):
    """How many differences to RULE agree, in the tables of variants and in that of the main figure."""
    r, n = Records(folder), 0
    data = json.loads((ROOT / "reproduce" / "families.json").read_text(encoding="utf-8"))
    curves = {label: name for name, label in report.LABELS.items()}
    found = re.findall(r"^(\| Stage 2 \| .+)\n\|[-:|]+\n((?:\| .+\n?)+)", text, re.M)
    for (header, rows), section in zip(found, TABLES, strict=True):
        rate = r.chosen["rule"] if section == "controls_best" else "4e-5"
        places = {data["families"][f]["label"]: f for f in data["sections"][section] if f in data["families"]}
        for row in rows.strip().splitlines():
            label, *cells = cut(row)
            family = places.get(label)
            name = curves.get(label) or curves.get(label.partition(":")[0])
            method = data["families"][family].get("method", "rerule") if family else name
            where = family or f"@{rate}", method
            quantity = None
            for title, cell in zip(cut(header)[1:], cells, strict=True):
                quantity = COLUMNS.get(title, quantity)
                if title.startswith("difference") and label == "RULE":
                    assert cell == ""
                elif title.startswith("difference"):
                    n += same(cell, r, where, rate, quantity)
    for label, what, cells in re.findall(r"^\| (.+): (retain|leak@64) \| (.+) \|$", text, re.M):
        quantity = {"retain": "retain_recall", "leak@64": "leak_64"}[what]
        for rate, cell in zip((*RATES, "chosen"), cells.split(" | "), strict=True):
            n += same(cell, r, (f"@{rate}:{curves[label]}", curves[label]), rate, quantity)
    return n


def cut(row):
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def same(cell, r, where, rate, column):
    """Asserts that a cell is the paired difference to RULE."""
    values = r.difference((*where, column), (f"@{rate}", "rule", column), strict=False) or []
    shown = re.fullmatch(rf"({NUMBER}) \[({NUMBER}), ({NUMBER})\]( b)?", cell)
    assert (shown is None) == (len(values) < 2), (where, column, cell)
    if shown:
        low, high, kind = interval(values)
        for number, text in zip((mean(values), low, high), shown.groups(), strict=False):
            assert is_shown(number, text), (where, column, cell, number)
        assert (kind == "BCa") == bool(shown[4]), (where, column, cell)
    return 1


# --- the second opinion itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[1.0, 2.5, 0.5, 4.0, 3.0, 2.0, -1.0, 1.5], [0, 0, 0, 0, 0, 0, -0.7, -0.9]])
def test_by_hand_it_agrees_with_scipy(values):
    assert shapiro(values) == pytest.approx(scipy.stats.shapiro(values).pvalue, rel=1e-3)
    test = scipy.stats.ttest_1samp(values[3:], -1.0)  # five values: Student's t
    assert p_value(values[3:], -1.0, 2) == pytest.approx(test.pvalue, rel=1e-9)
    ends = test.confidence_interval()
    assert interval(values[3:])[:2] == pytest.approx((ends.low, ends.high), rel=1e-9)


def test_rounded_numbers():
    assert is_shown(1.24999, "+1.2") and not is_shown(1.26, "+1.2") and is_shown(-0.05, "-0.1")
    assert is_shown(4.84e-7, "4.8e-07") and not is_shown(4.9e-7, "4.8e-07") and is_shown(0.0078125, "0.0078")


# --- reports ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(text of a report's claims and differences, the folder of its records), of made-up records."""
    runs, jobs = everything()
    folder, r = tmp_path_factory.mktemp("report"), Results(runs, jobs)
    (folder / "records.json").write_text(json.dumps({"runs": runs}), encoding="utf-8")
    rates = {"controls_best": r.chosen["rule"]}
    tables = [report.difference_table(r, section, rates.get(section, "4e-5")) for section in TABLES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report.figures, "rates", lambda *_: None)
        return "\n\n".join([report.verdicts(r)["table"], *tables, report.rates(r, folder)["gains"]]), folder


def test_made_up_records(made):
    text, folder = made
    assert compare(text, folder) > 50 and compare_tables(text, folder) > 150
    assert {row[2] for row in claimed(text)} >= {"holds", "opposite", "inconclusive", "not testable here"}
    assert set(re.findall(r"\] (\S+?),", text)) == {"t", "BCa", "="}


def test_a_wrong_figure_is_found(made):
    text, folder = made

    def changed(pattern):
        found = re.search(pattern, text)
        return f"{text[: found.start(1)]}{float(found[1]) + 1:+.1f}{text[found.end(1) :]}"

    for pattern in (rf": ({NUMBER}) points", rf"\[{NUMBER}, ({NUMBER})\] BCa", r"p = (\S+)", r"Holm (\S+)\)"):
        with pytest.raises(AssertionError):
            compare(changed(pattern), folder)
    with pytest.raises(AssertionError):
        compare(text.replace("**holds**", "**inconclusive**", 1), folder)
    with pytest.raises(AssertionError):
        compare(text[text.index("\n") :], folder)  # a claim less
    for pattern in (rf"\| ({NUMBER}) \[.+ of 8 \|", rf": leak@64 \| {NUMBER} \[({NUMBER}),"):
        with pytest.raises(AssertionError):
            compare_tables(changed(pattern), folder)


def test_the_committed_report():
    text = (ROOT / "results" / "report.md").read_text(encoding="utf-8")
    assert compare(text, ROOT / "results") > 50 and compare_tables(text, ROOT / "results") > 150
