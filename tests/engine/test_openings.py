"""What many prompts open with is computed once, and nothing but rounding tells."""

import torch
from conftest import drawing

import grpo
import sft
from engine import fast

OPENINGS = [3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5]
RESTS = [[11], [12, 13], [14, 15, 16], [17], [18, 19], [21, 22]]
PROMPTS = [OPENINGS[i % 2] + rest for i, rest in enumerate(RESTS)] + [[31, 32, 33, 34, 35, 36, 37], [38]]


def positions_of(model, run):
    """(token positions that the model computes while `run()` runs, what it returns)."""
    seen = []
    hook = model.register_forward_pre_hook(lambda _, args, how: seen.append(how["input_ids"].numel()), with_kwargs=True)
    try:
        return (lambda found: (sum(seen), found))(run())
    finally:
        hook.remove()


def test_openings_are_found_and_the_rests_attend_to_their_own(any_model, monkeypatch):
    monkeypatch.setattr(fast, "OPENING", 4)
    with torch.no_grad():
        rests, cache, seen = fast.read_openings(any_model, PROMPTS)
        assert rests == [*RESTS, [37], [38]]
        assert seen.sum(1).tolist() == [6, 5, 6, 5, 6, 5, 6, 0] and cache.get_seq_length() == 6
        for i in (0, 1, 6):
            alone = any_model(input_ids=torch.tensor([PROMPTS[i][: int(seen[i].sum())]]), use_cache=True)
            keys = cache.layers[1].keys[i][:, seen[i]]
            torch.testing.assert_close(keys, alone.past_key_values.layers[1].keys[0], atol=1e-5, rtol=1e-4)


def test_sampling_with_shared_openings_is_sampling(any_model, monkeypatch):
    """The same draws give the same tokens and log-probabilities as the plain way, from fewer positions."""
    plain = [
        grpo.sample(any_model, PROMPTS, g, 8, [2], t, drawing(len(PROMPTS) * g, 1)) for g, t in ((1, 0.0), (3, 1.0))
    ]
    counts = []
    for least in (64, 4):
        monkeypatch.setattr(fast, "OPENING", least)
        for (g, t), (ids, mask, logprobs) in zip(((1, 0.0), (3, 1.0)), plain, strict=True):
            draw = drawing(len(PROMPTS) * g, 1)
            found = positions_of(
                any_model, lambda g=g, t=t, d=draw: fast.packed_sample(any_model, PROMPTS, g, 8, [2], t, d)
            )
            counts.append(found[0])
            assert torch.equal(found[1][0] * found[1][1], ids * mask) and torch.equal(found[1][1], mask)
            torch.testing.assert_close(found[1][2], logprobs, atol=1e-4, rtol=1e-4)
    whole, shared = len(PROMPTS) * 9, 4 * 6 + len(PROMPTS) * 3
    assert counts[0] - counts[2] == counts[1] - counts[3] == whole - shared


def test_the_loss_of_lessons_with_shared_openings_has_the_same_gradient(any_model, monkeypatch):
    monkeypatch.setattr(fast, "OPENING", 4)
    rows = [(prompt, [prompt[0], 20 + i, 2]) for i, prompt in enumerate(PROMPTS)]
    found = []
    for shared in (False, True):
        any_model.zero_grad()
        prompts, *past = fast.read_openings(any_model, PROMPTS) if shared else [PROMPTS]
        assert not shared or past[0] is not None
        loss = sft.sft_loss_of(any_model, [(p, a) for p, (_, a) in zip(prompts, rows, strict=True)], *past)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in any_model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-3)


def test_short_or_unlike_prompts_are_left_alone(model):
    for prompts in ([[3, 4, 5] + rest for rest in RESTS], [[i] * 70 for i in range(3, 9)], [list(range(3, 39)) * 2]):
        rests, cache, seen = fast.read_openings(model, prompts)
        assert rests is prompts and cache is None and seen.shape == (len(prompts), 0)


def test_the_try_out_reads_an_opening_where_the_context_has_room(model, monkeypatch):
    """A model that cannot go on from shared keys is sampled from plainly."""
    read = []
    real = fast.read_openings
    monkeypatch.setattr(fast, "read_openings", lambda *args: read.append(real(*args)) or read[-1])
    for context, shares in ((64, False), (200, True)):
        model.config.max_position_embeddings = context
        fast.CHOSEN.pop(model, None)
        assert fast.choose(model, "sample", {}) is fast.packed_sample
        assert (read[-1][1] is not None) == shares
    monkeypatch.setattr(
        fast, "read_openings", lambda model, prompts: (lambda r, c, s: (r, c, ~s))(*real(model, prompts))
    )
    fast.CHOSEN.pop(model, None)
    assert fast.choose(model, "sample", {}) is grpo.sample
