"""Vision-language model: pure functions of parameters and config, and the NNX module that declares the parameters."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import IGNORED, ModelConfig
from vlmprune_jax.core.layer import Encoder, Stack
from vlmprune_jax.core.mesh.mesh import mesh_of, place_batch, use_mesh
from vlmprune_jax.core.mesh.rules import constrain
from vlmprune_jax.core.models.context import LayerEmbeds
from vlmprune_jax.core.models.decoder import Decoder
from vlmprune_jax.core.models.inputs import VisualInputs, read_inputs
from vlmprune_jax.core.models.media import Media, Packed, is_visual, packed_rows, with_images
from vlmprune_jax.core.models.projector import Projector, pixel_shuffle, pooled
from vlmprune_jax.core.models.stack import ENCODERS, BlockStack, fill
from vlmprune_jax.core.models.vision import VisionTower
from vlmprune_jax.core.models.vocabulary import Head, cross_entropy_sum
from vlmprune_jax.core.plans.plan import PrunePlan

Params = dict[str, Any]
CAPTURE = ("hidden", "image_features", "inputs_embeds")
ENCODED = ("attention_mask", "position_ids", "media")  # arguments of `encode` that a batch may hold
_CHUNK = 128  # positions whose float32 logits are in memory together when a text is scored


@dataclass(frozen=True)
class Model:
    """A model: a nested dict of parameter arrays, and the ModelConfig that describes the model."""

    params: Params
    cfg: ModelConfig
    _: KW_ONLY
    # Defaults of `save`, without effect on computation or equality: the folder that the model was loaded from, and
    # what `vp.apply_plan` has pruned since then.
    source: Path | None = field(default=None, compare=False)
    plan: PrunePlan | None = field(default=None, compare=False)

    def __call__(self, batch: Mapping[str, Any], *, capture: Collection[str] = ()) -> tuple[jax.Array, dict[str, Any]]:
        """Return the logits of a batch, and the intermediate values named in `capture`, see `vp.forward`.

        `batch`: arrays by the argument names of `vp.forward`, such as the outputs of a Hugging Face processor.

        Raises UserError for inputs that `vp.forward` refuses, or for an array with an unknown name.
        """
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise UserError("model(batch): batch must be a mapping with input_ids: pass the outputs of a processor")
        return forward(self, **batch, capture=capture)

    def generate(self, input_ids: Any, *, max_new_tokens: int, **inputs: Any) -> np.ndarray:
        """Return the greedy continuation of every prompt, int32[batch, max_new_tokens], see `vp.generate`."""
        return _public("generate")(self, input_ids, max_new_tokens=max_new_tokens, **inputs)

    def save(self, out_dir: str | Path, **options: Any) -> None:
        """Write the model to a new folder, see `vp.save`."""
        _public("save")(self, out_dir, **options)

    def __repr__(self) -> str:
        """Return family, size, dtype and layers of every stack as text, without the arrays."""
        leaves, cfg = jax.tree.leaves(self.params), self.cfg
        size, dtypes = sum(math.prod(leaf.shape) for leaf in leaves), sorted({str(leaf.dtype) for leaf in leaves})
        lines = [f"Model({cfg.family}, {cfg.layout} layout, {size:,} parameters, {', '.join(dtypes)}", *cfg.stack_lines]
        return "\n  ".join(lines) + ")"

    def replace(self, **changes: Any) -> Model:
        """Return a copy of the model with new `params` or a new `cfg`; it still refers to the same model folder."""
        return dataclasses.replace(self, **changes)


def _public(name: str) -> Any:
    """Return the function `vlmprune_jax.NAME`, looked up late because that package imports this module."""
    return getattr(sys.modules["vlmprune_jax"], name)


def config_of(model: Model | ModelConfig) -> ModelConfig:
    """Return a model's config; a ModelConfig is returned unchanged."""
    return model.cfg if isinstance(model, Model) else model


def features_of(tower: VisionTower, cfg: ModelConfig, images: Packed) -> jax.Array:
    """Return the features of images, the input of the projector.

    The result is float[tiles, tokens, features], or float[packs, tokens, features of all levels] for images of varying
    size.
    """
    projector = cfg.projector
    if images.grid is not None:
        factor = 1 if projector is None else projector.downsample
        levels = tower.levels(images)
        levels = [x.reshape(*x.shape[:-2], x.shape[-2] // factor**2, -1) for x in levels]  # joins consecutive patches
        if projector is not None and projector.pools:
            levels = [pooled(level, tower.cfg.hidden_size) for level in levels]
        return jnp.concatenate(levels, axis=-1)
    states = tower(images)
    if cfg.feature_select == "patch":
        states = states[:, 1:]
    if projector is not None and (projector.shuffles or projector.pools):
        joined = pixel_shuffle(states, projector.downsample, projector.shuffle_version)
        states = pooled(joined, states.shape[-1]) if projector.pools else joined
    return states


def tower_features(tower: dict[str, Any], cfg: ModelConfig, images: Packed) -> jax.Array:
    """Return `features_of` the vision tower with these parameters, in their data type."""
    module, dtype = fill(stack_module("vision", cfg.stack("vision")), tower), jax.tree.leaves(tower)[0].dtype
    return features_of(module, cfg, images._replace(values=images.values.astype(dtype)))


def splice(x: jax.Array, is_image: jax.Array, features: jax.Array, packs: int) -> jax.Array:
    """Replace the embeddings at image positions (bool[batch, seq]) of `x` by vision features, in order.

    The features come in `packs` packed rows, each of which serves equally many rows of the batch.
    """
    flat = features.reshape(packs, -1, x.shape[-1])
    marks = is_image.reshape(packs, -1)
    index = jnp.clip(jnp.cumsum(marks, axis=1) - 1, 0, flat.shape[1] - 1)
    placed = jnp.take_along_axis(flat, index[..., None], axis=1).reshape(x.shape)
    return jnp.where(is_image[..., None], placed, x)


class VisionLanguageModel(nnx.Module):
    """Vision-language model (tower -> projector -> decoder), or a decoder alone if the config has no tower."""

    def __init__(self, cfg: ModelConfig):
        self.cfg = cfg
        self.text = Decoder(cfg.text, cfg.lora, cfg.fake_quant)
        for name, encoder in cfg.encoders:
            setattr(self, name, ENCODERS[type(encoder)](encoder, cfg.text.hidden_size))
        if cfg.vision is not None and cfg.projector is not None:
            if cfg.tower:
                self.vision = VisionTower(cfg.vision)
            self.projector = Projector(cfg.projector, cfg.vision.hidden_size, cfg.text.hidden_size)

    def embed(self, input_ids: jax.Array, media: Media | None = None) -> tuple[jax.Array, LayerEmbeds]:
        """Return the decoder's input embeddings float[batch, seq, embed], with media, and the embeddings of layers.

        `media`: inputs of tower and encoders in packed rows; for a model without its tower, the images' features.
        """
        x, media, deepstack = self.text.embed_tokens.lookup(input_ids), media or {}, None
        for name, encoder in self.cfg.encoders:
            if name in media:
                tokens = getattr(self, name)(media[name]).astype(x.dtype)
                x = splice(x, input_ids == encoder.token_id, tokens, len(media[name].values))
        if "vision" in media:
            images, is_image = media["vision"], is_visual(input_ids, self.cfg.visual_token_ids)
            values, packs = images.values.astype(x.dtype), len(images.values)
            states = values.reshape(-1, *values.shape[-2:])  # features, if there is no tower
            if self.cfg.tower:
                states = features_of(self.vision, self.cfg, images._replace(values=values))
            deepstack = self.projector.deepstack_features(states)
            if deepstack is not None:
                deepstack = jnp.stack([splice(jnp.zeros_like(x), is_image, embeds, packs) for embeds in deepstack])
                deepstack = constrain(deepstack, (None, "batch", "sequence", None))
            x = splice(x, is_image, self.projector(states), packs)
        return x, LayerEmbeds(deepstack, self.layer_inputs(x, input_ids))

    def layer_inputs(self, x: jax.Array, input_ids: jax.Array) -> jax.Array | None:
        """Return the decoder's per-layer embeddings; image and video tokens use the padding token's embedding."""
        if self.text.extra_inputs is None:
            return None
        is_image = is_visual(input_ids, self.cfg.visual_token_ids)
        return self.text.extra_inputs(x, jnp.where(is_image, self.cfg.pad_token_id or 0, input_ids))


@functools.lru_cache(maxsize=256)
def stack_module(stack: str, cfg: Stack) -> Any:
    """Return the abstract NNX module of the decoder or a tower, without allocating parameters."""
    kinds: dict[str, Callable[[Any], BlockStack]] = {"text": Decoder, "vision": VisionTower}
    return nnx.eval_shape(lambda: ENCODERS[type(cfg)](cfg, 1) if isinstance(cfg, Encoder) else kinds[stack](cfg))


@functools.lru_cache(maxsize=64)
def abstract(cfg: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Return graph and abstract state of a config's NNX module, without allocating parameters."""
    return nnx.split(nnx.eval_shape(lambda: VisionLanguageModel(cfg)))


def to_nnx(model: Model) -> VisionLanguageModel:
    """Return an NNX module that holds the model's arrays, for your own training loop."""
    graph, state = abstract(model.cfg)
    if jax.tree.map(lambda _: 0, nnx.to_pure_dict(state)) != jax.tree.map(lambda _: 0, model.params):
        raise UserError("params do not have the structure that cfg describes: change params and cfg together")
    filled = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(filled, model.params)
    return nnx.merge(graph, filled)


def encode(
    params: Params,
    cfg: ModelConfig,
    input_ids: jax.Array,
    *,
    media: Media | None = None,
    attention_mask: jax.Array | None = None,
    inputs_embeds: jax.Array | None = None,
    layer_embeds: LayerEmbeds = LayerEmbeds(),
    position_ids: jax.Array | None = None,
    states: tuple[int, ...] = (),
    remat: str = "none",
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """Run the model up to the output head; return hidden states float[batch, seq, embed] and auxiliary values.

    `media`: see `VisionLanguageModel.embed`. `inputs_embeds`, together with `layer_embeds`, replaces the embedding of
    tokens and images (for example, to run the teacher on the student's embeddings). `position_ids`: int[batch, seq], by
    default counted along `attention_mask`; int[batch, 3, seq] with images of varying size
    (`positions.mrope_positions`). `states`: see `Decoder.__call__`. aux always has "inputs_embeds" and "layer_embeds".

    Raises UserError for images of varying size without `position_ids`.
    """
    module = to_nnx(Model(params, cfg))
    if inputs_embeds is None:
        inputs_embeds, layer_embeds = module.embed(input_ids, media)
    elif cfg.text.block.layer_inputs:  # those of another model's layers would be of no use
        layer_embeds = LayerEmbeds(per_layer_embeds=module.layer_inputs(inputs_embeds, input_ids))
    x = constrain(inputs_embeds, ("batch", "sequence", None))
    if attention_mask is None:
        attention_mask = jnp.ones(input_ids.shape, jnp.int32)
    shown = "vision" in (media or {})
    if shown and position_ids is None and cfg.text.rope.sections:
        raise UserError("images need position_ids by row and column: compute them with models.media.mrope_positions")
    position_ids = with_images(cfg, shown, position_ids, input_ids, attention_mask)
    context = module.text.context(attention_mask, position_ids, dropout_key=dropout_key)
    final, aux = module.text(x, context, states=states, remat=remat, layer_embeds=layer_embeds)
    return final, {**aux, "inputs_embeds": inputs_embeds, "layer_embeds": layer_embeds}


def head_of(params: Params, cfg: ModelConfig) -> Head:
    """Return the output head, which maps final hidden states to logits."""
    head = params["text"]["embed_tokens" if cfg.text.tie_embeddings else "lm_head"]
    return Head(head["weight"], head.get("bias"), cfg.text.logit_cap)


@functools.partial(jax.jit, static_argnames=("cfg",))
def text_loss(params: Params, cfg: ModelConfig, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the summed cross-entropy, float32[], of the tokens (`mask` 1) after the first of each row."""
    final, _ = encode(params, cfg, ids, attention_mask=mask)
    return cross_entropy_sum(final, head_of(params, cfg), jnp.where(mask > 0, ids, IGNORED), chunk=_CHUNK)


def apply(
    params: Params, cfg: ModelConfig, input_ids: jax.Array, *, capture: Collection[str] = (), **inputs: Any
) -> tuple[jax.Array, dict[str, Any]]:
    """Return logits float[batch, seq, vocab], and the intermediate values "hidden" or "inputs_embeds" in `capture`.

    `inputs`: arrays of `encode`. aux["hidden"] has n_layers + 1 arrays, from embeddings to the state after the final
    norm (as in Hugging Face).
    """
    states = tuple(range(len(cfg.text.layers) + 1)) if "hidden" in capture else ()
    final, aux = encode(params, cfg, input_ids, **inputs, states=states)
    aux["hidden"] = aux.get("states")
    return head_of(params, cfg).logits(final), {name: aux[name] for name in capture}


_forward = jax.jit(apply, static_argnames=("cfg", "capture"))


def forward(
    model: Model,
    input_ids: Any,
    *,
    attention_mask: Any = None,
    capture: Collection[str] = (),
    **visuals: Unpack[VisualInputs],
) -> tuple[jax.Array, dict[str, Any]]:
    """Return the logits for token ids with one id per image feature, and intermediate values on request.

    Args:
      model: the model; sharded parameters give a sharded computation.
      input_ids: int[batch, seq]; `model.cfg.image_token_id` once per image feature, and `model.cfg.video_token_id` (if
        the model has this token) once per video feature.
      attention_mask: int[batch, seq], 1 = real token.
      capture: names of intermediates: any of "hidden", "image_features", "inputs_embeds".
      visuals: arrays of a processor's images and videos, see `vlmprune_jax.core.models.inputs.VisualInputs`.

    Returns:
      (logits, aux): logits [batch, seq, vocab] in the data type of the parameters, and a dictionary with the values
      named in `capture`. "hidden": tuple of n_layers + 1 arrays [batch, seq, embed], from the embeddings to the state
      after the final norm (the Hugging Face convention). "image_features": [images, tokens, embed], or [tokens of all
      images, embed] for images of varying size (None without images). "inputs_embeds": [batch, seq, embed].

    Raises:
      UserError: an unknown name in `capture`, ids outside the vocabulary, or image positions that do not match the
        images.
    """
    unknown = set(capture) - set(CAPTURE)
    if unknown:
        raise UserError(f"capture={sorted(unknown)}: no such intermediate value (choose among {', '.join(CAPTURE)})")
    mesh, cfg, ids = mesh_of(model.params), model.cfg, np.asarray(input_ids)
    inputs = read_inputs(cfg, ids, attention_mask, visuals, packed_rows(len(ids), mesh))
    arrays = {
        "input_ids": ids,
        "attention_mask": None if attention_mask is None else np.asarray(attention_mask),
        "media": inputs.media,
        "position_ids": inputs.positions,
    }
    captured = {"inputs_embeds" if name == "image_features" else name for name in capture}
    with use_mesh(mesh):
        logits, aux = _forward(model.params, cfg, **place_batch(arrays, mesh), capture=tuple(sorted(captured)))
    if "image_features" in capture:  # in the embeddings, they have no padding
        features = aux["inputs_embeds"][np.nonzero(is_visual(ids, cfg.visual_token_ids))]
        shape = (-1,) if cfg.dynamic_resolution else (-1, cfg.tokens_per_image)
        shown = "vision" in inputs.media
        aux["image_features"] = features.reshape(*shape, features.shape[-1]) if shown else None
    return logits, {name: aux[name] for name in capture}
