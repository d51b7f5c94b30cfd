"""Reading input, and writing output that is never half there.

Every file is written under a temporary name and renamed, so a run that is killed leaves the old file or the new one.
Every mistake of the user's becomes an `InputError` that names the file, row, field or flag and what was expected."""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import zlib
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from config import InputError

RANK = int(os.environ.get("RANK", 0)) if "WORLD_SIZE" in os.environ else 0  # of torchrun's processes only 0 writes
NO_JSON = (ValueError, RecursionError)  # or an integer of thousands of digits; brackets in brackets


def read_rows(path, fields, text_of=""):
    """Rows, at least one, of a JSON list or of JSON lines (TOFU's files are lines, though named .json).
    fields: {name: type or tuple of types} that every row must hold, with something in it; a list is one of strings.
    text_of: the field that strings in place of rows are. Raises: InputError naming file, row (from 1) and field."""
    path, wanted = Path(path), f" with {', '.join(fields)}" if fields else ""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors open a file with a byte-order mark
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({getattr(error, 'strerror', error)})") from None
    if not text.strip():
        raise InputError(f"{path}: is empty; expected JSON rows{wanted}")
    try:
        rows = json.loads(text)
        rows = rows if isinstance(rows, list) else [rows]
    except NO_JSON as error:
        if text.lstrip().startswith("["):
            raise InputError(f"{path}: is not JSON ({str(error).split(';')[0]:.80})") from None
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except NO_JSON as error:
                raise InputError(f"{path}: row {number} is not JSON ({str(error).split(': ')[0]:.80})") from None
    if not rows:
        raise InputError(f"{path}: holds no rows; expected some{wanted}")
    if text_of and all(isinstance(row, str) for row in rows):
        rows = [{text_of: row} for row in rows]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{path}: row {number} is {type(row).__name__}, expected an object{wanted}")
        for field, kind in fields.items():
            if field not in row:
                raise InputError(f"{path}: row {number} has no field '{field}'")
            check_value(row[field], kind, f"{path}: row {number}, field '{field}'")
    return rows


def check_value(value, kind, place):
    """Raise an InputError that opens with `place` unless a value is of a kind, holds something and can be written."""
    if not isinstance(value, kind) or value == [] or (isinstance(value, str) and not value.strip()):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise InputError(f"{place} is not a {names} with something in it")
    texts = value if isinstance(value, list) else [value]
    if isinstance(value, list) and not all(isinstance(item, str) and item.strip() for item in value):
        raise InputError(f"{place} is not a list of strings with something in each")
    if any(re.search("[\ud800-\udfff]", text) for text in texts if isinstance(text, str)):
        raise InputError(f"{place} holds half a character (a lone surrogate)")


def is_number(value):
    """Whether a value of a JSON file is a number that a float can hold."""
    return type(value) is float or (type(value) is int and abs(value) < 10**300)


def read_lines(path, **how):
    """Rows of a JSON-lines file of our own, less one that is still being written. Raises: InputError."""
    try:  # lines of bytes: a text may hold U+2028
        return [json.loads(line, **how) for line in Path(path).read_bytes().split(b"\n")[:-1]]
    except (OSError, *NO_JSON) as error:
        raise InputError(f"{path}: cannot be read as JSON lines ({error!r:.80})") from None


def is_writable(folder):
    """Whether a folder can be written to, or made where it is not there yet."""
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def can_write(path):
    """Whether a file can be written there: tried, for names, rights and disks all have a say."""
    try:
        there = os.path.lexists(path)
        open(path, "ab").close()
        return there or path.unlink() is None
    except OSError:
        return False


def about():
    """Where a result comes from: the code's commit, the versions, the date."""
    home = Path(__file__).parent.parent

    def git(*args):
        with contextlib.suppress(OSError):  # no git
            done = subprocess.run(["git", "-C", str(home), *args], capture_output=True, text=True)
            return done.stdout.strip() if done.returncode == 0 else ""
        return ""

    changed = git("status", "--porcelain", "--", "*.py", "refusal.txt", "reproduce/*.json", ":!tests")
    commit = (git("rev-parse", "--short=12", "HEAD") or "unknown") + (" with uncommitted changes" if changed else "")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy", "scipy")}
    return {"commit": commit, "versions": {"python": platform.python_version(), **versions}, "date": now()}


def now():
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def remove(path):
    """A file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def printable(text):
    """Text from outside as it is printed: a control character would drive the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def escaped(text):
    """Text from outside as one line of Markdown that says just this."""
    return re.sub(r"([\\`*_{}\[\]<>()#|!~])", r"\\\1", " ".join(str(text).split()))


@contextmanager
def replacing(path):
    """A temporary name to write under, renamed to `path` once the block is over."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except Exception as error:  # libraries hide the system's: safetensors in a text, torch behind one of its own
        cause, number = error, re.search(r"\(os error (\d+)\)", str(error))
        while not number and cause and not isinstance(cause, OSError):
            cause = cause.__context__
        if not number and not cause:
            raise
        number = int(number[1]) if number else cause.errno
        raise OSError(number, os.strerror(number), str(path)) from None


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
        remove(temporary)
        temporary.mkdir(parents=True)
        fill(temporary)
        remove(Path(path))


class Log:
    """A JSON-lines file that can be cut back to where a saved state left it. `crc` is of all its bytes."""

    def __init__(self, path, keep_bytes=0, crc=0):
        self.file, self.crc = open(os.devnull if RANK else path, "ab", buffering=0), crc
        if not RANK:
            self.file.truncate(keep_bytes)
            self.file.seek(keep_bytes)

    def write(self, row):
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        self.crc = zlib.crc32(line, self.crc)
        while line:  # a disk that is nearly full takes a part, and refuses the rest
            line = line[self.file.write(line) :]

    def size(self):
        """Bytes safely on disk so far; 0 of what goes nowhere."""
        if not RANK:
            os.fsync(self.file.fileno())
        return self.file.tell()
