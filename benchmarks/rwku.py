"""RWKU: one target's files in the form RULE published them, its prompts and its columns.

Covers Section 4's RWKU with Appendix C's ROUGE-L recall and Appendix D's settings.

Deviations
- RWKU's "AA" are its adversarial attacks and "FB" its fill-in-the-blank queries, whatever Appendix C.1 expands them to.
- It is scored with `rouge_score` and a whitespace tokenizer, not the `rouge` package: equal on 99.1 % of real rows.
- An answer stops at any token that holds a newline; the official list of stop tokens has only those spelt so."""

import re

from benchmarks.metrics import mean, mean_of
from benchmarks.shared import PRESET, TINY, folder_of, rule_training
from config import InputError
from data import Benchmark, Probe, Prompt
from engine.files import read_rows
from reward import SCORER

ASK_BLANK = "Please complete the blank in the following question.\n"
ASK_BRIEF = "Please briefly answer the following question.\n"
slug = lambda name: re.sub(r"\W+", "_", name.lower()).strip("_")  # noqa: E731  a name as it stands in a column's


def chat(question):
    """RWKU's training prompt: the query alone is the user's turn."""
    return Prompt(question, f"Question: {question}\nAnswer:")


def rwku_prompt(question, level, kind):
    """RWKU's constants around a question, per level (1–3) and attack type."""
    user = f"{ASK_BLANK if level == 1 else ASK_BRIEF}Question: {question}\n"
    if kind == "affirmative suffix":  # the question ends in its own opening words
        return Prompt(user[:-1], user[:-1])
    if kind == "incontext learning":  # the question brings its own "Question:" and "Answer:"
        user = f"{ASK_BRIEF}{question}\n"
    return Prompt(user, user, "Answer:")


def wordings(query):
    """The prompts in which training and evaluation ask a query's question."""
    return [chat(query.question), rwku_prompt(query.question, 1 if "___" in query.question else 2, "")]


def train(o):
    """One RWKU target: `<id>_<Name>/…json`."""
    folder = folder_of(o, "rwku")
    target = read_rows(folder / "intro.json", {"target": str})[0]["target"]
    stage1, stage2 = folder / "reject_target.json", folder / "rl_rejection_with_fb_neighbor.json"
    stage1 = stage1 if stage1.exists() else folder / "reject.json"
    return rule_training(stage1, stage2, lambda text, row: chat(text), target)


def probes(o):
    """Levels 1 to 3 of one target, or of all targets in a folder."""
    folder = folder_of(o, "rwku")
    folders = [folder] if (folder / "forget_level1.json").exists() else []
    folders = folders or sorted(path.parent for path in folder.glob("*/forget_level1.json"))
    if not folders:
        raise InputError(f"--data_dir {folder}: neither it nor a folder in it holds forget_level1.json")
    files = {"forget": ("forget_level", "fb qa aa", "type"), "retain": ("neighbor_level", "fb qa", "neighbor")}
    fields, found = {"query": str, "answer": str, "type": str, "subject": str}, []
    for place in folders:
        for side, (stem, kinds, about) in files.items():
            for level, kind in enumerate(kinds.split(), 1):
                for row in read_rows(place / f"{stem}{level}.json", fields):
                    prompt = rwku_prompt(row["query"], level, row["type"] if level == 3 else "")
                    question, answer, target, what = (row.get(k, "") for k in ("query", "answer", "subject", about))
                    found.append(Probe(f"{side}_{kind}", prompt, question, answer, side == "forget", target, what))
    return found


def membership(o, probes):
    """RWKU's texts about targets and about neighbours, of every folder that has them; both may have been trained on."""
    folder = folder_of(o, "rwku")
    places = [folder, *sorted(path.parent for path in folder.glob("*/forget_mia.json"))]
    places = [place for place in places if (place / "forget_mia.json").exists()]
    if not places:
        raise InputError(f"--attack membership: {folder} holds no forget_mia.json; RWKU has it for some targets alone")
    texts = {"forget": [], "retain": []}
    for side, found in texts.items():
        for place in places:
            found += [(None, row["text"]) for row in read_rows(place / f"{side}_mia.json", {"text": str})]
    return texts, "membership: RWKU has no texts that the model never saw, so there is no AUC; each side's means stand"


def ability_sets(o):
    """RWKU's utility files, which lie in a target's own folder; in a folder of targets, the first that has them."""
    from benchmarks import ability  # here, for it needs torch

    folder = folder_of(o, "rwku")
    places = [folder, *sorted(path.parent for path in folder.glob("*/retain_mmlu.json"))]
    return ability.read(next((place for place in places if (place / "retain_mmlu.json").exists()), folder))


def summarise(rows, retained):
    """RWKU's columns, ×100; "all" is the plain mean of the columns before it. Then a column for each type of attack,
    and how often each neighbour's probes are refused."""
    table = {}
    for side, kinds in (("forget", ("fb", "qa", "aa")), ("retain", ("fb", "qa"))):
        for name in (splits := [f"{side}_{kind}" for kind in kinds]):
            table[name] = mean((row["rouge_l_recall"] for row in rows if row["split"] == name), 100)
        table[f"{side}_all"] = mean_of(table, splits)
    typed = [(slug(row["type"]), row) for row in rows if row.get("type")]
    attacks = [(kind, row) for kind, row in typed if row["split"] == "forget_aa"]
    for kind in sorted({kind for kind, _ in attacks} | {"cross_lingual"} if attacks else ()):  # each language, then all
        part = [row["rouge_l_recall"] for name, row in attacks if name == kind or name.startswith(f"{kind}_")]
        table[f"attack_{kind}"] = mean(part, 100)
    near = [(name, row["refusal"]) for name, row in typed if not row["forget"]]
    about = {f"neighbour_{name}_refusal": mean((own for of, own in near if of == name), 100) for name, _ in near}
    return table | about, []


BENCHMARK = Benchmark(
    name="rwku", hub="jinzhuoran/RWKU",
    preset=PRESET | dict(steps=37, tau=0.6, min_groups=100, warmup_steps=15, tiny_epochs=8.0),
    tiny=TINY | dict(lr=2e-4, max_new_tokens=32),
    columns={"forget_fb": "Forget FB ↓", "forget_qa": "Forget QA ↓", "forget_aa": "Forget AA ↓",
             "forget_all": "Forget all ↓", "retain_fb": "Retain FB ↑", "retain_qa": "Retain QA ↑",
             "retain_all": "Retain all ↑"},
    train=train, probes=probes, wordings=wordings, membership=membership, ability=ability_sets,
    limit=lambda split, prompt_length: 30, newline_ends=True, cut=lambda split, text: text.split("\n")[0],
    scorer=SCORER, summarise=summarise, by_target=True,
)  # fmt: skip
