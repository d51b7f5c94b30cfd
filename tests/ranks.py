"""What torchrun starts in the tests: pieces of the driver, or all of it, on as many CPU processes as it says."""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import config as settings  # noqa: E402  # first, as in the driver

# isort: split
import torch  # noqa: E402
from miniature import main  # noqa: E402

import files  # noqa: E402
import grpo  # noqa: E402
import parallel  # noqa: E402
import rerule  # noqa: E402
import run  # noqa: E402


def step(folder, out, *flags):
    """A step of Stage 2 on the model in a folder, at fixed rewards: what it drew, the gradients, the weights after it."""
    torch.set_num_threads(1)
    config = settings.Config(max_tokens=40, method=["rule"], gradient_checkpointing="checkpoint" in flags)
    with parallel.session(torch.device("cpu"), "offload" in flags):
        config.offload = "offload" in flags
        reference = run.load_model(folder, torch.device("cpu"))[0].requires_grad_(False)
        model = run.load_model(folder, torch.device("cpu"), training=config)[0]
        prompts = [[3, 4], [5, 6, 7], [8, 9, 10, 11, 12], [4, 4, 4], [7]]
        drawn = grpo.sample(model, prompts, 4, 6, [2], 1.0, torch.Generator().manual_seed(0))
        rewards = (torch.arange(20).view(5, 4) * 7 % 3) / 2
        advantages = grpo.group_advantages(rewards)
        groups = [
            grpo.RolloutGroup(n, torch.tensor(p), *(t[n].clone() for t in drawn), None, rewards[n], advantages[n], 1)
            for n, p in enumerate(prompts)
        ]
        grpo.add_reference(reference, groups, 1.0, config.max_tokens)
        for group in groups:
            group.ref_logprobs += 0.3  # as if the policy had moved: the KL term has a gradient
        found = {"drawn": drawn, "ref": [group.ref_logprobs for group in groups]}
        found["on"] = rerule.on_policy_gradient(model, groups, config, rerule.counts_of(groups, config))
        found["gradients"] = {name: parallel.whole(p.grad).clone() for name, p in model.named_parameters()}
        optimizer = run.optimizer_for(model, 2e-3, 0.01)
        found["norm"] = run.optimizer_step(model, optimizer, 0.1)  # small: clipping acts
        for flag in ({}, {"is_normalize": True}, {"is_level": "token"}):
            off = settings.Config(max_tokens=40, **flag)
            for kept in (groups[:1], groups):  # one group for two ranks; all
                used, ratios = rerule.off_policy_gradient(model, kept, off, rerule.counts_of(kept, off))
                found[f"off {flag} {len(kept)}"] = (float(used), *ratios.values())
                found[f"norm {flag} {len(kept)}"] = run.optimizer_step(model, optimizer, 0.1)
        bare, weights = parallel.plain(model)
        found["weights"] = {name: tensor.clone() for name, tensor in (weights or bare.state_dict()).items()}
        if parallel.rank() == 0:
            torch.save(found, out)


def drive(kill, *argv):
    """The driver on the small world; kill "RANK:METHOD:STEP" ends a rank, as a machine would, once the row is due."""
    if kill != "-":
        rank, method, at = kill.split(":")
        write = files.Log.write

        def killing_write(log, row):
            write(log, row)
            if "loss" in row and (row["method"], row["step"]) == (method, int(at)) and parallel.rank() == int(rank):
                os.kill(os.getpid(), signal.SIGKILL)

        files.Log.write = killing_write
    files.exit_on_input_error(lambda: main(*argv))


if __name__ == "__main__":
    {"step": step, "drive": drive}[sys.argv[1]](*sys.argv[2:])
