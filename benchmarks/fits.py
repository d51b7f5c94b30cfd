"""Whether a model, its tokenizer and a benchmark's texts fit each other."""

from config import InputError
from data import encode_pair, encode_prompt


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
