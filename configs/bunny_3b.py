"""Bunny-v1.0-3B pruned and recovered as in the paper (arXiv 2604.24380): every method and ratio of its tables.

  vlmprune run --config=configs/bunny_3b.py:depth,0.3 --workdir=runs/bunny_3b_depth_30 \
      --config.model.hf_dir=DIR/Bunny-v1_0-3B --config.data.train=DIR/bunny_695k.json \
      --config.data.images=DIR --config.data.eval=DIR/questions.json
"""

from ml_collections import ConfigDict

from vlmprune_jax.cli.config_files import experiment_config
from vlmprune_jax.experiment.recipes import paper_cut


def get_config(variant: str = "depth,0.3") -> ConfigDict:
    """The paper's settings (reference code: ShortGPT/, LLM-Pruner/, VLM/bunny/train/train_pruned.py)."""
    config = experiment_config(recipe="bunny")
    config.model.hf_dir = "BAAI/Bunny-v1_0-3B"
    config.model.dtype = "bfloat16"
    config.data.train = "data/bunny_695k.json"
    config.data.images = "data/images"
    config.data.fraction = 0.05
    config.data.group_by = "modality_length"
    config.data.length_buckets = (1024, 1536, 2048)

    cut = paper_cut(variant, longest_text=64)
    config.score = cut["score"]
    config.prune = cut["prune"]
    config.recover.accumulation = 2  # one row of 2,048 tokens on each of 64 chips

    config.evaluate.batch_size = 64
    config.evaluate.max_new_tokens = 16
    config.mesh.fsdp = -1
    return config
