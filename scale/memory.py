"""How much memory a run takes, from a model's configuration alone: `--dry_run` prints it and stops.

What is kept for each parameter is counted. Keys, values and activations are seen on the model itself, which runs on
tensors that have shapes and no memory (torch's FakeTensorMode), so any architecture is counted as it is.

Deviations
- Lengths are the longest that a run may meet: every response at its limit, prompts as the benchmark says.
- Left out: the process itself, about 1 GB of CUDA's own, and what an allocator cannot use. Keep a tenth free.
"""

import os
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

import benchmarks
from config import InputError
from engine import fast
from engine.files import RANK

GB, ROOM = 1e9, 80
ROWS = ["weights", "gradients", "optimiser", "reference", "KV cache", "activations", "in passing"]


def count(model_config, dtype, tokens):
    """Seen on a model without memory.

    Returns: parameters; the most of them that FSDP2 moves together; bytes of keys and values for a token; bytes that
        one row of `tokens` keeps for its backward pass, {without checkpointing, with it}; size of the vocabulary.
    """
    try:
        with FakeTensorMode():
            model = AutoModelForCausalLM.from_config(model_config, dtype=dtype).eval()
            blocks = fast.blocks(model)
            sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
            n = sum(p.numel() for p in model.parameters())
            ids, mask = torch.zeros(1, tokens, dtype=torch.long), torch.zeros(1, 1, tokens, tokens, dtype=dtype)
            how = {"input_ids": ids, "position_ids": ids, "attention_mask": mask, "logits_to_keep": 1}
            with torch.no_grad():
                cache = model(use_cache=True, **how).past_key_values
            held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
            weights = {p.untyped_storage()._cdata for p in model.parameters()}
            kept = {}

            def keep(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in weights:
                    kept[storage._cdata] = storage  # held, so that no other takes its place
                return tensor

            def saved():
                kept.clear()
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    model(use_cache=False, output_hidden_states=True, **how)
                return sum(storage.nbytes() for storage in kept.values())

            every = saved()
            fast.checkpoint_layers(model)
            with fast.checkpointing(model):
                inputs = saved()
            own = {False: every, True: inputs + (every - inputs) / max(1, len(blocks))}  # computed again one at a time
    except Exception as error:  # whatever an architecture answers to shapes without memory
        raise InputError(f"--dry_run: this architecture cannot be run without memory ({error!r:.100})") from None
    return n, max([n - sum(sizes), *sizes]), held / tokens, own, model.get_input_embeddings().num_embeddings


def seen(model_config, config, on_gpu):
    """`count` at the longest micro-batch of the update that `config` allows."""
    group = benchmarks.ALL[config.benchmark].prompt_tokens + config.group_size * config.max_new_tokens
    tokens = max(group, config.max_tokens // group * group)
    return count(model_config, torch.bfloat16 if on_gpu else torch.float32, tokens)


def plan(counted, config, ranks, on_gpu):
    """{what: (bytes on each GPU, bytes on the host)}, on a CPU all on the host; "most at once" adds up what meets.

    counted: of `seen`; ranks: processes of torchrun, 0 without it.
    """
    n, together, kv, kept, vocabulary = counted
    fsdp, w, half = bool(ranks) or config.offload, max(ranks, 1), 2 if on_gpu else 4
    prompt = benchmarks.ALL[config.benchmark].prompt_tokens
    prompts = -(-config.prompts_per_step // w)
    prompts = min(config.rollout_prompts or prompts, prompts)
    rows = prompts * config.group_size
    found = dict.fromkeys(ROWS, (0, 0))
    if config.offload:  # on each GPU all weights in bf16 and gradients in fp32; on the host one of each in fp32
        found |= {"weights": (half * n, 4 * n), "gradients": (4 * n, 4 * n), "optimiser": (0, 8 * n)}
    else:  # FSDP has all weights in place in bf16 to sample, beside this rank's own
        extra = half * n if fsdp else 0
        found |= {"weights": (4 * n / w + extra, 0), "gradients": (4 * n / w, 0), "optimiser": (8 * n / w, 0)}
    found["reference"] = (half * n / w, 0)
    found["KV cache"] = (1.5 * kv * (prompts * prompt + rows * config.max_new_tokens), 0)  # room is made ahead
    found["activations"] = (kept[config.gradient_checkpointing], 0)
    sampling = 24 * rows * vocabulary  # logits, their log-softmax, its exponential and its sum in double
    update = 14 * fast.CHUNK * vocabulary + ((4 + half) * together if fsdp else 0)
    if not config.gradient_checkpointing:  # the prompt's and the responses' pass have a gradient each until the end
        update += (half if fsdp else 4) * n
    if on_gpu and not fsdp:  # a copy in bf16 to sample from; in the update autocast's last as activations do
        sampling += half * n
        update += half * (together if config.gradient_checkpointing else n)
    found["in passing"] = (max(sampling, update), 0)
    rollout = found["KV cache"][0] + sampling
    backward = found["gradients"][0] + found["activations"][0] + update
    always = sum(found[name][0] for name in ("weights", "optimiser", "reference"))
    found["most at once"] = (always + max(rollout, backward), sum(host for _, host in found.values()))
    return found if on_gpu else {name: (0, gpu + host) for name, (gpu, host) in found.items()}


def fitting(counted, config, ranks, room=ROOM * GB):
    """The least flags more with which GPUs of `room` bytes are enough, a twentieth kept free.

    Returns: the config with them; them as text; bytes on each GPU and on the host. None where no flag is enough.
    """
    n = config.prompts_per_step
    for flags in ({}, {"gradient_checkpointing": True}, {"gradient_checkpointing": True, "offload": True}):
        for prompts in dict.fromkeys((config.rollout_prompts, n // 2, n // 4, n // 8)):
            wanted = replace(config, **flags, rollout_prompts=prompts)
            gpu, host = plan(counted, wanted, ranks, True)["most at once"]
            if gpu <= 0.95 * room:
                new = (flags | {"rollout_prompts": prompts}).items()
                more = " ".join(f"--{k} {v}" for k, v in new if v != getattr(config, k)) or "as it is"
                return wanted, more, gpu, host
    return None


def advice(counted, config, ranks):
    """The flags of `fitting` in 80 GB, and what is taken there and on the host, as text."""
    found = fitting(counted, config, ranks)
    if not found:
        return "whatever the flags, it does not fit"
    _, more, gpu, host = found
    return f"{more}: {gpu / GB:.1f} GB{f', {host / GB:.1f} GB of the host' if host else ''}"


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
    counted = seen(model_config, config, on_gpu)
    print(f"{config.model}, {config.benchmark}, {max(ranks, 1)} process{'es' * (ranks > 1)}, in GB (1e9 bytes):\n")
    print(f"{'':14}{'each GPU':>10}{'host':>10}")
    for name, sizes in plan(counted, config, ranks, on_gpu).items():
        print(f"{name:14}" + "".join(f"{size / GB:10.1f}" if size else f"{'–':>10}" for size in sizes))
    if on_gpu:
        print(f"\nIn {ROOM} GB a GPU: {advice(counted, config, ranks)}")
