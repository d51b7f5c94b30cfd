"""LoRA: what is trained, what is π_ref, what is saved, through every method, on one process and on two."""

import json
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import make_groups, tiny
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

import grpo
from benchmarks.tiny import word_tokenizer
from config import Config
from engine import fast, lora
from engine.model import optimizer_for
from engine.process import Engine, trained
from sft import sft_loss_of

CONFIG = Config(lora_rank=3, lora_alpha=5.0)
SCALE = 5 / 3
ROWS = [([3, 4], [5, 6, 2]), ([7, 8, 9, 10], [11, 2])]
KINDS = ["llama", "qwen2", "gpt2"]


def adapted(kind, moved=True, config=CONFIG):
    """A tiny model with adapters that have moved."""
    model = tiny(kind)
    lora.adapt(model, config)
    if moved:
        rng = torch.Generator().manual_seed(1)
        for p in adapters(model).values():
            p.data.copy_(torch.randn(p.shape, generator=rng) / 4)
    return model


def adapters(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def saved(model, folder):
    """The model that its saved folder holds."""
    model.save_pretrained(str(folder))
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


# --- what is trained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", [1, 2])
def test_loss_and_gradient_are_those_of_the_merged_model_on_a_and_b(kind, stage, checkpointed, tmp_path):
    """∂L/∂A = s Bᵀ ∂L/∂W and ∂L/∂B = s ∂L/∂W Aᵀ, of the model with W + s B A."""
    model = adapted(kind)
    merged = saved(model, tmp_path)
    if checkpointed:
        fast.checkpoint_layers(model)
    engine = Engine("cpu", 60)
    groups = make_groups(merged)
    for group in groups:
        group.ref_logprobs = group.old_logprobs + 0.3 * group.mask
    losses = []
    for each in (model, merged):
        if stage == 1:
            loss = sft_loss_of(each, ROWS)
            loss.backward()
            losses.append(loss.item())
        else:
            losses.append(grpo.on_policy_gradient(each, engine.batches(each, groups), 0.1, engine.logprobs(1.0))[:2])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(layers(model)) == {"llama": 14, "qwen2": 14, "gpt2": 8}[kind]
    for name, layer in layers(model).items():
        g = merged.get_submodule(name).weight.grad
        g = g.T if kind == "gpt2" else g  # whose layers keep (in, out)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        largest = g.abs().max().item()
        assert torch.allclose(a.grad, SCALE * b.T @ g, atol=1e-4 * largest), name
        assert torch.allclose(b.grad, SCALE * g @ a.T, atol=1e-4 * largest), name
        assert largest > 1e-6
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_new_adapters_change_nothing_and_alone_are_trained(kind):
    model, plain = adapted(kind, moved=False), tiny(kind)
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert all(".lora_A." in name or ".lora_B." in name for name in adapters(model))
    optimizer, before = optimizer_for(model, 1e-2, 0.01), {n: p.clone() for n, p in model.named_parameters()}
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in adapters(model).values()}
    for _ in range(2):  # A has no gradient while B is 0
        sft_loss_of(model, ROWS).backward()
        assert Engine("cpu").step(model, optimizer, 1.0) > 0
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


def test_every_seed_has_its_own_adapters_and_the_same_each_time():
    first, again = adapters(adapted("llama", moved=False)), adapters(adapted("llama", moved=False))
    other = adapters(adapted("llama", moved=False, config=replace(CONFIG, seed=1)))
    assert all(torch.equal(p, again[name]) for name, p in first.items())
    assert all(torch.equal(p, other[name]) == (".lora_B." in name) for name, p in first.items())


def test_layers_are_chosen_by_name():
    found = layers(adapted("llama", config=replace(CONFIG, lora_targets=["q_proj", "mlp.up_proj"])))
    assert {name.split(".")[-1] for name in found} == {"q_proj", "up_proj"} and len(found) == 4


# --- number types ----------------------------------------------------------------------------------------------------


def test_where_bf16_computes_frozen_weights_are_bf16_and_adapters_float32(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    word_tokenizer(["a b c"]).save_pretrained(tmp_path)
    engine, config = Engine("cpu"), replace(CONFIG, gradient_checkpointing=True)
    engine.half = True
    model = engine.load(tmp_path, training=config)[0]
    assert model.dtype == torch.bfloat16 and engine.lowered(model) is model
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16) and p.requires_grad == (
            ".lora_" in name
        )
    optimizer, before = optimizer_for(model, 2e-6, 0.0), {n: p.clone() for n, p in adapters(model).items()}
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        groups = make_groups(model, sample=fast.packed_sample)
        reference = engine.reference(model, tmp_path)
        grpo.add_reference(reference, engine.batches(reference, groups), engine.logprobs(1.0))
        for batch in engine.batches(model, groups):  # the sampler's numbers are the trainer's, rounding aside
            gap = (engine.logprobs(1.0)(model, batch) - batch.old_logprobs)[batch.mask].abs()
            assert gap.mean() < 0.05
        grpo.on_policy_gradient(model, engine.batches(model, groups), 0.1, engine.logprobs(1.0))
        engine.step(model, optimizer, 1.0)
        moved = max((p - before[name]).abs().max() for name, p in adapters(model).items())
        assert 1e-6 < moved < 5e-6  # of fp32 moments
        for p in adapters(model).values():
            p.data.add_(0.3)
        model.save_pretrained(tmp_path / "out")
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, layer in layers(model).items():
        w, a, b = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
        exact = (w.double() + SCALE * b.double() @ a.double()).float()  # rounded once, and no product in bf16
        assert torch.equal(out.get_submodule(name).weight, exact.bfloat16()), name


def test_a_float32_model_with_adapters_is_sampled_as_it_is():
    """A copy in bf16 would round the adapters, and its numbers would not be the trainer's."""
    engine = Engine("cpu")
    engine.half = True
    model = adapted("llama")
    assert engine.lowered(model) is model and engine.lowered(tiny("llama")).dtype == torch.bfloat16


# --- without the adapters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_off_is_the_model_before_training_whatever_the_adapters_have_become(kind):
    model, before = adapted(kind), tiny(kind)
    engine, groups, others = Engine("cpu"), make_groups(before), make_groups(before)
    off = engine.reference(model, "nowhere")
    assert type(off).__name__ == type(before).__name__ and weakref.ref(off)() is off
    for reference, own in ((off, groups), (before, others)):
        grpo.add_reference(reference, engine.batches(reference, own), engine.logprobs(1.0))
    for ours, theirs in zip(groups, others, strict=True):
        assert torch.allclose(ours.ref_logprobs, theirs.ref_logprobs, atol=1e-6)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        assert torch.equal(off(ids).logits, before(ids).logits)
        assert (model(ids).logits - before(ids).logits).abs().max() > 0.1  # and the adapters are back on
    assert len(engine.ways) == 1 and "gives the plain numbers" in engine.ways[f"logprobs, {type(before).__name__}"]
    with pytest.raises(AttributeError):
        off(ids, past_key_values=3)
    assert not torch.equal(model(ids).logits, before(ids).logits)
    assert len(adapters(model)) == 2 * len(layers(model))  # none was frozen on the way


def test_off_holds_no_weights_and_shows_the_models():
    model = adapted("llama")
    off = model.off()
    for ours, (name, theirs) in zip(off.parameters(), model.named_parameters(), strict=True):
        assert not ours.any() if ".lora_B." in name else ours.data_ptr() == theirs.data_ptr()
    assert set(vars(off)) == {"model", "layers"} and not [x for x in vars(off).values() if torch.is_tensor(x)]
    for name in ("device", "dtype", "config", "generation_config"):
        assert getattr(off, name) is getattr(model, name) or getattr(off, name) == getattr(model, name)
    assert off.get_output_embeddings() is model.get_output_embeddings() and list(off.modules()) == list(model.modules())
    assert getattr(off, "pair", None) is None and not getattr(off, "checkpoints", False)
    assert all(w.any() == (".lora_B." not in name) for name, w in off.state_dict().items())


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_adapters_is_run_by_the_fast_ways(kind, checkpointed):
    model, engine = adapted(kind), Engine("cpu")
    if checkpointed:
        fast.checkpoint_layers(model)
    groups = make_groups(model)
    engine.sample(model, [[3, 4], [5, 6, 7]], 3, 6, [2], 1.0, torch.Generator().manual_seed(0))
    for batch in engine.batches(model, groups):
        engine.logprobs(1.0)(model, batch)
    what = "logprobs, layers computed twice" if checkpointed else "logprobs"
    way = "packed_response_logprobs" if checkpointed else "shared_response_logprobs"
    name = type(tiny(kind)).__name__
    assert engine.ways == {
        f"sample, {name}": "packed_sample: gives the plain numbers",
        f"{what}, {name}": f"{way}: gives the plain numbers",
    }


# --- what is saved ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_is_the_adapter_on_its_base(kind, tmp_path):
    tiny(kind).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora.adapt(model, CONFIG)
    for p in adapters(model).values():
        p.data.add_(0.2)
    merged, ids = saved(model, tmp_path / "out"), torch.tensor([[3, 4, 5, 6]])
    stored = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(stored["base_model_name_or_path"])
    onto = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, model.eval()(ids).logits, atol=1e-5)
        assert torch.allclose(merged(ids).logits, onto(ids).logits, atol=1e-5)
        assert (merged(ids).logits - tiny(kind)(ids).logits).abs().max() > 0.1
    assert stored["target_modules"] == sorted(stored["target_modules"]) and stored["base_model_name_or_path"]
    assert type(merged) is type(tiny(kind)) and merged.config.architectures == [type(merged).__name__]
    assert merged.state_dict().keys() == tiny(kind).state_dict().keys()


def test_a_state_keeps_the_adapters_and_their_moments_alone(tmp_path):
    model, other, engine = adapted("llama"), adapted("llama", moved=False), Engine("cpu")
    optimizers = [optimizer_for(each, 1e-2, 0.01) for each in (model, other)]
    sft_loss_of(model, ROWS).backward()
    engine.step(model, optimizers[0], 1.0)
    payload = engine.state_of(model, optimizers[0], tmp_path, "x")
    assert payload["model"].keys() == adapters(model).keys() and len(payload["optimizer"]["state"]) == 28
    engine.restore(payload, other, optimizers[1])
    assert all(torch.equal(w, other.state_dict()[name]) for name, w in model.state_dict().items())
    tied = tiny("gpt2")
    assert trained(tied, tied.state_dict()).keys() == tied.state_dict().keys()  # without adapters, everything
    lora.adapt(tied, CONFIG)
    assert all(".lora_" in name for name in trained(tied, tied.state_dict()))
