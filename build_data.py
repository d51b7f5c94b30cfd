"""Makes the files that Stage 1 and Stage 2 read, for any target: from a benchmark's files, questions, or a text.

Covers Appendix A: refusals for questions (Type II) and completions (Type I), and boundary queries that ask the same of
a permitted neighbour. A language model at any OpenAI-compatible URL writes them; without one, the rules of `rewrite.py`
do, and every row says so ("made_by"). `python build_data.py --help`.

Deviations
- A language model is asked for one thing at a time, in our own words: three question-answer pairs of a passage, the
  completion of a question, the neighbour of a question with its answer.
- Neighbours come first from the user (`--neighbours`), answers and all; else from the language model; without one from
  TOFU's retain rows or MUSE's retain text. The rules never invent an answer.
- A benchmark's evaluation files are copied. For `qa` and `text` a share of the facts is held out of training for them,
  with its neighbours, and every fact is asked again in a phrasing that training never uses.
- Type I for MUSE are first halves of passages, as raw text is what was trained on; elsewhere statements with a gap.
"""

import os
import random
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import config
from config import setting
from data import load_benchmark
from files import InputError, derive_seed, exit_on_input_error, read_rows, save_folder, write_json
from llm import ask_all
from metrics import words
from probes import load_probes
from refusal import is_refusal
from rewrite import (
    NEIGHBOUR,
    NOT_WANTED,
    PHRASINGS,
    Fact,
    complete_all,
    found_names,
    match,
    parse_neighbour,
    swap,
)
from run import is_writable
from sources import evaluation_queries, neighbours_path, normal, read_facts, read_neighbours
from wordings import refusals

BENCHMARK = {"tofu": "tofu", "rwku": "rwku", "muse": "muse", "qa": "rwku", "text": "rwku"}  # the form written
STAGE1 = {"rwku": "reject_target.json", "tofu": "reject_target.json", "muse": "reject_target_0.5.json"}
STAGE2 = {"rwku": "rl_rejection_with_fb_neighbor.json", "muse": "rl_rejection_with_neighbor.json"}
STAGE2["tofu"] = STAGE2["rwku"]
EVALUATION = {  # what evaluation reads, copied
    "rwku": ["intro.json", "forget_level?.json", "neighbor_level?.json"],
    "tofu": ["forget01.json", "retain99.json", "*_perturbed.json"],
    "muse": ["knowmem/*.json", "verbmem/*.json"],
}
REPLY_TOKENS = 400


@dataclass
class Options:
    """Make training data for any target: refusals, completions, boundary queries."""

    source: Literal["tofu", "rwku", "muse", "qa", "text"] = field(
        metadata={"help": "A benchmark's folder, JSON rows of question and answer (qa), or a plain text."}
    )
    input: str = field(metadata={"help": "The folder or file."})
    output_dir: str = field(metadata={"help": "Folder to make; rerule.py and evaluate.py take it as --data_dir."})
    target: str = setting("What is to be forgotten. TOFU's authors are found by rule.", "")
    aliases: list[str] = setting("Its other names, which no boundary query may hold.", [])
    neighbours: str = setting(
        "What stays permitted: JSON rows of question and answer (and name), of name and answers ({forget question: "
        "answer}), or of name alone (for an LLM); or a text. Unless given: TOFU's retain99, MUSE's raw/retain1.txt.",
        "",
    )
    llm_url: str = setting("Any OpenAI-compatible URL, as http://localhost:8000/v1; 'none' for rules alone.", "none")
    llm_model: str = setting("The model's name there.", "")
    llm_key_env: str = setting("Environment variable that holds its key.", "LLM_API_KEY")
    llm_timeout: float = setting("Seconds to wait for one reply.", 60.0)
    llm_price: float = setting("Dollars per million tokens, to show the cost beforehand.", 0.0)
    sample: int = setting("Texts: at most this many facts, drawn by seed, are kept.", 841)
    held_out: float = setting("qa, text: share of the facts kept out of training, for evaluation.", 0.2)
    seed: int = setting("Seed of every draw.", 0)


def check_options(o):
    """Raise InputError for flags that are wrong or do not go together, before anything is read."""
    if not words(o.target) and (o.target or o.source != "tofu"):
        raise InputError(f"--target {o.target!r}: expected the name of what is to be forgotten")
    if not all(words(alias) for alias in o.aliases):
        raise InputError("--aliases: expected names with letters in them")
    if (o.llm_url != "none") != bool(o.llm_model):
        raise InputError("--llm_url and --llm_model go together")
    if o.llm_url != "none" and not o.llm_url.startswith(("http://", "https://")):
        raise InputError(f"--llm_url {o.llm_url}: expected http://… or https://…, or none")
    if not 0 < o.held_out < 1:
        raise InputError(f"--held_out {o.held_out}: expected a share between 0 and 1")
    if o.sample < 1 or o.llm_timeout <= 0:
        raise InputError("--sample and --llm_timeout: expected numbers above 0")
    source = Path(o.input)
    if o.source in EVALUATION and not source.is_dir():
        raise InputError(f"--input {source}: no such folder")
    if o.llm_url == "none" and not neighbours_path(o):
        raise InputError(f"--neighbours: --source {o.source} needs it without an LLM, permitted rows or a text")
    check_folder(o, output_folder(o))


def check_folder(o, folder):
    """The output folder must be new, empty, or hold what this very command made before, and nothing else."""
    here = f"--output_dir {folder}"
    if not folder.name or not is_writable(folder) or not is_writable(folder.with_name(folder.name + ".tmp")):
        raise InputError(f"{here}: expected a folder that can be made or written to")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / "build.json").is_file():
        raise InputError(f"{here}: holds something else; choose another folder")
    made = read_rows(folder / "build.json", {"settings": dict, "files": list})[0]
    changed = [name for name, value in settings_of(o).items() if made["settings"].get(name) != value]
    if changed:
        raise InputError(f"{here}: holds other data ({changed[0]} differs); choose another folder")
    others = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    others -= {*made["files"], "build.json"}
    if others:
        raise InputError(f"{here}: holds {min(others)} as well; choose another folder")


def output_folder(o):
    return Path(os.path.abspath(o.output_dir))  # so that even "." has a name to put a temporary folder beside


def settings_of(o):
    """The settings that the data depend on."""
    free = ("output_dir", "llm_url", "llm_key_env", "llm_timeout", "llm_price")
    return {name: value for name, value in asdict(o).items() if name not in free}


# --- what is made ----------------------------------------------------------------------------------------------------


@dataclass
class Item:
    """One query with what it is to be answered, as it goes into the files."""

    query: str
    answer: str
    name: str
    mode: str  # "qa" (Type II) or "completion" (Type I)
    made_by: str


class Check:
    """What a query must not be; keeps count of what it has turned away and of what it has let in.

    gone: names that no boundary query or answer may hold; evaluated: {normal form: split} of evaluation's queries;
    free: splits that forget queries may share (TOFU evaluates on the questions that it trains on).
    """

    def __init__(self, gone, evaluated, free, rejected):
        self.gone, self.evaluated, self.free = gone, evaluated, free
        self.forget, self.boundary, self.rejected = set(), set(), rejected

    def reject(self, reason, text):
        self.rejected.append({"reason": reason, "text": text})

    def lets_in(self, kind, item):
        """Whether the item passes as a "forget" or "boundary" query; it is then remembered, else rejected."""
        form, said = normal(item.query), f"{item.query} {item.answer}"
        split = self.evaluated.get(form)
        if not form:
            reason = f"{kind}: no usable {item.mode} came"
        elif split and not (kind == "forget" and split in self.free):
            reason = f"{kind}: an evaluation query"
        elif form in self.forget:
            reason = "forget: twice" if kind == "forget" else "boundary: a forget query"
        elif kind == "forget":
            reason = ""
        elif form in self.boundary:
            reason = "boundary: twice"
        elif not normal(item.answer):
            reason = "boundary: no answer known"
        elif found_names(said, self.gone):
            reason = "boundary: still names the target"
        else:
            reason = "boundary: its answer reads as a refusal" if is_refusal(item.answer) else ""
        if reason:
            self.reject(reason, item.query or item.name)
        else:
            (self.forget if kind == "forget" else self.boundary).add(form)
        return not reason


def items_of(fact):
    """The question of a fact, and its completion unless none is wanted."""
    question = Item(fact.question, fact.answer, fact.name, "qa", fact.made_by)
    completion = Item(fact.completion, fact.ending, fact.name, "completion", fact.completed_by)
    return [question] if fact.completed_by == NOT_WANTED else [question, completion]


def find_neighbours(o, facts, neighbours, ask, check):
    """For each fact to forget the fact of a permitted neighbour that asks the same, or None (A.2)."""
    permitted, bare, ends = neighbours
    write = ask and not (permitted and o.neighbours)  # the user's own answers come before a language model's
    if write:
        some = f", one of {', '.join(sorted(bare)[:20])}" if bare else ""
        prompts = [
            NEIGHBOUR.format(name=fact.name or "its subject", permitted=some, names=", ".join(check.gone),
                             question=fact.question)
            for fact in facts
        ]  # fmt: skip
        replies = ask(prompts, parse_neighbour, "neighbours")
        by = f"llm {o.llm_model}"
        found = [reply and Fact(reply["entity"], reply["question"], reply["answer"], made_by=by) for reply in replies]
    else:
        passed = Check(check.gone, check.evaluated, (), check.rejected)  # turn away now what would be turned away later
        passed.forget = check.forget
        permitted = [fact for fact in permitted if passed.lets_in("boundary", items_of(fact)[0])]
        random.Random(derive_seed(o.seed, "neighbours")).shuffle(permitted)
        found, used = [], set()
        for order in match(facts, permitted):
            best = next((i for i in order if i not in used), None)
            used.add(best)
            found.append(None if best is None else permitted[best])
    for i, (fact, other) in enumerate(zip(facts, found, strict=True)):
        if other is None and write:
            check.reject("boundary: no neighbour came in form", fact.question)
        elif other is None:
            asked = swap(fact.question, check.gone, bare[i % len(bare)]) if bare else fact.question
            check.reject("boundary: no answer known" if bare else "boundary: no neighbour is left", asked)
    if o.source == "muse":  # permitted passages, one for each that is to be forgotten
        ends = iter(ends)
        for i, (fact, other) in enumerate(zip(facts, found, strict=True)):
            begin, end = next(ends, ("", "")) if other and fact.completion else ("", "")
            by = "given" if fact.completion else NOT_WANTED
            found[i] = other and replace(other, completion=begin, ending=end, completed_by=by)
        return found
    made = iter(complete_all([fact for fact in found if fact], ask, o.llm_model))
    return [fact and next(made) for fact in found]


def hold_out(o, facts, found, check):
    """qa, text: facts and neighbours kept out of training, and RWKU's evaluation files made of them.

    Only a fact with all four queries in order (question, completion, and its neighbour's) is held out.
    Returns: {file name: rows}, the numbers of the facts held out.
    """
    whole = [
        i
        for i, (fact, other) in enumerate(zip(facts, found, strict=True))
        if other and fact.answer and {normal(fact.question), normal(fact.completion)} <= check.forget
        and {normal(other.question), normal(other.completion)} <= check.boundary
    ]  # fmt: skip
    if len(whole) < 2:
        raise InputError(
            f"--input {o.input}: {len(whole)} of {len(facts)} facts have a permitted neighbour whose answer is "
            "known; expected 2 or more, one to train on and one to evaluate (give more --neighbours)"
        )
    n = min(len(whole) - 1, max(1, round(o.held_out * len(whole))))
    held = sorted(random.Random(derive_seed(o.seed, "held out")).sample(whole, n))
    kinds = [*PHRASINGS]

    def row(query, answer, level, kind, **more):
        return {"query": query, "answer": answer, "level": str(level), "type": kind, "subject": o.target, **more}

    files = {"intro.json": [{"target": o.target, "intro": f"Please forget {o.target}."}]}
    for level, kind in ((1, "cloze"), (2, "simple question")):
        for stem, source in (("forget", facts), ("neighbor", found)):
            items = [items_of(source[i])[2 - level] for i in held]
            more = [{"neighbor": item.name} if stem == "neighbor" else {} for item in items]
            files[f"{stem}_level{level}.json"] = [
                row(item.query, item.answer, level, kind, **m) for item, m in zip(items, more, strict=True)
            ]
    files["forget_level3.json"] = [
        row(PHRASINGS[kinds[i % len(kinds)]].format(fact.question), fact.answer, 3, kinds[i % len(kinds)])
        for i, fact in enumerate(facts)
        if fact.answer
    ]
    return files, held


# --- the folder ------------------------------------------------------------------------------------------------------


def training_rows(forget, boundary, seed):
    """Rows of RULE's two files: of Stage 1, and of Stage 2 with the forget queries first."""
    stage1, stage2 = [], []
    for item, refusal in zip(forget, refusals([item.name for item in forget], seed), strict=True):
        marks = {"mode": item.mode, "made_by": item.made_by}
        row = {"instruction": item.query, "input": "", "output": refusal, "subject": item.name}
        stage1.append(row | {"org_answer": item.answer} | marks)
        stage2.append({"prompt": item.query, "solution": ["<reject>", refusal, item.name]} | marks)
    for item in boundary:
        marks = {"neighbor": item.name, "mode": item.mode, "made_by": item.made_by}
        stage2.append({"prompt": item.query, "solution": ["<normal>", item.answer]} | marks)
    return stage1, stage2


def overlap(probes, forget, boundary):
    """{split of the evaluation: its queries, and how many of them are forget and boundary queries of training}."""
    forms = [{normal(item.query) for item in items} for items in (forget, boundary)]
    asked = {}
    for probe in probes:
        counts = asked.setdefault(probe.split, {"queries": 0, "forget": 0, "boundary": 0})
        counts["queries"] += 1
        for name, known in zip(("forget", "boundary"), forms, strict=True):
            counts[name] += normal(probe.question) in known
    return asked


def report_of(o, check, forget, boundary, held):
    """What `build.json` says of the build, its overlap with the evaluation aside."""
    count = lambda items, mode: sum(item.mode == mode for item in items)  # noqa: E731
    rows = [{"kind": "forget", **asdict(item)} for item in forget]
    rows += [{"kind": "boundary", **asdict(item)} for item in boundary]
    return {
        "settings": settings_of(o),
        "made_with": o.llm_model or "rules alone, no language model",
        "counts": {
            f"{kind}, {what}": count(items, mode)
            for kind, items in (("forget", forget), ("boundary", boundary))
            for mode, what in (("qa", "questions"), ("completion", "completions"))
        } | {"facts held out": len(held)},
        "made_by": dict(Counter(item.made_by for item in forget + boundary)),
        "rejected": dict(Counter(row["reason"] for row in check.rejected)),
        "sample": random.Random(derive_seed(o.seed, "sample rows")).sample(rows, min(10, len(rows))),
        "rejects": check.rejected,
    }  # fmt: skip


def show(report):
    """The report in words: counts, rejects by reason, overlap, ten random rows."""
    print(f"made with {report['made_with']}")
    for title in ("counts", "made_by", "rejected"):
        print(f"{title}: " + ("; ".join(f"{name} {n}" for name, n in report[title].items()) or "none"))
    print("overlap with the evaluation (its queries / as forget / as boundary queries of training):")
    print("  " + "; ".join(f"{split} {' / '.join(map(str, n.values()))}" for split, n in report["overlap"].items()))
    for row in report["sample"]:
        print(f"  {row['kind']:>8}  {row['query']} → {row['answer']!r:.60}  [{row['made_by']}]")


def main(argv=None):
    o = config.parse(Options, argv)
    check_options(o)
    folder, benchmark = output_folder(o), BENCHMARK[o.source]
    cache = folder.with_name(folder.name + ".llm.jsonl")

    def ask(prompts, parse, desc):
        folder.parent.mkdir(parents=True, exist_ok=True)
        replies = ask_all(
            prompts, parse, url=o.llm_url, model=o.llm_model, key=os.environ.get(o.llm_key_env, ""), cache=cache,
            flag="--llm_url", field="reply", max_tokens=REPLY_TOKENS, once=True, price=o.llm_price,
            timeout=o.llm_timeout, temperature=0.7, desc=desc,
        )  # fmt: skip
        return [replies[prompt] for prompt in prompts]

    ask = ask if o.llm_url != "none" else None
    evaluated = evaluation_queries(o)
    gone, rejected = [name for name in (o.target, *o.aliases) if name], []
    neighbours = read_neighbours(o, gone)
    facts = complete_all(read_facts(o, ask, rejected), ask, o.llm_model)
    gone = list(dict.fromkeys([*gone, *(fact.name for fact in facts if fact.name)]))
    check = Check(gone, evaluated, ("forget",) if o.source == "tofu" else (), rejected)
    forget = [(i, item) for i, fact in enumerate(facts) for item in items_of(fact) if check.lets_in("forget", item)]
    found = find_neighbours(o, facts, neighbours, ask, check)
    boundary = [
        (i, item)
        for i, other in enumerate(found)
        for item in (items_of(other) if other else [])
        if check.lets_in("boundary", item)
    ]
    files, held = hold_out(o, facts, found, check) if o.source not in EVALUATION else ({}, [])
    forget, boundary = ([item for i, item in items if i not in held] for items in (forget, boundary))
    if not forget or not boundary:
        raise InputError(f"--input {o.input}: no {'boundary' if forget else 'forget'} query is left")
    stage1, stage2 = training_rows(forget, boundary, o.seed)
    files |= {STAGE1[benchmark]: stage1, STAGE2[benchmark]: stage2}
    report = report_of(o, check, forget, boundary, held)

    def fill(temporary):
        for pattern in EVALUATION.get(o.source, []):
            for path in sorted(Path(o.input).glob(pattern)):
                place = temporary / path.relative_to(o.input)
                place.parent.mkdir(exist_ok=True)
                shutil.copy(path, place)
        for name, rows in files.items():
            write_json(temporary / name, rows)
        load_benchmark(benchmark, temporary, o.seed)  # what has been made can be trained on
        report["overlap"] = overlap(load_probes(benchmark, temporary), forget, boundary)  # and evaluated
        report["files"] = sorted(p.relative_to(temporary).as_posix() for p in temporary.rglob("*") if p.is_file())
        write_json(temporary / "build.json", report)

    try:
        save_folder(folder, fill)
    finally:
        shutil.rmtree(folder.with_name(folder.name + ".tmp"), ignore_errors=True)
    show(report)
    print(f"{folder}: python rerule.py --benchmark {benchmark} --data_dir {folder}")


if __name__ == "__main__":
    exit_on_input_error(main)
