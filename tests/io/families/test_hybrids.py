"""Hybrid decoders against stock transformers: delta nets, gated attention, states, cuts of both and their exports."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import decoder_values
from golden_cases import CLOSE, Golden, cut_layers
from hf_cases import edit_config, edit_weights, make_folder, prune

import vlmprune_jax as vp
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.models.generate import SharedPrefix, generate
from vlmprune_jax.core.models.params import flatten
from vlmprune_jax.core.models.recurrent import CHUNK, chunked, recurrent
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.prune import KeptLayer
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.run.report.figures import importance_figure

HYBRIDS = ("qwen3_5", "qwen3_5_r1", "qwen3_5_r3")


@pytest.fixture(scope="module")
def models(goldens):
    return {family: Golden(goldens / "families" / family) for family in HYBRIDS}


@pytest.mark.parametrize("family", HYBRIDS)
def test_forward(models, family):
    golden = models[family]
    cases = [case for case in ("single", "two", "text", "tiny") if f"{case}_logits" in golden.arrays]
    for case, logits in golden.logits(cases).items():
        expected = golden.arrays[f"{case}_logits"]
        np.testing.assert_allclose(logits[-len(expected) :], expected, **CLOSE, err_msg=case)
    for name in [name for name in golden.arrays if name.startswith("length") and name.endswith("_ids")]:
        expected = golden.arrays[name.replace("input_ids", "last_logits")]
        logits, _ = vp.forward(golden.model, golden.arrays[name][None])
        np.testing.assert_allclose(logits[0, -len(expected) :], expected, **CLOSE, err_msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_images_in_a_batch(models, side):
    golden = models["qwen3_5"]
    batch = golden.batch(side)
    logits, _ = vp.forward(golden.model, **{name: array for name, array in batch.items() if name != "labels"})
    for row, (mask, expected) in enumerate(
        zip(batch["attention_mask"], golden.arrays[f"batch_{side}_last_logits"], strict=True)
    ):
        np.testing.assert_allclose(logits[row][mask == 1][-2:], expected, **CLOSE)
    scores = vp.score(golden.model, [batch], criterion="block_influence")
    np.testing.assert_allclose(scores.layers, golden.arrays[f"batch_{side}_block_influence"], rtol=1e-4)


@pytest.mark.parametrize("case", ["two", "text"])
def test_greedy_tokens(models, case):
    golden = models["qwen3_5"]
    inputs, labels = golden.inputs(case), golden.arrays[f"{case}_labels"]
    prompt = int(np.argmax(labels != -100))
    shown = {name: array for name, array in inputs.items() if name in ("pixel_values", "image_grid_thw")}
    ids = inputs["input_ids"][:, :prompt]
    padded = np.pad(ids, ((0, 0), (3, 0)))  # real tokens first reach the state
    mask = np.pad(np.ones_like(ids), ((0, 0), (3, 0)))
    tokens = generate(golden.model, padded, attention_mask=mask, **shown, max_new_tokens=8, eos_token_ids=())
    np.testing.assert_array_equal(tokens[0], golden.arrays[f"{case}_generated"])


def test_states_behind_a_shared_prefix(models):
    """Padding between the prefix and its rows reaches neither the convolution nor the matrices."""
    model, draw = models["qwen3_5"].model, np.random.default_rng(0)
    prefix, rest = draw.integers(0, 300, (2, 9)), draw.integers(0, 300, (3, 7))
    prefix_mask, mask, rows = np.ones_like(prefix), np.ones_like(rest), np.array([0, 1, 1])
    prefix_mask[1, :3], mask[0, :5] = 0, 0
    shared = SharedPrefix(prefix, prefix_mask, rows)
    tokens = generate(model, rest, attention_mask=mask, prefix=shared, max_new_tokens=5, eos_token_ids=())
    for row, at in enumerate(rows):
        whole = np.concatenate([prefix[at][prefix_mask[at] == 1], rest[row][mask[row] == 1]])
        alone = generate(model, whole[None], max_new_tokens=5, eos_token_ids=())
        np.testing.assert_array_equal(tokens[row], alone[0])


def test_mixers_equal_stock(models):
    """Input and output of the first delta net and the first attention, and the chunked rule against one by one."""
    golden = models["qwen3_5"]
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


def test_gradients_are_those_of_autograd(models, torch_outputs, tmp_path):
    """The gradient of the loss of two and a bit chunks in every weight of the decoder against stock transformers."""
    golden, model = models["qwen3_5"], models["qwen3_5"].model
    ids = golden.arrays["length130_input_ids"][None]
    arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    auto = {"class_name": "AutoModelForImageTextToText", "version": "5", "want": ("gradients",)}
    theirs = torch_outputs(golden.ckpt, {**arrays, "labels": ids}, **auto)
    shutil.copytree(golden.ckpt, tmp_path / "model")
    edit_weights(tmp_path / "model", lambda held: {key: theirs.get(key, np.zeros_like(x)) for key, x in held.items()})
    expected = flatten(vp.load(tmp_path / "model").params)

    def loss(params):
        logits = jax.nn.log_softmax(vp.forward(Model(params, model.cfg), **arrays)[0][:, :-1])
        return -jnp.mean(jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1))

    for path, gradient in flatten(jax.grad(loss)(model.params)).items():
        if path.startswith("text/"):
            scale = float(np.abs(expected[path]).max())
            assert scale > 1e-5, path
            np.testing.assert_allclose(gradient, expected[path], atol=2e-4 * scale, rtol=1e-4, err_msg=path)


def test_packed_rows_are_refused(models):
    ids = models["qwen3_5"].arrays["length130_input_ids"][None]
    with pytest.raises(UserError, match="attention_mask has values up to 2, expected 0 and 1: give every sequence"):
        vp.forward(models["qwen3_5"].model, ids, attention_mask=1 + (np.arange(130)[None] > 60))


@pytest.mark.parametrize("family", HYBRIDS)
def test_stock_transformers_loads_cut_exports(models, family, torch_outputs, tmp_path):
    golden = models[family]
    smaller, plan = prune(golden.model, cut_layers(golden, "all"))
    vp.save(smaller, tmp_path / "out", source_dir=golden.ckpt, plan=plan, dtype="float32")
    config = json.loads((tmp_path / "out/config.json").read_text())["text_config"]
    assert len(config["layer_types"]) == config["num_hidden_layers"] == len(smaller.cfg.text.layers)
    assert config.get("mtp_num_hidden_layers", 0) == 0
    for case in ("text", "single"):
        inputs = {name: array for name, array in golden.inputs(case).items() if array is not None}
        options = {"class_name": "AutoModelForImageTextToText", "version": "5"}
        logits = torch_outputs(tmp_path / "out", inputs, **options)["logits"]
        expected = golden.arrays[f"{case}_logits_all"]
        np.testing.assert_allclose(logits[0, -len(expected) :], expected, **CLOSE, err_msg=case)
    again = vp.load(tmp_path / "out")
    assert again.cfg == smaller.cfg


def test_biases_of_attention_are_cut_with_its_heads(models, torch_outputs, tmp_path):
    config = json.loads((models["qwen3_5"].ckpt / "config.json").read_text())
    config["text_config"] |= {"attention_bias": True, "mtp_num_hidden_layers": 0}
    folder = make_folder(tmp_path / "model", config)
    smaller, plan = prune(vp.load(folder), cut_layers(models["qwen3_5"], "attention"))
    vp.save(smaller, tmp_path / "out", source_dir=folder, plan=plan, dtype="float32")
    row = {"input_ids": np.arange(10, 22)[None]}
    logits = torch_outputs(tmp_path / "out", row, class_name="AutoModelForImageTextToText", version="5")["logits"]
    np.testing.assert_allclose(vp.forward(vp.load(tmp_path / "out"), **row)[0], logits, **CLOSE)


@pytest.mark.parametrize("cut", ["attention", "all"])
def test_the_head_for_several_tokens_is_cut_alike(models, tmp_path, cut):
    """Largest columns of its projections to the stream stay, of as many groups and neurons as the decoder has."""
    golden = models["qwen3_5"]
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
    with pytest.raises(UserError, match=r'dropped: export.mtp="cut": has no module for multi-token .* use mtp="drop"'):
        vp.save(vp.load(tmp_path / "dropped"), tmp_path / "none", **staged)


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
        (
            shaped("mtp.norm.weight", (28,), np.inf),
            "mtp.norm.weight, to be written as F32, has 28 NaN",
        ),
    ],
)
def test_damaged_heads_for_several_tokens_are_refused(models, tmp_path, damage, message):
    golden, folder = models["qwen3_5"], tmp_path / "model"
    shutil.copytree(golden.ckpt, folder)
    edit_weights(folder, damage)
    smaller, plan = prune(golden.model, cut_layers(golden, "all"))
    with pytest.raises(UserError, match=f"model(/model.safetensors)?: .*{message}"):
        vp.save(smaller, tmp_path / "out", source_dir=folder, plan=plan, dtype="float32", mtp="cut")
    assert not (tmp_path / "out").exists()


def test_a_head_that_scores_least_leaves_as_if_it_wrote_nothing(models):
    """Scores of delta nets are their heads' contributions, and plans remove whole key groups."""
    golden = models["qwen3_5"]
    batch = {name: golden.arrays[f"text_{name}"][None] for name in ("input_ids", "labels")}
    batch["attention_mask"] = np.ones_like(batch["input_ids"])
    for criterion in ("taylor", "activation"):
        scores = vp.score(golden.model, [batch], criterion=criterion)
        axes = [axis for _, _, axis in scores.values if axis != "mlp"]
        assert axes == ["delta_groups", "delta_groups", "kv_heads", "delta_groups", "kv_heads"]
    plan = vp.make_plan(scores, golden.model.cfg, method="width", ratio=0.3)
    importance_figure(scores, plan)  # draws the units of each kind of layer
    sizes = [layer.sizes for layer in plan.layers]
    assert all(size["delta_heads"] == 2 * size["delta_groups"] for size in sizes if "delta_groups" in size)
    assert min(size.get("delta_groups", 3) for size in sizes) < 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"] * 4}, "num_hidden_layers is 5 but layer_types lists 4 layers"),
        ({"layer_types": ["mamba"] * 5}, r"layer_types \['mamba'\] are not supported"),
        ({"layer_types": ["linear_attention"] * 5}, "layer_types has no full_attention"),
        ({"hidden_act": "gelu"}, r"hidden_act 'gelu' is not supported \(delta nets: silu\)"),
        ({"linear_num_value_heads": 7}, "linear_attn: 7 delta-net heads are not divisible by 3 delta-net groups"),
    ],
)
def test_wrong_configs_are_refused(models, tmp_path, changes, message):
    shutil.copytree(models["qwen3_5"].ckpt, tmp_path / "model")
    text = json.loads((tmp_path / "model/config.json").read_text())["text_config"]
    edit_config(tmp_path / "model", text_config={**text, **changes})
    with pytest.raises(UserError, match=message):
        vp.load(tmp_path / "model")


def test_layers_are_reconstructed(models):
    """The output projections of delta nets and attention, and the MLPs, of a model without key groups and neurons."""
    model, draw = models["qwen3_5"].model, np.random.default_rng(0)
    ids = draw.integers(0, 300, (8, 6, 40)).astype(np.int32)
    mask = (np.arange(40)[None, None] < draw.integers(30, 41, (8, 6))[..., None]).astype(np.int32)
    names = ("input_ids", "attention_mask", "labels")
    batches = [
        dict(zip(names, (row, real, np.where(real == 1, row, -100)), strict=True))
        for row, real in zip(ids, mask, strict=True)
    ]
    kept = cut_layers(models["qwen3_5"], "key_groups")
    pruned, plan = prune(model, [KeptLayer(k.index, {**k.kept, "mlp": tuple(range(0, 40, 2))}) for k in kept])
    solved, report = vp.reconstruct(pruned, plan, model, batches)
    of_delta_nets = [line for line in report if line["module"] == "o_proj" and line["layer"] in (0, 1, 3)]
    assert len(of_delta_nets) == 3
    assert sum(line["error_after"] < line["error_before"] for line in of_delta_nets) >= 2  # of random weights
    assert all(line["error_after"] <= line["error_before"] for line in report)
    tokens = {"input_ids": ids[0], "attention_mask": mask[0]}
    whole, cut, mended = (np.asarray(vp.forward(one, **tokens)[0]) for one in (model, pruned, solved))
    assert np.abs(mended - whole)[mask[0] == 1].mean() < np.abs(cut - whole)[mask[0] == 1].mean()
