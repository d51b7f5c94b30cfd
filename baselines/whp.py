"""WHP of Appendix B: two models whose logits are combined token by token, sampled, scored and saved as one.

Covers Eq. 17, in the form of its public code, on logits; the paper's words speak of distributions."""

import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM


def interpolate(original, reinforced, alpha):
    """v_o − α·relu(v_reinforced − v_o): lower what the reinforced model raised. Logits of any shape."""
    return original - alpha * torch.relu(reinforced - original)  # Eq. 17


class Pair(torch.nn.Module):
    """What the sampler and the evaluation ask of a causal model, answered by two of them."""

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
        logits = interpolate(v_o.logits, v_r.logits, self.alpha)
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
