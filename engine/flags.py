"""Command lines: flags or an earlier run's config.json become settings, presets fill in, bounds are checked.

torch takes seconds to import, so nothing here does: a command reads its flags first."""

import errno
import json
import os
import re
import sys
import time
from argparse import RawDescriptionHelpFormatter
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import get_args, get_type_hints

from transformers import HfArgumentParser

from baselines import ALIASES, METHODS, TITLES
from config import ADAPTED, Config, InputError
from engine.files import RANK, printable, read_rows

FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)  # of the machine, not of the command


class Help(RawDescriptionHelpFormatter):
    """Each flag once, as it is written in the docs (argparse takes hyphens for its underscores too)."""

    def _format_action_invocation(self, action):
        takes = action.metavar or ("{" + ",".join(action.choices) + "}" if action.choices else "")
        return f"{action.option_strings[0]} {takes}".strip() if action.dest != "help" else "-h, --help"


def parse(kind, argv=None, presets=None):
    """Command line → dataclass of `kind`. A first word that ends in .json is a config.json, over which flags win.
    presets: {benchmark: (its values, those that --model tiny changes)} for --help. Raises: InputError."""
    argv = list(sys.argv[1:] if argv is None else argv)
    examples = json.loads(Path(__file__).with_name("examples.json").read_text(encoding="utf-8")).get(program(), [])
    groups = [base for base in kind.__bases__ if base is not object][::-1] or [kind]
    parser = HfArgumentParser(
        groups, description=fill(f"{kind.__doc__} Defaults in brackets.", 118), allow_abbrev=False,
        usage=f"{program()} {'[config.json] ' if kind is Config else ''}[flags]",
        formatter_class=partial(Help, max_help_position=30, width=120), epilog="\n  ".join(["examples:", *examples]),
    )  # fmt: skip
    for action in parser._actions:
        flag, action.help = action.dest, f"Required. {action.help}" if action.required else action.help
        if action.option_strings[0].startswith("--no_"):
            action.help = f"Switch --{flag} off."
        elif presets and action.help.endswith("[preset]"):
            values = ", ".join(f"{name} {preset[flag]:g}" for name, (preset, _) in presets.items())
            tiny = ", ".join(f"{name} {tiny[flag]:g}" for name, (_, tiny) in presets.items() if flag in tiny)
            action.help = action.help.replace("[preset]", f"[{values}; tiny: {tiny}]" if tiny else f"[{values}]")
    place = ""

    def fail(message):
        raise InputError(place + message)

    parser.error = fail
    if argv and argv[0].endswith(".json"):
        place, stored = f"{argv[0]}: ", stored_flags(argv[0])
        parser.parse_args(stored)
        place, argv = "", stored + argv[1:]
    if re.search("[\ud800-\udfff]", " ".join(argv)):
        raise InputError("a flag holds bytes that are no UTF-8 text, or half a character")
    *found, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        raise InputError(f"unknown flag {unknown[0]}; --help lists all of them")
    return kind(**{name: value for group in found for name, value in vars(group).items()})


def program():
    """The command as it was called: rerule.py, or python -m build_data."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name


def stored_flags(path):
    """The config.json of an earlier run as a command line."""
    try:
        stored = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error!r:.80})") from None
    if not isinstance(stored, dict):
        raise InputError(f"{path}: expected an object with a value for each flag")
    flags = []
    for name, value in stored.items():
        if name != "starts" and value is not None and (value or name != "attack"):  # no attack is no flag
            flags += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return flags


def resolve(config, benchmarks):
    """The same Config with presets filled in and every value checked. benchmarks: of all names. Raises: InputError."""

    def require(holds, flag, expected):
        if not holds:
            raise InputError(f"--{flag} {getattr(config, flag)}: expected {expected}")

    require(config.benchmark in benchmarks, "benchmark", f"one of {', '.join(benchmarks)}")
    benchmark = benchmarks[config.benchmark]
    config.output_dir = config.output_dir or f"runs/{config.benchmark}"
    for name, value in (benchmark.preset | (benchmark.tiny if config.model == "tiny" else {})).items():
        if getattr(config, name) is None:
            setattr(config, name, value * ADAPTED[name] if config.lora_rank and name in ADAPTED else value)
    if config.save_every is None:
        config.save_every = 10 if config.model == "tiny" else 50
    for name in config.method:
        if name not in (*METHODS, *ALIASES, "retained"):
            raise InputError(f"--method {name}: expected some of {', '.join([*METHODS, *ALIASES, 'retained'])}")
    if "retained" in config.method and config.model != "tiny":
        raise InputError("--method retained: only --model tiny can be taught without the forget set")
    chosen = {ALIASES.get(name, name) for name in config.method}
    chosen |= {"rej_steer"} if chosen & {"rule", "rerule"} else set()
    chosen -= {"retained"} if benchmark.retained else set()  # it is made in any case
    config.method = [name for name in ("retained", *METHODS) if name in chosen]
    if not benchmark.reads_files:
        where = f"--benchmark {config.benchmark}, a built-in world,"
        if config.model != "tiny":
            raise InputError(f"--model {config.model}: {where} has its own tiny model; leave the flag out")
        if config.data_dir:
            raise InputError(f"--data_dir {config.data_dir}: {where} reads no files")
    if config.crossed is not None and config.benchmark != Config.benchmark:
        raise InputError(f"--crossed: only the built-in world `{Config.benchmark}` crosses names")
    if config.retain_log and not benchmark.forget_rows:
        able = " or ".join(name for name, other in benchmarks.items() if other.forget_rows)
        raise InputError(f"--retain_log: only --benchmark {able} compares with a retained model")
    check_bounds(config)
    require(not config.tokenizer or config.model != "tiny", "tokenizer", "none with --model tiny, which makes its own")
    require(config.model.strip(), "model", "a Hugging Face id, a folder or tiny")
    require(not config.lora_rank or find_spec("peft"), "lora_rank", "peft to be installed (pip install peft)")
    require(not config.lora_rank or not config.offload, "lora_rank", "no --offload: frozen weights need none")
    tracker = config.report_to != "none" and find_spec(config.report_to)  # a mere folder has no origin
    require(config.report_to == "none" or (tracker and tracker.origin), "report_to",
            f"{config.report_to} to be installed (pip install {config.report_to})")  # fmt: skip
    require(config.lora_rank or config.lora_alpha is None, "lora_alpha", "--lora_rank beside it")
    config.lora_alpha = config.lora_alpha or 2.0 * config.lora_rank or None
    for name in ("replay_groups", "min_groups"):
        require(getattr(config, name) <= config.buffer_size, name, f"at most --buffer_size {config.buffer_size}")
    require(config.replay_objective == "weight" or not config.normalize_ratio, "replay_objective",
            "weight, with --normalize_ratio")  # fmt: skip
    require(config.replay_store != "fresh" or not config.replay_kl, "replay_kl", "off for fresh groups, without π_ref")
    alone = config.held_out and not config.offload and "WORLD_SIZE" not in os.environ
    require(config.keep == "last" or alone, "keep", "last, unless --held_out is above 0 and one process runs all")
    if config.purge_terms:
        read_rows(config.purge_terms, {"term": str})
    if config.attack and (config.offload or "WORLD_SIZE" in os.environ):
        raise InputError("--attack: takes one process, neither torchrun nor --offload")
    return config


def check_bounds(settings):
    """Raise InputError for the first field outside the bounds that its type names."""
    for name, kind in get_type_hints(type(settings), include_extras=True).items():
        for part in (kind, *get_args(kind)):  # `Count`, or `Count | None`
            expected, holds = getattr(part, "__metadata__", ("", None))
            value = getattr(settings, name)
            if holds and value is not None and not holds(value):
                raise InputError(f"--{name} {value}: expected {expected}")


def announce(config):
    """Say what a run is about to do and how long it takes, before torch is imported."""
    stored, tiny = Path(__file__).parents[1] / "results" / "first_run.json", config.model == "tiny"
    known = json.loads(stored.read_text(encoding="utf-8"))["seconds"] if tiny and stored.is_file() else {}
    first, names = "teach a tiny model" if tiny else f"load {config.model}", [TITLES[name] for name in config.method]
    what = f"{first}, unlearn with {', '.join(names)}, score each model; everything goes to {config.output_dir}/"
    takes, told = known.get(config.benchmark), "not measured for these data; the live lines tell after a few steps"
    told = f"about {takes / 60:.1f} minutes on two CPU cores with default settings" if takes else told
    print(f"{config.benchmark}, seed {config.seed}: {what}\nTime: {told}", flush=True)


def run_command(main, leave=True):
    """The result of a command's `main()`; an `InputError` becomes one line on stderr and exit code 2.
    leave: a process of torchrun then ends at once: while an interpreter takes itself apart, a thread of gloo's that
        still holds a tensor aborts it (pytorch/pytorch#179291), and a run that was done would count as failed."""
    code, result = 0, None
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # None if closed
    try:
        result = main()
        if isinstance(result, Config) and not result.dry_run and not RANK:
            announce(result)
        sys.stdout.flush()
    except (InputError, OSError) as error:
        code, told = 2, str(error)
        if isinstance(error, OSError):
            told = f"{error.filename or 'stdout'}: {error.strerror or error}"
        if isinstance(error, OSError) and error.errno in FAULTS:
            code, told = 1, f"{told}; once that is mended the same command goes on, rerule.py with --resume"
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)  # what is left of stdout would fail again
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once on each machine
            print(f"{program()}: error: {printable(' '.join(told.splitlines()))}", file=sys.stderr)
        else:
            time.sleep(30)  # torchrun stops all once one has ended: the first must be the one that says why
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    if leave and "WORLD_SIZE" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)
    return result
