"""Qwen3-VL-8B with layers removed and recovered, to compare with INTERLACE (92.1 % retained after 5 of 36 layers).

  vlmprune run --config=configs/qwen3vl_8b.py:depth,5layers --workdir=runs/qwen3vl_8b \
      --config.model.hf_dir=DIR/Qwen3-VL-8B-Instruct --config.data.train=DIR/data.json --config.data.images=DIR

Variants are those of configs/llava15_7b.py: `depth,5layers`, `depth,0.2`, `width,0.2`, with the options `uniform`
and `reconstruct`. Layers 0 to 2 receive features of the tower (deepstack) and are kept; widths of layers 0 to 3 and 35
are not pruned.

INTERLACE trained on 240,000 records. Use as many, or 5 % of LLaVA's mix (33,264) as the paper does.
docs/how-to/benchmarks.md evaluates on the benchmarks.

A step has 128 rows of 2,048 tokens, images of up to 1,280 tokens, in two micro-batches. On v5e:8x8 it takes at least
1.33 s and 8.5 GiB per chip (`depth,5layers`), so an epoch of 33,264 records takes at least 0.10 hours. To compile it:

  vlmprune plan --config=configs/qwen3vl_8b.py:depth,5layers --topology=v5e:8x8 \
      --config.model.hf_dir=DIR --records=33264
"""

from ml_collections import ConfigDict

from vlmprune_jax.run.cli.config_files import experiment_config
from vlmprune_jax.run.experiment.recipes import paper_cut


def get_config(variant: str = "depth,5layers") -> ConfigDict:
    """Return the settings of a comparison at equal layers removed."""
    config = experiment_config(recipe="qwen3_vl")
    config.model.hf_dir = "Qwen/Qwen3-VL-8B-Instruct"
    config.model.dtype = "bfloat16"
    config.data.train = "data/llava_v1_5_mix665k.json"
    config.data.images = "data"
    config.data.fraction = 0.05
    config.data.max_length = 2048
    config.data.group_by = "modality_length"
    config.data.length_buckets = (768, 1024, 1536, 2048)
    config.update(paper_cut(variant, attn_layers=(4, 35), mlp_layers=(4, 35)))
    config.recover.accumulation = 2  # one row of 2,048 tokens per chip on 64 chips
    config.evaluate.batch_size = 64
    config.evaluate.max_new_tokens = 16
    config.mesh.fsdp = -1
    return config
