"""The whole main path on real data, on a CPU: easy-VQA and the teacher that ships in the package.

  vlmprune demo --workdir=runs/demo
  vlmprune run --config=configs/demo.py --workdir=runs/demo          # the same
  vlmprune run --config=configs/demo.py:quick --workdir=runs/quick   # a few questions and steps: does everything run?

The settings are in vlmprune_jax/demo/experiment.py, so that an installed package has them too.
"""

from vlmprune_jax.demo.experiment import get_config

__all__ = ["get_config"]
