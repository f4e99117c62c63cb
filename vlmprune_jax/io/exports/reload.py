"""Check of a Hugging Face folder: reload it in PyTorch or JAX and compare logits."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import reading
from vlmprune_jax.base.processes import on_process_zero
from vlmprune_jax.base.weight_files import WEIGHT_DTYPES
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import gather_to_host, mesh_of
from vlmprune_jax.core.models.inputs import with_places
from vlmprune_jax.core.models.params import flatten, unflatten
from vlmprune_jax.core.models.vlm import Model, forward
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.io.checkpoints.layout import PARTS, make_slots
from vlmprune_jax.io.checkpoints.read import FileArray, open_weights, place, read_config, read_fields, resolve
from vlmprune_jax.io.exports.card import loader_class
from vlmprune_jax.io.exports.formats import Comparison
from vlmprune_jax.io.families import detect, family_of
from vlmprune_jax.io.families.experts import has_experts
from vlmprune_jax.io.families.limits import why_not_in_transformers
from vlmprune_jax.io.families.table import Stock

# Tolerances of float32 logits between two implementations: absolute, and relative to the largest logit above 10
# (SmolLM2-135M without three layers, random ids: 1.1e-4 between torch and XLA; its logits reach 33).
TOLERANCE, RELATIVE_TOLERANCE = 1e-4, 1e-5
# A position may be ill-conditioned: at 1 of 48, a recovered SmolLM2 differs from float64 by 8.0e-4 here and 2.6e-4 in
# torch, at others by 1e-4. Tolerance: this multiple of the largest change in as many runs, each with the last bit of
# every weight changed (decision 85).
_ROUNDINGS = 4
_ROWS, _TEXT_TOKENS = 2, 24


def check_export(model: Model, out_dir: str | Path, vision_dir: str | Path | None = None) -> Comparison:
    """Reload a written folder and compare its float32 logits with the model's, on random text and images.

    The folder is reloaded in PyTorch if torch is installed and stock transformers has the model's class, else in JAX.
    If weights were written in a narrower dtype or quantised, the reference is the model with weights rounded in the
    same way; for quantised weights, `moved_by_rounding` compares the reference with the model. Every process must call
    this function; process 0 alone reloads in PyTorch.

    `vision_dir` is the folder of the vision tower, for an original-layout LLaVA whose folder lacks it.

    Raises UserError if the difference exceeds the tolerance, or transformers does not load the folder cleanly.
    """
    folder, tower = Path(out_dir), None if vision_dir is None else resolve(vision_dir)
    moved, words = None, model.cfg.text.vocab_size
    checkpoint, (family, cfg) = Checkpoint(folder), read_config(folder, tower)
    keys, slots = {family.canonical(key) for key in checkpoint}, make_slots(cfg, family)
    holds_tower = not family.separate_vision or any(x.key in keys for x in slots if x.part == "vision")
    parts = PARTS if holds_tower else ("text", "projector")
    arrays = open_weights(slots, cfg, family, checkpoint, None, parts, np.dtype(np.float32))
    start = None if family.stock is None else family.stock.image_start
    inputs = random_inputs(model.cfg, start and read_fields(folder / "config.json").get(*start))
    renamed, image = dict(inputs), model.cfg.image_token_id
    if cfg.image_token_id != image:  # some converted layouts have another
        renamed["input_ids"] = np.where(inputs["input_ids"] == image, cfg.image_token_id, inputs["input_ids"])
    # Most CPUs and TPUs multiply float32 in fewer bits by default; the comparison is of functions, not of speed.
    with jax.default_matmul_precision("highest"):
        if checkpoint.storage is None:
            written = _as_written(model, arrays)
            expected = gather_to_host(forward(written, **inputs)[0])[..., :words]
        else:  # a storage may round as much as it needs
            unrounded = float32_logits(model, inputs)
            written, inputs = _reloaded(model, arrays, cfg), renamed
            expected = gather_to_host(forward(written, **inputs)[0])[..., :words]
            moved = float(np.abs(expected - unrounded[..., :words]).max())
        backend = "torch" if on_process_zero(lambda: torch_loads(folder, tower)) else "jax"
        if backend == "torch":
            gaps = on_process_zero(lambda: _differences(folder, backend, expected, _torch_logits(folder, renamed)))
        else:
            again = _reloaded(written, arrays, cfg)
            gaps = _differences(folder, backend, expected, gather_to_host(forward(again, **renamed)[0]))
            del again
        differences, tolerance = np.asarray(gaps), np.full(expected.shape[:-1], TOLERANCE)
        tolerance = np.maximum(tolerance, RELATIVE_TOLERANCE * np.abs(expected).max())
        if not (differences <= tolerance).all():
            tolerance = np.maximum(tolerance, _ROUNDINGS * _moved_by_rounding(written, inputs, expected))
    worst = np.unravel_index((differences / tolerance).argmax(), differences.shape)
    values, gap, allowed = f"after reloading in {backend}, logits", float(differences[worst]), float(tolerance[worst])
    comparison = compare(folder, values, backend, gap, allowed)
    return comparison if moved is None else {**comparison, "moved_by_rounding": moved}


def compare(location: Path, values: str, backend: str, difference: float, tolerance: float) -> Comparison:
    """Return the comparison of an export's `values` with the model's; raise UserError above the tolerance."""
    if not difference <= tolerance:
        raise UserError(
            f"{location}: {values} differ from the model's by {difference:.2g} (tolerance {tolerance:.2g}): do not use "
            "this export, and report the error with the model's config.json"
        )
    return {"backend": backend, "max_abs_logit_difference": difference, "tolerance": tolerance}


def float32_logits(model: Model, inputs: dict[str, Any]) -> np.ndarray:
    """Return the logits of a model whose weights are cast to float32, float32[rows, tokens, words], on the host."""
    in_float32 = jax.tree.map(lambda leaf: leaf.astype(np.float32), model.params)
    return gather_to_host(forward(model.replace(params=in_float32), **inputs)[0])


def _differences(folder: Path, backend: str, expected: np.ndarray, actual: np.ndarray) -> list[list[float]]:
    """Return the largest logit difference at each position, float[rows, tokens]."""
    words = expected.shape[-1]
    if actual.shape[-1] > words and float(actual[..., words:].max() - actual[..., :words].max()) > 0:
        raise UserError(
            f"{folder}: the largest logit belongs to a padding row of the vocabulary: do not use this folder"
        )
    actual = actual[..., :words]
    if actual.shape != expected.shape:
        shapes = f"{list(actual.shape)} instead of {list(expected.shape)}"
        raise UserError(f"{folder}: after reloading in {backend}, logits have shape {shapes}: do not use this folder")
    differences: list[list[float]] = np.abs(expected - actual).max(-1).tolist()
    return differences


def _moved_by_rounding(model: Model, inputs: dict[str, Any], expected: np.ndarray) -> np.ndarray:
    """Return the largest logit change at each position when the last bit of all weights changes at random."""
    flat, moved = flatten(model.params), np.zeros(expected.shape[:-1], np.float32)
    for seed in range(_ROUNDINGS):
        keys = jax.random.split(jax.random.key(seed), len(flat))
        changed = {path: _last_bit(leaf, key) for (path, leaf), key in zip(flat.items(), keys, strict=True)}
        logits = gather_to_host(forward(Model(unflatten(changed), model.cfg), **inputs)[0])[..., : expected.shape[-1]]
        del changed  # before the next copy
        moved = np.maximum(moved, np.abs(logits - expected).max(-1))
    return moved


@jax.jit
def _last_bit(leaf: jax.Array, key: jax.Array) -> jax.Array:
    sign = jax.random.rademacher(key, leaf.shape, leaf.dtype)
    return leaf * (1 + sign * np.float32(2**-23))


def _as_written(model: Model, arrays: Sequence[FileArray]) -> Model:
    """Return the model in float32, after rounding its weights to the dtypes of the exported `arrays`."""
    dtypes, flat = {x.slot.name: WEIGHT_DTYPES[x.source.dtype] for x in arrays}, flatten(model.params)
    for slot in make_slots(model.cfg, family_of(model.cfg)):
        if flat[slot.path].dtype != (dtype := dtypes.get(slot.name, np.dtype(np.float32))):
            flat[slot.path] = flat[slot.path].astype(dtype)
    return Model(unflatten({path: leaf.astype(np.float32) for path, leaf in flat.items()}), model.cfg)


def _reloaded(written: Model, arrays: Sequence[FileArray], cfg: ModelConfig) -> Model:
    """Load the exported folder as a float32 model; a vision tower that it lacks is taken from the model in memory."""
    return Model(dict(written.params) | place(arrays, cfg, mesh_of(written.params)), cfg)


def random_inputs(cfg: ModelConfig, image_start: int | None = None) -> dict[str, Any]:
    """Return random inputs for comparing logits: random tokens, and an image per row if the model has a tower.

    `image_start` is the token that the stock class requires before an image, for models with dynamic resolution.
    """
    rng = np.random.default_rng(0)
    special = [token for token in (cfg.image_token_id, cfg.video_token_id) if token is not None]
    words = np.setdiff1d(np.arange(cfg.text.vocab_size), special)
    ids = rng.choice(words, (_ROWS, _TEXT_TOKENS))
    if cfg.vision is None:
        return {"input_ids": ids}
    if cfg.dynamic_resolution:
        return {"input_ids": ids, **_random_patches(cfg, ids, rng, image_start)}
    image = np.full((_ROWS, cfg.tokens_per_image), cfg.image_token_id)
    shape = (_ROWS, cfg.vision.channels, cfg.vision.image_size, cfg.vision.image_size)
    pixels = rng.standard_normal(shape, np.float32)
    return {"input_ids": np.concatenate([ids[:, :4], image, ids[:, 4:]], axis=1), "pixel_values": pixels}


def _random_patches(
    cfg: ModelConfig, ids: np.ndarray, rng: np.random.Generator, image_start: int | None
) -> dict[str, Any]:
    """Return random inputs with images of different sizes, some larger than an attention window."""
    vision = cfg.vision
    assert vision is not None
    assert cfg.image_token_id is not None
    side = max((shape.mixer.window or 0 for shape in vision.layers), default=0) + 1
    cells = np.array([[1, side + 1, 2], [1, 1, side + 2]])
    grids = cells * [1, vision.merge, vision.merge]
    longest = ids.shape[1] + int(cells.prod(axis=1).max())
    text = np.resize(ids, (len(ids), longest))
    for row, tokens in zip(text, cells.prod(axis=1), strict=True):
        row[4 : 4 + tokens] = cfg.image_token_id
        row[3] = row[3] if image_start is None else image_start
    pixels = rng.standard_normal((int(grids.prod(axis=1).sum()), vision.patch_values), np.float32)
    types = (text == cfg.image_token_id).astype(np.int64)
    rows = {"input_ids": text, "attention_mask": np.ones_like(text), "mm_token_type_ids": types}
    return {**rows, "pixel_values": pixels, "image_grid_thw": grids}


def torch_loads(folder: Path, tower: Path | None) -> bool:
    """Return True if torch is installed and transformers computes this model exactly."""
    family, cfg = read_config(folder, tower)
    loader = loader_class(read_fields(folder / "config.json")) is not None
    problem = why_not_in_transformers(cfg, loader=loader)
    if family.stock is None or problem is not None or importlib.util.find_spec("torch") is None:
        return False
    if Checkpoint(folder).storage is not None:
        from transformers import CompressedTensorsConfig

        decodes = "dequantize" in inspect.signature(CompressedTensorsConfig).parameters
        # Some versions compute quantised experts in bfloat16, and some classes do not read them.
        if has_experts(cfg.text) or not decodes or importlib.util.find_spec("compressed_tensors") is None:
            return False
    return not importlib.metadata.version("transformers").startswith(family.stock.miscomputes)


def _torch_class(config: dict[str, Any], stock: Stock) -> Any:
    """Return the class that loads a folder: a stock transformers class, or the one in the exported loader file."""
    import transformers

    name = loader_class(config)
    if name is None:
        return getattr(transformers, stock.name)
    return getattr(importlib.import_module("vlmprune_jax.io.exports.remote.modeling_per_layer"), name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context in which transformers shows no progress bar, and no warning that a layer has no optimised kernel."""
    from transformers.utils import logging as shown

    shows_progress = shown.is_progress_bar_enabled()
    shown.disable_progress_bar()  # this package shows its own
    logger, reference = logging.getLogger("transformers.integrations.hub_kernels"), "reference PyTorch implementation"
    concerns_results = lambda record: f"falling back to its {reference}" not in record.getMessage()  # noqa: E731
    logger.addFilter(concerns_results)
    try:
        yield
    finally:
        logger.removeFilter(concerns_results)
        if shows_progress:
            shown.enable_progress_bar()


@_quiet()
def _torch_logits(folder: Path, inputs: dict[str, Any]) -> np.ndarray:
    import torch

    config = read_fields(folder / "config.json")
    family = detect(config, str(folder))
    assert family.stock is not None
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
    with reading(f"{folder}: transformers does not load it", "do not use this folder"):
        stock_class = _torch_class(config, family.stock)
        if "quantization_config" in config:
            options["config"] = stock_class.config_class.from_pretrained(folder)
            options["config"].quantization_config["dequantize"] = True
        loaded, info = stock_class.from_pretrained(folder, output_loading_info=True, **options)
    # Buffers of old checkpoints that new classes do not declare are harmless.
    info["unexpected_keys"] = [key for key in info["unexpected_keys"] if not family.is_ignored(family.canonical(key))]
    lists = ("missing_keys", "unexpected_keys", "mismatched_keys")
    problems = [f"{name}: {', '.join(sorted(map(str, info[name]))[:3])}" for name in lists if info.get(name)]
    if problems:
        raise UserError(
            f"{folder}: transformers loads this export with wrong or missing weights ({'; '.join(problems)}): do "
            "not use it, and report the error"
        )
    if family.stock.by_row and "pixel_values" in inputs:
        inputs = inputs | {"pixel_values": inputs["pixel_values"][:, None]}
    takes = inspect.signature(stock_class.forward).parameters  # version 4 finds images by token id
    inputs = {name: array for name, array in inputs.items() if name != "mm_token_type_ids" or name in takes}
    if {"image_position_ids", "spatial_shapes"} & set(takes) and "image_grid_thw" in inputs:
        grids, cfg = inputs.pop("image_grid_thw"), family.from_hf(config, None)
        inputs["pixel_values"], places = with_places(cfg, inputs["pixel_values"], grids)
        inputs |= (
            {"image_position_ids": places}
            if "image_position_ids" in takes
            else {"spatial_shapes": np.asarray(grids)[:, 1:], "pixel_attention_mask": places[..., 0] >= 0}
        )
    if "token_type_ids" in takes:  # without it, images would not see themselves
        inputs["token_type_ids"] = (inputs["input_ids"] == family.from_hf(config, None).image_token_id).astype(np.int64)
    tensors = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in inputs.items()}
    with torch.inference_mode():
        return loaded.eval()(**tensors).logits.numpy()
