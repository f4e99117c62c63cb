"""A small version of study 1, to test a sweep and see its tables and plots.

  vlmprune sweep --config=configs/sweeps/demo_cut.py --workdir=runs/cut --jobs=2

easy-VQA and the package's teacher: depth and width at 30 and 56 % of the decoder, with and without reconstruction,
and with a few training steps. 16 runs on 256 questions; the numbers are not meaningful.
"""

from ml_collections import ConfigDict

from vlmprune_jax.run.cli.config_files import shipped_config

RECOVERIES = {
    "none": {"recover.method": "none"},
    "reconstruct": {"recover.method": "none", "reconstruct.method": "least_squares"},
}


def get_config() -> ConfigDict:
    """Return the demo with few questions and steps, without its own variants."""
    config = shipped_config("demo:quick")
    config.prune_variants = config.recover_variants = {}
    config.evaluate.unrecovered = False  # these are separate runs of the sweep
    config.recover.losses = {"ce": 0.5, "l2": 0.5}
    config.recover.name = "sft_l2"
    return config


def get_hyper(hyper):
    """Return the runs of the sweep: every pruning combined with every recovery."""
    cuts = hyper.product(
        [
            hyper.sweep("config.prune.method", ["depth", "width"]),
            hyper.sweep("config.prune.ratio", [0.165, 0.305]),
        ]
    )
    seeds = hyper.zipit([hyper.sweep(f"config.{part}.seed", [1, 2]) for part in ("data", "recover")])
    trained = hyper.product([hyper.named("recovery", {"sft_l2": {}}), hyper.sweep("data.fraction", [0.05]), seeds])
    untrained = hyper.named("recovery", RECOVERIES)
    return hyper.product([cuts, hyper.chainit([untrained, trained])])
