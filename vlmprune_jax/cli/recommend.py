"""vlmprune recommend --model=DIR --ratio=0.3 [--data=5%] [--compute=full]: recommend a pruning method and recovery.

Uses the guide of arXiv 2604.24380 and measurements; reads no weights. --for=GOAL --on=MACHINE compares methods.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from vlmprune_jax.cli.flags import Flags


def define(values: Flags) -> None:
    """Define the command-line flags of `vlmprune recommend`."""
    text = absl_flags.DEFINE_string
    text("model", None, "Hugging Face folder or hub id of the model to prune", flag_values=values)
    text("vision_dir", None, "vision tower folder (original LLaVA, Bunny)", flag_values=values)
    text("ratio", None, "share of all parameters to remove, as 0.3 or 30%", flag_values=values)
    text("bytes", None, "maximum size of the bfloat16 weights, instead of --ratio: 2e9, 2GB, 2GiB", flag_values=values)
    text("data", "5%", "share of the training data that you have, as 5%, 0.05 or none", flag_values=values)
    text("compute", "full", "parameters you can train: none, projector, or full (LoRA + teacher)", flag_values=values)
    absl_flags.DEFINE_bool("speed", False, "prefer pruning that speeds up decoding", flag_values=values)
    text("for", None, "goal: compare methods by memory, decode, question, throughput or energy", flag_values=values)
    text("on", "v5e:2x4", "machine for --for: a TPU slice (estimated) or llama.cpp (measured)", flag_values=values)
    for name in ("train", "images", "eval"):
        text(name, None, f"value of data.{name} in the config", flag_values=values)
    text("bench", None, "file of `vlmprune bench --json=FILE`, whose speeds are printed too", flag_values=values)
    text("guide", None, "guide file with your own measurements", flag_values=values)
    text("save", None, "output file FILE.py for the config", flag_values=values)
    absl_flags.DEFINE_bool("evidence", False, "print all evidence and the config as well", flag_values=values)


def run(flags: Any) -> None:
    """Print a recommended pruning method and recovery, and the command that follows it; write its config to a file."""
    from vlmprune_jax.core.console import make_reporter
    from vlmprune_jax.core.errors import UserError
    from vlmprune_jax.planning.guide import FILE, read_guide
    from vlmprune_jax.planning.recommend import PLACEHOLDERS, advise, parse_bytes, parse_share
    from vlmprune_jax.report.advice import tell, tell_goal

    if not flags.model:
        raise UserError("no model given: add --model=DIR")
    reporter, most_bytes = make_reporter(True), None if flags.bytes is None else parse_bytes(flags.bytes)
    ratio = None if flags.ratio is None else parse_share("ratio", flags.ratio)
    if flags["for"].value:
        tell_goal(flags.model, flags["for"].value, flags.on, flags.vision_dir, ratio, flags.guide, reporter)
    if flags["for"].value and ratio is most_bytes is None:
        return
    given = [shlex.quote(flags[name].serialize()) for name in flags if flags[name].present and name != "evidence"]
    advice = advise(
        flags.model, vision_dir=flags.vision_dir, ratio=ratio, most_bytes=most_bytes,
        data_fraction=parse_share("data", flags.data), compute=flags.compute, speed=flags.speed,
        files={name: flags[name].value for name in PLACEHOLDERS if flags[name].value},
        bench=Path(flags.bench) if flags.bench else None, guide=read_guide(Path(flags.guide or FILE)),
    )  # fmt: skip
    tell(advice, flags.save, given, flags.evidence, reporter)
