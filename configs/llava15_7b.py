"""LLaVA-1.5-7B pruned and recovered as in the paper (arXiv 2604.24380): all methods and ratios of its tables.

  vlmprune run --config=configs/llava15_7b.py:depth,0.3 --workdir=runs/llava15_7b_depth_30 \
      --config.model.hf_dir=DIR/llava-1.5-7b-hf --config.data.train=DIR/llava_v1_5_mix665k.json \
      --config.data.images=DIR --config.data.eval=DIR/questions.json

Variants: METHOD,RATIO. depth: whole layers by Block Influence; 0.15, 0.3, 0.45 and 0.6 remove 5, 10, 15 and 20 of
32 layers as in the paper, 14, 29, 43 and 57 % of the whole model; other ratios are shares
of the whole model.
width: heads and neurons by first-order Taylor importance, as a share of the whole model; layers 0 to 2 and 31 are not
pruned. `:width,0.3,uniform` prunes all layers equally, so that stock transformers loads the model at its true size.
`:width,0.3,reconstruct` also reconstructs. docs/how-to/benchmarks.md evaluates on the paper's nine benchmarks.

data/ has llava_v1_5_mix665k.json and the folders of its images (coco, gqa, ocr_vqa, textvqa, vg); or set
--config.data.train=tfds:DIR. 5 % of the data are 33,264 records. docs/how-to/run-on-a-pod.md is the walkthrough.

The paper's AVG-% over nine benchmarks, and the compiled recovery step: memory per chip, minimum time of the run.

  variant      pruned  SFT + L2   v5e:8x8 (15.75 GiB)              v5p:2x2x2 (95.74 GiB)
  depth,0.15    72.22     98.10   6.27 GiB, 0.08 h, 5.0 chip-h     19.70 GiB, 0.27 h, 2.2 chip-h
  depth,0.3     69.18     96.38   5.40 GiB, 0.07 h, 4.4 chip-h     16.41 GiB, 0.23 h, 1.9 chip-h
  width,0.15    90.87             6.47 GiB, 0.08 h, 5.0 chip-h     22.75 GiB, 0.27 h, 2.2 chip-h
  width,0.3     79.88             5.28 GiB, 0.07 h, 4.3 chip-h     21.63 GiB, 0.23 h, 1.9 chip-h
  width,0.45              83.99   4.42 GiB, 0.06 h, 3.6 chip-h     19.30 GiB, 0.19 h, 1.6 chip-h
  width,0.6               78.13   3.72 GiB, 0.05 h, 2.9 chip-h     17.64 GiB, 0.16 h, 1.3 chip-h

A step has 128 rows of 2,048 tokens with an image in two micro-batches; the run is one epoch of 5 % of the data,
with all rows of that length. Higher depth ratios need less. To compile it, with a folder DIR that has a config.json:

  vlmprune plan --config=configs/llava15_7b.py:depth,0.15 --topology=v5e:8x8 \
      --config.model.hf_dir=DIR --records=33264
"""

from ml_collections import ConfigDict

from vlmprune_jax.run.cli.config_files import experiment_config
from vlmprune_jax.run.experiment.recipes import paper_cut


def get_config(variant: str = "depth,0.3") -> ConfigDict:
    """Return the paper's settings (reference code: ShortGPT/, LLM-Pruner/, VLM/llava/train/train_pruned.py)."""
    config = experiment_config(recipe="llava")
    config.model.hf_dir = "llava-hf/llava-1.5-7b-hf"
    config.model.dtype = "bfloat16"
    config.data.train = "data/llava_v1_5_mix665k.json"
    config.data.images = "data"
    config.data.fraction = 0.05
    config.data.group_by = "modality_length"
    config.data.length_buckets = (768, 1024, 1536, 2048)

    config.update(paper_cut(variant))
    config.recover.accumulation = 2  # one row of 2,048 tokens per chip on 64 chips

    config.evaluate.batch_size = 64
    config.evaluate.max_new_tokens = 16
    config.mesh.fsdp = -1
    return config
