"""What a run leaves on disk: models in the wanted number type, at most one state beside the one being written."""

import json
import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import tiny
from made import SMALL, byte_tokenizer, published_rwku
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import rerule
from config import InputError
from engine.model import Pair
from engine.process import Engine
from engine.run import Run, descend
from scale import memory
from scale.ranks import Ranks


def saved(folder, model, *flags, half=False):
    """The folder that `Run.save_model` makes of a model."""
    engine = Engine("cpu")
    engine.half = half  # as where a GPU computes
    run = Run(rerule.configure([*flags, "--output_dir", str(folder)]), engine)
    run.open()
    run.save_model("rule", model, byte_tokenizer())
    return folder / "rule"


def weights_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def llama(tied):
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=259, tie_word_embeddings=tied, **sizes)).eval()


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_saved_in_bf16_takes_half_the_bytes_and_is_the_rounded_one(tied, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "whole", llama(tied)))
    half = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "half", llama(tied), "--save_dtype", "bfloat16"))
    assert whole.dtype == torch.float32 and half.dtype == torch.bfloat16  # as config.json says
    assert json.loads((tmp_path / "half" / "rule" / "config.json").read_text())["dtype"] == "bfloat16"
    assert weights_of(tmp_path / "half") == pytest.approx(weights_of(tmp_path / "whole") / 2, rel=0.01)
    assert weights_of(tmp_path / "whole") == pytest.approx(4 * sum(p.numel() for p in whole.parameters()), rel=0.01)
    for (name, p), q, own in zip(whole.named_parameters(), half.parameters(), llama(tied).parameters(), strict=True):
        assert torch.equal(p, own) and torch.equal(q, own.bfloat16()), name
    assert (half.lm_head.weight is half.model.embed_tokens.weight) == tied


def test_auto_is_bf16_where_a_gpu_computes_alone(tmp_path):
    expected = {(False, "auto"): torch.float32, (True, "auto"): torch.bfloat16, (True, "float32"): torch.float32}
    for (half, flag), dtype in expected.items():
        folder = saved(tmp_path / f"{half} {flag}", tiny("qwen2"), "--save_dtype", flag, half=half)
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == dtype


def test_both_models_of_a_pair_are_cast(tmp_path):
    folder = saved(tmp_path / "run", Pair(tiny("llama"), tiny("llama"), 1.5), "--save_dtype", "bfloat16")
    for name in ("original", "reinforced"):
        assert AutoModelForCausalLM.from_pretrained(folder / name).dtype == torch.bfloat16
    pair, _ = Engine("cpu").load(folder)
    assert pair.alpha == 1.5 and pair.dtype == torch.float32
    assert torch.equal(pair.original.lm_head.weight, tiny("llama").lm_head.weight.bfloat16().float())


# --- states ----------------------------------------------------------------------------------------------------------


def bytes_of(*paths):
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return sum(file.stat().st_size for file in files if file.is_file())


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """{"most": bytes of states at once, a half-written one among them; "one": of the largest; "all": of the folder} of
    the runs of a test."""
    folder, found, replace = tmp_path / "run", {"most": 0, "one": 0, "all": 0}, os.replace

    def look():
        states = [path for path in folder.iterdir() if path.name.startswith(("state.pt", "shards"))]
        found["most"] = max(found["most"], bytes_of(*states))
        found["one"] = max([found["one"], *map(bytes_of, states)])
        found["all"] = max(found["all"], bytes_of(folder))

    def replaced(source, target):
        look()  # before the old one goes
        replace(source, target)
        look()

    monkeypatch.setattr(os, "replace", replaced)
    return found


def trained(folder, flags, stop=0):
    """A run of one phase of five steps, its state saved after each; interrupted at step `stop`."""
    config = rerule.configure([*flags, "--output_dir", str(folder), "--save_every", "1"])
    engine = Ranks("cpu") if config.offload else Engine("cpu")
    with engine.session():
        run = Run(config, engine)
        run.open()
        model = engine.place(llama(True), config)

        def loss_of(step):
            if step == stop:
                raise KeyboardInterrupt
            return model(torch.tensor([[3, 4, 5]])).logits.logsumexp(-1).sum()

        descend(run, "rule", 2, model, loss_of, steps=5, lr=1e-3, warmup=0)
        run.save_model("rule", model, byte_tokenizer())
        run.finish("rule", {})


@pytest.mark.parametrize("flags", [[], ["--offload"]])
def test_a_state_lies_beside_the_next_and_no_other_even_after_a_kill(flags, watched, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        trained(folder, flags, stop=4)
    one = watched["one"]
    assert one > 12 * 130_000 and 1.9 * one < watched["most"] < 2.1 * one
    for name in ("state.pt.tmp", "shards.tmp/part", "shards_rule_4/part", "rule.tmp/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)  # what a run leaves that is killed while it writes
        (folder / name).write_bytes(bytes(one))
    watched.update(most=0)
    trained(folder, [*flags, "--resume"])
    assert 1.9 * one < watched["most"] < 2.1 * one
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["rule"] and not [*folder.glob("*.tmp")]


def test_a_folder_of_half_written_files_that_are_not_ours_is_refused(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tmp").write_text("years of work")
    assert "is not empty and holds no run" in refused()


@pytest.mark.parametrize("flags", [[], ["--save_every", "2", "--save_dtype", "bfloat16"], ["--lora_rank", "8"]])
def test_the_disk_of_a_run_is_the_planned_one(flags, watched, tmp_path):
    """The driver on a model of 5 MB: what the plan says is there, at most and in the end, to a twentieth."""
    published_rwku(tmp_path / "data")
    sizes = dict(hidden_size=192, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4)
    architecture = LlamaConfig(vocab_size=259, max_position_embeddings=1024, eos_token_id=2, **sizes)
    LlamaForCausalLM(architecture).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    folder, (*flagged, _, _) = tmp_path / "run", SMALL[SMALL.index("--sft_steps") :]  # less its --save_every 0
    argv = [*flagged, "--method", "rule", "--max_new_tokens", "3", "--benchmark", "rwku", "--model", tmp_path / "model"]
    argv = [*map(str, argv), "--data_dir", str(tmp_path / "data"), "--output_dir", str(folder), *flags]
    config = rerule.configure(argv if "--save_every" in flags else [*argv, "--save_every", "0"])
    counted = memory.seen(architecture, False)
    planned = memory.disk(counted.parameters, counted.at(config, False).adapters, config, False)
    few = 0.9 * planned["models"] if config.lora_rank else planned["most at once"] - 1  # adapters are not known yet
    with mock.patch("shutil.disk_usage", lambda place: SimpleNamespace(free=few)):
        with pytest.raises(InputError, match="GB of free disk for models and states, found 0.0"):
            rerule.main(config)
    assert not folder.exists()
    rerule.main(config)
    assert planned["models"] == pytest.approx(bytes_of(folder), rel=0.05)
    assert planned["most at once"] == pytest.approx(watched["all"], rel=0.05)
    assert (planned["state"] > 1e6) == (config.save_every > 0)
    assert not config.save_every or planned["state"] == pytest.approx(watched["one"], rel=0.05)
