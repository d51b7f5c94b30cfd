"""Command lines: --help of every command without torch, an earlier run's config.json, every bound."""

import dataclasses
import importlib
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import get_args, get_type_hints

import pytest

import benchmarks
import rerule
from config import Config, InputError
from engine import flags
from engine.flags import check_bounds, parse

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = json.loads((ROOT / "engine" / "examples.json").read_text(encoding="utf-8"))
COMMANDS = {  # as it is written → (module, what holds its flags)
    "python rerule.py": ("rerule", "Config"),
    "python evaluate.py": ("evaluate", "Options"),
    "python -m build_data": ("build_data.__main__", "Options"),
    "python -m reproduce": ("reproduce.__main__", "Options"),
    "python -m reproduce.attacks": ("reproduce.attacks", "Options"),
    "python -m scale.speed": ("scale.speed", "Options"),
    "python tests/scale/check.py": ("check", "Options"),
    "python -m reproduce.targets": ("reproduce.targets", "Options"),
}
NEEDED = {  # flags without a default
    "python evaluate.py": dict(benchmark="tofu", output="x"),
    "python -m build_data": dict(source="qa", input="x", output_dir="x"),
}
# Runs a command as Python does, and tells on stderr whether torch was needed. scipy is taken away, as if it were not
# installed: nltk, which rouge_score needs, brings it along where it is.
WATCHED = """
import runpy, sys
sys.modules["scipy"] = None
module, sys.argv = sys.argv[1], sys.argv[1:]
try:
    if module.endswith(".py"):
        runpy.run_path(module, run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
finally:
    print(sorted({"torch", "matplotlib"} & set(sys.modules)), file=sys.stderr)
"""


def run(command, *argv):
    """A command in a process of its own."""
    name = command.split()[-1]
    return subprocess.run(
        [sys.executable, "-c", WATCHED, name, *map(str, argv)], capture_output=True, text=True, cwd=ROOT,
        encoding="utf-8",
    )  # fmt: skip


def called(command):
    """Its name in messages."""
    return Path(command.split()[-1]).name if command.endswith(".py") else command


def held(command):
    module, name = COMMANDS[command]
    module = importlib.import_module(module)
    return module, getattr(module, name)


@pytest.fixture(scope="module")
def helps():
    """What --help prints, by command."""
    shown = {}
    for command in COMMANDS:
        done = run(command, "--help")
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines()[-1] == "[]", f"{command}: {done.stderr}"  # neither torch nor matplotlib
        shown[command] = done.stdout
    return shown


def entries(text):
    """{flag: its text on one line} of a --help."""
    options = text.split("\nexamples:")[0]
    parts = re.split(r"^  (--\w+)", options, flags=re.M)[1:]
    parts = [re.split(r"\n\n", part)[0] for part in parts]  # less the next group's heading
    return {flag: " ".join(said.split()) for flag, said in zip(parts[::2], parts[1::2], strict=True)}


# --- --help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_without_torch_with_every_flag_its_default_and_three_examples(helps, command):
    shown, (_, kind) = entries(helps[command]), held(command)
    assert helps[command].startswith(f"usage: {called(command)} ")
    names = {f"--{field.name}" for field in dataclasses.fields(kind)}
    assert names == {flag for flag in shown if not flag.startswith("--no_")}
    for field in dataclasses.fields(kind):
        text, default = shown[f"--{field.name}"], field.default
        assert len(text) > 8, field.name
        if field.default_factory is not dataclasses.MISSING:
            default = " ".join(map(str, field.default_factory()))
        default = {True: "on", False: "off"}[default] if isinstance(default, bool) else default
        if default not in (None, "", dataclasses.MISSING):
            assert text.endswith(f"[{default}]"), field.name
    examples = helps[command].split("\nexamples:\n")[1].strip().splitlines()
    assert len(examples) == len(EXAMPLES[called(command)]) == 3 and all(
        line.strip().startswith(command) for line in examples
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_taken(command, tmp_path, monkeypatch):
    _, kind = held(command)
    (tmp_path / "runs" / "builtin").mkdir(parents=True)
    stored = dataclasses.asdict(rerule.configure([]))
    (tmp_path / "runs" / "builtin" / "config.json").write_text(json.dumps(stored))
    monkeypatch.chdir(tmp_path)
    for line in EXAMPLES[called(command)]:
        argv = shlex.split(line.removeprefix(command), comments=True)
        assert isinstance(rerule.configure(argv) if kind is Config else parse(kind, argv), kind), line


def test_help_names_every_flag_and_its_preset(helps):
    text = helps["python rerule.py"]
    shown = " ".join(text.split())
    assert all(f"--{field.name}" in shown for field in dataclasses.fields(Config))
    assert "[builtin 0.4, rwku 0.6, muse 0.4, tofu 0.6, town 0.4]" in shown and "[preset]" not in shown
    for name in benchmarks.ALL["builtin"].preset:
        values = ", ".join(f"{which} {room.preset[name]:g}" for which, room in benchmarks.ALL.items())
        tiny = ", ".join(f"{which} {room.tiny[name]:g}" for which, room in benchmarks.ALL.items() if name in room.tiny)
        assert entries(text)[f"--{name}"].endswith(f"[{values}{f'; tiny: {tiny}' if tiny else ''}]")


def test_help_of_the_driver_has_six_groups_and_a_text_for_no_unbiased(helps):
    text = helps["python rerule.py"]
    headings = re.findall(r"^(\S.*):$", text.split("\nexamples:")[0], flags=re.M)
    assert headings[0] == "options" and headings[1:] == [base._argument_group_name for base in Config.__bases__[::-1]]
    assert len(headings) == 1 + 6 and "[config.json]" in text.splitlines()[0]
    shown = entries(text)
    assert shown["--no_unbiased"] == "Switch --unbiased off." and shown["--unbiased"].endswith("rewards. [on]")
    assert [flag for flag in shown if flag.startswith("--no_")] == ["--no_unbiased"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_flag_of_any_command_is_one_line_and_code_2_without_torch(command):
    needed = [f"--{name}={value}" for name, value in NEEDED.get(command, {}).items()]
    done = run(command, *needed, "--nonsense", 1)
    line, modules = done.stderr.splitlines()
    assert (done.returncode, done.stdout, modules) == (2, "", "[]")
    assert line == f"{called(command)}: error: unknown flag --nonsense; --help lists all of them"


# --- presets ---------------------------------------------------------------------------------------------------------


def test_every_benchmark_has_a_value_for_every_preset():
    names = {f.name for f in dataclasses.fields(Config) if f.metadata["help"].endswith("[preset]")}
    for name, benchmark in benchmarks.ALL.items():
        assert benchmark.name == name and set(benchmark.preset) == names and set(benchmark.tiny) <= names


@pytest.mark.parametrize("name", benchmarks.ALL)
def test_presets_fill_in_what_no_flag_says(name):
    preset, tiny = benchmarks.ALL[name].preset, benchmarks.ALL[name].tiny
    given = ["--benchmark", name] + (["--model", "org/model"] if benchmarks.ALL[name].reads_files else [])
    found = vars(rerule.configure(given))
    assert {key: found[key] for key in preset} == preset | (tiny if name == "builtin" else {})
    found = vars(rerule.configure(["--benchmark", name, "--tau", "0.25"]))
    assert {key: found[key] for key in preset} == preset | tiny | {"tau": 0.25}


# --- an earlier run's config.json ------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path):
    """A config.json as a run leaves it, of settings that are no defaults."""
    flags = "--seed 7 --tau 0.7 --no_unbiased --method po rule --llmu_weights 0 -1 2 --kl_coef 0 --ratio_level token"
    config = rerule.configure([*flags.split(), "--output_dir", str(tmp_path / "run")])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(config)), encoding="utf-8")
    return path, config


def test_a_config_json_is_that_run_again_and_flags_win_over_it(stored):
    path, config = stored
    assert rerule.configure([str(path)]) == config
    assert not config.unbiased and config.llmu_weights == [0.0, -1.0, 2.0] and config.crossed is None
    again = rerule.configure([str(path), "--seed", "8", "--unbiased", "--method", "rerule", "--tau", "0.1"])
    changed = dict(seed=8, unbiased=True, method=["rej_steer", "rerule"], tau=0.1)
    assert again == dataclasses.replace(config, **changed)


BAD = [
    (None, "cannot be read as JSON"),
    ("", "cannot be read as JSON"),
    ("{", "cannot be read as JSON"),
    ("\xff", "cannot be read as JSON"),
    ("[1, 2]", "expected an object with a value for each flag"),
    ("7", "expected an object with a value for each flag"),
    ('{"clip_low": 0.2}', "--clip_low"),
    ('{"steps": 3, "no_such_flag": 1}', "--no_such_flag"),
    ('{"steps": "many"}', "--steps"),
    ('{"steps": 1.5}', "--steps"),
    ('{"steps": true}', "--steps"),
    ('{"tau": {"a": 1}}', "--tau"),
    ('{"tau": [0.1, 0.2]}', "0.2"),
    ('{"unbiased": "perhaps"}', "--unbiased"),
    ('{"method": []}', "--method"),
    ('{"ratio_level": "word"}', "--ratio_level"),
]


@pytest.mark.parametrize(("text", "said"), BAD, ids=[str(text) for text, _ in BAD])
def test_a_bad_config_json_is_told_in_one_line_that_names_it(tmp_path, text, said):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError) as told:
        rerule.configure([str(path), "--seed", "1"])
    message = str(told.value)
    assert message.startswith(f"{path}: ") and said in message and len(message.splitlines()) == 1


def test_a_bad_flag_beside_a_good_config_json_is_the_flags(stored):
    path, _ = stored
    for argv, said in ((["--steps", "x"], "--steps"), (["--nonsense", "1"], "unknown flag --nonsense")):
        with pytest.raises(InputError) as told:
            rerule.configure([str(path), *argv])
        assert said in str(told.value) and str(path) not in str(told.value)


def test_a_bad_config_json_ends_the_command_with_code_2(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"steps": "many"}')
    done = run("python rerule.py", path)
    line, modules = done.stderr.splitlines()
    assert (done.returncode, done.stdout, modules) == (2, "", "[]")
    assert line.startswith(f"rerule.py: error: {path}: ") and "--steps" in line


# --- bounds ----------------------------------------------------------------------------------------------------------

NOT_FINITE = [math.nan, math.inf, -math.inf]
MILLION = "at most a million"
EDGES = {  # the words of a bound → (values just outside it, values just inside)
    (int, f"at least 1, {MILLION}"): ([0, -1, 10**6 + 1, 10**20], [1, 10**6]),
    (int, f"0 or more, {MILLION}"): ([-1, 10**6 + 1], [0, 10**6]),
    (int, "2 to 4096 rollouts, whose rewards are compared"): ([1, 0, -2, 4097, 10**11], [2, 4096]),
    (int, "a whole number of at most 18 digits"): ([10**18, -(10**18)], [-7, 0, 10**18 - 1]),
    (int, "at least 1000"): ([999, -1], [1000]),
    (int, "0 to 30 of the 42 neighbours"): ([-1, 31], [0, 30]),
    (int, "a multiple of 8, at most 8192: four heads, rotated in pairs"): ([0, -8, 4, 7, 9, 100, 8200], [8, 8192]),
    (int, "a multiple of 8, above 256 of 12"): ([0, -8, 12, 260, 266, 320], [8, 256, 264, 384]),
    (int, "260, for every byte and four marks, to 65536"): ([0, 259, 65537, 10**9], [260, 65536]),
    (float, f"a number above 0, at least 1e-12, {MILLION}"): ([0.0, -1e-9, 1e-320, 1e7, *NOT_FINITE], [1e-9, 1e6]),
    (float, "0 or more, at most a billion"): ([-1e-9, 1e10, *NOT_FINITE], [0.0, 1e9]),
    (float, "a number from minus a million to a million"): ([-1e7, 1e7, *NOT_FINITE], [-1.5, 0.0]),
    (float, "a share from 0 to 1"): ([-1e-9, 1.000001, *NOT_FINITE], [0.0, 1.0]),
    (float, "a share between 0 and 1"): ([0.0, 1.0, *NOT_FINITE], [1e-9, 0.999999]),
    (float, "a mean reward from 0 to 1"): ([-1e-9, 1.000001, *NOT_FINITE], [0.0, 1.0]),
    (list[float], "three numbers"): ([[1.0], [1.0] * 4, *([0.0, 0.0, x] for x in NOT_FINITE)], [[0.0, -1.0, 2.0]]),
}


def bounds(kind):
    """{field: (type, words)} of all fields with a bound."""
    found = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        for part in (hint, *get_args(hint)):  # `Count`, or `Count | None`
            if hasattr(part, "__metadata__"):
                found[name] = (part.__origin__, part.__metadata__[0])
    return found


BOUNDS = [(command, name, *bound) for command in COMMANDS for name, bound in bounds(held(command)[1]).items()]


@pytest.mark.parametrize(
    ("command", "name", "kind", "words"), BOUNDS, ids=[f"{b[0].split()[-1]}-{b[1]}" for b in BOUNDS]
)
def test_a_value_just_outside_a_bound_is_refused_and_one_inside_is_not(command, name, kind, words):
    outside, inside = EDGES[kind, words]
    _, holder = held(command)
    needed = NEEDED.get(command, {})
    for value in inside:
        check_bounds(holder(**needed | {name: value}))
    for value in outside:
        with pytest.raises(InputError, match=re.escape(f"--{name} {value}: expected {words}")):
            check_bounds(holder(**needed | {name: value}))
        if holder is Config and kind != list[float]:
            with pytest.raises(InputError, match=re.escape(f"--{name} {value}: expected {words}")):
                rerule.configure([f"--{name}={value}"])


def test_every_number_of_the_driver_has_a_bound():
    hints = get_type_hints(Config)  # without their bounds
    numbers = {name for name, hint in hints.items() if {int, float} & {hint, *get_args(hint)}}
    assert numbers <= set(bounds(Config))


# --- the first words -------------------------------------------------------------------------------------------------


def first_words(*flags):
    """What a run whose data folder is missing says before anything of torch is imported."""
    argv = [str(part) for part in (sys.executable, "-X", "importtime", "rerule.py", *flags)]
    done = subprocess.run(argv, stdout=PIPE, stderr=STDOUT, text=True, cwd=ROOT, encoding="utf-8")
    lines = done.stdout.splitlines()
    torch = next(i for i, line in enumerate(lines) if re.search(r"\| +torch(\.|$)", line))
    assert done.returncode == 2 and any(line.endswith("no such folder") for line in lines[torch:])
    return [line for line in lines[:torch] if not line.startswith("import time:")]


def test_the_first_words_come_before_torch_and_say_what_and_how_long(tmp_path):
    stored = json.loads((ROOT / "results" / "first_run.json").read_text(encoding="utf-8"))["seconds"]
    given = ("--benchmark", "muse", "--data_dir", tmp_path / "none", "--seed", 2, "--output_dir", tmp_path / "run")
    what, takes = first_words(*given)
    for part in ("muse, seed 2", "a tiny model", "Rej. Steer, RULE, ReRULE", f"{tmp_path / 'run'}/"):
        assert part in what
    assert f"about {stored['muse'] / 60:.1f} minutes on two CPU cores" in takes
    what, takes = first_words(*given, "--model", "org/model", "--method", "po")
    assert "load org/model" in what and "unlearn with PO" in what and "not measured" in takes


def test_a_plan_of_the_memory_and_other_processes_say_nothing_first(monkeypatch, capsys):
    config = rerule.configure([])
    for case, told in ((config, 2), (dataclasses.replace(config, dry_run=True), 0)):
        assert flags.run_command(lambda case=case: case, leave=False) is case
        said = capsys.readouterr().out
        assert len(said.splitlines()) == told and ("about 1.2 minutes" in said) == bool(told)
    monkeypatch.setattr(flags, "RANK", 1)
    flags.run_command(lambda: config, leave=False)
    assert capsys.readouterr().out == ""
