"""The format "huggingface": a folder in the layout of its source, or in that of a stock class of transformers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmprune_jax.base.budget import LAYOUTS, UNEVEN
from vlmprune_jax.base.settings import export_setting, setting
from vlmprune_jax.base.weight_files import WRITTEN
from vlmprune_jax.io.exports.format import Comparison, Contents, Format, Origin

if TYPE_CHECKING:
    from vlmprune_jax.core.models.vlm import Model


@dataclass(frozen=True)
class FolderOptions:
    """Options of the export to a Hugging Face folder."""

    layout: str = export_setting(
        "source",
        'Tensor names and config of the export: as in the source ("source"), or in the stock class ("transformers").',
        choices=LAYOUTS,
    )
    uneven: str = export_setting(
        "per_layer",
        'Layers of unequal width: "per_layer" writes true sizes (Hugging Face folders include the PyTorch file that '
        'loads them), "pad" adds zero heads and neurons (same function, no savings), "refuse" stops with an error.',
        choices=UNEVEN,
    )
    head_dim: int = export_setting(
        0,
        "Channels per attention head of the decoder: 4 or 16 times the model's, padded with zeros (0 = the model's).",
        unit="channels",
        least=0,
    )
    dtype: str = export_setting(
        "bfloat16",
        'Data type of the exported weights; "source" keeps the source folder\'s type.',
        choices=WRITTEN,
    )
    mtp: str = export_setting(
        "drop",
        'Module that predicts several tokens at once (Qwen3.5\'s MTP): "drop" leaves it out, "cut" prunes it to the '
        "decoder's numbers of heads and neurons (those with the largest weights).",
        choices=("drop", "cut"),
    )
    storage: Any = setting(
        None, "Weights that are already quantised, such as the result of `vp.gptq` (None = none).", offered=False
    )


def prepare(model: Model, origin: Origin, options: FolderOptions) -> Contents:
    """Return the content of an export to a Hugging Face folder."""
    from vlmprune_jax.io.exports.folder import folder_contents  # imports jax, like all that reads a model
    from vlmprune_jax.io.exports.target import make_target

    target = make_target(model.cfg, origin.folder, options.layout, options.uneven, options.dtype, options.head_dim)
    target = replace(target, mtp=options.mtp)
    return folder_contents(model, origin, target, options.dtype, options.storage)


def check(model: Model, folder: Path, origin: Origin, options: FolderOptions) -> Comparison:
    """Reload an exported folder in PyTorch (without torch, in JAX) and compare its logits with the model's."""
    from vlmprune_jax.io.exports.reload import check_export

    return check_export(model, folder, vision_dir=origin.vision_dir)


HUGGINGFACE = Format(FolderOptions, prepare, check)
