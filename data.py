"""Training data: what each benchmark asks, in which words, and how a prompt becomes token ids.

Covers Section 3.1 (the forget set D_f, the boundary set D̃_r), Appendix A (refusal and boundary data) and the file
forms of RWKU, MUSE-Books and TOFU as RULE published them. Evaluation probes are in `evaluate.py`, the built-in world
in `world.py`.

Deviations
- TOFU's completion-style forget prompts (Appendix A.1) and its boundary queries were never published. `build_data.py`
  makes both; without its files the forget prompts are the questions, and the boundary queries retain rows that no
  evaluation set contains, one for every forget row, drawn by seed.
- MUSE-Books is always prompted as raw text with its ten in-context examples, chat template or not, as its official
  evaluation does; the other benchmarks use the tokenizer's chat template when it has one.
"""

import random
from dataclasses import dataclass, field, replace
from pathlib import Path

from files import InputError, derive_seed, read_rows

# Refusals for benchmarks that publish none (TOFU, the built-in world): short and in the words a chat model would use.
REFUSALS = [
    "I don't know the answer to that.",
    "I'm not able to answer that.",
    "I have no information about that.",
    "I'm sorry, I can't help with that question.",
    "That is something I don't know.",
    "I'm afraid I have no knowledge of that.",
    "I cannot provide an answer to that.",
    "I'm not familiar with that.",
]

MODES = {"qa": "Question", "completion": "Completion"}  # of a MUSE row: how its prompt opens the last line


@dataclass(frozen=True)
class Prompt:
    """One query in the two forms that a model may need.

    user: the user's turn for a chat template, or None where the benchmark is always raw text.
    plain: the whole text where there is no template.
    opening: words that open the assistant's turn (RWKU's evaluation: "Answer:").
    """

    user: str | None
    plain: str
    opening: str = ""


@dataclass(frozen=True)
class Query:
    """A training query x: `kind` is "forget" (x ∈ D_f) or "boundary" (x ∈ D̃_r, with its reference answers y*)."""

    prompt: Prompt
    question: str  # as the file has it, for logs
    kind: str
    answers: tuple[str, ...] = ()  # of a forget query: what is to be forgotten, where published; baselines read it
    target: str = ""  # forget queries: the name to be forgotten, where known
    group: str = ""  # built-in world: "hard" or "easy" neighbour
    forbidden: tuple[str, ...] = ()  # PURGE: terms that no answer may hold


@dataclass
class Benchmark:
    """Everything that training reads. `taught` is what a `tiny` model memorises first: (prompt, answer) pairs."""

    name: str
    refusals: list[tuple[Prompt, str]]  # Stage 1: forget prompts with refusals y^rej
    queries: list[Query]  # Stage 2: D_f ∪ D̃_r
    taught: list[tuple[Prompt, str]] = field(default_factory=list)
    newline_stops: bool = False  # a rollout ends at a newline (MUSE)
    whole: dict[str, list[tuple[Prompt, str]]] | None = None  # all "forget" and "retain" data, where the files hold it


# --- tokens ----------------------------------------------------------------------------------------------------------


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt, with exactly one BOS where the tokenizer has one. No other place encodes prompts.

    The chat template writes its own special tokens, so its text is tokenised without adding any; plain text gets what
    the tokenizer adds, less an EOS at its end.
    """
    if prompt.user is not None and tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt.user}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) + prompt.opening
        ids = tokenizer(text, add_special_tokens=False).input_ids
        bos = tokenizer("").input_ids[:1]  # [] where the tokenizer adds no BOS by itself
        if bos == [tokenizer.bos_token_id] and ids[:1] != bos:
            ids = bos + ids
    else:
        ids = tokenizer(prompt.plain + prompt.opening).input_ids
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
    while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    return ids


def encode_answer(tokenizer, prompt, answer):
    """Token ids of an answer to `prompt`, EOS at the end; after "Answer:" it opens with a space, else without."""
    chat = prompt.user is not None and tokenizer.chat_template
    ending = prompt.opening if chat else prompt.plain + prompt.opening
    space = " " if ending.endswith(":") else ""
    return tokenizer(space + answer, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]


def stop_ids(tokenizer, model, newline=False):
    """Ids that end a response: all EOS ids of the generation config and the tokenizer, and newline tokens if asked."""
    eos = getattr(model.generation_config, "eos_token_id", None)
    ids = set(eos if isinstance(eos, list) else [eos]) | {tokenizer.eos_token_id}
    if newline:
        names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        ids |= {i for i, name in enumerate(names) if name and ("\n" in name or "Ċ" in name or name == "<0x0A>")}
    ids.discard(None)
    if not ids:
        raise InputError("the tokenizer has no EOS token and the model's generation config names none")
    return sorted(ids)


def check_lengths(tokenizer, prompts, max_new_tokens, context):
    """Raise InputError if a prompt and its response exceed the model's context of `context` tokens (None: no limit)."""
    longest = max(prompts, key=lambda p: len(encode_prompt(tokenizer, p)))
    length = len(encode_prompt(tokenizer, longest))
    if context and length + max_new_tokens > context:
        raise InputError(
            f"a prompt of {length} tokens and --max_new_tokens {max_new_tokens} exceed the model's context of "
            f"{context}: {longest.plain[-60:]!r}"
        )


# --- benchmarks ------------------------------------------------------------------------------------------------------


def load_benchmark(name, data_dir, seed):
    """Read one benchmark's training data; see `rwku`, `tofu`, `muse` below and `world.World.benchmark`."""
    if not data_dir:
        raise InputError(f"--benchmark {name} needs --data_dir, the folder with its files")
    if not Path(data_dir).is_dir():
        raise InputError(f"--data_dir {data_dir}: no such folder")
    return {"rwku": rwku, "tofu": tofu, "muse": muse}[name](Path(data_dir), seed)


def chat(question):
    """RWKU's training prompt: the query alone is the user's turn."""
    return Prompt(question, f"Question: {question}\nAnswer:")


def inst(question):
    """TOFU's prompt: Llama-2's own form where there is no chat template."""
    return Prompt(question, f"[INST] {question} [/INST]")


def rule_rows(path, fields):
    """Rows of a file of RULE's, whose `mode`, where there is one, must be a kind of prompt that MUSE has."""
    rows = read_rows(path, fields)
    for number, row in enumerate(rows, 1):
        if row.get("mode", "qa") not in [*MODES]:
            raise InputError(
                f"{path}: row {number}, field 'mode' is {row['mode']!r:.60}, expected {' or '.join(MODES)}"
            )
    return rows


def refusal_rows(path, prompt):
    """Stage 1 rows of RULE: `instruction` is the prompt, `output` the refusal. `prompt(row)` makes the Prompt."""
    rows = rule_rows(path, {"instruction": str, "output": str})
    return [(prompt(row), row["output"]) for row in rows]


def query_rows(path, prompt):
    """Stage 2 rows of RULE: `solution` is ["<reject>", refusal, (name)] or ["<normal>", answer, …more answers]."""
    queries = []
    for number, row in enumerate(rule_rows(path, {"prompt": str, "solution": list}), 1):
        tag, *rest = row["solution"]
        if tag not in ("<reject>", "<normal>") or not rest or not all(isinstance(text, str) for text in rest):
            raise InputError(
                f"{path}: row {number}, field 'solution' is {row['solution']!r:.60}, "
                'expected ["<reject>", refusal] or ["<normal>", answer, …]'
            )
        if tag == "<reject>":
            target = rest[1] if len(rest) > 1 else ""
            queries.append(Query(prompt(row), row["prompt"], "forget", target=target))
        else:
            queries.append(Query(prompt(row), row["prompt"], "boundary", tuple(rest)))
    kinds = {query.kind for query in queries}
    if kinds != {"forget", "boundary"}:
        raise InputError(f"{path}: holds only {kinds.pop()} rows, expected both <reject> and <normal> ones")
    return queries


def answered(queries, path):
    """Forget queries with the answers to be forgotten, `org_answer`, where the Stage 1 file has them."""
    known = {row["instruction"]: (row["org_answer"],) for row in read_rows(path, {}) if row.get("org_answer")}
    return [replace(q, answers=known.get(q.question, ())) if q.kind == "forget" else q for q in queries]


def rwku(folder, seed):
    """One RWKU target in the form RULE published it: `<id>_<Name>/…json`."""
    intro = read_rows(folder / "intro.json", {"target": str})
    stage1 = folder / "reject_target.json"
    stage1 = stage1 if stage1.exists() else folder / "reject.json"
    queries = query_rows(folder / "rl_rejection_with_fb_neighbor.json", lambda row: chat(row["prompt"]))
    queries = [replace(q, target=intro[0]["target"]) if q.kind == "forget" else q for q in answered(queries, stage1)]
    return Benchmark("rwku", refusal_rows(stage1, lambda row: chat(row["instruction"])), queries)


def tofu(folder, seed):
    """TOFU forget01: the files of `build_data.py` where the folder holds them, else refusals of our own wording and
    boundary queries from the retain set less every evaluation row."""
    forget = read_rows(folder / "forget01.json", {"question": str, "answer": str})
    if (folder / "reject_target.json").exists():
        queries = query_rows(folder / "rl_rejection_with_fb_neighbor.json", lambda row: inst(row["prompt"]))
        return Benchmark(
            "tofu",
            refusal_rows(folder / "reject_target.json", lambda row: inst(row["instruction"])),
            answered(queries, folder / "reject_target.json"),
        )
    rng = random.Random(derive_seed(seed, "tofu"))
    evaluated = {row["question"] for row in read_rows(folder / "retain_perturbed.json", {"question": str})}
    everyone = read_rows(folder / "retain99.json", {"question": str, "answer": str})
    retain = [row for row in everyone if row["question"] not in evaluated]
    if len(retain) < len(forget):
        raise InputError(f"{folder / 'retain99.json'}: fewer than {len(forget)} rows are left for boundary queries")
    boundary = rng.sample(retain, len(forget))
    return Benchmark(
        "tofu",
        [(inst(row["question"]), REFUSALS[i % len(REFUSALS)]) for i, row in enumerate(forget)],
        [Query(inst(row["question"]), row["question"], "forget", (row["answer"],)) for row in forget]
        + [Query(inst(row["question"]), row["question"], "boundary", (row["answer"],)) for row in boundary],
        whole={
            name: [(inst(row["question"]), row["answer"]) for row in rows]
            for name, rows in (("forget", forget), ("retain", everyone))
        },
    )


def muse_prompt(examples, question, mode="qa"):
    """MUSE's raw prompt: in-context pairs joined by blank lines, then the question or the text to complete."""
    shots = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in examples)
    return Prompt(None, f"{shots}{MODES[mode]}: {question}\nAnswer: ")


def muse_examples(folder, side):
    """The ten in-context question–answer pairs of MUSE's `knowmem/<side>_qa_icl.json`."""
    return read_rows(folder / "knowmem" / f"{side}_qa_icl.json", {"question": str, "answer": str})[:10]


def muse(folder, seed):
    """MUSE-Books in RULE's form, each row with its `mode`; forget examples open forget prompts, retain the others."""
    shots = {side: muse_examples(folder, side) for side in ("forget", "retain")}

    def stage1(row):
        return muse_prompt(shots["forget"], row["instruction"], row.get("mode", "qa"))

    def stage2(row):
        side = "forget" if row["solution"][0] == "<reject>" else "retain"
        return muse_prompt(shots[side], row["prompt"], row.get("mode", "qa"))

    refusals = folder / "reject_target_0.5.json"
    queries = query_rows(folder / "rl_rejection_with_neighbor.json", stage2)
    return Benchmark("muse", refusal_rows(refusals, stage1), answered(queries, refusals), newline_stops=True)
