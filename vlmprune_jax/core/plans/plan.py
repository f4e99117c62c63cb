"""Prune plan: the kept units along every pruned axis in original numbering, as a small JSON."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec

from vlmprune_jax.base.errors import UserError, error_context
from vlmprune_jax.base.files import Count, Finite, checked, parse_json, read_json, replacing
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.layer import Layer, describe_layers, keep_layers
from vlmprune_jax.core.limits import why_no_class
from vlmprune_jax.core.mixers import NO_LAYER
from vlmprune_jax.core.part import LAYERS, Key
from vlmprune_jax.core.plans.kept import TOKENS, KeptLayer, KeptStack, KeptVocabulary, axis_sizes, inconsistency

VOCABULARY_ONLY = "vocabulary"  # method of a plan that only removes tokens
MAX_BYTES = 2**26  # the plan of a 70B model that keeps everything had 16 MB in format 3
FORMAT = 5
TODO = "plan again"
_MANY = msgspec.Meta(max_length=100_000)
_Size = Annotated[int, msgspec.Meta(ge=1, le=2**24)]
# Sizes of all layers together: ranges of any length take a few bytes, their indices 36 bytes each (Qwen3.5's 60 layers
# of 512 experts with 1,024 neurons: 31.5 million).
MAX_UNITS = 2**25
_ATTRIBUTES = {"asked": "target_ratio", "reached": "actual_ratio"}  # where `plan.json` has another name


class _Version(TypedDict):
    format: int


class PlanJson(TypedDict):
    """Fields of `plan.json`; axes are named as "text/3/mlp", "text/layers" or "text/vocab"."""

    fingerprint: str
    method: str
    criterion: str
    asked: Finite | None
    reached: NotRequired[Finite]
    parameters_before: Count
    parameters_after: Count
    parameters_total: Annotated[int, msgspec.Meta(ge=1, le=2**53)]
    options: dict[str, Any]
    tokenizer: str | None  # digest of the tokenizer of the kept tokens
    sizes_before: Annotated[dict[str, _Size], _MANY]  # every axis of the pruned components
    kept: Annotated[dict[str, str], _MANY]  # ranges of original indices such as "0-3,7"; other axes are kept whole


def check_format(data: Any, expected: int, location: str, command: str) -> None:
    """Raise UserError unless a plan or scores file has the format that this version reads; `command` writes it."""
    written = checked(data, _Version, location, f"{command} again")["format"]
    if written != expected:
        todo = "upgrade vlmprune-jax" if written > expected else f"run `vlmprune {command}` again"
        raise UserError(f"{location}: has format {written}, but this version of vlmprune reads {expected}: {todo}")


@dataclass(frozen=True)
class PrunePlan:
    """Kept units of a model by axis, in original numbering, and the settings that led to them.

    Layers, tokens of the vocabulary, heads, neurons and experts are units along their axes. `layers`, `kept_layers` and
    `removed_layers` are the decoder's.
    """

    fingerprint: str
    """Fingerprint of the model that the plan is for."""

    method: str
    """Pruning method, or "none" or "vocabulary"."""

    criterion: str
    """Names of the criteria whose scores decided."""

    sizes_before: Mapping[Key, int]
    """Size of every axis of the plan's components: always the decoder "text"; other components are kept whole."""

    kept: Mapping[Key, tuple[int, ...]]
    """Sorted original indices of the units that stay, by axis; an axis without an entry is kept whole."""

    parameters_before: int
    """Parameters of the model that the plan is for."""

    parameters_after: int
    """Parameters of the pruned model."""

    parameters_total: int
    """Parameters that `target_ratio` and `actual_ratio` are shares of (by default `parameters_before`)."""

    target_ratio: float | None = None
    """Share of parameters that should be removed; None if the target was not a ratio."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Settings that the plan was made with, and results of the solver."""

    tokenizer: str | None = None
    """Digest of the tokenizer to which the kept tokens belong; None if the vocabulary is kept whole."""

    def __post_init__(self) -> None:
        if problem := inconsistency(self.sizes_before, self.kept):
            raise UserError(f"prune plan: {problem}")
        if (self.tokenizer is None) != (TOKENS not in self.kept):
            raise UserError(
                f"prune plan: has only one of kept tokens and tokenizer digest, expected both or none: {TODO}"
            )
        fewer = {k: units for k, units in self.kept.items() if k == TOKENS or len(units) < self.sizes_before[k]}
        object.__setattr__(self, "kept", fewer)

    def __repr__(self) -> str:
        """Return method, sizes and layers of each pruned stack as text, without indices."""
        sizes = f"{self.parameters_before:,} -> {self.parameters_after:,} parameters, "
        sizes += f"{100 * self.actual_ratio:.2f} % removed"
        lines = [f"PrunePlan({self.method} by {self.criterion}: {sizes}"]
        for name, stack in self.stacks.items():
            if not stack.is_whole:
                gone = f", without {', '.join(map(str, stack.removed_layers))}" if stack.removed_layers else ""
                before = len(stack.sizes_before)
                lines.append(
                    f"  {name}: {len(stack.layers)} of {before} layers{gone}; {describe_layers(stack.sizes, most=3)}"
                )
        return "\n".join(lines) + ")"

    @functools.cached_property
    def stacks(self) -> dict[str, KeptStack]:
        """Views of the kept layers by component."""
        before: dict[str, dict[int, dict[str, int]]] = {key.component: {} for key in self.sizes_before}
        for key, size in self.sizes_before.items():
            if key.layer is not None:
                before[key.component].setdefault(key.layer, {})[key.axis] = size

        def layer(name: str, i: int) -> KeptLayer:
            return KeptLayer(i, {axis: tuple(self.units(Key(name, i, axis))) for axis in before[name][i]})

        return {
            name: KeptStack(
                tuple(sizes[i] for i in range(len(sizes))),
                tuple(layer(name, i) for i in self.units(Key(name, None, LAYERS))),
            )
            for name, sizes in before.items()
        }

    @property
    def vocabulary(self) -> KeptVocabulary | None:
        """View of the kept tokens; None if all are kept."""
        if self.tokenizer is None:
            return None
        return KeptVocabulary(self.sizes_before[TOKENS], self.kept[TOKENS], self.tokenizer)

    @property
    def layers(self) -> tuple[KeptLayer, ...]:
        """Entries (`KeptLayer`) of the kept decoder layers."""
        return self.stacks[TOKENS.component].layers

    @property
    def actual_ratio(self) -> float:
        """Share of all parameters that the plan removes."""
        return (self.parameters_before - self.parameters_after) / self.parameters_total

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Original numbers of the kept decoder layers: entry i is the teacher layer for student layer i."""
        return self.stacks[TOKENS.component].kept_layers

    @property
    def removed_layers(self) -> tuple[int, ...]:
        """Original numbers of the removed decoder layers."""
        return self.stacks[TOKENS.component].removed_layers

    def units(self, key: Key) -> Sequence[int]:
        """Return the sorted original indices of the units that stay along an axis."""
        return self.kept.get(key, range(self.sizes_before[key]))

    @functools.cached_property
    def origins(self) -> dict[Key, Key]:
        """Mapping {axis of the pruned model: the same axis in original layer numbers}."""
        layers = {key.component: self.units(key) for key in self.sizes_before if key.axis == LAYERS}
        numbers = {name: {old: new for new, old in enumerate(kept)} for name, kept in layers.items()}
        return {
            key if key.layer is None else key._replace(layer=numbers[key.component][key.layer]): key
            for key in self.sizes_before
            if key.layer is None or key.layer in numbers[key.component]
        }

    def trimming(self, vocabulary: KeptVocabulary | None) -> PrunePlan:
        """Return a copy of the plan that keeps these tokens; None = the tokens of this plan."""
        if vocabulary is None:
            return self
        sizes = {**self.sizes_before, TOKENS: vocabulary.rows_before}
        kept = {**self.kept, TOKENS: vocabulary.kept}
        return dataclasses.replace(self, sizes_before=sizes, kept=kept, tokenizer=vocabulary.tokenizer)

    def keeping(self, component: str, layers: Sequence[KeptLayer]) -> PrunePlan:
        """Return a copy of the plan that keeps these layers of one of its components."""
        kept = {key: units for key, units in self.kept.items() if key.component != component or key == TOKENS}
        kept[Key(component, None, LAYERS)] = tuple(layer.index for layer in layers)
        kept |= {Key(component, x.index, axis): indices for x in layers for axis, indices in x.kept.items()}
        return dataclasses.replace(self, kept=kept)

    def check_sizes(self, cfg: ModelConfig) -> None:
        """Raise UserError if the plan was made for a model of other sizes."""
        sizes = axis_sizes(cfg, [name for name in self.stacks if name in cfg.stacks])
        for key in {**self.sizes_before, **sizes}:
            planned, actual = self.sizes_before.get(key, 0), sizes.get(key, 0)
            if planned != actual:
                raise UserError(
                    f"plan of another model: {key} has {planned:,} units in the plan, but {actual:,} in this model: "
                    "score and plan this model"
                )

    def apply_to(self, cfg: ModelConfig) -> ModelConfig:
        """Return the pruned model's config; raise UserError if its transformers class does not support the layers."""
        for name, kept in self.stacks.items():
            layers = keep_layers(cfg.stack(name).layers, kept.kept_layers)
            _check_shared(layers, kept.layers)
            resized = [layer.resized(entry.sizes) for layer, entry in zip(layers, kept.layers, strict=True)]
            cfg = cfg.with_layers(resized, name)
        problem = why_no_class(cfg)
        if problem is not None:
            raise UserError(f"transformers could not load the pruned model: {problem}")
        return cfg if self.vocabulary is None else self.vocabulary.apply_to(cfg)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the plan as JSON text, with one line per axis; also write it to `path` if one is passed."""
        fields = [name for name in PlanJson.__annotations__ if name not in ("sizes_before", "kept")]
        head = {"format": FORMAT, **{name: getattr(self, _ATTRIBUTES.get(name, name)) for name in fields}}
        head["options"] = dict(self.options)
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
        ranges = {key: _to_ranges(units) for key, units in self.kept.items()}
        for name, entries in (("sizes_before", self.sizes_before), ("kept", ranges)):
            of_axes = ",\n".join(f"    {json.dumps(str(key))}: {json.dumps(value)}" for key, value in entries.items())
            lines.append(f'  "{name}": {{\n{of_axes}\n  }}' + "," * (name == "sizes_before"))
        text = "\n".join(["{", *lines, "}"]) + "\n"
        if path is not None:
            with replacing(Path(path)) as file:
                file.write(text.encode())
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> PrunePlan:
        """Read a plan from a JSON file, from a folder with a `plan.json`, or from JSON text.

        Raises UserError if there is no such file, it is not JSON, or a key is missing or inconsistent.
        """
        if isinstance(source, str) and source.lstrip().startswith("{"):
            where, data = "plan JSON", parse_json(source, "plan JSON", TODO)
        else:
            path = Path(source, "plan.json" if Path(source).is_dir() else "")
            where, missing = str(path), "no such plan: run `vlmprune prune` first"
            data = read_json(path, Any, missing=missing, todo=TODO, most=MAX_BYTES)
        check_format(data, FORMAT, where, "prune")
        plan: PlanJson = msgspec.convert(checked(data, PlanJson, where, TODO), PlanJson)
        with error_context(where):
            sizes = plan["sizes_before"]
            if unknown := plan["kept"].keys() - sizes.keys():
                raise UserError(
                    f"prune plan: kept axes {', '.join(sorted(unknown))} are missing in sizes_before: {TODO}"
                )
            if sum(sizes.values()) > MAX_UNITS:
                raise UserError(
                    f"prune plan: its model has {sum(sizes.values()):,} heads, neurons, experts and tokens, more than "
                    f"the maximum of {MAX_UNITS:,}: {TODO}"
                )
            fields: dict[str, Any] = {_ATTRIBUTES.get(name, name): value for name, value in plan.items()}
            fields["sizes_before"] = {Key.parse(name): size for name, size in sizes.items()}
            fields["kept"] = {
                Key.parse(name): _from_ranges(text, sizes[name], name) for name, text in plan["kept"].items()
            }
            return cls(**{field.name: fields[field.name] for field in dataclasses.fields(cls)})


def _check_shared(layers: Sequence[Layer], entries: Sequence[KeptLayer]) -> None:
    """Raise UserError if a layer keeps other heads than the layer whose keys and values it reuses."""
    for entry, number in zip(entries, (layer.mixer.source for layer in layers), strict=True):
        source = None if number in (None, NO_LAYER) else entries[number]
        if source is not None and source.kept["kv_heads"] != entry.kept["kv_heads"]:
            raise UserError(
                f"layer {entry.index} uses the keys and values of layer {source.index}, but the plan keeps different "
                'heads in these two layers: score query heads (gqa="q_heads"), or keep all heads (heads="keep")'
            )


def keep_everything(
    cfg: ModelConfig, fingerprint: str, parameters: int, components: Iterable[str] | None = None
) -> PrunePlan:
    """Return a plan that removes nothing; it can prune these components (None = all)."""
    return PrunePlan(
        fingerprint=fingerprint,
        method="none",
        criterion="none",
        sizes_before=axis_sizes(cfg, cfg.stacks if components is None else components),
        kept={},
        parameters_before=parameters,
        parameters_after=parameters,
        parameters_total=parameters,
    )


def compose(first: PrunePlan, second: PrunePlan) -> PrunePlan:
    """Combine two plans: `first` for the model, and `second` for the model that `first` makes.

    Raises UserError if `second` is for other widths than `first` leaves.
    """
    more = {key: size for key, size in second.sizes_before.items() if key.component not in first.stacks}
    first = dataclasses.replace(first, sizes_before={**first.sizes_before, **more})
    between = {key: len(first.units(origin)) for key, origin in first.origins.items()}
    if {**between, **second.sizes_before} != between or second.parameters_before != first.parameters_after:
        raise UserError("the plans cannot be composed: make the second plan for the model that the first plan leaves")
    second = dataclasses.replace(second, sizes_before=between)
    kept = dict[Key, tuple[int, ...]]()
    for key in second.origins.values():
        if key in second.kept or first.origins[key] in first.kept:
            units = first.units(first.origins[key])
            kept[first.origins[key]] = tuple(units[i] for i in second.units(key))
    methods = {first.method, second.method} - {"none", VOCABULARY_ONLY}
    return PrunePlan(
        fingerprint=first.fingerprint,
        method=methods.pop() if len(methods) == 1 else "hybrid" if methods else first.method,
        criterion=first.criterion if first.criterion == second.criterion else f"{first.criterion} + {second.criterion}",
        sizes_before=first.sizes_before,
        kept=kept,
        parameters_before=first.parameters_before,
        parameters_after=second.parameters_after,
        parameters_total=first.parameters_total,
        options={"first": dict(first.options), "second": dict(second.options)},
        tokenizer=first.tokenizer or second.tokenizer,
    )


def _to_ranges(indices: Sequence[int]) -> str:
    """Return ascending indices as text: "0-3,7" for 0, 1, 2, 3 and 7."""
    edges = [i for i, (low, high) in enumerate(itertools.pairwise(indices), 1) if high != low + 1]
    bounds = itertools.pairwise([0, *edges, len(indices)])
    ends = [(indices[start], indices[stop - 1]) for start, stop in bounds if stop > start]
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ends)


def _from_ranges(text: str, size: int, axis: str) -> tuple[int, ...]:
    """Return the indices below `size` that `_to_ranges` wrote; raise UserError for other text."""
    indices, edge = list[int](), -1
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"([0-9]{1,10})(?:-([0-9]{1,10}))?", part, re.ASCII)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not edge < low <= high < size:
            raise UserError(
                f"prune plan: {axis} {part[:40]!r} are not ascending ranges of numbers below {size}: {TODO}"
            )
        indices += range(low, high + 1)
        edge = high
    return tuple(indices)
