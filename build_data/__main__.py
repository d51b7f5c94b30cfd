"""Makes the files that Stage 1 and Stage 2 read, for any target: from a benchmark's files, questions, or a text.

Covers Appendix A: refusals for questions (Type II) and completions (Type I), and boundary queries that ask the same of
a permitted neighbour. A language model at any OpenAI-compatible URL writes them; without one, the rules of `rewrite.py`
do, and every row says so ("made_by"). A benchmark's evaluation files are copied."""

import os
import random
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import benchmarks
from benchmarks.associated import questions, seen_alone
from benchmarks.metrics import words
from build_data.queries import Check, find_neighbours, hold_out, training_rows
from build_data.rewrite import complete_all, language_model, normal
from build_data.sources import EVALUATION, FILES, evaluation_queries, neighbours_path, read_facts, read_neighbours
from config import Above0, Count, From0, InputError, Natural, Seed, setting
from data import Query
from engine.files import is_writable, printable, read_rows, save_folder, write_json
from engine.flags import check_bounds, parse, run_command
from engine.llm import reach
from engine.seeds import derive_seed


@dataclass
class Options:
    """Make training data for any target: refusals, completions, boundary queries."""

    source: Literal["tofu", "rwku", "muse", "qa", "text"] = field(metadata={"help": "What --input is."})
    input: str = field(metadata={"help": "A benchmark's folder, rows of question and answer (qa), or a plain text."})
    output_dir: str = field(metadata={"help": "Folder to make; rerule.py and evaluate.py take it as --data_dir."})
    target: str = setting("What is to be forgotten. TOFU's authors are found by rule.", "")
    aliases: list[str] = setting("Its other names, which no boundary query may hold.", [])
    neighbours: str = setting("Permitted rows or text (docs/data.md). [TOFU: retain99, MUSE: raw/retain1.txt]", "")
    llm_url: str = setting("Any OpenAI-compatible URL, as http://localhost:8000/v1; 'none' for rules alone.", "none")
    llm_model: str = setting("The model's name there.", "")
    llm_key_env: str = setting("Environment variable that holds its key.", "LLM_API_KEY")
    llm_timeout: Above0 = setting("Seconds to wait for one reply.", 60.0)
    llm_price: From0 = setting("Dollars per million tokens, to show the cost beforehand.", 0.0)
    sample: Count = setting("Texts: at most this many facts, drawn by seed, are kept.", 841)
    held_out: Annotated[float, "a share between 0 and 1", lambda x: 0 < x < 1] = setting(
        "qa, text: share of the facts kept out of training, for evaluation.", 0.2
    )
    associated: Natural = setting("Questions on names in forget prompts alone, for rerule.py --associated.", 0)
    seed: Seed = setting("Seed of every draw.", 0)


def check_options(o):
    """Raise InputError for flags that are wrong or do not go together, before anything is read."""
    check_bounds(o)
    for wrong, message in (
        (not words(o.target) and (o.target or o.source != "tofu"),
         f"--target {o.target!r}: expected the name of what is to be forgotten"),
        (not all(map(words, o.aliases)), "--aliases: expected names with letters in them"),
        ((o.llm_url != "none") != bool(o.llm_model), "--llm_url and --llm_model go together"),
        (o.source in EVALUATION and not Path(o.input).is_dir(), f"--input {Path(o.input)}: no such folder"),
        (o.llm_url == "none" and not neighbours_path(o),
         f"--neighbours: --source {o.source} needs it without an LLM, permitted rows or a text"),
    ):  # fmt: skip
        if wrong:
            raise InputError(message)
    if o.llm_url != "none":
        reach(o.llm_url, "--llm_url")


def check_folder(o, folder):
    """The output folder must be new, empty, or hold what this very command made before, and nothing else."""
    here = f"--output_dir {folder}"
    if not folder.name or not is_writable(folder) or not is_writable(folder.with_name(folder.name + ".tmp")):
        raise InputError(f"{here}: expected a folder that can be made or written to")
    holds = "something else" if folder.exists() and any(folder.iterdir()) else ""
    if (folder / "build.json").is_file():
        made = read_rows(folder / "build.json", {"settings": dict, "files": list})[0]
        changed = [name for name, value in settings_of(o).items() if made["settings"].get(name) != value]
        others = files_in(folder) - {*made["files"], "build.json"}
        holds = f"other data ({changed[0]} differs)" if changed else f"{min(others)} as well" if others else ""
    if holds:
        raise InputError(f"{here}: holds {holds}; choose another folder")


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def settings_of(o):
    """The settings that the data depend on."""
    free = ("output_dir", "llm_url", "llm_key_env", "llm_timeout", "llm_price")
    return {name: value for name, value in asdict(o).items() if name not in free}


def make(o, ask):
    """({file name: rows} without the benchmark's own files, all queries, what `build.json` says of them)."""
    evaluated, rejected = evaluation_queries(o), []
    gone = [name for name in (o.target, *o.aliases) if name]
    neighbours = read_neighbours(o, gone, rejected)
    facts = complete_all(read_facts(o, ask, rejected), ask, o.llm_model)
    gone = list(dict.fromkeys([*gone, *(fact.name for fact in facts if fact.name)]))
    check = Check(gone, evaluated, ("forget",) if o.source == "tofu" else (), rejected)
    forget = check.let_in("forget", facts)
    found = find_neighbours(o, facts, neighbours, ask, check)
    boundary = check.let_in("boundary", found)
    files, held = ({}, []) if o.source in EVALUATION else hold_out(o, facts, found, check)
    forget, boundary = ([item for i, item in items if i not in held] for items in (forget, boundary))
    if not forget or not boundary:
        raise InputError(f"--input {o.input}: no {'boundary' if forget else 'forget'} query is left")
    items, modes = {"forget": forget, "boundary": boundary}, {"qa": "questions", "completion": "completions"}
    rows = [{"kind": kind, **item._asdict()} for kind in items for item in items[kind]]
    counts = {f"{k}, {modes[m]}": sum(item.mode == m for item in items[k]) for k in items for m in modes}
    alone = seen_alone([Query(None, row["query"], row["kind"]) for row in rows], gone)
    asked = [text for text in questions(alone) if normal(text) not in evaluated][: o.associated]
    replies = ask("associated", [{"question": text} for text in asked]) if ask else [{}] * len(asked)
    asked = [{"question": text} | (reply or {}) for text, reply in zip(asked, replies, strict=True)]
    files |= {"associated.json": asked} if asked else {}
    files |= zip(FILES.get(o.source, FILES["others"]), training_rows(forget, boundary, o.seed), strict=True)
    return files, rows, {
        "settings": settings_of(o),
        "made_with": o.llm_model or "rules alone, no language model",
        "counts": counts | {"facts held out": len(held)},
        "made_by": dict(Counter(row["made_by"] for row in rows)),
        "rejected": dict(Counter(row["reason"] for row in rejected)),
        "sample": random.Random(derive_seed(o.seed, "sample rows")).sample(rows, min(10, len(rows))),
        "rejects": rejected,
    }  # fmt: skip


def overlap(probes, queries):
    """{split of the evaluation: its queries, and how many of them are forget and boundary queries of training}."""
    known, asked = {(query["kind"], normal(query["query"])) for query in queries}, {}
    for probe in probes:
        asked.setdefault(probe.split, []).append(normal(probe.question))
    kinds = ("forget", "boundary")
    return {split: {"queries": len(forms), **{kind: sum((kind, form) in known for form in forms) for kind in kinds}}
            for split, forms in asked.items()}  # fmt: skip


def show(report):
    """The report in words: counts, rejects by reason, overlap, ten random rows."""
    print(f"made with {report['made_with']}")
    for title in ("counts", "made_by", "rejected"):
        print(f"{title}: " + ("; ".join(f"{name} {n}" for name, n in report[title].items()) or "none"))
    print("overlap with the evaluation (its queries / as forget / as boundary queries of training):")
    print("  " + "; ".join(f"{split} {' / '.join(map(str, n.values()))}" for split, n in report["overlap"].items()))
    for row in report["sample"]:
        print(f"  {row['kind']:>8}  {printable(row['query'])} → {row['answer']!r:.60}  [{row['made_by']}]")


def main(argv=None):
    o = parse(Options, argv)
    folder = Path(os.path.abspath(o.output_dir))  # so that even "." has a name
    benchmark = {"qa": "rwku", "text": "rwku"}.get(o.source, o.source)  # the form written
    check_options(o)
    check_folder(o, folder)
    files, queries, report = make(o, language_model(o, folder))

    def fill(temporary):
        for path in (path for pattern in EVALUATION.get(o.source, []) for path in Path(o.input).glob(pattern)):
            place = temporary / path.relative_to(o.input)
            place.parent.mkdir(exist_ok=True)
            shutil.copy(path, place)
        for name, rows in files.items():
            write_json(temporary / name, rows)
        made, flags = benchmarks.ALL[benchmark], SimpleNamespace(data_dir=str(temporary), seed=o.seed)
        made.train(flags)  # it can be trained on
        report["overlap"] = overlap(made.probes(flags), queries)  # and evaluated
        report["files"] = sorted(files_in(temporary))
        write_json(temporary / "build.json", report)

    try:
        save_folder(folder, fill)
    finally:
        shutil.rmtree(folder.with_name(folder.name + ".tmp"), ignore_errors=True)
    show(report)
    print(f"{folder}: python rerule.py --benchmark {benchmark} --data_dir {folder}")


if __name__ == "__main__":
    run_command(main)
