"""Sections of a config that several packages share: the model, the device mesh, LoRA adapters."""

from __future__ import annotations

from dataclasses import dataclass

from vlmprune_jax.base.settings import STAGES, check_settings, setting
from vlmprune_jax.base.weight_files import DTYPES


@dataclass(frozen=True)
class ModelSpec:
    """Settings that name the model to prune."""

    hf_dir: str = setting(
        "", "Hugging Face folder of the model to prune, or its hub id.", affects=STAGES, by_content=True
    )
    vision_dir: str | None = setting(
        None,
        "Folder of the vision tower, for models that store it separately (original LLaVA and Bunny).",
        affects=STAGES,
        by_content=True,
    )
    dtype: str = setting(
        "float32",
        "Data type of the model weights in memory and in the checkpoints of all stages before the export.",
        affects=STAGES,
        choices=tuple(DTYPES),
    )

    def __post_init__(self) -> None:
        check_settings("model", self)


@dataclass(frozen=True)
class MeshSpec:
    """Arrangement of the devices in a grid (a mesh), which divides batches and weights among them.

    The number of devices is the product of the three axes (-1 = all remaining devices; all 1 = a single device).
    """

    data: int = setting(1, "Number of copies of the model; each copy processes a part of every batch.", unit="devices")
    fsdp: int = setting(
        1,
        "Number of devices that share one copy of the model (each holds a slice of every weight and processes a part "
        "of the rows).",
        unit="devices",
    )
    tensor: int = setting(1, "Number of devices over which heads, neurons and vocabulary are split.", unit="devices")

    def __post_init__(self) -> None:
        check_settings("mesh", self)


@dataclass(frozen=True)
class FakeQuant:
    """Settings of quantisation-aware training: bits, group size (0 = one group per row), and 8-bit rounding of inputs.

    The fields are those of `CompressedTensors`, without zero points.
    """

    bits: int
    group: int = 0
    activations: bool = False


@dataclass(frozen=True)
class LoraConfig:
    """Settings of low-rank adapters (LoRA) on decoder projections, y += alpha/rank * B A dropout(x).

    Used if `recover.trainable` trains adapters.
    """

    rank: int = setting(128, "Rank of the LoRA update.", affects=("recover",), least=1)
    alpha: float = setting(
        256.0, "Scale of the LoRA update, which is multiplied by `alpha` / `rank`.", affects=("recover",), above=0
    )
    dropout: float = setting(
        0.05, "Dropout rate of LoRA adapter inputs in training.", affects=("recover",), least=0, below=1
    )
    targets: tuple[str, ...] = setting(
        (), "Decoder projections that get LoRA adapters, such as `q_proj` (() = all).", affects=("recover",)
    )

    def __post_init__(self) -> None:
        check_settings("recover.lora", self)
