"""30 % of the vision tower of the demo's teacher, three choices of heads and neurons, without training.

  for stage in score prune reconstruct evaluate; do
      vlmprune $stage --config=configs/demo_tower.py --workdir=runs/demo_tower
  done

On the test set of easy-VQA at least 99.3 % after reconstruction; docs/results.md has the table.
"""

from ml_collections import ConfigDict

from vlmprune_jax.demo.experiment import get_config as demo

RATIO = 0.1341  # of the whole model, of which the tower is 44.7 %


def get_config() -> ConfigDict:
    """The demo's data and teacher, with another stack."""
    config = demo()
    config.prune.stack = "vision"
    config.prune.method = "width"
    config.prune.ratio = RATIO
    config.reconstruct.method = "least_squares"
    config.reconstruct.batch_size = 32
    config.prune_variants = {
        "taylor": {"score": {"width": "taylor"}},
        "activation": {"score": {"width": "activation"}},
        "activation_keep": {"score": {"width": "activation"}, "prune": {"heads": "keep"}},
    }
    return config
