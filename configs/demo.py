"""The whole pipeline on real data, on a CPU: easy-VQA and the teacher that ships with the package.

  vlmprune demo --workdir=runs/demo
  vlmprune run --config=configs/demo.py --workdir=runs/demo          # the same
  vlmprune run --config=configs/demo.py:quick --workdir=runs/quick   # few questions and steps, to test the installation

The settings are in vlmprune_jax/demo/experiment.py, so that an installed package has them too.
"""

from vlmprune_jax.demo.experiment import get_config

__all__ = ["get_config"]
