"""The engine of several processes: one model over the ranks of `torchrun`, or over one GPU and the host's memory.

torch's FSDP2 (`fully_shard`) keeps a part of every weight, gradient and moment on each rank, in float32, and puts a
layer's weights together, in bf16 on a GPU, while it runs. The driver and the equations read the same.

What is shared out, and how it stays the computation of one process:
- prompts with all their rollouts; every rank then holds every group, and computes rewards, buffer and draws alike
- micro-batches of an update; each carries the weights of the whole update, and gradients are summed
- rows of SFT, and of a baseline's step, whose loss may be no sum over them: every rank computes it whole, of all
  log-probabilities, and sends the gradient by its own ones back through its rows, computed again (`scored`)

Deviations
- Attacks take one process (`engine.flags.resolve`).
- With `--offload` weights go up once a step, for rollout and update; fp32 gradients stay until the last micro-batch."""

import os
import re
import shutil
import signal
import sys
import warnings
import weakref
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from config import InputError
from engine import fast
from engine.model import Pair, quicken, read_model
from engine.process import Engine, join, micro_batches, prepared, trained
from grpo import collate

LEAST = 2**25  # bytes from which on memory has pages of its own
LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")  # in an error: another rank is gone


class Ranks(Engine):
    """The ranks of torchrun; a group of one for `offload` alone."""

    rank, world, pending = 0, 1, ()  # pending: what `scored` has left for `backward`
    uniform = True  # to FSDP2 of torch 2.8

    @contextmanager
    def session(self):
        on_gpu, launched = self.device.type == "cuda", {"RANK", "WORLD_SIZE"} <= set(os.environ)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        if launched:
            if on_gpu:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            dist.init_process_group(backend, timeout=timedelta(minutes=30))  # for the longest rollout
            signal.signal(signal.SIGTERM, lambda *_: lost("was told to stop, as torchrun tells all when one has ended"))
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        try:
            with redirect_stdout(open(os.devnull, "w") if self.rank else sys.stdout):
                yield
                self.wait()
        except Exception as error:
            if any(word in str(error) for word in LOST) and not isinstance(error, InputError):
                lost(f"waited for a rank that has ended ({str(error).strip().splitlines()[0][:100]})")
            raise
        finally:
            if launched:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # without its group a rank has nothing to say
            dist.destroy_process_group()

    def read(self, path, flag, dtype, tokenizer):
        """Weights are read by rank 0 alone; an InputError of any rank is everyone's."""
        found = failed = None
        try:
            found = read_model(path, flag, dtype, tokenizer, weights=self.rank == 0)
        except InputError as error:
            failed = error
        for error in filter(None, self.gather(failed)):
            raise error
        return found

    def place(self, found, training=None):
        """The model that rank 0 has read, with a part of every weight on each rank."""
        if self.world == 1 and not training:
            return super().place(found)
        alpha = self.gather(getattr(found, "alpha", None))[0]
        if alpha is not None:
            return Pair(*(self.place(part, training) for part in getattr(found, "pair", (None, None))), alpha)
        found = prepared(self.broadcast(found) if self.world > 1 else found, training)
        full = found.state_dict() if self.rank == 0 and self.world > 1 else {}
        offload, dtype = bool(training and training.offload), torch.bfloat16 if self.device.type == "cuda" else None
        shard(found, self.device, self.world, offload, dtype)
        if self.world > 1:
            options = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            states.set_model_state_dict(found, full, options=options)
        if offload and self.device.type == "cuda":
            lock(found)
        return quicken(found, self.device)

    def broadcast(self, found):
        """A model of rank 0's kind on every rank, elsewhere without its weights."""
        sent = [(type(found), found.config, found.generation_config, list(found.buffers())) if found else None]
        dist.broadcast_object_list(sent)
        kind, config, generation_config, buffers = sent[0]
        if self.rank:
            with torch.device("meta"):
                found = kind(config)
            found.to_empty(device="cpu").tie_weights()  # no page of it is ever touched
            found.generation_config = generation_config
            for own, theirs in zip(found.buffers(), buffers, strict=True):
                own.copy_(theirs)
        return found

    @contextmanager
    def held(self, found, stay=False):
        """Weights gathered once for the block; forward passes then need no other rank. stay: for the next one too."""
        if getattr(found, "held", False):
            yield
            return
        found.held = True
        keep(found, True)
        for module in layers_of(found):
            module.unshard()
        try:
            yield
        finally:
            found.held = False
            keep(found, getattr(found, "offloaded", False))
            if not stay:
                drop(found)

    def sample(self, found, prompts, group_size, max_new_tokens, stops, temperature, rng=None):
        """Each rank samples its share of the prompts, and all are given the whole: what is drawn depends on neither."""
        first, end = self.rank * len(prompts) // self.world, (self.rank + 1) * len(prompts) // self.world
        try:
            with self.held(found, stay=getattr(found, "stepped", False)):
                parts = [*self.parts(found, prompts, group_size, max_new_tokens, stops, temperature, rng, first, end)]
        except torch.OutOfMemoryError:  # every rank's, or the others would wait for this one
            if self.world == 1:
                raise
            parts = None
        everyones = self.gather(parts)
        if None in everyones:
            raise torch.OutOfMemoryError("out of memory while sampling")
        return join(part for own in everyones for part in own)

    def turns(self, n):
        """(part, whether it counts) for this rank, every W-th of n. All take as many: a layer runs on all or none."""
        turns = [(first + self.rank, first) for first in range(0, n, self.world)]
        return [(at, True) if at < n else (first, False) for at, first in turns]

    def batches(self, found, groups, loss_norm="sequence", of=None):
        """Micro-batches, of about the same length on all ranks in each turn; those that do not count weigh 0."""
        parts = micro_batches(groups, self.max_tokens)
        turns = self.turns(len(parts))
        for turn, (at, counts) in enumerate(turns, 1):
            batch = collate(parts[at], self.device, loss_norm, of or groups)
            if not counts:
                batch.weights.zero_()
            if getattr(found, "offloaded", False):
                found.set_requires_gradient_sync(turn == len(turns))
            yield batch
        drop(found)

    def scored(self, score, found, rows):
        """Some rows at a time, shared out, without a graph; all are given the whole, and `backward` its gradient."""
        size = max(1, self.max_tokens // max(len(prompt) + len(answer) for prompt, answer in rows))
        parts = [rows[at : at + size] for at in range(0, len(rows), size)]
        seed, made = torch.initial_seed(), {}

        def score_part(at):
            torch.manual_seed(seed + at)  # both times the same dropout
            return score(found, parts[at])

        with torch.no_grad():
            for at, counts in self.turns(len(parts)):
                scores = score_part(at)
                if counts:
                    made[at] = scores.cpu() if self.world > 1 else scores
        made = {at: scores for own in self.gather(made) for at, scores in own.items()}
        made = [made[at].to(self.device).requires_grad_(torch.is_grad_enabled()) for at in range(len(parts))]
        if torch.is_grad_enabled():
            self.pending += ((found, score_part, made),)
        else:
            drop(found)
        return join((scores,) for scores in made)[0]

    def backward(self, loss):
        loss.backward()
        if not self.pending:
            return sum(self.gather(loss.item()))
        jobs, self.pending = [(*job, *turn) for job in self.pending for turn in self.turns(len(job[2]))], ()
        for n, (found, score_part, made, at, counts) in enumerate(jobs, 1):
            if getattr(found, "offloaded", False):
                found.set_requires_gradient_sync(n == len(jobs))
            score_part(at).backward(made[at].grad * counts)
        return loss.item()

    def step(self, found, optimizer, max_grad_norm):
        drop(found)  # the optimiser steps what is kept
        found.stepped = getattr(found, "offloaded", False)
        return super().step(found, optimizer, max_grad_norm)

    def share(self, rows, size):
        own = rows[self.rank :: self.world]
        return own or rows[:1], sum(map(size, own)) / sum(map(size, rows))

    def gather(self, value):
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def joined(self, tensor):
        return torch.cat(self.gather(tensor.cpu())) if self.world > 1 else tensor

    def complete(self, groups, name):
        everyones = self.gather([getattr(group, name) for group in groups])
        for group, each in zip(groups, zip(*everyones, strict=True), strict=True):
            setattr(group, name, next(tensor for tensor in each if tensor is not None))

    def whole(self, tensor):
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def wait(self):
        self.gather(None)

    def weights_of(self, found, dtype):
        """All weights on rank 0, cast before they are sent; None elsewhere."""
        drop(found)
        parts, whole = found.state_dict(keep_vars=True), {}
        for tensor in {id(tensor): tensor for tensor in parts.values()}.values():  # tied weights have two names
            kept = hasattr(found, "lora") or not tensor.is_floating_point()
            full = self.whole(tensor.detach().to(self.device, None if kept else dtype)).cpu()
            if self.rank == 0:
                whole[id(tensor)] = full
        return {name: whole[id(tensor)] for name, tensor in parts.items()} if self.rank == 0 else None

    def state_of(self, found, optimizer, folder, name):
        """The name in `folder` of the parts that all ranks write."""
        temporary = folder / "shards.tmp"
        if self.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        self.wait()
        kept = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in flat(parts_of(found, optimizer))}
        save_file({name: t.detach().clone() for name, t in kept.items()}, temporary / f"{self.rank}.safetensors")
        self.wait()
        if self.rank == 0:
            shutil.rmtree(folder / name, ignore_errors=True)
            os.replace(temporary, folder / name)
        return {"shards": name}

    def restore(self, payload, found, optimizer):
        names, saved = [name for name, p in found.named_parameters() if p.requires_grad], payload["optimizer"]
        state = {"state": {names[i]: state for i, state in saved["state"].items()}}
        state["param_groups"] = [group | {"params": names} for group in saved["param_groups"]]
        full = states.StateDictOptions(full_state_dict=True)
        states.set_state_dict(found, optimizer, model_state_dict=payload["model"], optim_state_dict=state, options=full)


def shard(model, device, world, offload=False, dtype=None):
    """FSDP2 over all ranks, in place; `dtype` is what layers compute in, gradients are summed in float32.
    offload: weights, gradients and moments are on the host. It is not pinned: pinned memory comes in powers of 2."""
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise InputError(f"torchrun and --offload: torch {torch.__version__} is too old, expected 2.8 or later")
    how = {
        "mesh": init_device_mesh(device.type, (world,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy(),
    }
    model.kind, model.offloaded, dtype = type(model), offload, dtype or model.dtype
    told = {"device": property(lambda self: device), "dtype": property(lambda self: dtype)}
    model.__class__ = type(model.kind.__name__, (model.kind,), told)  # where it computes, not where parts are kept
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # of outputs that are views; we change none
    for layer in fast.blocks(model):
        fully_shard(layer, **how)
    fully_shard(model, **how)
    for module in layers_of(model):  # gradients are summed: weights are those of the whole update
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    keep(model, offload)


def layers_of(found):
    """What FSDP puts together: each layer, and the model itself for what is in none."""
    return [module for module in found.modules() if isinstance(module, FSDPModule)]


def keep(found, until_dropped):
    """Whether forward and backward leave weights in place. `fast.head_logprobs` runs the head by itself: it stays."""
    for module in layers_of(found):
        module.set_reshard_after_forward(not until_dropped and not hasattr(module, "kind"), recurse=False)
        module.set_reshard_after_backward(not until_dropped, recurse=False)


def drop(found):
    """Free the weights in place; the kept parts are the model's parameters again."""
    for module in layers_of(found):
        module.reshard()


def lock(model):
    """Lock a model's weights in the host's memory, which torch's own would round up; where it fails, that is told."""
    cudart, failed = torch.cuda.cudart(), 0
    for p in model.parameters():
        memory = p.to_local().untyped_storage()
        at, size = memory.data_ptr(), memory.nbytes()
        if size >= LEAST and cudart.cudaHostRegister(at, size, 0) == cudart.cudaError.success:
            weakref.finalize(model, cudart.cudaHostUnregister, at).atexit = False
        elif size >= LEAST:
            failed += size
    if failed:
        print(f"--offload: {failed / 1e9:.1f} GB of the host cannot be locked: weights go up slower", file=sys.stderr)
        with suppress(RuntimeError):  # a failure is raised by the next kernel too
            torch.ones(1, device=model.device)


def lost(why):
    """Say so and end at once: whoever is gone, nothing that all ranks do together can be finished."""
    why = f"{why}. The last saved state is whole: go on with the same command and --resume"
    print(f"\nrank {dist.get_rank()}: {why}", file=sys.stderr, flush=True)
    os._exit(1)


def parts_of(model, optimizer):
    """What this process holds of both."""
    weights, moments = states.get_state_dict(model, optimizer)
    return {"model": trained(model, weights), "optimizer": moments}


def flat(parts):
    """(name, tensor) of every weight and moment."""
    moments = [(f"{name} {key}", own[key]) for name, own in parts["optimizer"]["state"].items() for key in own]
    return [(f"{name} weight", tensor) for name, tensor in parts["model"].items()] + moments


def restore_shards(payload, folder, model, optimizer):
    """Put a state of several ranks back, on any number; only tensors of that folder are read. Raises: InputError."""
    here = folder / str(payload["shards"])
    try:
        if not re.fullmatch(r"shards_\w+_\d+", here.name) or here.parent != folder or here.is_symlink():
            raise ValueError("is no name of a run's own")
        files = [here / f"{rank}.safetensors" for rank in range(len(list(here.glob("*.safetensors"))))]
        found = parts_of(model, optimizer)
        with ExitStack() as stack:
            parts = [stack.enter_context(safe_open(file, "pt")) for file in files]
            for name, tensor in flat(found):
                fill(tensor, name, parts)
    except (Exception, SafetensorError) as error:  # whatever is said of missing or damaged parts
        reason = str(error).strip().splitlines()[-1].strip()[:100]
        raise InputError(f"{here}: cannot be read ({reason}); choose another --output_dir") from None
    weights = model.state_dict() | found["model"]
    states.set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=found["optimizer"])


@torch.no_grad()
def fill(tensor, name, parts):
    """Copy a tensor, or this rank's rows of it, from files that hold all its rows one after another."""
    if not tensor.dim():  # a moment's step, the same everywhere
        tensor.copy_(parts[0].get_tensor(name))
        return
    own, first, at = tensor, 0, 0
    if isinstance(tensor, DTensor):
        mesh, own = tensor.device_mesh, tensor.to_local()
        first = mesh.get_local_rank() * -(-len(tensor) // mesh.size())
    for piece in (part.get_slice(name) for part in parts):
        low, high = max(first, at), min(first + len(own), at + piece.get_shape()[0])
        if low < high:
            own[low - first : high - first] = piece[low - at : high - at]
        at += piece.get_shape()[0]
    if at != len(tensor):
        raise ValueError(f"{name} has {at} rows, expected {len(tensor)}")
