"""Settings of scoring and planning, declared once for Python, configs and the command line; no jax."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from vlmprune_jax.base.budget import Budget
from vlmprune_jax.base.checks import Registry
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import (
    FRACTION,
    MAX_ROWS,
    check_settings,
    prune_setting,
    score_setting,
    setting,
    settings_of,
)
from vlmprune_jax.core.limits import ENGINES
from vlmprune_jax.core.part import LAYERS

WIDTHS = "widths"  # heads and neurons: all axes with scores inside layers that are not parents of others
EXPERTS = "experts"
# Variant of Taylor importance -> True if it needs the squared gradient of every sample.
VARIANTS = {"vectorize": False, "param_first": False, "param_second": True, "param_mix": True}
# combination of the scores of experts over token types
COMBINATIONS = ("pooled", "sum", "max", "floor")
REDUCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sum": lambda stack: stack.sum(axis=0),
    "mean": lambda stack: stack.mean(axis=0),
    "max": lambda stack: stack.max(axis=0),
    "prod": lambda stack: stack.prod(axis=0),
    "first": lambda stack: stack[0],
}
GQA = ("groups", "q_heads")
# Target -> number of which the inputs of `o_proj` and `down_proj` (heads * head_dim, neurons) should be a multiple:
# lanes of a TPU's registers; groups of int4 weights that share a scale; blocks of GGUF's Q8_0, Q4_0 and K-quants
# along a row (a row that does not consist of whole blocks is stored in another type).
BLOCKS = {"tpu": 128, "gguf": 32, "gguf_k": 256, "int4": 128}
_DEPTH = ("layers_removed", "protect", "rounding", "deepstack", "producers")
_WIDTH = (
    "attn_layers", "mlp_layers", "heads_multiple", "neurons_multiple", "align_to", "tensor_parallel", "heads",
    "selection",
)  # fmt: skip
_EXPERTS = ("experts", "experts_multiple")


class Method(NamedTuple):
    """Pruning method: the axes that it prunes, and its settings."""

    axes: tuple[str, ...]
    """Axes in the order in which they are pruned."""

    targets: tuple[str, ...]
    """Settings that it takes as a target in place of a ratio."""

    settings: tuple[str, ...]
    """Settings that not all methods have."""


METHODS = {
    "depth": Method((LAYERS,), ("layers_removed", "layers"), ("layers", *_DEPTH)),
    "width": Method((WIDTHS,), ("sparsity",), ("sparsity", *_WIDTH, *_EXPERTS)),
    "hybrid": Method((LAYERS, WIDTHS), (), (*_DEPTH, *_WIDTH, *_EXPERTS, "depth_share")),
    "experts": Method((EXPERTS,), ("experts", "sparsity"), ("sparsity", *_EXPERTS)),
}
# Criteria by name; `prune.criteria`, which needs jax, fills it. A user's file adds its own by assignment.
CRITERIA: Registry[Any] = Registry("criteria")


@dataclass(frozen=True)
class ScoreConfig:
    """Settings of the importance scores of layers, heads and neurons, computed on calibration records."""

    SECTION: ClassVar[str] = "score"

    depth: str = score_setting(
        "block_influence",
        'Criterion that scores layers, for methods "depth" and "hybrid".',
        choices=CRITERIA,
    )
    width: str = score_setting(
        "taylor",
        'Criterion that scores heads, neurons or experts, for methods "width", "hybrid" and "experts".',
        choices=CRITERIA,
    )
    samples: int = score_setting(50, "Number of calibration records for scoring.", unit="records", least=1)
    batch_size: int = score_setting(1, "Number of calibration records per batch.", unit="rows", least=1, most=MAX_ROWS)
    longest_text: int | None = score_setting(
        None,
        "Maximum length of a calibration record, counting 1 token per image; longer records are not used (None = any).",
        unit="tokens",
        least=1,
    )

    variant: str = score_setting(
        "param_first",
        'Taylor importance, from weights w and gradients g: sum of |w g| ("param_first"), |sum of w g| ("vectorize"), '
        'second order ("param_second"), or first and second order ("param_mix").',
        choices=tuple(VARIANTS),
    )
    reduction: str | None = score_setting(
        None,
        "Combination of the scores of a head's or neuron's weight matrices (None = the criterion's default).",
        choices=tuple(REDUCTIONS),
    )
    gqa: str = score_setting(
        "groups",
        'Unit of attention pruning: a key/value head with all its query heads ("groups"), or single query heads, the '
        'same number from every group ("q_heads").',
        choices=GQA,
    )
    reference_compat: bool = score_setting(
        False, "Sum Block Influence and angular distance exactly as the paper's code does, padding tokens included."
    )
    layers_removed: int | None = score_setting(
        None,
        "Number of consecutive layers that the criterion `angular` (which needs it) scores as one block.",
        unit="layers",
        least=1,
    )
    seed: int = score_setting(
        42, "Random seed for choosing calibration records, and for the random criterion.", least=0, below=2**32
    )
    prompt_weight: float = score_setting(1.0, "Weight of prompt tokens in importance scores (0 = ignored).", least=0)
    image_weight: float = score_setting(
        1.0, "Weight of image and video tokens in importance scores (0 = ignored).", least=0
    )
    answer_weight: float = score_setting(1.0, "Weight of answer tokens in importance scores (0 = ignored).", least=0)
    token_types: str = score_setting(
        "pooled",
        'Combination of expert scores over token types (image, prompt, answer): all tokens together ("pooled"), sum or '
        'maximum over types of normalised scores ("sum", "max"), or the best rank in any type ("floor").',
        choices=COMBINATIONS,
    )
    by_token_type: bool = score_setting(
        False,
        "Also compute Taylor scores for prompt, image, video and answer tokens separately (other criteria always do).",
    )
    memory_budget: int | None = setting(
        None,
        "Maximum device memory for the outputs of a layer's projections, which the Taylor criterion reads again in its "
        "backward pass; outputs beyond it are computed twice, with equal scores (None = half of the free memory).",
        unit="bytes",
        least=0,
    )
    options: Mapping[str, Any] = score_setting(
        {}, "Additional options of the criterion, by name; needed for user-defined criteria."
    )

    def __post_init__(self) -> None:
        check_settings("score", self)

    def criteria(self, method: str) -> tuple[str, ...]:
        """Return the criteria that a pruning method needs, that of layers before that of widths."""
        axes = METHODS[method].axes if method in METHODS else (WIDTHS,)
        return tuple(self.depth if axis == LAYERS else self.width for axis in axes)


@dataclass(frozen=True)
class VocabularyConfig:
    """Settings of vocabulary trimming, which removes tokens from tokenizer, embedding and output head."""

    size: int | None = prune_setting(
        None,
        "Number of tokens to keep, rounded up to `multiple` (None = the whole vocabulary): first bytes, special "
        "tokens and the templates' tokens, then tokens in `sources` by frequency, then others by merge rank.",
        unit="tokens",
        least=1,
    )
    sources: tuple[str, ...] = prune_setting(
        (),
        "Files with texts whose tokens are kept: records as in `data.train`, text files, or JSON lists of texts; or "
        "JSON lists of token ids to keep (() = `data.train`).",
        by_content=True,
    )
    held_out: tuple[str, ...] = prune_setting(
        (),
        "Files like `sources`, whose texts measure the trimmed vocabulary and do not choose tokens (() = every tenth "
        "text of `sources`, if there are at least 20).",
        by_content=True,
    )
    multiple: int = prune_setting(
        64,
        "Multiple to which the number of kept tokens is rounded up: 64 for tensor cores, 128 x `mesh.tensor` for TPUs.",
        unit="tokens",
        least=1,
        most=2**20,
    )
    bits: bool = prune_setting(
        True, "Also measure bits per byte on held-out texts, with the unpruned model's whole and trimmed vocabulary."
    )
    source_dir: str | None = setting(None, "Folder of the model whose tokenizer and configs are read.", offered=False)

    def __post_init__(self) -> None:
        check_settings("prune.vocabulary", self)


@dataclass(frozen=True)
class PlanConfig:
    """Settings of pruning, such as the method, the amount to remove, and the parts of the model to prune."""

    method: str = prune_setting(
        "depth",
        'Parts to remove: whole layers ("depth"), attention heads and neurons, also of experts ("width"), layers and '
        'then heads and neurons ("hybrid"), equally many experts of every layer ("experts"), or nothing ("none"), to '
        "train or evaluate the unpruned model.",
        choices=(*METHODS, "none"),
    )
    ratio: float | None = prune_setting(
        None,
        "Share of all parameters of the model to remove; vocabulary rows count too.",
        unit=FRACTION,
        least=0,
        below=1,
    )
    layers_removed: int | None = prune_setting(
        None, 'Number of layers to remove, instead of `ratio` (methods "depth" and "hybrid").', unit="layers", least=0
    )
    layers: tuple[int, ...] = prune_setting(
        (),
        'Layers to remove, by original layer number, instead of `ratio` (method "depth"). No scores are computed.',
        unit="layers",
        least=0,
    )
    protect: tuple[int, ...] = prune_setting(
        (), "Layers that depth pruning never removes, by original layer number.", unit="layers", least=0
    )
    rounding: str = prune_setting(
        "nearest",
        'Rounding of the number of removed layers: nearest to `ratio` ("nearest"), or smallest that reaches it '
        '("at_least").',
        choices=("nearest", "at_least"),
    )
    deepstack: str = prune_setting(
        "keep",
        "Decoder layers whose outputs receive vision features (the first layers of Qwen3-VL): keep these layers "
        '("keep"), or move the features to the first remaining layers ("move").',
        choices=("keep", "move"),
    )
    producers: str = prune_setting(
        "keep",
        'Layers whose keys and values later layers reuse (Gemma 4): never remove them ("keep"), or let the later '
        'layers use the keys and values of an earlier layer ("redirect").',
        choices=("keep", "redirect"),
    )
    attn_layers: tuple[int, ...] = prune_setting(
        (),
        "Layers that get fewer attention heads: half-open range (start, stop) of original numbers (() = all).",
        unit="layers",
        least=0,
    )
    mlp_layers: tuple[int, ...] = prune_setting(
        (),
        "Layers that get fewer MLP neurons: half-open range (start, stop) of original numbers (() = all).",
        unit="layers",
        least=0,
    )
    heads_multiple: int = prune_setting(
        1, "Multiple to which the number of kept heads per layer is rounded.", unit="heads", least=1
    )
    neurons_multiple: int = prune_setting(
        1, "Multiple to which the number of kept neurons per layer is rounded.", unit="neurons", least=1
    )
    align_to: str | None = prune_setting(
        None,
        'Round widths to whole blocks of a target: 128 for "tpu" (lanes) and "int4" (groups), 32 for "gguf" '
        '(Q8_0, Q4_0), 256 for "gguf_k" (K-quants); None = any widths.',
        choices=tuple(BLOCKS),
    )
    tensor_parallel: int = prune_setting(
        1,
        "Number of devices that must get equal shares of the kept heads and neurons, in blocks of `align_to`.",
        unit="devices",
        least=1,
    )
    heads: str = prune_setting(
        "auto",
        'Number of attention heads to remove: the same share as of neurons ("proportional", as in the paper), none '
        '("keep"), or the split between heads and neurons with the lowest removed scores ("auto"; '
        "proportional with `sparsity` or global selection).",
        choices=("proportional", "keep", "auto"),
    )
    selection: str = prune_setting(
        "local",
        'Ranking of heads and neurons: within each layer ("local", equal widths), or over all layers ("global").',
        choices=("local", "global"),
    )
    loads_in: tuple[str, ...] = prune_setting(
        (),
        'Engines that must load the pruned model at its true size; other plans are refused. `heads="auto"` keeps all '
        "heads if an engine needs them.",
        choices=ENGINES,
    )
    sparsity: float | None = prune_setting(
        None,
        "Share of heads and neurons to remove from each layer in `attn_layers` and `mlp_layers`, instead of `ratio`.",
        unit=FRACTION,
        least=0,
        below=1,
    )
    experts: int | None = prune_setting(
        None,
        'Number of experts that every layer keeps, instead of `ratio` (method "experts"), or before heads and neurons '
        'are removed up to `ratio` (methods "width" and "hybrid").',
        unit="experts",
        least=1,
    )
    experts_multiple: int | None = prune_setting(
        None,
        "Multiple to which the number of kept experts per layer is rounded (None = 64 for 256, 320, ... experts, 32 "
        "for 128, 160, ..., else 1).",
        unit="experts",
        least=1,
    )
    depth_share: float = prune_setting(
        0.5, "Share of hybrid pruning's reduction that comes from removing layers.", unit=FRACTION, least=0, below=1
    )
    stack: str = prune_setting(
        "text",
        'Part of the model to prune: decoder ("text"), vision tower ("vision"), or both with the same share removed.',
        choices=("text", "vision", "both"),
    )
    steps: int = prune_setting(
        1, "Number of steps of width pruning; scores are computed again before each step.", unit="steps", least=1
    )
    budget: Budget = field(default_factory=Budget)
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)

    def __post_init__(self) -> None:
        check_settings("prune", self)

    @property
    def targets(self) -> list[str]:
        """Names of the settings that say what or how much to remove, if they are set."""
        names = ("ratio", "layers_removed", "layers", "sparsity", "experts")
        return [name for name in names if getattr(self, name) not in (None, ())] + ["budget"] * bool(self.budget.limits)

    @property
    def only_vocabulary(self) -> bool:
        """True if only the vocabulary is trimmed, and no layers, heads or neurons are removed."""
        return self.vocabulary.size is not None and not self.targets

    @property
    def needs_scores(self) -> bool:
        """True if scores choose what is removed; False for listed layers, the vocabulary, or nothing."""
        return not (self.layers or self.only_vocabulary or self.method == "none")

    @property
    def lacked(self) -> list[str]:
        """Names of the settings that the pruning method does not have."""
        partial = {name for method in METHODS.values() for name in method.settings}
        return [name for name in settings_of(self) if name in partial - {*METHODS[self.method].settings}]

    def recorded(self) -> dict[str, Any]:
        """Return the pruning method's settings that a plan records in its options, as JSON values."""
        others = ("method", "ratio", "layers_removed", "layers", "stack", "steps", *self.lacked)
        values = {name: getattr(self, name) for name in settings_of(self) if name not in others}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def check(self, named: Collection[str] = ()) -> None:
        """Raise UserError for settings that the pruning method does not use, or unless exactly one target is set.

        `named`: settings passed by name in a call. `heads` may be set for all methods, because the paper's recipes do
        so. The message names the setting or the targets.
        """
        check_settings("prune", self, elsewhere=True)
        if self.method == "none":
            raise UserError(f'prune.method="none" removes nothing, so there is no plan: use {", ".join(METHODS)}')
        for name in self.lacked:
            changed = getattr(self, name) != settings_of(self)[name].default
            if name in named or (changed and name != "heads"):
                others = [name_of for name_of, method in METHODS.items() if name in method.settings]
                raise UserError(
                    f"prune.{name}: method {self.method!r} has no such setting, only {' and '.join(others)}: leave it "
                    "out, or change prune.method"
                )
        names = ("ratio", *METHODS[self.method].targets)
        targets = [name for name in self.targets if name in (*names, "budget")]
        if len(targets) > 1 or (not targets and self.vocabulary.size is None and self.experts is None):
            raise UserError(
                f"prune: method {self.method!r} needs exactly one of {', '.join(names)} and budget, got "
                f"{' and '.join(targets) or 'none'}"
            )
