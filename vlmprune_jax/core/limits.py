"""Limits of the engines that load pruned models, as rows that planning, `inspect`, cards and advice read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from vlmprune_jax.base.checks import one_of
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig


@dataclass(frozen=True)
class Limit:
    """Condition on the layers of one component, without which an engine cannot load a model at its true size."""

    engine: str
    """Name of the engine in `ENGINES`."""

    why: str
    """Reason for messages, with advice: it ends a sentence that begins with the name of the engine."""

    component: str = "text"
    """Component whose layers the limit is about; a model without it is within the limit."""

    axes: tuple[str, ...] = ()
    """Axes whose sizes `multiple` and `allowed` limit; () for a limit on the model as a whole."""

    equal: bool = False
    """True if all layers must have equal widths."""

    multiple: int = 1
    """Number of which the sizes must be multiples."""

    allowed: Collection[int] | None = None
    """Possible sizes; None for any. Without axes, () says that the engine cannot load the model in any size."""

    def holds(self, cfg: ModelConfig) -> bool:
        """Return True if a model is within the limit."""
        component = cfg.stacks.get(self.component)
        if component is None:
            return True
        if (self.equal and not component.uniform) or (not self.axes and self.allowed == ()):
            return False
        sizes = {layer.sizes[axis] for layer in component.layers for axis in self.axes if axis in layer.sizes}
        return all(size % self.multiple == 0 and (self.allowed is None or size in self.allowed) for size in sizes)


@dataclass(frozen=True)
class Engine:
    """Program or format that loads pruned models."""

    version: str
    """Program and version that was tried, or whose code was read."""

    limits: Callable[[ModelConfig], Iterable[Limit]]
    """Return the engine's limits for a model; they may depend on its layers."""

    always: Callable[[ModelConfig], Iterable[Limit]] = lambda cfg: ()
    """Return the limits that no option of an export lifts, so that every plan respects them."""


# Engines by their names in `prune.loads_in`; the packages that know families and formats add theirs.
ENGINES: dict[str, Engine] = {}


def why_not(cfg: ModelConfig, engine: str) -> str | None:
    """Return why an engine cannot load a model at its true size; None if it can."""
    return first_unmet(ENGINES[one_of("loads_in", engine, ENGINES)].limits(cfg), cfg)


def why_no_class(cfg: ModelConfig) -> str | None:
    """Return why no export can hold a model with these layers; None if one can."""
    return next(filter(None, (first_unmet(engine.always(cfg), cfg) for engine in ENGINES.values())), None)


def first_unmet(limits: Iterable[Limit], cfg: ModelConfig) -> str | None:
    """Return the reason of the first limit that a model exceeds; None if it is within all of them."""
    return next((limit.why for limit in limits if not limit.holds(cfg)), None)


def check_loads(cfg: ModelConfig, engines: Iterable[str]) -> None:
    """Raise UserError if one of the `engines` cannot load a pruned model at its true size."""
    for engine in engines:
        reason = why_not(cfg, engine)
        if reason is not None:
            raise UserError(f"loads_in={engine!r}: this engine could not load the pruned model: {reason}")


def keeps_heads(cfg: ModelConfig, component: str, engines: Iterable[str]) -> bool:
    """Return True if one of the `engines` can load the model only if all heads of this component are kept."""
    layers = [
        layer if not layer.mixer.root else layer.smaller(layer.mixer.root) for layer in cfg.stack(component).layers
    ]
    fewer = cfg.with_layers(layers, component)
    if why_no_class(cfg) is None and why_no_class(fewer) is not None:
        return True
    return any(why_not(cfg, engine) is None and why_not(fewer, engine) is not None for engine in engines)
