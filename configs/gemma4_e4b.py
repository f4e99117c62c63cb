"""Gemma 4 E4B made smaller: a vocabulary of 64k tokens, then layers or neurons, repaired, recovered and quantised.

  vlmprune run --config=configs/gemma4_e4b.py:layers,0.4,w4a16 --workdir=runs/gemma4_layers_40 \
      --config.model.hf_dir=DIR/gemma-4-E4B-it --config.data.train=DIR/llava_v1_5_mix665k.json \
      --config.data.images=DIR --config.data.eval=DIR/questions.json

Variants are METHOD,RATIO,EXPORT; RATIO is a share of all parameters, the vocabulary's rows included.
vocabulary: 65,536 of 262,144 tokens, chosen by the training records, without RATIO (`:vocabulary,gguf`).
layers: also whole layers by Block Influence; layers whose keys and values others use are kept.
neurons: also MLP neurons by first-order Taylor importance, equally in all layers, as the stock class needs.
EXPORT: bf16 (default), w4a16 (vLLM, transformers) or gguf (q4_0, llama.cpp).

Least squares repairs the kept weights, then adapters and projector train on 5 % of the data (33,264 records) by SFT and
KL distillation from the unpruned model. `--config.data.max_image_tokens=140` halves the tokens per image (280) in
training, evaluation and export. On v5e:8x8 a step of 128 rows of 2,048 tokens takes at least 0.78 s and 7.7 GiB per
chip (`layers,0.4`: 38 of 42 layers), and the epoch of 259 steps at least 0.06 hours. The next command prints these
numbers, from a folder DIR with config.json and processor_config.json (9 minutes of CPU time, 6 GB of memory):

  vlmprune plan --config=configs/gemma4_e4b.py:layers,0.4 --topology=v5e:8x8 --config.model.hf_dir=DIR --records=33264
"""

from ml_collections import ConfigDict

from vlmprune_jax.run.cli.config_files import experiment_config
from vlmprune_jax.run.experiment.recipes import vocabulary_cut

CUTS = {
    "layers": {"method": "depth"},
    "neurons": {"method": "width", "heads": "keep", "align_to": "int4"},
}


def get_config(variant: str = "layers,0.4") -> ConfigDict:
    """Return the settings of a variant such as "vocabulary", "layers,0.4" or "neurons,0.45,gguf"."""
    config = experiment_config(recipe="gemma4")
    config.model.hf_dir = "google/gemma-4-E4B-it"
    config.model.dtype = "bfloat16"
    config.data.train = "data/llava_v1_5_mix665k.json"
    config.data.images = "data"
    config.data.template = "auto"
    config.data.max_image_tokens = 280
    config.update(vocabulary_cut(variant, CUTS, ratio=0.4))
    config.evaluate.batch_size = 64
    config.evaluate.max_new_tokens = 64
    config.mesh.fsdp = -1
    return config
