"""Mini-InternVL-Chat-4B-V1-5, layers removed by Block Influence, recovered as in the paper (arXiv 2604.24380).

  vlmprune run --config=configs/internvl_depth.py:10 --workdir=runs/internvl_depth_10 \
      --config.model.hf_dir=DIR/Mini-InternVL-Chat-4B-V1-5 --config.data.train=DIR/records.jsonl \
      --config.data.images=DIR --config.data.eval=DIR/questions.json

The variant is the number of layers removed: 5, 10 (default), 15 or 20 of 32, the paper's nominal 15, 30, 45 and 60 %.
Its published average for layers + fine-tuning + L2 (AVG-% over nine benchmarks) at 15 % is 99.12; that at 30 % is one
constant times the original's scores and no target.
"""

from ml_collections import ConfigDict

from vlmprune_jax.cli.config_files import experiment_config


def get_config(layers_removed: str = "10") -> ConfigDict:
    """The paper's settings (reference code: ShortGPT/, VLM/InternVL/internvl_chat/shell/internvl1.5/slurm)."""
    config = experiment_config(recipe="internvl")
    config.model.dtype = "bfloat16"
    config.data.fraction = 0.05
    config.data.group_by = "length"
    config.data.length_buckets = (1024, 2048, 3072, 4096)

    config.score.depth = "block_influence"
    config.score.samples = 50
    config.score.batch_size = 1
    config.prune.method = "depth"
    config.prune.layers_removed = int(layers_removed)

    config.recover.accumulation = 4

    config.evaluate.batch_size = 64
    config.evaluate.max_new_tokens = 16
    config.mesh.fsdp = -1
    return config
