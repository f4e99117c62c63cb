"""vlmprune export --config=FILE.py --workdir=DIR: the best model as a Hugging Face folder, or as GGUF files.

Makes export/, reloaded and compared before it counts as done.
Settings: export.format, export.layout, export.uneven, export.dtype, export.quantize (--config.export.layout=...).
"""

from __future__ import annotations

from typing import Any

from vlmprune_jax.cli.flags import Flags, common


def define(values: Flags) -> None:
    """Flags of this command."""
    common(values)


def run(flags: Any) -> None:
    """Do this stage for every variant of the experiment."""
    from vlmprune_jax.cli.workdir import prepare
    from vlmprune_jax.stages.run import export_best

    export_best(*prepare(flags))
