"""What an experiment is: every setting with its default, as frozen dataclasses that configs and overrides fill."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmprune_jax.checks import suggest
from vlmprune_jax.errors import UserError


def _check(section: str, spec: Any, **least: int) -> None:
    """Refuse numbers below these, and a seed that no generator takes."""
    for name, low in least.items():
        value = getattr(spec, name)
        if value is not None and value < low:
            raise UserError(f"{section}.{name}={value} must be at least {low}")
    if not 0 <= getattr(spec, "seed", 0) < 2**32:
        raise UserError(f"{section}.seed={spec.seed} must be at least 0 and below 2**32")


@dataclass(frozen=True)
class ModelSpec:
    """The model to prune. `vision_dir`: its vision tower's own folder (original LLaVA and Bunny)."""

    hf_dir: str = ""
    vision_dir: str | None = None
    dtype: str = "float32"


@dataclass(frozen=True)
class DataSpec:
    """LLaVA records. `source`: "files", or "easyvqa" (the demo's data, which the command line writes into the workdir).

    `train`, `eval`: JSON or JSON-lines files with images below `images`, InternVL's JSON object of several, or
    "tfds:FOLDER" (`vlmprune tfds` makes it), which may be a bucket's: "tfds:gs://BUCKET/DIR".
    `template`: "auto" = the model family's. `system`: other system text than the template's ("" = none).
    `max_length`: tokens per training row with its images, None = that of the longest record. `max_images`: most images
    of a record. `aspect_ratio`: "pad" or "square", for models that do not cut images. `min_tiles`, `max_tiles`,
    `thumbnail`: how InternVL cuts them, None = as the model's folder says. `tile_buckets`: numbers of image slots
    that a batch may have, each one compiled program, () = the model's own (1, 2, 4, 7, 13 for twelve tiles and a
    thumbnail). `length_buckets`: the same for tokens of training rows, () = always `max_length`; the last one is
    `max_length`. `group_by`: which records share a batch, "none", "length" or "modality_length" (as well, those with
    images and those without apart). `on_error`: "stop" at a training record that cannot be read or does not fit, or
    "skip" it: its row is padding, counted in the summary and listed in training/skipped-*.jsonl. `feature_cache`: a
    folder, for any number of runs, where recovery keeps what the frozen vision tower makes of each training image; it
    then trains without tower and pixels. `fraction`, `seed`: which training records.
    """

    source: str = "files"
    train: str | None = None
    eval: str | None = None
    images: str | None = None
    eval_images: str | None = None
    template: str = "auto"
    system: str | None = None
    max_length: int | None = None
    truncate: bool = True
    max_images: int = 1
    aspect_ratio: str = "pad"
    min_tiles: int | None = None
    max_tiles: int | None = None
    thumbnail: bool | None = None
    tile_buckets: tuple[int, ...] = ()
    length_buckets: tuple[int, ...] = ()
    group_by: str = "none"
    on_error: str = "stop"
    max_image_pixels: int = 100_000_000
    cache_megabytes: int = 512
    feature_cache: str | None = None
    threads: int = 2
    fraction: float = 1.0
    seed: int = 42

    def __post_init__(self) -> None:
        _check("data", self, max_length=1, max_images=1, max_image_pixels=1, cache_megabytes=0, threads=0)


@dataclass(frozen=True)
class ScoreSpec:
    """What to measure, on how many training records (see `prune.score`). `depth`, `width`: each method's criterion.

    `reduction`: over the tensors of a group, None = the criterion's own. `layers_removed`: block length of the angular
    criterion. `longest_text`: only records of at most so many tokens, an image counting 1 (None = any).
    `reference_compat`: Block Influence and the angular distance exactly as the paper's code sums them. `options`: a
    criterion's options that have no setting here, by name.
    """

    depth: str = "block_influence"
    width: str = "taylor"
    variant: str = "param_first"
    reduction: str | None = None
    gqa: str = "groups"
    reference_compat: bool = False
    layers_removed: int | None = None
    longest_text: int | None = None
    samples: int = 50
    batch_size: int = 1
    seed: int = 42
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check("score", self, samples=1, batch_size=1, longest_text=1, layers_removed=1)


@dataclass(frozen=True)
class PruneSpec:
    """How much goes, and from where (see `make_plan`). `ratio` is the reduction of the whole model's parameters.

    `attn_layers`, `mlp_layers`: () = all, or a half-open (start, stop) in original numbers. `steps`: width pruning in
    so many rounds, each with new scores.
    """

    method: str = "depth"
    ratio: float | None = None
    layers_removed: int | None = None
    protect: tuple[int, ...] = ()
    rounding: str = "nearest"
    attn_layers: tuple[int, ...] = ()
    mlp_layers: tuple[int, ...] = ()
    heads_multiple: int = 1
    neurons_multiple: int = 1
    selection: str = "local"
    sparsity: float | None = None
    depth_share: float = 0.5
    steps: int = 1

    def __post_init__(self) -> None:
        _check("prune", self, steps=1)


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters, used when `recover.trainable` is "lora"; no targets means every projection of the decoder."""

    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class LossSpec:
    """Weights of the loss terms and how they are measured (see `recover.losses.LossConfig`)."""

    ce: float = 1.0
    l2: float = 0.0
    cosine: float = 0.0
    kl: float = 0.0
    rkl: float = 0.0
    l2_layers: tuple[int, ...] = (-1,)
    temperature: float = 2.0
    teacher_inputs: str = "student"
    reference_compat: bool = False
    chunk: int = 128
    kl_positions: str = "all"


@dataclass(frozen=True)
class RecoverSpec:
    """Training after pruning (see `RecoverConfig`); the defaults are LLaVA's LoRA fine-tuning, without a teacher.

    The reference's settings per family, distillation included, are recipes to start a config from (`recipes`).

    `trainable`: projector, lora, decoder or all. `steps` count instead of `epochs` if given. `name` is what tables call
    this recovery. `save_adapter`: beside recovered/, where adapters are merged, adapter/ for `peft` on top of pruned/.
    `teacher_cache`: a folder for the teacher's `teacher_top_k` likeliest tokens at every position that `losses.kl`
    counts; what is not there is computed first, then training runs without the teacher. For losses ce and kl, with
    `losses.teacher_inputs` "own"; runs may share it.
    """

    name: str = "recovered"
    trainable: str = "lora"
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 128
    accumulation: int = 1
    learning_rate: float = 2e-4
    projector_learning_rate: float | None = 2e-5
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup_ratio: float = 0.03
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    compute_dtype: str = "float32"
    remat: str = "dots"
    lora: LoraSpec = field(default_factory=LoraSpec)
    save_adapter: bool = False
    losses: LossSpec = field(default_factory=LossSpec)
    teacher_cache: str | None = None
    teacher_top_k: int = 64
    log_every: int = 10
    save_every: int = 100
    keep_checkpoints: int = 2
    seed: int = 42

    def __post_init__(self) -> None:
        _check("recover", self, teacher_top_k=1)


@dataclass(frozen=True)
class EvaluationSetSpec:
    """One evaluation set: questions from `data` and `images`, or a `text` file. What is None is as `evaluate` says.

    `data`, `images`: as `data.eval` and `data.eval_images`, which they are by default. `metric`: a name in `vp.metrics`
    (default: exact_match; perplexity of a text). `prompt_suffix`: what follows every last question, such as
    "\\nAnswer the question using a single word or phrase."
    """

    data: str | None = None
    images: str | None = None
    text: str | None = None
    metric: str | None = None
    prompt_suffix: str | None = None
    max_new_tokens: int | None = None
    questions: int | None = None
    text_window: int | None = None

    def __post_init__(self) -> None:
        _check("evaluate.sets", self, max_new_tokens=1, questions=1, text_window=2)
        if self.text is not None and (self.data or self.images or self.prompt_suffix or self.questions):
            raise UserError(
                f"evaluate.sets: a set is a text ({self.text}) or questions: drop its text, or its data, images, "
                "prompt_suffix and questions"
            )


@dataclass(frozen=True)
class EvaluateSpec:
    """Greedy answers to questions, and perplexity of text: what of each model is measured.

    `sets`: the evaluation sets by name, each measured apart. Without any there is one, "questions", of `data.eval`; and
    if a `text` file is named one more, "text". Sets have these settings too, in place of those here: `metric`,
    `prompt_suffix`, `max_new_tokens`, `questions` (only the first so many), `text_window` (tokens per forward pass).
    `max_length`: longest prompt allowed, with its image (None = any). `unrecovered`: whether the pruned model is
    evaluated before recovery as well.
    """

    batch_size: int = 32
    max_length: int | None = None
    max_new_tokens: int = 16
    questions: int | None = None
    unrecovered: bool = True
    metric: str = "exact_match"
    prompt_suffix: str = ""
    text: str | None = None
    text_window: int = 512
    sets: Mapping[str, EvaluationSetSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check("evaluate", self, batch_size=1, max_length=1, max_new_tokens=1, questions=1, text_window=2)


@dataclass(frozen=True)
class ExportSpec:
    """The folder handed out. `layout`: "source" or "transformers". `uneven`: what to do with unequal layer widths."""

    layout: str = "source"
    uneven: str = "per_layer"
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class MeshSpec:
    """Sizes of the device mesh; -1 takes what is left. All 1 runs on one device without a mesh."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class Experiment:
    """One model pruned, recovered, evaluated and exported.

    `variants` make it a grid in one workdir: every prune variant with every recovery variant. A variant is a name and a
    partial experiment that overrides this one. Without variants there is one of each, in the workdir itself.
    """

    model: ModelSpec = field(default_factory=ModelSpec)
    data: DataSpec = field(default_factory=DataSpec)
    score: ScoreSpec = field(default_factory=ScoreSpec)
    prune: PruneSpec = field(default_factory=PruneSpec)
    recover: RecoverSpec = field(default_factory=RecoverSpec)
    evaluate: EvaluateSpec = field(default_factory=EvaluateSpec)
    export: ExportSpec = field(default_factory=ExportSpec)
    mesh: MeshSpec = field(default_factory=MeshSpec)
    prune_variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    recover_variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def override(spec: Any, values: Mapping[str, Any], where: str = "config") -> Any:
    """`spec` (any of these dataclasses) with a nested mapping of values in place of its own.

    Raises:
      UserError: a name that does not exist, with the nearest that does, or a value of the wrong kind.
    """
    hints = typing.get_type_hints(type(spec))
    changes = {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{where} has no {name!r}{suggest(name, hints)}")
        current = getattr(spec, name)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, Mapping):
                raise UserError(f"{where}.{name} is a section, it cannot be {value!r}")
            changes[name] = override(current, value, f"{where}.{name}")
        else:
            changes[name] = _checked(value, hints[name], f"{where}.{name}")
    return dataclasses.replace(spec, **changes)


def _named(section: Any, value: Any, where: str) -> Any:
    """A section of those that a mapping has by names of the user's."""
    if isinstance(value, section):
        return value
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is a section, it cannot be {value!r}")
    return override(section(), value, where)


def _checked(value: Any, kind: Any, where: str) -> Any:
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    for option in options:
        plain = typing.get_origin(option) or option
        if plain is tuple and isinstance(value, (tuple, list)):
            inner = typing.get_args(option)[0]
            return tuple(_checked(item, inner, f"{where}[{i}]") for i, item in enumerate(value))
        if plain is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if plain is Mapping and isinstance(value, Mapping):
            section = typing.get_args(option)[1]
            if dataclasses.is_dataclass(section):
                return {key: _named(section, inner, f"{where}.{key}") for key, inner in value.items()}
            return {key: dict(inner) if isinstance(inner, Mapping) else inner for key, inner in value.items()}
        if isinstance(plain, type) and isinstance(value, plain) and (plain is bool or not isinstance(value, bool)):
            return value
    names = " or ".join("nothing" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    raise UserError(f"{where} is {value!r}, expected {names}")
