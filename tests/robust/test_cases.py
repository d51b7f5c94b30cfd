"""Three hundred fresh cases, drawn by a seed: each command on an input that is bad in a known way, or good.

    python -m pytest -m long tests/robust/test_cases.py -s      # prints the counts

Counted are those that end well (code 0 and a result that can be read), are refused (code 2, one line, nothing written),
end in a traceback, are taken in silence though they are bad, or lose a file that was there before."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from attacked import build_data, ended, evaluate, rerule
from made import TRAIN, byte_tokenizer, make_model, tree
from orla import FACTS

torch.set_num_threads(1)
SMALL = (
    "--model tiny --tiny_epochs 1 --tiny_hidden 8 --tiny_layers 1 --sft_steps 1 --sft_stop 0 --steps 1 "
    "--prompts_per_step 2 --group_size 2 --max_new_tokens 2 --save_every 0 --min_groups 1 --replay_groups 1 "
    "--warmup_steps 0 --baseline_epochs 1 --baseline_batch_size 2"
).split()
HALF, DEEP = "\ud800", "[" * 100_000
TEXTS = ["", " \n", HALF, None, 7, 0.5, True, [], ["x"], {"a": 1}, float("nan")]  # none is a text
NUMBERS = ["nan", "inf", "-1e9", "1e300", "x", "", "1e-300", "9" * 50]  # none is within any bounds
FLAGS = [
    "lr",
    "temperature",
    "tau",
    "sft_lr",
    "epsilon_low",
    "max_grad_norm",
    "tiny_lr",
    "baseline_lr",
    "beta",
    "sft_stop",
    "sft_epochs",
    "tiny_epochs",
    "max_perplexity",
    "sga_r",
    "min_share",
    "forget_weight",
    "lora_alpha",
]
COUNTS = [
    "steps",
    "group_size",
    "buffer_size",
    "min_groups",
    "replay_groups",
    "max_new_tokens",
    "tiny_hidden",
    "seed",
    "prompts_per_step",
    "warmup_steps",
    "eval_batch_size",
    "max_tokens",
    "sft_batch_size",
    "redraw",
    "max_age",
]
FREE = {"input", "subject", "mode", "intro", "org_answer", "level", "type"}  # fields that may hold anything, or miss
SHARES = ("tau", "sft_stop", "epsilon_low", "sga_r", "min_share")  # which may be next to nothing
METHODS = [
    "rule",
    "rerule",
    "ga",
    "npo_gdr",
    "po",
    "dpo_rt",
    "simnpo_klr",
    "llmu",
    "task_vector",
    "whp",
    "flat",
    "sga",
    "purge",
    "mismatch",
]


class Case:
    """One case: `argv` of a command, whether it is bad, and where it writes."""

    def __init__(self, number, place, model, log):
        self.rng, self.place, self.model, self.log = random.Random(f"case {number}"), place, model, log
        self.benchmark = self.rng.choice([*TRAIN])
        self.data = TRAIN[self.benchmark](place / "data")
        families = [
            self.flag,
            self.row,
            self.bytes_,
            self.model_file,
            self.from_log,
            self.build,
            self.good,
            self.output,
        ]
        self.bad, self.out = True, place / "out"
        self.command, self.argv = self.rng.choice(families)()

    def asked(self, *more, command=None):
        command = command or self.rng.choice([rerule, evaluate])
        argv = ["--benchmark", self.benchmark, "--data_dir", self.data]
        if command is rerule:
            return command, [*argv, *SMALL, "--method", self.rng.choice(METHODS), "--output_dir", self.out, *more]
        return command, [*argv, "--model", self.model, "--max_new_tokens", 1, "--output", self.out, *more]

    def flag(self):
        """A flag's value out of its bounds."""
        if self.rng.random() < 0.5:
            name, value = self.rng.choice(FLAGS), self.rng.choice(NUMBERS)
            value = "-1" if value == "1e-300" and name in SHARES else value
            return self.asked(f"--{name}={value}", command=rerule)
        return self.asked(f"--{self.rng.choice(COUNTS)}={self.rng.choice([*NUMBERS, '1.5', '-1'])}", command=rerule)

    def row(self):
        """A field of one row that is no text."""
        path = self.rng.choice(sorted(self.data.rglob("*.json")))
        text = path.read_text()
        rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
        row = rows[-1]
        field = self.rng.choice(sorted(row.keys() - FREE))
        if isinstance(row[field], list) and self.rng.random() < 0.5:
            row[field][-1] = self.rng.choice(TEXTS)
        elif self.rng.random() < 0.2:
            del row[field]
        else:
            row[field] = self.rng.choice([v for v in TEXTS if v != ["x"] or not isinstance(row[field], list)])
        path.write_text(json.dumps(rows))
        self.what = f"{path.name} {field} {row.get(field)!r:.30}"
        return self.asked(command=rerule)

    def bytes_(self):
        """A file that is no JSON, or is not there."""
        path = self.rng.choice(sorted(self.data.rglob("*.json")))
        text = path.read_bytes()
        damage = [
            b"",
            b"\xff" + text,
            text[: len(text) // 2],
            DEEP.encode(),
            b"9" * 5000,
            text + b"{",
            b"null",
            b"[[]]",
        ]
        if self.rng.random() < 0.15:
            path.unlink()
        else:
            path.write_bytes(self.rng.choice(damage))
        return self.asked(command=rerule)

    def model_file(self):
        """A model's folder with a file that is damaged or gone."""
        self.model = Path(shutil.copytree(self.model, self.place / "model"))
        path = self.model / self.rng.choice(["config.json", "tokenizer.json", "model.safetensors"])
        if self.rng.random() < 0.2:
            path.unlink()
        else:
            text = path.read_bytes()
            path.write_bytes(self.rng.choice([b"", text[: len(text) // 2], b"\x80\x04" + text, b"[]", DEEP.encode()]))
        command, argv = self.asked()
        return command, [*argv, "--model", self.model, "--method", "rule"] if command is rerule else argv

    def from_log(self):
        """A log with a value that is none."""
        rows = [dict(row) for row in self.log["per_example"]]
        field = self.rng.choice(
            ["split", "rouge_l_recall", "rouge_l_f1", "refusal", "leak", "truncated", "forget", "answer_loss"]
        )
        wrong = ["0.5", [], {}, 7, float("inf"), -0.5]
        self.rng.choice([row for row in rows if row["split"] == "forget"])[field] = self.rng.choice(wrong[:5])
        if field == "answer_loss":
            rows[0][field] = self.rng.choice(wrong[:3])
        (self.place / "log.json").write_text(json.dumps(self.log | {"per_example": rows}))
        return evaluate, ["--benchmark", "tofu", "--from_log", self.place / "log.json", "--output", self.out]

    def build(self):
        """Questions to build from, good or with a field that is none."""
        rows = [{"question": q, "answer": a} for q, a in FACTS]
        near = [{"name": "Ben Roth", "answers": {q: f"Roth's {i}" for i, (q, _) in enumerate(FACTS)}}]
        self.bad = self.rng.random() < 0.8
        if self.bad:
            self.rng.choice(rows)[self.rng.choice(["question", "answer"])] = self.rng.choice(TEXTS)
        for name, value in (("ask", rows), ("near", near)):
            (self.place / f"{name}.json").write_text(json.dumps(value))
        return build_data, [
            "--source",
            "qa",
            "--input",
            self.place / "ask.json",
            "--target",
            "Orla Finch",
            "--neighbours",
            self.place / "near.json",
            "--output_dir",
            self.out,
        ]

    def good(self):
        """Nothing wrong: unusual values within their bounds."""
        self.bad = False
        more = self.rng.choice(
            [
                ["--temperature", 1e-9],
                ["--lr", 1e6, "--max_grad_norm", 1e6],
                ["--seed", -5],
                ["--tau", 0],
                ["--kl_coef", 0],
                ["--ratio_level", "token"],
                ["--group_size", 3, "--no_unbiased"],
                ["--max_tokens", 1],
                ["--baseline_lr", 1e6],
                ["--replay_store", "random"],
                ["--weight_decay", 1e6],
                ["--lora_rank", 2],
                ["--tiny_lr", 1e6],
                ["--steps", 0],
            ]
        )
        return self.asked(*more, command=rerule)

    def output(self):
        """A place that cannot be written to, or holds another's work."""
        kind = self.rng.choice(["file in the way", "thesis", "long"])
        command, argv = self.asked()
        if kind == "long":
            argv[argv.index(self.out)] = self.place / ("n" * 300)
        elif command is evaluate or kind == "thesis":
            self.out.mkdir()
            (self.out / "thesis").write_text("years of work")
        else:
            self.out.write_text("years of work")
        return command, argv

    def result(self):
        """What became of it, and what was said."""
        before = tree(self.place)
        try:
            done = ended(self.command, *self.argv)
        except Exception as error:
            return "traceback", repr(error)
        after = tree(self.place)
        if any(after.get(path) != text for path, text in before.items() if text is not None):
            return "loss", done.err
        if done.code == 0:
            made = self.out if self.out.is_file() else next((self.out / n for n in ("table.json", "build.json")), None)
            json.loads(made.read_text()) if made and made.exists() else None
            return ("silent" if self.bad else "clean"), done.err[-300:]
        done.line(most=7000)
        if {path for path in after if path not in before}:
            return "half-written", done.err
        return ("refused" if self.bad else "refused though good"), done.err


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A model and a log of it on TOFU."""
    place = tmp_path_factory.mktemp("good")
    make_model(context=2048).save_pretrained(place / "model")
    byte_tokenizer().save_pretrained(place / "model")
    argv = ["--benchmark", "tofu", "--data_dir", TRAIN["tofu"](place / "tofu"), "--model", place / "model"]
    assert ended(evaluate, *argv, "--max_new_tokens", 1, "--output", place / "log.json").code == 0
    return place / "model", json.loads((place / "log.json").read_text())


@pytest.mark.parametrize("n", [12, pytest.param(300, marks=pytest.mark.long)])
def test_fresh_cases(good, tmp_path, n):
    counts, told = Counter(), []
    for number in range(n):
        case = Case(number, tmp_path / str(number), *good)
        try:
            what, said = case.result()
        except AssertionError as error:
            what, said = "more than a line", str(error)
        counts[what] += 1
        if what not in ("clean", "refused"):
            told.append(
                f"{number} {case.command.__name__} {what}: {getattr(case, 'what', case.argv[-4:])} {said[:400]}"
            )
        shutil.rmtree(tmp_path / str(number))
    print(dict(counts), *told, sep="\n")
    assert set(counts) <= {"clean", "refused"}, told
