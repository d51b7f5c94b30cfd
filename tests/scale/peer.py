"""Lets TRL's GRPOTrainer do the work of `scale.speed` on the CPU, step by step in turn with ours, in float32.

As it is (`peer`) and given our source of matrix products (`peer_quick`, see `engine.model.quicken`), each in a process
of its own: python tests/scale/peer.py --shape rwku --steps 15, with all flags of scale.speed.
"""

import contextlib
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from config import InputError, setting  # noqa: E402
from engine.flags import parse, run_command  # noqa: E402
from engine.model import quicken  # noqa: E402
from scale import speed  # noqa: E402
from scale.speed import (  # noqa: E402
    GROUP,
    LR,
    PROMPTS_PER_STEP,
    SHAPES,
    build_prompts,
    build_tokenizer,
    earned,
    peak_rss_mb,
)  # fmt: skip


@dataclass
class Peer:
    peer_micro_batch: int = setting("Responses in the peer's micro-batch.", 64)


@dataclass
class Options(Peer, speed.Options):
    """Time Stage 2 beside TRL's trainer on a random model and print one JSON line."""


@contextlib.contextmanager
def clock(seconds, part):
    """Add the seconds spent inside to seconds[part]."""
    start = time.perf_counter()
    yield
    seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - start


def trl_process(pipe, o, folder, quick):
    """TRL's trainer on the model in `folder`: a step whenever the pipe says so, answered with a row of its times."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    sys.stdout = sys.stderr
    torch.set_num_threads(o.threads)
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    spent, started, lengths = {}, [0.0], []

    class Timed(trl.GRPOTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            with clock(spent, "gen_s"):
                return super()._generate_single_turn(*args, **kwargs)

        def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
            with clock(spent, "ref_s" if model is self.ref_model else "other_s"):
                return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    class Turns(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            pipe.recv()
            spent.clear()
            lengths.clear()
            started[0] = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            row = {"step_s": time.perf_counter() - started[0], **spent}
            pipe.send(row | {"tokens_per_step": sum(lengths), "peak_rss_mb": peak_rss_mb()})

    def reward(completions, completion_ids, **_):
        lengths.extend(map(len, completion_ids))
        return list(map(earned, completions))

    arguments = trl.GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, report_to="none",
        per_device_train_batch_size=o.peer_micro_batch, logging_strategy="no", save_strategy="no",
        gradient_accumulation_steps=PROMPTS_PER_STEP * GROUP // o.peer_micro_batch, num_generations=GROUP,
        max_completion_length=SHAPES[o.shape][1], temperature=1.0, top_p=1.0, top_k=0, beta=1e-2, epsilon=0.2,
        num_iterations=1, loss_type="grpo", use_bias_correction_kl=False, learning_rate=LR, max_grad_norm=1.0,
        lr_scheduler_type="constant", max_steps=o.warmup + o.steps, seed=0, dataloader_pin_memory=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    Timed(
        model=quicken(model, "cpu") if quick else model, args=arguments, reward_funcs=reward, callbacks=[Turns()],
        processing_class=build_tokenizer(o.vocab),
        train_dataset=Dataset.from_dict({"prompt": build_prompts(SHAPES[o.shape][0], o.vocab)}),
    ).train()  # fmt: skip


@contextlib.contextmanager
def trl_beside(o, model, rows, quick):
    """Start TRL's process; yields a function that lets it take one step and puts the times into `rows`."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        process = context.Process(target=trl_process, args=(theirs, o, folder, quick), daemon=True)
        process.start()
        theirs.close()

        def step():
            try:
                pipe.send("go")
                rows.append(pipe.recv())
            except (EOFError, ConnectionError):
                raise InputError("trl: its process ended early; its own message is above") from None

        yield step
        pipe.close()
        process.join()


@contextlib.contextmanager
def both(o, rows, model):
    with trl_beside(o, model, rows["peer"], False) as plain, trl_beside(o, model, rows["peer_quick"], True) as quick:
        yield lambda: (plain(), quick())


def main(argv=None):
    o = parse(Options, argv)
    if importlib.util.find_spec("trl") is None:
        raise InputError("trl is not installed; pip install trl datasets accelerate")
    if o.dtype == "bfloat16" or (o.device != "cpu" and torch.cuda.is_available()):
        raise InputError(f"--device {o.device} --dtype {o.dtype}: the peer is timed on the CPU in float32")
    rows = {"peer": [], "peer_quick": []}
    result = speed.measure(o, partial(both, o, rows))
    for name, theirs in rows.items():
        result[name] = speed.medians(theirs[o.warmup :], theirs[0])
        result[f"{name}_over_ours"] = round(result[name]["step_s"] / result["step_s"], 2)
    print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
