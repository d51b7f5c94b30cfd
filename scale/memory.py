"""How much memory and disk a run takes, from a model's configuration alone: `--dry_run` prints it and stops.

What is kept for each parameter is counted. Keys, values, activations and what passes are seen on the model itself: a
step of the sampler and a micro-batch of the update run on tensors that have shapes and no memory (torch's
FakeTensorMode), so any architecture is counted as it is, with the attention that it has and with adapters.

Deviations
- Lengths are the longest that a run may meet: every response at its limit, prompts as the benchmark says.
- Left out: the process itself, about 1 GB of CUDA's own, and what an allocator cannot use. Keep a tenth free."""

import os
import shutil
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicLayer

import benchmarks
from config import InputError
from engine import fast
from engine.files import RANK
from engine.model import quicken
from engine.process import prepared
from grpo import Batch

GB, ROOMS = 1e9, (24, 40, 80)
TWICE = {"gradient_checkpointing": True}
LORA = TWICE | {"offload": False, "lora_rank": 16}
FITS = [{}, TWICE, TWICE | {"offload": True}, LORA, LORA | {"max_tokens": 1}]  # from what costs least to most
aten = torch.ops.aten


class Counted(NamedTuple):
    """What is known of a model's memory."""

    parameters: int
    layer: int  # those of the largest
    kv: float  # bytes of a token's keys and values
    rest: int  # parameters in no layer, which FSDP2 moves together
    at: Callable  # (config, fsdp) → `Lengths`


class Lengths(NamedTuple):
    """What is seen of a model at a run's lengths. In bytes, but the first."""

    adapters: int  # weights of adapters; 0 where all weights are trained
    cache: float  # keys and values of a prompt and its responses, and the room made ahead for them
    sampling: float  # passing, for each prompt, while a step samples from the full cache
    kept: int  # for the backward pass of the longest micro-batch
    most: int  # at once in its update, `kept` with what passes


class Meter(TorchDispatchMode):
    """Bytes of the tensors that exist, `now` and at `most`, of a computation in which masks select all there is."""

    def __init__(self, *but):
        super().__init__()
        self.now = self.most = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in but}

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if f is aten._local_scalar_dense.default:
            return 2**40  # as many responses are open
        if f is aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
            out = args[0].flatten(0, args[1][0].dim() - 1).clone()
        elif f is aten._index_put_impl_.default:  # the way back
            out = args[0]
        elif f is aten.masked_scatter_backward.default:
            out = args[0].new_empty(args[2])
        else:
            out = f(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        if f is aten.cumsum.default:  # copies what it converts
            self.most = max(self.most, self.now + out.nbytes)
        return out

    def forget(self, key, size):
        self.seen.discard(key)
        self.now -= size


def seen(model_config, on_gpu):
    """`Counted` of a model, whose `Lengths` are looked at when they are asked for. Raises: InputError."""
    half, looked = torch.bfloat16 if on_gpu else torch.float32, {}

    def built():
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(model_config, dtype=half).eval()

    def at(config, fsdp):
        prompt, rank = benchmarks.ALL[config.benchmark].prompt_tokens, config.lora_rank
        groups = max(1, config.max_tokens // (prompt + config.group_size * config.max_new_tokens))
        sizes = prompt, config.group_size, config.max_new_tokens, min(groups, config.prompts_per_step)
        key = fsdp, config.gradient_checkpointing, rank, *config.lora_targets, *sizes
        if key not in looked:
            model = quicken(prepared(built(), replace(config, lora_alpha=1.0)), "cuda" if on_gpu else "cpu")
            looked[key] = told(look, model, kv, on_gpu, fsdp, bool(rank), *sizes)
        return looked[key]

    model = built()
    blocks = [sum(p.numel() for p in block.parameters()) for block in fast.blocks(model)]
    n, ids = sum(p.numel() for p in model.parameters()), torch.zeros(1, 8, dtype=torch.long, device="meta")
    with torch.no_grad(), Meter():
        layers = told(lambda: model(input_ids=ids, use_cache=True).past_key_values.layers)
    kv = sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values)) / 8
    return Counted(n, max(blocks, default=0), kv, n - sum(blocks), at)


def told(look, *args):
    """look(*args); an InputError for whatever an architecture answers to shapes without memory."""
    try:
        return look(*args)
    except Exception as error:
        raise InputError(f"--dry_run: this architecture cannot be run without memory ({error!r:.100})") from None


def look(model, kv, on_gpu, fsdp, adapted, prompt, group_size, longest, groups):
    """`Lengths` of a model on the meta device. On a GPU bf16 computes: by autocast, or FSDP2's own low weights."""
    half = torch.bfloat16 if on_gpu else torch.float32
    exact = half if fsdp else torch.float32  # of what is trained, as layers see it
    low = torch.autocast("cpu", torch.bfloat16, enabled=on_gpu and not fsdp, cache_enabled=False)
    with FakeTensorMode(allow_non_fake_inputs=True), low:
        fill(model, half, exact if adapted else half)
        sampler = first_that_runs("sample", look_at_sampling, model, kv, prompt, group_size, longest)
        fill(model, half, exact)
        what = "logprobs, layers computed twice" if getattr(model, "checkpoints", False) else "logprobs"
        update = first_that_runs(what, look_at_update, model, prompt, group_size, longest, groups)
    return Lengths(sum(p.numel() for p in model.parameters() if p.requires_grad) * adapted, *sampler, *update)


def fill(model, frozen, trained):
    """Put weights that have shapes alone in place of a model's, in these number types; tied ones stay tied."""
    made = {}
    for held in [held for module in model.modules() for held in (module._parameters, module._buffers)]:
        for name, old in held.items():
            if isinstance(old, torch.nn.Parameter):
                new = torch.empty_like(old, dtype=trained if old.requires_grad else frozen, device="cpu")
                held[name] = made.setdefault(old, torch.nn.Parameter(new, old.requires_grad))
            elif old is not None:
                held[name] = made.setdefault(old, torch.empty_like(old, device="cpu"))


def first_that_runs(what, look_at, *args):
    """look_at(way, …) of the fast way, or of the plain one where an architecture cannot take that; which is told."""
    way, plain, _ = fast.WAYS[what]
    try:
        return look_at(way, *args)
    except Exception as error:
        print(f"--dry_run: counted with {plain.__name__}: {way.__name__} fails ({error!r:.80})", file=sys.stderr)
        return look_at(plain, *args)


def look_at_sampling(way, model, kv, prompt, group_size, longest):
    """`Lengths.cache` and `Lengths.sampling`, at the last token."""
    packed = way is fast.packed_sample
    before = prompt + max(0, longest - 2) * (group_size if packed else 1)  # all but two tokens stand in the prompt
    meter, drawn = Meter(*model.parameters(), *model.buffers()), []

    def draw():
        if not drawn:  # the prompt is read
            meter.most = meter.now
        drawn.append(0)
        return torch.zeros(group_size + 1, dtype=torch.double)

    def columns(prompt, steps):
        layer = DynamicLayer()
        layer.keys = layer.values = torch.empty(1, 1, prompt, 0)
        room = fast.RoomAhead(layer)
        for _ in range(steps):
            room.advance(group_size)
        return room.keys.shape[2] if packed else (prompt + steps) * group_size

    with meter:
        way(model, [[0] * before], group_size, 3, [], 1.0, draw)
    return kv * columns(prompt, longest - 1), meter.most - kv * columns(before, 2)


def look_at_update(way, model, prompt, group_size, longest, groups):
    """`Lengths.kept` and `Lengths.most`, beside weights and gradients."""
    rows, trained = groups * group_size, [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)
    ids, real = torch.zeros(groups, prompt, dtype=torch.long), torch.ones(groups, prompt, dtype=torch.bool)
    response = torch.zeros(rows, longest, dtype=torch.long), torch.ones(rows, longest, dtype=torch.bool)
    old = torch.zeros(rows, longest)
    with Meter(*model.parameters(), *model.buffers(), *(p.grad for p in trained)) as meter:
        with fast.checkpointing(model):
            logprobs = way(model, Batch([], ids, real, *response, old, old, None, old), 1.0)
        kept = meter.now
        (logprobs * old).sum().backward()
    return kept, meter.most


def plan(counted, config, ranks, on_gpu):
    """{what: (bytes on each GPU, on the host)}; "most at once" adds up what meets. ranks: 0 without torchrun."""
    n, fsdp, w, half = counted.parameters, bool(ranks) or config.offload, max(ranks, 1), 2 if on_gpu else 4
    at = counted.at(config, fsdp)
    trained = at.adapters or n
    prompts = min(config.rollout_prompts or config.prompts_per_step, -(-config.prompts_per_step // w))
    if config.offload:  # on each GPU all weights in bf16 and gradients in fp32; on the host one of each in fp32
        found = {"weights": (half * n, 4 * n), "gradients": (4 * n, 4 * n), "optimiser": (0, 8 * n)}
    else:  # what is frozen is in bf16 on one GPU
        weights = 4 * (n + at.adapters) / w if fsdp or not at.adapters else half * n + 4 * at.adapters
        found = {"weights": (weights, 0), "gradients": (4 * trained / w, 0), "optimiser": (8 * trained / w, 0)}
    found["reference"] = (0 if at.adapters else half * n / w, 0)  # without its adapters a model is the reference
    found["KV cache"], found["activations"] = (prompts * at.cache, 0), (at.kept, 0)
    sampling, update = prompts * at.sampling, at.most - at.kept
    if on_gpu and not config.offload and (fsdp or not at.adapters):
        sampling += half * n  # a copy in bf16; FSDP has all weights in place
    if fsdp:  # gradients are sent in fp32, a layer's as it is done, the rest's once activations are gone
        update = max(update + 4 * counted.layer, 4 * counted.rest - at.kept)
        update += 0 if config.offload else half * (counted.rest + 2 * counted.layer)  # the next layer's come meanwhile
    found["in passing"] = (max(sampling, update), 0)
    rollout = found["KV cache"][0] + sampling
    backward = found["gradients"][0] + found["activations"][0] + update
    always = sum(found[name][0] for name in ("weights", "optimiser", "reference"))
    found["most at once"] = (always + max(rollout, backward), sum(host for _, host in found.values()))
    return found if on_gpu else {name: (0, gpu + host) for name, (gpu, host) in found.items()}


def disk(n, adapters, config, on_gpu):
    """Bytes on disk, of n parameters and adapters: "models": all that are left; "state": one; "most at once"."""
    model = n * (2 if {"auto": on_gpu, "bfloat16": True}.get(config.save_dtype) else 4) + 4 * adapters
    models = [model * (2 if name == "whp" else 1) for name in config.method]
    state = 12 * (adapters or n) if config.save_every else 0  # weights and two moments
    most = [sum(models[:i]) + max(2 * state, state + models[i]) for i in range(len(models))]
    return {"models": sum(models), "state": state, "most at once": max([*most, sum(models)])}


def check_disk(n, config, folder, on_gpu):
    """Raise InputError where the disk has no room for what a run of n parameters has yet to write."""
    needed = disk(n, 1 if config.lora_rank else 0, config, on_gpu)["most at once"]
    state = [folder / "state.pt", *folder.glob("shards_*/*")]  # there already, and the next takes its place
    room = free(folder) + sum(path.stat().st_size for path in state if path.is_file())
    if room < needed:
        sizes = f"expected {needed / GB:.2f} GB of free disk for models and states, found {room / GB:.2f}"
        raise InputError(f"--output_dir {folder}: {sizes} (see --dry_run, --save_every, --save_dtype)")


def free(folder):
    """Bytes free on the disk of a folder that may not exist yet."""
    return shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free


def fitting(counted, config, ranks, room):
    """The least flags more with which GPUs of `room` bytes are enough, a twentieth kept free.
    Returns: the config with them; them as text; bytes on each GPU and on the host. None where no flag is enough."""
    n = config.prompts_per_step
    for flags in FITS:
        flags = flags | ({"lora_rank": config.lora_rank} if config.lora_rank else {})
        wanted = replace(config, **flags)
        floor = counted._replace(at=lambda *_, rank=wanted.lora_rank: Lengths(min(rank, 1), 0, 0, 0, 0))
        if (wanted.lora_rank and wanted.offload) or plan(floor, wanted, ranks, True)["most at once"][0] > 0.95 * room:
            continue  # to look at lengths takes seconds
        for prompts in dict.fromkeys((config.rollout_prompts, *(n >> i for i in range(1, n.bit_length())))):
            wanted = replace(wanted, rollout_prompts=prompts)
            gpu, host = plan(counted, wanted, ranks, True)["most at once"]
            if gpu <= 0.95 * room:
                new = (flags | {"rollout_prompts": prompts}).items()
                more = " ".join(f"--{k} {v}" for k, v in new if v != getattr(config, k)) or "as it is"
                return wanted, more, gpu, host
    return None


def show(config):
    """Print the plan of the run that `config` describes. Raises: InputError where the model cannot be counted."""
    if config.model == "tiny":
        raise InputError("--dry_run: expected a --model that exists; a tiny one needs next to nothing")
    try:
        model_config = AutoConfig.from_pretrained(config.model)
    except Exception as error:  # OSError, ValueError, and whatever else its readers raise
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise InputError(f"--model {config.model}: is no model folder or Hugging Face id ({reason})") from None
    ranks, on_gpu = int(os.environ.get("WORLD_SIZE", 0)), config.device != "cpu"
    if RANK:
        return
    counted = seen(model_config, on_gpu)
    print(f"{config.model}, {config.benchmark}, {max(ranks, 1)} process{'es' * (ranks > 1)}, in GB (1e9 bytes):\n")
    print(f"{'':14}{'each GPU':>10}{'host':>10}")
    for name, sizes in plan(counted, config, ranks, on_gpu).items():
        print(f"{name:14}" + "".join(f"{size / GB:10.1f}" if size else f"{'–':>10}" for size in sizes))
    room, adapters = free(Path(config.output_dir)), counted.at(config, False).adapters
    taken = disk(counted.parameters, adapters, config, on_gpu)
    print(f"\nDisk: {', '.join(f'{name} {size / GB:.1f}' for name, size in taken.items())}; free {room / GB:.1f}")
    if taken["most at once"] > room:
        print(f"It does not fit the disk of --output_dir {config.output_dir}.")
    own = [torch.cuda.get_device_properties(0).total_memory / GB] if torch.cuda.is_available() else []
    for room in [*own, *ROOMS] if on_gpu else []:
        _, more, gpu, host = fitting(counted, config, ranks, room * GB) or (None, "no flags are enough", 0, 0)
        sizes = f": {gpu / GB:.1f} GB{f', {host / GB:.1f} GB of the host' if host else ''}" if gpu else ""
        print(f"In {room:.0f} GB a GPU: {more}{sizes}")
