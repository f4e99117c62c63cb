"""Study 1: pruning methods, ratios and recoveries, on the package's teacher and easy-VQA.

  vlmprune sweep --config=configs/sweeps/study_easyvqa.py --workdir=runs/study_easyvqa --jobs=2
  vlmprune sweep --config=configs/sweeps/study_easyvqa.py:5 ...       # 5 % of the data only; :20 adds 20 %
  vlmprune sweep --config=configs/sweeps/study_easyvqa.py:small ...   # 5 % without hybrid and 60 %: 126 runs

{depth, width, hybrid} x {15, 30, 45, 60 % of the decoder} x {none, reconstruct; projector, SFT, SFT + KL, SFT + L2,
reconstruct + SFT + L2, each on 5, 20 and 100 % of the data}, 3 seeds of calibration, data and training: 612 runs with 9
scorings, 36 plans and 36 reconstructions. One epoch takes 60 steps of 5 %, 241 of 20 % and 1,205 of 100 % of the data.
Cheap runs come first, and an interrupted sweep continues. The first run of 5 %, including scoring and the teacher's
answers that other runs share, took 87 s of CPU time.
"""

from pathlib import Path

from ml_collections import ConfigDict

from vlmprune_jax.cli.config_files import shipped_config
from vlmprune_jax.hf.read import read_config
from vlmprune_jax.models.params import count_params

METHODS = ("depth", "width", "hybrid")
SHARES = (15, 30, 45, 60)  # percent of the decoder's parameters, with embeddings and head
FRACTIONS = (5, 20, 100)  # percent of the training data
SEEDS = (1, 2, 3)
RECONSTRUCTED = {"reconstruct.method": "least_squares"}
# Speed depends only on shapes, so it is measured once per plan, without recovery; use --jobs=1 for exact numbers.
WITHOUT_RECOVERY = {
    "none": {"recover.method": "none", "speed.rounds": 5},
    "reconstruct": {"recover.method": "none", **RECONSTRUCTED},
}
LOSSES = {"sft": {"ce": 1.0}, "sft_kl": {"ce": 0.5, "kl": 0.5}, "sft_l2": {"ce": 0.5, "l2": 0.5}}
TRAINED = {
    "projector": {"recover.trainable": "projector", "recover.losses": LOSSES["sft"]},
    **{name: {"recover.losses": losses} for name, losses in LOSSES.items()},
    "reconstruct_sft_l2": {"recover.losses": LOSSES["sft_l2"], **RECONSTRUCTED},
}
TEACHER = shipped_config("demo").model.hf_dir
SMALL = "small"
_most, _small = FRACTIONS[-1], False


def get_config(most: str = "100") -> ConfigDict:
    """Return the demo's data and training; `most` is the largest share of the data in percent, or "small"."""
    global _most, _small
    _small = most == SMALL
    _most = FRACTIONS[0] if _small else int(most)
    config = shipped_config("demo")
    config.prune_variants = config.recover_variants = {}
    config.recover.epochs = 1.0
    config.recover.log_every = 20
    config.speed.rounds = 0
    config.evaluate.unrecovered = False  # these are separate runs of the sweep
    return config


def get_hyper(hyper):
    """Return all runs, cheapest first: without training, then by the share of the data."""
    methods, shares = (METHODS[:2], SHARES[:3]) if _small else (METHODS, SHARES)
    cuts = [hyper.sweep("prune.method", methods), hyper.named("decoder", of_decoder(TEACHER, shares))]
    seeds = seeded(hyper, SEEDS)
    untrained = hyper.product([*cuts, hyper.named("recovery", WITHOUT_RECOVERY), seeds])
    trained = [
        hyper.product(
            [*cuts, hyper.named("recovery", named(TRAINED)), hyper.fixed("data.fraction", share / 100), seeds]
        )
        for share in FRACTIONS
        if share <= _most
    ]
    return hyper.chainit([untrained, *trained])


def of_decoder(folder, shares):
    """Return percent of the decoder -> the settings with that ratio of the whole model."""
    _, cfg = read_config(Path(folder), None)
    part = count_params(cfg, "text") / count_params(cfg)
    return {f"{share}": {"prune.ratio": round(share / 100 * part, 5)} for share in shares}


def named(recoveries):
    """Return the recoveries with their names in tables, where reconstruction is already in the run's name."""
    return {
        name: {"recover.name": name.removeprefix("reconstruct_"), **settings} for name, settings in recoveries.items()
    }


def seeded(hyper, seeds):
    """Return one sweep over the seeds of calibration, records, order and adapters together."""
    parts = ("score", "reconstruct", "data", "recover")
    return hyper.zipit([hyper.sweep(f"{part}.seed", seeds) for part in parts])
