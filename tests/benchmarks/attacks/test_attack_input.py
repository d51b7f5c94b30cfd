"""What a user can get wrong with attacks: exit code 2 and one clear line, before anything is trained or computed."""

import dataclasses
import json

import pytest
from made import byte_tokenizer, make_model, make_muse, make_rwku, make_tofu, write, write_lines

import benchmarks
import evaluate
import rerule
from benchmarks import attacks
from config import InputError
from engine.flags import parse, run_command
from engine.process import Engine
from engine.run import Run

NAMES = "leak, extract, membership, prefix, quantize, relearn"

# --- the driver ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["leek", "leak leek", "Leak", "leak,extract", "all", ""])
def test_an_attack_that_nobody_knows(refused, forbid, names):
    forbid("Run")
    said = refused("--attack", *names.split())
    wrong = next((name for name in names.split() if name not in attacks.ATTACKS), "")
    assert said == f"--attack {wrong}: expected some of {NAMES}" if names else "--attack" in said


def test_membership_of_a_benchmark_that_names_no_texts(refused, forbid, monkeypatch, folders):
    forbid("Run")
    without = dataclasses.replace(benchmarks.ALL["rwku"], membership=None)
    monkeypatch.setitem(benchmarks.ALL, "rwku", without)
    said = refused("--benchmark", "rwku", "--data_dir", folders["rwku"], "--attack", "leak", "membership")
    assert said == "--attack membership: --benchmark rwku names no texts to compare"


def test_a_benchmark_that_forgets_nothing(refused, forbid, monkeypatch):
    forbid("Run")
    probes = [p for p in benchmarks.ALL["builtin"].probes(parse(rerule.Config, [])) if not p.forget]
    monkeypatch.setitem(
        benchmarks.ALL, "builtin", dataclasses.replace(benchmarks.ALL["builtin"], probes=lambda o: probes)
    )
    assert refused("--attack", "prefix") == "--attack prefix: --benchmark builtin has no forget probes"


@pytest.mark.parametrize("attack", attacks.ATTACKS)
def test_attacks_take_one_process(refused, monkeypatch, attack):
    said = "--attack: takes one process, neither torchrun nor --offload"
    assert refused("--attack", attack, "--offload") == said
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused("--attack", attack) == said


def texts(file, *rows):
    """(file, what it holds, None where it is missing, words of the line) for each mistake in a benchmark's texts."""
    for content, said in (
        (None, "no such file"), ("", "is empty"), ("[]", "no rows"), ("nonsense", "is not JSON"),
        (json.dumps([*rows, {"words": "x"}]), f"row {len(rows) + 1} has no field 'text'"),
        (json.dumps([*rows, {"text": 3}]), f"row {len(rows) + 1}, field 'text' is not a str"),
        (json.dumps([*rows, 3]), f"row {len(rows) + 1} is int"),
    ):  # fmt: skip
        yield file, content, said


GOOD = [{"text": "The lamp went out."}, {"text": "A boat came in."}]
MISTAKES = {
    "muse": [*texts("privleak/holdout.json", *GOOD), *texts("privleak/forget.json")],
    "rwku": [*texts("retain_mia.json", *GOOD), *list(texts("forget_mia.json", *GOOD))[1:]],
}
MISTAKES["muse"] += [("privleak/holdout.json", json.dumps(["x", GOOD[0]]), "row 1 is str, expected an object")]
BLANK = {"muse": ("privleak/holdout.json", [" ", "x"]), "rwku": ("retain_mia.json", [GOOD[0], {"text": "\n"}])}


def with_texts(benchmark, folder):
    for side in {"muse": ("forget", "holdout"), "rwku": ("forget", "retain")}[benchmark]:
        write(folder / {"muse": f"privleak/{side}.json", "rwku": f"{side}_mia.json"}[benchmark], GOOD)
    return ["--benchmark", benchmark, "--data_dir", folder, "--attack", "membership"]


@pytest.mark.parametrize("benchmark", MISTAKES)
def test_a_wrong_file_of_texts_is_named_with_its_row(refused, forbid, folders, benchmark):
    forbid("Run")
    argv = with_texts(benchmark, folders[benchmark])
    for file, content, said in MISTAKES[benchmark]:
        path = folders[benchmark] / file
        before = path.read_text()
        path.unlink() if content is None else path.write_text(content)
        message = refused(*argv)
        assert message.startswith(f"{path}: ") and said in message, (file, content)
        path.write_text(before)
    file, rows = BLANK[benchmark]
    write(folders[benchmark] / file, rows)
    said = refused(*argv)
    assert said.startswith(str(folders[benchmark] / file)) and "with something in" in said


def test_rwku_without_texts(refused, forbid, folders, tmp_path):
    forbid("Run")
    argv = ["--benchmark", "rwku", "--data_dir", folders["rwku"], "--attack", "membership"]
    said = refused(*argv)
    assert (
        said.startswith(f"--attack membership: {folders['rwku']} holds no forget_mia.json") and "some targets" in said
    )


def test_tofu_without_a_hold_out_and_with_too_few_authors(refused, forbid, folders):
    forbid("Run")
    argv = ["--benchmark", "tofu", "--data_dir", folders["tofu"], "--attack", "membership"]
    said = refused(*argv)
    assert said.startswith("--attack membership: ") and "no holdout01.json" in said and "expected 10" in said
    write_lines(folders["tofu"] / "holdout01.json", [{"question": "Who ?", "answer": "x"}, {"question": "Who ?"}])
    assert refused(*argv) == f"{folders['tofu'] / 'holdout01.json'}: row 2 has no field 'answer'"


def test_a_run_to_start_from_that_was_attacked_in_other_ways(refused, tmp_path):
    run = Run(rerule.configure(["--output_dir", str(tmp_path / "source")]), Engine("cpu"))
    run.open()
    run.finish("rej_steer scored", {})
    assert "(no --attack leak)" in refused("--start_from", tmp_path / "source", "--attack", "leak")


# --- evaluate.py -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models and files of three benchmarks."""
    folder = tmp_path_factory.mktemp("place")
    make_tofu(folder / "tofu")
    write_lines(folder / "tofu" / "forget01.json", [{"question": "?", "answer": "!"}])
    write_lines(folder / "tofu" / "retain99.json", [{"question": f"{i}?", "answer": "!"} for i in range(40)])
    make_muse(folder / "muse")
    make_rwku(folder / "rwku")
    for name, merges in (("model", ()), ("other", (("a", "b"),))):
        tokenizer = byte_tokenizer(merges=merges)
        make_model(vocab=len(tokenizer)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    make_model(context=70).save_pretrained(folder / "short")
    byte_tokenizer().save_pretrained(folder / "short")
    return folder


@pytest.fixture
def told(place, tmp_path, capsys, monkeypatch):
    """Run evaluate.py on a mistake; returns its line once it is sure of the exit code and that nothing was computed."""

    def never(name):
        return lambda *_, **__: pytest.fail(f"{name} ran before the mistake was told")

    for module, name in ((evaluate, "evaluate"), (evaluate, "truth_ratios"), (attacks, "attack")):
        monkeypatch.setattr(module, name, never(name))

    def told(*flags, loads=False, model="model"):
        if not loads:
            monkeypatch.setattr(Engine, "load", never("Engine.load"))
        argv = [str(flag) for flag in ("--device", "cpu", "--output", tmp_path / "out.json", *flags)]
        argv += ["--model", str(place / model)] if model else []
        with pytest.raises(SystemExit) as ended:
            run_command(lambda: evaluate.main(parse(evaluate.Options, argv)))
        printed, error = capsys.readouterr()
        assert ended.value.code == 2 and printed == "" and not (tmp_path / "out.json").exists()
        assert len(error.splitlines()) == 1 and ": error: " in error and len(error) < 400
        return error.split(": error: ")[1].strip()

    return told


def of(place, name):
    return ["--benchmark", name, "--data_dir", place / name]


def test_attacks_that_evaluate_cannot_make(told, place, monkeypatch):
    assert told(*of(place, "tofu"), "--attack", "extract", "leek") == f"--attack leek: expected some of {NAMES}"
    assert "holds no forget_mia.json" in told(*of(place, "rwku"), "--attack", "membership")
    write(place / "muse" / "privleak" / "forget.json", ["x"])
    assert "privleak/holdout.json: no such file" in told(*of(place, "muse"), "--attack", "membership")
    write(place / "muse" / "privleak" / "holdout.json", ["x", ""])
    assert told(*of(place, "muse"), "--attack", "membership").endswith("is not a str with something in it")
    assert "no holdout01.json, and retain99.json holds" in told(*of(place, "tofu"), "--attack", "membership")
    without = dataclasses.replace(benchmarks.ALL["muse"], membership=None)
    monkeypatch.setitem(benchmarks.ALL, "muse", without)
    assert "--benchmark muse names no texts" in told(*of(place, "muse"), "--attack", "membership")


@pytest.mark.parametrize("flag", ["retain_model", "original_model"])
def test_a_model_to_compare_with_has_the_same_vocabulary(told, place, flag):
    said = told(*of(place, "tofu"), "--attack", "extract", f"--{flag}", place / "other")
    assert said == f"--{flag} {place / 'other'}: its vocabulary is not that of --model {place / 'model'}"
    said = told(*of(place, "tofu"), "--attack", "extract", f"--{flag}", place / "nowhere")
    assert said.startswith(f"--{flag} {place / 'nowhere'}: is no model folder")


FLAGS = [
    ("tofu", "--original_model {}/model", "--original_model: only --attack compares with it"),
    (
        "rwku",
        "--retain_model {}/model",
        "--retain_model: only --benchmark tofu compares … --attack takes --retain_model",
    ),
    ("tofu", "--attack", "--attack: expected at least one argument"),
    ("tofu", "--attack leak --attack_samples 0", "--attack_samples 0: expected at least 1"),
    ("tofu", "--attack leak --attack_samples 2.5", "--attack_samples"),
    ("tofu", "--attack relearn --relearn_lr 0", "--relearn_lr 0.0: expected a number above 0"),
    ("tofu", "--attack relearn --relearn_lr nan", "--relearn_lr nan: expected a number above 0"),
    ("tofu", "--attack relearn --relearn_lr=-1", "--relearn_lr -1.0: expected a number above 0"),
    ("tofu", "--ability", "--ability: --benchmark tofu has no files of it"),
    ("rwku", "--ability", "retain_mmlu.json: no such file"),
]


@pytest.mark.parametrize("benchmark, flags, said", FLAGS, ids=[flags for _, flags, _ in FLAGS])
def test_flags_that_do_not_go_together(told, place, benchmark, flags, said):
    found = told(*of(place, benchmark), *flags.format(place).split())
    assert all(part in found for part in said.split(" … ")), found


@pytest.mark.parametrize("more", [["--attack", "leak"], ["--attack", "leak", "--original_model", "x"], ["--ability"]])
def test_a_log_runs_no_model(told, place, tmp_path, more):
    write(tmp_path / "log.json", {"benchmark": "rwku", "per_example": []})
    said = told("--benchmark", "rwku", "--from_log", tmp_path / "log.json", *more, model="")
    assert said == f"{more[0]}: --from_log runs no model"


def test_a_context_too_short_is_told_before_other_models_are_attacked(told, place):
    argv = [*of(place, "rwku"), "--attack", "extract", "--original_model", place / "model"]
    assert "exceed the model's context of 70" in told(*argv, loads=True, model="short")


def test_what_prepare_gives_for_each_attack():
    o, builtin = parse(rerule.Config, []), benchmarks.ALL["builtin"]
    probes = builtin.probes(o)
    assert attacks.prepare([], builtin, o, []) == ({}, "") == attacks.prepare(["leak", "relearn"], builtin, o, probes)
    assert attacks.prepare(["membership"], builtin, o, probes) == builtin.membership(o, probes)
    with pytest.raises(InputError, match="has no forget probes"):
        attacks.prepare(["leak"], builtin, o, [p for p in probes if not p.forget])
