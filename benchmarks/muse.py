"""MUSE-Books: RULE's training files, raw prompts with ten examples, VerbMem, KnowMem and Utility (Eq. 21–23).

Deviations
- It is always prompted as raw text with ten examples, as officially. Forget examples open forget prompts, retain
  examples the others, as in RULE's files: a cue for a model.
- KnowMem and Utility are ROUGE-L F1, as MUSE's code reports; Appendix C only says ROUGE.
- VerbMem's prompt is the text itself and does not stop at a newline, as in MUSE's own script; RULE's does both."""

import re

from rouge_score import rouge_scorer

from benchmarks.metrics import mean
from benchmarks.shared import MODES, PRESET, TINY, folder_of, rule_training
from data import Benchmark, Probe, Prompt
from engine.files import read_rows


def muse_prompt(examples, question, mode="qa"):
    """MUSE's raw prompt: in-context pairs joined by blank lines, then the question or the text to complete."""
    shots = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in examples)
    return Prompt(None, f"{shots}{MODES[mode]}: {question}\nAnswer: ")


def muse_examples(folder, side):
    """The ten in-context question–answer pairs of MUSE's `knowmem/<side>_qa_icl.json`."""
    return read_rows(folder / "knowmem" / f"{side}_qa_icl.json", {"question": str, "answer": str})[:10]


def train(o):
    """RULE's files, each row with its `mode`."""
    folder = folder_of(o, "muse")
    shots = {side: muse_examples(folder, side) for side in ("forget", "retain")}

    def prompt(text, row):
        side = "retain" if row.get("solution", [""])[0] == "<normal>" else "forget"
        return muse_prompt(shots[side], text, row.get("mode", "qa"))

    stage1, stage2 = folder / "reject_target_0.5.json", folder / "rl_rejection_with_neighbor.json"
    return rule_training(stage1, stage2, prompt, newline_stops=True)


def probes(o):
    """VerbMem's texts, then KnowMem's and Utility's questions."""
    folder = folder_of(o, "muse")
    rows = read_rows(folder / "verbmem" / "forget.json", {"prompt": str, "gt": str})
    found = [Probe("verbmem", Prompt(None, row["prompt"]), row["prompt"], row["gt"], True) for row in rows]
    for side, split in (("forget", "knowmem"), ("retain", "utility")):
        shots = muse_examples(folder, side)
        for row in read_rows(folder / "knowmem" / f"{side}_qa.json", {"question": str, "answer": str}):
            prompt = muse_prompt(shots, row["question"])
            found.append(Probe(split, prompt, row["question"], row["answer"], side == "forget"))
    return found


def membership(o, probes):
    """MUSE's texts for PrivLeak: lists of strings, or rows with a text."""
    files = {side: folder_of(o, "muse") / "privleak" / f"{side}.json" for side in ("forget", "holdout")}
    rows = {side: read_rows(path, {"text": str}, text_of="text") for side, path in files.items()}
    return {side: [(None, row["text"]) for row in own] for side, own in rows.items()}, ""


def summarise(rows, retained):
    """MUSE's columns, ×100."""
    sets = {name: [row["rouge_l_f1"] for row in rows if row["split"] == name] for name in BENCHMARK.columns}
    return {name: mean(f1, 100) for name, f1 in sets.items()}, []  # Eq. 21, Eq. 22, Eq. 23


BENCHMARK = Benchmark(
    name="muse", hub="muse-bench/MUSE-Books",
    preset=PRESET | dict(steps=187, tau=0.4, min_groups=500, warmup_steps=26, tiny_epochs=40.0),
    tiny=TINY | dict(lr=2e-4, max_new_tokens=64, steps=37, warmup_steps=15, tiny_rows=100),
    columns={"verbmem": "VerbMem ↓", "knowmem": "KnowMem ↓", "utility": "Utility ↑"},
    train=train, probes=probes, membership=membership, prompt_tokens=512,
    limit=lambda split, prompt_length: 128 if split == "verbmem" else 32,
    cut=lambda split, text: text if split == "verbmem" else re.split("\n\n|\nQuestion|Question:", text)[0],
    continued=("verbmem",),  # BOS among the tokens, as in MUSE's script
    scorer=rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False), summarise=summarise,
)  # fmt: skip
