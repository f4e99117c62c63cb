"""vlmprune vocabulary --model=DIR --sources=FILE,... --sizes=16k,32k,64k: what a smaller vocabulary saves and costs.

Nothing is written. Sources are records as data.train takes them, text files, or JSON lists of texts or of token ids; a
tenth of their texts, or those of --held_out, choose no token and are measured.
  vlmprune vocabulary --model=DIR --sources=train.json,captions.txt --sizes=16k,32k,64k --multiple=128
"""

from __future__ import annotations

from typing import Any

from absl import flags as absl_flags

from vlmprune_jax.cli.flags import Flags
from vlmprune_jax.core.settings import settings_of
from vlmprune_jax.prune.config import VocabularyConfig


def define(values: Flags) -> None:
    """Define the flags of `vlmprune vocabulary`."""
    text, several, settings = absl_flags.DEFINE_string, absl_flags.DEFINE_list, settings_of(VocabularyConfig())
    text("model", None, "Hugging Face folder or hub id of the model", flag_values=values)
    text("vision_dir", None, "vision tower folder (original LLaVA, Bunny)", flag_values=values)
    several("sources", [], settings["sources"].sentence, flag_values=values)
    several("held_out", [], settings["held_out"].sentence, flag_values=values)
    several("sizes", ["16k", "32k", "64k"], "numbers of tokens, as 16384 or 16k (x 1,024)", flag_values=values)
    multiple = settings["multiple"]
    absl_flags.DEFINE_integer("multiple", multiple.default, multiple.sentence, lower_bound=1, flag_values=values)


def run(flags: Any) -> None:
    """Print one row per vocabulary size (parameters and bytes saved, tokens added), and how to use one."""
    from pathlib import Path

    from vlmprune_jax.core.console import make_reporter
    from vlmprune_jax.core.errors import UserError
    from vlmprune_jax.hf.read import read_config, resolve
    from vlmprune_jax.stages.vocabulary import parse_size, trade

    if not flags.model:
        raise UserError("no model given: --model=DIR")
    sizes = [parse_size(size) for size in flags.sizes]
    folder = resolve(flags.model)
    cfg = read_config(folder, None if flags.vision_dir is None else resolve(flags.vision_dir))[1]
    config = VocabularyConfig(
        sources=tuple(flags.sources), held_out=tuple(flags.held_out), multiple=flags.multiple, bits=False
    )
    reporter = make_reporter(True)
    reporter.table(*trade(Path(folder), cfg, config, sizes))
    reporter.say("apply one: --config.prune.vocabulary.size=N --config.prune.vocabulary.sources=\"('FILE',)\"")
