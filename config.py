"""Every setting, its meaning, and Appendix D's values for each benchmark.

Fields without a number in their default take it from `PRESETS`; a flag overrides both. Where PAPER and code leave a
choice open, the default is the reading that the README's table of open choices names.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning OpenMP threads stall a busy machine
if os.environ.get("RANK", "0") != "0":
    os.environ["TQDM_DISABLE"] = "1"  # before tqdm: torchrun's first process draws the bars

from argparse import HelpFormatter  # noqa: E402
from dataclasses import dataclass, field, fields  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Literal  # noqa: E402

from transformers import HfArgumentParser  # noqa: E402

from files import InputError  # noqa: E402

METHODS = (  # in the order of a table's rows; `rej_steer` comes with `rule` and `rerule`, which start from it
    "ga", "gd", "kl", "po", "dpo", "dpo_rt", "npo", "npo_gdr", "npo_klr", "simnpo", "simnpo_gdr", "simnpo_klr",
    "mismatch", "llmu", "task_vector", "whp", "flat", "sga", "purge", "rej_steer", "rule", "rerule",
)  # fmt: skip
ALIASES = {"ga_gdr": "gd", "ga_klr": "kl", "npo_rt": "npo_gdr"}
RATES = {  # learning rates of baselines and of PURGE on tiny models: the outcome of grid.py
    "builtin": dict(
        ga=3e-4, gd=3e-4, kl=3e-4, po=1e-3, dpo=1e-4, dpo_rt=1e-3, npo=3e-4, npo_gdr=3e-4, npo_klr=3e-4, simnpo=3e-4,
        simnpo_gdr=1e-3, simnpo_klr=1e-3, mismatch=1e-3, llmu=1e-3, task_vector=1e-3, whp=3e-3, flat=3e-4, sga=3e-4,
        purge=1e-4,
    ),
    "tofu": dict(
        ga=3e-4, gd=3e-4, po=1e-4, dpo=1e-4, npo=3e-4, npo_gdr=1e-3, simnpo=3e-4, flat=3e-4, purge=3e-4,
    ),
}  # fmt: skip

# Appendix D, RULE's published scripts where the paper is silent, and settings of our own for models of laptop size.
PRESETS = {
    "builtin": dict(
        steps=32, lr=4e-5, tau=0.4, min_groups=60, warmup_steps=10, buffer_size=1200, max_new_tokens=12,
        sft_lr=2e-4, sft_batch_size=32, sft_epochs=20.0, sft_stop=0.97, tiny_epochs=6.0, tiny_lr=3e-3,
        tiny_batch_size=96, tiny_hidden=128, tiny_layers=2, eval_every=4,
        baseline_epochs=5.0,
    ),
    "rwku": dict(
        steps=37, lr=2e-6, tau=0.6, min_groups=100, warmup_steps=15, buffer_size=1200, max_new_tokens=1024,
        sft_lr=4e-7, sft_batch_size=8, sft_epochs=3.0, sft_stop=0.0, tiny_epochs=8.0, tiny_lr=2e-3, tiny_batch_size=32,
        tiny_hidden=128, tiny_layers=3, eval_every=0,
        baseline_epochs=5.0,
    ),
    "muse": dict(
        steps=187, lr=2e-6, tau=0.4, min_groups=500, warmup_steps=26, buffer_size=1200, max_new_tokens=1024,
        sft_lr=4e-7, sft_batch_size=8, sft_epochs=3.0, sft_stop=0.0, tiny_epochs=20.0, tiny_lr=2e-3, tiny_batch_size=32,
        tiny_hidden=128, tiny_layers=3, eval_every=0,
        baseline_epochs=5.0,
    ),
    "tofu": dict(
        steps=11, lr=2e-6, tau=0.6, min_groups=80, warmup_steps=6, buffer_size=400, max_new_tokens=256,
        sft_lr=4e-7, sft_batch_size=8, sft_epochs=3.0, sft_stop=0.0, tiny_epochs=20.0, tiny_lr=2e-3, tiny_batch_size=32,
        tiny_hidden=128, tiny_layers=3, eval_every=0,
        baseline_epochs=5.0,
    ),
}  # fmt: skip
LAPTOP = dict(sft_lr=2e-4, sft_batch_size=32, sft_epochs=20.0, sft_stop=0.97, min_groups=16)
TINY = {  # --model tiny on real text
    "rwku": dict(LAPTOP, lr=2e-4, max_new_tokens=32),
    "muse": dict(LAPTOP, lr=2e-4, max_new_tokens=64, steps=37, warmup_steps=15),
    "tofu": dict(LAPTOP, lr=1e-4, max_new_tokens=96, steps=20, baseline_epochs=20.0),
}


def setting(help, default=None, preset=None):
    """A field whose `--help` line ends with its value, or its value for each benchmark."""
    if preset:
        value = ", ".join(f"{name} {values[preset]:g}" for name, values in PRESETS.items())
        tiny = ", ".join(f"{name} {values[preset]:g}" for name, values in TINY.items() if preset in values)
        value += f"; with --model tiny: {tiny}" if tiny else ""
    else:
        value = {True: "on", False: "off"}.get(default, default) if isinstance(default, bool) else default
        value = " ".join(map(str, value)) if isinstance(value, list) else value
    help = f"{help} [{value}]" if value not in ("", None) else help
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help.replace("%", "%%")})


@dataclass
class Config:
    """Unlearn by reinforcement with RULE and ReRULE, then score and draw what came of it."""

    benchmark: Literal["builtin", "rwku", "muse", "tofu"] = setting("What to unlearn.", "builtin")
    data_dir: str = setting("Folder with the benchmark's files; the built-in world needs none.", "")
    retain_log: str = setting(
        "TOFU: evaluation log of the retained model, ours or TOFU's own, which forget quality compares with.", ""
    )
    crossed: int | None = setting(
        "Built-in world: how many of its 42 neighbours have names crossed from two targets'. [22]", None
    )
    model: str = setting(
        "Hugging Face id or folder, or 'tiny': a small Llama trained on the spot to know this benchmark's answers.", ""
    )
    method: list[str] = setting(
        f"What to unlearn with, some of: {' '.join(METHODS)} {' '.join(ALIASES)} retained.", ["rule", "rerule"]
    )
    seed: int = setting("Seed of the world, the data order, every rollout and every draw.", 0)
    output_dir: str = setting("Folder for everything the run leaves. Unless given: runs/<benchmark>.", "")
    start_from: str = setting(
        "Folder of a finished run of the same seed whose models before Stage 2 are taken, not trained again.", ""
    )
    resume: bool = setting("Go on with the unfinished run in output_dir from its last saved state.", False)
    save_every: int = setting("Steps between saved states (0: only at the end of each phase).", 10)
    eval_every: int | None = setting(
        "Steps of Stage 2 between evaluations for the curves (0: none).", preset="eval_every"
    )

    steps: int | None = setting("Stage 2 steps, each one batch of rollouts.", preset="steps")
    prompts_per_step: int = setting("Prompts, so groups, in a step.", 32)
    group_size: int = setting("Rollouts for each prompt, G.", 8)
    lr: float | None = setting("Stage 2 learning rate of AdamW, constant.", preset="lr")
    kl_coef: float = setting("Weight β of the KL term against the model after Stage 1.", 1e-2)
    weight_decay: float = setting("AdamW's weight decay in both stages.", 1e-2)
    max_grad_norm: float = setting("Gradients are clipped to this norm.", 1.0)
    temperature: float = setting("Sampling temperature of rollouts, and of every log-probability.", 1.0)
    max_new_tokens: int | None = setting("Longest response in tokens.", preset="max_new_tokens")
    loss_norm: Literal["sequence", "token", "sum"] = setting(
        "Mean over each response's tokens (GRPO), over all tokens (RULE's code), or Eq. 3's plain sum.", "sequence"
    )
    unbiased: bool = setting("Divide by G − 1, not G, in the standard deviation of a group's rewards.", True)
    forget_reward: Literal["refusal", "target"] = setting(
        "Forget reward: 1 for any refusal, or 0.5 for a refusal and 1 if it also names the target.", "refusal"
    )

    tau: float | None = setting("Hard-case threshold τ on a group's mean reward.", preset="tau")
    buffer_size: int | None = setting("Groups that the replay buffer holds.", preset="buffer_size")
    min_groups: int | None = setting("Replay waits until the buffer holds this many groups.", preset="min_groups")
    warmup_steps: int | None = setting("Replay waits until this step is over.", preset="warmup_steps")
    replay_groups: int = setting("Groups drawn for each replay update.", 32)
    replay_store: Literal["hard", "random", "unequal", "recent", "current", "none"] = setting(
        "What is replayed: hard groups, as many random ones (Table 4's control), hard ones less those of equal "
        "rewards, the previous step's batch, this step's own again, or nothing: a step on zero gradient.",
        "hard",
    )
    replay_step: Literal["separate", "combined"] = setting(
        "An optimiser step of its own for replay, or one step on the sum of both mean losses.", "separate"
    )
    store_until: Literal["end", "activation"] = setting("Go on storing after replay has started, or stop.", "end")
    is_level: Literal["sequence", "token", "geometric"] = setting("What an importance ratio is taken over.", "sequence")
    is_objective: Literal["weight", "surrogate"] = setting(
        "Eq. 5 with its weight held fixed, or PPO's clipped minimum.", "weight"
    )
    is_normalize: bool = setting("Divide importance weights by their mean.", False)
    clip_low: float = setting("ε_low: importance weights are at least 1 − ε_low.", 0.2)
    clip_high: float = setting("ε_high: importance weights are at most 1 + ε_high.", 0.3)
    replay_kl: bool = setting("Keep the KL term on replayed rollouts.", False)

    sft_lr: float | None = setting("Stage 1 learning rate.", preset="sft_lr")
    sft_batch_size: int | None = setting("Stage 1 rows in a step.", preset="sft_batch_size")
    sft_epochs: float | None = setting("Stage 1 passes over the refusals.", preset="sft_epochs")
    sft_steps: int = setting("Stage 1 steps; 0 leaves it to --sft_epochs.", 0)
    sft_stop: float | None = setting(
        "Stage 1 ends once this share of answers sampled to forget prompts are refusals (0: never).", preset="sft_stop"
    )
    sft_warmup: int = setting("Stage 1 warm-up steps before the cosine.", 20)

    baseline_lr: float | None = setting(
        "Learning rate of a baseline and of PURGE. Unless given: chosen for each on a tiny model, else 1e-5.", None
    )
    baseline_epochs: float | None = setting("Passes over the forget rows.", preset="baseline_epochs")
    baseline_batch_size: int = setting("Forget rows, and as many retain rows, in a step.", 32)
    beta: float | None = setting("β of DPO, NPO (0.1 unless given) and SimNPO (4.5).", None)
    gamma: float = setting("SimNPO's margin γ.", 0.0)
    forget_weight: float | None = setting("Weight of the forget term (1 unless given; SimNPO 0.125).", None)
    retain_weight: float = setting("Weight of the retain term, GDR or KLR.", 1.0)
    llmu_weights: list[float] = setting("LLMU's ε1, ε2, ε3.", [0.5, 1.0, 1.0])
    alpha: float = setting("Strength α of task vectors and of WHP.", 1.0)
    flat_divergence: Literal["pearson", "kl", "tv"] = setting("FLAT's f-divergence.", "pearson")
    sga_r: float = setting("SGA's share r of normal answers.", 0.4)
    sga_k: int = setting("SGA's normal answers to each forget prompt, K.", 3)
    purge_terms: str = setting(
        'PURGE\'s forbidden terms, rows {"term": …}. Unless given: from the answers to the forget prompts.', ""
    )
    max_perplexity: float = setting("A baseline stops once its perplexity on retain rows is above this.", 1000.0)

    tiny_epochs: float | None = setting("--model tiny: passes over what it is taught.", preset="tiny_epochs")
    tiny_lr: float | None = setting("--model tiny: learning rate, falling in a cosine.", preset="tiny_lr")
    tiny_batch_size: int | None = setting("--model tiny: rows in a step.", preset="tiny_batch_size")
    tiny_hidden: int | None = setting("--model tiny: hidden size.", preset="tiny_hidden")
    tiny_layers: int | None = setting("--model tiny: layers.", preset="tiny_layers")

    device: Literal["auto", "cpu", "cuda"] = setting("Where to run.", "auto")
    max_tokens: int = setting("Token positions in a micro-batch of the update.", 2048)
    rollout_prompts: int = setting(
        "Prompts of a step that one process samples side by side (0: all its own); bounds the cache of keys.", 0
    )
    gradient_checkpointing: bool = setting("Keep one activation per layer, and compute the rest twice.", False)
    offload: bool = setting(
        "Keep float32 weights and moments in the host's memory (FSDP2); the GPU computes with bf16 ones.", False
    )
    dry_run: bool = setting("Print how much memory --model would take, in a table, and stop.", False)
    eval_batch_size: int = setting("Prompts in a batch of the evaluation.", 256)


def parse(kind, argv=None):
    """Command line → dataclass of `kind`. Raises InputError for anything a flag does not take."""
    parser = HfArgumentParser(
        kind, description=f"{kind.__doc__} Defaults in brackets.", allow_abbrev=False, formatter_class=HelpFormatter
    )

    def fail(message):
        raise InputError(message)

    parser.error = fail
    settings, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        raise InputError(f"unknown flag {unknown[0]}; --help lists all of them")
    return settings


def resolve(config):
    """Fill in presets and check every value. Returns the same Config; raises InputError naming the flag."""
    config.model = config.model or "tiny"
    config.output_dir = config.output_dir or f"runs/{config.benchmark}"
    preset = PRESETS[config.benchmark]
    if config.model == "tiny" and config.benchmark != "builtin":
        preset = preset | TINY[config.benchmark]
    for name, value in preset.items():
        if getattr(config, name) is None:
            setattr(config, name, value)

    def require(holds, flag, expected):
        if not holds:
            raise InputError(f"--{flag} {getattr(config, flag)}: expected {expected}")

    for name in config.method:
        if name not in (*METHODS, *ALIASES, "retained"):
            raise InputError(f"--method {name}: expected some of {', '.join([*METHODS, *ALIASES, 'retained'])}")
    if "retained" in config.method and config.benchmark != "builtin":
        raise InputError("--method retained: only the built-in world can train a model without the forget set")
    chosen = {ALIASES.get(name, name) for name in config.method}
    chosen |= {"rej_steer"} if chosen & {"rule", "rerule"} else set()
    config.method = [name for name in METHODS if name in chosen]
    if config.benchmark == "builtin" and config.model != "tiny":
        raise InputError(f"--model {config.model}: the built-in world has its own tiny model; leave the flag out")
    if config.crossed is not None:
        if config.benchmark != "builtin":
            raise InputError("--crossed: only the built-in world makes up its names")
        require(0 <= config.crossed <= 30, "crossed", "0 to 30 of the 42 neighbours")
    if config.benchmark == "builtin" and config.data_dir:
        raise InputError(f"--data_dir {config.data_dir}: the built-in world reads no files; add --benchmark")
    if config.retain_log and config.benchmark != "tofu":
        raise InputError("--retain_log: only --benchmark tofu compares with a retained model")
    require(0 <= config.tau <= 1, "tau", "a mean reward from 0 to 1")
    require(config.group_size >= 2, "group_size", "at least 2 rollouts, whose rewards are compared")
    for name in ("prompts_per_step", "replay_groups", "min_groups", "buffer_size", "sft_batch_size", "max_new_tokens",
                 "max_tokens", "eval_batch_size", "tiny_batch_size",
                 "tiny_hidden", "tiny_layers", "baseline_batch_size", "sga_k"):  # fmt: skip
        require(getattr(config, name) >= 1, name, "at least 1")
    require(config.tiny_hidden % 8 == 0, "tiny_hidden", "a multiple of 8: four heads, rotated in pairs")
    for name in ("steps", "save_every", "eval_every", "warmup_steps", "sft_steps", "sft_warmup", "rollout_prompts"):
        require(getattr(config, name) >= 0, name, "0 or more")
    for name in ("lr", "sft_lr", "temperature", "max_grad_norm", "sft_epochs", "tiny_epochs", "tiny_lr",
                 "baseline_epochs", "max_perplexity"):  # fmt: skip
        require(0 < getattr(config, name) < float("inf"), name, "a number above 0")
    for name in ("kl_coef", "weight_decay", "clip_low", "clip_high"):
        require(0 <= getattr(config, name) < float("inf"), name, "0 or more")
    require(config.clip_low <= 1, "clip_low", "at most 1")
    for name in ("baseline_lr", "beta", "forget_weight"):
        if getattr(config, name) is not None:
            require(0 < getattr(config, name) < float("inf"), name, "a number above 0")
    if config.purge_terms and not Path(config.purge_terms).is_file():
        raise InputError(f"--purge_terms {config.purge_terms}: no such file")
    require(len(config.llmu_weights) == 3, "llmu_weights", "three numbers")
    require(0 <= config.sga_r <= 1, "sga_r", "a share from 0 to 1")
    require(0 <= config.sft_stop <= 1, "sft_stop", "a share from 0 to 1")
    require(config.replay_groups <= config.buffer_size, "replay_groups", f"at most --buffer_size {config.buffer_size}")
    require(config.min_groups <= config.buffer_size, "min_groups", f"at most --buffer_size {config.buffer_size}")
    alone = [name for name in config.method if name not in ("rej_steer", "rule", "rerule")]
    if alone and (config.offload or "WORLD_SIZE" in os.environ):
        raise InputError(f"--method {alone[0]}: takes one process, neither torchrun nor --offload")
    require(config.is_objective == "weight" or not config.is_normalize, "is_objective", "weight, with --is_normalize")
    return config


def learning_rate(config, method):
    """Of Stage 2 for RULE and ReRULE; of a baseline or PURGE, the flag's or the one chosen for a tiny model."""
    if method in ("rule", "rerule"):
        return config.lr
    chosen = {**RATES["builtin"], **RATES.get(config.benchmark, {})}[method] if config.model == "tiny" else 1e-5
    return config.baseline_lr or chosen


# what a run may be gone on with
FREE = {"resume", "save_every", "output_dir", "device", "start_from", "dry_run", "offload", "rollout_prompts"}
BEFORE_STAGE_2 = [
    "benchmark", "crossed", "model", "data_dir", "seed", "retain_log", "weight_decay", "max_grad_norm", "temperature",
    "max_new_tokens", *(f.name for f in fields(Config) if f.name.startswith(("sft_", "tiny_"))),
]  # fmt: skip


def differences(ours, theirs, names=None):
    """The settings, all but `FREE` unless named, in which a new command differs from a stored run: "name old → new"."""
    names = names or [f.name for f in fields(Config) if f.name not in FREE]
    pairs = [(name, theirs.get(name), getattr(ours, name)) for name in names]
    return [f"{name} {old} → {new}" for name, old, new in pairs if old != new]
