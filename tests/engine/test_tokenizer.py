"""`--tokenizer`: a model whose folder has none, or another than was taught with it."""

import shutil

import pytest
from made import tree
from miniature import driver

import evaluate
from engine.flags import parse


@pytest.fixture
def bare(saved, tmp_path):
    """The good model without its tokenizer, which lies beside it."""
    for name in ("bare", "words"):
        shutil.copytree(saved / "good", tmp_path / name)
    for path in (tmp_path / "bare").glob("*token*"):
        path.unlink()
    for path in (tmp_path / "words").glob("model*"):
        path.unlink()
    return tmp_path / "bare", tmp_path / "words"


def test_both_commands_take_it(bare, folders, saved, tmp_path, capsys):
    model, words = bare
    common = ["--benchmark", "tofu", "--data_dir", folders["tofu"]]
    small = ["--method", "rule", "--steps", 1, "--prompts_per_step", 2, "--group_size", 2, "--max_new_tokens", 2,
             "--sft_epochs", 0.1, "--eval_every", 0]  # fmt: skip
    driver(*common, *small, "--model", model, "--tokenizer", words, "--output_dir", tmp_path / "run")
    assert (tmp_path / "run" / "rule" / "tokenizer.json").read_bytes() == (words / "tokenizer.json").read_bytes()
    found = []
    for flags in (["--model", saved / "good"], ["--model", model, "--tokenizer", words]):
        evaluate.main(parse(evaluate.Options, [*map(str, [*common, *flags, "--output", tmp_path / "out.json"])]))
        found.append((tmp_path / "out.json").read_text())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--tokenizer", "nowhere"), "--tokenizer nowhere: is no model folder or Hugging Face id"),
        (("--tokenizer", "no eos"), "no eos: its tokenizer has no EOS token"),
        ((), "is no model folder or Hugging Face id"),
    ],
)
def test_a_tokenizer_that_is_none(bare, folders, saved, refused, flags, said):
    flags = [saved / flag if flag == "no eos" else flag for flag in flags]
    message = refused("--benchmark", "tofu", "--data_dir", folders["tofu"], "--model", bare[0], *flags)
    assert said in message and message.startswith("--tokenizer" if flags else "--model")


def test_a_tiny_model_makes_its_own(bare, refused):
    assert "--tokenizer" in refused("--tokenizer", bare[1]) and tree(bare[1])
