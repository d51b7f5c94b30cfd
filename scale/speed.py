"""Times Stage 2 as the driver runs it, on a random model: where a step's seconds go, its memory, its share of the peak.

The work: 32 prompts × 8 rollouts a step, temperature 1, k3 KL with weight 1e-2 against a frozen copy, AdamW 2e-6,
gradient norm clipped at 1, one update per batch, float32, a reward that about one random response in seven earns. Two
shapes: `short` (12 prompt tokens, at most 24 new) and `rwku` (64, at most 32). `--replay` adds an update of 32 replayed
groups. One JSON line on stdout, medians over the steps after the warm-up:

    step_s gen_s ref_s update_s replay_s    seconds ↓: the whole step, sampling with rewards, π_ref, both updates
    update_group_s replay_group_s           update seconds for each group, of replayed ones for each not skipped
    replay_skipped                          share of drawn groups with all rewards equal, which cost nothing
    tokens_per_step tokens_per_s            sampled tokens, and the same over step_s ↑
    peak_rss_mb                             most memory that the process ever held ↓
    matmul_peak_share                       arithmetic that an on-policy step needs (weights × tokens: one forward in
        sampling, one for π_ref, three in the update, prompts once a group; attention left out) over what 1024 × 1024
        matrix products, timed in the same run, would do in gen_s + ref_s + update_s ↑

`--peer trl` lets TRL's GRPOTrainer do the same work in a process of its own, step by step in turn with ours.
"""

from dataclasses import dataclass
from typing import Literal

from config import Config, Count, InputError, setting
from engine.flags import check_bounds, parse, run_command


@dataclass
class Options:
    """Time Stage 2 on a random model and print one JSON line."""

    shape: Literal["short", "rwku"] = setting("Lengths: short 12 + 24 tokens, rwku 64 + 32.", "short")
    hidden: int = setting("Hidden size, a multiple of 8 (above 256: of 12).", 128)
    layers: int = setting("Layers.", 4)
    steps: Count = setting("Steps timed.", 5)
    warmup: int = setting("Steps before them that are not.", 2)
    threads: Count = setting("Threads of torch.", 1)
    replay: bool = setting("Replay 32 groups in each step (ReRULE).", False)
    max_tokens: int = setting("Token positions in a micro-batch of the update.", Config.max_tokens)
    peer: Literal["", "trl"] = setting("Time this library beside it, if it is installed: trl.", "")
    peer_micro_batch: int = setting("Responses in the peer's micro-batch.", 64)
    peer_quick: bool = setting("Give the peer our source of matrix products too (engine.model.quicken).", False)


EXAMPLES = [
    "python -m scale.speed --shape rwku --hidden 384 --layers 6 --steps 5 --replay",
    "python -m scale.speed --shape rwku --steps 15 --peer trl         # pip install trl datasets accelerate",
    "python -m scale.speed --shape short --steps 25 --threads 2",
]
if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    OPTIONS = run_command(lambda: parse(Options, examples=EXAMPLES), leave=False)

import contextlib
import importlib.util
import json
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
import timeit
from resource import RUSAGE_SELF, getrusage
from statistics import median
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import benchmarks
import rerule
from data import Prompt, Query, Training
from engine.flags import resolve
from engine.model import quicken
from engine.process import Engine

VOCABULARY, N_PROMPTS, PROMPTS_PER_STEP, GROUP, LR = 1000, 320, 32, 8, 2e-6
PARTS = {"gen_s": "rollout", "ref_s": "reference", "update_s": "update", "replay_s": "replay"}  # → a phase's clocks
SHAPES = {"short": (12, 24), "rwku": (64, 32)}  # prompt tokens, longest response
earned = lambda text: float(bool(re.search(r"\bw[1-6]77\b", text)))  # noqa: E731
peak_rss_mb = lambda: round(getrusage(RUSAGE_SELF).ru_maxrss / 1024)  # noqa: E731


def build_tokenizer():
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {name: f"<{name[:3]}>" for name in ("pad_token", "bos_token", "eos_token", "unk_token")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)


def build_model(hidden, layers):
    torch.manual_seed(0)
    heads = 4 if hidden <= 256 else 6
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=4 * hidden, max_position_embeddings=256, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    return quicken(LlamaForCausalLM(config).eval(), "cpu")


def build_prompts(shape):
    rng = random.Random(0)
    return [" ".join(f"w{rng.randrange(VOCABULARY - 4)}" for _ in range(SHAPES[shape][0])) for _ in range(N_PROMPTS)]


def time_stage2(o, model, reference, tokenizer, peer_step):
    """The driver's own loop; after each step `peer_step()` has its turn. Returns one row for each timed step."""
    rows = []
    config = resolve(Config(
        steps=o.warmup + o.steps, prompts_per_step=PROMPTS_PER_STEP, group_size=GROUP, lr=LR, weight_decay=0.0, tau=0.6,
        min_groups=1, warmup_steps=min(1, o.warmup), max_new_tokens=SHAPES[o.shape][1], max_tokens=o.max_tokens,
        eval_every=0, save_every=0,
    ), benchmarks.ALL)  # fmt: skip

    def write(row):
        spent = sum(row.get(f"seconds_{part}", 0.0) for part in PARTS.values())
        rows.append(row | {"step_s": spent})  # without the log's own columns, which the peer does not have
        peer_step()

    logs = {"metrics": SimpleNamespace(write=write), "samples": SimpleNamespace(write=lambda row: None)}
    run = SimpleNamespace(config=config, engine=Engine("cpu", o.max_tokens), state={"phase": None}, **logs)
    queries = [Query(Prompt(None, text), text, "boundary") for text in build_prompts(o.shape)]
    method, reward = "rerule" if o.replay else "rule", lambda query, text: earned(text)
    with contextlib.redirect_stdout(sys.stderr):
        rerule.stage2(run, method, model, reference, tokenizer, Training([], queries), reward)
    return rows[o.warmup :]


@contextlib.contextmanager
def clock(seconds, part):
    """Add the seconds spent inside to seconds[part]."""
    start = time.perf_counter()
    yield
    seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - start


def matmul_rate():
    """Floating-point operations a second in products of 1024 × 1024 float32 matrices: the best of 20."""
    a = torch.randn(1024, 1024)
    return 2 * 1024**3 / min(timeit.repeat(lambda: a @ a, number=1, repeat=20))


def step_operations(model, shape, tokens):
    """The arithmetic that `matmul_peak_share` counts, for a step with so many sampled tokens."""
    head = model.lm_head.weight.numel()
    body = sum(p.numel() for p in model.parameters()) - head - model.get_input_embeddings().weight.numel()
    return (1 + 1 + 3) * 2 * (body * (PROMPTS_PER_STEP * SHAPES[shape][0] + tokens) + head * tokens)


def trl_process(pipe, o, folder):
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
        model=quicken(model, "cpu") if o.peer_quick else model, args=arguments, reward_funcs=reward,
        processing_class=build_tokenizer(), train_dataset=Dataset.from_dict({"prompt": build_prompts(o.shape)}),
        callbacks=[Turns()],
    ).train()  # fmt: skip


@contextlib.contextmanager
def trl_beside(o, model, rows):
    """Start TRL's process; yields a function that lets it take one step and puts the times into `rows`."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        process = context.Process(target=trl_process, args=(theirs, o, folder), daemon=True)
        process.start()
        theirs.close()

        def step():
            try:
                pipe.send("go")
                rows.append(pipe.recv())
            except (EOFError, ConnectionError):
                raise InputError("--peer trl: its process ended early; its own message is above") from None

        yield step
        pipe.close()
        process.join()


def main(o):
    check_bounds(o)
    if o.peer and importlib.util.find_spec(o.peer) is None:
        raise InputError("--peer trl: is not installed; pip install trl datasets accelerate")
    torch.set_num_threads(o.threads)
    model, reference, peer_rows = *(build_model(o.hidden, o.layers) for _ in range(2)), []
    rate = matmul_rate()
    with trl_beside(o, model, peer_rows) if o.peer else contextlib.nullcontext(lambda: None) as peer_step:
        rows = time_stage2(o, model, reference.requires_grad_(False), build_tokenizer(), peer_step)
    rate = max(rate, matmul_rate())
    result = {name: getattr(o, name) for name in ("shape", "hidden", "layers", "threads", "steps", "max_tokens")}
    for row in rows:
        row |= {name: row.get(f"seconds_{phase}", 0.0) for name, phase in PARTS.items()}
        row |= {"update_group_s": row["update_s"] / PROMPTS_PER_STEP, "tokens_per_step": row["response_tokens"]}
        row["tokens_per_s"] = row["tokens_per_step"] / row["step_s"]
        needed = step_operations(model, o.shape, row["tokens_per_step"]) / rate  # seconds at the peak
        row["matmul_peak_share"] = needed / (row["gen_s"] + row["ref_s"] + row["update_s"])
        if "replay_groups" in row:
            row["replay_group_s"] = row["replay_s"] / max(1, row["replay_groups"] - row["replay_skipped"])
            row["replay_skipped"] /= row["replay_groups"]
    more = ["update_group_s", "tokens_per_step", "tokens_per_s", "matmul_peak_share"]
    more += ["replay_group_s", "replay_skipped"] * all("replay_group_s" in row for row in rows)
    medians = lambda rows, names: {name: round(median(row[name] for row in rows), 4) for name in names}  # noqa: E731
    result |= medians(rows, ["step_s", *PARTS, *more]) | {"peak_rss_mb": peak_rss_mb()}
    if o.peer:
        result["peer"] = medians(peer_rows[o.warmup :], peer_rows[0])
        result["peer_over_ours"] = round(result["peer"]["step_s"] / result["step_s"], 2)
    print(json.dumps(result))


if __name__ == "__main__":
    run_command(lambda: main(OPTIONS))
