"""run.html: a run to be read in a browser, group by group, from its log. One file that needs no server and no net.

Every run that ends has one; `python -m engine.page RUN` writes that of a run under way. Values that no line of the log
has are worked out here, with the rules of training; `page.html` lays out what there is."""

import json
import sys
from collections import deque
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

from config import InputError
from engine.flags import parse, run_command


@dataclass
class Options:
    """Write run.html in the folder of a run, finished or under way: its prompts, answers, rewards and replay."""

    run: str = field(metadata={"help": "The folder. As the first word it needs no flag."})


if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    WORDS = ["--run"] * (not "".join(sys.argv[1:2] or "-").startswith("-")) + sys.argv[1:]
    OPTIONS = run_command(lambda: parse(Options, WORDS), leave=False)

import torch

from baselines import TITLES
from engine.files import read_lines, write_text
from grpo import group_advantages
from replay import is_hard

LARGEST, LONGEST = 40_000_000, 2000  # bytes of a page; characters of a text, fewer where the page would be larger
ANSWER = ("split", "question", "answer", "forget", "prediction", "rouge_l_recall", "refusal")


def rows_of(path):
    """Rows of a log, [] where there is none. A number that is not finite, which a browser's JSON lacks, is None."""
    return read_lines(path, parse_constant=lambda _: None) if path.is_file() else []


def gather(folder):
    """All that the page shows of a run. Raises: InputError where the folder holds none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        size, tau, unbiased = config["buffer_size"], config["tau"], config["unbiased"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{folder}: expected the folder of a run, with its config.json") from None
    samples, table, rings = rows_of(folder / "samples.jsonl"), folder / "table.md", {}
    for row in samples:
        rewards = torch.tensor(row["rewards"])  # (G,)
        row["advantages"] = [round(value, 4) for value in group_advantages(rewards, unbiased).tolist()]
        row["hard"] = is_hard(SimpleNamespace(rewards=rewards), tau)
    for (method, step), own in groupby(samples, lambda row: (row["method"], row["step"])):
        ring = rings.setdefault(method, deque())
        for row in sorted((row for row in own if row["stored"]), key=lambda row: row["stored"]):
            if len(ring) == size:
                ring.popleft()["left"] = step
            ring.append(row)
    answers = [(name, rows_of(folder / "predictions" / f"{name}.jsonl")) for name in TITLES]
    return {
        "name": folder.absolute().name, "config": config, "titles": TITLES, "samples": samples,
        "metrics": rows_of(folder / "metrics.jsonl"), "table": table.read_text("utf-8") if table.is_file() else "",
        "phases": {name: [{key: row.get(key) for key in ANSWER} for row in rows] for name, rows in answers if rows},
    }  # fmt: skip


def shortened(value, longest):
    """The same with every text cut to so many characters, and a word of how many more there were."""
    if isinstance(value, dict):
        return {key: shortened(part, longest) for key, part in value.items()}
    if isinstance(value, str) and len(value) > longest:
        return f"{value[:longest]} … [{len(value) - longest} more characters]"
    return [shortened(part, longest) for part in value] if isinstance(value, list) else value


def write(folder):
    """Write run.html of the run in `folder`. Returns: its path. Raises: InputError."""
    data, longest, text = gather(Path(folder)), 2 * LONGEST, " " * (LARGEST + 1)
    while len(text) > LARGEST and longest > 20:
        longest //= 2
        text = json.dumps(shortened(data, longest) | {"longest": longest}, separators=(",", ":"))
        text = text.replace("<", "\\u003c")  # ends no script tag, whatever a model has written
    page = Path(__file__).with_suffix(".html").read_text("utf-8").replace("{{data}}", text)
    write_text(Path(folder) / "run.html", page)
    return Path(folder) / "run.html"


if __name__ == "__main__":
    print(run_command(lambda: write(OPTIONS.run)))
