"""User-defined encoders besides the vision tower, for audio, depth or other inputs that become decoder tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlmprune_jax.base.checks import ModuleRegistry, check_returned
from vlmprune_jax.core.models.context import Context, Names
from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.core.models.stack import BlockStack
from vlmprune_jax.core.stack import Encoder


class EncoderModule(BlockStack):
    """Base class of user-defined encoders: a subclass embeds items (such as sounds) and projects to decoder tokens.

    Args:
      cfg: the encoder's config.
      text_size: channels of the decoder's residual stream.
    """

    cfg: Encoder

    def __init__(self, cfg: Encoder, text_size: int):
        del text_size
        super().__init__(cfg, Names("encoder", ("layer_norm1", "layer_norm2"), "out_proj"))

    def embed(self, items: jax.Array) -> jax.Array:
        """Embed items [items, ...], such as sounds, as the first block's input float[items, positions, hidden]."""
        raise NotImplementedError

    def project(self, x: jax.Array) -> jax.Array:
        """Project the last block's output [items, positions, hidden] to tokens float[items, tokens, text_size]."""
        raise NotImplementedError

    def context_of(self, x: jax.Array, arrays: Mapping[str, Any]) -> Context:
        """Return the blocks' context, without masks: every position attends to all positions of its item."""
        del x, arrays
        return Context({})

    def __call__(self, items: Packed) -> jax.Array:
        """Encode the items of a batch as decoder tokens float[items, tokens, text_size]."""
        dtype, values = jax.tree.leaves(self.layers)[0].dtype, items.values
        x = self.embed(jnp.asarray(values, dtype).reshape(-1, *values.shape[2:]))
        shape = (values.shape[0] * values.shape[1], self.cfg.positions, self.cfg.hidden_size)
        check_returned(type(self).embed, x, getattr(x, "shape", None) == shape, f"an array of shape {list(shape)}")
        states = self.pass_through(x, self.context_of(x, {})).last
        tokens, expected = self.project(states), f"an array [{len(states)}, {self.cfg.tokens}, channels of the decoder]"
        fits = getattr(tokens, "ndim", 0) == 3 and tokens.shape[:2] == (len(states), self.cfg.tokens)
        check_returned(type(self).project, tokens, fits, expected)
        return tokens


# Class of an `Encoder` config -> its module. Users add encoders by assignment (`vlmprune_jax.encoders[Mine] = ...`).
ENCODERS: ModuleRegistry[type[EncoderModule]] = ModuleRegistry("encoders", Encoder, EncoderModule, {})
