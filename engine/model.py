"""Loading a model and its tokenizer, WHP's pair, uncopied keys in attention, fast CPU products, and the optimiser."""

import json
import math
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging

from baselines import losses
from config import InputError

logging.disable_progress_bar()  # ours are enough
logging.set_verbosity_error()  # what matters is told by us


def read_model(path, flag, dtype, tokenizer="", weights=True):
    """(model, or None without weights; tokenizer, of `tokenizer` if given) of a folder or id. Raises InputError."""
    own = str(path) if isinstance(path, Path) else f"--{flag} {path}"  # a run's own folder, or what a flag says
    here = f"--tokenizer {tokenizer}" if tokenizer else own
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer or path, trust_remote_code=False)  # a model takes minutes
        if tokenizer.eos_token_id is None:
            raise InputError(f"{here}: its tokenizer has no EOS token, so no answer could ever end")
        if tokenizer.chat_template:
            tokenizer.apply_chat_template([{"role": "user", "content": "Who?"}], add_generation_prompt=True)
        here = own
        if not weights:
            return None, tokenizer
        if (Path(path) / "whp.json").is_file():
            return Pair.from_pretrained(path, dtype), tokenizer
        model, found = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
        if model.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(model.config, "is_decoder", 0):
            raise InputError(f"{here}: {model.config.model_type} reads both ways; expected a causal language model")
        eos = model.generation_config.eos_token_id
        if not all(type(i) is int for i in (eos if isinstance(eos, list) else [] if eos is None else [eos])):
            raise InputError(f"{here}: its generation_config.json names no token by eos_token_id {eos!r}")
        for name, p in model.named_parameters() if own != str(path) else ():  # a run's own may have gone astray
            if not torch.stack(p.aminmax()).isfinite().all():  # in no second copy
                raise InputError(f"{here}: its weights {name} are not finite")
    except InputError:
        raise
    except Exception as error:  # OSError, ValueError, and whatever else the readers of weights and tokenizers raise
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
            reason = "the folder holds no config.json"
        raise InputError(f"{here}: is no model folder or Hugging Face id ({reason})") from None
    if found["missing_keys"]:
        raise InputError(f"{here}: its files lack weights of the model ({min(found['missing_keys'])})")
    return model, tokenizer


def grouped_sdpa(module, query, key, value, attention_mask, **how):
    """ "sdpa" for a few query tokens (N, H, W, D) of which g heads share keys (N, H/g, L, D), uncopied: the
    g heads stand beside each other as g·W tokens of one. With a mask it would else repeat all keys g times a token."""
    (n, heads, width, _), shared = query.shape, key.shape[1]
    few = attention_mask is not None and attention_mask.shape[1] == 1 and 4 * width <= key.shape[2]
    if heads == shared or not few or how.get("position_bias") is not None or torch.is_grad_enabled():
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    query, mask = query.reshape(n, shared, -1, query.shape[3]), attention_mask.repeat(1, 1, heads // shared, 1)
    out = F.scaled_dot_product_attention(query, key, value, mask, scale=how.get("scaling"))  # (N, H/g, g·W, D)
    return out.reshape(n, heads, width, -1).transpose(1, 2).contiguous(), None  # (N, W, H, D)


AttentionInterface.register("sdpa", grouped_sdpa)


@cache
def fast_products():
    """Let float32 products on the CPU come from oneDNN, and say whether they do: on AMD's twice as fast as from MKL.
    torch turns to it where bf16 may be used inside; without matrix units for bf16 a processor then computes in float32
    all the same. A product tried here tells: had it been rounded, all would stay as it was."""
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    torch.set_float32_matmul_precision("medium")
    exact = torch.backends.mkldnn.is_available() and (a @ b - a.double() @ b.double()).abs().max().item() < 1e-3
    if not exact:
        torch.set_float32_matmul_precision("highest")
    return exact


def quicken(model, device):
    """Fast products for a model on the CPU, and attention made of them: torch's fused one asks oneDNN for tiny ones."""
    if torch.device(device).type == "cpu" and fast_products():
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                part.set_attn_implementation("eager")
    return model


def optimizer_for(model, lr, weight_decay):
    """AdamW on what is not frozen; for a GPU in one pass over memory, which takes no more of it."""
    weights = [p for p in model.parameters() if p.requires_grad]
    how = {"fused": True} if getattr(model, "offloaded", False) or weights[0].device.type == "cuda" else {}
    return torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay, **how)


class Pair(torch.nn.Module):
    """WHP: what the sampler and the evaluation ask of a causal model, answered by two whose logits are combined."""

    def __init__(self, original, reinforced, alpha):
        super().__init__()
        self.original, self.reinforced, self.alpha = original, reinforced, alpha
        self.config, self.generation_config = original.config, original.generation_config
        self.get_input_embeddings, self.pair = original.get_input_embeddings, (original, reinforced)

    device = property(lambda self: self.original.device)
    dtype = property(lambda self: self.original.dtype)

    def forward(self, past_key_values=None, **inputs):
        cache_o, cache_r = past_key_values or (None, None)
        v_o = self.original(past_key_values=cache_o, **inputs)
        v_r = self.reinforced(past_key_values=cache_r, **inputs)
        logits = losses.interpolate(v_o.logits, v_r.logits, self.alpha)
        return SimpleNamespace(logits=logits, past_key_values=(v_o.past_key_values, v_r.past_key_values))

    def save_pretrained(self, folder, state_dict=(None, None)):
        """Both models in folders of their own, and α beside them in whp.json. state_dict: weights not their own."""
        for name, part, weights in zip(("original", "reinforced"), self.pair, state_dict, strict=True):
            part.save_pretrained(Path(folder) / name, state_dict=weights)
        (Path(folder) / "whp.json").write_text(json.dumps({"alpha": self.alpha}))

    @classmethod
    def from_pretrained(cls, folder, dtype):
        """Raises OSError or ValueError where the folder is not what `save_pretrained` writes."""
        alpha = json.loads((Path(folder) / "whp.json").read_text())["alpha"]
        if type(alpha) not in (float, int) or not math.isfinite(alpha):
            raise ValueError(f"whp.json: alpha is {alpha!r}, expected a number")
        folders = (Path(folder) / name for name in ("original", "reinforced"))
        load = partial(AutoModelForCausalLM.from_pretrained, dtype=dtype, trust_remote_code=False)
        return cls(*map(load, folders), alpha)
