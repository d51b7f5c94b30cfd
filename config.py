"""Every setting in groups, its meaning and its bounds. `engine/flags.py` reads them off a command line.

Appendix D's values stand with each benchmark, in `benchmarks/`: a field marked "preset" takes its value from there, and
a flag overrides it. Where the paper leaves a choice open, the default is the reading that docs/choices.md names."""

import os
import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal

from baselines import ALIASES, METHODS

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning OpenMP threads stall a busy machine
if os.environ.get("RANK", "0") != "0":
    os.environ["TQDM_DISABLE"] = "1"  # before tqdm: torchrun's first process draws the bars


def on_error(kind, error, trace, show=sys.excepthook):
    """Ctrl-C needs no traceback, while modules are being imported either."""
    print("interrupted", file=sys.stderr) if kind is KeyboardInterrupt else show(kind, error, trace)


sys.excepthook = on_error
ADAPTED = {"lr": 10, "sft_lr": 3, "baseline_lr": 10}  # times the rate of all weights suits adapters
STORES = tuple("hard random easy medium priority fresh unequal boundary leaks recent current none".split())
# Types with bounds, told in words where a value is outside them.
MOST = 10**6  # that any count or number may be: more is a slip, and would fill the memory or never end
Count = Annotated[int, "at least 1, at most a million", lambda x: 1 <= x <= MOST]
Natural = Annotated[int, "0 or more, at most a million", lambda x: 0 <= x <= MOST]
Above0 = Annotated[float, "a number above 0, at least 1e-12, at most a million", lambda x: 1e-12 <= x <= MOST]
From0 = Annotated[float, "0 or more, at most a billion", lambda x: 0 <= x <= 1e9]  # no clip: a bound of 1e9
Three = Annotated[list[float], "three numbers", lambda x: len(x) == 3 and all(-MOST <= w <= MOST for w in x)]
Seed = Annotated[int, "a whole number of at most 18 digits", lambda x: abs(x) < 10**18]
Finite = Annotated[float, "a number from minus a million to a million", lambda x: -MOST <= x <= MOST]
GroupSize = Annotated[int, "2 to 4096 rollouts, whose rewards are compared", lambda x: 2 <= x <= 4096]
Hidden = Annotated[int, "a multiple of 8, at most 8192: four heads, rotated in pairs", lambda x: x in range(8, 8193, 8)]
Tokens = Annotated[int, "260, for every byte and four marks, to 65536", lambda x: 260 <= x <= 65536]
Share = Annotated[float, "a share from 0 to 1", lambda x: 0 <= x <= 1]


class InputError(Exception):
    """A mistake in a flag, a file or a folder, said in one line."""


def setting(help, default=None, preset=False):
    """A field with its `--help` line; a preset one has a value for each benchmark."""
    shown = {True: "on", False: "off"}.get(default, default) if isinstance(default, bool) else default
    shown = " ".join(map(str, shown)) if isinstance(shown, list) else shown
    help = (help if shown in ("", None) else f"{help} [{shown}]").replace("%", "%%")
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": f"{help} [preset]" if preset else help})


@dataclass
class Method:
    _argument_group_name = "the method: Sections 3.1 and 3.3, Appendix D"

    method: list[str] = setting(f"Methods: {' '.join(METHODS)} {' '.join(ALIASES)} retained.", ["rule", "rerule"])
    steps: Natural | None = setting("Stage 2 steps, each one batch of rollouts.", preset=True)
    prompts_per_step: Count = setting("Prompts, so groups, in a step.", 32)
    group_size: GroupSize = setting("Rollouts for each prompt, G (num_generations elsewhere).", 8)
    lr: Above0 | None = setting("Stage 2 learning rate of AdamW, constant.", preset=True)
    kl_coef: From0 = setting("Weight β of the KL term against the model after Stage 1.", 1e-2)
    weight_decay: From0 = setting("AdamW's weight decay in both stages.", 1e-2)
    max_grad_norm: Above0 = setting("Gradients are clipped to this norm.", 1.0)
    temperature: Above0 = setting("Sampling temperature of rollouts, and of every log-probability.", 1.0)
    max_new_tokens: Count | None = setting("Longest response in tokens.", preset=True)
    tau: Share | None = setting("Hard-case threshold τ on a group's mean reward.", preset=True)
    buffer_size: Count | None = setting("Groups that the replay buffer holds.", preset=True)
    min_groups: Count | None = setting("Replay waits until the buffer holds this many groups.", preset=True)
    warmup_steps: Natural | None = setting("Replay waits until this step is over.", preset=True)
    replay_groups: Count = setting("Groups drawn for each replay update.", 32)
    epsilon_low: Share = setting("ε_low: importance weights are at least 1 − ε_low.", 0.2)
    epsilon_high: From0 = setting("ε_high: importance weights are at most 1 + ε_high.", 0.3)
    sft_lr: Above0 | None = setting("Stage 1 learning rate.", preset=True)
    sft_batch_size: Count | None = setting("Stage 1 rows in a step.", preset=True)
    sft_epochs: Above0 | None = setting("Stage 1 passes over the refusals.", preset=True)
    sft_steps: Natural = setting("Stage 1 steps; 0 leaves it to --sft_epochs.", 0)
    sft_stop: Share | None = setting("Stage 1 ends once this share of sampled answers refuse (0: never).", preset=True)
    sft_warmup: Natural = setting("Stage 1 warm-up steps before the cosine.", 20)


@dataclass
class Choices:
    _argument_group_name = "what the paper leaves open (docs/choices.md)"

    loss_norm: Literal["sequence", "token", "sum"] = setting(
        "Mean over each response's tokens (GRPO), over all tokens (RULE's code), or Eq. 3's plain sum.", "sequence"
    )
    unbiased: bool = setting("Divide by G − 1, not G, in the standard deviation of a group's rewards.", True)
    forget_reward: Literal["refusal", "target"] = setting(
        "Forget reward: 1 for any refusal, or 0.5 for a refusal and 1 if it also names the target.", "refusal"
    )
    ratio_level: Literal["sequence", "token", "geometric"] = setting(
        "Importance ratio of a whole response, of each token, or the |y|-th root of the whole.", "sequence"
    )
    replay_objective: Literal["weight", "surrogate"] = setting("Eq. 5, or PPO's clipped minimum.", "weight")
    normalize_ratio: bool = setting("Divide importance weights by their mean.", False)
    replay_kl: bool = setting("Keep the KL term on replayed rollouts.", False)
    replay_store: Literal[STORES] = setting("What is replayed: hard groups, or a control's (docs/choices.md).", "hard")
    max_age: Natural = setting("Groups stored more than this many steps ago are not replayed (0: any age).", 0)
    min_share: Share = setting("Replay waits for this share of all sampled groups, not for --min_groups (0: off).", 0.0)
    redraw: Natural = setting("Further batches at most, in a step, to replace groups of equal rewards (DAPO).", 0)
    replay_step: Literal["separate", "combined"] = setting("Replay's step: its own, or on both losses.", "separate")
    old_logprobs: Literal["sampler", "training"] = setting(
        "Whose log π_old ratios divide by: the sampler's, or the training forward's at the step of sampling.", "sampler"
    )
    store_until: Literal["end", "activation"] = setting("Go on storing after replay has started, or stop.", "end")


@dataclass
class Data:
    _argument_group_name = "data and run"

    benchmark: str = setting("What to unlearn: a module of benchmarks/ (builtin, rwku, muse, tofu, town).", "builtin")
    data_dir: str = setting("Folder with the benchmark's files; the built-in worlds need none.", "")
    retain_log: str = setting("TOFU: evaluation log of the retained model, for forget quality.", "")
    crossed: Annotated[int, "0 to 30 of the 42 neighbours", lambda x: 0 <= x <= 30] | None = setting(
        "Built-in world: how many of its 42 neighbours have names crossed from two targets'. [22]"
    )
    model: str = setting("Hugging Face id or folder, or 'tiny': a small Llama taught the benchmark's answers.", "tiny")
    tokenizer: str = setting("Hugging Face id or folder of the tokenizer, if not with --model.", "")
    seed: Seed = setting("Seed of the world, the data order, every rollout and every draw.", 0)
    output_dir: str = setting("Folder for everything the run leaves. Unless given: runs/<benchmark>.", "")
    attack: list[str] = setting("Attack by some of: leak extract membership prefix quantize relearn.", [])
    start_from: str = setting("Folder of a finished run of the same seed: models before Stage 2 are taken from it.", "")
    associated: Natural = setting("Boundary queries more, on names that stand in forget prompts alone (0: none).", 0)
    held_out: Natural | None = setting("Queries of each kind by which Stage 2 is watched (0: none).", preset=True)
    keep: Literal["last", "best"] = setting("best: save the step that --held_out finds best beside the last.", "last")
    resume: bool = setting("Go on with the unfinished run in output_dir from its last saved state.", False)
    save_every: Natural | None = setting("Steps between saved states (0: at a phase's end alone). [50; tiny: 10]")
    save_dtype: Literal["auto", "bfloat16", "float32"] = setting("Saved models; auto: bfloat16 on a GPU.", "auto")
    eval_every: Natural | None = setting("Steps of Stage 2 between evaluations for the curves (0: none).", preset=True)
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = setting("Report the log to a tracker.", "none")


@dataclass
class Machine:
    _argument_group_name = "machine"

    device: Literal["auto", "cpu", "cuda"] = setting("Where to run.", "auto")
    max_tokens: Count = setting("Token positions in an update's micro-batch; on several GPUs, a baseline's too.", 2048)
    rollout_prompts: Natural = setting("Prompts that a process samples at a time (0: all its own): bounds its keys.", 0)
    cuda_graphs: bool = setting("Record decoding steps as CUDA graphs, taken where that proves faster.", False)
    eval_batch_size: Count = setting("Prompts in a batch of the evaluation.", 256)
    gradient_checkpointing: bool = setting("Keep one activation per layer, and compute the rest twice.", False)
    offload: bool = setting("Float32 weights and moments stay on the host (FSDP2); a GPU computes in bf16.", False)
    lora_rank: Natural = setting("Train adapters of this rank at 10 times the preset rates, Stage 1 at 3 (0: off).", 0)
    lora_alpha: Above0 | None = setting("Adapters are scaled by α over the rank. Unless given: twice the rank.")
    lora_targets: list[str] = setting("Layers that get adapters, by peft's names.", ["all-linear"])
    dry_run: bool = setting("Print how much memory --model would take, in a table, and stop.", False)


@dataclass
class Baselines:
    _argument_group_name = "baselines: Appendix B"

    baseline_lr: Above0 | None = setting("Learning rate of baselines and PURGE; else of results/rates_*.json, or 1e-5.")
    baseline_epochs: Above0 | None = setting("Passes over the forget rows.", preset=True)
    baseline_batch_size: Count = setting("Forget rows, and as many retain rows, in a step.", 32)
    beta: Above0 | None = setting("β of DPO, NPO (0.1 unless given) and SimNPO (4.5).")
    gamma: Finite = setting("SimNPO's margin γ.", 0.0)
    forget_weight: Above0 | None = setting("Weight of the forget term (1 unless given; SimNPO 0.125).")
    retain_weight: From0 = setting("Weight of the retain term, GDR or KLR.", 1.0)
    llmu_weights: Three = setting("LLMU's ε1, ε2, ε3.", [0.5, 1.0, 1.0])
    alpha: Finite = setting("Strength α of task vectors and of WHP.", 1.0)
    flat_divergence: Literal["pearson", "kl", "tv"] = setting("FLAT's f-divergence.", "pearson")
    sga_r: Share = setting("SGA's share r of normal answers.", 0.4)
    sga_k: Count = setting("SGA's normal answers to each forget prompt, K.", 3)
    purge_terms: str = setting('PURGE\'s forbidden terms, rows {"term": …}; else from answers to forget prompts.', "")
    max_perplexity: Above0 = setting("A baseline stops once its perplexity on retain rows is above this.", 1000.0)


@dataclass
class Tiny:
    _argument_group_name = "tiny models: --model tiny"

    tiny_epochs: Above0 | None = setting("Passes over what it is taught.", preset=True)
    tiny_lr: Above0 | None = setting("Learning rate, falling in a cosine.", preset=True)
    tiny_batch_size: Count | None = setting("Rows in a step.", preset=True)
    tiny_hidden: Hidden | None = setting("Hidden size.", preset=True)
    tiny_layers: Count | None = setting("Layers.", preset=True)
    tiny_vocabulary: Tokens = setting("Tokens of the tokenizer that is fitted to a real text.", 4000)
    tiny_rows: Natural | None = setting("Forget queries, and boundary ones, that are kept (0: all).", preset=True)
    tiny_refusals: Literal["all", "trained"] = setting("Wordings in which it refuses others.", "all")


@dataclass
class Config(Tiny, Baselines, Machine, Data, Choices, Method):
    """Unlearn by reinforcement with RULE and ReRULE, then score and draw what came of it."""
