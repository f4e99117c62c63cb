"""Study 1: pruning methods, ratios and recoveries, on the package's teacher and easy-VQA.

  vlmprune sweep --config=configs/sweeps/study_easyvqa.py --workdir=runs/study_easyvqa --jobs=2
  vlmprune sweep --config=configs/sweeps/study_easyvqa.py:untrained ...   # without training: 288 runs
  vlmprune sweep --config=configs/sweeps/study_easyvqa.py:5 ...           # also 5 % of the data; :20 adds 20 %

{depth, width, hybrid} x {15, 30, 45, 60 % of the decoder} x {none, reconstruct} with 12 seeds, as runs without training
take seconds; x {projector, SFT, SFT + KL, SFT + L2, reconstruct + SFT + L2} on 5 % of the data with 6 seeds; {depth,
width} at 60 % x {SFT + L2, reconstruct + SFT + L2} with 6 seeds more, because six decided nothing there; and SFT + L2
at 45 % on 20 and 100 % with 3 seeds: 690 runs. A seed is that of calibration, data and training. Runs share the
controls, the unpruned model after each recovery. All answer the first 2,000 test questions. An epoch of 5 % has 60
steps, of 20 % 241 and of 100 % 1,205. Cheap runs come first, then seed by seed, so that an interrupted sweep, which
continues, has complete tables.
"""

from pathlib import Path

from ml_collections import ConfigDict

from vlmprune_jax.base.checks import one_of
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.io.checkpoints.read import read_config
from vlmprune_jax.run.cli.config_files import shipped_config

METHODS = ("depth", "width", "hybrid")
SHARES = (15, 30, 45, 60)  # percent of the decoder's parameters, with embeddings and head
UNTRAINED = "untrained"
# Percent of the training data, methods, removed shares of the decoder, seeds, recoveries; cheapest first.
TRAININGS = (
    ("5", METHODS, SHARES, range(1, 7), ("projector", "sft", "sft_kl", "sft_l2", "reconstruct_sft_l2")),
    ("5", ("depth", "width"), (60,), range(7, 13), ("sft_l2", "reconstruct_sft_l2")),
    ("20", METHODS, (45,), range(1, 4), ("sft_l2",)),
    ("100", METHODS, (45,), range(1, 4), ("sft_l2",)),
)
SEEDS = tuple(range(1, 13))
RECONSTRUCTED = {"reconstruct.method": "least_squares"}
WITHOUT_RECOVERY = {
    "none": {"recover.method": "none"},
    "reconstruct": {"recover.method": "none", **RECONSTRUCTED},
}
LOSSES = {"sft": {"ce": 1.0}, "sft_kl": {"ce": 0.5, "kl": 0.5}, "sft_l2": {"ce": 0.5, "l2": 0.5}}
TRAINED = {
    "projector": {"recover.trainable": "projector", "recover.losses": LOSSES["sft"]},
    **{name: {"recover.losses": losses} for name, losses in LOSSES.items()},
    "reconstruct_sft_l2": {"recover.losses": LOSSES["sft_l2"], **RECONSTRUCTED},
}
TEACHER = shipped_config("demo").model.hf_dir
_most = "100"


def get_config(most: str = "100") -> ConfigDict:
    """Return the demo's data and training; `most` is the largest share of the data in percent, or "untrained"."""
    global _most
    _most = one_of("variant of the study", most, (UNTRAINED, *dict.fromkeys(percent for percent, *_ in TRAININGS)))
    config = shipped_config("demo")
    config.prune_variants = config.recover_variants = {}
    config.recover.epochs = 1.0
    config.recover.log_every = 20
    config.speed.rounds = 0  # parallel runs would disturb the measurement
    config.evaluate.questions = 2000
    config.evaluate.unrecovered = False  # these are separate runs of the sweep
    return config


def get_hyper(hyper):
    """Return all runs, cheapest first: without training, then by the share of the data, and by seed."""
    runs = [_cells(hyper, METHODS, SHARES, [hyper.named("recovery", WITHOUT_RECOVERY), seeded(hyper, SEEDS)])]
    for percent, methods, shares, seeds, names in () if _most == UNTRAINED else TRAININGS:
        if int(percent) > int(_most):
            continue
        recoveries = hyper.named("recovery", named({name: TRAINED[name] for name in names}))
        fraction = hyper.fixed("data.fraction", int(percent) / 100)
        runs += [_cells(hyper, methods, shares, [recoveries, fraction, seeded(hyper, [seed])]) for seed in seeds]
    return hyper.chainit(runs)


def _cells(hyper, methods, shares, more):
    cuts = [hyper.sweep("prune.method", methods), hyper.named("decoder", of_decoder(TEACHER, shares))]
    return hyper.product([*cuts, *more])


def of_decoder(folder, shares):
    """Return {percent of the decoder: prune settings with the equivalent ratio of the whole model}."""
    _, cfg = read_config(Path(folder), None)
    part = count_params(cfg, "text") / count_params(cfg)
    return {f"{share}": {"prune.ratio": round(share / 100 * part, 5)} for share in shares}


def named(recoveries):
    """Return the named recoveries of the sweep; the run's name already tells if the model is reconstructed."""
    return {
        name: {"recover.name": name.removeprefix("reconstruct_"), **settings} for name, settings in recoveries.items()
    }


def seeded(hyper, seeds, parts=("score", "reconstruct", "data", "recover")):
    """Return one sweep that sets the seeds of calibration, records, record order and adapters to equal values."""
    return hyper.zipit([hyper.sweep(f"{part}.seed", seeds) for part in parts])
