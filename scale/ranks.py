"""The engine of several processes: one model over the ranks of `torchrun`, or over one GPU and the host's memory.

torch's FSDP2 (`fully_shard`) keeps a part of every weight, gradient and moment on each rank, in float32, and puts a
layer's weights together, in bf16 on a GPU, while it runs. `Ranks` overrides what `engine.process.Engine` does on one
process; the driver and the equations read the same.

What is shared out, and how it stays the computation of one process:
- prompts with all their rollouts; every rank then holds every group, so rewards, the buffer, its draws and the log are
  computed alike everywhere, and nothing needs to be told. Only rank 0 writes files
- micro-batches of an update; each carries the weights of the whole update, and gradients are summed
- SFT's rows

Deviations
- Other methods than Rej. Steer, RULE and ReRULE take one process (`engine.flags.resolve`).
- With `--offload` weights stay in place and gradients in fp32 on the GPU until an update's last micro-batch: to fetch
  and send them for each would take longer than to compute it.
"""

import os
import shutil
import signal
import sys
import warnings
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from baselines.whp import Pair
from config import InputError
from engine import fast
from engine.model import quicken, read_model
from engine.process import Engine, join, micro_batches, prepared, trained
from grpo import collate

LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")  # in an error: another rank is gone


class Ranks(Engine):
    """The ranks of torchrun; a group of one for `offload` alone."""

    rank, world = 0, 1
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
        for error in self.gather(failed):
            if error:
                raise error
        return found

    def place(self, found, training=None):
        """The model that rank 0 has read, with a part of every weight on each rank."""
        if isinstance(found, Pair) or (self.world == 1 and not training):
            return super().place(found)
        found = prepared(self.broadcast(found) if self.world > 1 else found, training)
        full = found.state_dict() if self.rank == 0 and self.world > 1 else {}
        offload, dtype = bool(training and training.offload), torch.bfloat16 if self.device.type == "cuda" else None
        shard(found, self.device, self.world, offload, dtype)
        if self.world > 1:
            options = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            states.set_model_state_dict(found, full, options=options)
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
    def held(self, found, wanted=True):
        """Weights gathered once for the block; forward passes then need no other rank."""
        modules = [module for module in found.modules() if isinstance(module, FSDPModule)]
        if not modules or not wanted or getattr(found, "held", False):
            yield
            return
        found.held = True
        found.set_reshard_after_forward(False)
        found.set_reshard_after_backward(False)
        for module in modules:
            module.unshard()
        try:
            yield
        finally:
            found.held = False
            found.set_reshard_after_forward(True)
            found.set_reshard_after_forward(False, recurse=False)  # `fast.head_logprobs` runs the head by itself
            found.set_reshard_after_backward(True)
            for module in modules:
                module.reshard()

    def sample(self, found, prompts, group_size, max_new_tokens, stops, temperature, rng=None):
        """Each rank samples its share of the prompts, and all are given the whole: what is drawn depends on neither."""
        first, end = self.rank * len(prompts) // self.world, (self.rank + 1) * len(prompts) // self.world
        try:
            with self.held(found):
                parts = [*self.parts(found, prompts, group_size, max_new_tokens, stops, temperature, rng, first, end)]
        except torch.OutOfMemoryError:  # every rank's, or the others would wait for this one
            if self.world == 1:
                raise
            parts = None
        everyones = self.gather(parts)
        if None in everyones:
            raise torch.OutOfMemoryError("out of memory while sampling")
        return join(part for own in everyones for part in own)

    def batches(self, found, groups, loss_norm="sequence", of=None):
        """Every W-th micro-batch, of about the same length on all ranks in each turn. All take as many turns, if need
        be with another's batch at weight 0, for none can run a layer without the others' weights."""
        parts = micro_batches(groups, self.max_tokens)
        turns, offloaded = -(-len(parts) // self.world), getattr(found, "offloaded", False)
        with self.held(found, offloaded):
            for turn in range(turns):
                if offloaded:
                    found.set_requires_gradient_sync(turn + 1 == turns)
                at = turn * self.world + self.rank
                part = parts[at if at < len(parts) else turn * self.world]
                batch = collate(part, self.device, loss_norm, of or groups)
                if at >= len(parts):
                    batch.weights.zero_()
                yield batch
        if hasattr(found, "reshard"):
            found.reshard()  # a forward without a backward leaves the first and last layers' weights in place

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

    def plain(self, found):
        """(A model of the same kind that owns no memory, its weights in full on rank 0)."""
        if not isinstance(found, FSDPModule):
            return found, None
        options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = states.get_model_state_dict(found, options=options)
        with torch.device("meta"):
            bare = found.kind(found.config)
        bare.generation_config = found.generation_config
        return bare, weights

    def state_of(self, found, optimizer, folder, name):
        """The name in `folder` of the parts that all ranks write."""
        temporary = folder / "shards.tmp"
        if self.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        self.wait()
        dcp.save(parts_of(found, optimizer), checkpoint_id=temporary)
        if self.rank == 0:
            shutil.rmtree(folder / name, ignore_errors=True)
            os.replace(temporary, folder / name)
        return {"shards": name}

    def restore(self, payload, found, optimizer):
        names, saved = [name for name, p in found.named_parameters() if p.requires_grad], payload["optimizer"]
        state = {
            "state": {names[i]: state for i, state in saved["state"].items()},
            "param_groups": [group | {"params": names} for group in saved["param_groups"]],
        }
        full = states.StateDictOptions(full_state_dict=True)
        states.set_state_dict(found, optimizer, model_state_dict=payload["model"], optim_state_dict=state, options=full)

    def forget_states(self, folder, but):
        super().forget_states(folder, but)
        self.wait()


def shard(model, device, world, offload=False, dtype=None):
    """FSDP2 over all ranks, in place; `dtype` is what layers compute in, gradients are summed in float32.

    offload: weights, gradients and moments are on the host. It is not pinned: pinned memory comes in powers of 2.
    """
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
    for module in model.modules():
        if isinstance(module, FSDPModule):  # gradients are summed: weights are those of the whole update
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def lost(why):
    """Say so and end at once: whoever is gone, nothing that all ranks do together can be finished."""
    why = f"{why}. The last saved state is whole: go on with the same command and --resume"
    print(f"\nrank {dist.get_rank()}: {why}", file=sys.stderr, flush=True)
    os._exit(1)


def parts_of(model, optimizer):
    """What this process holds of both."""
    weights, moments = states.get_state_dict(model, optimizer)
    return {"model": trained(model, weights), "optimizer": moments}


def restore_shards(payload, folder, model, optimizer):
    """Put a state of several ranks back, on any number of them or none. Raises: InputError."""
    found, here = parts_of(model, optimizer), folder / payload["shards"]
    try:
        dcp.load(found, checkpoint_id=here)
    except (Exception, dcp.api.CheckpointException) as error:  # whatever torch says of missing or damaged parts
        reason = str(error).strip().splitlines()[-1].strip()[:100]
        raise InputError(f"{here}: cannot be read ({reason}); choose another --output_dir") from None
    weights = model.state_dict() | found["model"]
    states.set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=found["optimizer"])
