"""vlmprune recommend --model=DIR --ratio=0.3 [--data=5%] [--compute=full]: recommend a pruning method and recovery.

Uses the guide of arXiv 2604.24380 and measurements; reads no weights.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.run.cli.flags import Flags, parse_bytes, parse_share


def define(values: Flags) -> None:
    """Define the command-line flags of `vlmprune recommend`."""
    text = absl_flags.DEFINE_string
    text("model", None, "Hugging Face folder or hub id of the model to prune", flag_values=values)
    text("vision_dir", None, "vision tower folder (original LLaVA, Bunny)", flag_values=values)
    text("ratio", None, "share of all parameters to remove, as 0.3 or 30%", flag_values=values)
    text("bytes", None, "maximum size of the bfloat16 weights, instead of --ratio: 2e9, 2GB, 2GiB", flag_values=values)
    text("data", None, "share of the training data to use at most, as 5%, 0.05 or none", flag_values=values)
    text("compute", "full", "parameters you can train: none, projector, or full (LoRA + teacher)", flag_values=values)
    absl_flags.DEFINE_bool("speed", False, "prefer pruning that speeds up decoding", flag_values=values)
    text("train", None, "value of data.train in the config, whose records are counted", flag_values=values)
    for name in ("images", "eval"):
        text(name, None, f"value of data.{name} in the config", flag_values=values)
    text("guide", None, "guide file with your own measurements", flag_values=values)
    text("save", None, "output file FILE.yaml for the config", flag_values=values)


def run(flags: Any) -> None:
    """Print a recommended pruning method and recovery, and the command that follows it; write its config to a file."""
    from vlmprune_jax.base.console import make_reporter
    from vlmprune_jax.run.planning.guide import FILE, read_guide
    from vlmprune_jax.run.planning.recommend import PLACEHOLDERS, advise
    from vlmprune_jax.run.report.advice import tell

    if not flags.model:
        raise UserError("no model given: add --model=DIR")
    guide = read_guide(Path(flags.guide or FILE))
    given = [shlex.quote(flags[name].serialize()) for name in flags if flags[name].present]
    advice = advise(
        flags.model, vision_dir=flags.vision_dir,
        ratio=None if flags.ratio is None else parse_share("ratio", flags.ratio),
        most_bytes=None if flags.bytes is None else parse_bytes(flags.bytes),
        data_fraction=None if flags.data is None else parse_share("data", flags.data),
        compute=flags.compute, speed=flags.speed,
        files={name: flags[name].value for name in PLACEHOLDERS if flags[name].value},
        guide=guide,
    )  # fmt: skip
    tell(advice, guide, flags.save, given, make_reporter(True))
