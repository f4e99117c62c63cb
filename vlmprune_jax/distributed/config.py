"""Settings of the section `mesh`: sizes of the device mesh."""

from __future__ import annotations

from dataclasses import dataclass

from vlmprune_jax.core.settings import check_settings, setting


@dataclass(frozen=True)
class MeshSpec:
    """Sizes of the device mesh; -1 means all remaining devices. With all sizes 1, a run uses one device and no mesh."""

    data: int = setting(1, "Number of copies of the model, each of which processes a share of a batch.", unit="devices")
    fsdp: int = setting(
        1,
        "Number of devices that share the weights of a copy (along the residual width) and its batch.",
        unit="devices",
    )
    tensor: int = setting(1, "Number of devices that share heads, neurons and vocabulary.", unit="devices")

    def __post_init__(self) -> None:
        check_settings("mesh", self)
