"""Rows read from a file, whatever wrote it."""

import json

import pytest
from made import write

from engine.files import Log, read_lines, read_rows

ROWS = [{"q": "a\u2028b\x85c", "n": ["x"]}, {"q": "é", "n": ["y", "z"]}]
BOM = "\ufeff"
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


@pytest.mark.parametrize(
    "text",
    [json.dumps(ROWS), json.dumps(ROWS, indent=4), LINES, LINES + "\n", LINES.replace("\n", "\r\n\r\n"), BOM + LINES],
    ids=["list", "indented", "lines", "ended lines", "windows lines", "byte-order mark"],
)  # fmt: skip
def test_rows_are_read_from_a_list_or_from_lines(tmp_path, text):
    (tmp_path / "rows.json").write_bytes(text.encode())
    assert read_rows(tmp_path / "rows.json", {"q": str, "n": list}) == ROWS


def test_lines_of_our_own_are_read_back_whatever_a_model_has_written(tmp_path):
    log, row = Log(tmp_path / "log.jsonl"), {"text": "a\u2028b\u2029c\x85d\x0be\rf\ng"}
    log.write(row)
    log.size()
    assert read_lines(tmp_path / "log.jsonl") == [row]


def test_a_single_object_is_one_row(tmp_path):
    write(tmp_path / "row.json", ROWS[0])
    assert read_rows(tmp_path / "row.json", {}) == ROWS[:1]
