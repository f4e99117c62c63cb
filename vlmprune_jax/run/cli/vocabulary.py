"""vlmprune vocabulary --model=DIR --sources=FILE,... --sizes=16k,32k: print what smaller vocabularies save and cost.

Writes no files. Flags are settings of prune.vocabulary (`vlmprune help prune.vocabulary`).
  vlmprune vocabulary --model=DIR --sources=train.json,captions.txt --sizes=16k,32k,64k --multiple=128
"""

from __future__ import annotations

from typing import Any

from absl import flags as absl_flags

from vlmprune_jax.base.settings import settings_of
from vlmprune_jax.core.prune.config import VocabularyConfig
from vlmprune_jax.run.cli.flags import Flags


def define(values: Flags) -> None:
    """Define the command-line flags of `vlmprune vocabulary`."""
    text, several = absl_flags.DEFINE_string, absl_flags.DEFINE_list
    text("model", None, "Hugging Face folder or hub id of the model", flag_values=values)
    text("vision_dir", None, "vision tower folder (original LLaVA, Bunny)", flag_values=values)
    several("sources", [], "files with texts whose tokens are kept", flag_values=values)
    several("held_out", [], "files with texts to measure (default: a tenth of the sources)", flag_values=values)
    several("sizes", ["16k", "32k", "64k"], "numbers of tokens, as 16384 or 16k (x 1,024)", flag_values=values)
    multiple = settings_of(VocabularyConfig())["multiple"].default
    about = "round each size up to a multiple of this number"
    absl_flags.DEFINE_integer("multiple", multiple, about, lower_bound=1, flag_values=values)


def run(flags: Any) -> None:
    """Print a table of vocabulary sizes (parameters and bytes saved, extra tokens per text) and how to apply one."""
    from pathlib import Path

    from vlmprune_jax.base.console import make_reporter
    from vlmprune_jax.base.errors import UserError
    from vlmprune_jax.io.checkpoints.read import read_config, resolve
    from vlmprune_jax.run.stages.vocabulary import parse_size, trade

    if not flags.model:
        raise UserError("no model given: add --model=DIR")
    sizes = [parse_size(size) for size in flags.sizes]
    folder = resolve(flags.model)
    cfg = read_config(folder, None if flags.vision_dir is None else resolve(flags.vision_dir))[1]
    config = VocabularyConfig(
        sources=tuple(flags.sources), held_out=tuple(flags.held_out), multiple=flags.multiple, bits=False
    )
    reporter = make_reporter(True)
    reporter.table(*trade(Path(folder), cfg, config, sizes))
    reporter.say("to apply a size: --config.prune.vocabulary.size=N --config.prune.vocabulary.sources=\"('FILE',)\"")
