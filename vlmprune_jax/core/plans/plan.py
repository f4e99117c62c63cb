"""Prune plan: the kept layers, heads, neurons and tokens in original numbering, as a small JSON."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import parse_json, read_json, replacing
from vlmprune_jax.core.config import ModelConfig, TextConfig
from vlmprune_jax.core.layer import describe_layers, keep_layers
from vlmprune_jax.core.limits import why_no_class
from vlmprune_jax.core.mixers import NO_LAYER
from vlmprune_jax.core.plans.kept import KeptLayer, KeptStack, KeptVocabulary, Sizes, Units
from vlmprune_jax.core.plans.plan_json import FORMAT, TODO, VOCAB, WHOLE, Component, as_plan

VOCABULARY_ONLY = "vocabulary"  # method of a plan that only removes tokens
MAX_BYTES = 2**26  # the plan of a 70B model that keeps everything had 16 MB in format 3


@dataclass(frozen=True)
class PrunePlan:
    """Kept layers, units and tokens of a model in original numbering, and the settings that led to them.

    `layers`, `kept_layers` and `removed_layers` are the decoder's.
    """

    fingerprint: str
    """Fingerprint of the model that the plan is for."""

    method: str
    """Pruning method, or "none" or "vocabulary"."""

    criterion: str
    """Names of the criteria whose scores decided."""

    stacks: Mapping[str, KeptStack]
    """Kept units by component: always the decoder "text"; a component without an entry is kept whole."""

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

    vocabulary: KeptVocabulary | None = None
    """Kept tokens; None if all are."""

    def __post_init__(self) -> None:
        if "text" not in self.stacks:
            raise UserError(f"prune plan: components are {', '.join(self.stacks)}, expected text among them")

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

    @property
    def layers(self) -> tuple[KeptLayer, ...]:
        """Entries (`KeptLayer`) of the kept decoder layers."""
        return self.stacks["text"].layers

    @property
    def actual_ratio(self) -> float:
        """Share of all parameters that the plan removes."""
        return (self.parameters_before - self.parameters_after) / self.parameters_total

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Original numbers of the kept decoder layers: entry i is the teacher layer for student layer i."""
        return self.stacks["text"].kept_layers

    @property
    def removed_layers(self) -> tuple[int, ...]:
        """Original numbers of the removed decoder layers."""
        return self.stacks["text"].removed_layers

    def apply_to(self, cfg: ModelConfig) -> ModelConfig:
        """Return the pruned model's config; raise UserError if its transformers class does not support the layers."""
        for name, kept in self.stacks.items():
            if name == "text":
                _check_shared(cfg.text, kept.layers)
            cfg = cfg.with_layers(kept.of(cfg.stack(name).layers), name)
        problem = why_no_class(cfg)
        if problem is not None:
            raise UserError(f"transformers could not load the pruned model: {problem}")
        return cfg if self.vocabulary is None else self.vocabulary.apply_to(cfg)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the plan as JSON text; also write it to `path` if one is passed."""
        head = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "method": self.method,
            "criterion": self.criterion,
            "asked": self.target_ratio,
            "reached": self.actual_ratio,
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "parameters_total": self.parameters_total,
            "options": dict(self.options),
            "tokenizer": None if self.vocabulary is None else self.vocabulary.tokenizer,
        }
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
        components = ",\n".join(f"    {json.dumps(name)}: {_as_json(*part)}" for name, part in self._parts().items())
        text = "\n".join(["{", *lines, '  "components": {', components, "  }", "}"]) + "\n"
        if path is not None:
            with replacing(Path(path)) as file:
                file.write(text.encode())
        return text

    def _parts(self) -> dict[str, tuple[dict[str, Sizes], dict[str, Units]]]:
        """Return {component: (sizes before by layer, kept indices by layer)}, with the decoder's vocabulary."""
        parts = {}
        for name, stack in self.stacks.items():
            before = {str(i): sizes for i, sizes in enumerate(stack.sizes_before)}
            kept = {str(layer.index): layer.kept for layer in stack.layers}
            if name == "text" and self.vocabulary is not None:
                before = {WHOLE: {VOCAB: self.vocabulary.rows_before}, **before}
                kept = {WHOLE: {VOCAB: self.vocabulary.kept}, **kept}
            parts[name] = before, kept
        return parts

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> PrunePlan:
        """Read a plan from a JSON file or from JSON text.

        Raises UserError if there is no such file, it is not JSON, or a key is missing or inconsistent.
        """
        if isinstance(source, str) and source.lstrip().startswith("{"):
            where, data = "plan JSON", parse_json(source, "plan JSON", TODO)
        else:
            where = str(source)
            missing = "no such plan: run `vlmprune prune` first"
            data = read_json(Path(source), Any, missing=missing, todo=TODO, most=MAX_BYTES)
        try:
            return _from_dict(data, where)
        except UserError as error:
            raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def _check_shared(text: TextConfig, layers: Sequence[KeptLayer]) -> None:
    """Raise UserError if a layer keeps other heads than the layer whose keys and values it reuses."""
    kept = keep_layers(text.layers, [layer.index for layer in layers])
    for layer, number in zip(layers, (layer.mixer.source for layer in kept), strict=True):
        source = None if number in (None, NO_LAYER) else layers[number]
        if source is not None and source.kept["kv_heads"] != layer.kept["kv_heads"]:
            raise UserError(
                f"layer {layer.index} uses the keys and values of layer {source.index}, but the plan keeps "
                "different "
                'heads in these two layers: score query heads (gqa="q_heads"), or keep all heads (heads="keep")'
            )


def keep_everything(cfg: ModelConfig, fingerprint: str, parameters: int) -> PrunePlan:
    """Return a plan that removes nothing."""
    return PrunePlan(
        fingerprint=fingerprint,
        method="none",
        criterion="none",
        stacks={name: KeptStack.whole(stack.layers) for name, stack in cfg.stacks.items()},
        parameters_before=parameters,
        parameters_after=parameters,
        parameters_total=parameters,
    )


def compose(first: PrunePlan, second: PrunePlan) -> PrunePlan:
    """Combine two plans: `first` for the model, and `second` for the model that `first` makes.

    Raises UserError if `second` is for other widths than `first` leaves.
    """
    both = first.stacks.keys() & second.stacks.keys()
    follows = all(second.stacks[name].sizes_before == first.stacks[name].sizes for name in both)
    if not follows or second.parameters_before != first.parameters_after:
        raise UserError("the plans cannot be composed: make the second plan for the model that the first plan leaves")
    together = {name: first.stacks[name].then(second.stacks[name]) for name in both}
    stacks = {**first.stacks, **second.stacks, **together}
    vocabulary = first.vocabulary or second.vocabulary
    if first.vocabulary is not None and second.vocabulary is not None:
        vocabulary = first.vocabulary.then(second.vocabulary)
    methods = {first.method, second.method} - {"none", VOCABULARY_ONLY}
    return PrunePlan(
        fingerprint=first.fingerprint,
        method=methods.pop() if len(methods) == 1 else "hybrid" if methods else first.method,
        criterion=first.criterion if first.criterion == second.criterion else f"{first.criterion} + {second.criterion}",
        stacks=stacks,
        parameters_before=first.parameters_before,
        parameters_after=second.parameters_after,
        parameters_total=first.parameters_total,
        options={"first": dict(first.options), "second": dict(second.options)},
        vocabulary=vocabulary,
    )


def _as_json(before: Mapping[str, Sizes], kept: Mapping[str, Units]) -> str:
    """Return a pruned component as JSON text with one line per layer; indices are ranges such as "0-3,7"."""

    def lines(layers: Mapping[str, Any]) -> str:
        return ",\n".join(f"        {json.dumps(layer)}: {json.dumps(axes)}" for layer, axes in layers.items())

    ranges = {layer: {axis: _as_ranges(units) for axis, units in axes.items()} for layer, axes in kept.items()}
    return (
        f'{{\n      "sizes_before": {{\n{lines(before)}\n      }},\n      "kept": {{\n{lines(ranges)}\n      }}\n    }}'
    )


def _as_ranges(indices: Sequence[int]) -> str:
    """Return ascending indices as text: "0-3,7" for 0, 1, 2, 3 and 7."""
    edges = [i for i, (low, high) in enumerate(itertools.pairwise(indices), 1) if high != low + 1]
    bounds = itertools.pairwise([0, *edges, len(indices)])
    ends = [(indices[start], indices[stop - 1]) for start, stop in bounds if stop > start]
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ends)


def _from_ranges(text: str, size: int, where: str) -> tuple[int, ...]:
    """Return the indices below `size` that `_as_ranges` wrote; raise UserError for other text."""
    indices, edge = list[int](), -1
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"([0-9]{1,10})(?:-([0-9]{1,10}))?", part, re.ASCII)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not edge < low <= high < size:
            raise UserError(
                f"prune plan: {where} {part[:40]!r} are not ascending ranges of numbers below {size}: {TODO}"
            )
        indices += range(low, high + 1)
        edge = high
    return tuple(indices)


def _component(name: str, data: Component) -> tuple[KeptStack, tuple[int, tuple[int, ...]] | None]:
    """Return the kept layers of a component, and (size, kept tokens) of its vocabulary if that is trimmed."""
    before, vocabulary = data["sizes_before"], None
    layers = [before[str(i)] for i in range(len(before.keys() - {WHOLE}))]
    kept = {}
    for layer, axes in data["kept"].items():
        sizes = before[layer]
        if unknown := axes.keys() - sizes.keys():
            raise UserError(
                f"prune plan: kept axes {', '.join(sorted(unknown))} of layer {layer} ({name} stack) are missing in "
                f"sizes_before: {TODO}"
            )
        where = f"layer {layer} of {name}" if layer else name
        kept[layer] = {axis: _from_ranges(text, sizes[axis], f"{axis} of {where}") for axis, text in axes.items()}
    if WHOLE in kept:
        whole = kept.pop(WHOLE)
        if name != "text" or whole.keys() != {VOCAB}:
            raise UserError(
                f"prune plan: besides layers, only {VOCAB} of text can be pruned, not {', '.join(whole)} of {name}: "
                f"{TODO}"
            )
        vocabulary = before[WHOLE][VOCAB], whole[VOCAB]
    entries = [KeptLayer(int(layer), axes) for layer, axes in kept.items()]
    return KeptStack(tuple(layers), tuple(entries)), vocabulary


def _from_dict(data: Any, where: str) -> PrunePlan:
    fields: dict[str, Any] = {**as_plan(data, where)}
    components = {name: _component(name, part) for name, part in fields.pop("components").items()}
    tokenizer, vocabulary = fields.pop("tokenizer"), components["text"][1]
    if (tokenizer is None) != (vocabulary is None):
        raise UserError(f"prune plan: has only one of kept tokens and tokenizer digest, expected both or none: {TODO}")
    fields["target_ratio"] = fields.pop("asked")
    stated = {name: value for name, value in fields.items() if name not in ("format", "reached")}
    return PrunePlan(
        **stated,
        stacks={name: stack for name, (stack, _) in components.items()},
        vocabulary=None if vocabulary is None else KeptVocabulary(*vocabulary, tokenizer),
    )
