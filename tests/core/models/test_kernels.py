"""Splash attention, interpreted on the CPU, equals XLA's; and TPUs get it, in the decoder and in the tower."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recover_cases as cases
from block_cases import packed
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from stack_cases import decoder_layer

from vlmprune_jax.core.mesh.mesh import make_mesh, use_mesh
from vlmprune_jax.core.mesh.rules import MESH_AXES
from vlmprune_jax.core.models import attention, kernels
from vlmprune_jax.core.models.generate import decode, prefill
from vlmprune_jax.core.models.kernels import attention_mask, splash_attention, windowed, xla_attention
from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.core.models.params import param_shapes, unflatten
from vlmprune_jax.core.models.vlm import Model, apply

SEQ = 200


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """200 tokens in two blocks of 128, so that blocks are skipped, summed over and padded."""
    monkeypatch.setattr(kernels, "_LARGEST_BLOCK", 128)


def _valid(*lengths: int, left: bool = False) -> np.ndarray:
    """bool[batch, SEQ], padding on the right or the left."""
    slots = np.arange(SEQ)[None]
    lengths_ = np.asarray(lengths)[:, None]
    return slots >= SEQ - lengths_ if left else slots < lengths_


@pytest.mark.parametrize(
    ("head", "heads", "valid", "causal", "window"),
    [
        pytest.param(64, (4, 2), _valid(SEQ, 70), True, 0, marks=pytest.mark.slow),
        pytest.param(80, (2, 2), _valid(150, 131, left=True), True, 0, marks=pytest.mark.slow),
        (96, (3, 1), _valid(190, 1), True, 37),
        (128, (2, 1), _valid(SEQ, 140, left=True), True, 150),
        pytest.param(80, (2, 2), None, False, 0, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_splash_equals_xla(head, heads, valid, causal, window):
    """Forward 1e-5, gradient 1e-4 (DESIGN §6), at every query that may look at a key.

    Padding queries on the right are such queries, but a window of slots and one of real keys differ there.
    """
    rng = np.random.default_rng(head)
    q, k, v, out = (
        jnp.asarray(rng.standard_normal((2, SEQ, n, head)), jnp.float32) for n in (*heads, heads[1], heads[0])
    )
    mask = None if valid is None else windowed(attention_mask(jnp.asarray(valid), SEQ, 0), window)[:, None]
    seen = np.ones((2, SEQ), bool) if mask is None else np.asarray(mask).any(axis=(1, 3))
    if window:
        seen = seen & valid
    out = out * seen[..., None, None].astype(np.float32)
    options = {"valid": valid, "causal": causal, "window": window, "interpret": True}

    @jax.jit
    def both(q, k, v):
        expected, pull = jax.vjp(functools.partial(xla_attention, mask=mask), q, k, v)
        found, own_pull = jax.vjp(functools.partial(splash_attention, **options), q, k, v)
        return expected, found, pull(out), own_pull(out)

    expected, found, gradients, own = both(q, k, v)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(np.asarray(found)[seen], np.asarray(expected)[seen], atol=1e-5, rtol=0)
    for ours, theirs in zip(own, gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def test_splash_behind_a_prefix_equals_xla():
    """Queries of the last 60 of 200 slots see the prefix before them; its padding and the rows' own stay hidden."""
    rng, queries = np.random.default_rng(9), 60
    q, k, v = (
        jnp.asarray(rng.standard_normal((2, n, h, 32)), jnp.float32) for n, h in ((queries, 4), (SEQ, 2), (SEQ, 2))
    )
    valid = np.ones((2, SEQ), bool)
    valid[0, :30] = valid[0, 140:150] = False
    mask = attention_mask(jnp.asarray(valid), queries, SEQ - queries)[:, None]
    found = splash_attention(q, k, v, jnp.asarray(valid), causal=True, interpret=True)
    np.testing.assert_allclose(found, xla_attention(q, k, v, mask), atol=1e-5, rtol=0)


def _logits(params, cfg, batch):
    """Logits at real tokens; 0 elsewhere."""
    logits, _ = apply(
        params, cfg, batch["input_ids"], media={"vision": packed(batch["pixel_values"])}, attention_mask=batch["mask"]
    )
    return logits * batch["mask"][..., None].astype(jnp.float32)


def _case():
    """A LLaVA whose two layers differ in heads and window, and two rows of it."""
    cfg = cases.config().with_layers((decoder_layer(4, 2, 24), decoder_layer(2, 2, 16, window=5)))
    rng, shapes = np.random.default_rng(4), param_shapes(cfg)
    params = {path: jnp.asarray(rng.normal(0.0, 0.2, shape), jnp.float32) for path, shape in shapes.items()}
    batch = next(cases.Stream(cfg, rows=2)).arrays
    return Model(unflatten(params), cfg), {**batch, "mask": batch["attention_mask"]}


def test_a_model_with_splash_equals_one_with_xla(monkeypatch):
    """Layers of unequal heads and windows, and the tower."""
    model, batch = _case()
    expected = jax.jit(_logits, static_argnums=1)(model.params, model.cfg, batch)
    monkeypatch.setattr(attention, "for_tpu", lambda: True)
    monkeypatch.setattr(attention, "splash_attention", functools.partial(splash_attention, interpret=True))
    found = jax.jit(lambda params, batch: _logits(params, model.cfg, batch))(model.params, batch)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_splash_on_a_mesh():
    """Rows and heads are split over the mesh; 3 rows, which do not divide, are whole on every device."""
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.standard_normal((4, 9, n, 8)), jnp.float32) for n in (4, 2, 2))
    valid = np.arange(9)[None] < np.asarray([9, 4, 7, 8])[:, None]

    def gradients(attend, *qkv):
        return jax.grad(lambda *args: jnp.sum(jnp.square(attend(*args))), argnums=(0, 1, 2))(*qkv)

    split = functools.partial(splash_attention, valid=valid, causal=True, interpret=True)
    mask = attention_mask(jnp.asarray(valid), 9, 0)[:, None]
    with jax.set_mesh(make_mesh(2, 2, 2)):
        found = jax.jit(functools.partial(gradients, split))(q, k, v)
        whole = jax.jit(functools.partial(splash_attention, causal=False, interpret=True))(q[:3], k[:3], v[:3])
    for ours, theirs in zip(found, gradients(functools.partial(xla_attention, mask=mask), q, k, v), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    np.testing.assert_allclose(whole, xla_attention(q[:3], k[:3], v[:3]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)])
def test_attention_within_segments_equals_a_mask(monkeypatch, sizes):
    """Images of 50, 20, 96 and 34 patches in a row, the third in alternating windows; blocks of 32."""
    monkeypatch.setattr(kernels, "_LARGEST_BLOCK", 32)
    rng = np.random.default_rng(4)
    q, k, v, out = (jnp.asarray(rng.standard_normal((4, SEQ, n, 8)), jnp.float32) for n in (4, 2, 2, 4))
    ids = np.repeat([0, 1, 2, 8], (50, 20, 96, 34))[None].repeat(4, axis=0)
    ids[0, 70:166] += np.arange(96) // 4 % 2
    ids[3] = 5
    meets = kernels._meeting_blocks(jnp.asarray(np.pad(ids[1], (0, 24), constant_values=9)).reshape(-1, 32))
    assert [np.flatnonzero(row).tolist() for row in np.asarray(meets)] == [
        [0, 1], [0, 1, 2], [1, 2, 3, 4, 5], [2, 3, 4, 5], [2, 3, 4, 5], [2, 3, 4, 5, 6], [5, 6],
    ]  # fmt: skip
    mask = (ids[:, :, None] == ids[:, None])[:, None]

    def gradients(attend):
        return jax.jit(jax.grad(lambda *args: jnp.vdot(attend(*args), out), argnums=(0, 1, 2)))(q, k, v)

    expected = xla_attention(q, k, v, mask), *gradients(functools.partial(xla_attention, mask=mask))
    blocks = functools.partial(kernels.segment_attention, segments=jnp.asarray(ids))
    with use_mesh(sizes and make_mesh(*sizes)):
        found = jax.jit(blocks)(q, k, v), *gradients(blocks)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5, rtol=0)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def test_scores_of_a_packed_row_do_not_exist_at_once():
    """A row of 16,384 patches: scores of 4 heads would be 4.3 GB."""
    shape = jax.ShapeDtypeStruct((1, 16384, 4, 16), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 16384), jnp.int32)
    loss = jax.grad(lambda q, k, v, ids: kernels.segment_attention(q, k, v, ids).sum(), argnums=(0, 1, 2))
    memory = jax.jit(loss).lower(shape, shape, shape, ids).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 16 * 16384 * 4 * 16 * 4


def test_tpus_get_splash():
    """Lowered for a TPU mesh on this machine, each attention is the kernel; for CPUs none is."""
    model, batch = _case()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (model.params, batch))
    chip = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((1, 1, 1), MESH_AXES, (AxisType.Auto,) * 3, abstract_device=chip)

    def kernels(platform: str) -> list[str]:
        """Names of the kernels of a gradient, in order."""
        gradient = jax.jit(lambda *args: jax.grad(lambda *args: jnp.sum(_logits(args[0], model.cfg, args[1])))(*args))
        text = gradient.trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
        return re.findall(r'tpu_custom_call.*?kernel_name = "(\w+)"', text)

    with jax.sharding.use_abstract_mesh(mesh):
        found = kernels("tpu")
        prompt = {"ids": shapes[1]["input_ids"], "valid": shapes[1]["mask"]}
        prompt |= {"media": {"vision": Packed(shapes[1]["pixel_values"])}, "ended": jax.ShapeDtypeStruct((2,), bool)}
        prompt |= {
            "prefix_ids": prompt["ids"],
            "prefix_valid": prompt["valid"],
            "rows": jax.ShapeDtypeStruct((2,), int),
        }
        lowered = prefill.trace(shapes[0], model.cfg, prompt, 4, ()).lower(lowering_platforms=("tpu",)).as_text()
        step = jax.eval_shape(
            functools.partial(prefill, cfg=model.cfg, max_new_tokens=4, eos=()), shapes[0], arrays=prompt
        )
        decoding = decode.trace(shapes[0], model.cfg, *step, 4, ()).lower(lowering_platforms=("tpu",)).as_text()
    # the tower's and both runs' of the prefix; then of the rows, whose windowed layer counts real keys
    assert lowered.count("tpu_custom_call") == 3 + 1
    assert "tpu_custom_call" not in decoding
    # one kernel per run of layers, and the tower's; a backward pass has two
    assert [sum(f"_{name}_" in kernel for kernel in found) for name in ("fwd", "dq", "dkv")] == [3, 3, 3]
    assert not kernels("cpu")
