"""A model on 8 devices computes what it computes on one, on every shape of the mesh."""

import numpy as np
import pytest
from hf_cases import LLAVA, assert_equal, expanded_batch, make_folder, random_ids
from refusal import refused
from repository import load_arrays

from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.core.mesh.rules import sharding
from vlmprune_jax.core.models.generate import generate
from vlmprune_jax.core.models.params import flatten, param_axes
from vlmprune_jax.core.models.vlm import forward
from vlmprune_jax.io.checkpoints.read import load

# A logit of 10 in float32 is 1e-5 away from its value in float64, on one device and on 8 alike; one of 32 in torch
# and in JAX 1.5e-4, so large logits are compared relative to their size.
close = dict(atol=1e-5, rtol=1e-5)
closer = dict(atol=1e-5, rtol=0)
want = ("hidden", "image_features")


@pytest.fixture(scope="module")
def batches(goldens):
    """Golden rows with one image slot each: 8, so that the batch is split as well, and 3, which no mesh divides."""
    golden, folder = load_arrays(goldens / "forward/llava.npz"), goldens / "ckpt/llava_hf"
    one = load(folder)
    ids, mask = expanded_batch(golden, one.cfg.image_token_id, one.cfg.tokens_per_image)
    result = {}
    for rows in (np.arange(8) % 3, np.arange(3)):
        pixels = golden["pixel_values"][rows][:, None]
        inputs = {"input_ids": ids[rows], "pixel_values": pixels, "attention_mask": mask[rows]}
        result[len(rows)] = inputs, golden["logits"][rows], *forward(one, **inputs, capture=want)
    return result


def load_on(mesh, folder, **options):
    """Return a model, each of whose leaves is split as its axes say."""
    model = load(folder, mesh=mesh, **options)
    axes = param_axes(model.cfg)
    for path, leaf in flatten(model.params).items():
        assert leaf.sharding == sharding(mesh, axes[path]), path
    return model


@pytest.mark.parametrize(
    ("sizes", "rows"), [((8, 1, 1), 8), ((1, 8, 1), 8), ((2, 2, 2), 8), ((1, 2, 4), 8), ((4, 1, 2), 3)]
)
def test_llava(goldens, batches, sizes, rows):
    model = load_on(make_mesh(*sizes), goldens / "ckpt/llava_hf")
    inputs, reference, expected, expected_aux = batches[rows]
    found, aux = forward(model, **inputs, capture=want)
    real = inputs["attention_mask"] == 1
    np.testing.assert_allclose(np.asarray(found)[real], np.asarray(expected)[real], **close)
    np.testing.assert_allclose(aux["image_features"], expected_aux["image_features"], **closer)
    for a, b in zip(aux["hidden"], expected_aux["hidden"], strict=True):
        np.testing.assert_allclose(np.asarray(a)[real], np.asarray(b)[real], **closer)
    np.testing.assert_allclose(np.asarray(found)[real][:, :400], reference[real], atol=1e-4, rtol=0)


def test_a_mesh_that_does_not_divide_says_what_would(goldens):
    refused("layer 0 = 4.*data=2 fsdp=1 tensor=4", load, goldens / "ckpt/llava_hf", mesh=make_mesh(1, 1, 8))


def test_generation(tmp_path):
    folder = make_folder(tmp_path / "llava", {**LLAVA, "text_config": {**LLAVA["text_config"], "vocab_size": 96}})
    one, many = load(folder), load(folder, mesh=make_mesh(2, 4, 1))
    inputs = random_ids(one)
    tokens = [generate(model, **inputs, max_new_tokens=6, eos_token_ids=()) for model in (one, many)]
    np.testing.assert_array_equal(*tokens)


@pytest.mark.parametrize(
    ("checkpoint", "tower", "sizes"),
    [
        ("internvl", None, (1, 2, 4)),
        ("bunny", "siglip_tower", (2, 4, 1)),
        ("llava_orig_bin", "clip_tower", (2, 2, 2)),
    ],
)
def test_pieces_of_any_size_make_the_same_arrays(goldens, monkeypatch, checkpoint, tower, sizes):
    """Fused tensors (internvl), a tower in files of its own (bunny), torch's archives; pieces that end anywhere."""
    folder, options = goldens / "ckpt" / checkpoint, {"vision_dir": tower and goldens / "ckpt" / tower}
    options["dtype"] = "bfloat16" if checkpoint == "bunny" else "float32"
    expected = load(folder, **options)
    monkeypatch.setattr("vlmprune_jax.io.checkpoints.read._PIECE", 100)
    assert_equal(expected, load(folder, **options))
    assert_equal(expected, load_on(make_mesh(*sizes), folder, **options))


def test_per_layer_inputs_are_split_where_the_mesh_divides_them(goldens):
    """The table of Gemma 4, the largest weight: 10 channels a layer, over 2 devices and not over 4."""
    folder = goldens / "families/gemma4/ckpt"
    ids = np.random.default_rng(0).integers(9, 400, (8, 7))
    one = load(folder)
    for fsdp, channels in ((2, 5), (4, 10)):
        spread = load(folder, mesh=make_mesh(8 // fsdp, fsdp, 1))
        table = spread.params["text"]["extra_inputs"]["table"]["weight"]
        assert table.addressable_shards[0].data.shape == (422, 9, channels)
    np.testing.assert_allclose(forward(spread, ids)[0], forward(one, ids)[0], **close)
