"""MUSE-Books: RULE's training files, raw prompts with ten examples, VerbMem, KnowMem and Utility (Eq. 21–23).

Deviations
- It is always prompted as raw text with its ten in-context examples, chat template or not, as its official evaluation
  does. Forget examples open forget prompts, retain examples the others.
- KnowMem and Utility are ROUGE-L F1, as MUSE's code reports; Appendix C only says ROUGE.
- VerbMem's prompt is the text itself and does not stop at a newline, as in MUSE's own script; RULE's does both.
"""

from rouge_score import rouge_scorer

from benchmarks.metrics import cut_at, mean
from benchmarks.shared import MODES, answered, folder_of, query_rows, refusal_rows
from data import Benchmark, Probe, Prompt, Training
from engine.files import read_rows

CUTS = ("\n\n", "\nQuestion", "Question:")


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

    def stage1(row):
        return muse_prompt(shots["forget"], row["instruction"], row.get("mode", "qa"))

    def stage2(row):
        side = "forget" if row["solution"][0] == "<reject>" else "retain"
        return muse_prompt(shots[side], row["prompt"], row.get("mode", "qa"))

    refusals = folder / "reject_target_0.5.json"
    queries = query_rows(folder / "rl_rejection_with_neighbor.json", stage2)
    return Training(refusal_rows(refusals, stage1), answered(queries, refusals), newline_stops=True)


def probes(o):
    """VerbMem's texts, then KnowMem's and Utility's questions."""
    folder = folder_of(o, "muse")
    found = [
        Probe("verbmem", Prompt(None, row["prompt"]), row["prompt"], row["gt"], True)
        for row in read_rows(folder / "verbmem" / "forget.json", {"prompt": str, "gt": str})
    ]
    for side, split in (("forget", "knowmem"), ("retain", "utility")):
        shots = muse_examples(folder, side)
        for row in read_rows(folder / "knowmem" / f"{side}_qa.json", {"question": str, "answer": str}):
            prompt = muse_prompt(shots, row["question"])
            found.append(Probe(split, prompt, row["question"], row["answer"], side == "forget"))
    return found


def summarise(rows, retained):
    """MUSE's columns, ×100."""

    def f1(split):
        return mean((row["rouge_l_f1"] for row in rows if row["split"] == split), 100)

    table = {"verbmem": f1("verbmem"), "knowmem": f1("knowmem"), "utility": f1("utility")}  # Eq. 21, Eq. 22, Eq. 23
    return table, []


BENCHMARK = Benchmark(
    name="muse",
    preset=dict(
        steps=187, lr=2e-6, tau=0.4, min_groups=500, warmup_steps=26, buffer_size=1200, max_new_tokens=1024,
        sft_lr=4e-7, sft_batch_size=8, sft_epochs=3.0, sft_stop=0.0, tiny_epochs=20.0, tiny_lr=2e-3, tiny_batch_size=32,
        tiny_hidden=128, tiny_layers=3, eval_every=0, baseline_epochs=5.0,
    ),
    tiny=dict(
        sft_lr=2e-4, sft_batch_size=32, sft_epochs=20.0, sft_stop=0.97, min_groups=16, lr=2e-4, max_new_tokens=64,
        steps=37, warmup_steps=15,
    ),
    columns={"verbmem": "VerbMem ↓", "knowmem": "KnowMem ↓", "utility": "Utility ↑"},
    train=train,
    probes=probes,
    prompt_tokens=512,
    limit=lambda split, prompt_length: 128 if split == "verbmem" else 32,
    cut=lambda split, text: cut_at(text, CUTS) if split in ("knowmem", "utility") else text,
    # the first tokens of the true continuation, BOS among them as in MUSE's script
    reference=lambda split, answer, cut_tokens: cut_tokens(answer) if split == "verbmem" else answer,
    scorer=rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False),
    summarise=summarise,
)  # fmt: skip
