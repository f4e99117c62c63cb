"""Settings of the section `model`: the model to prune."""

from __future__ import annotations

from dataclasses import dataclass

from vlmprune_jax.core.settings import STAGES, check_settings, setting


@dataclass(frozen=True)
class ModelSpec:
    """The model to prune."""

    hf_dir: str = setting(
        "", "Hugging Face folder of the model to prune, or its hub id.", affects=STAGES, by_content=True
    )
    vision_dir: str | None = setting(
        None,
        "Folder of the vision tower, for models that keep it apart (original LLaVA and Bunny).",
        affects=STAGES,
        by_content=True,
    )
    dtype: str = setting(
        "float32",
        "Data type of the weights in memory and in all model folders before the export.",
        affects=STAGES,
        choices="core.weight_files:DTYPES",
    )

    def __post_init__(self) -> None:
        check_settings("model", self)
