"""LLaVA, Llama, Bunny and InternVL-Chat against the goldens: every intermediate of the reference, within 1e-4."""

import functools
import json
import operator
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import packed, tower_values
from hf_cases import copy_golden, edit_config, expanded_batch, mean_loss
from repository import load_arrays

from vlmprune_jax.core.models.generate import generate
from vlmprune_jax.core.models.projector import pixel_shuffle
from vlmprune_jax.core.models.vision import bicubic
from vlmprune_jax.core.models.vlm import features_of, forward, to_nnx
from vlmprune_jax.core.prune import score
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.exports.pruning import make_plan

close = dict(atol=1e-4, rtol=0)
CAPTURE = ("hidden", "image_features", "inputs_embeds")
TOWERS = {"llava_orig": "clip_tower", "llava_orig_bin": "clip_tower", "bunny": "siglip_tower"}
PER_ROW = pytest.mark.parametrize("per_row", [False, True], ids=["in_order", "per_row"])


@pytest.fixture(scope="module")
def models(goldens):
    def vision_dir(name):
        return goldens / "ckpt" / TOWERS[name] if name in TOWERS else None

    names = ("llava_hf", "internvl", "llama_gqa", *TOWERS)
    return {name: load(goldens / "ckpt" / name, vision_dir=vision_dir(name)) for name in names}


def golden_of(goldens, name):
    return load_arrays(goldens / f"forward/{'llava' if name.startswith('llava') else name}.npz")


def compare(model, golden, ids, mask, pixels, used=None, labels="labels"):
    """Compare a forward of a batch with all that is stored; `used`: the golden images that some row reads."""
    logits, aux = forward(model, ids, pixel_values=pixels, attention_mask=mask, capture=CAPTURE)
    real, vocab = mask == 1, golden["logits"].shape[-1]
    if used is not None:
        np.testing.assert_allclose(aux["image_features"], golden["projected"][used], **close)
    np.testing.assert_allclose(aux["inputs_embeds"][real], golden["inputs_embeds"][real], **close)
    hidden = golden["hidden_states"] if "hidden_states" in golden else [golden["last_hidden_state"]]
    assert used is None or len(aux["hidden"]) == len(hidden)
    for found, expected in zip(aux["hidden"][-len(hidden) :], hidden, strict=True):
        np.testing.assert_allclose(found[real], expected[real], **close)
    np.testing.assert_allclose(logits[real][:, :vocab], golden["logits"][real], **close)
    if vocab == model.cfg.text.vocab_size:  # llava_hf has 16 more rows, which take part in its softmax
        assert mean_loss(logits, golden[labels]) == pytest.approx(float(golden["loss"]), rel=1e-5)


@pytest.mark.parametrize("name", ["llava_orig", "llava_hf", "bunny"])
@PER_ROW
def test_llava_and_bunny(models, goldens, name, per_row):
    model, golden = models[name], golden_of(goldens, name)
    pixels = golden["pixel_values"]
    ids, mask = expanded_batch(golden, model.cfg.image_token_id, model.cfg.tokens_per_image)
    features = features_of(to_nnx(model).vision, model.cfg, packed(pixels))
    np.testing.assert_allclose(features, golden["vision_features"], **close)
    # Row 2 is text only: the reference gives it an image of zeros, which is left out.
    compare(model, golden, ids, mask, pixels[:, None] if per_row else pixels[:2], range(2), "merged_labels")


@pytest.mark.parametrize("name", ["llava_orig", "llava_hf"])
@PER_ROW
def test_several_images_in_a_row(models, goldens, name, per_row):
    model, golden = models[name], load_arrays(goldens / "forward/llava_multi_image.npz")
    pixels = golden["pixel_values"]
    if per_row:
        pixels = np.stack([pixels[:2], np.stack([pixels[2], np.zeros_like(pixels[2])])])
    ids, mask = expanded_batch(golden, model.cfg.image_token_id, model.cfg.tokens_per_image)
    compare(model, golden, ids, mask, pixels, labels="merged_labels")


def test_internvl(models, goldens):
    model, golden = models["internvl"], golden_of(goldens, "internvl")
    pixels, used, mask = golden["pixel_values"], np.flatnonzero(golden["image_flags"]), golden["attention_mask"]
    assert (model.cfg.tokens_per_image, model.cfg.image_token_id) == (4, 393)
    module = to_nnx(model)
    states = module.vision(packed(pixels))
    np.testing.assert_allclose(states, golden["vision_last_hidden_state"], **close)
    np.testing.assert_allclose(pixel_shuffle(states[:, 1:], 2, "v1"), golden["pixel_shuffled_v1"], **close)
    features = features_of(module.vision, module.cfg, packed(pixels))
    np.testing.assert_allclose(features, golden["vision_features"], **close)
    compare(model, golden, golden["input_ids"], mask, pixels[used], used)
    # Per-row tile slots: 3, 1 and no tile in 3 slots each, the rest zeros that nothing reads.
    slots = np.zeros((3, 3, *pixels.shape[1:]), np.float32)
    slots[0], slots[1, 0] = pixels[:3], pixels[3]
    logits, _ = forward(model, golden["input_ids"], pixel_values=slots, attention_mask=mask)
    np.testing.assert_allclose(logits[mask == 1], golden["logits"][mask == 1], **close)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_llama_gqa(models, goldens, padding):
    model, golden = models["llama_gqa"], golden_of(goldens, "llama_gqa")
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


def test_all_layouts_are_one_model(models):
    """Those of transformers, of the hub, and the hub's in torch's own files."""
    hf, original, in_torch = (models[name] for name in ("llava_hf", "llava_orig", "llava_orig_bin"))
    assert hf.cfg.text.layers == original.cfg.text.layers
    assert in_torch.cfg == original.cfg
    jax.tree.map(np.testing.assert_array_equal, in_torch.params, original.params)
    for place in (("text", "layers"), ("text", "norm"), ("vision",), ("projector",)):
        ours, theirs = (functools.reduce(operator.getitem, place, one.params) for one in (hf, original))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# --- towers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava_hf", "bunny", "internvl"])
def test_every_vision_hidden_state(models, goldens, name):
    model, golden = models[name], golden_of(goldens, name)
    blocks = tower_values(model.params, model.cfg, packed(golden["pixel_values"][:1]))
    expected = golden["vision_hidden_states"]
    assert len(blocks) == len(model.cfg.vision.layers) <= len(expected)
    np.testing.assert_allclose(blocks[0].before, expected[0], **close)
    for block, state in zip(blocks, expected[1:], strict=False):
        np.testing.assert_allclose(block.after, state, **close)


@pytest.mark.parametrize(
    ("name", "field"), [("llava_hf", "vision_feature_layer"), ("llava_orig", "mm_vision_select_layer")]
)
def test_another_feature_layer(goldens, tmp_path, name, field):
    folder = copy_golden(goldens, name, tmp_path / name)
    edit_config(folder, **{field: 2})
    model = load(folder, vision_dir=goldens / "ckpt/clip_tower" if name == "llava_orig" else None)
    golden = golden_of(goldens, "llava")
    states = features_of(to_nnx(model).vision, model.cfg, packed(golden["pixel_values"][:1]))
    np.testing.assert_allclose(states, golden["vision_hidden_states"][2][:, 1:], **close)


# --- other folders of InternVL-Chat -----------------------------------------------------------------------------------


def test_beyond_the_original_length(models, goldens):
    golden = load_arrays(goldens / "forward/internvl_long.npz")
    ids, pixels, mask = (golden[name] for name in ("input_ids", "pixel_values", "attention_mask"))
    logits, aux = forward(models["internvl"], ids, pixel_values=pixels, attention_mask=mask, capture=CAPTURE)
    np.testing.assert_allclose(aux["inputs_embeds"], golden["inputs_embeds"], **close)
    np.testing.assert_allclose(aux["hidden"][-1], golden["last_hidden_state"], **close)
    np.testing.assert_allclose(logits[:, -16:], golden["logits_last16"], **close)
    assert mean_loss(logits, golden["labels"]) == pytest.approx(float(golden["loss"]), rel=1e-5)


def test_without_rope_scaling(goldens, tmp_path):
    folder = copy_golden(goldens, "internvl", tmp_path / "internvl")
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, llm_config={**config["llm_config"], "rope_scaling": None})
    inputs, golden = golden_of(goldens, "internvl"), load_arrays(goldens / "forward/internvl_rope_null.npz")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    pixels = inputs["pixel_values"][inputs["image_flags"] == 1]
    logits, aux = forward(load(folder), ids, pixel_values=pixels, attention_mask=mask, capture=("hidden",))
    np.testing.assert_allclose(aux["hidden"][-1][mask == 1], golden["last_hidden_state"][mask == 1], **close)
    end = int(mask[0].sum())
    np.testing.assert_allclose(logits[0, end - 8 : end], golden["logits_row0_last8"], **close)


def test_images_of_another_size_than_the_tower_was_trained_on(goldens, tmp_path):
    """`force_image_size` of an InternVL-Chat folder: the table is resized in every forward."""
    folder = copy_golden(goldens, "internvl", tmp_path / "internvl")
    edit_config(folder, force_image_size=84)
    model, golden = load(folder), golden_of(goldens, "internvl")
    assert model.cfg.tokens_per_image == 9
    ids = np.full((1, 12), model.cfg.image_token_id)
    ids[0, ::4] = 7
    _, aux = forward(model, ids, pixel_values=golden["resized_pixel_values"], capture=("image_features",))
    shuffled = pixel_shuffle(jnp.asarray(golden["resized_vision_last_hidden_state"])[:, 1:], 2, "v2")
    np.testing.assert_allclose(aux["image_features"], to_nnx(model).projector(shuffled), **close)
    np.testing.assert_array_equal(bicubic(5, 5), np.eye(5, dtype=np.float32))


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


# --- what is computed with them ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bunny", "internvl"])
def test_greedy_tokens(models, goldens, name):
    model, golden = models[name], golden_of(goldens, name)
    options = {"max_new_tokens": 8, "eos_token_ids": ()}
    ends = {"bunny": (0, 1, 2), "internvl": (0, 3, 4)}[name]
    for row, length in enumerate(golden["gen_prompt_len"]):
        ids, pixels = golden["input_ids"][row, :length], golden["pixel_values"][ends[row] : ends[row + 1]]
        if name == "bunny":
            ids = np.repeat(ids, np.where(ids == model.cfg.image_token_id, model.cfg.tokens_per_image, 1))
        found = generate(model, ids[None], pixel_values=pixels, **options)
        np.testing.assert_array_equal(found[0], golden["gen_tokens"][row])
    if name == "bunny":
        found = generate(model, golden["gen_text_prompt"][None], **options)
        np.testing.assert_array_equal(found[0], golden["gen_text_tokens"])


def influence_samples(goldens, name, model):
    """The calibration samples: image positions expanded, dummy images of text-only samples left out."""
    arrays = load_arrays(goldens / f"block_influence/{name}.npz")
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
def test_block_influence_equals_the_reference(models, goldens, name):
    model, recorded = models[name], json.loads((goldens / f"block_influence/{name}.json").read_text())
    samples = list(influence_samples(goldens, name, model))
    assert any("pixel_values" in sample for sample in samples)
    scores = score(model, samples, criterion="block_influence", reference_compat=True)
    np.testing.assert_allclose(scores.layers, recorded["importances"], rtol=1e-4)
    for n, removed in recorded["removed"].items():
        plan = make_plan(scores, model.cfg, method="depth", layers_removed=int(n))
        assert list(plan.removed_layers) == sorted(removed)
        assert list(plan.kept_layers) == recorded["kept"][n]
