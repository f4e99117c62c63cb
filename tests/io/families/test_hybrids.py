"""Hybrid decoders, beside what all families show: delta nets, their states, scores and repair, and MTP heads."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import decoder_values
from golden_cases import CLOSE, Golden, cut_layers
from hf_cases import LFM2_VL, edit_weights, make_folder, prune
from refusal import refused

import vlmprune_jax as vp
from vlmprune_jax.core.models.generate import SharedPrefix, generate
from vlmprune_jax.core.models.recurrent import CHUNK, chunked, recurrent
from vlmprune_jax.core.prune import KeptLayer
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.run.report.figures import importance_figure


@pytest.fixture(scope="module")
def golden(goldens):
    return Golden(goldens / "families/qwen3_5")


def test_states_behind_a_shared_prefix(golden):
    """Padding between the prefix and its rows reaches neither the convolution nor the matrices."""
    model, draw = golden.model, np.random.default_rng(0)
    prefix, rest = draw.integers(0, 300, (2, 9)), draw.integers(0, 300, (3, 7))
    prefix_mask, mask, rows = np.ones_like(prefix), np.ones_like(rest), np.array([0, 1, 1])
    prefix_mask[1, :3], mask[0, :5] = 0, 0
    shared = SharedPrefix(prefix, prefix_mask, rows)
    tokens = generate(model, rest, attention_mask=mask, prefix=shared, max_new_tokens=5, eos_token_ids=())
    for row, at in enumerate(rows):
        whole = np.concatenate([prefix[at][prefix_mask[at] == 1], rest[row][mask[row] == 1]])
        alone = generate(model, whole[None], max_new_tokens=5, eos_token_ids=())
        np.testing.assert_array_equal(tokens[row], alone[0])


def test_mixers_equal_stock(golden):
    """Input and output of the first delta net and the first attention, and the chunked rule against one by one."""
    ids = golden.arrays["text_input_ids"][None]
    names = ("self_attn", "o_proj_out")
    values = [block.inputs for block in decoder_values(golden.model.params, golden.model.cfg, ids, names)]
    for name in [name for name in golden.arrays if "_input_" in name and name.startswith(("text_gdn", "text_att"))]:
        layer = int(name.rsplit("_", 1)[1])
        np.testing.assert_allclose(values[layer]["self_attn"][0], golden.arrays[name], **CLOSE)
        output = golden.arrays[name.replace("input", "output")]
        np.testing.assert_allclose(values[layer]["o_proj_out"][0], output, **CLOSE)
    draw = np.random.default_rng(0)
    q, k = (draw.standard_normal((2, 70, 3, 8)).astype(np.float32) for _ in range(2))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v, beta = draw.standard_normal((2, 70, 6, 5)).astype(np.float32), draw.random((2, 70, 6), np.float32)
    g = -20 * draw.random((2, 70, 6), np.float32) ** 4  # decays to almost nothing, and almost none
    arrays = [jnp.asarray(x) for x in (q, k, v, beta, g)]
    state, steps = jnp.zeros((2, 6, 8, 5)), []
    out, last = chunked(*arrays, state)
    for at in range(70):
        step, state = recurrent(*(x[:, at : at + 1] for x in arrays), state)
        steps.append(step[:, 0])
    np.testing.assert_allclose(out, np.stack(steps, axis=1), atol=2e-5)
    np.testing.assert_allclose(last, state, atol=2e-5)
    gradient = jax.grad(lambda g: jnp.sum(chunked(*arrays[:4], g, jnp.zeros_like(last))[0] ** 2))(arrays[4])
    assert np.isfinite(gradient).all()


def test_backward_keeps_a_matrix_per_chunk():
    """Between the passes are the inputs and the matrices before every chunk, nothing of 64 x 64 positions.

    Neither pass has a batched triangular solve, on which jaxlib's two CPU threads can wait for each other.
    """
    sizes = [(2, 4 * CHUNK, *last) for last in ((2, 16), (2, 16), (6, 16), (6,), (6,))]
    arrays = [jax.ShapeDtypeStruct(size, np.float32) for size in sizes]

    def both(*x):
        return jax.vjp(lambda *x: chunked(*x, jnp.zeros((2, 6, 16, 16))), *x)

    assert "triangular_solve" not in str(jax.make_jaxpr(lambda *x: both(*x)[1](both(*x)[0]))(*arrays))
    stored = jax.eval_shape(lambda *x: both(*x)[1], *arrays)
    count = sum(leaf.size for leaf in jax.tree.leaves(stored))
    assert count <= sum(array.size for array in arrays) + 2 * 4 * 6 * 16 * 16 + 16  # and scalars


def test_packed_rows_are_refused(golden):
    ids = golden.arrays["length130_input_ids"][None]
    fact = "attention_mask has values up to 2, expected 0 and 1: give every sequence"
    refused(fact, vp.forward, golden.model, ids, attention_mask=1 + (np.arange(130)[None] > 60))


def test_biases_of_attention_are_cut_with_its_heads(golden, torch_outputs, tmp_path):
    config = json.loads((golden.ckpt / "config.json").read_text())
    config["text_config"] |= {"attention_bias": True, "mtp_num_hidden_layers": 0}
    folder = make_folder(tmp_path / "model", config)
    smaller, plan = prune(vp.load(folder), cut_layers(golden, "attention"))
    vp.save(smaller, tmp_path / "out", source_dir=folder, plan=plan, dtype="float32")
    row = {"input_ids": np.arange(10, 22)[None]}
    logits = torch_outputs(tmp_path / "out", row, class_name="AutoModelForImageTextToText", version="5")["logits"]
    np.testing.assert_allclose(vp.forward(vp.load(tmp_path / "out"), **row)[0], logits, **CLOSE)


@pytest.mark.parametrize("cut", ["attention", "all"])
def test_the_head_for_several_tokens_is_cut_alike(golden, tmp_path, cut):
    """Largest columns of its projections to the stream stay, of as many groups and neurons as the decoder has."""
    smaller, plan = prune(golden.model, cut_layers(golden, cut))
    options = {"source_dir": golden.ckpt, "plan": plan, "dtype": "float32"}
    vp.save(smaller, tmp_path / "dropped", **options)
    vp.save(smaller, tmp_path / "cut", mtp="cut", **options)
    counts = [
        json.loads((tmp_path / f / "config.json").read_text())["text_config"]["mtp_num_hidden_layers"]
        for f in ("dropped", "cut")
    ]
    assert counts == [0, 1]
    assert not [key for key in Checkpoint(tmp_path / "dropped") if key.startswith("mtp.")]
    whole, found = Checkpoint(golden.ckpt), Checkpoint(tmp_path / "cut")
    assert {key for key in found if key.startswith("mtp.")} == {key for key in whole if key.startswith("mtp.")}
    attention = smaller.cfg.text.attentions[0]
    layer, neurons = "mtp.layers.0.", smaller.cfg.text.channel.mlp
    out = whole[layer + "self_attn.o_proj.weight"].reshape(28, 2, 2, 16)  # two groups of two heads
    group = int(np.argmax(np.square(out).sum(axis=(0, 2, 3))))
    assert attention.kv_heads == 1
    np.testing.assert_array_equal(found[layer + "self_attn.o_proj.weight"], out[:, group].reshape(28, 32))
    queries = whole[layer + "self_attn.q_proj.weight"].reshape(2, 64, 28)[group]  # with their gates
    np.testing.assert_array_equal(found[layer + "self_attn.q_proj.weight"], queries)
    np.testing.assert_array_equal(
        found[layer + "self_attn.k_proj.weight"], whole[layer + "self_attn.k_proj.weight"].reshape(2, 16, 28)[group]
    )
    down = whole[layer + "mlp.down_proj.weight"]
    units = np.sort(np.argsort(-np.square(down).sum(axis=0))[:neurons])
    np.testing.assert_array_equal(found[layer + "mlp.down_proj.weight"], down[:, units])
    np.testing.assert_array_equal(found[layer + "mlp.up_proj.weight"], whole[layer + "mlp.up_proj.weight"][units])
    np.testing.assert_array_equal(found["mtp.fc.weight"], whole["mtp.fc.weight"])
    assert vp.load(tmp_path / "cut").cfg == smaller.cfg
    # a stage's folder has no head: it comes from the unpruned folder
    staged = {"source_dir": tmp_path / "dropped", "mtp": "cut", "dtype": "float32"}
    vp.save(vp.load(tmp_path / "dropped"), tmp_path / "staged", mtp_dir=golden.ckpt, **staged)
    again = Checkpoint(tmp_path / "staged")
    assert {key: again[key].tolist() for key in again} == {key: found[key].tolist() for key in found}
    assert vp.load(tmp_path / "staged").cfg == smaller.cfg
    fact = r'dropped: export.mtp="cut": has no module for multi-token .* use mtp="drop"'
    refused(fact, vp.save, vp.load(tmp_path / "dropped"), tmp_path / "none", **staged)


LAYER = "mtp.layers.0."


def without(name):
    return lambda held: {key: array for key, array in held.items() if not key.startswith(name)}


def shaped(name, shape, value=0.5):
    return lambda held: {**held, name: np.full(shape, value, np.float32)}


def layers_called(*names):
    """The head's layer under other numbers."""
    return lambda held: without(LAYER)(held) | {
        key.replace(LAYER, f"mtp.layers.{name}."): array
        for key, array in held.items() if key.startswith(LAYER) for name in names
    }  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("mtp."), r"has no module for multi-token prediction .mtp\.."),
        (without(LAYER), "is missing .11 in all; config.json says mtp_num_hidden_layers 1."),
        (without(LAYER + "self_attn.o_proj"), "the tensor mtp.layers.0.self_attn.o_proj.weight is missing .1 in all"),
        (without("mtp.fc"), "the tensor mtp.fc.weight is missing"),
        (shaped("mtp.other", (2,)), "the tensor mtp.other is unknown"),
        (layers_called("x"), r"layers.0.\S+ is missing .22 in all; config.json says"),
        (layers_called("99"), r"layers.0.\S+ is missing .22 in all; config.json says"),
        (layers_called(*range(300)), r"layers.1.\S+ is unknown .3289 in all; config.json says"),
        (shaped("mtp.fc.weight", (28, 28)), r"mtp.fc.weight has shape \[28, 28\], expected \[28, 56\]"),
        (shaped(LAYER + "mlp.down_proj.weight", (28,)), r"down_proj.weight has shape \[28\], expected \[28, \d+\]"),
        (shaped(LAYER + "mlp.up_proj.weight", (39, 28)), r"_proj.weight has shape .*, expected"),
        (shaped(LAYER + "self_attn.k_proj.weight", (48, 28)), r"has shape .*, expected"),
        (shaped(LAYER + "mlp.down_proj.weight", (28, 40), np.nan), "down_proj.weight has 1120 NaN or infinite values"),
        (shaped("mtp.norm.weight", (28,), np.inf), "mtp.norm.weight, to be written as F32, has 28 NaN"),
    ],
)
def test_damaged_heads_for_several_tokens_are_refused(golden, tmp_path, damage, message):
    folder = tmp_path / "model"
    shutil.copytree(golden.ckpt, folder)
    edit_weights(folder, damage)
    smaller, plan = prune(golden.model, cut_layers(golden, "all"))
    options = {"source_dir": folder, "plan": plan, "dtype": "float32", "mtp": "cut"}
    refused(f"model(/model.safetensors)?: .*{message}", vp.save, smaller, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module", params=["qwen3_5", "lfm2_vl"])
def hybrid(request, golden, tmp_path_factory):
    """A model of several mixers, the prunable axes of its mixers by layer, and a hand cut of heads and neurons."""
    if request.param == "qwen3_5":
        axes = ["delta_groups", "delta_groups", "kv_heads", "delta_groups", "kv_heads"]
        kept = cut_layers(golden, "key_groups")
        return (
            golden.model,
            dict(enumerate(axes)),
            [KeptLayer(k.index, {**k.kept, "mlp": tuple(range(0, 40, 2))}) for k in kept],
        )
    model = vp.load(make_folder(tmp_path_factory.mktemp("lfm2"), LFM2_VL))
    heads = {"kv_heads": (0, 2), "q_heads": (0, 1, 4, 5)}
    return (
        model,
        {1: "kv_heads", 4: "kv_heads"},
        [KeptLayer(i, {"mlp": tuple(range(36))} | (heads if i in (1, 4) else {})) for i in range(5)],
    )


@pytest.fixture(scope="module")
def batches():
    draw = np.random.default_rng(0)
    ids = draw.integers(8, 180, (4, 6, 40)).astype(np.int32)
    mask = (np.arange(40)[None, None] < draw.integers(30, 41, (4, 6))[..., None]).astype(np.int32)
    rows = zip(ids, mask, np.where(mask == 1, ids, -100), strict=True)
    return [dict(zip(("input_ids", "attention_mask", "labels"), row, strict=True)) for row in rows]


def test_scores_and_plans(hybrid, batches):
    """Scores of delta nets are their heads' contributions, and plans remove whole key groups."""
    model, axes, _ = hybrid
    for criterion in ("taylor", "activation"):
        scores = vp.score(model, batches, criterion=criterion)
        assert {layer: axis for _, layer, axis in scores.values if axis != "mlp"} == axes
    plan = vp.make_plan(scores, model.cfg, method="width", ratio=0.3)
    importance_figure(scores, plan)  # draws the units of each kind of layer
    sizes = [layer.sizes for layer in plan.layers]
    whole = [layer.sizes for layer in model.cfg.text.layers]
    assert all(size["delta_heads"] == 2 * size["delta_groups"] for size in sizes if "delta_groups" in size)
    assert any(sizes[layer][axis] < whole[layer][axis] for layer, axis in axes.items())
    scores = vp.score(model, batches, criterion="block_influence")
    assert len(vp.make_plan(scores, model.cfg, method="depth", ratio=0.2).layers) < 5


def test_layers_are_reconstructed(hybrid, batches):
    """The output projections of what has heads to prune, and the MLPs, of a model without heads and neurons."""
    model, axes, kept = hybrid
    pruned, plan = prune(model, kept)
    solved, report = vp.reconstruct(pruned, plan, model, batches)
    mixers = [line for line in report if line["module"] == "o_proj"]
    whole = [layer.sizes for layer in model.cfg.text.layers]
    assert [line["layer"] for line in mixers] == [
        i for i, axis in axes.items() if len(kept[i].kept[axis]) < whole[i][axis]
    ]
    assert sum(line["module"] == "down_proj" for line in report) == 5
    # of random weights
    assert sum(line["error_after"] < line["error_before"] for line in mixers) >= len(mixers) - 1
    assert all(line["error_after"] <= line["error_before"] for line in report)
    real = batches[0]["attention_mask"] == 1
    tokens = {name: batches[0][name] for name in ("input_ids", "attention_mask")}
    whole, cut, mended = (np.asarray(vp.forward(one, **tokens)[0])[real] for one in (model, pruned, solved))
    assert np.abs(mended - whole).mean() < np.abs(cut - whole).mean()
