"""Times Stage 2 as the driver runs it, on a random model: where a step's seconds go, its memory, its share of the peak.

The work: 32 prompts × 8 rollouts a step, temperature 1, k3 KL with weight 1e-2 against a frozen copy, AdamW 2e-6,
gradient norm clipped at 1, one update per batch, a reward that about one random response in seven earns. Two shapes:
`short` (12 prompt tokens, at most 24 new) and `rwku` (64, at most 32). `--replay` adds an update of 32 replayed groups.
One JSON line on stdout, medians over the steps after the warm-up; docs/speed.md defines its keys. In
`tests/scale/peer.py` TRL's GRPOTrainer does the same work, step by step in turn with ours."""

from dataclasses import dataclass
from typing import Annotated, Literal

from config import Config, Count, Natural, setting
from engine.flags import check_bounds, parse, run_command

Hidden = Annotated[int, "a multiple of 8, above 256 of 12", lambda x: x > 0 and x % (8 if x <= 256 else 12) == 0]


@dataclass
class Options:
    """Time Stage 2 on a random model and print one JSON line."""

    shape: Literal["short", "rwku"] = setting("Lengths: short 12 + 24 tokens, rwku 64 + 32.", "short")
    hidden: Hidden = setting("Hidden size, a multiple of 8, above 256 of 12.", 128)
    layers: int = setting("Layers.", 4)
    vocab: Annotated[int, "at least 1000", lambda x: x >= 1000] = setting("Words of the vocabulary.", 1000)
    lora_rank: Natural = setting("Train adapters of this rank in place of all weights (0: off).", 0)
    device: Literal["auto", "cpu", "cuda"] = setting("Where to run.", "auto")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "What to compute in; weights are float32. auto: bfloat16 on a GPU, as runs do, else float32.", "auto"
    )
    steps: Count = setting("Steps timed.", 5)
    warmup: int = setting("Steps before them that are not.", 2)
    threads: Count = setting("Threads of torch.", 1)
    replay: bool = setting("Replay 32 groups in each step (ReRULE).", False)
    cuda_graphs: bool = setting("Record decoding steps as CUDA graphs, taken where that proves faster.", False)
    max_tokens: int = setting("Token positions in a micro-batch of the update.", Config.max_tokens)


if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    OPTIONS = run_command(lambda: parse(Options), leave=False)

import contextlib
import json
import random
import re
import sys
import timeit
from resource import RUSAGE_SELF, getrusage
from statistics import median
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import benchmarks
import rerule
from data import Prompt, Query, Training
from engine.flags import resolve
from engine.run import start

VOCABULARY, N_PROMPTS, PROMPTS_PER_STEP, GROUP, LR = 1000, 320, 32, 8, 2e-6
PARTS = {"gen_s": "rollout", "ref_s": "reference", "update_s": "update", "replay_s": "replay"}  # → a phase's clocks
SHAPES = {"short": (12, 24), "rwku": (64, 32)}  # prompt tokens, longest response
earned = lambda text: float(bool(re.search(r"\bw\d*[1-6]77\b", text)))  # noqa: E731
peak_rss_mb = lambda: round(getrusage(RUSAGE_SELF).ru_maxrss / 1024)  # noqa: E731


def build_tokenizer(vocabulary=VOCABULARY):
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(vocabulary - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {name: f"<{name[:3]}>" for name in ("pad_token", "bos_token", "eos_token", "unk_token")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)


def build_model(hidden, layers, vocabulary=VOCABULARY):
    torch.manual_seed(0)
    heads = 4 if hidden <= 256 else 6
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=4 * hidden, max_position_embeddings=256, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def build_prompts(length, vocabulary=VOCABULARY, n=N_PROMPTS):
    rng = random.Random(0)
    return [" ".join(f"w{rng.randrange(vocabulary - 4)}" for _ in range(length)) for _ in range(n)]


def place(engine, config, build):
    """(The model to train, in float32, the reference as it computes). build() → the same random model at every call."""
    low = torch.bfloat16 if engine.half else torch.float32

    def built(dtype):
        model = build().to("cpu" if config.offload and dtype != low else engine.device)
        for p in model.parameters():  # buffers, such as rotations' frequencies, stay in float32, as where one is loaded
            p.data = p.data.to(dtype)
        return model

    model = engine.place(built(low if config.lora_rank and not engine.uniform else torch.float32), config)
    return model, model.off() if config.lora_rank else engine.place(built(low)).requires_grad_(False)


def time_stage2(run, method, models, tokenizer, prompts, reward, each):
    """The driver's own loop on (model, reference); `each` gets a step's row with seconds of PARTS; no logs."""

    def write(row):
        row |= {name: row.get(f"seconds_{phase}", 0.0) for name, phase in PARTS.items()}
        each(row | {"step_s": sum(row[name] for name in PARTS)})  # without the log's own columns: the peer has none

    run.log = lambda row, _: write(row)
    run.metrics = run.samples = SimpleNamespace(write=lambda row: None, size=lambda: 0, crc=0)
    queries = [Query(Prompt(None, text), text, "boundary") for text in prompts]
    with contextlib.redirect_stdout(sys.stderr):
        rerule.stage2(run, method, *models, tokenizer, Training([], queries), reward)


def best_rate(amount, work, device, repeat=20):
    """The most of `amount` a second that work() does, a GPU waited for."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    return amount / min(timeit.repeat(lambda: (work(), wait()), setup=wait, number=1, repeat=repeat))


def matmul_rate(device="cpu", dtype=torch.float32):
    """Floating-point operations a second in products of matrices of 1024 × 1024, on a GPU of 8192 × 8192."""
    n = 8192 if torch.device(device).type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    return best_rate(2 * n**3, lambda: a @ a, device)


def operations(model, prompt_tokens, responses, tokens):
    """The arithmetic that so many responses of `tokens` tokens in all cannot do without: (of a forward pass, of an
    update), a product and a sum for each weight of a matrix and each position that meets it. Layers meet prompts once a
    group, and all tokens but each response's last; the head, tied or not, meets a position a token. Gradients take a
    forward pass's for positions, and as much again for trained weights. Attention's products, norms, … are left out."""
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    body = [p for p in model.parameters() if p.dim() > 1 and p is not head and p is not embedding]
    met = [(p, prompt_tokens + tokens - responses) for p in body] + [(head, tokens)]
    forward, trained = (2 * sum(p.numel() * n for p, n in met if p.requires_grad >= only) for only in (False, True))
    return forward, 2 * forward + trained


def medians(rows, names):
    return {name: round(median(row[name] for row in rows), 4) for name in names}


def measure(o, beside=lambda model: contextlib.nullcontext(lambda: None)):
    """The line that is printed. beside(model) → a context of a function that is called after each step."""
    check_bounds(o)
    torch.set_num_threads(o.threads)
    prompt, longest = SHAPES[o.shape]
    config = resolve(Config(
        steps=o.warmup + o.steps, prompts_per_step=PROMPTS_PER_STEP, group_size=GROUP, lr=LR, weight_decay=0.0, tau=0.6,
        min_groups=1, warmup_steps=min(1, o.warmup), max_new_tokens=longest, max_tokens=o.max_tokens, eval_every=0,
        save_every=0, device=o.device, lora_rank=o.lora_rank, cuda_graphs=o.cuda_graphs,
    ), benchmarks.ALL)  # fmt: skip
    engine = start(config)
    on_gpu = engine.device.type == "cuda"
    engine.half = o.dtype == "bfloat16" or (o.dtype == "auto" and on_gpu)
    dtype = torch.bfloat16 if engine.half else torch.float32
    models = place(engine, config, lambda: build_model(o.hidden, o.layers, o.vocab))
    rate, rows = matmul_rate(engine.device, dtype), []
    run = SimpleNamespace(config=config, engine=engine, state={"phase": None})

    computes = torch.autocast(engine.device.type, torch.bfloat16, enabled=engine.half, cache_enabled=False)
    with beside(models[0]) as turn, computes:
        time_stage2(run, "rerule" if o.replay else "rule", models, build_tokenizer(o.vocab),
                    build_prompts(prompt, o.vocab), lambda query, text: earned(text),
                    lambda row: (rows.append(row), turn()))  # fmt: skip
    rate, rows = max(rate, matmul_rate(engine.device, dtype)), rows[o.warmup :]
    result = {name: getattr(o, name) for name in "shape hidden layers vocab threads steps max_tokens".split()}
    result |= {"device": torch.cuda.get_device_name() if on_gpu else "cpu", "dtype": str(dtype).split(".")[1]}
    for row in rows:
        row |= {"update_group_s": row["update_s"] / PROMPTS_PER_STEP, "tokens_per_step": row["response_tokens"]}
        row["tokens_per_s"] = row["tokens_per_step"] / row["step_s"]
        sizes = (PROMPTS_PER_STEP * prompt, PROMPTS_PER_STEP * GROUP, row["tokens_per_step"])
        forward, update = operations(models[0], *sizes)  # sampling and π_ref take a forward pass each
        row["flop_floor_multiple"] = (row["gen_s"] + row["ref_s"] + row["update_s"]) * rate / (2 * forward + update)
        if "replay_groups" in row:
            row["replay_group_s"] = row["replay_s"] / max(1, row["replay_groups"] - row["replay_skipped"])
            row["replay_skipped"] /= row["replay_groups"]
    more = ["update_group_s", "tokens_per_step", "tokens_per_s", "flop_floor_multiple"]
    more += ["replay_group_s", "replay_skipped"] * all("replay_group_s" in row for row in rows)
    result |= medians(rows, ["step_s", *PARTS, *more]) | {"peak_rss_mb": peak_rss_mb()}
    result["matmul_peak_share"] = round(1 / result["flop_floor_multiple"], 4)
    result |= {"peak_gpu_mb": round(torch.cuda.max_memory_allocated() / 2**20)} if on_gpu else {}
    return result


if __name__ == "__main__":
    run_command(lambda: print(json.dumps(measure(OPTIONS))))
