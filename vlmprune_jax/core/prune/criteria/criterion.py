"""Description of a criterion, which scoring, settings checks and commands read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlmprune_jax.base.checks import file_of_users, one_of
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import STACKS, ModelConfig
from vlmprune_jax.core.models.context import VALUES
from vlmprune_jax.core.part import Key
from vlmprune_jax.core.prune.calibration import TOKEN_TYPE_WEIGHTS
from vlmprune_jax.core.prune.config import ScoreConfig

NEEDS = ("weights", "activations", "routing", "labels")
Values = Mapping[Key, np.ndarray]
SCORED = ("layers", "widths", "experts")


@dataclass(frozen=True)
class Criterion:
    """Importance criterion that scores layers, or heads and neurons.

    Values are those of `Scores`: {Key(stack, None, "layers"): ...}, {Key(stack, layer, axis): ...}, or both. Each
    function receives the `options` for which it has parameters, and the name of the scored stack if it has a parameter
    `stack`. Raises UserError for contradictory fields, or an option that is no parameter of a function.
    """

    scores: tuple[str, ...]
    """Scored units: a selection of "layers", "widths" (heads and neurons) and "experts"."""

    needs: str
    """Inputs of the function: "weights", "activations", "routing" or "labels"."""

    function: Callable[..., Any]
    """Function whose signature depends on `needs`:

      weights: function(model, **options) -> values.
      activations: function(layer, tokens, **options) -> {name: sum over the tokens}, of one layer and one batch,
        computed on the device (`activations.LayerValues`, `activations.Tokens`). With a parameter `carry`, which is
        None at the first layer, it returns (sums, what the next layer gets as `carry`).
      routing: function(routing, **options) -> values, from the choices of routers (`prune.routing.Routing`); with
        `splits` -> (values, {token type: values}).
      labels: function(model, batches, progress, **options) -> values, by a pass over checked batches with labels (for
        weight gradients: `gradients.gradient_channels`). With `splits` -> (values, {token type: values}). A parameter
        `cache` (`base.cache.ArrayCache`, or None) lets it continue an interrupted pass.
    """

    finish: Callable[..., Values] | None = None
    """For activations: finish(sums, model, **options) -> values, from the sums over all batches, added in float64: a
    list with {name: array} for each layer."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Defaults by name. The value of an option `variant` is part of the criterion's name; `gqa` and `layers_removed`
    define the units that are scored (see `Scores`)."""

    stacks: tuple[str, ...] = ("text",)
    """Stacks that the criterion can score, see `config.STACKS` ("vision" includes user-defined encoders)."""

    splits: bool = False
    """True if all sums are weighted by `tokens.weight`, so that they can be restricted to tokens of one type; the
    criterion then also returns scores by token type (`Scores.by_token_type`)."""

    inputs: tuple[str, ...] = ()
    """For activations: intermediate values that the function reads, of `models.context.VALUES`."""

    def __post_init__(self) -> None:
        for what in self.scores:
            one_of("a criterion's scores:", what, SCORED)
        for stack in self.stacks:
            one_of("a criterion's stacks:", stack, STACKS)
        for name in self.inputs:
            one_of("input", name, VALUES)
        one_of("a criterion's needs:", self.needs, NEEDS)
        if (self.needs == "activations") != (self.finish is not None):
            raise UserError('a criterion with finish= (and no other) must have needs="activations"')
        if self.splits and not self.needs_batches:
            raise UserError(
                'a criterion with needs="weights" reads no tokens, so it cannot have splits=True: leave splits out'
            )
        for name in self.options:
            if not any(name in taken(function, {name: None}) for function in (self.function, self.finish) if function):
                raise UserError(
                    f"a criterion: option {name!r} is not a parameter of any of its functions: add the parameter, or "
                    "remove the option"
                )

    @property
    def settings(self) -> dict[str, Any]:
        """Default options of the criterion, including token weights."""
        return {**self.options, **(TOKEN_TYPE_WEIGHTS if self.splits else {})}

    def options_in(self, config: ScoreConfig) -> dict[str, Any]:
        """Return the criterion's options: score settings of the same name, and the entries of `config.options`."""
        settings = self.settings
        if not self.splits:  # an option with the name of a token weight is the criterion's own
            settings = {name: value for name, value in settings.items() if name not in TOKEN_TYPE_WEIGHTS}
        given = {name: value for name, value in vars(config).items() if name in settings and value is not None}
        return {**given, **{name: value for name, value in config.options.items() if name in self.settings}}

    @property
    def needs_batches(self) -> bool:
        """True if the criterion reads calibration data."""
        return self.needs != "weights"

    @property
    def file(self) -> Path | None:
        """Source file of a user's criterion; None for built-in criteria."""
        return file_of_users(self.finish or self.function)

    def total(self, cfg: ModelConfig, batches: Sized, stack: str = "text") -> int:
        """Return the total for the progress bar: of layers for criteria that need labels, otherwise of batches."""
        return len(cfg.stack(stack).layers) if self.needs == "labels" else len(batches)


def declared(*names: str) -> dict[str, Any]:
    """Return {name: default} of the settings in `ScoreConfig` that a criterion accepts as options."""
    return {name: getattr(ScoreConfig(), name) for name in names}


def taken(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the criterion's options that a function has as parameters; all for a function of `**options`."""
    parameters = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: value for name, value in options.items() if takes_all or name in parameters}
