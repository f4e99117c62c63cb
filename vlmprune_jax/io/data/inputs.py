"""From data settings to batches: tokenizer, image processor, records and encoders of one model folder."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmprune_jax.base.checks import one_of
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import read_json
from vlmprune_jax.base.processes import from_all, process_count, process_number
from vlmprune_jax.core.config import ModelConfig, VisionConfig
from vlmprune_jax.core.prune.config import ScoreConfig
from vlmprune_jax.core.prune.reconstruct_config import ReconstructConfig
from vlmprune_jax.core.sections import ModelSpec
from vlmprune_jax.core.video import VideoConfig
from vlmprune_jax.io.data.batching import Batch, train_batches
from vlmprune_jax.io.data.chat_template import AUTO, chat_prompt, choose_template, follow_video, other_prompt
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.datasets import datasets_source
from vlmprune_jax.io.data.encoding import Encoder, measure
from vlmprune_jax.io.data.images import ImageLoader, load_image_processor
from vlmprune_jax.io.data.preparation import image_buckets, tile_buckets
from vlmprune_jax.io.data.processor_files import PROCESSOR_FILES, processor_settings
from vlmprune_jax.io.data.prompts import load_tokenizer, tokenize_training
from vlmprune_jax.io.data.records import DATASETS, TFDS, Record, Source, data_files, read_records, take_fraction
from vlmprune_jax.io.data.tfds import tfds_source
from vlmprune_jax.io.families import Family, family_of, templates
from vlmprune_jax.io.families.templates import Template

Calibration = ScoreConfig | ReconstructConfig  # sections that draw calibration records
# (label, total) -> context that yields a function of the number of items done (`Reporter.bar`).
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True, eq=False)
class Inputs:
    """Tokenizer, prompt template and image loader of a model, shared by all that reads records of one experiment.

    `notes`: lines about settings that differ from the model folder's files.
    """

    data: DataSpec
    tokenizer: Any
    template: Template
    image_loader: ImageLoader | None
    notes: tuple[str, ...] = ()

    def encoder(self, cfg: ModelConfig, max_length: int) -> Encoder:
        """Return an `Encoder` that converts records to sequences of up to `max_length` tokens."""
        preparation = None if self.image_loader is None else self.image_loader.preparation
        return Encoder(
            tokenizer=self.tokenizer,
            template=self.template,
            max_length=max_length,
            image_loader=self.image_loader,
            image_token_id=-1 if cfg.image_token_id is None else cfg.image_token_id,
            tokens_per_image=cfg.tokens_per_image,
            max_images=self.data.max_images,
            truncate=self.data.truncate,
            tile_buckets=tile_buckets(self.data, preparation),
            image_buckets=image_buckets(self.data, preparation),
            longest=cfg.longest_row,
            words=cfg.text.vocab_size,
            video_token_id=cfg.video_token_id,
            tokens_per_second=cfg.tokens_per_second,
        )

    def training_encoder(self, cfg: ModelConfig) -> Encoder:
        """Return the `Encoder` for training, with the lengths in `data.max_length` and `data.length_buckets`."""
        lengths = length_buckets(self.data, cfg)
        encoder = self.encoder(cfg, lengths[-1] if lengths else 0)
        return dataclasses.replace(encoder, length_buckets=self.data.length_buckets or None)


def length_buckets(data: DataSpec, cfg: ModelConfig) -> tuple[int, ...]:
    """Return the padded sequence lengths of training batches, ascending; () to use the length of the longest record.

    Raises UserError if `data.length_buckets` and `data.max_length` contradict each other, or are too long for the
    model.
    """
    buckets, limit = data.length_buckets, data.max_length
    cfg.check_row("data.max_length", limit or 0)
    cfg.check_row("the last of data.length_buckets", max(buckets, default=0))
    if buckets and limit not in (None, buckets[-1]):
        raise UserError(f"data.length_buckets={buckets} must end with data.max_length={limit}")
    return buckets or ((limit,) if limit else ())


def load_inputs(model: ModelSpec, data: DataSpec, cfg: ModelConfig) -> Inputs:
    """Load the tokenizer, prompt template and image processor of a model folder.

    Raises UserError if the template is unknown or uses tokens that the tokenizer lacks, or a file is unusable.
    """
    return _load_inputs(model, data, family_of(cfg), cfg.vision, cfg.tokens_per_image, cfg.video)


@functools.lru_cache(maxsize=4)
def _load_inputs(
    model: ModelSpec,
    data: DataSpec,
    family: Family,
    tower: VisionConfig | None,
    slot_tokens: int,
    video: VideoConfig | None,
) -> Inputs:
    one_of("data.template", data.template, (AUTO, *templates()))
    tokenizer = load_tokenizer(Path(model.hf_dir))
    config = read_json(Path(model.hf_dir) / "config.json")
    folder, named = Path(model.hf_dir), family.template_field is not None and family.template_field in config
    # The code of hub layouts, and a template that the config names, have priority over the tokenizer's chat template.
    follows = family.layout == "transformers" and not named
    chat = chat_prompt(folder, tokenizer, has_image=tower is not None) if follows else None
    template = choose_template(data.template, family, tokenizer, config=config, has_vision=tower is not None, chat=chat)
    if follows and video is not None and data.template == AUTO:
        template = follow_video(template, folder, tokenizer)
    if data.system is not None:
        template = dataclasses.replace(template, system=data.system)
    loader, notes = None, [*other_prompt(template, chat, has_image=tower is not None, name=data.template)]
    if tower is not None:
        processor, aspect_ratio = processor_settings(folder), config.get("image_aspect_ratio")
        if aspect_ratio not in ("pad", "square"):  # LLaVA's image mode
            aspect_ratio = "pad" if processor is None or processor[0].get("do_pad") else "square"
        described = any(os.path.lexists(folder / name) for name, _ in PROCESSOR_FILES)
        in_folder = described or model.vision_dir is None or family.images != "whole"
        loader = load_image_processor(
            folder if in_folder else Path(model.vision_dir or ""),
            dataclasses.replace(data, aspect_ratio=aspect_ratio) if data.aspect_ratio == AUTO else data,
            image_size=None if tower.dynamic_resolution else tower.image_size,
            patches=(tower.patch_values, tower.merge) if tower.dynamic_resolution else None,
            slot_tokens=slot_tokens,
            video=None if template.video is None else video,
        )
        if family.images == "whole" and data.aspect_ratio not in (AUTO, aspect_ratio):
            notes.append(f'data.aspect_ratio="{data.aspect_ratio}", but the model folder says "{aspect_ratio}"')
    return Inputs(data, tokenizer, template, loader, tuple(notes))


def _source(path: str | None, images: str | None, what: str) -> Source:
    if path is None:
        raise UserError(
            f"{what} is not set: use --config.{what}=FILE with a JSON file in LLaVA's format, {TFDS}FOLDER or "
            f"{DATASETS}FOLDER"
        )
    if path.startswith(TFDS):
        return tfds_source(path)
    if path.startswith(DATASETS):
        return datasets_source(path)
    refuse_folder(path, what)
    root = None if images is None else Path(images)
    files = data_files(Path(path), root)
    state = str([os.stat(file).st_mtime_ns if os.path.exists(file) else 0 for file in files])
    return Source(files, state, functools.partial(read_records, Path(path), root))


@functools.lru_cache(maxsize=16)
def _records(path: str, images: str | None, image_lead: bool, on_error: str, state: str) -> list[Record]:
    del state  # part of the cache key, so that a changed file is read again
    return _source(path, images, "").read(image_lead=image_lead, on_error=on_error)


def training_records(data: DataSpec, template: Template) -> list[Record]:
    """Return all training records, before `data.fraction`; raise UserError if unset or malformed."""
    return read_set(data.train, data.images, "data.train", template.image_lead, data.on_error)


def count_records(data: DataSpec) -> int | None:
    """Return the number of training records that `data.fraction` selects; None if `data.train` is unset."""
    if data.train is None:
        return None
    # image_lead=True: whether texts may omit the image placeholder depends on the template, and changes no count
    records = read_set(data.train, data.images, "data.train", True, data.on_error)
    return len(take_fraction(records, data.fraction, data.seed))


def read_set(path: str | None, images: str | None, what: str, image_lead: bool, on_error: str) -> list[Record]:
    """Read the records of a JSON file, TFDS folder or datasets folder; errors name the setting `what`."""
    return _records(path or "", images, image_lead, on_error, _source(path, images, what).state)


def refuse_folder(path: str, what: str) -> None:
    """Raise UserError if the setting `what` names a folder instead of a file of records."""
    if os.path.isdir(path):
        raise UserError(
            f"{what}={path}: is a folder, expected a file of records: name the file and set data.images to the folder "
            f"of its images, or write {DATASETS}{path} for a folder of save_to_disk"
        )


def name_of_records(path: str) -> str:
    """Return a data set's display name: its hub id, or the name of its file or folder."""
    name = Path(path.rpartition(":")[2]).name
    return "/".join(name.split("--")[1:3]) if name.startswith("hub--") else name


def record_files(data: DataSpec, which: str) -> dict[str, Path | str]:
    """Return {name: path} of the source files of "train" or "eval" records (for a bucket, a text describing its state).

    Raises UserError if the setting is not set.
    """
    images = data.images if which == "train" else data.eval_images or data.images
    first, *listed = _source(getattr(data, which), images, f"data.{which}").files
    return {f"data.{which}": first, **{f"data.{which} ({file})": file for file in listed}}


def calibration_batches(
    model: ModelSpec, data: DataSpec, spec: Calibration, cfg: ModelConfig, *, seed: int
) -> list[Batch]:
    """Return calibration batches of equal shape: `spec.samples` training records drawn with `seed`.

    The last batch is filled with padding. Records skipped by `data.on_error` are replaced by other records and listed
    in the first batch. Raises UserError if too few records are short enough.
    """
    encoder = dataclasses.replace(load_inputs(model, data, cfg).training_encoder(cfg), length_buckets=None)
    records, skipped = _draw(data, spec, seed, encoder)
    # every process gets the whole batch, which the mesh splits
    first, *rest = batches_of(records, encoder, batch_size=spec.batch_size, threads=data.threads)
    return [dataclasses.replace(first, skipped=tuple(skipped)), *rest]


def batches_of(records: Sequence[Record], encoder: Encoder, *, batch_size: int, threads: int) -> list[Batch]:
    """Return all records in batches, of the length of the longest record if `encoder.max_length` is unset."""
    if not encoder.max_length:
        longest = int(measure(records, encoder, on_error="stop", threads=threads)[:, 0].max())
        encoder = dataclasses.replace(encoder, max_length=longest)
    return [*train_batches(records, encoder, batch_size=batch_size, threads=threads)]


def _draw(data: DataSpec, spec: Calibration, seed: int, encoder: Encoder) -> tuple[list[Record], list[tuple[str, str]]]:
    """Draw calibration records at random; also return (id, reason) of every record that was skipped."""
    records = training_records(data, encoder.template)
    chosen: list[Record] = []
    skipped: list[tuple[str, str]] = []
    counts: dict[str, Any] = {"image_token_id": encoder.image_token_id, "tokens_per_image": 1, "cut_text_at": None}

    def length(record: Record) -> int:
        return len(tokenize_training(record, encoder.tokenizer, encoder.template, **counts)[0])

    for index in np.random.Generator(np.random.PCG64(seed)).permutation(len(records)).tolist():
        if len(chosen) == spec.samples:
            break
        if data.on_error == "skip":
            problem = encoder.problem(records[index])
            if problem is not None:
                skipped.append((records[index].id, problem))
                continue
        if spec.longest_text is None or length(records[index]) <= spec.longest_text:
            chosen.append(records[index])
    if len(chosen) < min(spec.samples, len(records)):
        limit = "" if spec.longest_text is None else f" of at most {spec.longest_text} tokens"
        unusable = f" ({len(skipped)} unusable, the first: {skipped[0][1]})" if skipped else ""
        raise UserError(
            f"{spec.SECTION}.samples={spec.samples}: only {len(chosen)} training records{limit} can be used{unusable}: "
            f"lower {spec.SECTION}.samples"
        )
    return chosen, skipped


def recovery_records(data: DataSpec, template: Template) -> tuple[Record, ...]:
    """Return the training records for recovery: a random share `data.fraction` of all training records."""
    return tuple(take_fraction(training_records(data, template), data.fraction, data.seed))


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """Training records of a recovery, their sizes in tokens, and the `Encoder` that converts them to arrays."""

    records: tuple[Record, ...]
    encoder: Encoder
    sizes: np.ndarray | None


def training_rows(data: DataSpec, encoder: Encoder, records: tuple[Record, ...], bar: Bar) -> TrainingRows:
    """Measure the recovery's training records with the progress `bar`; return them with their sizes and `Encoder`."""
    sizes = None
    varied = encoder.length_buckets is not None or encoder.images_decide  # shapes must be known before compilation
    if not encoder.max_length or varied or data.group_by != "none" or data.on_error == "skip":
        sizes = _measured(records, encoder, data.on_error, data.threads, bar)
        encoder = dataclasses.replace(encoder, max_length=encoder.max_length or int(sizes[:, 0].max()))
    return TrainingRows(records, encoder, sizes)


@functools.lru_cache(maxsize=2)
def _measured(records: tuple[Record, ...], encoder: Encoder, on_error: str, threads: int, bar: Bar) -> np.ndarray:
    """Return the sizes of all records (see `measure`); each process measures a share of them."""
    mine = records[process_number() :: process_count()]
    with bar("measure records", len(mine)) as progress:
        shares = from_all(
            lambda: measure(mine, encoder, on_error=on_error, threads=threads, progress=progress).tolist()
        )
    sizes = np.zeros((len(records), 3), np.int32)
    for process, share in enumerate(shares):
        sizes[process :: len(shares)] = np.array(share, np.int32).reshape(-1, 3)
    if not sizes.any():
        raise UserError(
            f"data.train: none of the {len(records)} records is usable (the first: {encoder.problem(records[0])}): "
            "correct the file or the image root"
        )
    return sizes
