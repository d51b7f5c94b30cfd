"""The output folder and the saved state of a run: what a new command may go on with, and what it is told otherwise."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch

import rerule
from config import Config
from engine import run
from engine.process import Engine
from engine.run import Run

ENGINE = Engine("cpu")


def began(folder, *argv):
    """The folder of a run that was stopped after its first phase."""
    run = Run(rerule.configure([*map(str, argv), "--output_dir", str(folder)]), ENGINE)
    run.open()
    run.metrics.write({"method": "original", "step": 1})
    run.finish("original", {"seconds": 1.0})
    return run


def test_another_run(refused, tmp_path):
    began(tmp_path / "run")
    for flags in (["--seed", 1], ["--seed", 1, "--resume"], ["--method", "rule"], ["--tau", 0.5, "--lr", 1e-3]):
        message = refused(*flags)
        assert f"--output_dir {tmp_path / 'run'}: holds another run" in message and flags[0][2:] in message
    assert "(seed 0 → 1)" in refused("--seed", 1)


def test_an_unfinished_run_wants_resume(refused, tmp_path):
    began(tmp_path / "run")
    assert "add --resume" in refused()
    (tmp_path / "run" / "state.pt").unlink()  # stopped before its first state
    assert "add --resume" in refused()


def test_where_to_run_and_how_often_to_save_may_change(tmp_path):
    config = began(tmp_path / "run").config
    again = dataclasses.replace(config, resume=True, save_every=3, device="cpu")
    assert Run(again, ENGINE).finished("original")
    scarce = dict(max_tokens=64, eval_batch_size=2, gradient_checkpointing=True, rollout_prompts=1)
    assert Run(dataclasses.replace(again, **scarce), ENGINE).finished("original")  # the cures of too little memory


def test_a_run_to_start_from(refused, tmp_path):
    source = tmp_path / "source"
    assert f"--start_from {source}: is no folder of a run" in refused("--start_from", source)
    began(source)
    assert "its Stage 1 is not over" in refused("--start_from", source)
    assert "trained other models before Stage 2 (seed 0 → 1)" in refused("--start_from", source, "--seed", 1)
    assert "its Stage 1 is not over" in refused("--start_from", source, "--lr", 1)  # which may differ
    (source / "state.pt").write_bytes(b"nonsense")
    assert "choose another --start_from" in refused("--start_from", source)


def test_crossed_names(refused, folders):
    assert "--crossed 31: expected 0 to 30" in refused("--crossed", 31)
    assert "only the built-in world" in refused("--benchmark", "tofu", "--data_dir", folders["tofu"], "--crossed", 3)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "{}", '{"model_type": "llama"}', "\xff"])
def test_a_config_that_is_none(refused, tmp_path, text):
    began(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(text, encoding="latin-1")
    for flags in ([], ["--resume"]):
        assert str(tmp_path / "run" / "config.json") in refused(*flags)


def test_a_model_folder_is_no_output_folder(refused, saved, tmp_path):
    shutil.copytree(saved / "good", tmp_path / "run")
    assert "config.json: is not that of a run" in refused()


@pytest.mark.parametrize("damage", ["empty", "nonsense", "half", "list", "other"])
def test_a_state_that_is_none(refused, tmp_path, damage):
    began(tmp_path / "run")
    path = tmp_path / "run" / "state.pt"
    if damage in ("list", "other"):
        torch.save([1] if damage == "list" else {"model": 1}, path)
    else:
        path.write_bytes({"empty": b"", "nonsense": b"nonsense", "half": path.read_bytes()[:-200]}[damage])
    assert str(path) in refused("--resume")


def test_a_log_that_was_cut_or_deleted(refused, tmp_path):
    """Cutting it back to where the state left it would fill it up with zeros."""
    began(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text("{")
    assert f"{path}: is shorter than" in refused("--resume")
    path.unlink()
    assert f"{path}: is shorter than" in refused("--resume")


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_a_folder_with_other_files(refused, tmp_path, flags):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    (tmp_path / "run" / "metrics.jsonl").write_text("mine")
    assert "is not empty and holds no run" in refused(*flags)


def test_a_file_in_the_folders_place(refused, tmp_path):
    (tmp_path / "run").write_text("mine")
    for output in ("run", "run/deeper", "run/deeper/still"):
        assert refused(output=output).startswith(f"--output_dir {tmp_path / output}: expected a folder")


def test_a_link_to_nowhere_in_the_folders_place(refused, tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "nowhere")
    assert "expected a folder" in refused()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc, where nobody may make a folder")
def test_a_folder_that_cannot_be_made(refused):
    assert refused("--output_dir", "/proc/rerule", output=None) == (
        "--output_dir /proc/rerule: cannot be made (No such file or directory)"
    )


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(refused, tmp_path):
    (tmp_path / "run").mkdir(mode=0o500)
    assert "expected a folder" in refused()


def test_another_tokenizer_is_another_stage_1():
    config = Config()
    other = dataclasses.replace(config, tokenizer="words")
    assert run.differences(other, dataclasses.asdict(config), run.BEFORE_STAGE_2) == ["tokenizer  → words"]


def test_a_checkpoint_in_another_number_type_is_another_stage_1(refused, tmp_path):
    began(tmp_path / "source")
    assert "(save_dtype auto → bfloat16)" in refused("--start_from", tmp_path / "source", "--save_dtype", "bfloat16")
