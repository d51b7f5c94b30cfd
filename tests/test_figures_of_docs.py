"""Every figure that README.md or docs/ tells as measured stands in a file of results/ that its section names.

A section names its files in a comment, `<!-- figures: results/a.md#heading results/b.json#key -->`. The figures of a
table's row must stand, in the same order, in one row of these files: a line of Markdown, or an object of JSON in which
no other stands. Where rows there have the name of the page's row, only these count. A figure of a sentence must stand
in such a row too, with its ± or its interval. A file may have more digits than the page. What a file has under `where`
says how it was made and is no figure.

No measurements are: code, links, headings, the heads of tables, numbers that are part of a word, and what SETTINGS,
PHRASES and SECTIONS name.
"""

import json
import re
from decimal import Decimal
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
NUMBER = r"(?<![\w.,@])(?<![A-Za-z]-)[+−-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e-?\d+)?(?![\w@]|-[A-Za-z]|\.\d)"
FIGURE = rf"{NUMBER}(?: ± {NUMBER}|(?: points)? \[{NUMBER}, {NUMBER}\])?"
SETTINGS = (  # what every page may say without a source
    rf"\b(?:seeds?|Eq\.|Tables?|Figures?|Section|Stage|levels?|step|Python|TRL|commits?) {NUMBER}"
    rf"(?:(?:, | to | and | or |–){NUMBER})*",
    r"\d[\d.]* [BM]\b",  # parameters
    r"\d(?:\.\d)?e-\d\b",  # rates and tolerances
    r"95 % (?:[\w-]+ )?(?:t-)?interval",
)
PHRASES = {}  # page: its own settings, each a regular expression
SECTIONS = {}  # (page, heading): why none of its numbers is measured; None for all headings


def plain(text):
    """A page's text without code and link targets; a block of ```text stays, its lines as rows of a table."""
    text = re.sub(r"```text\n(.*?)```", lambda block: re.sub(r"(?m)^(?=.)", "|", block[1]), text, flags=re.DOTALL)
    text = re.sub(r"```.*?```|!\[[^\]]*\]\([^)]*\)", "", text, flags=re.DOTALL)
    return re.sub(r"`[^`\n]*`|\]\([^)\s]*\)", "", text)


def sections(text):
    """(heading, sources, body) of each part of a page, the one above its first ## under its title."""
    for part in re.split(r"(?m)^(?=#+ )", plain(text)):
        heading, _, body = part.partition("\n")
        sources = re.findall(r"<!-- figures: (.*?) -->", body)
        yield heading.lstrip("# "), " ".join(sources).split(), re.sub(r"<!--.*?-->", "", body)


def figures(body, phrases=()):
    """[(name of the row or None, [figures])]: of each row of a table all its figures together, of sentences each."""
    found, prose = [], []
    for line in re.sub(r"(?m)^\|.*\n(?=\|[-:|]+\n)", "", body).splitlines():
        prose.append("" if line.startswith("|") else line)
        if line.startswith("|") and (numbers := re.findall(NUMBER, without(line, phrases))):
            found.append((re.split(r" *\| *|  +", line.strip("| "))[0].strip("*"), numbers))
    text = without(" ".join(line.strip() for line in prose), phrases)
    return found + [(None, re.findall(NUMBER, figure)) for figure in re.findall(FIGURE, text)]


def without(text, phrases):
    for phrase in (*SETTINGS, *phrases):
        text = re.sub(phrase, "", text)
    return text


def rows(source):
    """[(names, numbers in order)] of a file, or of one heading or key of it: a line, or an object without objects."""
    name, _, part = source.partition("#")
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".json"):
        place = json.loads(text)
        for key in part.split(".") if part else ():
            place = place[key]
        return list(objects(place))
    found = [(re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-"), b) for h, _, b in sections(text)]
    lines = [line for heading, body in found if part in ("", heading) for line in body.splitlines()]
    if not lines:
        raise KeyError(f"{name} has no heading {part}")
    cells = [[cell.strip(" *") for cell in line.split("|")] for line in lines]
    return [(set(row), [value(n) for n in re.findall(NUMBER, " ".join(row))]) for row in cells]


def objects(place):
    inside = place if isinstance(place, list) else [v for k, v in place.items() if k != "where"]
    nested = [x for x in inside if isinstance(x, dict) or (isinstance(x, list) and any(isinstance(y, dict) for y in x))]
    for x in nested:
        yield from objects(x)
    if not nested and isinstance(place, dict):
        leaves = [y for x in inside for y in (x if isinstance(x, list) else [x])]
        yield {x for x in leaves if isinstance(x, str)}, [n for x in leaves for n in numbers_of(x)]


def numbers_of(leaf):
    if isinstance(leaf, str):
        return [value(n) for n in re.findall(NUMBER, leaf)]
    return [] if leaf is None or isinstance(leaf, bool) else [Decimal(repr(leaf))]


def value(number):
    return Decimal(number.replace(",", "").replace("−", "-"))


def shows(number, exact):
    """Whether a number as it is shown is `exact` rounded to its digits; a sign counts where one is shown."""
    shown = value(number)
    half = Decimal(5).scaleb(shown.as_tuple().exponent - 1)
    return abs(shown - (exact if number[0] in "+−-" else abs(exact))) <= half


def missing(claims, known):
    """The claims that no row of the sources has."""
    def stands(claim, row):
        rest = iter(row)
        return all(any(shows(number, exact) for exact in rest) for number in claim)

    lost = []
    for name, claim in claims:
        named = [row for names, row in known if name and name in names]
        if not any(stands(claim, row) for row in named or [row for _, row in known]):
            lost.append((name, claim))
    return lost
