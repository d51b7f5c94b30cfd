"""Reading input, and writing output that is never half there.

Every file is written under a temporary name and renamed, so a run that is killed leaves the old file or the new one.
Every mistake of the user's becomes an `InputError` that names the file, row, field or flag and what was expected."""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from config import InputError

RANK = int(os.environ.get("RANK", 0)) if "WORLD_SIZE" in os.environ else 0  # of torchrun's processes only 0 writes


def read_rows(path, fields):
    """Rows, at least one, of a JSON list or of JSON lines (TOFU's files are lines, though named .json).
    fields: {name: type or tuple of types} that every row must hold; a list is one of strings. Raises: InputError naming
    the file, the row (counted from 1) and the field."""
    path, wanted = Path(path), f" with {', '.join(fields)}" if fields else ""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors open a file with a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    if not text.strip():
        raise InputError(f"{path}: is empty; expected JSON rows{wanted}")
    try:
        rows = json.loads(text)
        rows = rows if isinstance(rows, list) else [rows]
    except json.JSONDecodeError as whole:
        if text.lstrip().startswith("["):
            raise InputError(f"{path}: line {whole.lineno} is not JSON ({whole.msg})") from None
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise InputError(f"{path}: row {number} is not JSON ({error.msg})") from None
    if not rows:
        raise InputError(f"{path}: holds no rows; expected some{wanted}")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{path}: row {number} is {type(row).__name__}, expected an object{wanted}")
        for field, kind in fields.items():
            if field not in row:
                raise InputError(f"{path}: row {number} has no field '{field}'")
            if not isinstance(row[field], kind) or row[field] == []:
                names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
                raise InputError(f"{path}: row {number}, field '{field}' is not a {names} with something in it")
            if isinstance(row[field], list) and not all(isinstance(item, str) for item in row[field]):
                raise InputError(f"{path}: row {number}, field '{field}' is not a list of strings")
    return rows


def read_texts(path):
    """Texts of a JSON list of strings, or of rows with a `text`."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        found = None  # `read_rows` says what is wrong
    if not (isinstance(found, list) and found and all(isinstance(text, str) for text in found)):
        found = [row["text"] for row in read_rows(path, {"text": str})]
    return found


def read_lines(path):
    """Rows of a JSON-lines file of our own."""
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]  # of bytes: a text may hold U+2028


def is_writable(folder):
    """Whether a folder can be written to, or made where it is not there yet."""
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def link_files(source, folder):
    """Put the files of one folder into another: as links to the same bytes, or as copies on another disk."""

    def link(path, target):
        try:
            os.link(path, target)
        except OSError:
            shutil.copy2(path, target)

    shutil.copytree(source, folder, copy_function=link, dirs_exist_ok=True)


@contextmanager
def replacing(path):
    """A temporary name to write under, renamed to `path` once the block is over."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    yield temporary
    os.replace(temporary, path)


def write_text(path, text):
    if not RANK:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def save_folder(path, fill):
    """Let `fill(folder)` write a folder under a temporary name, then put it in place of `path`."""
    if RANK:
        return
    with replacing(path) as temporary:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        fill(temporary)
        shutil.rmtree(path, ignore_errors=True)


class Log:
    """A JSON-lines file that can be cut back to where a saved state left it."""

    def __init__(self, path, keep_bytes=0):
        self.file = open(os.devnull if RANK else path, "ab")
        if not RANK:
            self.file.truncate(keep_bytes)
            self.file.seek(keep_bytes)

    def write(self, row):
        self.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    def size(self):
        """Bytes safely on disk so far."""
        if RANK:
            return 0
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()
