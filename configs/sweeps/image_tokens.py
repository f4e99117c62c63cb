"""Accuracy against image tokens: a small Qwen3-VL on easy-VQA at three budgets, unpruned and pruned by depth.

  python tools/pretrain.py --config=tools/pretrain_tokens.py --workdir=runs/qwen_easyvqa
  vlmprune sweep --config=configs/sweeps/image_tokens.py:runs/qwen_easyvqa/teacher --workdir=runs/image_tokens

{16, 9, 4 tokens per image} x {30, 45 % of the decoder} x {none, SFT + L2 on 5 % of the data} x 3 seeds: 36 runs.
A model is trained and evaluated at one budget and compared with the unpruned model at this budget. 1,000 questions.
"""

from ml_collections import ConfigDict
from study_easyvqa import TRAINED, WITHOUT_RECOVERY, named, of_decoder, seeded

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.run.cli.config_files import shipped_config

TOKENS, SHARES, SEEDS = (16, 9, 4), (30, 45), (1, 2, 3)
PARTS = ("score", "data", "recover")
_folder = ""


def get_config(folder: str = "") -> ConfigDict:
    """Return the demo's data with the model in `folder`."""
    global _folder
    if not folder:
        raise UserError("image_tokens.py: the model's folder is missing: use --config=sweeps/image_tokens:DIR")
    _folder = folder
    config = shipped_config("demo")
    config.model.hf_dir = folder
    config.prune_variants = config.recover_variants = {}
    config.data.max_length = None
    config.data.image_buckets = tuple(sorted(TOKENS))
    config.recover.epochs = 1.0
    config.recover.control = False  # nine more trainings
    config.evaluate.questions = 1000
    config.evaluate.unrecovered = False  # these are separate runs of the sweep
    config.speed.rounds, config.speed.prompt_tokens = 0, 32
    return config


def get_hyper(hyper):
    """Return the runs seed by seed, so that an interrupted sweep has complete tables."""
    none = {"none": WITHOUT_RECOVERY["none"]}
    trained = [hyper.named("recovery", named({"sft_l2": TRAINED["sft_l2"]})), hyper.fixed("data.fraction", 0.05)]
    cuts = [hyper.sweep("data.max_image_tokens", TOKENS), hyper.named("decoder", of_decoder(_folder, SHARES))]
    untrained = [hyper.product([*cuts, hyper.named("recovery", none), seeded(hyper, SEEDS, PARTS)])]
    return hyper.chainit(
        [*untrained, *(hyper.product([*cuts, *trained, seeded(hyper, [seed], PARTS)]) for seed in SEEDS)]
    )
