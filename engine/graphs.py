"""Decoding by CUDA graphs: a step of `fast.packed_sample` is recorded once and replayed as one launch.

A recorded step has fixed shapes and places in memory, so keys stand in room that is attended to as a whole, and what of
it is not filled is masked away. Whenever room grows or rows move together, the step is recorded anew."""

import torch
import torch.nn.functional as F

from engine import fast


class FixedRoom(fast.RoomAhead):
    """Keys in room of which every step sees all. `columns`, a tensor, says where a step writes."""

    columns = None

    def update(self, keys, values, *args, **kwargs):
        self.keys.index_copy_(2, self.columns, keys)
        self.values.index_copy_(2, self.columns, values)
        return self.keys, self.values


class Recorded:
    """run(input_ids, attention_mask, position_ids) → logits, replayed while its keys stay in place; a CPU runs it."""

    def __init__(self, run, cache):
        self.run, self.cache, self.keys, self.inputs, self.graph = run, cache, None, {}, None
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    def __call__(self, **inputs):
        width, layers = inputs["input_ids"].shape[1], self.cache.layers
        starts = [layer.advance(width, torch.Tensor.new_zeros) for layer in layers]  # a NaN would outlive its mask
        unfilled = layers[0].keys.shape[2] - inputs["attention_mask"].shape[-1]
        inputs["attention_mask"] = F.pad(inputs["attention_mask"], (0, unfilled), value=-torch.inf)
        inputs["columns"] = torch.arange(starts[0], starts[0] + width, device=inputs["input_ids"].device)
        if self.keys is layers[0].keys:
            for name, tensor in inputs.items():
                self.inputs[name].copy_(tensor)
        else:
            self.keys, self.inputs, self.graph = layers[0].keys, {k: v.clone() for k, v in inputs.items()}, None
            for layer in layers:
                layer.columns = self.inputs["columns"]
        if self.keys.device.type != "cuda":
            return self.forward()
        if self.graph is None:
            self.record()
        self.graph.replay()
        return self.logits

    def forward(self):
        return self.run(past_key_values=self.cache, **{k: v for k, v in self.inputs.items() if k != "columns"}).logits

    def record(self):
        aside = torch.cuda.Stream()  # the first run of a kernel may set up what no graph can hold
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self.forward()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=self.pool):
            self.logits = self.forward()


def recorded_sample(*how):
    """`fast.packed_sample` with its steps recorded."""
    return fast.packed_sample(*how, decoder=Recorded, room=FixedRoom)


fast.WAYS["sample, recorded"] = (recorded_sample, fast.packed_sample, fast.attempt_sample)
