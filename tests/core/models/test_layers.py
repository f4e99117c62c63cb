"""Layers and blocks: dropout decisions, experts, sums over the vocabulary, rounded factors, every place of norms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import prune_cases
import pytest
from block_cases import blocks_of, decoder_values
from decoder_cases import PHI
from recover_cases import Stream, config, model
from refusal import refused
from stack_cases import decoder_layer, with_facts

from vlmprune_jax.core.mesh.mesh import make_mesh, use_mesh
from vlmprune_jax.core.models import channels
from vlmprune_jax.core.models.context import VALUES, _counters, bernoulli
from vlmprune_jax.core.models.layers import fake_quant_product, rope_tables
from vlmprune_jax.core.models.params import flatten, init_params, unstack_layers
from vlmprune_jax.core.models.vlm import Model, encode, forward, stack_module, to_nnx
from vlmprune_jax.core.models.vocabulary import Head, chunk_sums, cross_entropy, cross_entropy_sum
from vlmprune_jax.core.recovery.config import LossConfig, RecoverConfig
from vlmprune_jax.core.recovery.loop import recover
from vlmprune_jax.core.sections import FakeQuant
from vlmprune_jax.io.checkpoints.disk.compressed_tensors import CompressedTensors
from vlmprune_jax.io.exports import gptq  # noqa: F401 - which declares the integer formats
from vlmprune_jax.io.families import PHI as PHI_FAMILY


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (4, 32, 96)])
@pytest.mark.parametrize("probability", [0.0, 0.05, 0.5, 0.95])
def test_decisions_are_those_of_jax_random(shape, probability):
    key = jax.random.fold_in(jax.random.key(3), 4)
    expected = jax.random.bernoulli(key, probability, shape)
    np.testing.assert_array_equal(bernoulli(key, probability, shape), expected)
    assert probability == 0 or shape == (1, 1, 1) or 0 < expected.mean() < 1


def test_numbers_go_beyond_32_bits():
    """The last two elements of three rows of 2^32, which no memory has to hold."""
    high, low = jax.jit(lambda: [x[:, -1, -2:] for x in _counters((3, 2**17, 2**15))])()
    np.testing.assert_array_equal(high, [[0, 0], [1, 1], [2, 2]])
    np.testing.assert_array_equal(low, [[2**32 - 2, 2**32 - 1]] * 3)
    high, low = jax.jit(lambda: [x[:, -1, -1] for x in _counters((3, 2**16 + 1, 2**15))])()  # rows end in between
    last = [(row + 1) * (2**16 + 1) * 2**15 - 1 for row in range(3)]
    assert [int(up) << 32 | int(down) for up, down in zip(high, low, strict=True)] == last


def all_experts(x, experts, gates, weights):
    gate, up, down = (jnp.einsum("th,eih->tei", x, w) if i < 2 else w for i, w in enumerate(weights))
    outputs = jnp.einsum("tei,ehi->teh", jax.nn.silu(gate) * up, down)
    return jnp.einsum("tkh,tk->th", jnp.take_along_axis(outputs, experts[..., None], 1), gates)


@pytest.mark.parametrize(("tokens", "k", "n_experts"), [(1, 2, 8), (7, 3, 5), (300, 2, 4), (40, 2, 128)])
def test_values_and_gradients(tokens, k, n_experts):
    draw = np.random.default_rng(0)
    shapes = {"x": (tokens, 6), "gates": (tokens, k), "gate": (5, 6), "up": (5, 6), "down": (6, 5)}
    of_experts = {name: (n_experts, *shape) for name, shape in shapes.items() if name in ("gate", "up", "down")}
    x, gates, *weights = (jnp.asarray(draw.standard_normal(s), jnp.float32) for s in (shapes | of_experts).values())
    chosen = jnp.asarray([draw.choice(n_experts, k, replace=False) for _ in range(tokens)], jnp.int32)
    direction = jnp.asarray(draw.standard_normal(x.shape), jnp.float32)
    ways = {
        "scan": lambda x, gates, weights: channels._gated_sum("silu", x, chosen, gates, weights)[0],
        "ragged": lambda x, gates, weights: channels._weighted(
            gates, channels._ragged("silu", x, chosen, weights), x.dtype
        ),
    }
    arguments = x, gates, tuple(weights)

    def with_gradients(function):
        value = lambda *args: (jnp.sum(function(*args) * direction), function(*args))  # noqa: E731
        return jax.jit(jax.grad(value, argnums=(0, 1, 2), has_aux=True))(*arguments)

    expected = with_gradients(lambda x, gates, weights: all_experts(x, chosen, gates, weights))
    for name, function in ways.items():
        for actual, wanted in zip(*map(jax.tree.leaves, (with_gradients(function), expected)), strict=True):
            np.testing.assert_allclose(actual, wanted, atol=2e-4, rtol=1e-4, err_msg=name)
    blocks = channels.blocks_of(chosen, n_experts)
    assert blocks.rows.size <= tokens * k + min(n_experts, tokens * k) * blocks.rows.shape[1]


def test_devices_share_the_neurons_of_experts():
    """Rows over two devices, neurons of every expert over four: the sums and norms of one device."""
    draw = np.random.default_rng(0)
    shapes = (4, 3, 6), (4, 3, 2), (5, 8, 6), (5, 8, 6), (5, 6, 8)
    x, gates, *weights = (jnp.asarray(draw.standard_normal(shape), jnp.float32) for shape in shapes)
    arguments = x, jnp.asarray(draw.integers(0, 5, (4, 3, 2)), jnp.int32), gates, tuple(weights)
    expected = channels.run_experts(*arguments, "silu")
    with use_mesh(make_mesh(2, 1, 4)):
        found = jax.jit(channels.run_experts, static_argnums=4)(*arguments, "silu")
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


ROWS, SEQ, EMBED, VOCAB = 8, 37, 6, 50


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    head = Head(*(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((VOCAB, EMBED), (VOCAB,))))
    return head, jnp.asarray(rng.standard_normal((ROWS, SEQ, EMBED)), jnp.float32)


def labels_of(share: float) -> jax.Array:
    rng = np.random.default_rng(1)
    labels = rng.integers(VOCAB, size=(ROWS, SEQ))
    return jnp.asarray(np.where(rng.random((ROWS, SEQ)) < share, labels, -100))


def plain(head, states, labels):
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    return jnp.sum(jnp.where(targets == -100, 0.0, cross_entropy(head(states), targets)))


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_the_sum_and_its_gradients_are_those_of_all_positions(arrays, share, mesh):
    labels = labels_of(share)
    total = lambda head, states: cross_entropy_sum(states, head, labels, chunk=4)  # noqa: E731
    chunked = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    value, gradients = jax.value_and_grad(plain, argnums=(0, 1))(*arrays, labels)
    if mesh is None:
        found = chunked(*arrays)
    else:
        with jax.set_mesh(make_mesh(*mesh)):
            found = chunked(*arrays)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, 1e-5, 1e-5), found, (value, gradients))


@pytest.mark.parametrize(("counted", "runs"), [([], 0), ([36], 1), ([0, 9, 20, 30], 1), (range(6), 2), (range(37), 8)])
def test_chunks_without_a_position_that_counts_are_left_out(arrays, counted, runs):
    """In one row; the others have none."""
    seen = []

    def body(head, states, counted, pieces, fixed):
        jax.debug.callback(lambda: seen.append(1))
        return {"sum": jnp.sum(jnp.where(counted, cross_entropy(head(states), pieces), 0.0))}

    mask = np.zeros((ROWS, SEQ), bool)
    mask[3, list(counted)] = True
    total = lambda *of: chunk_sums(body, 128, *of, jnp.asarray(mask), jnp.zeros((ROWS, SEQ), int), None)  # noqa: E731
    jax.block_until_ready(jax.jit(total)(*arrays))
    jax.effects_barrier()
    assert len(seen) == runs


def _exported(values, storage, dtype):
    """What is read back after the export: a matrix [out, in] through the integers of `storage`."""
    parts = storage.encode("text/layers/0/x", np.asarray(values).astype(dtype))
    codes = parts[""] if storage.activations else storage._unpack(parts["_packed"], values.shape[1])
    scale = parts["_scale"].astype(np.float32)
    return (codes.astype(np.float32).reshape(*scale.shape, -1) * scale[..., None]).astype(dtype).reshape(values.shape)


@pytest.mark.parametrize(
    "rounding", [FakeQuant(4, 32), FakeQuant(8), FakeQuant(8, 0, True)], ids=["w4a16", "w8a16", "w8a8"]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_weights_are_those_of_the_export(rounding, dtype):
    storage = CompressedTensors(rounding.bits, rounding.group, True, rounding.activations)
    weight = jax.random.normal(jax.random.key(0), (3, 4, 2, 32)).astype(dtype).at[1, 2].set(0)  # [out, out, in, in]
    x = jnp.eye(64, dtype=dtype).reshape(64, 2, 32)
    found = fake_quant_product(rounding)(x, weight, 2).reshape(64, 12).T
    expected = _exported(weight.reshape(12, 64), storage, np.dtype(dtype))
    if rounding.activations:  # a one is 127 or 128 steps of its scale: 1 / 127.5
        one = (np.float32(127) * np.float32(1 / 127.5).astype(dtype).astype(np.float32)).astype(dtype)
        expected = (expected.astype(np.float32) * one.astype(np.float32)).astype(dtype)
    np.testing.assert_array_equal(np.asarray(found), expected)
    assert np.abs(np.asarray(found, np.float32) - np.asarray(weight, np.float32).reshape(12, 64)).max() > 1e-3


def test_gradients_pass_the_rounding_and_rows_that_do_not_divide_stay():
    product, weight, x = (
        fake_quant_product(FakeQuant(4, 32)),
        jnp.linspace(-1, 1, 128).reshape(4, 32),
        jnp.ones((2, 32)),
    )
    by_x, by_weight = jax.grad(lambda x, w: product(x, w, 1).sum(), (0, 1))(x, weight)
    np.testing.assert_array_equal(by_weight, np.full((4, 32), 2.0))
    np.testing.assert_allclose(by_x[0], _exported(weight, CompressedTensors(4, 32), np.float32).sum(0), rtol=1e-6)
    odd = jnp.linspace(-1, 1, 4 * 31).reshape(4, 31)
    np.testing.assert_array_equal(product(jnp.eye(31), odd, 1), odd.T)


def _wide(**changes):
    """A decoder whose matrices have rows that groups of 32 divide."""
    cfg = config(vision=False, decoder="llama", **{name: False for name in ("qkv_bias", "out_bias", "mlp_bias")})
    shapes = (decoder_layer(4, 2, 64),) * 2
    text = with_facts(
        cfg.text.with_layers(shapes), hidden_size=32, head_dim=8, qkv_bias=False, out_bias=False, mlp_bias=False
    )
    return dataclasses.replace(cfg, text=text, **changes)


def test_a_model_trained_through_the_rounding_is_better_rounded(tmp_path):
    """Against one trained alike without it: the loss of both is measured with rounded weights."""
    cfg = _wide()
    start, one = model(cfg), next(iter(Stream(cfg)))
    settings = {"trainable": "decoder", "batch_size": 8, "learning_rate": 1e-2, "losses": LossConfig(ce=1.0)}

    def rounded_loss(of):
        batch = one.arrays
        quantized = Model(of.params, dataclasses.replace(cfg, fake_quant=FakeQuant(4, 32)))
        logits = forward(quantized, batch["input_ids"], attention_mask=batch["attention_mask"])[0][:, :-1]
        labels = np.asarray(batch["labels"])[:, 1:]
        scores = jax.nn.log_softmax(logits)
        picked = np.take_along_axis(np.asarray(scores), np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return -float(picked[labels >= 0].mean())

    plain, through = (
        recover(start, [one] * 60, RecoverConfig(**settings, quantize=quantize), num_steps=60)[0]
        for quantize in ("none", "w4a16")
    )
    assert through.cfg == cfg
    assert rounded_loss(through) < rounded_loss(plain)


# --- the block, against the same computation in jnp: every place of norms, parallel branches, scales ------------------


CASES = {
    "before": {},
    "after": {"norm_place": "after"},
    "sandwich": {"norm_place": "both", "norm_offset": 1.0, "qk_norm": True},
    "layer norms": {"norm_place": "both", "norm": "layer"},
    "parallel": {"parallel": True, "norm": "layer", "gated": False, "norm_place": "both"},
    "scaled": {"norm_place": "both", "layer_scale": True},
}

NAMES = tuple(name for name in VALUES if name != "routed")  # of layers with a dense MLP


def norm(cfg, params, name, x, kind=None):
    """The norm of these parameters, or x where the block has none of this name."""
    if f"{name}/weight" not in params:
        return x
    if (kind or cfg.block.norm) == "layer":
        x = x - x.mean(-1, keepdims=True)
    y = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + cfg.block.norm_eps)
    return y * (params[f"{name}/weight"] + cfg.block.norm_offset) + params.get(f"{name}/bias", 0.0)


def plain_block(cfg, params, x, cos, sin):
    """One block over full rows: float[batch, seq, embed] -> its values by name, "after" among them."""

    def project(name, x, sum_over=1):
        weight, bias = params[f"{name}/weight"], params[f"{name}/bias"]
        return jnp.tensordot(x, weight, [list(range(-sum_over, 0))] * 2) + bias

    def turned(x):
        first, second = jnp.split(x, 2, axis=-1)
        c, s = cos[:, :, None], sin[:, :, None]
        return jnp.concatenate([first * c - second * s, second * c + first * s], axis=-1)

    def follow(branch, index):
        added = norm(cfg, params, f"{('attention', 'mlp')[index]}_output_norm", branch)
        return added * params.get(f"layer_scale{index + 1}/weight", 1.0)

    found = {"self_attn": norm(cfg, params, "input_layernorm", x)}
    q, k, v = (project(f"self_attn/{name}_proj", found["self_attn"]) for name in "qkv")
    q, k = (turned(norm(cfg, params, f"self_attn/{name}_norm", x, "rms")) for name, x in (("q", q), ("k", k)))
    k, v = (jnp.repeat(one, q.shape[2] // k.shape[2], axis=2) for one in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * cfg.attention.head_dim**-0.5
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    found["o_proj"] = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    out, down = ("dense", "fc2") if cfg.block.parallel else ("o_proj", "down_proj")
    found["o_proj_out"] = project(f"self_attn/{out}", found["o_proj"], 2)
    found["middle"] = x + follow(found["o_proj_out"], 0)
    parallel = cfg.block.parallel
    found["mlp"] = found["self_attn"] if parallel else norm(cfg, params, "post_attention_layernorm", found["middle"])
    act = jax.nn.gelu
    if down == "fc2":
        found["down_proj"] = act(project("mlp/fc1", found["mlp"]))
    else:
        found["down_proj"] = act(project("mlp/gate_proj", found["mlp"])) * project("mlp/up_proj", found["mlp"])
    found["down_proj_out"] = project(f"mlp/{down}", found["down_proj"])
    return found | {"after": found["middle"] + follow(found["down_proj_out"], 1)}


@pytest.mark.parametrize("case", CASES)
def test_blocks_equal_the_same_in_jnp(case):
    one = prune_cases.model(prune_cases.config(prune_cases.EQUAL[:2], **CASES[case]))
    text, ids = one.cfg.text, prune_cases.batch(one.cfg)["input_ids"]
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    params = jax.tree.map(jnp.asarray, one.params)
    logits, aux = jax.jit(lambda params: encode(params, one.cfg, ids, states=(0, 1)))(params)
    blocks = decoder_values(params, one.cfg, jnp.asarray(ids), NAMES)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        after = []
        tables = rope_tables(text.rope, text.attention.rotated, positions)
        # Every block starts from its own input: rounding of the blocks before it is not compared again.
        modules = blocks_of(to_nnx(one.replace(params=params)).text).values()
        layers = unstack_layers(params, one.cfg)[0]
        for layer, module, block, state in zip(layers, modules, blocks, aux["states"], strict=True):
            expected = plain_block(text, layer, block.before, *tables)
            for name in NAMES:
                np.testing.assert_allclose(block.inputs[name], expected[name], atol=2e-5, err_msg=name)
            norms = {name: module.norm_after(name) for name in ("o_proj", "down_proj")}
            assert {norm is not None for norm in norms.values()} == {text.block.norm_place != "before"}
            for name, norm in norms.items():
                out = expected[f"{name}_out"]
                spread = out.var(-1) if text.block.norm == "layer" else (out**2).mean(-1)
                if norm is not None:
                    scale = norm.statistics(block.inputs[f"{name}_out"])[..., 1]
                    np.testing.assert_allclose(scale, (spread + text.block.norm_eps) ** -0.5, rtol=1e-4)
            after.append(plain_block(text, layer, state, *tables)["after"])
        final_norm = to_nnx(one.replace(params=params)).text.final_norm
        np.testing.assert_allclose(aux["states"][1], after[0], atol=5e-5)
        np.testing.assert_allclose(logits, final_norm(after[1]), atol=5e-5)


def test_an_unknown_kind_of_norm_is_refused():
    fact = "norm_place of a layer 'around' is not one of before, after, both"
    refused(fact, prune_cases.config, prune_cases.EQUAL, norm_place="around")


@pytest.mark.parametrize("case", ["before", "sandwich", "scaled"])
def test_follow_at_given_statistics_is_affine_with_the_gain_as_its_slope(case):
    one = prune_cases.model(prune_cases.config(prune_cases.EQUAL[:1], **CASES[case]))
    block = to_nnx(one).text.layers["0"]
    draw = np.random.default_rng(0)
    like, a, b = (jnp.asarray(draw.standard_normal((1, 2, 3, 20)), jnp.float32) for _ in range(3))
    norm_after, gain = block.norm_after("down_proj"), block.gain("down_proj")
    statistics = None if norm_after is None else norm_after.statistics(like)
    with jax.numpy_rank_promotion("allow"):
        slope = block.follow("down_proj", a, statistics) - block.follow("down_proj", b, statistics)
        rate = 1.0 if statistics is None else statistics[..., 1:]
        np.testing.assert_allclose(slope, (a - b) * rate * (1.0 if gain is None else gain), atol=1e-5)
        if norm_after is not None:
            np.testing.assert_allclose(norm_after(like, statistics), norm_after(like), atol=1e-5)


def test_blocks_name_what_writes_to_the_stream():
    decoder = stack_module("text", prune_cases.config(prune_cases.EQUAL).text).layers["0"]
    phi = stack_module("text", prune_cases.config(prune_cases.EQUAL, **CASES["parallel"]).text).layers["0"]
    vision = with_facts(prune_cases.config(prune_cases.EQUAL, vision=True).vision, layer_scale=True)
    tower = stack_module("vision", vision).layers["0"]
    blocks = (decoder, phi, tower)
    assert [(path, block.norm_after(name)) for block in blocks for name, path in block.writers.items()] == [
        ("self_attn/o_proj", None), ("mlp/down_proj", None),
        ("self_attn/dense", phi.attention_output_norm), ("mlp/fc2", phi.mlp_output_norm),
        ("self_attn/out_proj", None), ("mlp/fc2", None),
    ]  # fmt: skip
    paths = ("self_attn/k_proj", "self_attn/dense", "mlp/fc1", "mlp/fc2")
    assert [phi.reader_of(f"{path}/weight") for path in paths] == ["self_attn", "o_proj", "mlp", "down_proj"]


def test_new_norms_start_as_the_identity():
    cfg = prune_cases.config((decoder_layer(4, 2, 12),), norm_place="both", norm_offset=1.0)
    params = init_params(cfg, jax.random.key(0), jnp.float32)
    for name in ("input_layernorm", "post_attention_layernorm", "attention_output_norm", "mlp_output_norm"):
        assert not params["text"]["layers"]["0"][name]["weight"].any()
    assert not params["text"]["norm"]["weight"].any()


def test_initial_parameters_follow_their_names():
    flat = flatten(init_params(PHI_FAMILY.from_hf(PHI, None), jax.random.key(0), jnp.float32))
    assert (np.asarray(flat["text/final_layernorm/weight"]) == 1).all()
    assert not np.asarray(flat["text/lm_head/bias"]).any()
    # 6 heads of 12 into 48, one of 8 branches
    spread = float(np.std(flat["text/layers/0/self_attn/dense/weight"]))
    np.testing.assert_allclose(spread, 1 / np.sqrt(6 * 12 * 8), rtol=0.05)
