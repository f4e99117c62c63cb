"""What an experiment is: every setting, declared once, as frozen dataclasses that configs and overrides fill."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.settings import check_settings, setting, settings_of
from vlmprune_jax.evaluation.speed.clock import SpeedConfig
from vlmprune_jax.export.gguf import GgufOptions
from vlmprune_jax.export.integers import IntegerOptions
from vlmprune_jax.prune.config import PlanConfig, ReconstructConfig, ScoreConfig
from vlmprune_jax.recovery.config import MAX_ROWS, RecoverConfig

# What a setting may affect: the stages with results of their own, and the cache of a teacher's logits.
STAGES = ("score", "prune", "reconstruct", "recover", "evaluate", "export", "speed", "teacher_cache")

RECONSTRUCTIONS = ("none", "least_squares")
RECOVERIES = ("train", "none")

_ALL = STAGES
_RECORDS = ("score", "reconstruct", "recover", "evaluate")  # what becomes of a record, beside its batch
_ROWS = (*_RECORDS, "teacher_cache")
_TRAINING = ("score", "reconstruct", "recover")
_SCORE, _PRUNE, _RECONSTRUCT, _RECOVER, _EVALUATE, _EXPORT, _SPEED = ((stage,) for stage in STAGES[:-1])


@dataclass(frozen=True)
class ModelSpec:
    """The model to prune."""

    hf_dir: str = setting("", "Its Hugging Face folder, or hub id.", affects=_ALL, by_content=True)
    vision_dir: str | None = setting(
        None, "Its vision tower's own folder (original LLaVA and Bunny).", affects=_ALL, by_content=True
    )
    dtype: str = setting(
        "float32", "What weights are held and written in until export.", affects=_ALL, choices="hf.disk.dtypes:DTYPES"
    )

    def __post_init__(self) -> None:
        check_settings("model", self)


@dataclass(frozen=True)
class DataSpec:
    """LLaVA records, for calibration, recovery and evaluation."""

    source: str = setting(
        "files",
        '"easyvqa": the demo\'s data, which the command line writes into the workdir.',
        choices=("files", "easyvqa"),
    )
    train: str | None = setting(
        None,
        "Training records: JSON or JSON lines with images below `images`, InternVL's JSON object of several, or "
        '"tfds:FOLDER" (`vlmprune tfds` makes it), which may be a bucket\'s, "tfds:gs://BUCKET/DIR".',
        affects=_TRAINING,
        by_content=True,
    )
    eval: str | None = setting(None, "Evaluation records, as `train`.", affects=_EVALUATE, by_content=True)
    images: str | None = setting(None, "Folder of the images.", affects=_RECORDS, by_content=True)
    eval_images: str | None = setting(
        None, "Folder of the evaluation images; None: `images`.", affects=_EVALUATE, by_content=True
    )
    template: str = setting(
        "auto", 'Prompt template; "auto": the model family\'s.', affects=_ROWS, choices="families:templates"
    )
    system: str | None = setting(None, 'Other system text than the template\'s; "": none.', affects=_ROWS)
    max_length: int | None = setting(
        None,
        "Tokens of a training row with its images, at most 4 times the model's positions; None: those of the longest "
        "record.",
        affects=(*_TRAINING, "teacher_cache"),
        unit="tokens",
        least=1,
    )
    truncate: bool = setting(
        True, "Cut records that are longer, else refuse them.", affects=(*_TRAINING, "teacher_cache")
    )
    max_images: int = setting(1, "Most images of a record.", affects=_RECORDS, unit="images", least=1, most=10_000)
    aspect_ratio: str = setting(
        "pad",
        "How an image becomes square, for models that do not cut images.",
        affects=_ROWS,
        choices="data.images:ASPECT_RATIOS",
    )
    min_tiles: int | None = setting(
        None,
        "Least tiles of an image that is cut (InternVL); None: as the model's folder says.",
        affects=_ROWS,
        unit="tiles",
        least=1,
    )
    max_tiles: int | None = setting(
        None,
        "Most tiles of an image that is cut; None: as the model's folder says.",
        affects=_ROWS,
        unit="tiles",
        least=1,
    )
    thumbnail: bool | None = setting(
        None, "Whether a cut image comes as a whole as well; None: as the model's folder says.", affects=_ROWS
    )
    max_image_tokens: int | None = setting(
        None,
        "Most tokens of an image, for models that take images of any size (Qwen-VL): larger ones are shrunk "
        "(`max_pixels` of their processors, in tokens); None: as the model's folder says.",
        affects=_ROWS,
        unit="tokens",
        least=1,
    )
    image_buckets: tuple[int, ...] = setting(
        (),
        "Numbers of tokens that each image of a batch may be padded to, for models that take images of any size, each "
        "one compiled program; (): doublings from 64 to the most that an image may have.",
        affects=_RECORDS,
        unit="tokens",
    )
    tile_buckets: tuple[int, ...] = setting(
        (),
        "Numbers of image slots that a batch may have, each one compiled program; (): the model's own (1, 2, 4, 7, 13 "
        "for twelve tiles and a thumbnail; 1, 5, 9, 13, 17 for four sub-images a side).",
        affects=_RECORDS,
        unit="images",
    )
    length_buckets: tuple[int, ...] = setting(
        (),
        "Lengths that a training batch may have, the last one `max_length`; (): always `max_length`.",
        affects=_TRAINING,
        unit="tokens",
    )
    group_by: str = setting(
        "none",
        'Which records share a batch: any, those of like "length", or as well only with or without images.',
        affects=_RECOVER,
        choices="data.grouping:GROUPINGS",
    )
    on_error: str = setting(
        "stop",
        'At a training record that cannot be read or does not fit: "stop", or "skip" it (its row is padding, counted, '
        "and listed in training/skipped-*.jsonl).",
        affects=_TRAINING,
        choices="data.batching:ON_ERROR",
    )
    max_image_pixels: int = setting(100_000_000, "Larger images are refused.", unit="pixels", least=1)
    cache_megabytes: int = setting(512, "Memory for prepared images.", unit="MiB", least=0)
    feature_cache: str | None = setting(
        None,
        "A folder, for any number of runs, where recovery keeps what the frozen vision tower makes of each training "
        "image; it then trains without tower and pixels.",
    )
    threads: int = setting(2, "Threads that read and prepare records.", unit="threads", least=0, most=1024)
    fraction: float = setting(
        1.0, "Share of the training records that recovery uses.", affects=_RECOVER, above=0, most=1
    )
    seed: int = setting(42, "Of which records these are.", affects=_RECOVER, least=0, below=2**32)

    def __post_init__(self) -> None:
        check_settings("data", self)


@dataclass(frozen=True)
class ScoreSpec(ScoreConfig):
    """Importance scores of layers, heads and neurons, measured on training records."""

    depth: str = setting(
        "block_influence",
        "Criterion that scores layers (methods depth and hybrid).",
        affects=_SCORE,
        choices="prune.criteria:CRITERIA",
    )
    width: str = setting(
        "taylor",
        "Criterion that scores heads and neurons (methods width and hybrid).",
        affects=_SCORE,
        choices="prune.criteria:CRITERIA",
    )
    samples: int = setting(50, "Number of calibration records.", affects=_SCORE, unit="records", least=1)
    batch_size: int = setting(
        1, "Number of calibration records per batch.", affects=_SCORE, unit="rows", least=1, most=MAX_ROWS
    )
    longest_text: int | None = setting(
        None,
        "Maximum length of a calibration record, counting an image as 1 token (None = no limit).",
        affects=_SCORE,
        unit="tokens",
        least=1,
    )


@dataclass(frozen=True)
class PruneSpec(PlanConfig):
    """How much to remove, and from where."""

    stack: str = setting(
        "text",
        'Stack to prune: the decoder ("text"), the vision tower ("vision"), or both, which then lose the same share.',
        affects=_PRUNE,
        choices=("text", "vision", "both"),
    )
    steps: int = setting(
        1, "Number of rounds of width pruning, with new scores for each.", affects=_PRUNE, unit="rounds", least=1
    )


@dataclass(frozen=True)
class ReconstructSpec(ReconstructConfig):
    """Repair of the pruned weights by least squares, before recovery and without training."""

    method: str = setting(
        "none",
        "Repair the pruned weights by least squares, or leave them unchanged.",
        affects=_RECONSTRUCT,
        choices=RECONSTRUCTIONS,
    )
    samples: int = setting(512, "Number of calibration records.", affects=_RECONSTRUCT, unit="records", least=2)
    batch_size: int = setting(
        8, "Number of calibration records per batch.", affects=_RECONSTRUCT, unit="rows", least=1, most=MAX_ROWS
    )
    longest_text: int | None = setting(
        None,
        "Maximum length of a calibration record, counting an image as 1 token (None = no limit).",
        affects=_RECONSTRUCT,
        unit="tokens",
        least=1,
    )
    seed: int = setting(42, "Random seed for choosing calibration records.", affects=_RECONSTRUCT, least=0, below=2**32)


@dataclass(frozen=True)
class RecoverSpec(RecoverConfig):
    """Training after pruning: `RecoverConfig`, and what goes with it in a workdir.

    The reference's settings per family, distillation included, are recipes to start a config from (`recipes`).
    """

    method: str = setting(
        "train",
        'Train, or leave it at what pruning or reconstruction gave ("none").',
        choices=RECOVERIES,
    )
    name: str = setting("recovered", "What tables call this recovery.")
    save_adapter: bool = setting(
        False,
        "Beside recovered/, where adapters are merged, write adapter/ for `peft` on top of pruned/.",
        affects=_RECOVER,
    )
    teacher_cache: str | None = setting(
        None,
        "A folder, which runs may share, for the teacher's likeliest tokens at every position that counts; what is not "
        "there is computed first, then training runs without the teacher. Not for every loss, and with "
        '`losses.teacher_inputs` "own".',
    )
    teacher_top_k: int = setting(
        64,
        "How many tokens `teacher_cache` keeps of a position.",
        affects=("recover", "teacher_cache"),
        unit="tokens",
        least=1,
    )


@dataclass(frozen=True)
class EvaluationSetSpec:
    """One evaluation set: questions from `data` and `images`, or a `text` file. What is None is as `evaluate` says."""

    data: str | None = setting(None, "Its records; None: `data.eval`.", affects=_EVALUATE, by_content=True)
    images: str | None = setting(
        None, "Folder of their images; None: `data.eval_images`.", affects=_EVALUATE, by_content=True
    )
    text: str | None = setting(None, "A text file in place of records.", affects=_EVALUATE, by_content=True)
    metric: str | None = setting(
        None,
        "What answers are worth; None: `evaluate.metric`, of a text perplexity.",
        choices="evaluation.metrics:METRICS",
    )
    prompt_suffix: str | None = setting(None, "What follows every last question.", affects=_EVALUATE)
    max_new_tokens: int | None = setting(None, "Longest answer.", affects=_EVALUATE, unit="tokens", least=1)
    questions: int | None = setting(None, "Only the first so many.", affects=_EVALUATE, unit="questions", least=1)
    text_window: int | None = setting(
        None, "Tokens of the text that are seen together.", affects=_EVALUATE, unit="tokens", least=2
    )

    def __post_init__(self) -> None:
        check_settings("evaluate.sets", self)
        if self.text is not None and (self.data or self.images or self.prompt_suffix or self.questions):
            raise UserError(
                f"evaluate.sets: a set is a text ({self.text}) or questions: drop its text, or its data, images, "
                "prompt_suffix and questions"
            )


@dataclass(frozen=True)
class EvaluateSpec:
    """Greedy answers to questions, and perplexity of text: what of each model is measured.

    `sets`: the evaluation sets by name, each measured apart, whose settings take the place of those here. Without any
    there is one, "questions", of `data.eval`; and if a `text` file is named one more, "text".
    """

    batch_size: int = setting(32, "Questions of a batch.", affects=_EVALUATE, unit="rows", least=1, most=MAX_ROWS)
    max_length: int | None = setting(
        None, "Longest prompt allowed, with its image; None: any.", affects=_EVALUATE, unit="tokens", least=1
    )
    max_new_tokens: int = setting(16, "Longest answer.", affects=_EVALUATE, unit="tokens", least=1)
    questions: int | None = setting(
        None, "Only the first so many; None: all.", affects=_EVALUATE, unit="questions", least=1
    )
    unrecovered: bool = setting(
        True, "Evaluate the pruned model before recovery as well, and before reconstruction where there is one."
    )
    metric: str = setting(
        "exact_match",
        "What answers are worth, worked out anew from those on disk each time.",
        choices="evaluation.metrics:METRICS",
    )
    prompt_suffix: str = setting(
        "",
        'What follows every last question, such as "\\nAnswer the question using a single word or phrase."',
        affects=_EVALUATE,
    )
    text: str | None = setting(None, "Text file for perplexity.", affects=_EVALUATE, by_content=True)
    text_window: int = setting(
        512, "Tokens of the text that are seen together.", affects=_EVALUATE, unit="tokens", least=2
    )
    tasks: tuple[str, ...] = setting(
        (),
        "lmms-eval tasks, each an evaluation set (docs/how-to/benchmarks.md); or `vlmprune evaluate --tasks=pope,mme`.",
    )
    tasks_path: str | None = setting(
        None,
        "Folder of lmms-eval's task files NAME.yaml, as configs/lmms, in which ${data} and ${lmms_eval} are replaced; "
        "what is not there, and None: lmms-eval's own tasks, whose data comes from the hub.",
        affects=_EVALUATE,
        by_content=True,
    )
    tasks_data: str | None = setting(
        None, "Folder of the data sets that task files call ${data}.", affects=_EVALUATE, by_content=True
    )
    sets: Mapping[str, EvaluationSetSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_settings("evaluate", self)


@dataclass(frozen=True)
class _FormatName:
    format: str = setting(
        "huggingface",
        'Format: "huggingface" (or "compressed-tensors", which `quantize` chooses) or "gguf" (for llama.cpp).',
        affects=_EXPORT,
        choices="export.formats:FORMATS",
    )


@dataclass(frozen=True)
class ExportSpec(IntegerOptions, GgufOptions, _FormatName):
    """The exported model: its format and the options of all built-in formats."""

    quantize: str = setting(
        "none",
        "Type of the decoder's matrices: w8a16, w4a16 or w8a8 in Hugging Face folders (compressed-tensors), q8_0, q5_1 "
        "or q4_0 in GGUF.",
        affects=_EXPORT,
        choices="export.formats:quantizations",
    )
    options: Mapping[str, Any] = setting(
        {}, "Options of the format that have no setting of their own.", affects=_EXPORT
    )

    def __post_init__(self) -> None:
        check_settings("export", self)


@dataclass(frozen=True)
class SpeedSpec(SpeedConfig):
    """Speed measurement of the unpruned and the pruned models in turns, on this machine and in `model.dtype`.

    The report's FLOPs are for the same prompt.
    """

    rounds: int = setting(
        0, "Number of measurements of each model; 0: do not measure speed.", affects=_SPEED, least=0, most=1000
    )


@dataclass(frozen=True)
class MeshSpec:
    """Sizes of the device mesh; -1 takes what is left. All 1 runs on one device without a mesh."""

    data: int = setting(1, "Copies of the model, each with its share of a batch.", unit="devices")
    fsdp: int = setting(1, "Devices that share a copy's weights along the residual width, and a batch.", unit="devices")
    tensor: int = setting(1, "Devices that share heads, neurons and vocabulary.", unit="devices")

    def __post_init__(self) -> None:
        check_settings("mesh", self)


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
    reconstruct: ReconstructSpec = field(default_factory=ReconstructSpec)
    recover: RecoverSpec = field(default_factory=RecoverSpec)
    evaluate: EvaluateSpec = field(default_factory=EvaluateSpec)
    export: ExportSpec = field(default_factory=ExportSpec)
    speed: SpeedSpec = field(default_factory=SpeedSpec)
    mesh: MeshSpec = field(default_factory=MeshSpec)
    prune_variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    recover_variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def sections(experiment: Experiment) -> dict[str, Any]:
    """The sections by name."""
    found = {name: getattr(experiment, name) for name in (f.name for f in dataclasses.fields(experiment))}
    return {name: value for name, value in found.items() if dataclasses.is_dataclass(value)}


def affecting(stage: str, experiment: Experiment) -> dict[str, Any]:
    """`section.name` -> value of every setting that changes a stage's results; sections in a section are mappings.

    Files and folders are not among them: their content counts, as the stage's inputs. Nor is an empty mapping.
    """
    found = {section: _affecting(stage, spec) for section, spec in sections(experiment).items()}
    return {f"{section}.{name}": value for section, values in found.items() for name, value in values.items()}


def _affecting(stage: str, spec: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, about in settings_of(spec).items():
        value = getattr(spec, name)
        if stage in about.affects and about.offered and not about.by_content and value != {}:
            found[name] = value
    inner = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
    parts = {name: _affecting(stage, value) for name, value in inner.items() if dataclasses.is_dataclass(value)}
    return found | {name: part for name, part in parts.items() if part}
