"""Compiled evaluation on a TPU slice: memory, and bytes of a decoded token from HBM and from other chips.

    python benchmarks/decoding_plan.py --topology=v5e:2x4 --cases=llava,bunny [--rows=32]

Compiles prefill and decoding of unpruned models for the benchmark with the longest prompts; prints JSON lines.
`read`: bytes of HBM that a chip touches for one token of every row; `resident`: those that it cannot avoid.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from compiled_text import collective_bytes, hbm_bytes
from jax.sharding import Mesh
from models import MODELS
from plan import DATA, PROCESSORS

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import decoding_mesh, make_mesh, row_ways, use_mesh
from vlmprune_jax.core.mesh.rules import sharding
from vlmprune_jax.core.models.decoder import map_cache
from vlmprune_jax.core.models.flops import head_of
from vlmprune_jax.core.models.generate import decode, prefill
from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.core.models.params import abstract_params, count_params, unflatten
from vlmprune_jax.io.families.tiles import ImageShape
from vlmprune_jax.run.planning.ahead_of_time import Compiled, Slice, compile_for_tpu, make_slice
from vlmprune_jax.run.planning.evaluation import BENCHMARKS, prompt_of

NEW_TOKENS = 17  # of the compiled programs: 16 steps of the decoding loop


@dataclass(frozen=True)
class Decoding:
    """Compiled evaluation of a batch of `rows` rows of `length` tokens; sizes are bytes per chip."""

    programs: tuple[Compiled, Compiled]
    rows: int
    length: int
    read: float  # HBM, for one token of every row
    resident: float  # of these, the weights that a token needs and the state of all rows
    received: float  # from other chips, for one token of every row

    @property
    def needed(self) -> int:
        """HBM of the larger program."""
        return max(program.arguments + program.temporaries for program in self.programs)


def compile_evaluation(
    cfg: ModelConfig, target: Slice, length: int, image: ImageShape, rows: int, sizes: tuple[int, ...] = ()
) -> Decoding:
    """Compile prefill and decoding of a bfloat16 model; `sizes`: mesh (data, fsdp, tensor), or () to choose one."""
    mesh = decoding_mesh(cfg, make_mesh(1, -1, 1, devices=target.devices), 2 * count_params(cfg), sizes)
    assert mesh is not None
    ways = row_ways(mesh)
    rows = -(-rows // ways) * ways
    flat = abstract_params(cfg, "bfloat16", mesh)
    params, arrays = unflatten(flat), _arrays(cfg, rows, length, image, mesh)
    with use_mesh(mesh):
        begun = jax.eval_shape(lambda *inputs: prefill(inputs[0], cfg, inputs[1], NEW_TOKENS, ()), params, arrays)
        first = compile_for_tpu(prefill, params, cfg, arrays, NEW_TOKENS, ())
        later = compile_for_tpu(decode, params, cfg, *_placed(cfg, begun, mesh), NEW_TOKENS, ())
    used = [leaf for path, leaf in flat.items() if path.startswith(("text/layers/", "text/norm", head_of(cfg)))]
    weights = 2 * sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in used)
    state = sum(layer.mixer.state_bytes(length, 2) for layer in cfg.text.layers) / mesh.size * rows
    received = sum(collective_bytes(later.text).values()) / (NEW_TOKENS - 1)
    read = hbm_bytes(later.text) / (NEW_TOKENS - 1)
    return Decoding((first, later), rows, length, read, weights + state, received)


def _arrays(cfg: ModelConfig, rows: int, length: int, image: ImageShape, mesh: Mesh) -> dict[str, Any]:
    """Return the inputs of `prefill` as abstract arrays."""

    def array(*shape: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
        axes = ("batch", *(None,) * len(shape))
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding(mesh, axes))

    arrays: dict[str, Any] = {"ids": array(length), "valid": array(length), "ended": array(dtype=bool)}
    vision = cfg.vision
    if vision is not None and vision.dynamic_resolution:
        patches = image.rows * image.columns
        images = Packed(array(patches, vision.patch_values, dtype=np.float32), array(1, 3))
        arrays["media"] = {"vision": images}
        if cfg.text.rope.sections:
            arrays |= {"positions": array(3, length), "delta": array(1), "least": array(1)}
    elif vision is not None:
        side = vision.image_size
        arrays["media"] = {"vision": Packed(array(image.slots, vision.channels, side, side, dtype=np.float32))}
    return arrays


def _placed(cfg: ModelConfig, begun: Any, mesh: Mesh) -> Any:
    """Add shardings to the abstract cache and decoding state: rows over (data, fsdp), heads over `tensor`."""

    def place(axes: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(mesh, axes))

    cache, state = begun
    rows = jax.tree.map(lambda leaf: place(("batch", *(None,) * (leaf.ndim - 1)), leaf), state)
    return map_cache(cfg.text, place, cache), rows


def main() -> None:
    """Compile the evaluation of every model, and print a JSON line for each."""
    jax.config.update("jax_platforms", "cpu")
    from vlmprune_jax.base.settings import override
    from vlmprune_jax.io.checkpoints.read import read_config
    from vlmprune_jax.run.experiment.spec import Experiment
    from vlmprune_jax.run.planning.evaluation import preparation_of

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--cases", default="llava,bunny")
    parser.add_argument("--rows", type=int, default=32)
    args = parser.parse_args()
    for case in args.cases.split(","):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(MODELS[case]))
            if case in PROCESSORS:
                (Path(folder) / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[case]))
            cfg = read_config(Path(folder), None)[1]
            preparation = preparation_of(override(Experiment(), {"data": DATA.get(case, {})}).data, cfg, Path(folder))
        prompts = [prompt_of(cfg, preparation, question) for question in BENCHMARKS.values()]
        length, image = max(prompts, key=lambda prompt: prompt[0])
        found = compile_evaluation(cfg, make_slice(args.topology), length, image, args.rows)
        numbers = {name: getattr(found, name) for name in ("rows", "length", "needed", "read", "resident", "received")}
        print(json.dumps({"case": case, "topology": args.topology, **numbers}), flush=True)


if __name__ == "__main__":
    main()
