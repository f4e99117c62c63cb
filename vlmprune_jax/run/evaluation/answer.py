"""Questions of records, and the answer to a single one, without an experiment."""

from __future__ import annotations

import io
import mimetypes
import os
from pathlib import Path
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.models.generate import on_decoding_mesh
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.io.checkpoints.batches import Records, open_inputs, to_records
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.data.forms import IMAGE_TOKEN, VIDEO_TOKEN
from vlmprune_jax.io.data.media import InlineStore, StoredImage, Video
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.run.evaluation.questions import ArrangedQuestions, arrange_questions
from vlmprune_jax.run.evaluation.runner import ask

_VIDEOS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")


def is_file(name: str) -> bool:
    """Return True for the name of a file, and of an image or video that may be missing."""
    kind, _ = mimetypes.guess_type(name, strict=False)
    return os.path.isfile(name) or _is_video(name) or (kind or "").startswith("image/")


def questions(
    hf_dir: str | Path,
    records: Records,
    *,
    images: str | Path | None = None,
    vision_dir: str | Path | None = None,
    batch_size: int = 8,
    prompt_suffix: str = "",
    **settings: Any,
) -> ArrangedQuestions:
    """Return question batches for `vp.evaluate`; each image is encoded once for all of its questions.

    Args:
      hf_dir, images, vision_dir, settings: see `vp.batches`; max_length and truncate are not allowed.
      records: a data file, or its entries, with the right answer as the last turn or in "answers".
      batch_size: questions per batch.
      prompt_suffix: text after every question, such as "\\nAnswer the question using a single word or phrase."

    Raises UserError for malformed records, an unreadable image or an unknown setting.
    """
    cfg, inputs = open_inputs(hf_dir, vision_dir, images, settings)
    read = to_records(records, inputs)
    return arrange_questions(read, inputs.encoder(cfg, 0), batch_size=batch_size, prompt_suffix=prompt_suffix)


def answer(
    model: Model | str | Path,
    image: Any,
    question: str,
    *,
    source_dir: str | Path | None = None,
    vision_dir: str | Path | None = None,
    max_new_tokens: int = 64,
    **settings: Any,
) -> str:
    """Return a model's greedy answer to one question about an image or a video.

    `vp.answer("llava-1.5-7b-hf", "cat.png", "What animal is this?")`

    Args:
      model: a model's folder or hub id, or a loaded model.
      image: an image file, a PIL image, a video file (such as .mp4), a list of these, or None. A list inside the list
        is one video as a list of frames.
      question: the question, without placeholders.
      source_dir: for a loaded model only, the folder with its tokenizer and image processor (None = where the model
        was loaded).
      vision_dir: folder of the vision tower, if the model's folder does not describe it.
      max_new_tokens: maximum length of the answer.
      settings: settings of the section `data` that affect single rows, such as template="vicuna_v1".

    Raises UserError for a model in memory whose tokenizer is unknown, a folder with `source_dir`, an image that cannot
    be read, or an image for a model that takes no images.
    """
    folder = model if not isinstance(model, Model) else source_dir or _tokenizer_folder(model)
    if folder is None:
        raise UserError("answer: a model in memory has no tokenizer: pass source_dir=, the folder with its tokenizer")
    if source_dir is not None and not isinstance(model, Model):
        raise UserError(
            f"answer: source_dir={source_dir} has no effect, because {model} has its own tokenizer: leave it out"
        )
    media = list(image) if isinstance(image, (list, tuple)) else [] if image is None else [image]
    cfg, inputs = open_inputs(folder, vision_dir, None, {"max_images": max(1, len(media)), **settings})
    loaded = model if isinstance(model, Model) else load(folder, vision_dir=vision_dir)
    text = "".join(f"{VIDEO_TOKEN if _is_video(item) else IMAGE_TOKEN}\n" for item in media) + question
    images = tuple(_source(item) for item in media if not _is_video(item))
    videos = tuple(_video(item) for item in media if _is_video(item))
    record = Record("question", (("human", text),), images, videos=videos)
    asked = arrange_questions([record], inputs.encoder(cfg, 0), batch_size=1)
    return ask(on_decoding_mesh(loaded), asked, tokenizer=inputs.tokenizer, max_new_tokens=max_new_tokens)[0].prediction


def _tokenizer_folder(model: Model) -> Path | None:
    """Return the folder from which a model was loaded, unless a plan has renumbered its tokens since then."""
    return None if model.plan is not None and model.plan.vocabulary is not None else model.source


def _is_video(item: Any) -> bool:
    return isinstance(item, (list, tuple)) or (isinstance(item, (str, Path)) and str(item).lower().endswith(_VIDEOS))


def _video(item: Any) -> Video:
    return Path(item) if isinstance(item, (str, Path)) else tuple(map(_source, item))


def _source(image: Any) -> Path | StoredImage:
    if isinstance(image, (str, Path)):
        return Path(image)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return StoredImage("image", 0, InlineStore(buffer.getvalue()))
