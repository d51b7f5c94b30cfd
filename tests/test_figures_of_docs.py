"""Every figure that README.md or docs/ tells as measured stands in a file of results/ that its section names.

A section names its files in a comment, `<!-- figures: results/a.md#heading results/b.json#key -->`. The figures of a
table's row must stand, in the same order, in one row of these files: a line of Markdown, or an object of JSON in which
no other stands. Where rows there have the name of the page's row, only these count. A figure of a sentence must stand
in such a row too, right beside its ±, its interval or its "of 8". A file may have more digits; what it has under
`where` is no figure. No measurements are: code, links, headings, the heads of tables, numbers that are part of a word
or written as words, and what SETTINGS, PHRASES and SECTIONS name.
"""

import json
import re
from decimal import Decimal
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
NUMBER = r"(?<![\w.@])(?<![A-Za-z]-)[+−-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e-?\d+)?(?![\w@]|-[A-Za-z]|\.\d)"
FIGURE = rf"{NUMBER}(?:(?: ± | of |–){NUMBER}|(?: points)? \[{NUMBER}, {NUMBER}\])?"
SETTINGS = (  # what every page may say without a source
    r"\b(?i:seeds?|eq\.|tables?|figures?|section|stage|levels?|commits?|python|torch) \d[\d.]*"
    r"(?:(?:, | to | and |–)\d+(?!\.?\d))*",
    r"\b\d[\d.]* [BM]\b",  # parameters
    r"(?<![\d.])\d(?:\.\d)?e-\d\b",  # rates and tolerances
    r"\b95 % (?:[\w-]+ )?(?:t-)?interval|≤ \d+ tokens|× 100\b|\b100 − ",
)
PHRASES = {  # page: its own settings, each a regular expression that is found there
    "README.md": ["22 methods", "an 80 GB"], "attacks.md": ["best of 64", "at 4 bits", "not 0.5"],
    "baselines.md": ["r = 1", "3 times that"], "benchmarks.md": ["4⁄3", "from 0"],
    "data.md": ["up to 40", r"\(, 20 %\)"],
    "faq.md": [r"(?:is|to|from) 0\b", "over 40 rows"],
    "log.md": ["97 % refusals", r"(?:hold|from|fall to) 0\b", "and ε_low = 1;"],
    "full_size.md": ["80 GB", "has 85", "20 bytes", "weight of 1", "of 16 prompts × 8", "of 64 tokens, up to 1,024 new",
                     "16 prompts a step where a run has 32", "less than 30 GB"],
    "trust.md": ["10 MB"],
    "unseen_targets.md": [r"default\s+is 32", "and 0 in the", "more than 5 points", "up to 240", "in place of 37",
                          "hold 300", "above 0, its", r"\[0(?:\.8)?, 1\.3\]", r"\b0\.8\b", r"fall to 0\b",
                          "is almost 0", "of 5 passes in place of 20", r"with ε_low = 1\b", "of 4,000"],
    "results.md": ["best of 64", r"0\.25 ≤ r̄ ≤ 0\.75", "at most 8 steps", "of 64 samples"],
    "speed.md": ["32 prompts × 8", "256 tokens", "32, 64(?:,| and) 128", "25, 15 and 4 steps", "The paper's 5–11 %"],
}  # fmt: skip
SECTIONS = {  # page: headings, or None for all of it, under which no number is measured
    "README.md": ["How it works", "Which files to read"],  # settings, a list
    "attacks.md": ["The columns", "How each is made"],  # definitions, settings
    "benchmarks.md": ["Metrics", "Forget quality"],  # definitions, what a KS test on 40 rows can give
    "choices.md": None, "equations.md": None, "training_metrics.md": None, "paper_and_code.md": None,  # the paper's own
}  # fmt: skip


def plain(text):
    """A page's text without code and link targets; the lines of a ```text block stay, as rows of a table."""
    text = re.sub(r"```text\n(.*?)```", lambda block: re.sub(r"(?m)^(?=.)", "|", block[1]), text, flags=re.DOTALL)
    text = re.sub(r"```.*?```|!\[[^\]]*\]\([^)]*\)|^ *\d+\. ", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`|\]\([^)\s]*\)", "", text)


def sections(text):
    """(heading, sources, body) of each part of a page."""
    for part in re.split(r"(?m)^(?=#+ )", plain(text)):
        heading, _, body = part.partition("\n")
        sources = " ".join(re.findall(r"<!-- figures: (.*?) -->", body)).split()
        yield heading.lstrip("# "), sources, re.sub(r"<!--.*?-->", "", body)


def figures(body, phrases=()):
    """[(name of a table's row, its figures)], then [(None, one figure of a sentence)], a figure as its numbers."""
    skip = "|".join((*SETTINGS, *phrases))
    lines = re.sub(r"(?m)^\|.*\n(?=\|[-:|]+\n)", "", body).splitlines()
    names = {x: re.split(r"\||  +", x[1:].strip())[0].replace("*", "").strip() for x in lines if x.startswith("|")}
    tables = [(names[x], re.findall(NUMBER, re.sub(skip, "", x))) for x in lines if x in names]
    prose = re.sub(skip, "", " ".join("" if line.startswith("|") else line.strip() for line in lines))
    return [t for t in tables if t[1]] + [(None, re.findall(NUMBER, figure)) for figure in re.findall(FIGURE, prose)]


def rows(source):
    """[(names, numbers in order)] of a file, or of one heading or key of it."""
    name, _, part = source.partition("#")
    text = (ROOT / "results" / name.removeprefix("results/")).read_text(encoding="utf-8")
    if name.endswith(".json"):
        return objects(json.loads(text)[part] if part else json.loads(text))
    slugs = [(re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-"), body) for h, _, body in sections(text)]
    if not (lines := [line for slug, body in slugs if part in ("", slug) for line in body.splitlines()]):
        raise KeyError(f"{name} has no heading {part}")
    return [({cell.replace("*", "").strip() for cell in line.split("|")}, numbers_of(line)) for line in lines]


def flat(value):
    return [y for x in value for y in flat(x)] if isinstance(value, list) else [value]


def objects(place):
    """The rows of a JSON value: its objects without objects inside."""
    inside = flat([v for k, v in place.items() if k != "where"] if isinstance(place, dict) else place)
    if deeper := [x for x in inside if isinstance(x, dict)]:
        return [row for x in deeper for row in objects(x)]
    return [({x for x in inside if isinstance(x, str)}, [number for x in inside for number in numbers_of(x)])]


def numbers_of(leaf):
    if isinstance(leaf, str):
        return [value(number) for number in re.findall(NUMBER, leaf)]
    return [] if leaf is None or isinstance(leaf, bool) else [Decimal(repr(leaf))]


def value(number):
    return Decimal(number.replace(",", "").replace("−", "-"))


def shows(number, exact):
    """Whether a number as it is shown is `exact` rounded to its digits; a sign counts where one is shown."""
    half = Decimal(5).scaleb(value(number).as_tuple().exponent - 1)
    return abs(value(number) - (exact if number[0] in "+−-" else abs(exact))) <= half


def stands(name, numbers, row):
    """Whether a table's row stands in a row of numbers in order, or the figure of a sentence there in one piece."""
    if name is None:
        return any(all(map(shows, numbers, row[i:])) for i in range(len(row) - len(numbers) + 1))
    rest = iter(row)
    return all(any(shows(number, exact) for exact in rest) for number in numbers)


def missing(name, numbers, known):
    named = [row for names, row in known if name and name in names]
    return not any(stands(name, numbers, row) for row in named or [row for _, row in known])


def check(page, text):
    """What is wrong on a page, a line a figure, or a line a section that names no source."""
    wrong = []
    for heading, sources, body in sections(text):
        told = [] if heading in (SECTIONS.get(page, [""]) or [heading]) else figures(body, PHRASES.get(page, ()))
        if told and not sources:
            wrong.append(f"{heading}: names no source of {'; '.join(' '.join(numbers) for _, numbers in told)}")
            continue
        known = [row for source in sources for row in rows(source)]
        lost = [" ".join([name or "", *numbers]) for name, numbers in told if missing(name, numbers, known)]
        wrong += [f"{heading}: {' and '.join(sources)} lack {figure}" for figure in lost]
    return wrong


@pytest.mark.parametrize("page", PAGES)
def test_every_figure_stands_in_a_file_of_results(page):
    assert not (wrong := check(page, PAGES[page].read_text(encoding="utf-8"))), "\n".join(wrong)


def test_no_exception_is_left_over():
    parts = {page: {h: b for h, _, b in sections(path.read_text(encoding="utf-8"))} for page, path in PAGES.items()}
    for page, phrases in PHRASES.items():
        text = " ".join(" ".join(parts[page].values()).split())
        assert all(re.search(phrase, text) for phrase in phrases), page
    for page, headings in SECTIONS.items():
        for body in [parts[page][h] for h in headings] if headings else [" ".join(parts[page].values())]:
            assert figures(body) and not re.search(rf"{NUMBER} ± |{NUMBER} of {NUMBER}", body)


def test_a_wrong_last_digit_would_be_told():
    """In rows of tables almost always; in sentences, whose figures may stand in any row, three times in four."""
    told = {True: [], False: []}
    for page, path in PAGES.items():
        for _, sources, body in sections(path.read_text(encoding="utf-8")):
            known = [row for source in sources for row in rows(source)]
            for name, numbers in figures(body, PHRASES.get(page, ())) if known else ():
                for i, number in enumerate(numbers):
                    wrong = number[:-1] + str((int(number[-1]) + 3) % 10)
                    told[name is None] += [missing(name, [*numbers[:i], wrong, *numbers[i + 1 :]], known)]
    assert sum(told[False]) > 0.98 * len(told[False]) > 500 and sum(told[True]) > 0.7 * len(told[True]) > 50


TABLE = "# P\n<!-- figures: results/a.md#two-rows -->\n\n| | recall 64 |\n|---|---:|\n| {} |\n"
TEXT = "# P\n<!-- figures: results/a.md results/b.json#x -->\n{}\n"


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    table = "# A\n\n## Two rows\n\n| | recall |\n|---|---:|\n| RULE | 85.4 ± 6.9 | +7.5 [−1.2, 9.1] |\n| PO | 12.3 |\n"
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.md").write_text(table, encoding="utf-8")
    part = {"where": {"commit": 99}, "rows": [{"row": "RULE", "recall": 85.4432, "loss": [-3.0, 2200]}]}
    (tmp_path / "results" / "b.json").write_text(json.dumps({"x": part}))
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(PHRASES, "p.md", [r"0\.943"])


@pytest.mark.parametrize(("text", "told"), [
    (TABLE.format("RULE | 85.4 ± 6.9"), ""), (TABLE.format("**RULE** | 85 | +7.5"), ""), (TABLE.format("x | 12"), ""),
    (TEXT.format("It is 85.44, or 85.4 ± 6.9, in 2,200 s."), ""),
    (TEXT.format("+7.5 points [-1.2, +9.1]; it falls by 3.0, by −3.0 at 4e-5."), ""),
    (TEXT.format("On seeds 21–28, 8 B; see `--steps 77`, leak@64, [Table 4](docs/5.md), 0.943."), ""),
    ("# P\n\n```bash\nrun 77\n```\n\n## Of 77 steps\n\nNothing, in Eq. 5.\n\n1. One\n", ""),
    (TABLE.format("RULE | 85.5 ± 6.9"), "RULE 85.5 6.9"), (TABLE.format("RULE | 12.3"), "RULE 12.3"),
    (TABLE.format("RULE | 6.9 | 85.4"), "RULE 6.9 85.4"), (TABLE.format("other | 85.4 | 12.3"), "other 85.4 12.3"),
    (TEXT.format("It is 85.45."), "85.45"), (TEXT.format("It is 85.4 ± 9.1."), "85.4 9.1"),
    (TEXT.format("It rises by +3.0."), "+3.0"), (TEXT.format("It is 99."), "99"), (TEXT.format("2 of 8 seeds"), "2 8"),
    ("# P\n\nIt is 85.4.\n", "names no source of 85.4"), ("# P\n\n```text\nRULE  12.3\n```\n", "no source of 12.3"),
    (TEXT.format("## Below\n85.4"), "names no source of 85.4"),
], ids=range(19))  # fmt: skip
def test_figures_that_stand_there_pass_and_others_are_told(made_up, text, told):
    wrong = check("p.md", text)
    assert (told in wrong[0] and len(wrong) == 1) if told else not wrong


def test_a_source_that_is_not_there_is_an_error(made_up):
    for source, error in (("c.md", OSError), ("b.json#y", KeyError), ("a.md#three-rows", KeyError)):
        with pytest.raises(error):
            check("p.md", f"# P\n<!-- figures: results/{source} -->\n85.4\n")
