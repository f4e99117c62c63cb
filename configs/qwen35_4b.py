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

from vlmprune_jax.cli.config_files import experiment_config
from vlmprune_jax.core.checks import fraction, one_of

CUTS = {
    "vocabulary": {},
    "layers": {"method": "depth"},
    "width": {"method": "width", "selection": "local"},
}
EXPORTS = {
    "bf16": {},
    "w4a16": {"quantize": "w4a16"},
    "gguf": {"format": "gguf", "quantize": "q4_0"},
}


def get_config(variant: str = "layers,0.3") -> ConfigDict:
    """Return the settings of a variant such as "vocabulary", "layers,0.3" or "width,0.3,gguf"."""
    method, *options = variant.split(",")
    one_of("method of the variant", method, tuple(CUTS))
    export = options.pop() if options and options[-1] in EXPORTS else "bf16"
    config = experiment_config(recipe="qwen3_5")
    config.model.hf_dir = "Qwen/Qwen3.5-4B"
    config.model.dtype = "bfloat16"
    config.data.train = "data/llava_v1_5_mix665k.json"
    config.data.images = "data"
    config.data.fraction = 0.05
    config.data.max_length = 2048
    config.data.length_buckets = (768, 1024, 1536, 2048)

    config.prune = {"vocabulary": {"size": 65536, "multiple": 128}, **CUTS[method]}
    if method != "vocabulary":
        config.prune.ratio = fraction("ratio of the variant", float(options[0] if options else 0.3))
        config.reconstruct.method = "least_squares"
    config.score.samples = 64
    config.recover.name = "sft_kl"
    config.recover.losses = {"ce": 0.5, "kl": 0.5, "l2": 0.0, "teacher_inputs": "own"}
    config.recover.accumulation = 2  # one row of 2,048 tokens per chip on 64 chips
    config.export = EXPORTS[export]

    config.evaluate.batch_size = 64
    config.evaluate.max_new_tokens = 64
    config.mesh.fsdp = -1
    return config
