"""Forget naturalness (Read, Help, Truth; 0–100) by a language model as judge, at any OpenAI-compatible URL.

Covers "Naturalness" of Appendix C.

Deviations
- The paper's judge prompts are not published. With our own, in `judge.md`, only models of one judge can be compared.
- A rating that does not come after five tries is left out and counted in a note, never guessed.
- The key comes from an environment variable and nothing else is ever sent; requests are made in `engine/llm.py`."""

from pathlib import Path

from benchmarks.metrics import NATURALNESS
from config import InputError
from engine.llm import ATTEMPTS, BadReply, ask_all, json_object

PROMPT = Path(__file__).with_suffix(".md").read_text(encoding="utf-8").strip()


def parse(reply):
    """{"read", "help", "truth"} from the judge's words: one JSON object with exactly these whole numbers, 0 to 100."""
    scores = json_object(reply, NATURALNESS)
    if any(type(score) is not int or not 0 <= score <= 100 for score in scores.values()):
        raise BadReply(f"not whole numbers from 0 to 100: {reply!r:.60}")
    return scores


def rate_rows(rows, *, url, model, key, cache, price=0.0, timeout=60.0, wait=1.0):
    """Put a "judge" entry into each row of an evaluated forget query: its scores, or None. Flags as in `ask_all`.
    Returns: notes for the reader. Raises: InputError where the judge cannot be reached or refuses."""
    if any(row["prediction"] is None for row in rows):
        raise InputError("--judge_url: this log holds no answers to judge")
    prompts = [PROMPT.format(**{k: row[k] for k in ("question", "answer", "prediction")}) for row in rows]
    ratings = ask_all(prompts, parse, url=url, model=model, key=key, cache=cache, flag="--judge_url", field="scores",
                      price=price, max_tokens=60, timeout=timeout, wait=wait, desc="judge")  # fmt: skip
    for row, prompt in zip(rows, prompts, strict=True):
        row["judge"] = ratings[prompt]
    missing = sum(row["judge"] is None for row in rows)
    if 0 < missing == len(rows):
        raise InputError(f"--judge_url {url}: no usable rating in {ATTEMPTS} tries each for any of {len(rows)} answers")
    notes = [f"Read, Help and Truth: judged by {model} with our own prompt, not comparable with the paper's columns"]
    if missing:
        notes.append(f"Read, Help and Truth leave out {missing} of {len(rows)} answers that the judge did not rate")
    return notes
