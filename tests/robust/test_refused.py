"""What was once a traceback, a hang, a wrong result or a lost one: each attack by its number in `ATTACKS`."""

import fcntl
import json
import pickle
import time
from pathlib import Path
from unittest import mock

import attacked
import pytest
import torch
from attacked import build_data, ended, evaluate, rerule, short
from made import TRAIN, byte_tokenizer, make_model, tofu, tree, write
from safetensors.torch import load_file, save_file

import evaluate as scoring
import rerule as driver

torch.set_num_threads(1)
DEEP, LONG = "[" * 100_000 + "]" * 100_000, "9" * 6000
HALF = "\ud800"


class Planted:
    """Leaves a file behind where somebody unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.fixture
def untouched(tmp_path, monkeypatch):
    """Run a command that must refuse its input in one line, before it loads or trains a model, and leave no byte."""

    def untouched(command, *argv, output=("--output_dir", "run"), models=False):
        for place, name in () if models else ((scoring.Engine, "load"), (driver, "tiny_model"), (driver, "unlearn")):
            monkeypatch.setattr(place, name, lambda *_, **__: pytest.fail("a model was wanted before the line"))
        monkeypatch.chdir(tmp_path)
        before = tree(tmp_path)
        line = ended(command, *argv, *output).line()
        assert tree(tmp_path) == before
        return line

    return untouched


def trained(folders, name, *more):
    return ["--benchmark", name, "--data_dir", folders[name], *more]


def edited(path, change):
    """Change the first row of a file of JSON rows."""
    text = path.read_text()
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    change(rows)
    path.write_text(json.dumps(rows))


# --- E1: a state that names folders to unpickle ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shards_rerule_2", "../planted", "/absolute", "shards_rerule_2/..", "", 7, None])
def test_E01_a_state_runs_no_code_whatever_folder_it_names(interrupted, tmp_path, name):
    marker, state = tmp_path / "marker", torch.load(interrupted / "state.pt", weights_only=True)
    name = str(tmp_path / "planted") if name == "/absolute" else name
    for folder in (interrupted / "shards_rerule_2", tmp_path / "planted"):
        folder.mkdir()
        for file in (".metadata", "__0_0.distcp", "0.safetensors", "0.pt"):
            (folder / file).write_bytes(pickle.dumps(Planted(marker)))
    state["payload"] = {"seconds": 1.0, "over": False, "shards": name}
    torch.save(state, interrupted / "state.pt")
    assert "error: " in ended(short, "--output_dir", interrupted, "--resume").last(2)
    assert not marker.exists()


# --- E2, E28: servers and outputs that cannot be ---------------------------------------------------------------------

URLS = [
    "file:///etc/passwd",
    "ftp://host/v1",
    "host:8000",
    "http://",
    "http://[::1",
    "http://127.0.0.1:1/v1",
    "http://127.0.0.1:99999",
    "http://h\x00st/v1",
    "http://no-such-host.invalid/v1",
    " ",
]


@pytest.mark.parametrize("url", URLS, ids=repr)
def test_E02_a_judge_that_cannot_be_reached_is_told_before_the_evaluation(untouched, folders, url):
    argv = [*tofu(folders), "--model", "x", "--judge_url", url, "--judge_model", "m"]
    assert untouched(evaluate, *argv, output=("--output", "out.json")).startswith("--judge_url")


@pytest.mark.parametrize("output", ["", "nowhere/out.json", "folder", "file/out.json", "/proc/out.json", "n" * 300])
def test_E02_an_output_that_cannot_be_written_is_told_before_the_evaluation(untouched, folders, tmp_path, output):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    line = untouched(evaluate, *tofu(folders), "--model", "x", output=("--output", output))
    assert line.startswith(("--output", "n" * 300))


def test_E02_a_cache_that_is_a_folder_is_told_before_the_evaluation(untouched, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "reach", lambda *_: None)
    (tmp_path / "folder").mkdir()
    argv = [*tofu(folders), "--model", "x", "--judge_url", "http://h/v1", "--judge_model", "m"]
    for cache in ("folder", "nowhere/cache.jsonl", "n" * 300):
        assert cache in untouched(evaluate, *argv, "--judge_cache", cache, output=("--output", "out.json"))


@pytest.mark.parametrize("url", URLS, ids=repr)
def test_E28_a_server_that_cannot_be_reached_is_told_at_once(untouched, tmp_path, url):
    write(tmp_path / "ask.json", [{"question": "Who is Orla?", "answer": "Orla"}])
    argv = ["--source", "qa", "--input", "ask.json", "--target", "Orla", "--llm_url", url, "--llm_model", "m"]
    start = time.monotonic()
    assert untouched(build_data, *argv).startswith("--llm_url")
    assert time.monotonic() - start < 5


# --- E3, E4: numbers that are none -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("command", [rerule, evaluate])
def test_E03_weights_that_are_no_numbers_are_refused(untouched, folders, tmp_path, value, command):
    make_model(context=2048).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"][3] = float(value)
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    output = ("--output", "out.json") if command is evaluate else ("--output_dir", "run")
    line = untouched(command, *tofu(folders), "--model", tmp_path / "model", output=output, models=True)
    assert "norm.weight" in line and "not finite" in line


@pytest.mark.parametrize("flags", ["--lr 1e12", "--temperature 1e-320", "--lr nan", "--max_grad_norm 1e-40"])
def test_E04_a_rate_beyond_reason_is_refused(untouched, flags):
    assert flags.split()[0] in untouched(rerule, *flags.split())


WILD = [
    "--lr 1e6 --max_grad_norm 1e6",
    "--temperature 1e-12",
    "--temperature 1e6",
    "--sft_lr 1e6 --max_grad_norm 1e6",
    "--weight_decay 1e6 --lr 1e6",
    "--kl_coef 1e6 --lr 1",
]


@pytest.mark.parametrize("flags", WILD)
def test_E04_training_that_goes_astray_ends_in_its_row(tmp_path, flags):
    done = ended(short, *flags.split(), "--output_dir", tmp_path / "run")
    assert done.code == 0 and "Traceback" not in done.err, done
    assert json.loads((tmp_path / "run" / "table.json").read_text())["ReRULE"]


# --- E5, E11, E13, E26: flags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[]", '[{"term": ""}]', '[{"term": 3}]', '[{"x": "y"}]', DEEP, LONG, "\xff"])
def test_E05_forbidden_terms_are_read_first(untouched, tmp_path, text):
    (tmp_path / "terms.json").write_bytes(text.encode("latin-1"))
    assert "terms.json" in untouched(rerule, "--method", "purge", "--purge_terms", "terms.json")


FLAGS = {
    "E11": "retain_weight nan|retain_weight inf|gamma nan|gamma -inf|alpha inf|alpha nan|llmu_weights nan 1 1|"
    "llmu_weights 1 inf 1|kl_coef inf|epsilon_high inf|max_perplexity nan|forget_weight inf|beta nan|min_share nan",
    "E13": "sft_epochs 1e308|group_size 100000000000|tiny_hidden 1000000000|tiny_layers 10000000|seed 1"
    + "0" * 400
    + "|buffer_size 100000000000000000000|steps 9999999999|prompts_per_step 10000000|max_new_tokens 1000000000000|"
    "tiny_epochs 1e300|lora_rank 10000000000|eval_batch_size 99999999999|baseline_epochs 1e200|redraw 1000000000|"
    "sga_k 1000000000|lora_alpha 1e308|rollout_prompts 10000000|save_every 99999999999|tiny_vocabulary 9999999",
    "E26": "model |model  |benchmark |method |device |tokenizer x",
}


@pytest.mark.parametrize(
    ("number", "flag"), [(n, f) for n, flags in FLAGS.items() for f in flags.split("|")], ids=lambda part: part[:30]
)
def test_E11_E13_E26_a_value_beyond_reason_is_refused(untouched, number, flag):
    name, _, value = flag.partition(" ")
    values = value.split(" ") if value.strip() else [value]
    assert f"--{name}" in untouched(rerule, f"--{name}", *values)


def test_E26_evaluation_of_no_model_is_refused(untouched, folders):
    for model in ("", " "):
        assert "--model" in untouched(evaluate, *tofu(folders), "--model", model, output=("--output", "out.json"))


# --- E8, E9, E14: rows -----------------------------------------------------------------------------------------------

ROWS = {  # number and what is wrong → benchmark, file, what to do to its rows
    "E08 prompt": ("rwku", "rl_rejection_with_fb_neighbor", lambda rows: rows[0].update(prompt=f"Who {HALF}?")),
    "E08 refusal": ("rwku", "reject_target", lambda rows: rows[0].update(output=f"No {HALF}.")),
    "E08 answer": ("rwku", "rl_rejection_with_fb_neighbor", lambda rows: rows[1]["solution"].append(f"b{HALF}")),
    "E08 target": ("rwku", "intro", lambda rows: rows[0].update(target=f"Ada{HALF}")),
    "E08 known answer": ("muse", "reject_target_0.5", lambda rows: rows[0].update(org_answer=f"x{HALF}")),
    "E08 query": ("tofu", "forget01", lambda rows: rows[0].update(question=f"Who {HALF}?")),
    "E08 wrong answer": ("tofu", "retain_perturbed", lambda rows: rows[0]["perturbed_answer"].append(HALF)),
    "E14 empty prompt": ("rwku", "rl_rejection_with_fb_neighbor", lambda rows: rows[0].update(prompt="")),
    "E14 blank prompt": ("rwku", "reject_target", lambda rows: rows[0].update(instruction=" \n\t")),
    "E14 empty refusal": ("rwku", "reject_target", lambda rows: rows[0].update(output="")),
    "E14 empty answer": (
        "rwku",
        "rl_rejection_with_fb_neighbor",
        lambda rows: rows[1].update(solution=["<normal>", ""]),
    ),
    "E14 empty target": ("rwku", "intro", lambda rows: rows[0].update(target="")),
    "E14 forget and boundary": ("rwku", "rl_rejection_with_fb_neighbor", lambda r: r[1].update(prompt=r[0]["prompt"])),
    "E14 object as answer": ("muse", "reject_target_0.5", lambda rows: rows[0].update(org_answer={"a": 1})),
    "E14 list as answer": ("rwku", "reject_target", lambda rows: rows[0].update(org_answer=["x"])),
    "E14 empty TOFU answer": ("tofu", "forget01", lambda rows: rows[0].update(answer="")),
    "E14 empty TOFU question": ("tofu", "retain99", lambda rows: rows[0].update(question="")),
    "E14 empty wrong answer": ("tofu", "forget01_perturbed", lambda rows: rows[0]["perturbed_answer"].append(" ")),
    "E14 empty shot": ("muse", "knowmem/forget_qa_icl", lambda rows: rows[0].update(answer="")),
    "E14 both in TOFU": ("tofu", "retain99", lambda rows: [row.update(question="What did Orla 0 do?") for row in rows]),
}


@pytest.mark.parametrize("name", ROWS)
def test_E08_E14_a_row_that_cannot_be_meant_is_refused(untouched, folders, name):
    benchmark, file, change = ROWS[name]
    edited(folders[benchmark] / f"{file}.json", change)
    assert file in untouched(rerule, *trained(folders, benchmark))


@pytest.mark.parametrize("text", [DEEP, LONG, f'[{{"question": {LONG}}}]', '{"a":' * 100_000], ids=range(4))
@pytest.mark.parametrize("benchmark", TRAIN)
def test_E09_nested_or_endless_json_is_refused(untouched, folders, benchmark, text):
    for path in sorted(folders[benchmark].rglob("*.json")):
        kept = path.read_text()
        path.write_text(text)
        if path.stem not in ("forget01_perturbed", "retain_mia"):
            assert path.name in untouched(rerule, *trained(folders, benchmark))
        path.write_text(kept)


@pytest.mark.parametrize("text", [DEEP, LONG, '{"a":' * 100_000], ids=range(3))
def test_E09_in_settings_logs_and_a_runs_own_files(untouched, folders, interrupted, tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    assert "x.json" in untouched(rerule, "x.json")
    assert "x.json" in untouched(rerule, *tofu(folders, "--retain_log", "x.json"))
    out = ("--output", "out.json")
    assert "x.json" in untouched(evaluate, "--benchmark", "tofu", "--from_log", "x.json", output=out)
    (interrupted / "config.json").write_text(text)
    assert "config.json" in untouched(short, "--resume", output=("--output_dir", interrupted))


def test_E08_half_a_character_in_a_flag(untouched, tmp_path):
    """What a shell makes of bytes that are no UTF-8."""
    for flags in (["--output_dir", "a\udcff"], ["--lora_targets", "\udcff"], ["--tokenizer", "\udcff"]):
        untouched(rerule, *flags, output=())


# --- E7: two at once -------------------------------------------------------------------------------------------------


def hold(folder, *argv):
    """Own a run's folder and wait to be killed."""
    with mock.patch.object(driver, "unlearn_all", lambda run, *_: (run.open(), time.sleep(60))):
        short("--output_dir", folder, *argv)


def test_E07_a_live_runs_folder_is_locked_and_a_killed_ones_is_not(interrupted):
    before = tree(interrupted)
    owner, _ = attacked.process(hold, interrupted, "--resume")
    attacked.until(lambda: is_held(interrupted))
    line = ended(short, "--output_dir", interrupted, "--resume").line()
    assert line.startswith(f"--output_dir {interrupted}: another process") and owner.is_alive()
    assert {path: text for path, text in tree(interrupted).items() if path.suffix == ".safetensors"} == {
        path: text for path, text in before.items() if path.suffix == ".safetensors"
    }
    owner.kill()
    owner.join()
    assert ended(short, "--output_dir", interrupted, "--resume").code == 0


def is_held(folder):
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
