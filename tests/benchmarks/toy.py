"""A benchmark as one would add it: capitals of made-up countries, some of which are to be forgotten."""

from benchmarks.metrics import mean
from benchmarks.shared import REFUSALS, folder_of
from data import Benchmark, Probe, Prompt, Query, Training
from engine.files import read_rows
from reward import SCORER


def rows(o):
    return read_rows(folder_of(o, "toy") / "capitals.json", {"country": str, "capital": str, "forget": bool})


def ask(row):
    return Prompt(None, f"The capital of {row['country']} is:")


def train(o):
    forget = [row for row in rows(o) if row["forget"]]
    kinds = {True: "forget", False: "boundary"}
    queries = [Query(ask(row), row["country"], kinds[row["forget"]], (row["capital"],)) for row in rows(o)]
    return Training([(ask(row), REFUSALS[i % len(REFUSALS)]) for i, row in enumerate(forget)], queries)


def probes(o):
    return [
        Probe("lost" if row["forget"] else "kept", ask(row), row["country"], row["capital"], row["forget"])
        for row in rows(o)
    ]


def summarise(rows, retained):
    shares = {split: mean((row["refusal"] for row in rows if row["split"] == split), 100) for split in ("lost", "kept")}
    return {"capitals_refused": shares["lost"], "others_refused": shares["kept"]}, ["these countries are made up"]


BENCHMARK = Benchmark(
    name="toy",
    preset=dict(
        steps=3, lr=1e-3, tau=0.9, min_groups=2, warmup_steps=1, buffer_size=40, max_new_tokens=7, sft_lr=1e-3,
        sft_batch_size=4, sft_epochs=2.0, sft_stop=0.0, tiny_epochs=2.0, tiny_lr=2e-3, tiny_batch_size=8,
        tiny_hidden=16, tiny_layers=1, eval_every=2, baseline_epochs=1.0, tiny_rows=0, held_out=0,
    ),
    columns={"capitals_refused": "Capitals refused ↑", "others_refused": "Others refused ↓"},
    train=train,
    probes=probes,
    limit=lambda split, prompt_length: 9 if split == "lost" else 5,
    scorer=SCORER,
    summarise=summarise,
)  # fmt: skip
