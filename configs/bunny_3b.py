"""Bunny-v1.0-3B pruned and recovered as in the paper (arXiv 2604.24380): all methods and ratios of its tables.

  vlmprune run --config=configs/bunny_3b.py:depth,0.3 --workdir=runs/bunny_3b_depth_30 \
      --config.model.hf_dir=DIR/Bunny-v1_0-3B --config.data.train=DIR/bunny_695k.json \
      --config.data.images=DIR --config.data.eval=DIR/questions.json

Variants: METHOD,RATIO. depth: whole layers by Block Influence; 0.15, 0.3, 0.45 and 0.6 remove 5, 10, 15 and 20 of
32 layers as in the paper, 12, 25, 37 and 49 % of the whole model; other ratios are shares
of the whole model.
width: heads and neurons by first-order Taylor importance, as a share of the whole model; layers 0 to 2 and 31 are not
pruned. `:width,0.3,uniform` prunes all layers equally, so that stock transformers loads the model at its true size.
`:width,0.3,reconstruct` also reconstructs. docs/how-to/benchmarks.md evaluates on the paper's nine benchmarks.

data/ has bunny_695k.json and images/; or set --config.data.train=tfds:DIR. 5 % of the data are 34,749 records.

The paper's AVG-% over nine benchmarks, and the compiled recovery step: memory per chip, minimum time of the run.

  variant      pruned  SFT + L2   v5e:8x8 (15.75 GiB)              v5p:2x2x2 (95.74 GiB)
  depth,0.15    88.84     98.98   4.14 GiB, 0.03 h, 2.2 chip-h     12.57 GiB, 0.12 h, 1.0 chip-h
  depth,0.3     69.03     94.37   3.55 GiB, 0.03 h, 1.9 chip-h     11.16 GiB, 0.10 h, 0.8 chip-h
  width,0.15    90.87             4.10 GiB, 0.03 h, 2.2 chip-h     14.32 GiB, 0.12 h, 0.9 chip-h
  width,0.3     75.58             3.46 GiB, 0.03 h, 1.8 chip-h     13.41 GiB, 0.10 h, 0.8 chip-h
  width,0.45              90.48   2.97 GiB, 0.02 h, 1.5 chip-h     11.95 GiB, 0.08 h, 0.6 chip-h
  width,0.6               83.86   2.51 GiB, 0.02 h, 1.1 chip-h     11.06 GiB, 0.06 h, 0.5 chip-h

A step has 128 rows of 2,048 tokens with an image in two micro-batches; the run is one epoch of 5 % of the data,
with all rows of that length. Higher depth ratios need less. To compile it, with a folder DIR that has a config.json:

  vlmprune plan --config=configs/bunny_3b.py:depth,0.15 --topology=v5e:8x8 \
      --config.model.hf_dir=DIR --records=34749
"""

from ml_collections import ConfigDict

from vlmprune_jax.run.cli.config_files import experiment_config
from vlmprune_jax.run.experiment.recipes import paper_cut


def get_config(variant: str = "depth,0.3") -> ConfigDict:
    """Return the paper's settings (reference code: ShortGPT/, LLM-Pruner/, VLM/bunny/train/train_pruned.py)."""
    config = experiment_config(recipe="bunny")
    config.model.hf_dir = "BAAI/Bunny-v1_0-3B"
    config.model.dtype = "bfloat16"
    config.data.train = "data/bunny_695k.json"
    config.data.images = "data/images"
    config.data.fraction = 0.05
    config.data.group_by = "modality_length"
    config.data.length_buckets = (1024, 1536, 2048)

    config.update(paper_cut(variant, longest_text=64))
    config.recover.accumulation = 2  # one row of 2,048 tokens per chip on 64 chips

    config.evaluate.batch_size = 64
    config.evaluate.max_new_tokens = 16
    config.mesh.fsdp = -1
    return config
