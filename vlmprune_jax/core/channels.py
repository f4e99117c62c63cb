"""Configurations of channel mixers: dense MLP, mixture of experts, and combinations of both."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import vlmprune_jax.core.mixers  # noqa: F401 - whose axes come first in AXES
from vlmprune_jax.core.part import Axis, Part


@dataclass(frozen=True)
class ChannelMixer(Part):
    """Base class of channel mixers (dense MLP, experts), which combine the channels of each position separately."""

    writer = "down_proj"
    settings = ("mlp_layers", "neurons_multiple")

    hidden: ClassVar[str] = "down_proj"
    """Name under which blocks capture the additional output of the part's module (`models.context.VALUES`)."""

    lacks: ClassVar[str] = (
        "this criterion or method needs experts, but a layer has a dense MLP: use a criterion or method for neurons"
    )
    """Error message if a caller captures the additional output of another class of channel mixer."""

    @property
    def neuron_counts(self) -> tuple[int, ...]:
        """Number of neurons that each of the part's down projections reads, of experts those of one expert."""
        parents = {axis.parent for axis in self.axes}
        axes = (axis for axis in self.axes if axis.name not in parents)
        return tuple(self.sizes[axis.name] // self.sizes.get(axis.parent, 1) for axis in axes)


@dataclass(frozen=True)
class Dense(ChannelMixer):
    """Multi-layer perceptron of one layer."""

    module = "mlp"
    axes = (Axis("mlp", "neurons", mesh="tensor"),)

    mlp: int
    """Number of neurons."""

    relative_width: int = 1
    """Factor by which this MLP is wider than the checkpoint's config states (Gemma 4: 2 in double-wide layers)."""

    _: KW_ONLY
    activation: str = "silu"
    """Activation by its name in transformers."""

    gated: bool = True
    """True for down(act(gate(x)) * up(x)), False for two projections."""

    bias: bool = False
    """True if the projections have biases."""


@dataclass(frozen=True)
class Experts(ChannelMixer):
    """Mixture of experts: a router sends every token to a few of many gated MLPs, and weights their outputs."""

    module = "mlp"
    axes: ClassVar[tuple[Axis, ...]] = (
        Axis("experts", "experts", mesh="fsdp", where_divisible=True, multiple="experts_multiple"),
        Axis("expert_mlp", "neurons of experts", parent="experts", mesh="tensor"),
    )

    experts: int
    """Number of experts."""

    expert_mlp: int
    """Total number of neurons of all experts, equally many per expert."""

    top_k: int
    """Number of experts per token, those with the largest router probabilities."""

    renormalise: bool = True
    """True if the probabilities of a token's experts are divided by their sum."""

    _: KW_ONLY
    activation: str = "silu"
    """Activation by its name in transformers."""

    bias: ClassVar[bool] = False

    hidden = "routed"
    lacks = (
        "this calibration needs a single input of down_proj, but a layer has experts: use a criterion for experts, or "
        "quantise without calibration"
    )

    @property
    def neurons(self) -> int:
        """Number of neurons of one expert."""
        return self.expert_mlp // self.experts

    def least(self, axis: str) -> int:
        """Return the minimum size of an axis: at least as many experts as a token uses, else 1."""
        return self.top_k if axis == "experts" else 1

    def active_sizes(self, tokens: int = 1) -> dict[str, int]:
        """Return the sizes by axis, counting only neurons of experts that `tokens` tokens can use (`top_k` each)."""
        return {**self.sizes, "expert_mlp": min(self.experts, tokens * self.top_k) * self.neurons}


@dataclass(frozen=True)
class ExpertsAndDense(Experts):
    """Base class of experts with a dense MLP."""

    axes = (*Experts.axes, *Dense.axes)

    _: KW_ONLY
    mlp: int
    """Number of neurons of the dense MLP."""


class ExpertsBesideDense(ExpertsAndDense):
    """Experts and a dense MLP that read the same residual stream; their outputs are added.

    The experts and the dense MLP each have a norm before and a norm after them. The router reads the residual stream
    without these norms, divided by its root mean square and scaled by channel. The gates are multiplied by a learned
    factor per expert.
    """


class ExpertsAndShared(ExpertsAndDense):
    """Experts and a dense MLP (the shared expert) with the same input; sigmoid gates the shared expert's output."""
