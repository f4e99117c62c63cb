"""Mini-InternVL-Chat-4B-V1-5 pruned and recovered as in the paper (arXiv 2604.24380): every method and ratio of it.

  vlmprune run --config=configs/mini_internvl_4b.py:depth,0.3 --workdir=runs/mini_internvl_4b_depth_30 \
      --config.model.hf_dir=DIR/Mini-InternVL-Chat-4B-V1-5 --config.data.train=DIR/data.json \
      --config.data.images=DIR --config.data.eval=DIR/questions.json
"""

from ml_collections import ConfigDict

from vlmprune_jax.cli.config_files import experiment_config
from vlmprune_jax.experiment.recipes import paper_cut


def get_config(variant: str = "depth,0.3") -> ConfigDict:
    """The paper's settings (reference code: ShortGPT/, LLM-Pruner/, VLM/InternVL/internvl_chat/shell/internvl1.5)."""
    config = experiment_config(recipe="internvl")
    config.model.hf_dir = "OpenGVLab/Mini-InternVL-Chat-4B-V1-5"
    config.model.dtype = "bfloat16"
    config.data.train = "data/internvl_1_2_finetune_custom.json"
    config.data.images = "data"
    config.data.fraction = 0.05
    config.data.group_by = "length"
    config.data.length_buckets = (1024, 2048, 3072, 4096)

    cut = paper_cut(variant, attn_layers=(4, 30))
    config.score = cut["score"]
    config.prune = cut["prune"]
    config.recover.accumulation = 2  # one row of 4,096 tokens on each of 64 chips

    config.evaluate.batch_size = 64
    config.evaluate.max_new_tokens = 16
    config.mesh.fsdp = -1
    return config
