"""LLaVA and Llama forward passes against the goldens: every intermediate of the reference, within 1e-4."""

import dataclasses

import jax
import numpy as np
import pytest
from hf_cases import copy_golden, edit_config, expanded_batch, mean_loss
from media_cases import packed

from vlmprune_jax.core.models.vlm import Model, features_of, forward, to_nnx
from vlmprune_jax.io.checkpoints.read import load

FOLDERS = ("llava_orig", "llava_hf", "llava_orig_bin")
close = dict(atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def models(goldens):
    tower = goldens / "ckpt/clip_tower"
    return {name: load(goldens / "ckpt" / name, vision_dir=tower if "orig" in name else None) for name in FOLDERS}


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["llava_orig", "llava_hf"])
def test_every_vision_hidden_state(goldens, tmp_path, name, layer):
    folder = copy_golden(goldens, name, tmp_path / name)
    edit_config(folder, **{"mm_vision_select_layer" if name == "llava_orig" else "vision_feature_layer": layer})
    model = load(folder, vision_dir=goldens / "ckpt/clip_tower" if name == "llava_orig" else None)
    golden = np.load(goldens / "forward/llava.npz")
    with_class_token = Model(model.params, dataclasses.replace(model.cfg, feature_select="full"))
    states = features_of(to_nnx(with_class_token).vision, with_class_token.cfg, packed(golden["pixel_values"][:1]))
    np.testing.assert_allclose(states, golden["vision_hidden_states"][layer], **close)


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("per_row", [False, True], ids=["in_order", "per_row"])
def test_llava(models, goldens, name, per_row):
    model, golden = models[name], np.load(goldens / "forward/llava.npz")
    pixels = golden["pixel_values"]
    ids, mask = expanded_batch(golden, model.cfg.image_token_id, model.cfg.tokens_per_image)
    np.testing.assert_allclose(
        features_of(to_nnx(model).vision, model.cfg, packed(pixels)), golden["vision_features"], **close
    )
    # Row 2 is text only: the reference gives it an image of zeros, which is left out.
    pixels = pixels[:, None] if per_row else pixels[:2]
    want = ("hidden", "image_features", "inputs_embeds")
    logits, aux = forward(model, ids, pixel_values=pixels, attention_mask=mask, capture=want)
    real, vocab = mask == 1, golden["logits"].shape[-1]
    np.testing.assert_allclose(aux["image_features"], golden["projected"][:2], **close)
    np.testing.assert_allclose(aux["inputs_embeds"][real], golden["inputs_embeds"][real], **close)
    assert len(aux["hidden"]) == 7
    for found, expected in zip(aux["hidden"], golden["hidden_states"], strict=True):
        np.testing.assert_allclose(found[real], expected[real], **close)
    np.testing.assert_allclose(aux["hidden"][-1][real], golden["last_hidden_state"][real], **close)
    np.testing.assert_allclose(logits[real][:, :vocab], golden["logits"][real], **close)
    if vocab == model.cfg.text.vocab_size:  # llava_hf has 16 more rows, which take part in its softmax
        assert mean_loss(logits, golden["merged_labels"]) == pytest.approx(float(golden["loss"]), rel=1e-5)


@pytest.mark.parametrize("row", [0, 1])
def test_llava_hf_of_transformers(models, goldens, row):
    golden = np.load(goldens / "forward/llava_hf.npz")
    pixels = np.load(goldens / "forward/llava.npz")["pixel_values"][row : row + 1]
    logits, _ = forward(models["llava_hf"], golden[f"row{row}_input_ids_expanded"][None], pixel_values=pixels)
    np.testing.assert_allclose(logits[0], golden[f"row{row}_logits"], **close)


@pytest.mark.parametrize("name", ["llava_orig", "llava_hf"])
@pytest.mark.parametrize("per_row", [False, True], ids=["in_order", "per_row"])
def test_several_images_in_a_row(models, goldens, name, per_row):
    model, golden = models[name], np.load(goldens / "forward/llava_multi_image.npz")
    ids, mask = expanded_batch(golden, model.cfg.image_token_id, model.cfg.tokens_per_image)
    pixels = golden["pixel_values"]
    if per_row:
        pixels = np.stack([pixels[:2], np.stack([pixels[2], np.zeros_like(pixels[2])])])
    logits, aux = forward(model, ids, pixel_values=pixels, attention_mask=mask, capture=("hidden", "inputs_embeds"))
    real, vocab = mask == 1, golden["logits"].shape[-1]
    np.testing.assert_allclose(aux["inputs_embeds"][real], golden["inputs_embeds"][real], **close)
    np.testing.assert_allclose(aux["hidden"][-1][real], golden["last_hidden_state"][real], **close)
    np.testing.assert_allclose(logits[real][:, :vocab], golden["logits"][real], **close)
    if name == "llava_orig":
        assert mean_loss(logits, golden["merged_labels"]) == pytest.approx(float(golden["loss"]), rel=1e-5)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_llama_gqa(goldens, padding):
    model, golden = load(goldens / "ckpt/llama_gqa"), np.load(goldens / "forward/llama_gqa.npz")
    ids, mask = golden["input_ids"], golden["attention_mask"]
    order = np.argsort(mask, axis=1, kind="stable") if padding == "left" else np.tile(np.arange(ids.shape[1]), (2, 1))
    take = lambda array: np.take_along_axis(array, order.reshape(order.shape + (1,) * (array.ndim - 2)), axis=1)  # noqa: E731
    logits, aux = forward(model, take(ids), attention_mask=take(mask), capture=("hidden",))
    real = take(mask) == 1
    for found, expected in zip(aux["hidden"], golden["hidden_states"], strict=True):
        np.testing.assert_allclose(found[real], take(expected)[real], **close)
    np.testing.assert_allclose(logits[real], take(golden["logits"])[real], **close)
    if padding == "right":
        assert mean_loss(logits, golden["labels"]) == pytest.approx(float(golden["loss"]), rel=1e-5)


def test_both_layouts_are_one_model(models):
    hf, original = models["llava_hf"], models["llava_orig"]
    assert hf.cfg.text.layers == original.cfg.text.layers
    for part in ("layers", "norm"):
        jax.tree.map(np.testing.assert_array_equal, hf.params["text"][part], original.params["text"][part])
    jax.tree.map(np.testing.assert_array_equal, hf.params["vision"], original.params["vision"])
    jax.tree.map(np.testing.assert_array_equal, hf.params["projector"], original.params["projector"])
