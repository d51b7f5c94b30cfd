"""docs/walkthrough.ipynb: its committed outputs are whole, its figures stand in them, and its cells run."""

import base64
import re
from pathlib import Path

import pytest
from test_figures_of_docs import NUMBER, check

nbformat = pytest.importorskip("nbformat")
ROOT = Path(__file__).parent.parent
PLACE = ROOT / "docs" / "walkthrough.ipynb"


def printed(notebook):
    """All that the code cells print, after a check that each has run without an error."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def pictures(notebook):
    found = [out.data for cell in notebook.cells for out in cell.get("outputs", []) if "data" in out]
    assert sum("text/html" in data and data["text/html"].count("<sub>") > 30 for data in found) == 2  # coloured tokens
    return [base64.b64decode(data["image/png"]) for data in found if "image/png" in data]


def numbers(pattern, text):
    (found,) = re.findall(pattern, text)
    return [float(x) for x in re.findall(r"[+-]?\d+\.\d+", found)]


def holds(text):
    """What any processor must print, whatever it rounds and draws."""
    assert numbers("by hand    ( .*)", text) == numbers("by function ( .*)", text) and "\nequal: True\n" in text
    function, by_hand, nudged = numbers("^function .*nudged.*", re.search("function .*nudged.*", text)[0])
    assert function == pytest.approx(by_hand, rel=1e-3, abs=1e-5) == pytest.approx(nudged, rel=0.02, abs=1e-4)
    _, by_hand, by_function = numbers("first token of y1: (.*)", text)
    assert by_hand == pytest.approx(by_function, abs=2e-6)
    assert "hard: True" in text and "ours is in B: True" in text
    assert "ratio by hand equals the function's: True" in text
    rows = re.findall(r"ratio (\S+) → w (\S+) +(clipped)?", text)
    assert len(rows) == 8 and any(clipped for *_, clipped in rows)
    for ratio, w, clipped in rows:
        assert 0.8 <= float(w) <= 1.3 and (bool(clipped) or ratio == w)
    rungs = re.findall(r"neighbours' recall +(\S+) .* (\d+) updates, targets recalled (\S+),", text)
    assert len(rungs) == 6 and all(29.5 < float(recall) < 99 and float(left) < 20 for recall, _, left in rungs)
    assert [int(n) for _, n, _ in rungs[:3]] == [24] * 3 and min(int(n) for _, n, _ in rungs[3:]) > 24


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(PLACE, as_version=4)


def test_the_committed_outputs_are_whole(committed):
    holds(printed(committed))
    (picture,) = pictures(committed)
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000 and PLACE.stat().st_size < 400_000


def test_figures_of_the_text_stand_in_outputs_or_results(committed):
    (ladder,) = [c.source for c in committed.cells if c.source.startswith("What each rung buys")]
    text = printed(committed)
    told = [x for x in re.findall(NUMBER, ladder.replace("Eq. ", "")) if "." in x]
    assert len(told) > 15 and not [x for x in told if x.lstrip("+-") not in text]
    for steps in re.findall(r"\b\d\d\b(?= optimiser|\.$)", ladder, re.MULTILINE):
        assert f"{steps} updates" in text
    (ending,) = [c.source for c in committed.cells if "<!-- figures:" in c.source]
    assert not check("results.md", f"# Where\n{ending}")
    assert check("results.md", f"# Where\n{ending.replace('95.3', '97.7')}")


@pytest.mark.parametrize("seeds", [1, pytest.param(3, marks=pytest.mark.long)])
def test_every_cell_runs_in_a_fresh_kernel_and_says_the_same(seeds):
    client, _ = pytest.importorskip("nbclient"), pytest.importorskip("ipykernel")
    notebook = nbformat.read(PLACE, as_version=4)
    for cell in notebook.cells:
        cell.outputs = []
        cell.source = cell.source.replace("n = 3  # seeds", f"n = {seeds}  # seeds")  # of the ladder
    assert sum(f"n = {seeds}  # seeds" in cell.source for cell in notebook.cells) == 1
    client.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(PLACE.parent)}}).execute()
    holds(printed(notebook))
    assert len(pictures(notebook)) == 1
