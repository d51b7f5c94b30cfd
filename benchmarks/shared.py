"""What benchmarks share: settings, RULE's training files (Appendix A), refusals where none are published, and whether
a model, its tokenizer and a benchmark's texts fit each other."""

import sys
from pathlib import Path

from config import InputError
from data import Query, Training, encode_pair, encode_prompt
from engine.files import check_value, read_rows

# Refusals for benchmarks that publish none (TOFU, the built-in world): short and in the words a chat model would use.
REFUSALS = [
    "I don't know the answer to that.", "I'm not able to answer that.", "I have no information about that.",
    "I'm sorry, I can't help with that question.", "That is something I don't know.",
    "I'm afraid I have no knowledge of that.", "I cannot provide an answer to that.", "I'm not familiar with that.",
]  # fmt: skip
# Settings of Appendix D that RWKU, MUSE-Books and TOFU share, and what --model tiny changes of them.
PRESET = dict(
    lr=2e-6, buffer_size=1200, max_new_tokens=1024, sft_lr=4e-7, sft_batch_size=8, sft_epochs=3.0, sft_stop=0.0,
    tiny_lr=2e-3, tiny_batch_size=32, tiny_hidden=128, tiny_layers=3, eval_every=0, baseline_epochs=5.0, tiny_rows=0,
    held_out=0,
)  # fmt: skip
TINY = dict(sft_lr=2e-4, sft_batch_size=32, sft_epochs=20.0, sft_stop=0.97, min_groups=16, held_out=32)
MODES = {"qa": "Question", "completion": "Completion"}  # of a MUSE row: how its prompt opens the last line


def folder_of(o, name):
    """--data_dir as a folder that exists."""
    if not o.data_dir:
        raise InputError(f"--benchmark {name} needs --data_dir, the folder with its files")
    if not Path(o.data_dir).is_dir():
        raise InputError(f"--data_dir {o.data_dir}: no such folder")
    return Path(o.data_dir)


def rule_rows(path, fields):
    """Rows of a file of RULE's, whose `mode`, where there is one, must be a kind of prompt that MUSE has."""
    rows = read_rows(path, fields)
    for number, row in enumerate(rows, 1):
        if row.get("mode", "qa") not in [*MODES]:
            found = f"{row['mode']!r:.60}"
            raise InputError(f"{path}: row {number}, field 'mode' is {found}, expected {' or '.join(MODES)}")
    return rows


def rule_training(stage1, stage2, prompt, target="", newline_stops=False):
    """RULE's two files → Training. `prompt(text, row)` makes a Prompt; target: the name to be forgotten, where known.
    Stage 1 rows: `instruction` is the prompt, `output` the refusal, `org_answer`, where given, what is to be forgotten.
    Stage 2 rows: `solution` is ["<reject>", refusal, (name)] or ["<normal>", answer, …more answers]."""
    rows = rule_rows(stage1, {"instruction": str, "output": str})
    refusals = [(prompt(row["instruction"], row), row["output"]) for row in rows]
    for number, row in enumerate(rows, 1):
        if row.get("org_answer"):
            check_value(row["org_answer"], str, f"{stage1}: row {number}, field 'org_answer'")
    known = {row["instruction"]: (row["org_answer"],) for row in rows if row.get("org_answer")}
    queries = []
    for number, row in enumerate(rule_rows(stage2, {"prompt": str, "solution": list}), 1):
        text, (tag, *rest) = row["prompt"], row["solution"]
        if tag not in ("<reject>", "<normal>") or not rest:
            found = f"{stage2}: row {number}, field 'solution' is {row['solution']!r:.60}"
            raise InputError(f'{found}, expected ["<reject>", refusal] or ["<normal>", answer, …]')
        if tag == "<reject>":
            name = target or (rest[1] if len(rest) > 1 else "")
            queries.append(Query(prompt(text, row), text, "forget", known.get(text, ()), name))
        else:
            queries.append(Query(prompt(text, row), text, "boundary", tuple(rest)))
    asked = {kind: {query.prompt for query in queries if query.kind == kind} for kind in ("forget", "boundary")}
    for number, query in enumerate(queries, 1):
        if query.kind == "boundary" and query.prompt in asked["forget"]:
            told = f"{stage2}: row {number}, field 'prompt' is a forget and a boundary prompt, {query.question!r:.60}"
            if 100 * len(asked["forget"] & asked["boundary"]) > len(asked["boundary"]):
                raise InputError(told)
            print(f"{told}; left out of the boundary prompts", file=sys.stderr)
    queries = [query for query in queries if query.kind == "forget" or query.prompt not in asked["forget"]]
    if not all(asked.values()):
        raise InputError(f"{stage2}: holds only {queries[0].kind} rows, expected both <reject> and <normal> ones")
    return Training(refusals, queries, newline_stops=newline_stops)


def check_model(model, tokenizer, config, benchmark, prompts, probes):
    """Raise InputError where a given model can hold no prompt with its answer, of training or of evaluation."""
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    check_ids(model, tokenizer, rows, [config.max_new_tokens] * len(rows))
    context = getattr(model.config, "max_position_embeddings", None)
    needed = context_needed(tokenizer, benchmark, probes)
    if context and needed > context:
        raise InputError(f"--model {config.model}: its context is {context} tokens, evaluation needs {needed}")


def check_ids(model, tokenizer, rows, limits):
    """Raise InputError where the tokenizer does not belong to the model, or a row and its answer exceed the context."""
    known = model.get_input_embeddings().num_embeddings
    if max(max(row) for row in rows) >= known or len(tokenizer) < 0.9 * known:
        raise InputError(f"the tokenizer has {len(tokenizer)} tokens, the model {known}: they do not belong together")
    context = getattr(model.config, "max_position_embeddings", None)
    length, i = max((len(row) + limit, i) for i, (row, limit) in enumerate(zip(rows, limits, strict=True)))
    if context and length > context:
        more = f" with {limits[i]} more to write (--max_new_tokens {limits[i]})" if limits[i] else ""
        told = f"{len(rows[i])} tokens{more} exceed the model's context of {context}"
        raise InputError(f"{told}: …{tokenizer.decode(rows[i])[-60:]!r}")


def context_needed(tokenizer, benchmark, probes):
    """Positions that a model must have to be evaluated on these probes."""
    prompts = [encode_prompt(tokenizer, probe.prompt) for probe in probes]
    asked = [len(ids) + benchmark.limit(p.split, len(ids)) for p, ids in zip(probes, prompts, strict=True)]
    pairs = [(p.prompt, answer) for p in probes for answer in (p.answer, p.paraphrased, *p.perturbed) if p.perturbed]
    return max(asked + [len(encode_pair(tokenizer, *pair)) for pair in pairs])
