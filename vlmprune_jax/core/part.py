"""Base classes for parts of a layer (mixers, channel mixers), with their prunable axes and fixed sizes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

from vlmprune_jax.base.errors import UserError

# Axes of a whole component, whose units are its layers and the rows of its embedding.
LAYERS, VOCAB = "layers", "vocab"


class Key(NamedTuple):
    """Address of the units along one prunable axis, under which scores, plans and costs store them."""

    component: str
    """Component of the model, such as the decoder "text" or the tower "vision"."""

    layer: int | None
    """Number of the layer whose axis it is; None for an axis of the whole component ("layers", "vocab")."""

    axis: str
    """Name of the axis."""

    def __str__(self) -> str:
        """Return the key as text, such as "text/3/mlp" or "text/layers"."""
        return "/".join(str(entry) for entry in self if entry is not None)

    @classmethod
    def parse(cls, text: str) -> Key:
        """Return the key that is written as "text/3/mlp" or "text/layers"; raise UserError for other text."""
        match = re.fullmatch(r"([a-z][a-z0-9_]{0,63})/(?:([0-9]{1,5})/)?([a-z_]{1,64})", text, re.ASCII)
        if match is None or match[3] not in ((LAYERS, VOCAB) if match[2] is None else AXES):
            raise UserError(f"{text[:80]!r} is no axis of a model: expected for example text/layers or text/3/mlp")
        return cls(match[1], None if match[2] is None else int(match[2]), match[3])


@dataclass(frozen=True)
class Axis:
    """Prunable axis of a mixer or channel mixer, such as its heads; the config field of the same name is its size."""

    name: str
    """Name of the axis in weight layouts, plans and scores."""

    title: str
    """Name of the axis's units in messages and tables (plural)."""

    parent: str = ""
    """Axis of the same part whose every index owns equally many indices of this axis; "" for none.

    Indices are numbered over all parents: index i belongs to parent index i // (size / parent's size). If a weight has
    the parent axis before this axis, this axis of its array has only the size / parent's size indices of one parent.
    """

    channels: str = ""
    """Axis of the weights whose channels make up one unit (a head's "head"); "" if a unit is one channel."""

    mesh: str = ""
    """Mesh axis that shards this axis; "" if this axis is replicated."""

    where_divisible: bool = False
    """True if the axis is replicated when the mesh axis does not divide its size; otherwise, that is an error."""

    multiple: str = ""
    """Setting with the multiple of the remaining units; "" for the setting of the part (`Part.settings`)."""


# Every prunable axis by its name in the weight layouts; parts add theirs when their class is defined.
AXES: dict[str, Axis] = {}
WRITERS: dict[str, str] = {}  # axis -> output projection that reads its units


@dataclass(frozen=True)
class Part:
    """Base class of mixers and channel mixers, with the sizes of their prunable axes."""

    axes: ClassVar[tuple[Axis, ...]] = ()
    """Prunable axes, parents before their children."""

    module: ClassVar[str]
    """Name of the part in parameter paths and captured values."""

    writer: ClassVar[str]
    """Projection to whose input the units contribute: "o_proj" of a mixer, "down_proj" of a channel mixer."""

    why_fixed: ClassVar[str] = ""
    """Why the part has channels that cannot be pruned; "" if it has none."""

    settings: ClassVar[tuple[str, str]]
    """Settings that limit pruning of this part: range of layers, and multiple of the remaining units."""

    fixed_axes: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Axes of the part's weights that pruning leaves unchanged, each with the field that holds its size."""

    def __init_subclass__(cls) -> None:
        AXES.update({axis.name: axis for axis in cls.axes})
        WRITERS.update({axis.name: cls.writer for axis in cls.axes})

    def __post_init__(self) -> None:
        for axis in self.axes:
            size, parents = self.sizes[axis.name], self.sizes.get(axis.parent, 1)
            if size < 1:
                raise UserError(f"{self.module}: {axis.name} {size} must be at least 1")
            if size % parents:
                raise UserError(
                    f"{self.module}: {size} {axis.title} are not divisible by {parents} {AXES[axis.parent].title}: "
                    "use a multiple"
                )

    @property
    def relative_width(self) -> int:
        """Factor by which this part is wider than the config states (usually 1); pruning keeps this factor."""
        return 1

    def least(self, axis: str) -> int:
        """Return the minimum size of an axis in a model."""
        return 1

    def active_sizes(self, tokens: int = 1) -> dict[str, int]:
        """Return the sizes by axis, counting only the weights that `tokens` tokens can use."""
        return self.sizes

    @property
    def root(self) -> str:
        """Name of the top axis (such as kv_heads), whose units own units of the other axes; "" if none is prunable."""
        return self.axes[0].name if self.axes else ""

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every prunable axis by name."""
        return {axis.name: getattr(self, axis.name) for axis in self.axes}

    @property
    def fixed_sizes(self) -> dict[str, int]:
        """Size of each axis of the part's weights that pruning leaves unchanged, by name."""
        return {axis: getattr(self, field) for axis, field in self.fixed_axes}

    def resized(self, sizes: Mapping[str, int]) -> Self:
        """Return a copy of the part with new sizes of its own axes; other names in `sizes` are ignored."""
        changes: dict[str, Any] = {axis.name: sizes[axis.name] for axis in self.axes if axis.name in sizes}
        return dataclasses.replace(self, **changes)
