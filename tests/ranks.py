"""Processes of test_parallel.py: pieces of the driver, or all of it, under torchrun; a step whose memory is taken."""

import os
import re
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import config as settings  # noqa: E402  # first, as in the driver

# isort: split
import torch  # noqa: E402
from miniature import main  # noqa: E402
from torch.distributed.fsdp._fully_shard import _fsdp_param_group  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

import files  # noqa: E402
import grpo  # noqa: E402
import memory  # noqa: E402
import parallel  # noqa: E402
import rerule  # noqa: E402
import run  # noqa: E402


def steps(folder, name, *ways):
    """`step` on each model in the folder, in each way: files KIND.NAME.WAY.pt."""
    torch.set_num_threads(1)
    for flags in ways:
        with parallel.session(torch.device("cpu"), "offload" in flags) if name == "one" else nullcontext():
            for kind in ("llama", "qwen2", "gpt2"):
                step(Path(folder) / kind, Path(folder) / f"{kind}.{name}.{flags}.pt", *flags.split())


def two(*argv):
    with parallel.session(torch.device("cpu"), False):
        steps(*argv)


def step(folder, out, *flags):
    """A step of Stage 2 on the model in a folder, at fixed rewards: its draws, gradients, and the weights after it."""
    config = settings.Config(max_tokens=40, gradient_checkpointing="checkpoint" in flags, offload="offload" in flags)
    reference = run.load_model(folder, torch.device("cpu"))[0].requires_grad_(False)
    model = run.load_model(folder, torch.device("cpu"), training=config)[0]
    prompts = [[3, 4], [5, 6, 7], [8, 9, 10, 11, 12], [4, 4, 4], [7]]
    gather, gathers = _fsdp_param_group.foreach_all_gather, []
    _fsdp_param_group.foreach_all_gather = lambda *parts: (gathers.append(0), gather(*parts))[1]
    drawn = grpo.sample(model, prompts, 4, 6, [2], 1.0, torch.Generator().manual_seed(0), 2)
    _fsdp_param_group.foreach_all_gather = gather
    rewards = (torch.arange(20).view(5, 4) * 7 % 3) / 2
    advantages = grpo.group_advantages(rewards)
    groups = [
        grpo.RolloutGroup(n, torch.tensor(p), *(t[n].clone() for t in drawn), None, rewards[n], advantages[n], 1)
        for n, p in enumerate(prompts)
    ]
    grpo.add_reference(reference, groups, 1.0, config.max_tokens)
    for group in groups:
        group.ref_logprobs += 0.3  # as if the policy had moved: the KL term has a gradient
    found = {
        "gathers": len(gathers),
        "blocks": len(parallel.blocks(model)),
        "drawn": drawn,
        "ref": [group.ref_logprobs for group in groups],
    }
    found["on"] = rerule.on_policy_gradient(model, groups, config, rerule.counts_of(groups, config))
    found["gradients"] = {name: parallel.whole(p.grad).clone() for name, p in model.named_parameters()}
    optimizer = run.optimizer_for(model, 2e-3, 0.01)
    found["norm"] = run.optimizer_step(model, optimizer, 0.1)  # small: clipping acts
    for part, flag in (
        (groups[:1], {}),
        (groups, {}),
        (groups, {"is_normalize": True}),
    ):  # one group for two ranks; all
        off = settings.Config(max_tokens=40, **flag)
        used, ratios = rerule.off_policy_gradient(model, part, off, rerule.counts_of(part, off))
        found[f"off {flag} {len(part)}"] = (float(used), *ratios.values())
        found[f"norm {flag} {len(part)}"] = run.optimizer_step(model, optimizer, 0.1)
    bare, weights = parallel.plain(model)
    found["weights"] = {name: tensor.clone() for name, tensor in (weights or bare.state_dict()).items()}
    if parallel.rank() == 0:
        torch.save(found, out)


def drive(kill, *argv):
    """The driver on the small world. kill: "RANK:METHOD:STEP", which a rank does not survive, as if its machine had
    failed; "stop:METHOD:STEP", at which a single process is interrupted; or "-".
    """
    write, (rank, method, at) = files.Log.write, (kill.split(":") if kill != "-" else ("", "", 0))

    def killing_write(log, row):
        write(log, row)
        if "loss" in row and (row["method"], row["step"]) == (method, int(at)):
            if rank == "stop":
                raise KeyboardInterrupt
            if int(rank) == parallel.rank():
                os.kill(os.getpid(), signal.SIGKILL)

    files.Log.write = killing_write
    try:
        main(*argv)
    finally:
        files.Log.write = write


def measure(checkpointing, hidden=768, layers=6, vocabulary=2000):
    """Print the plan for a step on the CPU, and how far the step itself raises the process's memory. In bytes."""
    torch.set_num_threads(1)
    hidden, checkpointing = int(hidden), checkpointing == "True"
    architecture = LlamaConfig(
        vocab_size=int(vocabulary), hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=int(layers),
        num_attention_heads=8, max_position_embeddings=512,
    )  # fmt: skip
    config = settings.Config(prompts_per_step=2, group_size=4, max_new_tokens=8, max_tokens=128, lr=2e-6)
    config.gradient_checkpointing = checkpointing
    planned = memory.plan(memory.seen(architecture, config, on_gpu=False), config, 0, False)["most at once"][1]
    sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=40)
    warm = [LlamaForCausalLM(LlamaConfig(**sizes)).eval() for _ in range(2)]
    update(warm[0], warm[1].requires_grad_(False), config)  # now all code is loaded
    before = memory_of("VmRSS")
    model, reference = LlamaForCausalLM(architecture).eval(), LlamaForCausalLM(architecture).eval()
    if checkpointing:
        parallel.checkpoint_layers(model)
    update(model, reference.requires_grad_(False), config)
    print(planned, memory_of("VmHWM") - before)  # getrusage's peak is inherited from the process that started this one


def memory_of(name):
    """Bytes that this process holds now (VmRSS) or held at most (VmHWM)."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def update(model, reference, config):
    """A step of Stage 2 without a tokenizer, twice."""
    prompts = [torch.randint(model.config.vocab_size, (64,)).tolist() for _ in range(config.prompts_per_step)]
    optimizer = run.optimizer_for(model, config.lr, 0.0)
    for _ in range(2):
        drawn = grpo.sample(model, prompts, config.group_size, config.max_new_tokens, [], 1.0, torch.Generator())
        rewards = torch.tensor([0.0, 1.0]).repeat(len(prompts), config.group_size // 2)
        advantages = grpo.group_advantages(rewards)
        groups = [
            grpo.RolloutGroup(n, torch.tensor(p), *(t[n].clone() for t in drawn), None, rewards[n], advantages[n], 1)
            for n, p in enumerate(prompts)
        ]
        grpo.add_reference(reference, groups, 1.0, config.max_tokens)
        rerule.on_policy_gradient(model, groups, config, rerule.counts_of(groups, config))
        run.optimizer_step(model, optimizer, 1.0)


if __name__ == "__main__":
    what = {"two": two, "drive": drive, "measure": measure}[sys.argv[1]]
    files.exit_on_input_error(lambda: what(*sys.argv[2:]))
