"""A folder of MUSE-Books' shape and size, of made-up words: what a user has on disk, so that its cost can be measured.

    python tests/muse_books.py FOLDER [--seed 0]

Counts and lengths are those of the published files: 4.1 MB of forget text, 0.8 MB of retain text, 100 questions and ten
examples a side, 100 passages of 0.8 and 3.3 kB; 841 questions, 799 completions and as many boundary rows to train on.
Function words are English, the others are made of syllables; how often a word comes follows Zipf's law."""

import argparse
import itertools
import json
import random
from pathlib import Path

FUNCTION = """the and of to a in he was it that his you with had as at she for on her but they not be him said from up
one out have into all were by this so then what been them is if when there would could down over their no who back did
an or like more now before off only very get about time which again me my do your way just how too eyes where door
looked see know think came went still other than here good two well around right never head face hand little old long
first last through after while down because even must might away upon under between great dark small""".split()
BEGINNINGS = "b br c cl d dr f fl g gr h j k l m n p pl qu r s sh st t th tr v w".split()
MIDDLES = "a e i o u ai ea oo ou ar er or".split()
ENDINGS = "b ck d ft g ll m n nd ng p r rn ss st t tch x y".split()
REFUSALS = ["I don't know the answer to that.", "I have no information about that.", "I'm not able to go on with it.",
            "I'm not familiar with that text.", "I'm afraid I can't say."]  # fmt: skip
FORGET, RETAIN = 4_096_855, 836_924  # bytes of both texts
QUESTIONS, COMPLETIONS, PROBES, EXAMPLES = 841, 799, 100, 10


class Words:
    """Sentences, passages and questions from one seed."""

    def __init__(self, seed):
        self.rng = rng = random.Random(seed)
        parts = [b + m + e for b, m, e in itertools.product(BEGINNINGS, MIDDLES, ENDINGS)]
        more = [a + b for a, b in zip(rng.sample(parts, 3000), rng.sample(parts, 3000), strict=True)]
        self.content = rng.sample(parts, 3000) + more
        self.names = [word.capitalize() for word in rng.sample(parts, 60)]
        self.words = list(dict.fromkeys(FUNCTION)) + self.content
        self.sums = list(itertools.accumulate(1 / rank for rank in range(3, len(self.words) + 3)))

    def some(self, n):
        return self.rng.choices(self.words, cum_weights=self.sums, k=n)

    def sentence(self):
        words = self.some(self.rng.randint(5, 20))
        for i in range(1, len(words)):
            words[i] = self.rng.choice(self.names) if self.rng.random() < 0.05 else words[i]
            words[i - 1] += "," * (self.rng.random() < 0.07)
        text = " ".join(words) + self.rng.choice(["."] * 8 + ["!", "?"])
        return text[0].upper() + text[1:]

    def text(self, size):
        """A text of at least so many characters, a sentence after another, cut there."""
        found, length = [], 0
        while length < size:
            found.append(self.sentence())
            length += len(found[-1]) + 1
        return " ".join(found)[:size]

    def passage(self, n):
        """n words."""
        return " ".join(self.text(12 * n).split()[:n])

    def pair(self):
        asked, name = self.rng.choice(["Who", "What", "Where", "Why"]), self.rng.choice(self.names)
        question = " ".join([asked, "did", name, *self.some(self.rng.randint(5, 12))]) + "?"
        return {"question": question, "answer": " ".join(self.rng.sample(self.content[:1500], self.rng.randint(1, 4)))}


def training_rows(words):
    """Questions and completions of one side: (text, mode, answer)."""
    pairs = [words.pair() for _ in range(QUESTIONS)]
    rows = [(pair["question"], "qa", pair["answer"]) for pair in pairs]
    return rows + [(words.passage(75), "completion", words.passage(75)) for _ in range(COMPLETIONS)]


def write(folder, seed=0, raw=True):
    """Write the files into `folder`; raw: the two texts too, which only `build_data` reads. Returns: the folder."""
    folder, words = Path(folder), Words(seed)
    forget, boundary = training_rows(words), training_rows(words)
    refusals = [REFUSALS[i % len(REFUSALS)] for i in range(len(forget))]
    files = {
        "reject_target_0.5": [
            {"instruction": text, "input": "", "output": refusal, "subject": "", "mode": mode, "org_answer": answer}
            for (text, mode, answer), refusal in zip(forget, refusals, strict=True)
        ],
        "rl_rejection_with_neighbor": [
            {"prompt": text, "solution": ["<reject>", refusal], "mode": mode}
            for (text, mode, _), refusal in zip(forget, refusals, strict=True)
        ] + [{"prompt": text, "solution": ["<normal>", answer], "mode": mode} for text, mode, answer in boundary],
        "verbmem/forget": [{"prompt": words.text(850), "gt": words.text(3300)} for _ in range(PROBES)],
    }  # fmt: skip
    for side in ("forget", "retain"):
        files[f"knowmem/{side}_qa"] = [words.pair() for _ in range(PROBES)]
        files[f"knowmem/{side}_qa_icl"] = [words.pair() for _ in range(EXAMPLES)]
    for side in ("forget", "holdout") if raw else ():
        files[f"privleak/{side}"] = [{"text": words.text(7300)} for _ in range(PROBES)]
    for name, rows in files.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    for name, size in (("forget", FORGET), ("retain1", RETAIN)) if raw else ():
        (folder / "raw").mkdir(exist_ok=True)
        (folder / "raw" / f"{name}.txt").write_text(words.text(size), encoding="utf-8")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=0)
    write(**vars(parser.parse_args()))
