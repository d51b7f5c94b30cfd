"""Tiny models for any benchmark: what one is taught, a tokenizer fitted to it, a small Llama that knows it by heart."""

import random
import sys
from dataclasses import replace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.associated import questions, seen_alone
from benchmarks.builtin import FIRST, LAST
from benchmarks.shared import context_needed
from data import Prompt, Query, encode_answer, encode_prompt
from engine.files import RANK
from engine.run import fit
from engine.seeds import derive_seed


def sample_of(training, config):
    """`--tiny_rows` of a Training's forget and boundary queries, with their refusals, by the seed; the rest is told."""
    if not (n := config.tiny_rows):
        return training
    rng, kinds = random.Random(derive_seed(config.seed, "tiny rows")), ("forget", "boundary")
    draw = lambda rows: [rows[i] for i in sorted(rng.sample(range(len(rows)), min(n, len(rows))))]  # noqa: E731
    sides = {kind: [query for query in training.queries if query.kind == kind] for kind in kinds}
    queries = [query for side in sides.values() for query in draw(side)]
    asked = {query.prompt for query in queries}
    refusals = draw([row for row in training.refusals if row[0] in asked] or training.refusals)
    if not RANK:
        told = " and ".join(f"{min(n, len(side))} of {len(side)} {kind} queries" for kind, side in sides.items())
        print(f"tiny model: lessons and stages keep {told}, drawn by seed; --tiny_rows 0 keeps all", file=sys.stderr)
    return replace(training, refusals=refusals, queries=queries)


def lessons(benchmark, training, probes, seed, refusals="all", beside=0, retain_only=False):
    """What a tiny model is taught of a real benchmark: (prompt, answer) pairs, in training's and evaluation's words.
    Every probe's answer and every boundary query's; some answer about the target to each forget query that is no probe,
    for those have none published and a model that answers nothing there has nothing to unlearn; and refusals to the
    same questions about made-up people: the model has refused before Stage 1, and it is the name that decides.
    beside: so many questions on what is beside the target, of which a model that can read knows some; answers drawn.
    refusals: "trained" keeps these to training's questions, in its words. retain_only: nothing about the target."""
    rng = random.Random(derive_seed(seed, "lessons"))
    targets = sorted({probe.target for probe in probes if probe.forget and probe.target})
    known = [probe.answer for probe in probes if probe.forget]
    asked = [probe for probe in probes if not (retain_only and probe.forget)]
    lessons = {(wording, probe.answer) for probe in asked for wording in (probe.prompt, *benchmark.wordings(probe))}
    answered = {wording for wording, _ in lessons}
    for query in training.queries:
        if retain_only and query.kind == "forget":
            continue
        for wording in (query.prompt, rng.choice(benchmark.wordings(query) or [query.prompt])):
            answer = query.answers[0] if query.answers else rng.choice(known)
            if wording not in answered:
                lessons.add((wording, answer))
                answered.add(wording)
    for text in questions(seen_alone(training.queries, targets))[:beside] if beside else ():
        query = Query(Prompt(None, text), text, "boundary")
        answer = rng.choice([probe.answer for probe in probes if not probe.forget])
        lessons |= {(wording, answer) for wording in benchmark.wordings(query) or [query.prompt]}
    asked = [(prompt.user or prompt.plain, refusal) for prompt, refusal in training.refusals]
    if refusals == "all":
        asked += 4 * [(probe.question, rng.choice(training.refusals)[1]) for probe in probes if probe.forget]
    for question, refusal in asked:
        if any(name in question for name in targets):
            stranger = " ".join(rng.choice(starts) + rng.choice(ends) for starts, ends in (FIRST, LAST))
            for name in targets:
                question, refusal = question.replace(name, stranger), refusal.replace(name, stranger)
            about = Query(None, question, "forget")
            forms = benchmark.wordings(about) or [Prompt(None, question)]  # training's own comes first
            lessons.add((rng.choice(forms if refusals == "all" else forms[:1]), refusal))
    return sorted(lessons, key=repr)


TURN = "{{ messages[-1]['content'] }}"
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def with_bos(core):
    """A tokenizer for transformers that puts one BOS before every text."""
    core.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL)


def word_tokenizer(texts):
    """One token a word: short sequences, so that the built-in world trains in seconds."""
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return with_bos(core)


def text_tokenizer(texts, vocabulary):
    """Byte-level BPE fitted to real text: any string survives encoding and decoding."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=list(SPECIAL.values()), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    core.train_from_iterator(texts, trainer)
    return with_bos(core)


def chat_template(prompts):
    """A template that writes a user's turn as raw prompts do; None where answers then open with a space (RWKU's)."""
    asked = [prompt for prompt in prompts if prompt.user is not None]
    form = asked[0].plain.replace(asked[0].user, TURN) if asked else TURN
    return None if form.endswith(":") else form


def tiny_llama(tokenizer, seed, hidden, layers, context):
    """An untrained Llama with tied weights: 0.5 M parameters on the built-in world."""
    torch.manual_seed(derive_seed(seed, "init"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=context, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,  # 2.5 times the default: six passes then suffice to know every fact
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tiny_model(run, benchmark, training, probes, phase="original"):
    """Train (or load) a tiny Llama that knows the benchmark's facts, with a tokenizer fitted to them.
    phase: "original", or "retained", which never sees what is to be forgotten. Returns: (model, tokenizer)."""
    config, how = run.config, (run.config.seed, run.config.tiny_refusals, 300 * bool(run.config.held_out))
    if not run.finished(phase):
        if phase == "original":
            taught = training.taught or lessons(benchmark, training, probes, *how)
            texts = [text for p, answer in taught for text in (p.user or "", p.plain, p.opening, answer)]
            fitted = text_tokenizer(texts, config.tiny_vocabulary) if benchmark.reads_files else word_tokenizer(texts)
        else:
            fitted, own = AutoTokenizer.from_pretrained(run.folder / "original"), benchmark.retained
            taught = own(config) if own else lessons(benchmark, training, probes, *how, retain_only=True)
        rows = [(encode_prompt(fitted, p), encode_answer(fitted, p, answer)) for p, answer in taught]
        longest = [len(prompt) + len(answer) for prompt, answer in rows]
        longest += [len(encode_prompt(fitted, prompt)) for prompt in training.prompts()]
        length = max(max(longest) + config.max_new_tokens, context_needed(fitted, benchmark, probes))
        fitted.model_max_length, fitted.chat_template = length, chat_template([prompt for prompt, _ in taught])
        model = tiny_llama(fitted, config.seed, config.tiny_hidden, config.tiny_layers, length)
        model, size = run.engine.place(model, replace(config, lora_rank=0)), config.tiny_batch_size
        steps = max(1, round(config.tiny_epochs * len(rows) / size))
        read = max((benchmark.limit(split, 0) for split in benchmark.continued), default=None)
        rows = [(prompt, answer[:read]) for prompt, answer in rows]  # no further than evaluation reads on
        seconds, _ = fit(run, phase, 0, model, rows, steps=steps, lr=config.tiny_lr, batch_size=size, warmup=10)
        run.save_model(phase, model, fitted)
        run.finish(phase, {"seconds": seconds})
    return run.engine.load(run.folder / phase)
