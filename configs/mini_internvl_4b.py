"""Mini-InternVL-Chat-4B-V1-5 pruned and recovered as in the paper (arXiv 2604.24380): all methods and ratios.

  vlmprune run --config=configs/mini_internvl_4b.py:depth,0.3 --workdir=runs/mini_internvl_4b_depth_30 \
      --config.model.hf_dir=DIR/Mini-InternVL-Chat-4B-V1-5 --config.data.train=DIR/data.json \
      --config.data.images=DIR --config.data.eval=DIR/questions.json

Variants: METHOD,RATIO. depth: whole layers by Block Influence; 0.15, 0.3, 0.45 and 0.6 remove 5, 10, 15 and 20 of
32 layers as in the paper, 14, 27, 41 and 55 % of the whole model; other ratios are shares
of the whole model.
width: heads and neurons by first-order Taylor importance, as a share of the whole model; layers 0 to 3, 30 and 31 are
not pruned. `:width,0.3,uniform` prunes all layers equally, so that stock transformers loads the model at its true size.
`:width,0.3,reconstruct` also reconstructs. docs/how-to/benchmarks.md evaluates on the paper's nine benchmarks.

data/ has the hub's internvl_1_2_finetune_custom.json and its data sets (1,110,107 records); or use a JSON Lines file or
tfds:DIR. 5 % of the data are 55,505 records. The reference code has no recovery on 5 % of these data.

The paper's AVG-% over nine benchmarks, and the compiled recovery step: memory per chip, minimum time of the run.

  variant      pruned  SFT + L2   v5e:8x8 (15.75 GiB)              v5p:2x2x2 (95.74 GiB)
  depth,0.15    90.48   (99.12)   3.34 GiB, 0.17 h, 11.0 chip-h    19.38 GiB, 0.59 h, 4.7 chip-h
  depth,0.3     57.42   (95.96)   2.82 GiB, 0.15 h, 9.6 chip-h     17.41 GiB, 0.51 h, 4.1 chip-h
  width,0.15    94.74             3.56 GiB, 0.17 h, 10.9 chip-h    20.84 GiB, 0.58 h, 4.7 chip-h
  width,0.3     73.72             3.46 GiB, 0.15 h, 9.3 chip-h     20.62 GiB, 0.50 h, 4.0 chip-h
  width,0.45            (86.22)   3.36 GiB, 0.12 h, 7.7 chip-h     20.41 GiB, 0.41 h, 3.3 chip-h
  width,0.6             (79.39)   3.25 GiB, 0.10 h, 6.1 chip-h     20.19 GiB, 0.33 h, 2.6 chip-h

In brackets: not a target, the paper's numbers are the unpruned model's nine scores times a constant. The paper scored
widths on text alone, this config on records with images.

A step has 128 rows of 4,096 tokens with 13 tiles in two micro-batches; the run is one epoch of 5 % of the data,
with all rows of that length. Higher depth ratios need less. To compile it, with a folder DIR that has a config.json:

  vlmprune plan --config=configs/mini_internvl_4b.py:depth,0.15 --topology=v5e:8x8 \
      --config.model.hf_dir=DIR --records=55505
"""

from ml_collections import ConfigDict

from vlmprune_jax.run.cli.config_files import experiment_config
from vlmprune_jax.run.experiment.recipes import paper_cut


def get_config(variant: str = "depth,0.3") -> ConfigDict:
    """Return the paper's settings (reference: ShortGPT/, LLM-Pruner/, VLM/InternVL/internvl_chat/shell/internvl1.5)."""
    config = experiment_config(recipe="internvl")
    config.model.hf_dir = "OpenGVLab/Mini-InternVL-Chat-4B-V1-5"
    config.model.dtype = "bfloat16"
    config.data.train = "data/internvl_1_2_finetune_custom.json"
    config.data.images = "data"
    config.data.fraction = 0.05
    config.data.template = "phi3-chat"
    config.data.group_by = "length"
    config.data.length_buckets = (1024, 2048, 3072, 4096)

    config.update(paper_cut(variant, attn_layers=(4, 30)))
    config.recover.accumulation = 2  # one row of 4,096 tokens on each of 64 chips

    config.evaluate.batch_size = 64
    config.evaluate.max_new_tokens = 16
    config.mesh.fsdp = -1
    return config
