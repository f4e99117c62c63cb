"""The whole pipeline on real data, on a CPU: easy-VQA and the teacher that ships with the package.

  vlmprune demo --workdir=runs/demo
  vlmprune run --config=demo --workdir=runs/demo          # the same
  vlmprune run --config=demo:full --workdir=runs/demo     # width without reconstruction and SFT alone as well
  vlmprune run --config=demo:quick --workdir=runs/quick   # few questions and steps, to test the installation

Two ways to prune, each with and without recovery, in one workdir; "full" adds to the same workdir.
"""

from importlib import resources

from ml_collections import ConfigDict

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.run.cli.config_files import experiment_config

VARIANTS = ("", "full", "quick")
# Share of the whole model: 6 of 10 layers, about 56 % of the decoder. With five layers removed 98.5 % of the answers
# are still right, and at half of this ratio the most accurate model was one without recovery.
RATIO = 0.305


def get_config(variant: str = "") -> ConfigDict:
    """Return the demo; "full" has all its models, "quick" few questions and training steps."""
    if variant not in VARIANTS:
        raise UserError(f"the demo has no variant {variant!r}: leave it out, or use full or quick")
    config = experiment_config()
    config.model.hf_dir = str(resources.files("vlmprune_jax") / "demo" / "teacher")

    config.data.source = "easyvqa"
    config.data.system = ""  # the teacher's chat template has no system text
    config.data.aspect_ratio = "square"
    config.data.max_length = 88
    config.data.fraction = 0.05  # 1,928 of 38,575 training questions
    config.score.samples = 64
    config.score.batch_size = config.reconstruct.batch_size = 32
    config.evaluate.batch_size = 256
    config.evaluate.max_new_tokens = 4  # every answer is one word, then the end token
    config.export.dtype = "float32"
    config.speed.rounds = 5
    config.speed.prompt_tokens, config.speed.new_tokens = 80, 32

    config.recover.trainable = "decoder"
    config.recover.epochs = 2.0
    config.recover.batch_size = 32
    config.recover.learning_rate = 1e-3
    config.recover.projector_learning_rate = 1e-3
    config.recover.remat = "none"  # memory suffices; docs/explanation/results.md is measured with this
    config.recover.log_every = 1
    config.recover.save_every = 40

    width = {"prune": {"method": "width", "ratio": RATIO}}
    config.prune_variants = {
        "depth": {"prune": {"method": "depth", "ratio": RATIO}},
        **({"width": width} if variant == "full" else {}),
        "width_reconstructed": {**width, "reconstruct": {"method": "least_squares"}},
    }
    config.recover_variants = {
        **({"sft": {"recover": {"losses": {"ce": 1.0}}}} if variant == "full" else {}),
        "sft_l2": {"recover": {"losses": {"ce": 0.5, "l2": 0.5, "l2_layers": (-1,)}}},  # the paper's alpha = 0.5
    }
    if variant == "quick":
        config.evaluate.questions = 256
        config.recover.steps, config.recover.epochs = 2, 1.0
        config.score.samples = 32
        config.reconstruct.samples = 32
    return config
