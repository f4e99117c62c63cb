"""vlmprune inspect HF_DIR: print a model's family, layout, shapes and size, what can be pruned and where it loads.

Reads configs and tensor headers only. --config=FILE.py makes the model families that the file registers available.
"""

from __future__ import annotations

from typing import Any

from absl import flags as absl_flags

from vlmprune_jax.run.cli.flags import Flags, config_flag

TAKES_ARGUMENTS = True


def define(values: Flags) -> None:
    """Define the command-line flags of `vlmprune inspect`."""
    config_flag(values)
    absl_flags.DEFINE_string("vision_dir", None, "vision tower folder (original LLaVA, Bunny)", flag_values=values)
    absl_flags.DEFINE_bool("json", False, "machine-readable output", flag_values=values)


def run(flags: Any) -> None:
    """Print a model's family, layer shapes and prunable share of parameters (`vlmprune inspect`)."""
    import json

    from vlmprune_jax.base.errors import UserError
    from vlmprune_jax.io.exports.describe import as_lines, describe

    if len(flags.args) != 1:
        raise UserError("inspect takes one folder: vlmprune inspect HF_DIR")
    found = describe(flags.args[0], flags.vision_dir)
    print(json.dumps(found, indent=2) if flags.json else "\n".join(as_lines(found)))
