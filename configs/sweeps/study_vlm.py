"""Study 2: a model with a pretrained language model, and the effect of recovery on images on its language.

  vlmprune sweep --config=configs/sweeps/study_vlm.py:DIR --workdir=runs/study_vlm --jobs=2

DIR is a model that answers easy-VQA, from tools/pretrain_smollm2.py: a SmolVLM with SmolLM2-135M and the demo's tower.
{depth, width} x {15, 30, 45 % of the decoder} x {none, reconstruct, SFT + L2, reconstruct + SFT + L2} on 5 % of the
data, 3 seeds: 72 runs and 3 controls, about six hours on two cores. The projector alone, SFT and SFT + KL do not fit
into this time, nor do more seeds or shares of the data. Evaluates the answers to the first 1,000 test questions, and
perplexity on the same part of Python's language reference as study_smollm2.py; perplexity has no full score, so
averages leave it out.
"""

from ml_collections import ConfigDict
from study_easyvqa import TRAINED, WITHOUT_RECOVERY, named, of_decoder, seeded
from study_smollm2 import LETTERS, TEXTS

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.run.cli.config_files import shipped_config
from vlmprune_jax.run.demo.topics import write_topics

SHARES, SEEDS = (15, 30, 45), (1, 2, 3)
RECOVERIES = {name: TRAINED[name] for name in ("sft_l2", "reconstruct_sft_l2")}
_folder = ""


def get_config(folder: str = "") -> ConfigDict:
    """Return the demo's data with the model in `folder`."""
    global _folder
    if not folder:
        raise UserError("study_vlm.py: the model's folder is missing: use --config=configs/sweeps/study_vlm.py:DIR")
    _folder = folder
    config = shipped_config("demo")
    config.model.hf_dir = folder
    config.prune_variants = config.recover_variants = {}
    config.data.max_length = None
    config.recover.epochs = 1.0
    config.recover.learning_rate = 1e-4
    config.recover.projector_learning_rate = 1e-3
    config.evaluate.unrecovered = False
    config.evaluate.questions = 1000
    config.speed.rounds = 0
    config.evaluate.text = write_topics(TEXTS / "topics_1.txt", 1, LETTERS["text"])
    return config


def get_hyper(hyper):
    """Return the runs seed by seed, cheapest first, so that an interrupted sweep has complete tables."""
    return hyper.chainit([part for seed in SEEDS for part in _runs(hyper, seed)])


def _runs(hyper, seed):
    cuts = [hyper.sweep("prune.method", ["depth", "width"]), hyper.named("decoder", of_decoder(_folder, SHARES))]
    untrained = hyper.product([*cuts, hyper.named("recovery", WITHOUT_RECOVERY), seeded(hyper, [seed])])
    trained = [*cuts, hyper.named("recovery", named(RECOVERIES)), hyper.fixed("data.fraction", 0.05)]
    return untrained, hyper.product([*trained, seeded(hyper, [seed])])
