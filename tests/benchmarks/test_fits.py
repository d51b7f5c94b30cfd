"""Whether prompts, answers and a model's context fit each other, to the very token."""

import pytest
from made import byte_tokenizer, make_model, make_muse, make_rwku, make_tofu, probes_of

import evaluate as ev
from benchmarks import ALL, shared
from config import InputError
from data import Prompt, encode_prompt
from engine.process import Engine


def test_lengths_are_checked_at_the_very_token():
    tokenizer, texts = byte_tokenizer(), [Prompt(None, "ab"), Prompt(None, "abcde")]  # 6 tokens with BOS
    rows = [encode_prompt(tokenizer, prompt) for prompt in texts]
    model = make_model(vocab=len(tokenizer))
    model.config.max_position_embeddings = 10
    shared.check_ids(model, tokenizer, rows, [4, 4])
    said = "6 tokens with 5 more to write .--max_new_tokens 5. exceed the model's context of 10: .*abcde'"
    with pytest.raises(InputError, match=said):
        shared.check_ids(model, tokenizer, rows, [5, 5])
    del model.config.max_position_embeddings  # a model without such a limit
    shared.check_ids(model, tokenizer, rows, [5, 5])


def test_context_needed_is_enough_and_no_more(tmp_path):
    engine, tokenizer = Engine("cpu"), byte_tokenizer()
    for name, make in (("rwku", make_rwku), ("muse", make_muse), ("tofu", make_tofu)):
        make(tmp_path / name)
        benchmark, probes = ALL[name], probes_of(name, tmp_path / name)
        needed = shared.context_needed(tokenizer, benchmark, probes)
        ev.evaluate(engine, make_model(context=needed), tokenizer, benchmark, probes, progress=False)
        with pytest.raises(InputError, match="context"):
            ev.evaluate(engine, make_model(context=needed - 1), tokenizer, benchmark, probes, progress=False)
