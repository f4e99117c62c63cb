"""A model on 8 devices computes what it computes on one, on every shape of the mesh."""

import jax
import numpy as np
import pytest
from hf_cases import LLAMA, LLAVA, expanded_batch, make_folder, random_ids

from vlmprune_jax.distributed.mesh import make_mesh
from vlmprune_jax.distributed.rules import sharding
from vlmprune_jax.errors import UserError
from vlmprune_jax.hf.read import load
from vlmprune_jax.models.generate import generate
from vlmprune_jax.models.params import flatten, param_axes
from vlmprune_jax.models.vlm import forward

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4), (4, 1, 2)]
close = dict(atol=1e-5, rtol=0)


@pytest.mark.parametrize("sizes", MESHES)
def test_llava(goldens, sizes):
    """The golden LLaVA (8 heads, width 48, tower of width 32 with 4 heads) where the mesh divides it."""
    mesh, folder = make_mesh(*sizes), goldens / "ckpt/llava_hf"
    if sizes[2] == 8:
        with pytest.raises(UserError, match="vision heads = 4.*use fsdp=1 tensor=4"):
            load(folder, mesh=mesh)
        return
    one, many = load(folder), load(folder, mesh=mesh)
    axes = param_axes(many.cfg)
    for path, leaf in flatten(many.params).items():
        assert leaf.sharding == sharding(mesh, axes[path]), path
    golden = np.load(goldens / "forward/llava.npz")
    ids, mask = expanded_batch(golden, one.cfg.image_token_id, one.cfg.tokens_per_image)
    # 8 rows with an image slot each, so that the batch is split as well; 3 rows, which no mesh divides.
    for rows in (np.arange(8) % 3, np.arange(3)):
        inputs = {"input_ids": ids[rows], "pixel_values": golden["pixel_values"][rows][:, None], "attention_mask": mask[rows]}
        expected, aux = forward(one, **inputs, want=("hidden", "image_features"))
        found, sharded_aux = forward(many, **inputs, want=("hidden", "image_features"))
        real = mask[rows] == 1
        np.testing.assert_allclose(np.asarray(found)[real], np.asarray(expected)[real], **close)
        np.testing.assert_allclose(sharded_aux["image_features"], aux["image_features"], **close)
        for a, b in zip(sharded_aux["hidden"], aux["hidden"], strict=True):
            np.testing.assert_allclose(np.asarray(a)[real], np.asarray(b)[real], **close)
        np.testing.assert_allclose(np.asarray(found)[real][:, :400], golden["logits"][rows][real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("sizes", [(1, 1, 8), (2, 2, 2), (1, 4, 2)])
def test_plain_decoder_with_grouped_queries(tmp_path, sizes):
    config = {**LLAMA, "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 96, "attention_bias": True}
    folder = make_folder(tmp_path / "llama", config)
    one, many = load(folder), load(folder, mesh=make_mesh(*sizes))
    inputs = random_ids(one)
    np.testing.assert_allclose(forward(many, **inputs)[0], forward(one, **inputs)[0], **close)


def test_generation(tmp_path):
    folder = make_folder(tmp_path / "llava", {**LLAVA, "text_config": {**LLAVA["text_config"], "vocab_size": 96}})
    one, many = load(folder), load(folder, mesh=make_mesh(2, 4, 1))
    inputs = random_ids(one)
    tokens = [generate(model, **inputs, max_new_tokens=6, eos_token_ids=()) for model in (one, many)]
    np.testing.assert_array_equal(*tokens)


def test_dtype_on_the_mesh(tmp_path):
    folder = make_folder(tmp_path / "llama", {**LLAMA, "vocab_size": 96})
    one, many = load(folder, dtype="bfloat16"), load(folder, dtype="bfloat16", mesh=make_mesh(4, 2, 1))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(many.params), jax.device_get(one.params))
