"""Study 1 in small: does everything of a sweep run, and what do its tables and plots look like?

  vlmprune sweep --config=configs/sweeps/demo_cut.py --workdir=runs/cut --jobs=2

easy-VQA and the package's teacher: depth and width at 30 and 56 % of the decoder, with and without reconstruction,
and a few steps of training. 10 runs on 256 questions; the numbers mean little.
"""

from ml_collections import ConfigDict

from vlmprune_jax.demo.experiment import get_config as demo

RECOVERIES = {
    "none": {"recover.method": "none"},
    "reconstruct": {"recover.method": "none", "reconstruct.method": "least_squares"},
}


def get_config() -> ConfigDict:
    """The demo with few questions and steps, without its own grid."""
    config = demo("quick")
    config.prune_variants = config.recover_variants = {}
    config.evaluate.unrecovered = False  # a run of its own
    config.recover.losses = {"ce": 0.5, "l2": 0.5}
    config.recover.name = "sft_l2"
    return config


def get_hyper(hyper):
    """Every cut with every way to make it good."""
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
