"""LoRA through the driver: every method, resuming, another run's Stage 1, the flags, and what a user can get wrong."""

import json
import sys
from functools import partial
from types import SimpleNamespace

import miniature
import pytest
import torch
from conftest import make_groups, tiny
from peft import PeftModel
from transformers import AutoModelForCausalLM

import rerule
from baselines import METHODS, TITLES, train
from config import Config
from engine import lora
from engine.model import optimizer_for
from engine.process import Engine

LORA = ("--lora_rank", 4)
BASELINES = ("--baseline_lr", 1e-2, "--baseline_epochs", 2, "--baseline_batch_size", 12)
IDS = torch.tensor([[1, 5, 6, 7, 8]])


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    folder = tmp_path_factory.mktemp("everything") / "run"
    miniature.main("--output_dir", folder, *LORA, *BASELINES, "--method", *METHODS)
    return folder


@pytest.fixture(scope="module")
def in_full(tmp_path_factory):
    """The same world without adapters."""
    folder = tmp_path_factory.mktemp("in_full") / "run"
    miniature.main("--output_dir", folder, "--method", "rej_steer")
    return folder


def read(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def metrics(folder, method):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["method"] == method]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_moves_the_layers_with_adapters_alone(everything, method):
    """And its saved model is its adapter on what it started from."""
    source = everything / ("rej_steer" if method in ("rule", "rerule") else "original")
    folder = everything / method / ("reinforced" if method == "whp" else "")
    before, after = read(source).state_dict(), read(folder).state_dict()
    for name, w in before.items():
        assert (after[name] - w).abs().max() > 1e-5 if "_proj" in name else torch.equal(after[name], w), name
    base = json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(source)
    onto = PeftModel.from_pretrained(read(base), folder / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(onto(IDS).logits, read(folder)(IDS).logits, atol=1e-5)
    assert json.loads((everything / "table.json").read_text())[TITLES[method]]["seconds"] > 0


def test_every_way_is_the_fast_one(everything):
    ways = json.loads((everything / "ways.json").read_text())
    ways.pop("sample, Pair")  # of WHP's two models, as ever
    assert ways == {
        "sample, LlamaForCausalLM": "packed_sample: gives the plain numbers",
        "logprobs, LlamaForCausalLM": "shared_response_logprobs: gives the plain numbers",
    }


def test_what_is_taught_is_taught_in_full(everything, in_full):
    for name in ("original", "retained"):
        ours, theirs = (folder / name / "model.safetensors" for folder in (everything, in_full))
        assert ours.read_bytes() == theirs.read_bytes() and not (everything / name / "adapter").exists()


def test_stage_2_starts_at_its_reference(everything):
    for method in ("rule", "rerule", "purge"):
        first, *later = metrics(everything, method)
        assert first["kl"] == pytest.approx(0, abs=1e-9) and later[-1]["kl"] > 1e-6, method


def test_a_task_vector_is_subtracted_and_a_pair_holds_what_it_was_before(everything):
    original, unlearned = (read(everything / name).state_dict() for name in ("original", "task_vector"))
    reinforced = read(everything / "whp" / "reinforced").state_dict()  # trained alike, but in another order
    moved, back = (
        torch.cat([(theirs[name] - w).flatten() for name, w in original.items()]) for theirs in (unlearned, reinforced)
    )
    assert torch.nn.functional.cosine_similarity(moved, back, 0).item() < -0.5
    assert 0.5 < moved.norm().item() / back.norm().item() < 2
    kept = read(everything / "whp" / "original").state_dict()
    assert all(torch.equal(w, kept[name]) for name, w in original.items())


@pytest.mark.parametrize("method, at", [("rerule", 5), ("npo_klr", 3)])
def test_a_run_killed_and_resumed_ends_the_same(everything, method, at, tmp_path):
    argv = ["--output_dir", tmp_path / "cut", *LORA, *BASELINES, "--method", method]
    assert miniature.start(argv, (method, at)) == -9
    state = torch.load(tmp_path / "cut" / "state.pt")["payload"]
    assert state["model"] and all(".lora_" in name for name in state["model"])
    assert len(state["optimizer"]["state"]) == len(state["model"]) == 14
    assert miniature.start([*argv, "--resume"]) == 0
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "cut" / method / file).read_bytes() == (everything / method / file).read_bytes()


def test_start_from_takes_the_adapter_over(everything, tmp_path, monkeypatch, refused):
    assert "(lora_rank 4 → 0" in refused("--start_from", everything, *miniature.FLAGS)
    assert "(lora_rank 4 → 5" in refused("--start_from", everything, *miniature.FLAGS, "--lora_rank", 5)
    monkeypatch.undo()
    monkeypatch.setattr(rerule, "stage1", None)
    miniature.main("--output_dir", tmp_path / "run", *LORA, "--method", "rule", "--start_from", everything)
    for file in ("rej_steer/adapter/adapter_model.safetensors", "rule/model.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (everything / file).read_bytes()


def test_a_step_on_no_gradient_gives_frozen_weights_none():
    model, engine, seen = tiny("llama"), Engine("cpu"), []
    lora.adapt(model, Config(lora_rank=3, lora_alpha=6.0))
    step = partial(engine.step, model, optimizer_for(model, 1e-3, 0.01), 1.0)

    def update():
        seen.append({name for name, p in model.named_parameters() if p.grad is not None})
        return step()

    nothing = SimpleNamespace(draw=lambda *_: [])
    row = rerule.replay_update(engine, model, nothing, make_groups(model), update, None, Config(), 1)
    assert row["replay_grad_norm"] == 0 and seen[0] == {n for n, p in model.named_parameters() if p.requires_grad}


# --- flags -----------------------------------------------------------------------------------------------------------


def configured(*argv):
    return rerule.configure([str(word) for word in argv])


def test_adapters_take_higher_rates_than_the_presets_and_alpha_is_twice_the_rank():
    full, ours = configured(), configured("--lora_rank", 8)
    assert (ours.lr, ours.sft_lr) == (pytest.approx(10 * full.lr), pytest.approx(3 * full.sft_lr))
    assert (ours.lora_alpha, ours.tiny_lr, full.lora_alpha) == (16, full.tiny_lr, None)
    given = configured("--lora_rank", 8, "--lora_alpha", 3, "--lr", 1e-5, "--sft_lr", 2e-5, "--baseline_lr", 3e-5)
    assert (given.lr, given.sft_lr, given.lora_alpha) == (1e-5, 2e-5, 3)
    assert train.learning_rate(given, "ga") == 3e-5 and train.learning_rate(given, "rule") == 1e-5
    for method in ("ga", "po", "purge"):
        assert train.learning_rate(ours, method) == pytest.approx(10 * train.learning_rate(full, method))
    full.model = ours.model = "some/model"
    assert train.learning_rate(ours, "ga") == pytest.approx(1e-4) and train.learning_rate(full, "ga") == 1e-5


@pytest.mark.parametrize("flags, said", [
    (["--lora_rank", -1], "--lora_rank -1: expected 0 or more"),
    (["--lora_rank", 4, "--lora_alpha", 0], "--lora_alpha 0.0: expected a number above 0"),
    (["--lora_alpha", 4], "--lora_alpha 4.0: expected --lora_rank beside it"),
    (["--lora_rank", 4, "--offload"], "--lora_rank 4: expected no --offload"),
    (["--lora_rank", 4, "--lora_targets", "query"], "--lora_targets query: expected all-linear, or some of q_proj, k_"),
    (["--lora_rank", 4, "--lora_targets", "q_proj", "mlp"], "--lora_targets mlp: "),
    (["--lora_rank", 4, "--lora_targets", "lm_head"], "--lora_targets lm_head: "),  # often the embeddings too
    (["--lora_rank", 4, "--lora_targets", "embed_tokens"], "--lora_targets embed_tokens: "),
])  # fmt: skip
def test_mistakes_are_told_before_anything_is_trained(flags, said, refused):
    assert said in refused(*flags)


def test_layers_of_a_given_model_are_known_before_its_weights_are_read(refused, saved, folders):
    model = ["--benchmark", "tofu", "--data_dir", folders["tofu"], "--model", saved / "good"]
    assert "--lora_targets c_attn: expected" in refused(*model, *LORA, "--lora_targets", "c_attn")
    (saved / "nothing").mkdir(exist_ok=True)
    model[-1] = saved / "nothing"
    assert f"--model {saved / 'nothing'}: is no model folder" in refused(*model, *LORA, "--lora_targets", "c_attn")


def test_peft_is_imported_only_where_it_is_asked_for(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert refused(*LORA) == "--lora_rank 4: expected peft to be installed (pip install peft)"
    assert configured().lora_rank == 0
