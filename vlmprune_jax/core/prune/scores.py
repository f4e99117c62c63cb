"""Scores of layers, heads and neurons under one criterion: their file, and `score`, the entry point of all criteria."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import msgspec
import numpy as np

from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.base.checks import blaming, one_of, with_defaults
from vlmprune_jax.base.errors import UserError, error_context
from vlmprune_jax.base.files import checked, parse_json, read_arrays, reading, replacing
from vlmprune_jax.base.journal import Journal, continued
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.part import AXES, LAYERS, VOCAB, Key
from vlmprune_jax.core.plans.kept import axis_sizes
from vlmprune_jax.core.plans.plan import check_format
from vlmprune_jax.core.prune.activations import LayerSums, added, grouped, layer_sums
from vlmprune_jax.core.prune.batches import CalibrationBatch
from vlmprune_jax.core.prune.calibration import (
    TOKEN_TYPE_WEIGHTS,
    TOKEN_TYPES,
    TYPES,
    calibration_batches,
    positive,
    types_in,
    weight_of_token_types,
)
from vlmprune_jax.core.prune.config import ScoreConfig
from vlmprune_jax.core.prune.criteria import CRITERIA, scoring
from vlmprune_jax.core.prune.criteria.criterion import Criterion, Values, taken
from vlmprune_jax.core.prune.fingerprints import fingerprint
from vlmprune_jax.core.prune.routing import Routing, measure_routing
from vlmprune_jax.core.prune.stream import on_devices

OPERATIONAL = ("memory_budget",)  # options that change how scores are computed, but not the scores
FORMAT = 3
_TODO = "score again"


class _Options(TypedDict, total=False):
    """Criterion options in a scores file that plans read."""

    variant: str | None
    gqa: Literal["groups", "q_heads"]
    layers_removed: Annotated[int, msgspec.Meta(ge=1, le=10_000)] | None


class _Meta(TypedDict):
    """Metadata of a scores file."""

    criterion: str
    fingerprint: str
    options: _Options


@dataclass(frozen=True, eq=False)
class Scores:
    """Importance scores of layers, or of units inside layers, by one criterion (low = removed first)."""

    criterion: str
    """Name of the criterion."""

    fingerprint: str
    """Fingerprint of the scored model."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the criterion."""

    values: Values = field(default_factory=dict)
    """{key: float64[units]}, scores of the units along every scored axis; layers have the axis "layers".

    With an option `layers_removed` = n, entry i of "layers" is the score of the n consecutive layers from layer i on.
    For axes with a parent, either the parents are scored ("kv_heads": whole groups of grouped-query attention), or the
    children ("q_heads"), of which equally many are then removed from every parent. Experts and their neurons may both
    be scored; the pruning method chooses.
    """

    by_token_type: Mapping[str, Values] = field(default_factory=dict)
    """{token type: values}, the same scores from calibration tokens of one type alone.

    Types are "image", "video", "prompt" and "answer"; empty if the criterion does not split its scores, or all tokens
    have one type.
    """

    routing: Routing | None = None
    """Choices of the routers (criteria for experts); not part of `save`, see `Routing.save`."""

    def __post_init__(self) -> None:
        for name, array in self._arrays().items():
            if np.isnan(array).any():
                raise UserError(
                    f"{self.criterion} scores {name} contain NaN: check weights and calibration records for NaN"
                )

    def __repr__(self) -> str:
        """Return criterion, components and number of scores as text, without the scores."""
        scored = [f"{len(array)} layers" for key, array in self.values.items() if key.axis == LAYERS]
        if self.axes:
            counts = [f"{sum(map(len, self.along(axis))):,} {AXES[axis].title}" for axis in self.axes]
            layers = {(key.component, key.layer) for key in self.values if key.layer is not None}
            scored.append(f"{' and '.join(counts)} of {len(layers)} layers")
        types = f", also by token type ({', '.join(self.by_token_type)})" if self.by_token_type else ""
        components = " and ".join(self.components)
        return f"Scores({self.name}, {components}: importance of {', '.join(scored)}{types}; model {self.fingerprint})"

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the scored components."""
        return tuple(dict.fromkeys(key.component for key in self.values))

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes inside layers with scores, such as "kv_heads"; () if only whole layers are scored."""
        return tuple(dict.fromkeys(key.axis for key in self.values if key.layer is not None))

    @property
    def name(self) -> str:
        """Name of the criterion, followed by its variant if it has several: `taylor/param_first`."""
        variant = self.options.get("variant")
        return f"{self.criterion}/{variant}" if variant else self.criterion

    @property
    def span(self) -> int | None:
        """Number of consecutive layers that an entry of "layers" scores together; None if each layer has its own."""
        return self.options.get("layers_removed")

    def along(self, axis: str) -> tuple[np.ndarray, ...]:
        """Return the scores of one axis, layer by layer (only layers that have this axis)."""
        return tuple(array for key, array in self.values.items() if key.axis == axis)

    @property
    def layers(self) -> np.ndarray:
        """Scores of whole layers, float64[n_layers]; raise UserError if the criterion scores only units of layers."""
        self.check_scored(LAYERS)
        return self.along(LAYERS)[0]

    def check_scored(self, axis: str) -> None:
        """Raise UserError unless there are scores of layers (axis "layers") or of units inside layers (other axes)."""
        if axis == LAYERS and not self.along(LAYERS):
            raise UserError(
                f"{self.criterion} does not score layers: for depth pruning, score with {scoring('layers')}"
            )
        if axis != LAYERS and not self.axes:
            raise UserError(
                f"{self.criterion} does not score heads and neurons: for width pruning, score with {scoring('widths')}"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the scores to an `.npz` file (without pickle), atomically."""
        meta = {
            "format": FORMAT,
            "criterion": self.criterion,
            "fingerprint": self.fingerprint,
            "options": dict(self.options),
        }
        with replacing(Path(path)) as file:
            np.savez(file, allow_pickle=False, meta=np.array(json.dumps(meta)), **self._arrays())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read a scores file written by `save`; raise UserError if it is missing or malformed."""
        missing = "no such scores file: run `vlmprune score` first"
        arrays = read_arrays(Path(path), missing=missing, todo=_TODO)
        with reading(path, _TODO):
            meta = parse_json(str(arrays.pop("meta")), f"{path}: meta", _TODO)
        check_format(meta, FORMAT, str(path), "score")
        checked(meta, _Meta, f"{path}: meta", _TODO)
        values, by_token_type = dict[Key, np.ndarray](), dict[str, dict[Key, np.ndarray]]()
        with error_context(path):
            for name, array in arrays.items():
                key, _, token_type = name.partition("@")
                if token_type and token_type not in TOKEN_TYPES:
                    raise UserError(f"{name[:80]!r} has scores of an unknown token type: {_TODO}")
                of_type = by_token_type.setdefault(token_type, {}) if token_type else values
                if array.dtype.kind != "f" or array.dtype.itemsize > 8 or array.ndim != 1 or not array.size:
                    raise UserError(
                        f"{name} is {array.dtype}{list(array.shape)}, expected a one-dimensional array of numbers: "
                        f"{_TODO}"
                    )
                of_type[Key.parse(key)] = np.asarray(array, np.float64)
            shapes = {key: array.shape for key, array in values.items()}
            for of_type in by_token_type.values():
                if {key: array.shape for key, array in of_type.items()} != shapes:
                    raise UserError(f"scores by token type and total scores have different shapes: {_TODO}")
            return cls(meta["criterion"], meta["fingerprint"], meta["options"], values, by_token_type)

    def _arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays of a scores file by name: `text/layers`, `text/0/kv_heads`, `text/0/kv_heads@image`."""
        arrays = {str(key): array for key, array in self.values.items()}
        for token_type, values in self.by_token_type.items():
            arrays |= {f"{key}@{token_type}": array for key, array in values.items()}
        return arrays


def fits_model(values: Values, cfg: ModelConfig) -> bool:
    """Return True if scores have the model's sizes, and include every layer of a component that has a scored axis."""
    scored = {(key.component, key.axis) for key in values}
    sizes = axis_sizes(cfg, (name for name, _ in scored))
    expected = {key: (size,) for key, size in sizes.items() if (key.component, key.axis) in scored}
    return {key: np.shape(array) for key, array in values.items()} == expected


def score(
    model: Model,
    batches: Iterable[Any] | None = None,
    config: ScoreConfig | None = None,
    *,
    criterion: str,
    stack: str = "text",
    routing: Routing | None = None,
    progress: Callable[[int], None] | None = None,
    journal: Journal | None = None,
    cache: ArrayCache | None = None,
    **options: Any,
) -> Scores:
    """Score the layers, or the heads and neurons, of one stack by a criterion in `vp.criteria`.

    Args:
      model: the model, on one device or on a mesh; scores are the same.
      batches: calibration batches, mappings of arrays or objects with `.arrays`: input_ids and attention_mask
        int[batch, seq], with a tower pixel_values float[images, 3, height, width] in order of appearance (or per row,
        float[batch, images, 3, height, width]), and labels int[batch, seq] (not shifted, -100 = ignored) for criteria
        that need labels. None for criteria that only read weights, or with a `routing`.
      stack: "text" for the decoder, or "vision" for the tower (on the images of the batches).
      routing: `Scores.routing` of an earlier call, from which criteria for experts are computed without a forward pass.
      progress: called with the number of finished batches, or of layers for criteria that need labels.
      journal: keeps the sums of each batch, to continue after an interruption, for criteria that score layers and for
        your own.
      cache: keeps the sums of each layer (for criteria that need labels), likewise.
      config: settings; each criterion uses the settings that it has, and `options` override single settings.
      options: settings of the criterion by name (`vp.criteria[name].settings`, see `ScoreConfig`).

    Raises:
      UserError: an unknown criterion or option (with a suggestion), a stack that the model does not have or the
        criterion does not score, or batches that the model cannot read.
    """
    chosen = CRITERIA[one_of("criterion", criterion, tuple(CRITERIA))]
    given = {} if config is None else chosen.options_in(config)
    settings = with_defaults(f"criterion {criterion!r}", {**given, **options}, chosen.settings)
    model.cfg.stack(stack)
    if (stack if stack == "text" else "vision") not in chosen.stacks:  # encoders are scored as towers
        others = ", ".join(name for name, other in CRITERIA.items() if stack in other.stacks)
        raise UserError(f"criterion {criterion!r} does not score the {stack} stack: use {others}")
    if model.cfg.lora is not None:
        raise UserError(f"criterion {criterion!r} needs a model without LoRA adapters: merge them first")
    if routing is not None and chosen.needs != "routing":
        raise UserError(f"criterion {criterion!r} does not score experts by a routing: pass calibration batches")
    if routing is not None and routing.fingerprint != fingerprint(model):
        raise UserError("this routing is of another model: pass calibration batches")
    if chosen.needs_batches and batches is None and routing is None:
        raise UserError(f"criterion {criterion!r} needs calibration batches: pass batches")
    if chosen.needs == "routing" and routing is None:
        routing = measure_routing(model, batches or (), progress=progress)
    score_settings = {name: value for name, value in settings.items() if name not in OPERATIONAL}
    with blaming(f"criterion {criterion!r}", chosen.function, *filter(None, [chosen.finish])):
        kept: dict[str, Any] = {"progress": progress, "cache": cache}
        # sums of units are many numbers: built-in criteria compute them again
        kept["journal"] = journal if "layers" in chosen.scores or chosen.file else None
        values, by_token_type = _measure(chosen, model, settings, stack, routing or batches or (), kept)
        for arrays in (values, *by_token_type.values()):
            _check(criterion, chosen, arrays, model.cfg, stack)
        return Scores(criterion, fingerprint(model), score_settings, values, by_token_type, routing)


def _measure(
    chosen: Criterion, model: Model, settings: Mapping[str, Any], stack: str, batches: Any, kept: Mapping[str, Any]
) -> tuple[Values, Mapping[str, Values]]:
    """Compute scores over all tokens, and scores by token type; `kept`: progress, journal and cache of `score`."""
    options = taken(chosen.function, {**settings, "cache": kept["cache"], "stack": stack})
    if not chosen.needs_batches:
        return chosen.function(model, **options), {}
    if isinstance(batches, Routing):
        result = chosen.function(batches, **options)
    elif chosen.finish is None:
        checked = calibration_batches(batches, model.cfg, labels=chosen.needs == "labels")
        result = chosen.function(model, checked, kept["progress"], **options)
    else:
        sums, by_token_type = _activation_sums(chosen, model, settings, stack, batches, kept)
        finish = functools.partial(chosen.finish, model=model, **taken(chosen.finish, {**settings, "stack": stack}))
        return finish(sums), {name: finish(type_sums) for name, type_sums in by_token_type.items()}
    return result if chosen.splits else (result, {})


def _activation_sums(
    chosen: Criterion, model: Model, settings: Mapping[str, Any], stack: str, batches: Any, kept: Mapping[str, Any]
) -> tuple[list[LayerSums], dict[str, list[LayerSums]]]:
    """Return the criterion's sums of each layer over all tokens, and over the tokens of each type, in float64."""
    splits = chosen.splits and model.cfg.stack(stack).causal  # all positions of a tower are of one type
    weight_of = weight_of_token_types({**TOKEN_TYPE_WEIGHTS, **(settings if splits else {})})
    # the paper's sums include padding: they do not split by token type
    types = [*TOKEN_TYPES.values()] if splits and not settings.get("reference_compat") else []
    ways = np.stack([weight_of, *np.eye(len(TYPES), dtype=np.float32)[types]])
    options = taken(chosen.function, {**settings, "stack": stack})
    counts, totals, model = np.zeros(len(TYPES), int), list[LayerSums](), on_devices(model)

    def waiting() -> Iterator[tuple[list[list[CalibrationBatch]], list[list[LayerSums]]]]:
        """Yield, for each batch, its group from it on, and a list for the sums of the group's batches."""
        for group in grouped(model, stack, calibration_batches(batches, model.cfg, labels=False)):
            computed = list[list[LayerSums]]()
            for number, parts in enumerate(group):
                for batch in parts:
                    counts[:] += np.bincount(batch.token_types.ravel(), minlength=len(TYPES))
                yield group[number:], computed

    def sums_of(item: tuple[list[list[CalibrationBatch]], list[list[LayerSums]]]) -> list[dict[str, Any]]:
        group, computed = item
        if not computed:  # the first batch of the group that the journal lacks
            computed += layer_sums(model, stack, group, chosen.inputs, chosen.function, options, ways)
        sums = computed[-len(group)]
        return sums if journal is None else [{name: x.tolist() for name, x in layer.items()} for layer in sums]

    n_layers, journal, progress = len(model.cfg.stack(stack).layers), kept["journal"], kept["progress"]
    for entry in continued(sums_of, waiting(), journal, lambda _, entry: _fits(entry, n_layers), progress):
        pairs = zip(totals or [{}] * n_layers, entry, strict=True)
        totals = [added([sums for sums in pair if sums]) for pair in pairs]
    positive(sum(map(len, totals)))
    by_way = [[{name: x[way] for name, x in layer.items()} for layer in totals] for way in range(len(ways))]
    of_type = dict(zip(TOKEN_TYPES, by_way[1:], strict=False))
    return by_way[0], {name: of_type[name] for name in types_in(counts) if types}


def _fits(entry: Any, n_layers: int) -> bool:
    """Return True if a journal entry consists of numeric arrays for each layer."""
    try:
        arrays = [np.asarray(x) for layer in entry for x in layer.values()]
    except (AttributeError, TypeError, ValueError):
        return False
    return len(entry) == n_layers and all(array.dtype.kind in "if" for array in arrays)


def _check(name: str, chosen: Criterion, values: Values, cfg: ModelConfig, component: str) -> None:
    """Raise UserError if a criterion returned scores of other axes or shapes than it declares."""
    declared = {(component, what != "layers") for what in chosen.scores}
    keyed = all(isinstance(key, Key) for key in values)
    if keyed and fits_model(values, cfg) and {(key.component, key.layer is not None) for key in values} == declared:
        return
    sizes = {key: size for key, size in axis_sizes(cfg, [component]).items() if key.axis != VOCAB}
    expected = {str(key): (size,) for key, size in sizes.items() if (component, key.layer is not None) in declared}
    returned = {str(key): np.shape(array) for key, array in values.items()}
    raise UserError(f"criterion {name!r} returns scores of shapes {returned}, expected shapes among {expected}")
