"""Processes of tests/scale: pieces of the driver, or all of it, under torchrun; a step whose memory is taken."""

import gc
import json
import os
import re
import signal
import sys
import tracemalloc
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import pytest  # noqa: E402
import torch  # noqa: E402
from miniature import main  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch.distributed.fsdp._fully_shard import _fsdp_param_group  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

import grpo  # noqa: E402
import rerule  # noqa: E402
from baselines import METHODS  # noqa: E402
from benchmarks.tiny import word_tokenizer  # noqa: E402
from config import Config  # noqa: E402
from data import Prompt, Query, Training  # noqa: E402
from engine import fast, files, run  # noqa: E402
from engine.files import read_lines  # noqa: E402
from engine.flags import run_command  # noqa: E402
from engine.model import optimizer_for  # noqa: E402
from engine.process import Engine  # noqa: E402
from replay import ReplayBuffer, fresh_statistics  # noqa: E402
from scale import memory  # noqa: E402

gc.freeze()  # modules and their code are no garbage to look for whenever a model is loaded


def one(folder, *ways):
    """`step` on each model in the folder, each way with the engine that the driver would start; then every method."""
    for flags in ways:
        engine = run.start(config_of(flags))
        with engine.session():
            steps(engine, folder, "one", flags)
            unlearn_all(engine, folder, "one", flags)


def two(folder, *ways):
    """The same on the ranks of torchrun, which meet once."""
    engine = run.start(config_of(""))
    with engine.session():
        for flags in ways:
            steps(engine, folder, "two", flags)
            unlearn_all(engine, folder, "two", flags)


def config_of(flags, **more):
    flags = {"gradient_checkpointing": "checkpoint" in flags, "offload": "offload" in flags} | (
        {"lora_rank": 3, "lora_alpha": 6.0} if "lora" in flags else {}
    )
    return Config(device="cpu", max_tokens=40, rollout_prompts=2, **flags, **more)


def steps(engine, folder, name, flags):
    """Files KIND.NAME.FLAGS.pt."""
    torch.set_num_threads(1)
    for kind in ("llama", "qwen2", "gpt2"):
        step(engine, config_of(flags), Path(folder) / kind, Path(folder) / f"{kind}.{name}.{flags}.pt")


def step(engine, config, folder, out):
    """A step of Stage 2 on the model in a folder, at fixed rewards: its draws, gradients, and the weights after it."""
    model = engine.load(folder, training=config)[0]
    reference = engine.reference(model, folder)
    logprobs_of = engine.logprobs(1.0)
    prompts = [[3, 4], [5, 6, 7], [8, 9, 10, 11, 12], [4, 4, 4], [7]]
    gather, gathers = _fsdp_param_group.foreach_all_gather, []
    _fsdp_param_group.foreach_all_gather = lambda *parts: (gathers.append(0), gather(*parts))[1]
    drawn = engine.sample(model, prompts, 4, 6, [2], 1.0, torch.Generator().manual_seed(0))
    _fsdp_param_group.foreach_all_gather = gather
    groups = with_rewards(prompts, drawn, (torch.arange(20).view(5, 4) * 7 % 3) / 2)
    grpo.add_reference(reference, engine.batches(reference, groups), logprobs_of)
    engine.complete(groups, "ref_logprobs")
    found = {
        "gathers": len(gathers),
        "blocks": len(fast.blocks(model)),
        "drawn": drawn,
        "ref": [group.ref_logprobs for group in groups],
    }
    for group in groups:
        group.ref_logprobs = group.ref_logprobs + 0.3  # as if the policy had moved: the KL term has a gradient
    for name, part in (("one group", groups[:1]), ("gradients", groups)):  # five micro-batches, or one for all ranks
        model.zero_grad()
        batches = engine.batches(model, part)
        loss, kl = engine.reduce(part, *grpo.on_policy_gradient(model, batches, config.kl_coef, logprobs_of))
        found[name] = {name: engine.whole(p.grad).clone() for name, p in model.named_parameters() if p.requires_grad}
    told = fresh_statistics(groups, config)  # of every group, whoever has computed it
    found["on"] = loss, kl / grpo.counts(groups)[1], *told.values()
    optimizer = optimizer_for(model, 2e-3, 0.01)
    update = partial(engine.step, model, optimizer, 0.1)  # small: clipping acts
    found["norm"] = update()
    for part, flag in ((groups[:1], {}), (groups, {}), (groups, {"normalize_ratio": True})):  # one for two ranks; all
        off, buffer = config_of("", **flag), ReplayBuffer(len(part))
        buffer.ring.extend(part)
        row = rerule.replay_update(engine, model, buffer, groups, update, logprobs_of, off, 1)
        weights = [weight or 0.0 for *_, weight in row.pop("replayed")]
        found[f"off {flag} {len(part)}"] = (*row.values(), *weights)
    for group in groups:
        group.ref_logprobs = None
    grpo.add_reference(reference, engine.batches(reference, groups), logprobs_of)
    engine.complete(groups, "ref_logprobs")
    found["ref, once the policy has moved"] = [group.ref_logprobs for group in groups]
    for name, dtype in (("weights", torch.float32), ("half", torch.bfloat16)):
        bare, weights = engine.plain(model, dtype)
        found[name] = {name: tensor.clone() for name, tensor in (weights or bare.state_dict()).items()}
        found[f"{name} on disk"] = sizes_of(bare, weights) if files.RANK == 0 else None
    if files.RANK == 0:
        torch.save(found, out)


def sizes_of(bare, weights):
    """(bytes of the weights' file, dtype in config.json) as `Run.save_model` would leave them."""
    with TemporaryDirectory() as folder:
        bare.save_pretrained(folder, **({"state_dict": weights} if weights else {}))
        size = (Path(folder) / "model.safetensors").stat().st_size
        return size, json.loads((Path(folder) / "config.json").read_text())["dtype"]


def unlearn_all(engine, folder, name, flags):
    """Every method that starts from the original model, by plain descent, in which equal gradients make equal steps;
    offloaded, one of them is interrupted and gone on with.

    File all.NAME.FLAGS.pt: {method: (losses and norms of its steps, weights as they are saved, greedy answers)}.
    """
    if flags not in ("", "checkpoint offload", "lora"):
        return
    folder, tokenizer, training, found = Path(folder), word_tokenizer(WORDS), asked(), {}
    config = config_of(
        flags, output_dir=str(folder / f"run.{name}.{flags}"), baseline_lr=0.05, baseline_epochs=3, save_every=2,
        baseline_batch_size=3, sft_lr=0.05, sft_epochs=3, sft_batch_size=4, steps=3, prompts_per_step=4, group_size=4,
        lr=0.05, max_new_tokens=4, min_groups=9, warmup_steps=9, tau=1, beta=0.5, resume=True,
    )  # fmt: skip

    def unlearn(method):
        here = run.Run(config, engine)
        here.open()
        return here, rerule.unlearn(here, method, folder / "words", tokenizer, training, dict)[0]

    with patch.object(run, "optimizer_for", descent), patch.object(rerule, "optimizer_for", descent):
        for method in methods_of(flags):
            if method == "npo_klr" and flags:
                with pytest.raises(KeyboardInterrupt), patch.object(files.Log, "write", interrupted):
                    unlearn(method)
            here, model = unlearn(method)
            here.save_model(method, model, tokenizer)
            here.finish(method, {})
            model, _ = engine.load(here.folder / method)
            answers = engine.sample(model, [[1, 3, 4], [1, 5]], 1, 5, [], 0.0)[0]
            rows = [row for row in read_lines(here.folder / "metrics.jsonl") if row["method"] == method]
            weights = [load_file(path) for path in sorted((here.folder / method).rglob("*.safetensors"))]
            found[method] = [(row["loss"], row["grad_norm"]) for row in rows], weights, answers
    if files.RANK == 0:
        torch.save(found, folder / f"all.{name}.{flags}.pt")


def methods_of(flags):
    """With adapters one of each kind: a loss alone, with a reference, with retain rows, on a copy, two models."""
    return ["ga", "dpo", "npo_klr", "task_vector", "whp"] if "lora" in flags else METHODS[: METHODS.index("rule")]


def descent(model, lr, weight_decay):
    return torch.optim.SGD(model.parameters(), lr)


def interrupted(log, row, write=files.Log.write):
    if row["step"] == 3:
        raise KeyboardInterrupt
    write(log, row)


WORDS = ["where is a who d c b e f g I don't know that."]


def asked():
    """Five forget prompts, one of them unanswered, and four others, in words of `WORDS`; of many lengths."""
    forget = {"where is a": ("b c d",), "who is a": (), "a": ("b",), "who is a b c": ("g g g g",), "is a b": ("d",)}
    others = {"where is d": ("e",), "who is d": ("f f f",), "c": ("g",), "who c": ("e e",)}
    rows = [(*row, kind) for kind, some in (("forget", forget), ("boundary", others)) for row in some.items()]
    queries = [Query(Prompt(None, text), text, kind, answers) for text, answers, kind in rows]
    refusals = [(query.prompt, "I don't know that.") for query in queries[:4]]
    return Training(refusals, queries)


def with_rewards(prompts, drawn, rewards):
    """What an engine has drawn (N, G, T) as groups with rewards (N, G)."""
    advantages = grpo.group_advantages(rewards)
    return [
        grpo.RolloutGroup(n, 1, torch.tensor(p), *(t[n].clone() for t in drawn), None, rewards[n], advantages[n])
        for n, p in enumerate(prompts)
    ]


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
            if int(rank) == files.RANK:
                os.kill(os.getpid(), signal.SIGKILL)

    files.Log.write = killing_write
    try:
        main(*argv)
    finally:
        files.Log.write = write


def measure(checkpointing, hidden=768, layers=6, vocabulary=2000, longest=8, prompts=2, max_tokens=128):
    """Print the plan for a step on the CPU, and how far the step itself raises the process's memory. In bytes."""
    torch.set_num_threads(1)
    hidden, layers, vocabulary, longest, prompts = map(int, (hidden, layers, vocabulary, longest, prompts))
    config = Config(prompts_per_step=prompts, group_size=4, max_new_tokens=longest, max_tokens=int(max_tokens), lr=2e-6)
    config.gradient_checkpointing, architecture = checkpointing == "True", small(hidden, layers, vocabulary)
    planned = memory.plan(memory.seen(architecture, on_gpu=False), config, 0, False)["most at once"][1]
    stage2_step(small(16, 1, 40), replace(config, max_new_tokens=8))  # now all code is loaded
    before = memory_of("VmRSS")
    stage2_step(architecture, config)
    print(planned, memory_of("VmHWM") - before)  # getrusage's peak is inherited from the process that started this one


def small(hidden, layers, vocabulary):
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=4096,
    )  # fmt: skip


def phases(folder, *ways):
    """Ten phases, one after another: a model is read, trained for a step, its state and itself saved, and let go of.
    Print, after each: the way, bytes of the process, bytes of Python's own objects."""
    torch.set_num_threads(1)
    model, tokenizer = Path(folder) / "model", word_tokenizer(WORDS)
    LlamaForCausalLM(small(256, 3, 2000)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    for flags in ways:
        config = config_of(flags, output_dir=str(Path(folder) / f"run {flags}"), save_every=1)
        engine = run.start(config)
        with engine.session():
            here = run.Run(config, engine)
            here.open()
            tracemalloc.start()
            for name in METHODS[:10]:
                phase(here, name, model, tokenizer)
                gc.collect()
                print("held:", flags or "plain", memory_of("VmRSS"), tracemalloc.get_traced_memory()[0])
            tracemalloc.stop()


def phase(here, name, source, tokenizer):
    model, _ = here.engine.load(source, training=here.config)
    run.fit(here, name, 1, model, [([3, 4], [5, 2])], steps=1, lr=1e-3, batch_size=1, warmup=0)
    here.save_model(name, model, tokenizer)
    here.finish(name, {})


def memory_of(name):
    """Bytes that this process holds now (VmRSS) or held at most (VmHWM)."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def stage2_step(architecture, config, meter=lambda what, part: part(), half=False):
    """A step of Stage 2 without a tokenizer, twice; meter(what, part) runs each of its parts. half: as on a GPU."""
    engine, model = Engine("cpu", config.max_tokens), LlamaForCausalLM(architecture)
    engine.half, model = half, model.bfloat16() if half and config.lora_rank else model
    reference = None if config.lora_rank else engine.place(deepcopy(model)).requires_grad_(False)
    model = engine.place(model, config)
    reference = reference or model.off()
    if half:  # `quicken` has changed it
        model.set_attn_implementation("sdpa")
    logprobs_of, optimizer = engine.logprobs(1.0), optimizer_for(model, config.lr, 0.0)
    prompts = [torch.randint(architecture.vocab_size, (64,)).tolist() for _ in range(config.prompts_per_step)]
    how = (prompts, config.group_size, config.max_new_tokens, [], 1.0)
    rewards = torch.tensor([0.0, 1.0]).repeat(len(prompts), config.group_size // 2)
    for _ in range(2):
        drawn = meter("sampling", lambda: engine.sample(model, *how, torch.Generator()))
        groups = with_rewards(prompts, drawn, rewards)
        grpo.add_reference(reference, engine.batches(reference, groups), logprobs_of)
        batches = engine.batches(model, groups)
        meter("update", lambda: grpo.on_policy_gradient(model, batches, config.kl_coef, logprobs_of))  # noqa: B023
        engine.step(model, optimizer, 1.0)


if __name__ == "__main__":
    what = {"two": two, "drive": drive, "measure": measure, "phases": phases}[sys.argv[1]]
    run_command(lambda: what(*sys.argv[2:]))
