"""Products with rounded factors: the weights that an export to integers stores, and gradients as without rounding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recover_cases import Stream, config, model
from stack_cases import decoder_layer, with_facts

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.models.layers import fake_quant_product
from vlmprune_jax.core.models.vlm import Model, forward
from vlmprune_jax.core.recovery.config import LossConfig, RecoverConfig
from vlmprune_jax.core.recovery.loop import recover
from vlmprune_jax.core.sections import FakeQuant
from vlmprune_jax.io.checkpoints.disk.compressed_tensors import CompressedTensors
from vlmprune_jax.io.exports import gptq  # noqa: F401 - which declares the integer formats


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


def test_adapters_are_refused():
    with pytest.raises(
        UserError, match=r'recover.quantize="w4a16" rounds the decoder.s weights, .* set recover.trainable to'
    ):
        RecoverConfig(quantize="w4a16")
