"""Cost of reconstruction on a TPU slice for the real families, compiled ahead of time, as a Markdown table.

    python benchmarks/reconstruction_plan.py [--topology=v5e:8x8] [--families llava bunny internvl] [--layerwise]

Compiles the programs of one layer at its true widths, with 30 % of the parameters pruned by width (heads kept): the
forward pass of the layer in either model, the sums of `down_proj`, the held-out errors of all ridge penalties, and the
solution; 64 rows at a time. Bytes are per chip. Times are for all layers, with 65,536 tokens for the fit and as many
padded held-out ones (an eighth of the records). Arithmetic: 1 pass of the bf16 unit for a layer's products, 6 passes
for sums and solves (float32). Streams: transfers of hidden states between hosts and chips, if the chips cannot keep
them. The lowest time assumes that both overlap during the forward passes and sums, but not during the solve.
--layerwise: instead plans one layer's training (`reconstruct.method="layerwise"`, at most 6 epochs of 65,536 tokens) on
one chip.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from models import MODELS

TOKENS, ROWS, HOST = 2**16, 64, 8e9  # HOST: bytes per second between a host and its chips, 4 or 8 of them
PASSES = 6  # passes of the bf16 matrix unit for a float32 product of precision "highest"
LENGTHS = {"llava": 1024, "bunny": 1024, "internvl": 4096}


def layer_shapes(cfg):
    """Return {parameter path within a layer: shape} of the decoder's first layer."""
    from vlmprune_jax.core.models.params import param_shapes

    prefix = "text/layers/0/"
    return {path[len(prefix) :]: shape[1:] for path, shape in param_shapes(cfg).items() if path.startswith(prefix)}


def main() -> None:
    """Compile the programs of every family, and print a table row for each."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:8x8")
    parser.add_argument("--families", nargs="+", default=list(LENGTHS))
    parser.add_argument("--layerwise", action="store_true")
    options = parser.parse_args()
    if options.layerwise:
        for family in options.families:
            print(layerwise(family, options.topology), flush=True)
        return
    print("| family | G and C | layer: temporaries | sums | 9 ridges | change | arithmetic, streams, least, s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for family in options.families:
        print(row(family, options.topology), flush=True)


def layerwise(family: str, topology: str) -> str:
    """Return the memory, and a lower bound on the time, of one layer's training on one chip, as text."""
    import jax
    import jax.numpy as jnp

    from vlmprune_jax.core.mesh.mesh import make_mesh, use_mesh
    from vlmprune_jax.core.mesh.rules import sharding
    from vlmprune_jax.core.models.context import LayerEmbeds
    from vlmprune_jax.core.prune import layers, layerwise
    from vlmprune_jax.io.checkpoints.read import read_config
    from vlmprune_jax.run.planning.ahead_of_time import compile_for_tpu, make_slice

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[family]))
        _, cfg = read_config(Path(folder), None)
    target = make_slice(topology)
    mesh = make_mesh(1, 1, 1, devices=target.devices[:1])
    text, length = cfg.text.with_layers(cfg.text.layers[:1]), LENGTHS[family]

    def abstract(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(mesh, ())), tree)

    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in layer_shapes(cfg).items()}
    tokens = jax.ShapeDtypeStruct((layerwise.ROWS, length), jnp.float32)
    stream = jax.ShapeDtypeStruct((*tokens.shape, cfg.text.hidden_size), jnp.float32)
    mask = jax.ShapeDtypeStruct(tokens.shape, jnp.int32)
    rows = layers.Rows(stream, tokens, {"attention_mask": mask}, LayerEmbeds(), {})
    layer = layers.Layer({}, 0, "text", text, jnp.dtype(jnp.bfloat16), None)
    state, rate = jax.eval_shape(layerwise._ADAM.init, params), jax.ShapeDtypeStruct((), jnp.float32)

    def train(params, state, rate, rows, target):
        return layerwise._step(params, state, layer, rate, rows, target)

    step = jax.jit(train, donate_argnums=(0, 1))
    with use_mesh(mesh):
        found = compile_for_tpu(step, *abstract((params, state, rate, rows, stream)))
    steps = layerwise.EPOCHS * TOKENS // (layerwise.ROWS * length)
    seconds = steps * found.flops / target.chip.flops, steps * 2 * stream.size * 4 / HOST
    gib = [size / 2**30 for size in (found.arguments, found.temporaries)]
    return (
        f"{family}: {gib[0]:.2f} GiB arguments, {gib[1]:.2f} GiB temporaries; a layer at least "
        f"{max(seconds):.1f} s (arithmetic {seconds[0]:.1f}, streams {seconds[1]:.1f}), {steps} steps"
    )


def row(family: str, topology: str) -> str:
    """Return a family's row of the table: memory of the compiled programs and lower bounds on time."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from vlmprune_jax.base.settings import override
    from vlmprune_jax.core.mesh.mesh import make_mesh, use_mesh
    from vlmprune_jax.core.mesh.rules import sharding
    from vlmprune_jax.core.models.context import LayerEmbeds
    from vlmprune_jax.core.models.params import layer_axes
    from vlmprune_jax.core.prune import layers, least_squares
    from vlmprune_jax.io.checkpoints.read import read_config
    from vlmprune_jax.run.experiment.spec import Experiment
    from vlmprune_jax.run.planning.ahead_of_time import compile_for_tpu, make_slice
    from vlmprune_jax.run.planning.case import predict_plan

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[family]))
        _, dense = read_config(Path(folder), None)
    changes = {"prune": {"method": "width", "ratio": 0.3, "heads": "keep"}}
    cfg = predict_plan(override(Experiment(), changes), dense).apply_to(dense)
    target = make_slice(topology)
    mesh = make_mesh(1, -1, 1, devices=target.devices)
    length, width, mlp = LENGTHS[family], cfg.text.hidden_size, cfg.text.layers[0].mlp
    rows = max(TOKENS // length, len(target.devices)) if length * ROWS > TOKENS else ROWS

    def abstract(shape, axes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, axes))

    def layer(of):
        text, axes = of.text.with_layers(of.text.layers[:1]), layer_axes(of, "text")
        return {path: abstract(shape, axes[path]) for path, shape in layer_shapes(of).items()}, text

    stream = abstract((rows, length, width), ("batch", None, None))
    mask = abstract((rows, length), ("batch", None), np.int32)
    weight = abstract((rows, length), ("batch", None))
    found = {}
    inputs = layers.Rows(stream, weight, {"attention_mask": mask}, LayerEmbeds(), {})

    with use_mesh(mesh):
        for name, of in (("dense", dense), ("ours", cfg)):
            params, text = layer(of)

            def whole(params, text=text):
                return layers.Layer(params, 0, "text", text, jnp.dtype(jnp.bfloat16), None)

            found[name] = compile_for_tpu(jax.jit(lambda params, rows: whole(params).run(rows)), params, inputs)

        def sums_of(params, rows, target):
            return least_squares.writer_sums(whole(params), rows, target, None, module="down_proj")

        found["sums"] = compile_for_tpu(jax.jit(sums_of), params, inputs, stream)
        products = abstract((mlp, mlp), ("mlp", None)), abstract((mlp, width), ("mlp", None))
        sums = least_squares.Sums(*products, abstract((), ()))
        ridges = abstract((len(least_squares.RIDGES),), (None,))
        found["errors"] = compile_for_tpu(least_squares.held_out_errors, sums, sums, ridges)
        found["change"] = compile_for_tpu(least_squares.change, sums, abstract((), ()))
    n_layers, steps = len(cfg.text.layers), 2 * max(TOKENS // (rows * length), 1)
    chips, hosts = len(target.devices), len({device.process_index for device in target.devices})
    product_flops = 2 * rows * length * mlp * (mlp + width)
    flops = found["dense"].flops + found["sums"].flops + (PASSES - 1) * product_flops + found["ours"].flops
    arithmetic = steps * flops / chips / target.chip.flops
    solve = PASSES * (found["errors"].flops + found["change"].flops) / chips / target.chip.flops
    size = steps * rows * length * width * 4
    fits = 4 * size / chips < target.chip.hbm / 4  # as `stream.LayerStream` has it
    moved = 0 if fits else 6 * size / hosts / HOST  # both models' streams, twice in and once out
    least = max(arithmetic, moved) + solve
    times = n_layers * np.array([arithmetic + solve, moved, least])
    gib = {name: f"{one.temporaries / 2**30:.2f} GiB" for name, one in found.items()}
    cells = [
        f"{family}, {mlp:,} of {dense.text.layers[0].mlp:,} neurons",
        f"{(mlp + width) * mlp * 4 / 2**30:.2f} GiB",
        *(gib[name] for name in ("dense", "sums", "errors", "change")),
        f"{', '.join(f'{one:.1f}' for one in times)} ({times[2] / max(times[:2]):.2f} x the larger)",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
