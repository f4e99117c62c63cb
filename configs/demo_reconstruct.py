"""What reconstruction wins back of the demo's teacher without any training: a grid of cuts, each before and after it.

  for stage in score prune reconstruct evaluate; do
      vlmprune $stage --config=configs/demo_reconstruct.py:heads --workdir=runs/demo_heads
  done

`heads`: four ratios, with the heads kept and with as large a share of them gone as of neurons. `tower`: 30 % of the
vision tower, by three choices. docs/explanation/results.md has the tables.
"""

from ml_collections import ConfigDict

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.demo.experiment import get_config as demo

RATIOS = (0.155, 0.2, 0.25, 0.305)
TOWER = 0.1341  # 30 % of the tower, as a share of the whole model, of which it is 44.7 %


def get_config(variant: str = "heads") -> ConfigDict:
    """The demo's data and teacher, with other cuts."""
    config = demo()
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
        raise UserError(f"there is no variant {variant!r}: use heads or tower")
    return config
