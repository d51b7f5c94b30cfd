"""What a run starts from: the benchmark's files, its probes, and the model that knows what is to be forgotten."""

from transformers import AutoTokenizer

import parallel
import world
from data import check_lengths, encode_answer, encode_prompt, load_benchmark
from evaluate import check_ids, context_needed
from files import InputError
from probes import check_lengths as check_retained
from probes import load_probes, read_retained
from run import load_model, quicken
from sft import fit


def load_data(config):
    """(training data, evaluation probes, what the retain-only model is taught or None)."""
    if config.benchmark == "builtin":
        built_in = world.World(config.seed, config.crossed)
        return built_in.benchmark(), built_in.probes(), built_in.taught(retain_only=True)
    benchmark = load_benchmark(config.benchmark, config.data_dir, config.seed)
    if config.retain_log:
        truth_ratios, _ = read_retained(config.retain_log)  # say what is wrong with it now, not after the training
    probes = load_probes(config.benchmark, config.data_dir)
    if config.retain_log:
        forget = sum(probe.split == "forget" for probe in probes)
        check_retained(truth_ratios, forget, f"--retain_log {config.retain_log}")
    benchmark.taught = world.lessons(benchmark, probes, config.seed)
    return benchmark, probes, None


def prompts_of(benchmark):
    """Every prompt that either stage trains on."""
    return [prompt for prompt, _ in benchmark.refusals] + [query.prompt for query in benchmark.queries]


def check_model(model, tokenizer, config, benchmark, probes):
    """Raise InputError where a given model can hold no prompt with its answer, of training or of evaluation."""
    context, prompts = getattr(model.config, "max_position_embeddings", None), prompts_of(benchmark)
    check_lengths(tokenizer, prompts, config.max_new_tokens, context)
    check_ids(model, tokenizer, [encode_prompt(tokenizer, prompt) for prompt in prompts], [0] * len(prompts))
    needed = context_needed(tokenizer, config.benchmark, probes)
    if context and needed > context:
        raise InputError(f"--model {config.model}: its context is {context} tokens, evaluation needs {needed}")


def tiny_model(run, device, benchmark, taught, probes, phase="original"):
    """Train (or load) a tiny Llama that knows `taught`, with a tokenizer fitted to the benchmark's words."""
    config = run.config
    if not run.finished(phase):
        if phase != "original":
            tokenizer = AutoTokenizer.from_pretrained(run.folder / "original")
        else:
            texts = [text for p, answer in taught for text in (p.user or "", p.plain, p.opening, answer)]
            tokenizer = world.tokenizer(texts, words=config.benchmark == "builtin")
        rows = [(encode_prompt(tokenizer, p), encode_answer(tokenizer, p, answer)) for p, answer in taught]
        longest = [len(prompt) + len(answer) for prompt, answer in rows]
        longest += [len(encode_prompt(tokenizer, prompt)) for prompt in prompts_of(benchmark)]
        context = max(max(longest) + config.max_new_tokens, context_needed(tokenizer, config.benchmark, probes))
        model = world.tiny_llama(tokenizer, config.seed, config.tiny_hidden, config.tiny_layers, context)
        model = quicken(parallel.spread(model, device, config), device)
        size = config.tiny_batch_size
        steps = max(1, round(config.tiny_epochs * len(rows) / size))
        seconds, _ = fit(run, phase, 0, model, rows, steps=steps, lr=config.tiny_lr, batch_size=size, warmup=10)
        run.save_model(phase, model, tokenizer)
        run.finish(phase, {"seconds": seconds})
    return load_model(run.folder / phase, device)
