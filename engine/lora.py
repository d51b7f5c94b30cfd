"""LoRA by peft: two small matrices beside every linear layer are trained, and the model's own weights are not.

    W x  →  W x + (α / r) B A x          A (r, in) and B (out, r) in float32; B is 0 at first

They are put into the model itself, whose type and attributes stay. Without them it is the model that it was, so π_ref
needs no second one. A saved model has them added to its weights; its folder `adapter` holds them alone, as peft's."""

from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.pytorch_utils import Conv1D

from config import InputError
from engine.seeds import derive_seed

A, B = ".lora_A.default.weight", ".lora_B.default.weight"  # how peft names them, after the layer's own name


def check(config):
    """Raise InputError where a target names no layer of the model, which is built here without its weights."""
    try:
        kind = LlamaConfig(num_hidden_layers=1) if config.model == "tiny" else AutoConfig.from_pretrained(config.model)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(kind)
    except Exception:  # whoever reads the weights says what is wrong with --model
        return
    head = model.get_output_embeddings()  # often the embeddings too
    names = [n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head]
    for target in config.lora_targets:
        if target != "all-linear" and not any(f".{name}".endswith(f".{target}") for name in names):
            known = ", ".join(dict.fromkeys(name.split(".")[-1] for name in names))
            raise InputError(f"--lora_targets {target}: expected all-linear, or some of {known}")


def adapt(model, config):
    """Freeze a model and put adapters into it, in place. As B is 0, what it computes stays the same."""
    how = LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, task_type="CAUSAL_LM",
        target_modules="all-linear" if "all-linear" in config.lora_targets else config.lora_targets,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in model.modules()),
        base_model_name_or_path=model.name_or_path,
    )  # fmt: skip
    torch.manual_seed(derive_seed(config.seed, "adapters"))
    inject_adapter_in_model(how, model)
    for p in model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data  # peft gives A and B the type of W
    how.target_modules = sorted(how.target_modules)  # of a set, whose order differs from process to process
    model.__class__ = type(type(model).__name__, (Adapted, type(model)), {"lora": how})
    model.__class__.kind = model.__class__


class Adapted:
    """What the class of a model with adapters has beside its own."""

    def off(self):
        return type(type(self).__name__, (Off,), {})(self)

    def save_pretrained(self, folder, state_dict=None, **how):
        """The model with its adapters added, and the adapters. state_dict: its weights, where they are not its own."""
        weights = state_dict or self.state_dict()
        super().save_pretrained(folder, state_dict=added(self, weights), **how)
        folder = Path(folder) / "adapter"
        self.lora.save_pretrained(folder)
        own = {f"base_model.model.{n.replace('.default', '')}": t for n, t in weights.items() if n.endswith((A, B))}
        own = {name: tensor.float().cpu().contiguous() for name, tensor in own.items()}
        save_file(own, folder / "adapter_model.safetensors", {"format": "pt"})


def added(model, weights):
    """{name: W + (α / r) B A} of a model's weights, cast once to its dtype, on the CPU: a GPU may not hold both."""
    plain, cast = {}, {}  # tied weights stay tied
    for name, w in weights.items():
        a, b = (weights.get(name.removesuffix(".base_layer.weight") + end) for end in (A, B))
        if a is not None and name.endswith(".base_layer.weight"):
            with torch.autocast(w.device.type, enabled=False):
                delta = model.lora.lora_alpha / model.lora.r * (b.float() @ a.float())  # (out, in)
            w = w.float() + (delta.T if model.lora.fan_in_fan_out else delta)
            plain[name.replace(".base_layer", "")] = w.to(model.dtype).cpu()
        elif not name.endswith((A, B)):
            plain[name.replace(".base_layer", "")] = cast.setdefault(w.data_ptr(), w.to(model.dtype).cpu())
    return plain


class Off:
    """The model without its adapters, for whoever runs it or reads its weights. It holds none of its own."""

    def __init__(self, model):
        self.model, self.layers = model, [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, *args, **kwargs):
        self.switch(True)
        try:
            return self.model(*args, **kwargs)
        finally:
            self.switch(False)

    def switch(self, off):
        for layer in self.layers:
            layer._disable_adapters = off  # peft's own method also freezes A and B, which FSDP would then keep frozen

    def parameters(self):
        """The model's, with B = 0."""
        return (torch.zeros_like(p) if name.endswith(B) else p.detach() for name, p in self.model.named_parameters())

    def state_dict(self, **how):
        return {n: torch.zeros_like(w) if n.endswith(B) else w for n, w in self.model.state_dict(**how).items()}

    def save_pretrained(self, folder, state_dict=None):
        self.model.save_pretrained(folder, state_dict=state_dict or self.state_dict())
