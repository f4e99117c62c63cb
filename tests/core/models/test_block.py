"""The block against the same computation in jnp: every place of norms, `1 + w`, parallel branches, scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import blocks_of, decoder_values
from decoder_cases import PHI
from prune_cases import EQUAL, batch, config, model
from refusal import refused
from stack_cases import decoder_layer, with_facts

from vlmprune_jax.core.models.context import VALUES
from vlmprune_jax.core.models.layers import rope_tables
from vlmprune_jax.core.models.params import flatten, init_params, unstack_layers
from vlmprune_jax.core.models.vlm import encode, stack_module, to_nnx
from vlmprune_jax.io.families import PHI as PHI_FAMILY

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
    one = model(config(EQUAL[:2], **CASES[case]))
    text, ids = one.cfg.text, batch(one.cfg)["input_ids"]
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
    refused("norm_place of a layer 'around' is not one of before, after, both", config, EQUAL, norm_place="around")


@pytest.mark.parametrize("case", ["before", "sandwich", "scaled"])
def test_follow_at_given_statistics_is_affine_with_the_gain_as_its_slope(case):
    one = model(config(EQUAL[:1], **CASES[case]))
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
    decoder = stack_module("text", config(EQUAL).text).layers["0"]
    phi = stack_module("text", config(EQUAL, **CASES["parallel"]).text).layers["0"]
    vision = with_facts(config(EQUAL, vision=True).vision, layer_scale=True)
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
    cfg = config((decoder_layer(4, 2, 12),), norm_place="both", norm_offset=1.0)
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
