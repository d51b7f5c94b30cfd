"""What stands beside the target: names that forget prompts hold and boundary prompts lack, and how they fare.

Not in the paper. What a forget prompt names beside its target is refused along with it unless boundary prompts ask
about it too; the reward never sees that. `--associated` adds boundary queries about such names. Others, and boundary
queries that training leaves out, are asked as Stage 2 goes on (`--held_out`). No evaluation probe is in either."""

import re
import sys
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from itertools import dropwhile
from pathlib import Path
from random import Random
from statistics import harmonic_mean

from benchmarks.metrics import mean, names, words
from config import InputError
from data import Prompt, Query, encode_prompt
from engine.files import RANK, check_value, printable, read_lines, read_rows
from engine.plots import NAMES
from engine.seeds import derive_seed
from refusal import is_refusal
from reward import rouge_l_recall

WORDINGS = Path(__file__).with_name("associated.txt").read_text(encoding="utf-8").splitlines()
CAPITAL = r"[^\W\d_a-zß-öø-ÿ][\w-]*"
RUN = re.compile(rf"(?<![\w-]){CAPITAL}(?: (?:(?:of|the|van|von|de|da|del|der|bin|al|la) )*{CAPITAL})*")
OPENERS = "what when where which who whose why how did do does is was the a an in on at"  # of any sentence
WORSE = 5  # points less recall, or more refusals, than after Stage 1, from which on it is told
REMEDIES = "--associated 240 for names that forget prompts hold, --epsilon_low 1 for ReRULE, a lower --lr, --keep best"


def names_in(text, targets, plain):
    """Runs of capitalised words but the targets'; words that open a sentence count unless they are among `plain`."""
    known, found = {word for target in targets for word in words(target)}, []
    for target in targets:
        text = re.sub(rf"(?<!\w){re.escape(target)}(?!\w)", "|", text, flags=re.I)
    for run in RUN.finditer(text):
        opens = re.search(r"(^|[.!?:|\"'“‘(])\s*$", text[: run.start()])
        name = " ".join(dropwhile(lambda part, opens=opens: opens and part.lower() in plain, run[0].split()))
        found += [name] if {*words(name)} - known else []
    return found


def seen_alone(queries, targets):
    """{name: forget prompts that hold it}, by frequency: names in two of them or more and in ten times fewer boundary
    prompts, or none. Without targets, {}."""
    forget, boundary = ([q.question for q in queries if q.kind == kind] for kind in ("forget", "boundary"))
    plain = {word for text in [OPENERS, *forget, *boundary] for word in re.findall(r"\w+", text) if word.islower()}
    count = Counter(name for text in forget for name in {*names_in(text, targets, plain)})
    order = sorted([name for name in count if count[name] > 1], key=lambda name: (-count[name], name))
    kept = lambda name: len(re.findall(rf"(?<!\w){re.escape(name)}(?!\w)", " | ".join(boundary), re.I))  # noqa: E731
    return {name: count[name] for name in order if targets and 10 * kept(name) <= count[name]}


def questions(alone):
    """Questions about the names of `seen_alone`, each name in all wordings: first as many about each as forget prompts
    hold it, the first about every name before the second about any; then the rest."""
    asked = [(n < k, k, i, name) for k in range(len(WORDINGS)) for i, (name, n) in enumerate(alone.items())]
    turn = lambda k, i: WORDINGS[(10 * k + k // 2 + i) % len(WORDINGS)]  # noqa: E731
    return [turn(k, i).format(name=name) for _, k, i, name in sorted(asked)]


def ask(engine, model, tokenizer, queries, config):
    """Greedy answers, a line each."""
    from benchmarks.answers import greedy, inference  # here, for it needs torch

    prompts = [encode_prompt(tokenizer, query.prompt) for query in queries]
    limits = [min(48, config.max_new_tokens)] * len(prompts)
    with inference(model), engine.held(model):
        found = greedy(engine, model, tokenizer, prompts, limits, True, config.eval_batch_size, progress=False)
    return [text.strip() for text, _ in found]


def given(config, benchmark, probes):
    """(question, answer or "") of each row of the data's `associated.json`, if it has one. Raises: InputError."""
    path, found = Path(config.data_dir, "associated.json"), []
    if config.associated and config.data_dir and path.exists():
        found = [(row["question"], row.get("answer", "")) for row in read_rows(path, {"question": str})]
        for number, (_, answer) in enumerate(found, 1):
            check_value(answer or "none", str, f"{path}: row {number}, field 'answer'")
    if config.associated and not found and not any(probe.forget and probe.target for probe in probes):
        raise InputError(f"--associated: --benchmark {benchmark.name} names no target, beside which names could stand")
    return found


def split(training, benchmark, probes, engine, model, tokenizer, config):
    """(The training, with `--associated` queries; what `measure` asks: boundary queries held out of it, questions about
    associated names, forget queries). Questions come first from `given`; answers that nobody gave are the original
    `model`'s, less refusals and those that name the target."""
    n, targets = config.held_out, {probe.target for probe in probes if probe.forget and probe.target}
    if not n and not config.associated:
        return training, []
    alone = seen_alone(training.queries, targets)
    if not RANK and alone:
        some = ", ".join(f"{printable(name)} ({times})" for name, times in [*alone.items()][:8])
        more = f" and {len(alone) - 8} names more" if len(alone) > 8 else ""
        told = f"will probably be refused too, named in forget prompts and hardly in boundary prompts: {some}{more}"
        print(told, file=sys.stderr)

    def answered(pairs, most):
        found = [Query(Prompt(None, text), text, "boundary", (answer,), group="associated") for text, answer in pairs]
        found = [query for query in found if query.question not in evaluated][:most]
        found = [replace(query, prompt=(benchmark.wordings(query) or [query.prompt])[0]) for query in found]
        asked = [query for query in found if not query.answers[0]]
        texts = dict(zip(asked, ask(engine, model, tokenizer, asked, config) if asked else [], strict=True))
        found = [replace(query, answers=(texts.get(query, query.answers[0]),)) for query in found]
        found = [query for query in found if words(query.answers[0]) and not is_refusal(query.answers[0])]
        return [query for query in found if not any(names(query.answers[0], target) for target in targets)]

    evaluated = {probe.question for probe in probes}
    made = [(text, "") for text in questions(alone) if text not in evaluated]
    rng = Random(derive_seed(config.seed, "held out"))
    sides = ([query for query in training.queries if query.kind == kind] for kind in ("boundary", "forget"))
    out, again = (rng.sample(side, min(n, len(side) // 10)) for side in sides)
    out *= config.model == "tiny"  # a full-size run trains on all, as the paper does
    kept = [query for query in training.queries if query not in out]
    new = answered(given(config, benchmark, probes) + made[n:], config.associated)
    return replace(training, queries=kept + new), out + answered(made, n) + again


def measure(engine, model, tokenizer, held, config):
    """In %: of boundary queries that training does not ask ROUGE-L recall and refusals; of forget queries refusals."""
    near, far = ([query for query in held if (query.kind == "forget") is side] for side in (False, True))
    texts = ask(engine, model, tokenizer, near + far, config) if held else []
    recalls = [rouge_l_recall(text, query.answers[0]) for query, text in zip(near, texts, strict=False)]
    sides = {"held_refusal": texts[: len(near)], "held_forget_refusal": texts[len(near) :]}
    found = {"held_recall": recalls} | {name: map(is_refusal, side) for name, side in sides.items()}
    return {name: mean(values, 100) for name, values in found.items()} if held else {}


def watched(run, method, model, tokenizer, judge, held, step):
    """More for a step's log: {eval_<column>: …} of judge() every `--eval_every` steps, `measure`'s every few. With
    `--keep best` the model of the best balance of its figures so far is saved as <method>_best."""
    config = run.config
    summary = judge()["summary"] if config.eval_every and step % config.eval_every == 0 else {}
    row = {f"eval_{name}": value for name, value in summary.items() if isinstance(value, (int, float))}
    if held and (config.steps - step) % max(1, config.steps // 4) == 0:
        row |= measure(run.engine, model, tokenizer, held, config)
        run.metrics.size()  # puts every row on the disk
        past = [old for old in read_lines(run.folder / "metrics.jsonl") if old["method"] == method]
        if config.keep == "best" and balance(row) > max(map(balance, past), default=0):
            run.save_model(f"{method}_best", deepcopy(model), tokenizer)
    return row


def balance(row):
    """Harmonic mean of what a row of the log has measured of boundary and of forget queries; 0 where it has not."""
    return harmonic_mean([row["held_recall"], row["held_forget_refusal"]]) if row.get("held_recall") else 0


def warning(phase, row, before):
    """[What to say of RULE or ReRULE where it is worse beside the target than Stage 1 left it], told at once, or []."""
    pairs = {name: (before.get(f"held_{name}"), row.get(f"held_{name}")) for name in ("recall", "refusal")}
    known = phase in NAMES and None not in pairs["recall"] + pairs["refusal"]
    if not known or max(a - b if name == "recall" else b - a for name, (a, b) in pairs.items()) <= WORSE:
        return []
    some = ", ".join(f"{name} {old:.1f} → {new:.1f} %" for name, (old, new) in pairs.items())
    told = f"worse than Stage 1 on queries beside the target that training does not ask ({some}); {REMEDIES}"
    print(f"{phase}: {told}" * (not RANK), file=sys.stderr)
    return [told]
