"""The engine: how models are run, here by one process. `scale.ranks` has the same methods for several, or for offload.

The driver hands it around, so that no equation and no loop knows of processes, micro-batches or fast ways."""

import gc
import math
import sys
from contextlib import nullcontext
from copy import deepcopy
from functools import partial

import torch

import grpo
from engine import fast, model
from engine.files import RANK, remove
from engine.model import Pair


class Engine:
    """One process, on one device. Every method is the plain thing to do; what is shared out is here the whole."""

    uniform = False  # whether frozen weights need the number type of trained ones
    graphs = False  # whether `engine.graphs` is tried too

    def __init__(self, device, max_tokens=2048, rollout_prompts=0, tokenizer=""):
        self.device, self.max_tokens, self.rollout_prompts = torch.device(device), max_tokens, rollout_prompts
        self.tokenizer = tokenizer  # where every model's is read, if not with it
        self.ways, self.half = {}, self.device.type == "cuda"  # what `fast.choose` has found; whether bf16 computes

    def session(self):
        """For as long as models run. A cache of autocast's would outlive an update."""
        return torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False)

    def load(self, path, flag="model", dtype=torch.float32, training=None):
        """(model in eval mode, tokenizer) of a folder or Hugging Face id. Raises InputError naming the flag. A GPU
        holds weights in bf16 unless they are to be trained: a bf16 weight of 1 swallows every update below 4e-3.
        training: the run's settings where the model is to be trained, all of it or adapters beside it."""
        frozen = not training or (training.lora_rank and not self.uniform)
        if frozen and self.half and dtype == torch.float32:
            dtype = torch.bfloat16
        gc.collect()  # a model let go of may hold itself in cycles, as FSDP's do
        found, tokenizer = self.read(path, flag, dtype, self.tokenizer)
        return self.place(found, training), tokenizer

    read = staticmethod(model.read_model)

    def place(self, found, training=None):
        """A model in memory, on the device and ready to run."""
        return model.quicken(prepared(found, training).to(self.device), self.device)

    def reference(self, found, source):
        """What a model was before training: itself without its adapters, or a frozen copy, read from `source`."""
        return found.off() if hasattr(found, "lora") else self.load(source)[0].requires_grad_(False)

    def held(self, found):
        """All weights in place for as long as the block runs."""
        return nullcontext()

    def sample(self, found, prompts, group_size, max_new_tokens, stops, temperature, rng=None):
        """`grpo.sample`, by the fastest way that is exact, at most `rollout_prompts` prompts side by side."""
        found = self.lowered(found)
        return join(self.parts(found, prompts, group_size, max_new_tokens, stops, temperature, rng, 0, len(prompts)))

    def lowered(self, found):
        """A copy to sample from in bf16: autocast would cast weights for every token and leave rotated keys in fp32."""
        if not self.half or hasattr(found, "lora") or next(found.parameters()).dtype != torch.float32:
            return found
        low = {id(p): torch.nn.Parameter(p.detach().bfloat16(), requires_grad=False) for p in found.parameters()}
        copy = deepcopy(found, low)
        fast.CHOSEN[copy] = fast.CHOSEN.setdefault(found, {})  # tried once for all copies
        return copy

    def parts(self, found, prompts, group_size, max_new_tokens, stops, temperature, rng, first, end):
        """Samples of prompts first … end, fewer at a time once memory runs out. A response's draws go by its number."""
        way, size = fast.choose(found, "sample", self.ways), self.rollout_prompts or len(prompts)
        if self.graphs and way is fast.packed_sample:
            way = fast.choose(found, "sample, recorded", self.ways)
        n, start = len(prompts) * group_size + 1, rng and rng.get_state()  # one to spare, for places that nobody reads
        uniform = rng and partial(torch.rand, n, dtype=torch.double, device=rng.device, generator=rng)
        while first < end:
            own = prompts[first : min(end, first + size)]
            if rng:
                rng.set_state(start)
            numbers = slice(first * group_size, (first + len(own)) * group_size + 1)
            draw = rng and (lambda numbers=numbers: uniform()[numbers])
            try:
                part = way(found, own, group_size, max_new_tokens, stops, temperature, draw)
            except torch.OutOfMemoryError:
                if len(own) == 1:
                    raise
                self.rollout_prompts = size = len(own) // 2  # from now on
                print(f"out of memory: {size} prompts side by side from here on", file=sys.stderr)
                continue
            first += len(own)
            yield part

    def logprobs(self, temperature):
        """`grpo.response_logprobs` at a temperature, by the fastest way that is exact: (model, batch) → (B, T)."""

        def logprobs_of(found, batch):
            way = fast.choose(found, "logprobs", self.ways)
            with fast.checkpointing(found):
                return way(found, batch, temperature)

        return logprobs_of

    def batches(self, found, groups, loss_norm="sequence", of=None):
        """`Batch`es of at most `max_tokens` positions; `of`: all groups of the update, where some are left out."""
        for part in micro_batches(groups, self.max_tokens):
            yield grpo.collate(part, found.device, loss_norm, of or groups)

    def share(self, rows, size):
        """(this process's rows; what the mean over them counts for in the mean over all, each of size(row))."""
        return rows, 1.0

    def scored(self, score, found, rows):
        """score(found, rows): a tensor from which `backward`'s loss is made."""
        return score(found, rows)

    def backward(self, loss):
        """Add a loss's gradient to those of the weights. Returns: its value over all processes."""
        loss.backward()
        return loss.item()

    def gather(self, value):
        """[the value of every process]."""
        return [value]

    def reduce(self, groups, *sums):
        """What each process's `grpo.on_policy_gradient` has returned and filled in, over all of them."""
        self.complete(groups, "train_logprobs")
        return [sum(self.gather(value)) for value in sums]

    def joined(self, tensor):
        """The tensors of all processes as one."""
        return tensor

    def complete(self, groups, name):
        """Give every process what each has filled in of one field."""

    def step(self, found, optimizer, max_grad_norm):
        """Clip, step and clear. Returns the norm before clipping; where it is not finite, no step is taken."""
        norm = self.whole(torch.nn.utils.clip_grad_norm_(found.parameters(), max_grad_norm)).item()
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def whole(self, tensor):
        """A tensor of which each process may hold a part, in full."""
        return tensor

    def wait(self):
        """For the other processes."""

    def plain(self, found, dtype):
        """(a model to save in `dtype`, its weights where they are not its own). `found`, cast in place, is spent."""
        if isinstance(found, Pair):
            pair, weights = zip(*(self.plain(part, dtype) for part in found.pair), strict=True)
            return Pair(*pair, found.alpha), weights
        if not hasattr(found, "kind"):
            return found.to(dtype), None
        with torch.device("meta"):
            bare = found.kind(found.config).to(dtype)  # says what `weights` are, and holds no memory
        bare.generation_config = found.generation_config
        return bare, self.weights_of(found, dtype)

    def weights_of(self, found, dtype):
        """All weights of a model with adapters, which are cast once those are added."""
        return found.state_dict()

    def state_of(self, found, optimizer, folder, name):
        """What a saved state keeps of both: all weights but frozen ones."""
        return {"model": trained(found, found.state_dict()), "optimizer": optimizer.state_dict()}

    def restore(self, payload, found, optimizer):
        """Put back what `state_of` of one process has kept."""
        found.load_state_dict(found.state_dict() | payload["model"])
        optimizer.load_state_dict(payload["optimizer"])

    def forget_states(self, folder, but):
        """Remove earlier states of several processes, all but `but`, and what a killed run has left half done."""
        for path in [] if RANK else {*folder.glob("shards*"), *folder.glob("*.tmp")}:
            if path.name != but:
                remove(path)
        self.wait()


def prepared(found, training):
    """A model in eval mode; one to be trained, as the run's settings want it."""
    if training and training.gradient_checkpointing:
        fast.checkpoint_layers(found)
    if training and training.lora_rank:
        from engine import lora  # here: peft takes seconds to import

        lora.adapt(found, training)
    return found.eval()


def trained(found, weights):
    """Of a model's weights, {name: tensor}, those that are not frozen."""
    frozen = {name for name, p in found.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: tensor for name, tensor in weights.items() if name not in frozen}


def join(parts):
    """(ids, mask, logprobs) of some prompts at a time → of all, each (N, G, T)."""
    parts = list(parts)
    width = max(ids.shape[-1] for ids, *_ in parts)
    padded = [[torch.nn.functional.pad(t, (0, width - t.shape[-1])) for t in part] for part in parts]
    return tuple(torch.cat(kind) for kind in zip(*padded, strict=True))


def micro_batches(groups, max_tokens):
    """Split groups, sorted by length, so that a part computes at most `max_tokens` positions (one group at least)."""
    parts, width, size = [], 0, 0
    for group in sorted(groups, key=lambda g: (len(g.prompt_ids), g.mask.shape[1])):
        cost = len(group.prompt_ids) + group.mask.numel()  # P + G·T
        if not parts or (size + 1) * max(width, cost) > max_tokens:
            parts, width, size = [*parts, []], 0, 0
        parts[-1].append(group)
        width, size = max(width, cost), size + 1
    return parts
