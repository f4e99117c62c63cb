"""python tools/pretrain.py --config=tools/pretrain_easyvqa.py --workdir=DIR: train the demo's teacher from scratch.

With tools/pretrain_smollm2.py a pretrained language model learns to see; tools/pretrain_tokens.py trains a Qwen3-VL,
tools/pretrain_video.py one for videos.
Writes DIR/teacher, a folder in the layout of transformers, with its tokenizer and processor. Every stage resumes.

Training goes as LLaVA's: a tower and a language model first, then both together. Each stage is a run of the package's
own training loop and differs from another by its records, its number of decoder layers and its trained parameters. The
tower learns from captions with a one-layer decoder (as in Tschannen et al. 2023, "Image Captioners Are Scalable Vision
Learners Too"), the decoder learns the questions from text alone, and only then they meet. Trained all at once, the
decoder learns the prior of the answers and stays there (decision 10).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import einops
import grain
import numpy as np
from initial import write_joined, write_random, write_upcycled
from PIL import Image
from pretraining_data import write_pretraining_data

from vlmprune_jax.base.checks import one_of
from vlmprune_jax.base.errors import UserError, reason
from vlmprune_jax.base.files import replacing
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import initialize
from vlmprune_jax.core.models.params import flatten, stack_layers, unflatten, unstack_layers
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.recovery.config import RecoverConfig
from vlmprune_jax.core.recovery.loop import recover
from vlmprune_jax.io.checkpoints.batches import open_inputs
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.data.batching import Batch, TrainBatches, train_batches
from vlmprune_jax.io.data.encoding import Encoder, measure
from vlmprune_jax.io.data.records import Record, read_records
from vlmprune_jax.io.exports.write import save
from vlmprune_jax.run.cli.config_files import to_workdir
from vlmprune_jax.run.cli.flags import COMMON
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.demo.topics import topic_records

CACHE_MEGABYTES = 512  # all 5,000 processed images of easy-VQA
TEXT_TOKENS, TEXT_LETTERS = 96, 500  # maximum tokens and characters of a text row; longer texts are truncated


@dataclass(frozen=True)
class Stage:
    """One training run: records, questions per row, decoder depth and training settings.

    `words`: number of words of description instead of the image (0: the image itself); `also_images`: use every record
    once with words and once with its image. `sides`: pixels per side of images; each record occurs once with every size
    (() = as they are). `text_share`: share of rows of English text (`topics`) without images, in batches of their
    own. `keeps`: regex of the parameters that the next stage starts from; the others are reset. `until_loss`: a stage
    that ends with a larger loss continues with its rows in another order, at most `runs` times in total.
    """

    name: str
    records: str
    turns_per_row: int
    words: int
    decoder_layers: int
    augment: str
    keeps: str
    training: RecoverConfig
    also_images: bool = False
    sides: tuple[int, ...] = ()
    text_share: float = 0.0
    until_loss: float = math.inf
    runs: int = 1

    def __post_init__(self) -> None:
        one_of(f"stage {self.name}: augment", self.augment, ("none", "flip_shift"))
        if not 0 <= self.text_share < 1:
            raise UserError(f"stage {self.name}: text_share={self.text_share} must be at least 0 and below 1")
        if self.runs < 1:
            raise UserError(f"stage {self.name}: runs={self.runs} must be at least 1")

    def again(self, number: int) -> Stage:
        """Return the stage for its run `number` (from 1); each run has its own name and order of rows."""
        if number == 1:
            return self
        training = dataclasses.replace(self.training, seed=self.training.seed + number - 1)
        return dataclasses.replace(self, name=f"{self.name}-{number}", training=training)


def pretrain(
    workdir: Path,
    stages: Sequence[Stage],
    *,
    seed: int,
    architecture: Mapping[str, Any] | None = None,
    joined: tuple[Path, Path] | None = None,
    upcycled: Mapping[str, Any] | None = None,
    videos: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Train a model on easy-VQA, and on videos of moving_shapes.py; return its folder, `workdir/teacher`.

    A LLaVA or Qwen3-VL starts with random weights of `architecture`, a config dictionary without the fields that depend
    on the tokenizer; a SmolVLM starts from `joined`, the folders of a language model and of a LLaVA whose tower it uses
    (`write_joined`); a LLaVA with experts starts from `upcycled`, arguments of `write_upcycled`. Every stage resumes
    from its checkpoints in `workdir/<stage>`.

    Raises:
      UserError: not exactly one of `architecture`, `joined` and `upcycled` is passed; a stage does not reach its
        `until_loss`; or see `write_joined`.
    """
    if [architecture, joined, upcycled].count(None) != 2:
        raise UserError("pretraining starts from one of architecture, joined and upcycled: set exactly one")
    files = write_pretraining_data(workdir / "easyvqa")
    if videos is not None:
        files["videos"] = videos / "train.json"
    folder = workdir / "initial"
    if joined is not None:
        write_joined(folder, *joined, seed=seed)
    elif upcycled is not None:
        write_upcycled(folder, Path(upcycled["dense"]), **{k: upcycled[k] for k in upcycled if k != "dense"}, seed=seed)
    else:
        write_random(
            folder, architecture or {}, [files[name] for name in ("train", "videos") if name in files], seed=seed
        )
    model = load(folder)
    for stage in stages:
        model = _learn(model, stage, files, folder, workdir)
    save(model, workdir / "teacher", source_dir=folder, dtype="float32", overwrite=overwrite)
    return workdir / "teacher"


def _learn(model: Model, stage: Stage, files: Mapping[str, Path], folder: Path, workdir: Path) -> Model:
    """Repeat a training stage until its loss is at most `until_loss`; return the model."""
    for number in range(1, stage.runs + 1):
        run = stage.again(number)
        model, loss = _train_stage(model, run, files, folder, workdir / run.name)
        if loss <= stage.until_loss:
            return model
    raise UserError(
        f"stage {stage.name}: its loss is {loss:.4g} after {stage.runs} runs, and the next stage needs "
        f"{stage.until_loss:g}: give it more `steps` or `runs`, or another `seed`, in the config"
    )


def _train_stage(
    model: Model, stage: Stage, files: Mapping[str, Path], folder: Path, workdir: Path
) -> tuple[Model, float]:
    """Train one run of a stage; return the model and the last loss. Layers beyond the stage's depth do not change."""
    records = stage_records(stage, files)
    encoder = make_encoder(model.cfg, folder)
    if not any(record.visuals for record in records):
        encoder = dataclasses.replace(encoder, image_loader=None)
    if stage.sides:
        records = [row for side in stage.sides for row in resized(records, side, workdir.parent / f"images_{side}")]
    sizes = measure(records, encoder, on_error="stop", threads=2)
    if encoder.image_buckets is not None:
        encoder = dataclasses.replace(encoder, image_buckets=(int(sizes[:, 2].max()),))
    longest = int(sizes[:, 0].max())
    encoder = dataclasses.replace(encoder, max_length=longest)
    if stage.text_share:
        pieces = topic_records(0, TEXT_LETTERS)
        texts = mixed_in(pieces, stage.text_share, len(records))
        buckets = tuple(sorted({longest, max(longest, TEXT_TOKENS)}))
        encoder = dataclasses.replace(encoder, max_length=buckets[-1], truncate=True, length_buckets=buckets)
        each = measure(pieces, encoder, on_error="stop", threads=2)
        sizes = np.concatenate([sizes, np.resize(each, (len(texts), each.shape[1]))])  # repeated as often as needed
        records = records + texts
    batches = train_batches(
        records,
        encoder,
        batch_size=stage.training.batch_size,
        seed=stage.training.seed,
        epochs=None,
        drop_remainder=True,
        threads=2,
        sizes=sizes if stage.text_share else None,
        group_by="modality_length" if stage.text_share else "none",
    )
    if stage.augment == "flip_shift":
        loader = encoder.image_loader
        patching = loader.preparation if loader is not None and encoder.image_buckets else None
        batches = MovedBatches(**vars(batches), patching=patching, seed=stage.training.seed)
    layers, rest = unstack_layers(model.params, model.cfg)
    cfg = model.cfg.with_layers(model.cfg.text.layers[: stage.decoder_layers])
    shallow = Model(stack_layers(layers[: stage.decoder_layers], rest, cfg), cfg)
    steps = stage.training.num_steps(len(records))
    trained, summary = recover(shallow, batches, stage.training, workdir=workdir, num_steps=steps)
    first, rest = unstack_layers(trained.params, cfg)
    whole = flatten(stack_layers(first + layers[stage.decoder_layers :], rest, model.cfg))
    kept = {path: leaf for path, leaf in whole.items() if re.fullmatch(stage.keeps, path)}
    return Model(unflatten({**flatten(model.params), **kept}), model.cfg), summary["last"]["loss"]


@dataclass(frozen=True, eq=False)
class MovedBatches(TrainBatches):
    """Training batches whose images `flip_shift` moves at random."""

    patching: Any | None
    seed: int

    @property
    def batches(self) -> grain.IterDataset[Batch]:
        move = functools.partial(flip_shift, patching=self.patching)
        return super().batches.random_map(move, seed=self.seed)


def flip_shift(batch: Batch, generator: np.random.Generator, max_shift: int = 4, patching: Any | None = None) -> Batch:
    """Return the batch with each image flipped at random along both axes and moved by up to `max_shift` pixels.

    Each flip has probability 1/2; both offsets are uniform in -max_shift..max_shift and the edge pixels fill the gap.
    Only for images whose meaning does not change when mirrored. `patching`: patch layout, for images of varying size.
    """
    media = batch.arrays["media"]
    if "vision" not in media:
        return batch
    pixels = media["vision"].values.copy()
    if patching is None:
        for image in pixels.reshape(-1, *pixels.shape[-3:]):
            image[:] = _moved(image, generator, max_shift)
    else:
        grids = media["vision"].grid.reshape(-1, 3)
        for rows, (frames, height, width) in zip(pixels.reshape(-1, *pixels.shape[-2:]), grids, strict=True):
            if not frames:  # a row without an image
                continue
            sizes = {"h": height // patching.merge, "w": width // patching.merge, "m": patching.merge}
            sizes |= {"n": patching.merge, "p": patching.patch, "q": patching.patch, "t": patching.temporal}
            cells = "(h w m n) (c t p q)"
            image = einops.rearrange(rows[: height * width], f"{cells} -> t c (h m p) (w n q)", **sizes)[0]
            moved = np.broadcast_to(_moved(image, generator, max_shift), (patching.temporal, *image.shape))
            rows[: height * width] = einops.rearrange(moved, f"t c (h m p) (w n q) -> {cells}", **sizes)
    return dataclasses.replace(
        batch, arrays=batch.arrays | {"media": {"vision": media["vision"]._replace(values=pixels)}}
    )


def _moved(image: np.ndarray, generator: np.random.Generator, max_shift: int) -> np.ndarray:
    rows, columns = generator.integers(2, size=2) * 2 - 1
    down, right = generator.integers(0, 2 * max_shift + 1, size=2)
    padded = np.pad(image[:, ::rows, ::columns], [(0, 0), *[(max_shift, max_shift)] * 2], mode="edge")
    return padded[:, down : down + image.shape[1], right : right + image.shape[2]]


def resized(records: Sequence[Record], side: int, folder: Path) -> list[Record]:
    """Return the records with images resized to `side` x `side` pixels, which are stored in `folder`."""
    folder.mkdir(exist_ok=True)
    paths = {path: folder / path.name for record in records for path in record.images if isinstance(path, Path)}
    for source, path in paths.items():
        if not path.exists():
            with replacing(path) as file:
                Image.open(source).convert("RGB").resize((side, side), Image.Resampling.BICUBIC).save(file, "png")
    return [
        dataclasses.replace(
            record, id=f"{record.id}-{side}", images=tuple(paths[path] for path in record.images if path in paths)
        )
        for record in records
    ]


def stage_records(stage: Stage, files: Mapping[str, Path]) -> list[Record]:
    """Return the training records of a stage in file order, with descriptions instead of images if it has `words`."""
    root = files["videos"].parent if stage.records == "videos" else files["images"]
    records = split_conversations(read_records(files[stage.records], root), stage.turns_per_row)
    if not stage.words:
        return records
    captions = {r.images: r.turns[-1][1] for r in read_records(files["train_captions"], files["images"])}
    described = [describe(r, captions[r.images], stage.words) for r in records if r.images in captions]
    return described + (records if stage.also_images else [])


def mixed_in(pieces: Sequence[Record], share: float, others: int) -> list[Record]:
    """Repeat text records so often that they are a share `share` of all rows, together with `others` other rows."""
    count = round(others * share / (1 - share))
    rows = itertools.islice(itertools.cycle(pieces), count)
    return [dataclasses.replace(row, id=f"{row.id}-{n}") for n, row in enumerate(rows)]


def describe(record: Record, caption: str, length: int) -> Record:
    """Return the record with its image replaced by `length` words of its caption (repeated as needed)."""
    (speaker, text), *rest = record.turns
    question = text.removeprefix("<image>\n")
    words = itertools.islice(itertools.cycle(caption.split()), length)
    return dataclasses.replace(record, turns=((speaker, f"{' '.join(words)}\n{question}"), *rest), images=())


def make_encoder(cfg: ModelConfig, folder: Path) -> Encoder:
    """Return the encoder of a model folder, with the prompt template of its chat template and no system text."""
    settings = {"system": "", "aspect_ratio": "square", "max_image_pixels": 10**6, "cache_megabytes": CACHE_MEGABYTES}
    _, inputs = open_inputs(folder, None, None, {**settings, "max_images": 1})
    encoder = inputs.encoder(cfg, cfg.text.max_positions)
    buckets = None if inputs.image_loader is None else inputs.image_loader.preparation.image_buckets
    return dataclasses.replace(encoder, image_buckets=buckets or None, truncate=False)


def split_conversations(records: Sequence[Record], turns_per_row: int) -> list[Record]:
    """Split records into parts of at most `turns_per_row` questions; each part starts with the images."""
    rows = []
    for record in records:
        marks = "<image>\n" * len(record.images) + "<video>\n" * len(record.videos)
        for start in range(0, len(record.turns), 2 * turns_per_row):
            turns = list(record.turns[start : start + 2 * turns_per_row])
            if start:
                turns[0] = (turns[0][0], marks + turns[0][1])
            rows.append(dataclasses.replace(record, id=f"{record.id}-{start // 2}", turns=tuple(turns)))
    return rows


FLAGS = COMMON


def run(flags: Any) -> None:
    """Run the training stages that the config file lists."""
    if flags.config is None or not flags.workdir:
        raise UserError("pretraining needs --config=tools/pretrain_easyvqa.py and --workdir=DIR")
    initialize(flags.coordinator, flags.num_processes, flags.process_id)
    try:
        options = read_options(flags.config.to_dict())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        todo = "pretraining needs a config like tools/pretrain_easyvqa.py"
        raise UserError(
            f"--config: is not a config of stages ({type(error).__name__}: {reason(error)}): {todo}"
        ) from error
    folder = pretrain(to_workdir(flags.workdir), **options, overwrite=flags.overwrite)
    print(f"teacher: {folder}")


def read_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `pretrain` from a config; any error means that it is a config of another command."""
    fields = tuple(field.name for field in dataclasses.fields(Stage) if field.name != "training")
    stages, joined = list[Stage](), config.get("joined")
    for stage in map(dict, config["stages"]):
        training = RecoverConfig(**{name: value for name, value in stage.items() if name not in fields})
        stages.append(Stage(**{name: stage[name] for name in fields if name in stage}, training=training))
    return {
        "stages": stages,
        "seed": int(config["seed"]),
        "architecture": config.get("architecture"),
        "upcycled": config.get("upcycled"),
        "videos": None if config.get("videos") is None else Path(config["videos"]),
        "joined": None if joined is None else (Path(joined["language"]), Path(joined["tower"])),
    }


if __name__ == "__main__":
    sys.exit(main(script=sys.modules[__name__]))
