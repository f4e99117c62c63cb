"""Bunny-v1.0-3B, layers removed by Block Influence, recovered as in the paper (arXiv 2604.24380).

  vlmprune run --config=configs/bunny_depth.py:10 --workdir=runs/bunny_depth_10 \
      --config.model.hf_dir=DIR/Bunny-v1_0-3B --config.data.train=DIR/bunny_695k.json \
      --config.data.images=DIR --config.data.eval=DIR/questions.json

The variant is the number of layers removed: 5, 10 (default), 15 or 20 of 32, the paper's nominal 15, 30, 45 and 60 %.
Its published averages for layers + fine-tuning + L2 (AVG-% over nine benchmarks): 98.98 at 15 %, 94.37 at 30 %.
"""

from ml_collections import ConfigDict

from vlmprune_jax.cli.config_files import experiment_config


def get_config(layers_removed: str = "10") -> ConfigDict:
    """The paper's settings (reference code: ShortGPT/, VLM/bunny/train/train_pruned.py)."""
    config = experiment_config(recipe="bunny")
    config.model.dtype = "bfloat16"
    config.data.fraction = 0.05

    config.score.depth = "block_influence"
    config.score.samples = 50
    config.score.batch_size = 1
    config.prune.method = "depth"
    config.prune.layers_removed = int(layers_removed)

    config.evaluate.batch_size = 64
    config.evaluate.max_new_tokens = 16
    config.mesh.fsdp = -1
    return config
