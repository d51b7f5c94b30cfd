"""Asking a model: draws, limits and greedy answers against the sampler row by row, forced scores against a loop."""

import pytest
import torch
from conftest import tiny
from made import make_tofu, probes_of

from benchmarks import answers, tofu
from benchmarks.tiny import word_tokenizer
from config import InputError
from data import Prompt
from engine.process import Engine
from engine.seeds import generator

ENGINE = Engine("cpu")
WORDS = word_tokenizer([" ".join(f"w{i}" for i in range(36))])  # as many tokens as the model has
PROMPTS = [[1, 5, 6], [1, 7], [1, 8, 9, 10, 11], [1, 5, 6]]  # the first and the last are the same
LIMITS = [6, 2, 9, 6]

torch.set_num_threads(1)


def drawn(model, seed=0, size=4, group=5, temperature=1.0, prompts=PROMPTS, limits=LIMITS):
    def rng_of(first):
        return generator("cpu", seed, first)

    return answers.sampled(
        ENGINE, model, WORDS, prompts, limits, False, size, group, temperature, rng_of, progress=False
    )  # fmt: skip


# --- sampled and greedy answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 4])
def test_one_seed_is_one_set_of_draws(model, size):
    found = drawn(model, size=size)
    assert [len(some) for some in found] == [5] * 4 and found == drawn(model, size=size) != drawn(model, 1, size)
    for texts in ([text for text, _ in some] for some in found):
        assert len(set(texts)) > 1  # the samples of one prompt
    assert found[0] != found[3]  # of two prompts that read the same, in one batch or in two
    alike = answers.sampled(
        ENGINE, model, WORDS, PROMPTS, LIMITS, False, 1, 5, 1.0, lambda first: generator("cpu", 0), progress=False
    )  # fmt: skip
    assert alike[0] == alike[3]  # where the row has no part in the seed, they are the same


def test_draws_are_those_of_the_engine_and_each_answer_has_its_own_limit(model):
    order = [2, 0, 3, 1]  # by limit, then by length
    ids, mask, _ = ENGINE.sample(model, [PROMPTS[i] for i in order], 200, 9, [2], 1.0, generator("cpu", 0, order[0]))
    found, ends = drawn(model, group=200), set()
    for n, i in enumerate(order):
        for g, (text, truncated) in enumerate(found[i]):
            tokens = ids[n, g][mask[n, g]].tolist()
            ends.add((*tokens, 2).index(2) - LIMITS[i])
            assert text == WORDS.decode(tokens[: LIMITS[i]], skip_special_tokens=True)
            assert truncated == (2 not in tokens[: LIMITS[i]]) and len(text.split()) <= LIMITS[i]
    assert {-2, -1, 0, 1} <= ends  # an EOS before the limit, as the last token within it, and after it


def test_draws_follow_the_models_probabilities(model):
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[2]])).logits[0, -1]
    for temperature in (0.6, 1.0):
        ((*some,),) = drawn(model, group=4000, temperature=temperature, prompts=PROMPTS[2:3], limits=[1])
        first = [text for text, _ in some]
        wanted = torch.softmax(logits / temperature, -1)
        shares = torch.tensor([first.count(f"w{i}") / 4000 for i in range(36)])
        order = [WORDS.convert_tokens_to_ids(f"w{i}") for i in range(36)]
        assert (shares - wanted[order]).abs().max() < 5 * (0.25 / 4000) ** 0.5 and wanted.max() > 0.1


def naive_greedy(model, prompt, limit):
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + limit and (len(ids) == len(prompt) or ids[-1] != 2):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return WORDS.decode(ids[len(prompt) :], skip_special_tokens=True), ids[-1] != 2


def test_greedy_is_temperature_0(any_model):
    wanted = [naive_greedy(any_model, prompt, limit) for prompt, limit in zip(PROMPTS, LIMITS, strict=True)]
    for size in (1, 2, 4):
        assert answers.greedy(ENGINE, any_model, WORDS, PROMPTS, LIMITS, False, size, progress=False) == wanted
    assert drawn(any_model, group=3, temperature=0.0) == [[one] * 3 for one in wanted]
    assert drawn(any_model, group=1) != [[one] for one in wanted]


def test_running_out_of_memory_halves_the_batch_of_samples(model):
    sizes = []

    class Small(Engine):
        def sample(self, found, prompts, *rest):
            sizes.append(len(prompts))
            if len(prompts) > 2:
                raise torch.OutOfMemoryError
            return super().sample(found, prompts, *rest)

    args = (model, WORDS, PROMPTS, LIMITS, False)

    def rng_of(first):
        return generator("cpu", first)

    found = answers.sampled(Small("cpu"), *args, 4, 3, 1.0, rng_of, progress=False)
    assert sizes == [4, 2, 2] and found == answers.sampled(ENGINE, *args, 2, 3, 1.0, rng_of, progress=False)


# --- forced scores ---------------------------------------------------------------------------------------------------


def random_rows():
    rng = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 40, (n,), generator=rng).tolist() for n in (2, 17, 9, 30, 3, 9)]
    return rows, [1, 1, 8, 21, 2, 4]  # from the first token that has one before it to the last


@pytest.mark.parametrize("size", [1, 4, 64])
def test_forced_equals_a_loop_over_tokens(any_model, size):
    rows, starts = random_rows()

    def read(logits, ids):
        assert logits.dtype == torch.float32 and logits.shape == (len(ids), 40)
        return logits.clone(), ids.tolist()

    with answers.inference(any_model):
        found = answers.forced(any_model, WORDS, rows, starts, read, size, progress=False)
    with torch.no_grad():
        for row, start, (logits, ids) in zip(rows, starts, found, strict=True):
            assert ids == row[start:]
            for t in range(start, len(row)):
                wanted = any_model(torch.tensor([row[:t]])).logits[0, -1]  # from what comes before it alone
                assert (logits[t - start] - wanted).abs().max() < 1e-4 < wanted.abs().max()


def test_forced_reads_half_precision_in_float32(model):
    rows, starts = random_rows()
    kinds = answers.forced(model.bfloat16(), WORDS, rows, starts, lambda logits, ids: logits.dtype, 4, progress=False)
    assert kinds == [torch.float32] * len(rows)


def test_forced_tells_a_row_longer_than_the_context():
    model = tiny("llama")
    with pytest.raises(InputError, match="65 tokens exceed the model's context of 64"):
        answers.forced(model, WORDS, [[5] * 65], [1], lambda *_: None, 1, progress=False)


def test_the_answer_of_a_pair_starts_after_the_prompts_own_tokens():
    rows, starts = answers.pair_rows(WORDS, [(Prompt(None, "w0 w1 "), "w2"), (Prompt(None, "w3", " w4 "), "")])
    names = [WORDS.convert_ids_to_tokens(row) for row in rows]
    assert names == [["<s>", "w0", "w1", "w2", "</s>"], ["<s>", "w3", "w4", "</s>"]] and starts == [3, 3]


def test_limits_are_the_benchmarks_own_unless_one_is_given(tmp_path):
    make_tofu(tmp_path)
    probes, benchmark = probes_of("tofu", tmp_path)[:2], tofu.BENCHMARK
    assert answers.limits_of(benchmark, probes, [[1] * 30, [1] * 250]) == [170, 1]
    assert answers.limits_of(benchmark, probes, [[1] * 30, [1] * 250], 7) == [7, 7]


# --- the bar ---------------------------------------------------------------------------------------------------------


def test_the_bar_moves_within_a_batch_and_ends_at_the_rows(model, monkeypatch):
    """A batch of hundreds takes minutes; the bar counts rows, and each token written moves it on."""
    bars = []

    class Watched(answers.Bar):
        def __init__(self, **how):
            super().__init__(**how)
            self.places = []
            bars.append(self)

        def update(self, n):
            self.n += n
            self.places.append(self.n)

    monkeypatch.setattr(answers, "Bar", Watched)
    hooks = len(model._forward_hooks)
    rows = [[1, 5 + i] for i in range(20)]
    answers.greedy(ENGINE, model, WORDS, rows, [10] * 20, False, 10)
    (bar,), places = bars, bars[0].places
    assert bar.total == 20 and places[-1] == 20 and 10 in places and places == sorted(places)
    assert len({place for place in places if place < 10}) > 3 and len({p for p in places if 10 < p < 20}) > 3
    assert len(model._forward_hooks) == hooks
