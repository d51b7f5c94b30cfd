"""Scores any checkpoint on any benchmark: greedy answers, losses, table. Also a command: `python evaluate.py --help`.

Covers Section 4's evaluation and Appendix C; a benchmark's queries, limits and formulas are in its own module of
`benchmarks/`, what they share in `benchmarks/metrics.py`, the judge of naturalness in `benchmarks/judge.py`."""

from dataclasses import dataclass, field, replace
from typing import Literal

from config import Above0, Count, From0, InputError, Seed, setting
from engine.flags import check_bounds, parse, run_command


@dataclass
class Options:
    """Score a checkpoint on RWKU, MUSE-Books, TOFU or a built-in world; print the paper's columns, write JSON."""

    benchmark: str = field(metadata={"help": "What to score on: rwku, muse, tofu, builtin, town."})
    output: str = field(metadata={"help": "JSON file for the result; TOFU_EVAL.json: in open-unlearning's form."})
    model: str = setting("Model folder or Hugging Face id.", "")
    tokenizer: str = setting("Where the tokenizer of all models is, if not with each.", "")
    data_dir: str = setting("The benchmark's folder; for RWKU one target's folder or a folder of them.", "")
    from_log: str = setting("Score a stored log, ours or TOFU's own, in place of a model.", "")
    attack: list[str] = setting("Attack the model by some of: leak extract membership prefix quantize relearn.", [])
    attack_samples: Count = setting("Answers sampled to each forget prompt, for leak@k up to this k.", 64)
    relearn_lr: Above0 | None = setting("Learning rate of relearning. Unless given: by the model's size.")
    original_model: str = setting("The model before unlearning, to be attacked beside it.", "")
    ability: bool = setting("RWKU: score general ability too, on the utility files of the target's folder.", False)
    retain_model: str = setting("The retained model: for TOFU's forget quality, and to be attacked beside it.", "")
    retain_log: str = setting("TOFU: its log, ours or TOFU's own, in place of the retained model.", "")
    max_new_tokens: Count | None = setting("Longest answer in tokens. Unless given: the benchmark's own limit.")
    batch_size: Count = setting("Rows in a batch; halved whenever memory runs out.", 32)
    seed: Seed = setting("Built-in worlds: their seed. And that of every draw of an attack.", 0)
    device: Literal["auto", "cpu", "cuda"] = setting("Where to run.", "auto")
    judge_url: str = setting("A judge of naturalness: any OpenAI-compatible URL, as http://localhost:8000/v1.", "")
    judge_model: str = setting("The judge's model name.", "")
    judge_key_env: str = setting("Environment variable that holds the judge's key.", "JUDGE_API_KEY")
    judge_cache: str = setting("JSON-lines file of ratings already paid for. Unless given: <output>.judge.jsonl.", "")
    judge_price: From0 = setting("Dollars per million tokens of the judge, to show the cost beforehand.", 0.0)


if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    OPTIONS = run_command(lambda: parse(Options), leave=False)

import os
from itertools import islice
from pathlib import Path

import torch

import benchmarks
from benchmarks import ability, attacks, judge, metrics
from benchmarks.answers import answer_losses, greedy, inference, limits_of
from benchmarks.logs import read_log, read_retained
from benchmarks.shared import check_ids
from data import encode_prompt
from engine.files import can_write, write_json
from engine.llm import reach
from engine.process import Engine


def evaluate(
    engine, model, tokenizer, benchmark, probes, *, batch_size=32, max_new_tokens=None, retained=None, progress=True,
    check_batching=False,
):  # fmt: skip
    """Ask every probe and score the answers. Touches neither the model's mode nor any random state.
    Args:
        benchmark: data.Benchmark; max_new_tokens: None for the benchmark's own limit.
        retained: TOFU: truth ratios of the retained model on the forget rows.
        check_batching: outside float32 on the CPU, decode some rows again one by one and count different answers.
    Returns: {"benchmark", "summary": {column: value}, "per_target", "notes", "per_example"}. Raises: InputError."""
    prompts = [encode_prompt(tokenizer, probe.prompt) for probe in probes]
    limits = limits_of(benchmark, probes, prompts, max_new_tokens)
    check_ids(model, tokenizer, prompts, limits)
    limited = f"answers were limited to {max_new_tokens} new tokens, not to the benchmark's own length"
    notes = [limited] if max_new_tokens else []

    def answer(some, batch_size):
        some_prompts, some_limits = [prompts[i] for i in some], [limits[i] for i in some]
        return greedy(engine, model, tokenizer, some_prompts, some_limits, benchmark.newline_ends, batch_size, progress)

    with inference(model), engine.held(model):
        answers = answer(range(len(probes)), batch_size)
        if check_batching and (model.device.type != "cpu" or model.dtype != torch.float32):
            some = range(0, len(probes), max(1, len(probes) // 8))
            differ = sum(alone != answers[i] for i, alone in zip(some, answer(some, 1), strict=True))
            notes.append(f"{differ} of {len(some)} rows decoded alone differ from the same rows in a batch")
        losses = probe_losses(model, tokenizer, benchmark, probes, batch_size, progress)
    rows = []
    for i, (probe, (text, truncated)) in enumerate(zip(probes, answers, strict=True)):
        row = metrics.score(benchmark, probe, text, tokenizer, limits[i])
        row |= {"truncated": truncated, "prompt": tokenizer.decode(prompts[i])}
        rows.append(row | losses.get(i, {}))
    return finish(benchmark, rows, retained, notes)


def probe_losses(model, tokenizer, benchmark, probes, batch_size, progress=True):
    """{index of a probe with wrong answers: its losses, probability and truth ratio}, where the benchmark has them."""
    if not benchmark.losses:
        return {}
    asked = {i: probe for i, probe in enumerate(probes) if probe.perturbed}
    pairs = [(p.prompt, a) for p in asked.values() for a in (p.answer, p.paraphrased or p.answer, *p.perturbed)]
    losses, found = iter(answer_losses(model, tokenizer, pairs, batch_size, progress)), {}
    for i, probe in asked.items():
        gold, paraphrased, *perturbed = islice(losses, 2 + len(probe.perturbed))
        found[i] = benchmark.losses(probe.split, gold, paraphrased, perturbed)
    return found


def truth_ratios(model, tokenizer, benchmark, probes, batch_size):
    """Truth ratios on the forget rows, in order: what `evaluate(retained=…)` needs of a retained model."""
    forget = [probe for probe in probes if probe.split == "forget"]
    with inference(model):
        found = probe_losses(model, tokenizer, benchmark, forget, batch_size)
    return [found[i]["truth_ratio"] for i in range(len(forget))]


def finish(benchmark, rows, retained, notes=()):
    """Rows → the result that `evaluate` returns and the command writes."""
    summary, per_target, more = metrics.summarise(benchmark, rows, retained)
    notes = list(dict.fromkeys([*notes, *more]))
    return {"benchmark": benchmark.name, "summary": summary, "per_target": per_target, "notes": notes,
            "per_example": metrics.finite(rows)}  # fmt: skip


# --- command ---------------------------------------------------------------------------------------------------------


def check_options(o):
    """The benchmark. Raises InputError for flags that do not go together, before anything slow starts."""
    if o.benchmark not in benchmarks.ALL:
        raise InputError(f"--benchmark {o.benchmark}: expected one of {', '.join(benchmarks.ALL)}")
    check_bounds(o)
    benchmark, output = benchmarks.ALL[o.benchmark], Path(o.output)
    compares = "retain_model" if o.retain_model else "retain_log" if o.retain_log else ""
    in_vain = compares and not benchmark.forget_rows and not (o.attack and o.retain_model)
    told = "only --benchmark tofu compares with a retained model; --attack takes --retain_model"
    form = benchmarks.FORMS.get(output.name, (benchmark,))
    no_file = output.is_dir() or not can_write(Path(f"{o.output}.tmp"))
    for wrong, message in (
        (bool(o.model) == bool(o.from_log), "expected one of --model and --from_log"),
        (o.retain_model and o.retain_log, "expected one of --retain_model and --retain_log"),
        (in_vain, f"--{compares}: {told}"),
        (o.from_log and (o.attack or o.ability), f"--{'attack' if o.attack else 'ability'}: --from_log runs no model"),
        (o.original_model and not o.attack, "--original_model: only --attack compares with it"),
        (o.ability and not benchmark.ability, f"--ability: --benchmark {o.benchmark} has no files of it"),
        (o.retain_model and o.from_log, "--retain_model: --from_log runs no model; give --retain_log"),
        (bool(o.judge_url) != bool(o.judge_model), "--judge_url and --judge_model go together"),
        (o.device == "cuda" and not torch.cuda.is_available(), "--device cuda: no GPU is available"),
        (form[0] is not benchmark, f"--output {o.output}: is the name of a log of --benchmark {form[0].name}"),
        (no_file, f"--output {o.output}: expected a file in a folder that exists"),
    ):
        if wrong:
            raise InputError(message)
    if o.judge_url:
        reach(o.judge_url, "--judge_url")
        cache = Path(o.judge_cache or f"{o.output}.judge.jsonl")
        if not can_write(cache):
            raise InputError(f"--judge_cache {cache}: expected a file that can be written")
    return benchmark


def check_vocabularies(o):
    """Raise InputError where a model to compare with has another vocabulary: its losses are of other tokens."""
    _, tokenizer = Engine.read(o.model, "model", None, o.tokenizer, weights=False)
    for flag in ("retain_model", "original_model"):
        if getattr(o, flag):
            _, other = Engine.read(getattr(o, flag), flag, None, o.tokenizer, weights=False)
            if other.get_vocab() != tokenizer.get_vocab():
                raise InputError(f"--{flag} {getattr(o, flag)}: its vocabulary is not that of --model {o.model}")


def main(o):
    benchmark = check_options(o)
    rows, theirs = read_log(o.from_log, benchmark) if o.from_log else (benchmark.probes(o), False)
    retained = read_retained(o.retain_log, benchmark, rows, theirs) if o.retain_log else None
    texts = attacks.prepare(o.attack, benchmark, o, rows)
    sets = benchmark.ability(o) if o.ability else None
    engine = Engine("cuda" if o.device != "cpu" and torch.cuda.is_available() else "cpu", tokenizer=o.tokenizer)
    more, columns, beside = {}, {}, {}  # of the result; of its summary; of other models
    if o.from_log:
        result = finish(benchmark, rows, retained)
        if all(result["summary"].get(column) is None for column in benchmark.columns):
            raise InputError(f"--from_log {o.from_log}: no row is of a split that {o.benchmark} scores")
    else:
        check_vocabularies(o)
        with engine.session():  # as in training: the same table for the same weights
            model, tokenizer = engine.load(o.model, dtype="auto")
            if o.attack:
                case = attacks.Case(
                    engine, model, tokenizer, benchmark, rows, *texts, samples=o.attack_samples,
                    batch_size=o.batch_size, relearn_lr=o.relearn_lr, seed=o.seed,
                )  # fmt: skip
            if sets:
                ability.check(model, tokenizer, sets)
            for name in [name for name in ("retain_model", "original_model") if getattr(o, name)]:
                other, _ = engine.load(getattr(o, name), name, "auto")
                if name == "retain_model" and benchmark.forget_rows:
                    retained = truth_ratios(other, tokenizer, benchmark, rows, o.batch_size)
                if o.attack:
                    own = replace(case, model=other, retained=beside.get("retained", {}))
                    title = "retained" if name == "retain_model" else "original"
                    beside[title], _, _ = attacks.attack(o.attack, own)
            result = evaluate(
                engine, model, tokenizer, benchmark, rows, batch_size=o.batch_size, max_new_tokens=o.max_new_tokens,
                retained=retained, check_batching=True,
            )  # fmt: skip
            if o.attack:
                case.retained = beside.get("retained", {})
                case.rows = None if o.max_new_tokens else result["per_example"]
                columns, notes, more["attacks"] = attacks.attack(o.attack, case)
                result["notes"] += notes
                more["beside"] = beside
            if sets:
                found, more["ability"] = ability.measure(engine, model, tokenizer, sets, batch_size=o.batch_size)
                columns |= found
    if o.judge_url:
        asked = [row for row in result["per_example"] if row["forget"] and row["split"] != metrics.UNSEEN]
        key, cache = os.environ.get(o.judge_key_env, ""), o.judge_cache or f"{o.output}.judge.jsonl"
        write_json(o.output, result | more)  # whatever becomes of the judge
        notes = judge.rate_rows(asked, url=o.judge_url, model=o.judge_model, key=key, cache=cache, price=o.judge_price)
        result = finish(benchmark, result["per_example"], retained, result["notes"] + notes)
    result["summary"] |= columns
    print(metrics.table(benchmark, result))
    if o.attack:
        others = {title.capitalize(): found for title, found in sorted(beside.items())}
        print(attacks.table(o.attack, {"This model": result["summary"], **others}))
        if len(beside) < 2:
            print("A figure of leakage means something between two others: add --original_model and --retain_model.")
    if o.ability:
        print(*(f"{title}: {columns[name]:.1f}" for name, title in ability.TITLES.items()), sep="\n")
    for note in result["notes"]:
        print(note)
    _, form = benchmarks.FORMS.get(Path(o.output).name, (benchmark, dict))
    write_json(o.output, form(result | more))


if __name__ == "__main__":
    run_command(lambda: main(OPTIONS))
