"""Bunny and InternVL-Chat against the goldens: every intermediate of the reference, within 1e-4."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from hf_cases import copy_golden, edit_config, expanded_batch, mean_loss
from media_cases import packed

from vlmprune_jax.core.models.generate import generate
from vlmprune_jax.core.models.params import stack_layers, unstack_layers
from vlmprune_jax.core.models.projector import pixel_shuffle
from vlmprune_jax.core.models.vision import bicubic
from vlmprune_jax.core.models.vlm import Model, features_of, forward, to_nnx
from vlmprune_jax.core.prune import score
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.exports.pruning import make_plan

close = dict(atol=1e-4, rtol=0)
CAPTURE = ("hidden", "image_features", "inputs_embeds")


@pytest.fixture(scope="module")
def bunny(goldens):
    return load(goldens / "ckpt/bunny", vision_dir=goldens / "ckpt/siglip_tower")


@pytest.fixture(scope="module")
def internvl(goldens):
    return load(goldens / "ckpt/internvl")


def up_to(model: Model, n: int) -> Model:
    """The model with the first `n` blocks of its tower and every position of theirs."""
    layers, rest = unstack_layers(model.params, model.cfg, "vision")
    cfg = model.cfg.with_layers(model.cfg.vision.layers[:n], "vision")
    return Model(stack_layers(layers[:n], rest, cfg, "vision") if n else rest, cfg)


@pytest.mark.slow
def test_every_vision_hidden_state(goldens, bunny, internvl):
    for model, name, computed in ((bunny, "bunny", 3), (internvl, "internvl", 3)):
        golden = np.load(goldens / f"forward/{name}.npz")
        assert len(model.cfg.vision.layers) == computed
        for n in range(computed + 1):
            states = to_nnx(up_to(model, n)).vision(packed(golden["pixel_values"][:1]))
            np.testing.assert_allclose(states, golden["vision_hidden_states"][n], **close)


def compare(model, golden, ids, mask, pixels, used):
    """Forward of a batch with `pixels`; `used` are those of the golden images that some row reads."""
    logits, aux = forward(model, ids, pixel_values=pixels, attention_mask=mask, capture=CAPTURE)
    real = mask == 1
    np.testing.assert_allclose(aux["image_features"], golden["projected"][used], **close)
    np.testing.assert_allclose(aux["inputs_embeds"][real], golden["inputs_embeds"][real], **close)
    assert len(aux["hidden"]) == len(golden["hidden_states"])
    for found, expected in zip(aux["hidden"], golden["hidden_states"], strict=True):
        np.testing.assert_allclose(found[real], expected[real], **close)
    np.testing.assert_allclose(logits[real], golden["logits"][real], **close)
    return logits


@pytest.mark.parametrize("per_row", [False, True], ids=["in_order", "per_row"])
def test_bunny(goldens, bunny, per_row):
    golden = np.load(goldens / "forward/bunny.npz")
    pixels = golden["pixel_values"]
    assert bunny.cfg.tokens_per_image == 9
    np.testing.assert_allclose(
        features_of(to_nnx(bunny).vision, bunny.cfg, packed(pixels)), golden["vision_features"], **close
    )
    ids, mask = expanded_batch(golden, bunny.cfg.image_token_id, bunny.cfg.tokens_per_image)
    # Row 2 is text only: the reference gives it an image of zeros, which is left out.
    logits = compare(bunny, golden, ids, mask, pixels[:, None] if per_row else pixels[:2], range(2))
    assert mean_loss(logits, golden["merged_labels"]) == pytest.approx(float(golden["loss"]), rel=1e-5)


def test_internvl(goldens, internvl):
    golden = np.load(goldens / "forward/internvl.npz")
    pixels, used = golden["pixel_values"], np.flatnonzero(golden["image_flags"])
    assert (internvl.cfg.tokens_per_image, internvl.cfg.image_token_id) == (4, 393)
    module = to_nnx(internvl)
    states = module.vision(packed(pixels))
    np.testing.assert_allclose(states, golden["vision_last_hidden_state"], **close)
    np.testing.assert_allclose(pixel_shuffle(states[:, 1:], 2, "v1"), golden["pixel_shuffled_v1"], **close)
    np.testing.assert_allclose(
        features_of(module.vision, module.cfg, packed(pixels)), golden["vision_features"], **close
    )
    mask = golden["attention_mask"]
    logits = compare(internvl, golden, golden["input_ids"], mask, pixels[used], used)
    assert mean_loss(logits, golden["labels"]) == pytest.approx(float(golden["loss"]), rel=1e-5)


def test_internvl_rows_of_unequal_tiles(goldens, internvl):
    """Per-row tile slots: 3, 1 and no tile in 3 slots each, the rest zeros that nothing reads."""
    golden = np.load(goldens / "forward/internvl.npz")
    slots = np.zeros((3, 3, *golden["pixel_values"].shape[1:]), np.float32)
    slots[0], slots[1, 0] = golden["pixel_values"][:3], golden["pixel_values"][3]
    mask = golden["attention_mask"]
    logits, _ = forward(internvl, golden["input_ids"], pixel_values=slots, attention_mask=mask)
    np.testing.assert_allclose(logits[mask == 1], golden["logits"][mask == 1], **close)


def test_internvl_beyond_the_original_length(goldens, internvl):
    golden = np.load(goldens / "forward/internvl_long.npz")
    ids, pixels = golden["input_ids"], golden["pixel_values"]
    logits, aux = forward(internvl, ids, pixel_values=pixels, attention_mask=golden["attention_mask"], capture=CAPTURE)
    np.testing.assert_allclose(aux["inputs_embeds"], golden["inputs_embeds"], **close)
    np.testing.assert_allclose(aux["hidden"][-1], golden["last_hidden_state"], **close)
    np.testing.assert_allclose(logits[:, -16:], golden["logits_last16"], **close)
    assert mean_loss(logits, golden["labels"]) == pytest.approx(float(golden["loss"]), rel=1e-5)


def test_internvl_without_rope_scaling(goldens, tmp_path):
    folder = copy_golden(goldens, "internvl", tmp_path / "internvl")
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, llm_config={**config["llm_config"], "rope_scaling": None})
    inputs, golden = np.load(goldens / "forward/internvl.npz"), np.load(goldens / "forward/internvl_rope_null.npz")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    pixels = inputs["pixel_values"][inputs["image_flags"] == 1]
    logits, aux = forward(load(folder), ids, pixel_values=pixels, attention_mask=mask, capture=("hidden",))
    last = aux["hidden"][-1]
    np.testing.assert_allclose(last[mask == 1], golden["last_hidden_state"][mask == 1], **close)
    end = int(mask[0].sum())
    stored = golden["logits_row0_last8"]
    rows = logits[0, -8:] if end == mask.shape[1] else logits[0, end - 8 : end]
    np.testing.assert_allclose(rows, stored, **close)


def test_positions_of_another_grid(goldens, internvl):
    golden = np.load(goldens / "forward/internvl.npz")
    states = to_nnx(internvl).vision(packed(golden["resized_pixel_values"]))
    np.testing.assert_allclose(states, golden["resized_vision_last_hidden_state"], **close)
    np.testing.assert_array_equal(bicubic(5, 5), np.eye(5, dtype=np.float32))


def test_images_of_another_size_than_the_tower_was_trained_on(goldens, tmp_path):
    """`force_image_size` of an InternVL-Chat folder: the table is resized in every forward."""
    folder = copy_golden(goldens, "internvl", tmp_path / "internvl")
    edit_config(folder, force_image_size=84)
    model = load(folder)
    assert model.cfg.tokens_per_image == 9
    golden = np.load(goldens / "forward/internvl.npz")
    pixels = golden["resized_pixel_values"]
    ids = np.full((1, 12), model.cfg.image_token_id)
    ids[0, ::4] = 7
    _, aux = forward(model, ids, pixel_values=pixels, capture=("image_features",))
    shuffled = pixel_shuffle(jnp.asarray(golden["resized_vision_last_hidden_state"])[:, 1:], 2, "v2")
    np.testing.assert_allclose(aux["image_features"], to_nnx(model).projector(shuffled), **close)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bunny", "internvl"])
def test_greedy_tokens(goldens, bunny, internvl, name):
    model, golden = {"bunny": bunny, "internvl": internvl}[name], np.load(goldens / f"forward/{name}.npz")
    tiles = [golden["pixel_values"][:1], golden["pixel_values"][1:2]]
    if name == "internvl":
        tiles = [golden["pixel_values"][:3], golden["pixel_values"][3:4]]
    for row, length in enumerate(golden["gen_prompt_len"]):
        ids, token = golden["input_ids"][row, :length], model.cfg.image_token_id
        if name == "bunny":
            ids = np.repeat(ids, np.where(ids == token, model.cfg.tokens_per_image, 1))
        found = generate(model, ids[None], pixel_values=tiles[row], max_new_tokens=8, eos_token_ids=())
        np.testing.assert_array_equal(found[0], golden["gen_tokens"][row])
    if name == "bunny":
        found = generate(model, golden["gen_text_prompt"][None], max_new_tokens=8, eos_token_ids=())
        np.testing.assert_array_equal(found[0], golden["gen_text_tokens"])


def influence_samples(goldens, name, model):
    """The calibration samples: image positions expanded, dummy images of text-only samples left out."""
    arrays = np.load(goldens / f"block_influence/{name}.npz")
    for n in range(len(arrays["per_sample"])):
        ids, mask, pixels = (arrays[f"s{n}_{part}"] for part in ("input_ids", "attention_mask", "pixel_values"))
        token = model.cfg.image_token_id
        if name == "bunny":
            repeats = np.where(ids[0] == token, model.cfg.tokens_per_image, 1)
            ids, mask = np.repeat(ids, repeats, axis=1), np.repeat(mask, repeats, axis=1)
        sample = {"input_ids": ids, "attention_mask": mask}
        yield {**sample, "pixel_values": pixels[None]} if (ids == token).any() else sample


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bunny", "internvl"])
def test_block_influence_equals_the_reference(goldens, bunny, internvl, name):
    model = {"bunny": bunny, "internvl": internvl}[name]
    recorded = json.loads((goldens / f"block_influence/{name}.json").read_text())
    samples = list(influence_samples(goldens, name, model))
    assert any("pixel_values" in sample for sample in samples)
    scores = score(model, samples, criterion="block_influence", reference_compat=True)
    np.testing.assert_allclose(scores.layers, recorded["importances"], rtol=1e-4)
    for n, removed in recorded["removed"].items():
        plan = make_plan(scores, model.cfg, method="depth", layers_removed=int(n))
        assert list(plan.removed_layers) == sorted(removed)
        assert list(plan.kept_layers) == recorded["kept"][n]


def test_image_token_of_the_folders_tokenizer(goldens, tmp_path):
    folder = copy_golden(goldens, "internvl", tmp_path / "internvl")
    assert load(folder).cfg.eos_token_ids == (380,)
    shutil.copy(goldens / "tokenizers/internvl/tokenizer.json", folder)
    assert (load(folder).cfg.image_token_id, load(folder).cfg.eos_token_ids) == (393, (380, 387))
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["id"] -= token["content"] == "<IMG_CONTEXT>"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert load(folder).cfg.image_token_id == 392
    (folder / "tokenizer.json").unlink()
    (folder / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": 391}))
    assert load(folder).cfg.image_token_id == 391
