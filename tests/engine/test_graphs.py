"""Decoding in steps of fixed shape, as CUDA graphs need it: they draw what plain ones draw."""

import pytest
import torch
from conftest import drawing, tiny

import grpo
from engine import fast, graphs
from engine.process import Engine


@pytest.mark.parametrize("group_size", [1, 3, 8])
def test_steps_of_fixed_shape_draw_what_the_plain_sampler_draws(any_model, group_size):
    prompts = [[3, 4], [5, 6, 7, 8, 9], [8], [4, 4, 4]]
    for stops in ([], [2], list(range(2, 12))):
        fixed, plain = (
            sample(any_model, prompts, group_size, 50, stops, 1.0, drawing(4 * group_size, 1))
            for sample in (graphs.recorded_sample, grpo.sample)
        )
        assert torch.equal(fixed[0], plain[0]) and torch.equal(fixed[1], plain[1])
        assert torch.allclose(fixed[2], plain[2], atol=1e-5)


def test_a_step_is_recorded_anew_only_where_room_grows_or_rows_move(model, monkeypatch):
    """On a device with graphs, which a counter stands in for: every other step is replayed on the same tensors."""
    recorded, steps, shapes = [], [], set()

    class Watched(graphs.Recorded):
        def __call__(self, **inputs):
            kept = {name: id(tensor) for name, tensor in self.inputs.items()}
            logits = super().__call__(**inputs)
            now = {name: id(tensor) for name, tensor in self.inputs.items()}
            recorded.append(now != kept)
            steps.append(inputs["input_ids"].numel())
            shapes.add((tuple(self.inputs["input_ids"].shape), self.inputs["attention_mask"].shape[-1]))
            assert self.inputs["attention_mask"].shape[-1] == self.cache.layers[0].keys.shape[2]
            return logits

    fast.packed_sample(model, [[3, 4], [5]], 4, 50, [], 0.0, None, Watched, graphs.FixedRoom)
    assert len(steps) == 49 and sum(recorded) == len(shapes) == 2  # 34 steps fit the first room; the next is larger


def test_recorded_steps_are_tried_only_where_asked_and_packed_ones_are_right(model, capsys):
    engine = Engine("cpu")
    engine.graphs = True
    ids, *_ = engine.sample(model, [[3, 4], [5]], 2, 6, [], 0.0)
    assert torch.equal(ids, grpo.sample(model, [[3, 4], [5]], 2, 6, [], 0.0)[0])
    assert engine.ways["sample, recorded, LlamaForCausalLM"] == "recorded_sample: gives the plain numbers"
    assert "sample, recorded, LlamaForCausalLM" not in Engine("cpu").ways


@pytest.mark.parametrize("times, taken", [(2.5, "packed_sample"), (0.5, "sample")])
def test_on_a_gpu_the_faster_way_is_taken_and_the_figure_told(model, monkeypatch, times, taken):
    monkeypatch.setattr(fast, "is_timed", lambda model: True)
    monkeypatch.setattr(fast, "TIMES", {})
    asked = []
    monkeypatch.setattr(fast, "speedup", lambda *how: asked.append(0) or times)
    told = {}
    for _ in range(2):
        assert fast.choose(tiny("llama"), "sample", told).__name__ == taken
    line = {2.5: "gives the plain numbers, 2.5 times as fast as sample", 0.5: "packed_sample takes 2.0 times as long"}
    assert told == {"sample, LlamaForCausalLM": f"{taken}: {line[times]}"} and len(asked) == 1


def test_speed_is_measured_on_both_ways_once_warm(model):
    calls = []
    ways = [lambda *how, name=name: calls.append(name) for name in ("fast", "plain")]
    assert fast.speedup(model, *ways) > 0 and calls == ["plain", "fast", "plain", "fast"]


def test_a_forced_text_is_compared_to_its_last_token_in_half_precision_with_a_large_vocabulary():
    """Draws would differ after a few tokens, and the fast way would be turned down for rounding alone."""
    model = tiny("qwen2", 30_000).bfloat16()
    told = {}
    assert fast.choose(model, "sample", told) is fast.packed_sample, told
