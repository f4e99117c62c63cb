"""Prune plan: the kept layers, heads, neurons and tokens in original numbering, as a small JSON."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec

from vlmprune_jax.core.config import STACKS, ModelConfig, TextConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.files import Count, Finite, checked, parse_json, read_json, replacing
from vlmprune_jax.core.stack import LayerShape, describe_layers
from vlmprune_jax.families.decoders import layer_problem
from vlmprune_jax.prune.kept import KeptLayer, KeptStack, KeptVocabulary

FORMAT, READS = 3, (2, 3)  # format 2 has no vocabulary
VOCABULARY_ONLY = "vocabulary"  # method of a plan that only removes tokens
MAX_BYTES = 2**26  # the plan of a 70B model that keeps everything has 16 MB
_TODO = "plan again"
_Index = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_Width = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
_FEW = msgspec.Meta(max_length=10_000)


class _VersionJson(TypedDict):
    format: int


class _StackJson(TypedDict):
    """JSON form of a pruned stack; `kept_layers` repeats the layer numbers for human readers."""

    kept_layers: NotRequired[list[_Index]]
    layers_before: Annotated[list[tuple[_Width, _Width, _Width]], _FEW]
    layers: Annotated[list[KeptLayer], _FEW]


class _VocabularyJson(TypedDict):
    """JSON form of a kept vocabulary; `kept` lists ranges [start, stop) of token ids."""

    rows_before: Annotated[int, msgspec.Meta(ge=1, le=2**24)]
    tokenizer: str
    kept: Annotated[list[tuple[_Index, _Width]], msgspec.Meta(min_length=1, max_length=2**22)]


class _PlanJson(_VersionJson):
    fingerprint: str
    method: str
    criterion: str
    asked: Finite | None
    reached: NotRequired[Finite]
    parameters_before: Count
    parameters_after: Count
    parameters_total: Annotated[int, msgspec.Meta(ge=1, le=2**53)]
    options: dict[str, Any]
    stacks: dict[str, _StackJson]
    vocabulary: NotRequired[_VocabularyJson | None]


@dataclass(frozen=True)
class PrunePlan:
    """Prune plan: kept layers, heads, neurons and tokens, settings, and the fingerprint of the model that it is for.

    `stacks`: kept layers by name of the stack; always the decoder, "text"; a stack without an entry is kept whole.
    `vocabulary`: kept tokens, None if all are.
    `layers_before`, `layers`, `kept_layers` and `removed_layers` are the decoder's. `asked` and `reached` are
    reductions relative to `parameters_total` (by default all parameters of the computed model); `asked` is None if no
    ratio was asked for.
    """

    fingerprint: str
    method: str
    criterion: str
    stacks: Mapping[str, KeptStack]
    parameters_before: int
    parameters_after: int
    parameters_total: int
    asked: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: KeptVocabulary | None = None

    def __post_init__(self) -> None:
        if "text" not in self.stacks or not self.stacks.keys() <= set(STACKS):
            raise UserError(f"prune plan: stacks are {', '.join(self.stacks)}, expected text, or text and vision")

    def __repr__(self) -> str:
        """Return method, sizes and layers of each pruned stack as text, without indices."""
        sizes = (
            f"{self.parameters_before:,} -> {self.parameters_after:,} parameters, {100 * self.reached:.2f} % removed"
        )
        lines = [f"PrunePlan({self.method} by {self.criterion}: {sizes}"]
        for name, stack in self.stacks.items():
            if stack.shapes != stack.layers_before:
                gone = f", without {', '.join(map(str, stack.removed_layers))}" if stack.removed_layers else ""
                before = len(stack.layers_before)
                lines.append(
                    f"  {name}: {len(stack.layers)} of {before} layers{gone}; {describe_layers(stack.shapes, most=3)}"
                )
        return "\n".join(lines) + ")"

    @property
    def layers_before(self) -> tuple[LayerShape, ...]:
        """Shapes of the decoder's layers before pruning."""
        return self.stacks["text"].layers_before

    @property
    def layers(self) -> tuple[KeptLayer, ...]:
        """Entries (`KeptLayer`) of the kept decoder layers."""
        return self.stacks["text"].layers

    @property
    def reached(self) -> float:
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
            before = cfg.stack(name).layers
            if name == "text":
                _check_shared(cfg.text, kept.layers)
            shapes = [before[one.index].with_widths(*one.shape.widths) for one in kept.layers]
            cfg = cfg.with_layers(shapes, name)
        problem = layer_problem(cfg.text)
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
            "asked": self.asked,
            "reached": self.reached,
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "parameters_total": self.parameters_total,
            "options": dict(self.options),
            "vocabulary": None if self.vocabulary is None else _vocabulary_json(self.vocabulary),
        }
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
        stacks = ",\n".join(f"    {json.dumps(name)}: {_as_json(kept)}" for name, kept in self.stacks.items())
        text = "\n".join(["{", *lines, '  "stacks": {', stacks, "  }", "}"]) + "\n"
        if path is not None:
            with replacing(Path(path)) as file:
                file.write(text.encode())
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> PrunePlan:
        """Read a plan from a JSON file or from JSON text.

        Raises UserError if there is no such file, it is not JSON, or a key is missing or inconsistent.
        """
        if isinstance(source, str) and source.lstrip().startswith("{"):
            where, data = "plan JSON", parse_json(source, "plan JSON", _TODO)
        else:
            where = str(source)
            missing = "no such plan: run `vlmprune prune` first"
            data = read_json(Path(source), Any, missing=missing, todo=_TODO, most=MAX_BYTES)
        try:
            return _from_dict(data, where)
        except UserError as error:
            raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def _check_shared(text: TextConfig, layers: Sequence[KeptLayer]) -> None:
    """Raise UserError if a layer keeps other heads than the layer whose keys and values it reuses."""
    kept = [text.layers[layer.index] for layer in layers]
    for layer, shape in zip(layers, kept, strict=True):
        makers = [one for one, s in zip(layers, kept, strict=True) if not s.shared and s.window == shape.window]
        if shape.shared and makers and makers[-1].kv_heads != layer.kv_heads:
            raise UserError(
                f"layer {layer.index} uses the keys and values of layer {makers[-1].index}, but the plan keeps "
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
    follows = all(second.stacks[name].layers_before == first.stacks[name].shapes for name in both)
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
        stacks={name: stacks[name] for name in STACKS if name in stacks},
        parameters_before=first.parameters_before,
        parameters_after=second.parameters_after,
        parameters_total=first.parameters_total,
        options={"first": dict(first.options), "second": dict(second.options)},
        vocabulary=vocabulary,
    )


def _vocabulary_json(vocabulary: KeptVocabulary) -> dict[str, Any]:
    """Return a kept vocabulary's JSON form, with ranges [start, stop) of token ids."""
    edges = [i for i, (low, high) in enumerate(itertools.pairwise(vocabulary.kept), 1) if high != low + 1]
    bounds = itertools.pairwise([0, *edges, len(vocabulary.kept)])
    ranges = [(vocabulary.kept[start], vocabulary.kept[stop - 1] + 1) for start, stop in bounds]
    return {"rows_before": vocabulary.rows_before, "tokenizer": vocabulary.tokenizer, "kept": ranges}


def _vocabulary_from_dict(data: _VocabularyJson | None) -> KeptVocabulary | None:
    if data is None:
        return None
    if sum(max(stop - start, 0) for start, stop in data["kept"]) > data["rows_before"]:
        raise UserError(f"prune plan: keeps more tokens than the vocabulary has ({data['rows_before']:,}): {_TODO}")
    kept = tuple(itertools.chain.from_iterable(range(*bounds) for bounds in data["kept"]))
    return KeptVocabulary(data["rows_before"], kept, data["tokenizer"])


def _as_json(kept: KeptStack) -> str:
    """Return a pruned stack as JSON text with one line per layer."""
    lines = [
        f'"kept_layers": {json.dumps(kept.kept_layers)}',
        f'"layers_before": {json.dumps([shape.widths for shape in kept.layers_before])}',
        '"layers": [',
    ]
    layers = ",\n".join(f"        {json.dumps(vars(layer))}" for layer in kept.layers)
    return "{\n" + ",\n".join(f"      {line}" for line in lines) + f"\n{layers}\n      ]\n    }}"


def _stack_from_dict(data: _StackJson) -> KeptStack:
    stack = KeptStack(tuple(LayerShape(*shape) for shape in data["layers_before"]), tuple(data["layers"]))
    if data.get("kept_layers", [*stack.kept_layers]) != [*stack.kept_layers]:
        raise UserError(f"prune plan: kept_layers disagree with layers: {_TODO}")
    return stack


def _from_dict(data: Any, where: str) -> PrunePlan:
    known = checked(data, _VersionJson, where, _TODO)["format"]
    if known not in READS:
        todo = "upgrade vlmprune-jax" if known > FORMAT else _TODO
        raise UserError(f"this plan has format {known}, but this version of vlmprune reads {FORMAT}: {todo}")
    fields = msgspec.convert(checked(data, _PlanJson, where, _TODO), _PlanJson)
    stacks = {name: _stack_from_dict(one) for name, one in fields["stacks"].items()}
    vocabulary = _vocabulary_from_dict(fields.get("vocabulary"))
    stated: dict[str, Any] = {name: value for name, value in fields.items() if name not in ("format", "reached")}
    return PrunePlan(**{**stated, "stacks": stacks, "vocabulary": vocabulary})
