"""Everything that is distributed: one model over the ranks of `torchrun`, or over one GPU and the host's memory.

Nothing of the paper is decided here. torch's FSDP2 (`fully_shard`) keeps a part of every weight, gradient and moment on
each rank, in float32, and puts a layer's weights together, in bf16 on a GPU, while it runs. Without torchrun and
`--offload` each function below is one process's identity: the driver reads the same, and does the same bit for bit.

What is shared out, and how it stays the computation of one process:
- prompts with all their rollouts, in `sampling.sample`; every rank then holds every group, so rewards, the buffer, its
  draws and the log are computed alike everywhere, and nothing needs to be told. Only rank 0 writes files
- micro-batches of an update, in `turns`; each is divided by the counts of the whole update, and gradients are summed
- SFT's rows, in `share`

Deviations
- Other methods than Rej. Steer, RULE and ReRULE take one process (`config.resolve`).
- With `--offload` weights stay in place and gradients in fp32 on the GPU until an update's last micro-batch: to fetch
  and send them for each would take longer than to compute it.
"""

import os
import shutil
import signal
import sys
import warnings
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from files import InputError

TIMEOUT = timedelta(minutes=30)  # of a collective; ranks wait for the longest rollout. A dead rank is told at once
LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")  # in an error: another rank is gone


# --- ranks -----------------------------------------------------------------------------------------------------------


def active():
    return dist.is_available() and dist.is_initialized()


def rank():
    return dist.get_rank() if active() else 0


def world():
    return dist.get_world_size() if active() else 1


@contextmanager
def session(device, offload):
    """Join the ranks of torchrun, if it started us; be a group of one for `--offload`; else nothing."""
    launched = {"RANK", "WORLD_SIZE"} <= set(os.environ)
    if not (launched or offload):
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if launched:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group(backend, timeout=TIMEOUT)
        signal.signal(signal.SIGTERM, lambda *_: lost("was told to stop, as torchrun tells all when one has ended"))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    stdout = sys.stdout
    if rank():
        sys.stdout = open(os.devnull, "w")
    try:
        yield
        barrier()
    except Exception as error:
        if any(word in str(error) for word in LOST) and not isinstance(error, InputError):
            lost(f"waited for a rank that has ended ({str(error).strip().splitlines()[0][:100]})")
        raise
    finally:
        sys.stdout = stdout
        dist.destroy_process_group()


def lost(why):
    """Say so and end at once: whoever is gone, nothing that all ranks do together can be finished."""
    print(
        f"\nrank {rank()}: {why}. The last saved state is whole: go on with the same command and --resume",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(1)


def barrier():
    if active():
        everyone(None)


def everyone(value):
    """[the value of every rank], in their order."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def together(act):
    """act(), on every rank; an InputError of any of them is everyone's."""
    found = failed = None
    try:
        found = act()
    except InputError as error:
        failed = error
    for error in everyone(failed):
        if error:
            raise error
    return found


def total(values):
    """The sum of all ranks' scalar tensors."""
    return sum(everyone(torch.stack(values).sum().item() if values else 0.0))


def largest(values):
    return max(everyone(torch.stack(values).max().item() if values else -float("inf")))


def joined(tensors):
    """All ranks' tensors as one, on the CPU where there are several ranks."""
    if world() == 1:
        return torch.cat(tensors)
    return torch.cat([tensor for own in everyone([tensor.cpu() for tensor in tensors]) for tensor in own])


# --- what each rank does ---------------------------------------------------------------------------------------------


def span(n):
    """(first, end) of this rank's share of n prompts."""
    return rank() * n // world(), (rank() + 1) * n // world()


def share(rows, size):
    """This rank's rows and what their mean, over sizes, counts for in the mean over ranks to be that of all rows."""
    if world() == 1:
        return rows, 1.0
    own = rows[rank() :: world()]
    return own or rows[:1], world() * sum(map(size, own)) / sum(map(size, rows))


def turns(model, parts):
    """(micro-batch, whether it counts) of this rank: every W-th, of about the same length on all ranks in each turn.

    All take as many turns, if need be with another's micro-batch, for none can run a layer without the others' weights.
    """
    n, rounds = world(), -(-len(parts) // world())
    offloaded = getattr(model, "offloaded", False)
    with gathered(model, offloaded):
        for turn in range(rounds):
            if offloaded:
                model.set_requires_gradient_sync(turn + 1 == rounds)
            at = turn * n + rank()
            yield parts[at if at < len(parts) else turn * n], at < len(parts)
    if isinstance(model, FSDPModule):
        model.reshard()  # a forward without a backward leaves the first and last layers' weights in place


# --- models ----------------------------------------------------------------------------------------------------------


def blocks(model):
    """The decoder layers, which transformers marks as what is worth computing twice."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def spread(model, device, training=None):
    """The model that rank 0 has read (elsewhere None), with a part of every weight on each rank.

    training: the run's settings where the weights are to be trained, None where they stay.
    """
    if world() > 1:
        sent = [(type(model), model.config, model.generation_config, list(model.buffers())) if model else None]
        dist.broadcast_object_list(sent)
        kind, config, generation_config, buffers = sent[0]
        full = model.state_dict() if model else {}
        if rank():
            with torch.device("meta"):
                model = kind(config)
            model.to_empty(device="cpu").tie_weights()  # no page of it is ever touched
            model.generation_config = generation_config
            for own, theirs in zip(model.buffers(), buffers, strict=True):
                own.copy_(theirs)
    model.eval()
    if training and training.gradient_checkpointing:
        checkpoint_layers(model)
    if not active() or world() == 1 and not training:
        return model.to(device)
    shard(model, device, bool(training and training.offload), torch.bfloat16 if device.type == "cuda" else None)
    if world() > 1:
        set_model_state_dict(model, full, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return model


def checkpoint_layers(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers 6 will call it something else
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.checkpoints = True


@contextmanager
def checkpointing(model):
    """Let the layers, which transformers checkpoints in training alone, believe it; their dropout goes on sleeping."""
    layers = blocks(model)
    modes = [layer.training for layer in layers]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.training = mode


def shard(model, device, offload=False, dtype=None):
    """FSDP2 over all ranks, in place; `dtype` is what layers compute in, gradients are summed in float32.

    offload: weights, gradients and moments are on the host. It is not pinned: pinned memory comes in powers of 2.
    """
    if not hasattr(FSDPModule, "set_reshard_after_forward"):
        raise InputError(f"torchrun and --offload: torch {torch.__version__} is too old, expected 2.8 or later")
    how = {
        "mesh": init_device_mesh(device.type, (world(),)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy(),
    }
    model.computes = (device, dtype or model.dtype)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # of outputs that are views; we change none
    for layer in blocks(model):
        fully_shard(layer, **how)
    fully_shard(model, **how)
    type(model).device = property(lambda self: self.computes[0])  # not where the parts are kept
    type(model).dtype = property(lambda self: self.computes[1])
    model.offloaded = offload
    return model


@contextmanager
def gathered(model, wanted=True):
    """All weights in place, gathered once, for as long as the block runs; forward passes then need no other rank."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not modules or not wanted or getattr(model, "held", False):
        yield
        return
    model.held = True
    model.set_reshard_after_forward(False)
    model.set_reshard_after_backward(False)
    for module in modules:
        module.unshard()
    try:
        yield
    finally:
        model.held = False
        model.set_reshard_after_forward(True)
        model.set_reshard_after_forward(False, recurse=False)  # `grpo.head_logprobs` runs the head by itself
        model.set_reshard_after_backward(True)
        for module in modules:
            module.reshard()


def whole(tensor):
    """A tensor of which each rank may hold a part, in full."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# --- files -----------------------------------------------------------------------------------------------------------


def plain(model):
    """(A model of the same kind that owns no memory, its weights in full on rank 0); the model itself and None."""
    if not isinstance(model, FSDPModule):
        return model, None
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    with torch.device("meta"):
        bare = type(model).__bases__[1](model.config)
    bare.generation_config = model.generation_config
    return bare, weights


def state_of(model, optimizer, folder, name):
    """What a saved state keeps of both: their tensors, or the name in `folder` of the parts that all ranks wrote."""
    if not active():
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    temporary = folder / "shards.tmp"
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    barrier()
    dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), checkpoint_id=temporary)
    if rank() == 0:
        shutil.rmtree(folder / name, ignore_errors=True)
        os.replace(temporary, folder / name)
    return {"shards": name}


def forget_states(folder, but):
    """Remove all parts that ranks have written, but those that the saved state names."""
    if rank() == 0:
        for path in folder.glob("shards*"):
            if path.name != but:
                shutil.rmtree(path)
    barrier()


def restore(payload, folder, model, optimizer):
    """Put a saved state back, on any number of ranks, whatever number wrote it. Raises: InputError."""
    if "shards" in payload:
        found = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        try:
            dcp.load(found, checkpoint_id=folder / payload["shards"])
        except (Exception, dcp.api.CheckpointException) as error:  # whatever torch says of missing or damaged parts
            reason = str(error).strip().splitlines()[-1].strip()[:100]
            here = folder / payload["shards"]
            raise InputError(f"{here}: cannot be read ({reason}); choose another --output_dir") from None
        set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    elif active():
        names, saved = [name for name, _ in model.named_parameters()], payload["optimizer"]
        found = {
            "state": {names[i]: state for i, state in saved["state"].items()},
            "param_groups": [group | {"params": names} for group in saved["param_groups"]],
        }
        options = StateDictOptions(full_state_dict=True)
        set_state_dict(
            model, optimizer, model_state_dict=payload["model"], optim_state_dict=found, options=options
        )  # fmt: skip
    else:
        model.load_state_dict(payload["model"])
        optimizer.load_state_dict(payload["optimizer"])
