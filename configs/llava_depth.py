"""LLaVA-1.5-7B, layers removed by Block Influence, recovered as in the paper (arXiv 2604.24380).

  vlmprune run --config=configs/llava_depth.py:10 --workdir=runs/llava_depth_10 \
      --config.model.hf_dir=DIR/llava-1.5-7b-hf --config.data.train=DIR/llava_v1_5_mix665k.json \
      --config.data.images=DIR --config.data.eval=DIR/questions.json

The variant is the number of layers removed: 5, 10 (default), 15 or 20 of 32, the paper's nominal 15, 30, 45 and 60 %.
Its published averages for layers + fine-tuning + L2 (AVG-% over nine benchmarks): 98.10 at 15 %, 96.38 at 30 %. The
layers that its code removes first are 27, 28, 25, 29, 26, then 23, 24, 21, 22, 30.
"""

from ml_collections import ConfigDict

from vlmprune_jax.cli.config_files import experiment_config


def get_config(layers_removed: str = "10") -> ConfigDict:
    """The paper's settings (reference code: ShortGPT/, VLM/llava/train/train_pruned.py)."""
    config = experiment_config(recipe="llava")
    config.model.dtype = "bfloat16"
    config.data.fraction = 0.05
    config.data.group_by = "modality_length"
    config.data.length_buckets = (768, 1024, 1536, 2048)

    config.score.depth = "block_influence"
    config.score.samples = 50
    config.score.batch_size = 1
    config.prune.method = "depth"
    config.prune.layers_removed = int(layers_removed)

    config.recover.accumulation = 2

    config.evaluate.batch_size = 64
    config.evaluate.max_new_tokens = 16
    config.mesh.fsdp = -1
    return config
