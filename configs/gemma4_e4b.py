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

from vlmprune_jax.cli.config_files import experiment_config
from vlmprune_jax.core.checks import fraction, one_of

CUTS = {
    "vocabulary": {},
    "layers": {"method": "depth"},
    "neurons": {"method": "width", "heads": "keep", "align_to": "int4"},
}
EXPORTS = {
    "bf16": {},
    "w4a16": {"quantize": "w4a16"},
    "gguf": {"format": "gguf", "quantize": "q4_0"},
}


def get_config(variant: str = "layers,0.4") -> ConfigDict:
    """Return the settings of a variant such as "vocabulary", "layers,0.4" or "neurons,0.45,gguf"."""
    method, *options = variant.split(",")
    one_of("method of the variant", method, tuple(CUTS))
    export = options.pop() if options and options[-1] in EXPORTS else "bf16"
    config = experiment_config(recipe="gemma4")
    config.model.hf_dir = "google/gemma-4-E4B-it"
    config.model.dtype = "bfloat16"
    config.data.train = "data/llava_v1_5_mix665k.json"
    config.data.images = "data"
    config.data.template = "auto"
    config.data.fraction = 0.05
    config.data.max_length = 2048
    config.data.length_buckets = (768, 1024, 1536, 2048)
    config.data.max_image_tokens = 280

    config.prune = {"vocabulary": {"size": 65536, "multiple": 128}, **CUTS[method]}
    if method != "vocabulary":
        config.prune.ratio = fraction("ratio of the variant", float(options[0] if options else 0.4))
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
