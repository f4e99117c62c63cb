"""Qwen3.5-4B made smaller: its vocabulary, then layers, or heads and neurons, repaired, recovered and quantised.

  vlmprune run --config=configs/qwen35_4b.py:layers,0.3,gguf --workdir=runs/qwen35_layers_30 \
      --config.model.hf_dir=DIR/Qwen3.5-4B --config.data.train=DIR/llava_v1_5_mix665k.json \
      --config.data.images=DIR --config.data.eval=DIR/questions.json

Variants are METHOD,RATIO,EXPORT; RATIO is a share of all parameters, the vocabulary's rows included.
vocabulary: 65,536 of 248,320 tokens, chosen by the training records, without RATIO (`:vocabulary,gguf`).
layers: also whole layers by Block Influence, delta nets or attention; one layer of attention stays.
width: also key/value heads, key groups of delta nets and neurons by first-order Taylor importance, in all layers.
EXPORT: bf16 (default), w4a16 (vLLM, transformers) or gguf (q4_0, llama.cpp).

Least squares repairs the kept weights, then adapters and projector train on 5 % of the data (33,264 records) by SFT and
KL distillation from the unpruned model.
"""

from ml_collections import ConfigDict

from vlmprune_jax.run.cli.config_files import experiment_config
from vlmprune_jax.run.experiment.recipes import vocabulary_cut

CUTS = {
    "layers": {"method": "depth"},
    "width": {"method": "width", "selection": "local"},
}


def get_config(variant: str = "layers,0.3") -> ConfigDict:
    """Return the settings of a variant such as "vocabulary", "layers,0.3" or "width,0.3,gguf"."""
    config = experiment_config(recipe="qwen3_5")
    config.model.hf_dir = "Qwen/Qwen3.5-4B"
    config.model.dtype = "bfloat16"
    config.data.train = "data/llava_v1_5_mix665k.json"
    config.data.images = "data"
    config.update(vocabulary_cut(variant, CUTS))
    config.evaluate.batch_size = 64
    config.evaluate.max_new_tokens = 64
    config.mesh.fsdp = -1
    return config
