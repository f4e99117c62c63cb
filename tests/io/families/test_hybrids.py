"""Hybrid decoders, beside what all families show: delta nets, their states, scores and repair, and MTP heads."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import CLOSE, Golden, cut_layers
from hf_cases import LFM2_VL, assert_same_tensors, edit_weights, make_folder, prune
from refusal import refused

import vlmprune_jax as vp
from vlmprune_jax.core.models.generate import SharedPrefix, generate
from vlmprune_jax.core.models.recurrent import CHUNK, chunked, recurrent
from vlmprune_jax.core.prune import KeptLayer
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.io.checkpoints.read import read_config
from vlmprune_jax.io.exports.folder import mtp_tensors
from vlmprune_jax.run.report.figures import importance_figure


@pytest.fixture(scope="module")
def golden(goldens):
    return Golden(goldens / "families/qwen3_5")


def test_states_behind_a_shared_prefix(golden):
    """Padding between the prefix and its rows reaches neither the convolution nor the matrices."""
    model, draw = golden.model, np.random.default_rng(0)
    prefix, rest = draw.integers(0, 300, (2, 9)), draw.integers(0, 300, (3, 7))
    prefix_mask, mask, rows = np.ones_like(prefix), np.ones_like(rest), np.array([0, 1, 1])
    prefix_mask[1, :3], mask[0, :3] = 0, 0  # 13 real tokens in each row
    shared = SharedPrefix(prefix, prefix_mask, rows)
    tokens = generate(model, rest, attention_mask=mask, prefix=shared, max_new_tokens=5, eos_token_ids=())
    whole = np.concatenate([prefix[rows], rest], axis=1)[np.concatenate([prefix_mask[rows], mask], axis=1) == 1]
    alone = generate(model, whole.reshape(3, 13), max_new_tokens=5, eos_token_ids=())
    np.testing.assert_array_equal(tokens, alone)


def test_chunks_equal_single_steps():
    draw = np.random.default_rng(0)
    q, k = (draw.standard_normal((2, 70, 3, 8)).astype(np.float32) for _ in range(2))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v, beta = draw.standard_normal((2, 70, 6, 5)).astype(np.float32), draw.random((2, 70, 6), np.float32)
    g = -20 * draw.random((2, 70, 6), np.float32) ** 4  # decays to almost nothing, and almost none
    arrays = [jnp.asarray(x) for x in (q, k, v, beta, g)]
    first = state = jnp.zeros((2, 6, 8, 5))
    steps, states = [], []
    for at in range(70):
        step, state = recurrent(*(x[:, at : at + 1] for x in arrays), state)
        steps.append(step[:, 0])
        states.append(state)
    for length in (1, 63, 64, 70):
        out, last = jax.jit(chunked)(*(x[:, :length] for x in arrays), first)
        np.testing.assert_allclose(out, np.stack(steps[:length], axis=1), atol=2e-5)
        np.testing.assert_allclose(last, states[length - 1], atol=2e-5)
    gradient = jax.jit(jax.grad(lambda g: jnp.sum(chunked(*arrays[:4], g, first)[0] ** 2)))(arrays[4])
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


def test_biases_of_attention_are_cut_with_its_heads(golden, torch_outputs, tmp_path):
    config = json.loads((golden.ckpt / "config.json").read_text())
    config["text_config"] |= {"attention_bias": True, "mtp_num_hidden_layers": 0}
    folder = make_folder(tmp_path / "model", config)
    smaller, plan = prune(vp.load(folder), cut_layers(golden, "attention"))
    vp.save(smaller, tmp_path / "out", source_dir=folder, plan=plan, dtype="float32")
    row = {"input_ids": np.arange(10, 22)[None]}
    logits = torch_outputs(tmp_path / "out", row, class_name="AutoModelForImageTextToText", version="5")["logits"]
    np.testing.assert_allclose(vp.forward(vp.load(tmp_path / "out"), **row)[0], logits, **CLOSE)


LAYER = "mtp.layers.0."


def test_the_head_for_several_tokens_is_cut_alike(golden, tmp_path):
    """Largest columns of its projections to the stream stay, of as many groups and neurons as the decoder has."""
    smaller, plan = prune(golden.model, cut_layers(golden, "all"))
    options = {"source_dir": golden.ckpt, "plan": plan, "dtype": "float32"}
    for name, mtp, count in (("dropped", "drop", 0), ("cut", "cut", 1)):
        vp.save(smaller, tmp_path / name, mtp=mtp, **options)
        text = json.loads((tmp_path / name / "config.json").read_text())["text_config"]
        assert text["mtp_num_hidden_layers"] == count
        assert vp.load(tmp_path / name).cfg == smaller.cfg
    whole, found = Checkpoint(golden.ckpt), Checkpoint(tmp_path / "cut")
    heads = [
        {key for key in file if key.startswith("mtp.")} for file in (whole, found, Checkpoint(tmp_path / "dropped"))
    ]
    assert heads[1] == heads[0]
    assert not heads[2]
    out = whole[LAYER + "self_attn.o_proj.weight"].reshape(28, 2, 2, 16)  # two groups of two heads
    group = int(np.argmax(np.square(out).sum(axis=(0, 2, 3))))
    assert smaller.cfg.text.attentions[0].kv_heads == 1
    down = whole[LAYER + "mlp.down_proj.weight"]
    units = np.sort(np.argsort(-np.square(down).sum(axis=0))[: smaller.cfg.text.channel.mlp])
    expected = {
        "self_attn.o_proj": out[:, group].reshape(28, 32),
        "self_attn.q_proj": whole[LAYER + "self_attn.q_proj.weight"].reshape(2, 64, 28)[group],  # with their gates
        "self_attn.k_proj": whole[LAYER + "self_attn.k_proj.weight"].reshape(2, 16, 28)[group],
        "mlp.down_proj": down[:, units],
        "mlp.up_proj": whole[LAYER + "mlp.up_proj.weight"][units],
    }
    for name, array in expected.items():
        np.testing.assert_array_equal(found[f"{LAYER}{name}.weight"], array, err_msg=name)
    np.testing.assert_array_equal(found["mtp.fc.weight"], whole["mtp.fc.weight"])
    # a stage's folder has no head: it comes from the unpruned folder
    staged = {"source_dir": tmp_path / "dropped", "mtp": "cut", "dtype": "float32"}
    vp.save(vp.load(tmp_path / "dropped"), tmp_path / "staged", mtp_dir=golden.ckpt, **staged)
    assert_same_tensors(tmp_path / "cut", tmp_path / "staged")
    assert vp.load(tmp_path / "staged").cfg == smaller.cfg
    fact = r'dropped: export.mtp="cut": has no module for multi-token .* use mtp="drop"'
    refused(fact, vp.save, vp.load(tmp_path / "dropped"), tmp_path / "none", **staged)
    last = golden.model.cfg.with_layers(golden.model.cfg.text.layers[:1])
    mixture = golden.folder.with_name("qwen3_5_moe") / "ckpt"
    for file, cfg, problem in (
        (whole, last, "the decoder has no layer with full attention"),
        (Checkpoint(mixture), read_config(mixture)[1], "MTP layers with experts"),
    ):
        refused(f'export\\.mtp="cut": {problem}.* use mtp="drop"', mtp_tensors, file, cfg, "source")


def without(name):
    return lambda held: {key: array for key, array in held.items() if not key.startswith(name)}


def shaped(name, shape, value=0.5):
    return lambda held: {**held, name: np.full(shape, value, np.float32)}


def of_300_layers(held):
    layer = {key: array for key, array in held.items() if key.startswith(LAYER)}
    return held | {key.replace(LAYER, f"mtp.layers.{i}."): array for key, array in layer.items() for i in range(300)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without(LAYER), "is missing .11 in all; config.json says mtp_num_hidden_layers 1."),
        (shaped("mtp.other", (2,)), "the tensor mtp.other is unknown"),
        (of_300_layers, r"layers.1.\S+ is unknown .3289 in all; config.json says"),
        (shaped("mtp.fc.weight", (28, 28)), r"mtp.fc.weight has shape \[28, 28\], expected \[28, 56\]"),
        (shaped(LAYER + "mlp.down_proj.weight", (28,)), r"down_proj.weight has shape \[28\], expected \[28, \d+\]"),
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
        kept = [{**layer.kept, "mlp": tuple(range(0, 40, 2))} for layer in cut_layers(golden, "key_groups")]
        return golden.model, dict(enumerate(axes)), [KeptLayer(i, units) for i, units in enumerate(kept)]
    model, axes = vp.load(make_folder(tmp_path_factory.mktemp("lfm2"), LFM2_VL)), {1: "kv_heads", 4: "kv_heads"}
    heads = {"kv_heads": (0, 2), "q_heads": (0, 1, 4, 5)}
    return model, axes, [KeptLayer(i, {"mlp": tuple(range(36))} | (heads if i in axes else {})) for i in range(5)]


@pytest.fixture(scope="module")
def batches():
    ids = np.random.default_rng(0).integers(8, 180, (4, 6, 40)).astype(np.int32)
    mask = (np.arange(40) < np.arange(30, 36)[:, None]).astype(np.int32)
    return [{"input_ids": x, "attention_mask": mask, "labels": np.where(mask == 1, x, -100)} for x in ids]


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
    scores = vp.score(model, criterion="random")
    assert len(vp.make_plan(scores, model.cfg, method="depth", ratio=0.2).layers) < 5


def test_layers_are_reconstructed(hybrid, batches):
    """The output projections of what has heads to prune, and the MLPs, of a model without heads and neurons."""
    model, axes, kept = hybrid
    pruned, plan = prune(model, kept)
    solved, report = vp.reconstruct(pruned, plan, model, batches)
    mixers = [line for line in report if line["module"] == "o_proj"]
    sizes = [layer.sizes for layer in model.cfg.text.layers]
    assert [line["layer"] for line in mixers] == [i for i, a in axes.items() if len(kept[i].kept[a]) < sizes[i][a]]
    assert sum(line["module"] == "down_proj" for line in report) == 5
    # of random weights
    assert sum(line["error_after"] < line["error_before"] for line in mixers) >= len(mixers) - 1
    assert all(line["error_after"] <= line["error_before"] for line in report)
    ids = batches[0]["input_ids"][:, :30]
    whole, cut, mended = (np.asarray(vp.forward(one, ids)[0]) for one in (model, pruned, solved))
    assert np.abs(mended - whole).mean() < np.abs(cut - whole).mean()
