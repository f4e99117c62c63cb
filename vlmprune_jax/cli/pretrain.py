"""vlmprune pretrain --config=configs/easyvqa_pretrain.py --workdir=DIR: train the demo's teacher from scratch.

Or with configs/smollm2_vlm.py a pretrained language model learns to see. Makes DIR/teacher, a LLaVA or a SmolVLM folder
as transformers has them, with its tokenizer and processor. Every stage resumes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from vlmprune_jax.cli.flags import Flags, common


def define(values: Flags) -> None:
    """Flags of this command."""
    common(values)


def run(flags: Any) -> None:
    """Run the stages that the config lists."""
    from vlmprune_jax.core.errors import UserError
    from vlmprune_jax.demo.pretrain import Stage, pretrain
    from vlmprune_jax.distributed.mesh import initialize
    from vlmprune_jax.recovery.config import RecoverConfig

    if flags.config is None or not flags.workdir:
        raise UserError("pretraining needs --config=configs/easyvqa_pretrain.py and --workdir=DIR")
    initialize(flags.coordinator, flags.num_processes, flags.process_id)
    config = flags.config.to_dict()
    own = tuple(field.name for field in dataclasses.fields(Stage) if field.name != "training")
    stages = []
    for stage in (dict(s) for s in config["stages"]):
        training = RecoverConfig(**{name: value for name, value in stage.items() if name not in own})
        stages.append(Stage(**{name: stage[name] for name in own if name in stage}, training=training))
    joined = config.get("joined")
    folder = pretrain(
        Path(flags.workdir),
        stages,
        seed=config["seed"],
        architecture=config.get("architecture"),
        joined=None if joined is None else (Path(joined["language"]), Path(joined["tower"])),
        overwrite=flags.overwrite,
    )
    print(f"teacher: {folder}")
