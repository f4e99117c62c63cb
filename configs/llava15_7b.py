"""LLaVA-1.5-7B pruned and recovered as in the paper (arXiv 2604.24380): every method and ratio of its tables.

  vlmprune run --config=configs/llava15_7b.py:depth,0.3 --workdir=runs/llava15_7b_depth_30 \
      --config.model.hf_dir=DIR/llava-1.5-7b-hf --config.data.train=DIR/llava_v1_5_mix665k.json \
      --config.data.images=DIR --config.data.eval=DIR/questions.json
"""

from ml_collections import ConfigDict

from vlmprune_jax.cli.config_files import experiment_config
from vlmprune_jax.experiment.recipes import paper_cut


def get_config(variant: str = "depth,0.3") -> ConfigDict:
    """The paper's settings (reference code: ShortGPT/, LLM-Pruner/, VLM/llava/train/train_pruned.py)."""
    config = experiment_config(recipe="llava")
    config.model.hf_dir = "llava-hf/llava-1.5-7b-hf"
    config.model.dtype = "bfloat16"
    config.data.train = "data/llava_v1_5_mix665k.json"
    config.data.images = "data"
    config.data.fraction = 0.05
    config.data.group_by = "modality_length"
    config.data.length_buckets = (768, 1024, 1536, 2048)

    cut = paper_cut(variant)
    config.score = cut["score"]
    config.prune = cut["prune"]
    config.recover.accumulation = 2  # one row of 2,048 tokens on each of 64 chips

    config.evaluate.batch_size = 64
    config.evaluate.max_new_tokens = 16
    config.mesh.fsdp = -1
    return config
