"""Settings of the section `data`: records and images, and their encoding as rows."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import FRACTION, check_settings, evaluate_setting, recover_setting, setting
from vlmprune_jax.io.families import templates

_RECORDS = ("score", "reconstruct", "recover", "evaluate")  # commands that read records
records_setting = functools.partial(setting, affects=_RECORDS)
rows_setting = functools.partial(setting, affects=(*_RECORDS, "teacher_cache"))
_TRAINING = ("score", "reconstruct", "recover")
training_setting = functools.partial(setting, affects=_TRAINING)
TILE_SETTINGS = ("min_tiles", "max_tiles", "thumbnail")  # they replace the model folder's, for models with tiles
# Settings that change how a single record becomes a row of tokens and images, in any command.
ROW_SETTINGS = (
    *("template", "system", "aspect_ratio", *TILE_SETTINGS),
    *("max_image_tokens", "max_image_pixels", "cache_megabytes", "threads", "video_fps", "video_frames"),
    *("video_tokens", "max_video_megabytes", "max_video_frames", "max_video_seconds", "max_video_pixels"),
    "video_timeout",
)


@dataclass(frozen=True)
class DataSpec:
    """Settings of the records for calibration, recovery and evaluation, and of their encoding as tokens."""

    source: str = setting(
        "files",
        'Source of the records: the files below ("files"), or the demo data set, which vlmprune writes beside the '
        'results ("easyvqa").',
        choices=("files", "easyvqa"),
    )
    train: str | None = training_setting(
        None,
        "Training records: a JSON or JSON-lines file (LLaVA's format, OpenAI's `messages`, or questions), InternVL's "
        'JSON list of such files, "tfds:FOLDER" or "tfds:gs://BUCKET/DIR" (written by `vlmprune tfds`), '
        '"datasets:FOLDER" (written by `save_to_disk`), or "hub:ORG/NAME[/CONFIG]:SPLIT[:5000]" (a Hugging Face hub '
        "data set, all rows or the first 5,000).",
        by_content=True,
    )
    eval: str | None = evaluate_setting(None, "Evaluation records, in the same formats as `train`.", by_content=True)
    images: str | None = records_setting(
        None, "Folder to which image paths in the records are relative.", by_content=True
    )
    eval_images: str | None = evaluate_setting(
        None, "Folder of the evaluation images (None = `images`).", by_content=True
    )
    template: str = rows_setting(
        "auto",
        'Prompt template; "auto" follows the chat template in the model folder, else the template of the model family.',
        choices=templates,
    )
    system: str | None = rows_setting(None, 'System prompt ("" = none, None = the template\'s).')
    max_length: int | None = setting(
        None,
        "Maximum length of a training record, image tokens included (None = the longest record's); at most 4 times the "
        "model's trained positions. For longer records, see `truncate`.",
        affects=(*_TRAINING, "teacher_cache"),
        unit="tokens",
        least=1,
    )
    truncate: bool = setting(
        True,
        "Truncate training records that are longer than `max_length`; otherwise they are refused.",
        affects=(*_TRAINING, "teacher_cache"),
    )
    max_images: int = records_setting(
        1,
        "Maximum number of images and videos per record; records with more are refused.",
        unit="images",
        least=1,
        most=10_000,
    )
    aspect_ratio: str = rows_setting(
        "auto",
        'Method to make images square, for models without tiles: "pad" with the mean colour, or "square" (resize and '
        'crop as the image processor does); "auto" follows the model folder.',
        choices=("auto", "pad", "square"),
    )
    min_tiles: int | None = rows_setting(
        None,
        "Minimum number of tiles per image (None = the model folder's value).",
        unit="tiles",
        least=1,
    )
    max_tiles: int | None = rows_setting(
        None,
        "Maximum number of tiles per image (None = the model folder's value).",
        unit="tiles",
        least=1,
    )
    thumbnail: bool | None = rows_setting(
        None, "Add a small copy of the whole image to its tiles (None = the model folder's value)."
    )
    max_image_tokens: int | None = setting(
        None,
        "Maximum number of tokens per image: 70, 140, 280, 560 or 1120 (Gemma 4), or a limit on pixels (Qwen-VL), "
        "tiles (InternVL, SmolVLM) or crops (Gemma 3). None = the model folder's value.",
        affects=(*_RECORDS, "teacher_cache", "export"),
        unit="tokens",
        least=1,
    )
    image_buckets: tuple[int, ...] = records_setting(
        (),
        "Image tokens per record, averaged over the records of a device, to which images of varying size are padded; "
        "each number needs one compiled program (() = 64, 96, 128, 192, ... up to the maximum).",
        unit="tokens",
    )
    tile_buckets: tuple[int, ...] = records_setting(
        (),
        "Images or tiles per record, averaged over the records of a device, to which batches are padded; each number "
        "needs one compiled program (() = the model's usual numbers, such as 1, 2, 4, 7, 13 for up to twelve tiles and "
        "a thumbnail).",
        unit="images",
    )
    length_buckets: tuple[int, ...] = training_setting(
        (),
        "Sequence lengths to which training batches are padded, ending with `max_length`; each length needs one "
        "compiled program (() = always `max_length`).",
        unit="tokens",
    )
    group_by: str = recover_setting(
        "none",
        'Grouping of training records into batches: none, by similar length ("length"), or also by whether they have '
        'images ("modality_length").',
        choices=("none", "length", "modality_length"),
    )
    on_error: str = training_setting(
        "stop",
        'Action on a training record that cannot be read or used: stop ("stop"), or replace it by padding and list it '
        'in training/skipped-*.jsonl ("skip").',
        choices=("stop", "skip"),
    )
    max_image_pixels: int = setting(
        100_000_000, "Maximum number of pixels of an image file; larger images are refused.", unit="pixels", least=1
    )
    video_fps: float | None = rows_setting(
        None,
        "Sampled frames per second of a video (None = the model folder's rate or number).",
        unit="frames/s",
        above=0,
        most=1_000_000,
    )
    video_frames: int | None = rows_setting(
        None,
        "Sampled frames per video (None = the model folder's rate or number).",
        unit="frames",
        least=1,
        most=100_000,
    )
    video_tokens: int | None = rows_setting(
        None,
        "Maximum number of tokens per video; frames are shrunk to fit, or the video is refused if the model's frames "
        "have one size (None = the model folder's value).",
        unit="tokens",
        least=1,
    )
    max_video_megabytes: int = setting(
        1024, "Maximum size of a video file; larger files are refused.", unit="MiB", least=1
    )
    max_video_frames: int = setting(
        36_000, "Maximum number of frames in a video file; videos with more are refused.", unit="frames", least=1
    )
    max_video_seconds: int = setting(7200, "Maximum duration of a video; longer videos are refused.", unit="s", least=1)
    max_video_pixels: int = setting(
        500_000_000,
        "Maximum number of pixels in all sampled frames of a video together; videos with more are refused.",
        unit="pixels",
        least=1,
    )
    video_timeout: int = setting(
        45,
        "Maximum time for decoding one video; videos that take longer are refused.",
        unit="s",
        least=1,
        most=86_400,
    )
    cache_megabytes: int = setting(
        512,
        "Maximum memory for the cache of decoded and resized images; once it is full, old images are dropped and "
        "decoded again when needed.",
        unit="MiB",
        least=0,
    )
    feature_cache: str | None = setting(
        None,
        "Folder for a cache of the frozen vision tower's features of all training images; recovery then needs neither "
        "tower nor images. Several runs may share the folder (None = no cache).",
    )
    threads: int = setting(2, "Number of threads that read and encode records.", unit="threads", least=0, most=1024)
    fraction: float = recover_setting(
        1.0, "Share of the training records that recovery uses.", unit=FRACTION, above=0, most=1
    )
    seed: int = recover_setting(
        42, "Random seed for choosing which training records `fraction` keeps.", least=0, below=2**32
    )

    def __post_init__(self) -> None:
        check_settings("data", self)
        if self.video_fps is not None and self.video_frames is not None:
            raise UserError(
                f"data.video_fps={self.video_fps:g} and data.video_frames={self.video_frames} are both set: unset one"
            )
        for name in ("length_buckets", "tile_buckets", "image_buckets"):
            buckets = getattr(self, name)
            if buckets and (buckets[0] < 1 or list(buckets) != sorted(set(buckets))):
                raise UserError(f"data.{name}={buckets} must be positive numbers in ascending order")
