"""Study 2: a vision-language model with a pretrained language model, and what recovery on images costs the language.

  vlmprune sweep --config=configs/sweeps/study_vlm.py:DIR --workdir=runs/study_vlm --jobs=2

DIR: a folder that answers easy-VQA, as configs/smollm2_vlm.py makes it: a SmolVLM of SmolLM2-135M and the demo's tower.
{depth, width} x {15, 30, 45 % of the decoder} x {none, reconstruct, projector, SFT, SFT + L2, reconstruct + SFT + L2}
on 5 % of the data, 3 seeds: 108 runs. Beside the answers each model's perplexity on English text, the part of Python's
language reference that study_smollm2.py reads; it has no full score, so averages leave it out.
"""

from ml_collections import ConfigDict
from study_easyvqa import TRAINED, UNTRAINED, named, of_decoder, seeded
from study_smollm2 import LETTERS, TEXTS

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.demo.experiment import get_config as demo
from vlmprune_jax.demo.topics import write_topics

SHARES, SEEDS = (15, 30, 45), (1, 2, 3)
RECOVERIES = {name: settings for name, settings in TRAINED.items() if name != "sft_kl"}
_folder = ""


def get_config(folder: str = "") -> ConfigDict:
    """The demo's data, with the model in a folder."""
    global _folder
    if not folder:
        raise UserError("name the model's folder: --config=configs/sweeps/study_vlm.py:DIR")
    _folder = folder
    config = demo()
    config.model.hf_dir = folder
    config.prune_variants = config.recover_variants = {}
    config.data.max_length = None
    config.recover.epochs = 1.0
    config.recover.learning_rate = 1e-4
    config.recover.projector_learning_rate = 1e-3
    config.evaluate.unrecovered = False
    config.speed.rounds = 0
    config.evaluate.text = write_topics(TEXTS / "topics_1.txt", 1, LETTERS["text"])
    return config


def get_hyper(hyper):
    """Seed after seed, each with what costs least first: an interrupted sweep has whole tables."""
    return hyper.chainit([part for seed in SEEDS for part in _runs(hyper, seed)])


def _runs(hyper, seed):
    cuts = [hyper.sweep("prune.method", ["depth", "width"]), hyper.named("decoder", of_decoder(_folder, SHARES))]
    untrained = hyper.product([*cuts, hyper.named("recovery", UNTRAINED), seeded(hyper, [seed])])
    trained = [*cuts, hyper.named("recovery", named(RECOVERIES)), hyper.fixed("data.fraction", 0.05)]
    return untrained, hyper.product([*trained, seeded(hyper, [seed])])
