"""What the paper compares with: Appendix B's losses and their training loop, PURGE, and the rates that were chosen."""

TITLES = {  # every row of a table, in its order; `rej_steer` comes with `rule` and `rerule`, which start from it
    "original": "Original", "retained": "Retained",
    "ga": "GA", "gd": "GA+GDR (GD)", "kl": "GA+KLR (KL)", "po": "PO", "dpo": "DPO", "dpo_rt": "DPO-RT", "npo": "NPO",
    "npo_gdr": "NPO+GDR", "npo_klr": "NPO+KLR", "simnpo": "SimNPO", "simnpo_gdr": "SimNPO+GDR",
    "simnpo_klr": "SimNPO+KLR", "mismatch": "Mismatch", "llmu": "LLMU", "task_vector": "Task vector", "whp": "WHP",
    "flat": "FLAT", "sga": "SGA", "purge": "PURGE", "rej_steer": "Rej. Steer", "rule": "RULE", "rerule": "ReRULE",
}  # fmt: skip
METHODS = [name for name in TITLES if name not in ("original", "retained")]
ALIASES = {"ga_gdr": "gd", "ga_klr": "kl", "npo_rt": "npo_gdr"}
