"""What stands beside the target: names that forget prompts hold and boundary prompts lack, and how they fare.

Not in the paper. What a forget prompt names beside its target is refused along with it unless boundary prompts ask
about it too; the reward never sees that, for no prompt that it looks at asks. `--associated` adds boundary queries
about such names: wordings from `associated.txt`, answers from the original model. Others of them, and boundary queries
that training leaves out, are asked as Stage 2 goes on (`--held_out`). No evaluation probe is in either."""

import random
import re
import sys
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import harmonic_mean

from benchmarks.answers import greedy, inference
from benchmarks.metrics import mean, names, words
from config import InputError
from data import Prompt, Query, encode_prompt
from engine.files import RANK, printable, read_lines
from engine.plots import NAMES
from engine.seeds import derive_seed
from refusal import is_refusal
from reward import rouge_l_recall

QUESTIONS = Path(__file__).with_name("associated.txt").read_text(encoding="utf-8").splitlines()
CAPITAL = r"[^\W\d_a-zß-öø-ÿ][\w-]*"
RUN = re.compile(rf"(?<![\w-]){CAPITAL}(?: (?:(?:of|the|van|von|de|da|del|der|bin|al|la) )*{CAPITAL})*")
LONGEST = 48  # tokens of an answer
TIMES = 6  # that Stage 2 is looked at
WORSE = 5  # points less recall, or more refusals, than after Stage 1, from which on it is told
REMEDIES = "--associated 240 asks about names that forget prompts hold; a lower --lr, fewer --steps, --keep best"


def names_in(text, targets, plain):
    """Runs of capitalised words but the targets'; words that open a sentence count unless they are among `plain`."""
    known, found = {word for target in targets for word in words(target)}, []
    for target in targets:
        text = re.sub(rf"(?<!\w){re.escape(target)}(?!\w)", "|", text, flags=re.I)
    for run in RUN.finditer(text):
        parts = run[0].split()
        while parts and parts[0].lower() in plain and re.search(r"(^|[.!?:|\"'“‘(])\s*$", text[: run.start()]):
            parts.pop(0)
        if {*words(" ".join(parts))} - known:
            found.append(" ".join(parts))
    return found


def seen_alone(queries, targets):
    """{name: forget prompts that hold it} of names in two of them or more and in no boundary prompt, by frequency."""
    forget, boundary = ([q.question for q in queries if q.kind == kind] for kind in ("forget", "boundary"))
    plain = {word for text in forget + boundary for word in re.findall(r"\w+", text) if word.islower()}
    count, kept = Counter(name for text in forget for name in {*names_in(text, targets, plain)}), " | ".join(boundary)
    missing = [name for name in count if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", kept, re.I)]
    return {name: count[name] for name in sorted(missing, key=lambda name: (-count[name], name)) if count[name] > 1}


def questions(alone, benchmark, asked):
    """Boundary queries without answers about the names of `seen_alone`: as many for each as forget prompts hold it, in
    other words each, the first about every name first. asked: the evaluation's questions, which are left out."""
    found = []
    for k in range(len(QUESTIONS)):
        for i, name in enumerate(name for name, n in alone.items() if n >= k):
            text = QUESTIONS[(10 * k + k // 2 + i) % len(QUESTIONS)].format(name=name)
            query = Query(Prompt(None, text), text, "boundary", group="associated")
            if text not in asked:
                found.append(replace(query, prompt=(benchmark.wordings(query) or [query.prompt])[0]))
    return found


def ask(engine, model, tokenizer, queries, config):
    """Greedy answers, a line each."""
    prompts = [encode_prompt(tokenizer, query.prompt) for query in queries]
    limits = [min(LONGEST, config.max_new_tokens)] * len(prompts)
    with inference(model), engine.held(model):
        found = greedy(engine, model, tokenizer, prompts, limits, True, config.eval_batch_size, progress=False)
    return [text.strip() for text, _ in found]


def split(training, benchmark, probes, engine, model, tokenizer, config):
    """(The training, with `--associated` queries; what `measure` asks: boundary queries held out of it, questions about
    associated names, forget queries). model: the original one, whose answers about these names are to be kept, less
    refusals and those that name the target."""
    n, targets = config.held_out, {probe.target for probe in probes if probe.forget and probe.target}
    if config.associated and not targets:
        raise InputError(f"--associated: --benchmark {benchmark.name} names no target, beside which names could stand")
    if not n and not config.associated:
        return training, []
    alone = seen_alone(training.queries, targets) if targets else {}
    if not RANK and alone:
        some = ", ".join(f"{printable(name)} ({times})" for name, times in [*alone.items()][:8])
        told = f"{some}{f' and {len(alone) - 8} names more' if len(alone) > 8 else ''}"
        print(f"will probably be refused too, named in forget prompts and no boundary prompt: {told}", file=sys.stderr)
    new = questions(alone, benchmark, {probe.question for probe in probes})[: n + config.associated]
    for i, text in enumerate(ask(engine, model, tokenizer, new, config)):
        useful = words(text) and not is_refusal(text) and not any(names(text, target) for target in targets)
        new[i] = useful and replace(new[i], answers=(text,))
    rng, sides = random.Random(derive_seed(config.seed, "held out")), {"boundary": [], "forget": []}
    for query in training.queries:
        sides[query.kind].append(query)
    out, again = (rng.sample(side, min(n, len(side) // 10)) for side in sides.values())
    kept = [query for query in training.queries if query not in out]
    return replace(training, queries=kept + [*filter(None, new[n:])]), out + [*filter(None, new[:n])] + again


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
    if held and (step % max(1, config.steps // TIMES) == 0 or step == config.steps):
        row |= measure(run.engine, model, tokenizer, held, config)
        logged = [past for past in read_lines(run.folder / "metrics.jsonl") if past["method"] == method]
        if config.keep == "best" and balance(row) > max(map(balance, logged), default=0):
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
    print(f"{phase}: {told}", file=sys.stderr)
    return [told]
