"""Settings of the section `data`: records and images, and their encoding as rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.settings import FRACTION, check_settings, setting

_RECORDS = ("score", "reconstruct", "recover", "evaluate")  # stages that read records
_ROWS = (*_RECORDS, "teacher_cache")
_TRAINING = ("score", "reconstruct", "recover")
_RECOVER, _EVALUATE = ("recover",), ("evaluate",)


class Calibration(Protocol):
    """Settings of a section that draws calibration records; `SECTION` is its name, for messages."""

    SECTION: ClassVar[str]

    @property
    def samples(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def longest_text(self) -> int | None: ...


@dataclass(frozen=True)
class DataSpec:
    """Records for calibration, recovery and evaluation, and their encoding as rows."""

    source: str = setting(
        "files",
        'Source of the records: the files below ("files"), or the demo\'s data, which vlmprune writes into the workdir '
        '("easyvqa").',
        choices=("files", "easyvqa"),
    )
    train: str | None = setting(
        None,
        "Training records: a JSON or JSON-lines file (LLaVA's format, OpenAI's `messages`, or questions), InternVL's "
        'JSON file that names several such files, "tfds:FOLDER" (written by `vlmprune tfds`; may be in a bucket, '
        '"tfds:gs://BUCKET/DIR"), "datasets:FOLDER" (written by `save_to_disk` of Hugging Face datasets), or '
        '"hub:ORG/NAME:SPLIT", which is stored in the workdir ("hub:ORG/NAME/CONFIG:SPLIT[:5000]" streams the first '
        "5,000 rows of a configuration).",
        affects=_TRAINING,
        by_content=True,
    )
    eval: str | None = setting(
        None, "Evaluation records, in the same formats as `train`.", affects=_EVALUATE, by_content=True
    )
    images: str | None = setting(
        None, "Folder that image paths in the records are relative to.", affects=_RECORDS, by_content=True
    )
    eval_images: str | None = setting(
        None, "Folder of the evaluation images (None = `images`).", affects=_EVALUATE, by_content=True
    )
    template: str = setting(
        "auto",
        'Prompt template; "auto" follows the chat template in the model folder, else that of the model family.',
        affects=_ROWS,
        choices="families:templates",
    )
    system: str | None = setting(
        None, 'System prompt, instead of the template\'s ("" = no system prompt).', affects=_ROWS
    )
    max_length: int | None = setting(
        None,
        "Maximum length of a training row, image tokens included; at most 4 times the model's positions (None = the "
        "longest record).",
        affects=(*_TRAINING, "teacher_cache"),
        unit="tokens",
        least=1,
    )
    truncate: bool = setting(
        True,
        "Truncate records that are longer than `max_length`, instead of refusing them.",
        affects=(*_TRAINING, "teacher_cache"),
    )
    max_images: int = setting(
        1, "Maximum number of images per record.", affects=_RECORDS, unit="images", least=1, most=10_000
    )
    aspect_ratio: str = setting(
        "auto",
        'Method to make images square, for models that do not cut images into tiles: "pad", or "square" (the image '
        'processor resizes and crops); "auto" follows the model folder.',
        affects=_ROWS,
        choices="data.images:ASPECT_RATIOS",
    )
    min_tiles: int | None = setting(
        None,
        "Minimum number of tiles per image, for models that cut images into tiles (None = as the model folder says).",
        affects=_ROWS,
        unit="tiles",
        least=1,
    )
    max_tiles: int | None = setting(
        None,
        "Maximum number of tiles per image, for models that cut images into tiles (None = as the model folder says).",
        affects=_ROWS,
        unit="tiles",
        least=1,
    )
    thumbnail: bool | None = setting(
        None,
        "Add a small copy of the whole image to its tiles (None = as the model folder says).",
        affects=_ROWS,
    )
    max_image_tokens: int | None = setting(
        None,
        "Maximum number of tokens per image, for models that take images of any size (Qwen-VL); larger images are "
        "shrunk (None = as the model folder says).",
        affects=_ROWS,
        unit="tokens",
        least=1,
    )
    image_buckets: tuple[int, ...] = setting(
        (),
        "Numbers of tokens that images of any size are padded to; each value is one compiled program (() = 64, 128, "
        "256, ... up to the maximum per image).",
        affects=_RECORDS,
        unit="tokens",
    )
    tile_buckets: tuple[int, ...] = setting(
        (),
        "Numbers of image slots that a batch may have; each value is one compiled program (() = the model's own, such "
        "as 1, 2, 4, 7, 13 for up to twelve tiles and a thumbnail).",
        affects=_RECORDS,
        unit="images",
    )
    length_buckets: tuple[int, ...] = setting(
        (),
        "Lengths that training batches are padded to, ending with `max_length`; each value is one compiled program "
        "(() = always `max_length`).",
        affects=_TRAINING,
        unit="tokens",
    )
    group_by: str = setting(
        "none",
        'Grouping of training records into batches: none, by similar length ("length"), or by length and by with or '
        "without images.",
        affects=_RECOVER,
        choices="data.grouping:GROUPINGS",
    )
    on_error: str = setting(
        "stop",
        "Action on a training record that cannot be read or does not fit: stop, or skip it (its row becomes padding, "
        "and training/skipped-*.jsonl lists it).",
        affects=_TRAINING,
        choices="data.batching:ON_ERROR",
    )
    max_image_pixels: int = setting(
        100_000_000, "Maximum size of an image file; larger images are refused.", unit="pixels", least=1
    )
    cache_megabytes: int = setting(512, "Memory for the cache of prepared images.", unit="MiB", least=0)
    feature_cache: str | None = setting(
        None,
        "Folder for a cache of the frozen vision tower's features of the training images, which runs may share; "
        "recovery then trains without tower and pixels.",
    )
    threads: int = setting(2, "Number of threads that read and prepare records.", unit="threads", least=0, most=1024)
    fraction: float = setting(
        1.0, "Share of the training records to use in recovery.", affects=_RECOVER, unit=FRACTION, above=0, most=1
    )
    seed: int = setting(
        42,
        "Random seed for choosing the share `fraction` of the training records.",
        affects=_RECOVER,
        least=0,
        below=2**32,
    )

    def __post_init__(self) -> None:
        check_settings("data", self)
        for name in ("length_buckets", "tile_buckets", "image_buckets"):
            buckets = getattr(self, name)
            if buckets and (buckets[0] < 1 or list(buckets) != sorted(set(buckets))):
                raise UserError(f"data.{name}={buckets} must be positive and ascending")
