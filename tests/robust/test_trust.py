"""Nothing that a folder holds is run: a pickle, or code, is planted at every file of every folder that we read."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from attacked import ROOT, build_data, ended, evaluate, reproduce, rerule, short
from loopback import Loopback
from made import TRAIN, byte_tokenizer, make_model, tree, write
from orla import NAME, questions

from engine.model import Pair

torch.set_num_threads(1)
SHOULD_BE = {"state.pt": "torch", "pytorch_model.bin": "torch"}  # in a torch archive too, which has a pickle in it


class Planted:
    """Leaves a file behind where somebody unpickles it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


def plant(path, marker, archive=False):
    """Put a pickle in a file's place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if archive:
        torch.save({"sizes": Planted(marker), "done": {}}, path)
    else:
        path.write_bytes(pickle.dumps(Planted(marker)))


def test_a_planted_pickle_works_where_somebody_unpickles_it(marker, tmp_path):
    plant(tmp_path / "x", marker)
    pickle.loads((tmp_path / "x").read_bytes())
    assert marker.exists()
    marker.unlink()
    plant(tmp_path / "x.pt", marker, archive=True)
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert marker.exists()


def safe(done, marker):
    """Ended in a line, or well; the pickle was never run."""
    assert not marker.exists(), done
    assert "Traceback" not in done.err and done.code in (0, 2), done
    assert done.code == 0 or "error: " in done.last(2)


# --- a run's folder --------------------------------------------------------------------------------------------------

RUN = [
    ".lock",
    "config.json",
    "metrics.jsonl",
    "samples.jsonl",
    "state.pt",
    "ways.json",
    "table.json",
    "table.md",
    ".metadata",
    "shards_rerule_2/0.safetensors",
    "shards_rerule_2/.metadata",
    "predictions/original.jsonl",
    "attacks/original.json",
]
MODEL = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "whp.json",
    "adapter_config.json",
    "adapter_model.bin",
    "adapter_model.safetensors",
    "adapter/adapter_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "tf_model.h5",
    "flax_model.msgpack",
    "preprocessor_config.json",
]


@pytest.mark.parametrize(
    "file", [*RUN, *(f"{phase}/{name}" for phase in ("original", "rej_steer") for name in MODEL[:8])]
)
def test_a_runs_folder(interrupted, marker, file):
    plant(interrupted / file, marker)
    safe(ended(short, "--output_dir", interrupted, "--resume"), marker)
    if file in SHOULD_BE:
        plant(interrupted / file, marker, archive=True)
        safe(ended(short, "--output_dir", interrupted, "--resume"), marker)


@pytest.mark.parametrize(
    "file",
    [
        "state.pt",
        "config.json",
        "metrics.jsonl",
        "rej_steer/config.json",
        "predictions/rej_steer.jsonl",
        "original/pytorch_model.bin",
    ],
)
def test_a_run_to_start_from(finished, tmp_path, marker, file):
    source = Path(shutil.copytree(finished, tmp_path / "source"))
    plant(source / file, marker, archive=file.endswith(".pt"))
    safe(ended(short, "--start_from", source, "--output_dir", tmp_path / "run"), marker)


# --- a model's -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    place = tmp_path_factory.mktemp("good")
    make_model(context=2048).save_pretrained(place / "model")
    byte_tokenizer().save_pretrained(place / "model")
    TRAIN["tofu"](place / "tofu")
    return place


def score(good, model, out, *more):
    argv = ["--benchmark", "tofu", "--data_dir", good / "tofu", "--model", model, "--max_new_tokens", 1]
    return ended(evaluate, *argv, "--output", out, *more)


@pytest.mark.parametrize("file", MODEL)
def test_a_models_folder(good, tmp_path, marker, file):
    model = Path(shutil.copytree(good / "model", tmp_path / "model"))
    if file.endswith((".bin", ".pt", ".h5", ".msgpack")):
        for weights in model.glob("*.safetensors"):
            weights.unlink()  # so that the other is looked at
    for archive in {False, file in SHOULD_BE}:
        plant(model / file, marker, archive)
        safe(score(good, model, tmp_path / "out.json"), marker)
    plant(tmp_path / "tokenizer" / file, marker)
    safe(score(good, good / "model", tmp_path / "out.json", "--tokenizer", tmp_path / "tokenizer"), marker)


@pytest.mark.parametrize("file", ["whp.json", "original/config.json", "reinforced/model.safetensors"])
def test_a_pair_of_models(good, tmp_path, marker, file):
    model = Path(shutil.copytree(good / "model", tmp_path / "model"))
    Pair(make_model(0, 2048), make_model(1, 2048), 1.0).save_pretrained(model)
    plant(model / file, marker)
    safe(score(good, model, tmp_path / "out.json"), marker)


CODE = "from pathlib import Path\nPath({!r}).touch()\nclass Mine: pass\n"
MAPPED = {name: "mine.Mine" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("type_", ["llama", "mine"])
def test_code_that_a_folder_brings_along_is_not_run(good, tmp_path, marker, file, type_, monkeypatch):
    model = Path(shutil.copytree(good / "model", tmp_path / "model"))
    for name in ("mine", "configuration_mine", "modeling_mine", "tokenization_mine", "conftest", "sitecustomize"):
        (model / f"{name}.py").write_text(CODE.format(str(marker)))
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(CODE.format(str(marker)))
    stored = json.loads((model / file).read_text())
    mapped = MAPPED | {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}
    stored |= {"auto_map": mapped, "trust_remote_code": True, "custom_pipelines": {"x": {"impl": "mine.Mine"}}}
    if file == "config.json":
        stored["model_type"] = type_
    (model / file).write_text(json.dumps(stored))
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))  # nobody to say yes
    safe(score(good, model, tmp_path / "out.json"), marker)
    argv = ["--benchmark", "tofu", "--data_dir", good / "tofu", "--model", model, "--lora_rank", 2, "--steps", 0]
    argv += ["--max_new_tokens", 1, "--sft_steps", 1, "--method", "rule", "--output_dir", tmp_path / "run"]
    safe(ended(rerule, *argv), marker)


def test_code_that_a_pair_of_models_brings_along_is_not_run(good, tmp_path, marker):
    model = Path(shutil.copytree(good / "model", tmp_path / "model"))
    Pair(make_model(0, 2048), make_model(1, 2048), 1.0).save_pretrained(model)
    stored = json.loads((model / "original" / "config.json").read_text())
    write(model / "original" / "config.json", stored | {"auto_map": MAPPED, "model_type": "mine"})
    (model / "original" / "mine.py").write_text(CODE.format(str(marker)))
    safe(score(good, model, tmp_path / "out.json"), marker)


def test_code_beside_a_command_is_not_run(good, tmp_path, marker):
    """In a process of its own, begun in a folder of another's."""
    for name in ("torch", "benchmarks", "config", "json", "sitecustomize", "usercustomize"):
        (tmp_path / f"{name}.py").write_text(CODE.format(str(marker)))
    line = [sys.executable, ROOT / "evaluate.py", "--benchmark", "x", "--output", "x"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert "--benchmark x" in done.stderr and not marker.exists()


# --- data, logs, caches, records -------------------------------------------------------------------------------------


@pytest.mark.parametrize("benchmark", TRAIN)
def test_a_benchmarks_folder(folders, tmp_path, marker, benchmark):
    for path in sorted(folders[benchmark].rglob("*.json")):
        kept = path.read_bytes()
        plant(path, marker)
        argv = ["--benchmark", benchmark, "--data_dir", folders[benchmark], "--dry_run"]
        safe(ended(rerule, *argv), marker)
        argv = [
            "--benchmark",
            benchmark,
            "--data_dir",
            folders[benchmark],
            "--model",
            "no/model",
            "--output",
            tmp_path / "o",
        ]
        safe(ended(evaluate, *argv), marker)
        path.write_bytes(kept)


def test_logs_terms_and_settings(folders, tmp_path, marker):
    plant(tmp_path / "x.json", marker)
    tofu = ["--benchmark", "tofu", "--data_dir", folders["tofu"]]
    for argv in (["x.json"], [*tofu, "--retain_log", "x.json"], ["--purge_terms", "x.json", "--method", "purge"]):
        done = ended(rerule, *[tmp_path / a if a == "x.json" else a for a in argv], "--output_dir", tmp_path / "run")
        assert done.line() and not marker.exists() and not (tmp_path / "run").exists()
    done = ended(evaluate, "--benchmark", "tofu", "--from_log", tmp_path / "x.json", "--output", tmp_path / "o")
    assert done.line() and not marker.exists()


def test_a_judges_cache(good, tmp_path, marker, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert score(good, good / "model", tmp_path / "log.json").code == 0
    plant(tmp_path / "cache", marker)
    with Loopback(reply=lambda prompt: {"read": 1, "help": 2, "truth": 3}) as server:
        argv = ["--benchmark", "tofu", "--from_log", tmp_path / "log.json", "--output", tmp_path / "o.json"]
        argv += ["--judge_url", server.url, "--judge_model", "m", "--judge_cache", tmp_path / "cache"]
        safe(ended(evaluate, *argv), marker)
    assert json.loads((tmp_path / "o.json").read_text())["summary"]["help"] == 2


@pytest.mark.parametrize("file", ["build.json", "intro.json", "reject_target.json", "llm.jsonl", ".metadata"])
def test_a_folder_that_was_built(tmp_path, marker, file):
    questions(tmp_path)
    argv = [
        "--source",
        "qa",
        "--input",
        tmp_path / "ask.json",
        "--target",
        NAME,
        "--neighbours",
        tmp_path / "near.json",
    ]
    argv += ["--output_dir", tmp_path / "out"]
    assert ended(build_data, *argv).code == 0
    plant(tmp_path / "out" / file, marker)
    safe(ended(build_data, *argv), marker)
    for source in ("ask.json", "near.json"):
        plant(tmp_path / source, marker)
        safe(ended(build_data, *argv[:-1], tmp_path / "other"), marker)


@pytest.mark.parametrize("file", ["records.json", "runs/base_21/record.json", "runs/base_21/config.json"])
def test_records_of_the_report(tmp_path, marker, file, monkeypatch):
    from unittest import mock

    from reproduce import __main__ as report

    plant(tmp_path / file, marker)
    with mock.patch.object(report, "run_all"), mock.patch.object(report, "write_records"):
        done = ended(reproduce, "--output_dir", tmp_path, "--only", "nothing")
        assert done.line() and not marker.exists()
        monkeypatch.setattr(report, "report", mock.Mock())
        safe(ended(reproduce, "--output_dir", tmp_path), marker)


def test_no_key_is_ever_written(good, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("JUDGE_API_KEY", "sk-very-secret")
    assert score(good, good / "model", tmp_path / "log.json").code == 0
    for script in ([], [401] * 9, ["html"] * 99):
        with Loopback(*script, reply=lambda prompt: {"read": 1, "help": 2, "truth": 3}) as server:
            monkeypatch.setattr("engine.llm.ATTEMPTS", 1)
            argv = ["--benchmark", "tofu", "--from_log", tmp_path / "log.json", "--output", tmp_path / "o.json"]
            done = ended(evaluate, *argv, "--judge_url", server.url, "--judge_model", "m")
            (tmp_path / "o.json.judge.jsonl").rename(tmp_path / f"cache{len(script)}")
            assert "Bearer sk-very-secret" in server.keys and "very-secret" not in done.out + done.err
    write(tmp_path / "x.json", {})
    assert not any(b"very-secret" in (text or b"") for text in tree(tmp_path).values())
