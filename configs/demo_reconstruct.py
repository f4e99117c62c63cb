"""Accuracy of the demo's pruned teacher before and after reconstruction, without training, for a grid of plans.

  for stage in score prune reconstruct evaluate; do
      vlmprune $stage --config=configs/demo_reconstruct.py:heads --workdir=runs/demo_heads
  done

`heads`: four ratios, with all heads kept or with the same share of heads and neurons removed. `tower`: 30 % of the
vision tower, by three choices of criterion and heads. docs/explanation/results.md has the tables.
"""

from ml_collections import ConfigDict

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.run.cli.config_files import shipped_config

RATIOS = (0.155, 0.2, 0.25, 0.305)
TOWER = 0.1341  # 30 % of the tower, which is 44.7 % of the model


def get_config(variant: str = "heads") -> ConfigDict:
    """Return the demo's data and teacher, with other plans."""
    config = shipped_config("demo")
    config.prune.method = "width"
    config.reconstruct.method = "least_squares"
    if variant == "tower":
        config.prune.stack = "vision"
        config.prune.ratio = TOWER
        config.prune_variants = {
            "taylor": {"score": {"width": "taylor"}, "prune": {"heads": "proportional"}},
            "activation": {"score": {"width": "activation"}, "prune": {"heads": "proportional"}},
            "activation_keep": {"score": {"width": "activation"}, "prune": {"heads": "keep"}},
        }
    elif variant == "heads":
        config.evaluate.questions = 2000
        config.prune_variants = {
            f"{heads}_{1000 * ratio:.0f}": {"prune": {"ratio": ratio, "heads": heads}}
            for ratio in RATIOS
            for heads in ("keep", "proportional")
        }
    else:
        raise UserError(f"unknown variant {variant!r}: use heads or tower")
    return config
