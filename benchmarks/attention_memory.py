"""Memory of splash and of XLA attention on a TPU chip, from programs compiled ahead of time, without a TPU.

    TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5litepod-4 TPU_WORKER_HOSTNAMES=localhost JAX_PLATFORMS=cpu \
        python benchmarks/attention_memory.py

Needs libtpu (`pip install -e '.[tpu]'`). The first model has four frozen layers of LLaMA-7B's shape in bfloat16,
on v5e:2x2 with fsdp=4 and one row per chip. Its forward pass and its gradient at the embeddings are compiled, as for
LoRA. The second model has four blocks of InternViT-300M's shape; its forward pass is compiled for 13 tiles per chip.
Prints one JSON line per case with the temporary memory per chip in GiB.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from vlmprune_jax.core.channels import Dense
from vlmprune_jax.core.config import ModelConfig, ProjectorConfig, TextConfig, VisionConfig
from vlmprune_jax.core.layer import BlockConfig, Layer
from vlmprune_jax.core.mesh.rules import MESH_AXES, sharding
from vlmprune_jax.core.mixers import Attention, RopeConfig
from vlmprune_jax.core.models import block
from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.core.models.params import param_axes, param_shapes, unflatten
from vlmprune_jax.core.models.vlm import Model, encode, features_of, to_nnx

CHIPS, LAYERS = 4, 4
HEADS = Attention(32, 32, head_dim=128, rope=RopeConfig(1e4, "default"))
TEXT = TextConfig(4096, (Layer(HEADS, Dense(11008)),) * LAYERS, BlockConfig(1e-5), 32000, False, 4096, "llama")
TILES, HEADS = 13, Attention(16, 16, head_dim=64, bias=True, out_bias=True)
BLOCKS = (Layer(HEADS, Dense(4096, activation="gelu", gated=False, bias=True)),) * LAYERS
TOWER = VisionConfig(1024, BLOCKS, BlockConfig(1e-6, norm="layer"), LAYERS, 448, 14, 3, "internvit")


def decoder_case(mesh: Mesh, seq: int, remat: str) -> tuple[Callable[..., Any], list[Any]]:
    """Return the function for the decoder's gradient at its input embeddings, and its arguments as abstract arrays."""
    cfg = ModelConfig("llama", "transformers", TEXT)
    embeds = _abstract(mesh, (CHIPS, seq, TEXT.hidden_size), ("batch", None, None))
    mask = _abstract(mesh, (CHIPS, seq), ("batch", None), "int32")

    def loss(embeds: jax.Array, params: Any, mask: jax.Array) -> jax.Array:
        final, _ = encode(params, cfg, mask, inputs_embeds=embeds, attention_mask=mask, remat=remat)
        return jnp.sum(jnp.square(final.astype(jnp.float32)))

    return jax.grad(loss), [embeds, _params(mesh, cfg), mask]


def tower_case(mesh: Mesh) -> tuple[Callable[..., Any], list[Any]]:
    """Return the function that computes vision features of image tiles, and its arguments as abstract arrays."""
    projector = ProjectorConfig("gelu", True, "pixel_shuffle", 1e-5, 2)
    cfg = ModelConfig("internvl", "source", TEXT, TOWER, projector, image_token_id=0)
    size = TOWER.image_size
    pixels = _abstract(mesh, (CHIPS * TILES, TOWER.channels, size, size), ("batch", None, None, None))

    def features(pixels: Any, params: Any) -> Any:
        module = to_nnx(Model(params, cfg))
        return module.projector(features_of(module.vision, module.cfg, Packed(pixels[None])))

    return features, [pixels, _params(mesh, cfg)]


def _params(mesh: Mesh, cfg: ModelConfig) -> Any:
    axes = param_axes(cfg)
    return unflatten({path: _abstract(mesh, shape, axes[path]) for path, shape in param_shapes(cfg).items()})


def _abstract(mesh: Mesh, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: str = "bfloat16") -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, axes))


def temporaries(function: Callable[..., Any], arguments: list[Any]) -> float:
    """Compile a function for abstract arguments; return its temporary memory (GiB per chip)."""
    try:
        compiled = jax.jit(function).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        refused = re.search(r"HLO temporaries \(([\d.]+)G\)", str(error))
        if refused is None:
            raise
        return float(refused[1])
    return round(compiled.memory_analysis().temp_size_in_bytes / 2**30, 2)


def main() -> None:
    """Print one JSON line per model and sequence length, with the memory of XLA and of splash attention."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = Mesh(np.asarray(chips).reshape(1, CHIPS, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    cases: dict[str, Callable[[Mesh], tuple[Callable[..., Any], list[Any]]]] = {
        f"decoder, {seq} tokens, remat {remat}": functools.partial(decoder_case, seq=seq, remat=remat)
        for seq in (1024, 4096)
        for remat in ("none", "full")
    } | {f"tower, {TILES} tiles": tower_case}
    for name, case in cases.items():
        line: dict[str, Any] = {"case": name}
        for kind in ("xla", "splash"):
            with (
                jax.set_mesh(mesh),
                mock.patch.object(block, "for_tpu", lambda kind=kind: kind == "splash"),
            ):
                line[f"{kind}_temporaries_gib"] = temporaries(*case(mesh))
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
