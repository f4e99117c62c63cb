"""Vision-language folders of every decoder and tower: byte for byte there and back, and the logits of stock torch."""

import json
import shutil

import numpy as np
import pytest
from hf_cases import assert_same_tensors, edit_config, edit_weights, keep_layers, keep_width, random_ids
from refusal import refused
from vlm_cases import TEXTS, TOWERS, internvl_chat_config, internvl_config, llava_config, make_vlm_folder

import vlmprune_jax as vp
from vlmprune_jax.core.models.params import flatten
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.io.checkpoints.read import read_config

CONFIGS = {
    **{f"llava-{tower}-{text}": llava_config(text, tower) for tower in TOWERS for text in TEXTS},
    **{f"internvl-{text}": internvl_config(text) for text in ("llama", "qwen2", "qwen3", "phi3")},
    **{f"internvl_chat-{text}": internvl_chat_config(text) for text in ("llama", "qwen2", "phi3")},
}


def survives(new, old):
    """Whether every field of a config is still there."""
    if isinstance(old, dict):
        return all(name in new and survives(new[name], value) for name, value in old.items())
    return new == old


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(tmp_path, name):
    folder = make_vlm_folder(tmp_path / "source", CONFIGS[name])
    model = vp.load(folder)
    vp.save(model, tmp_path / "out", source_dir=folder, dtype="source")
    assert_same_tensors(folder, tmp_path / "out")
    assert survives(json.loads((tmp_path / "out/config.json").read_text()), CONFIGS[name])


@pytest.mark.parametrize("name", ["bunny", "internvl"])
def test_golden_there_and_back(goldens, tmp_path, name):
    source = goldens / "ckpt" / name
    model = vp.load(source, vision_dir=goldens / "ckpt/siglip_tower" if name == "bunny" else None)
    vp.save(model, tmp_path / "out", source_dir=source, dtype="source")
    assert_same_tensors(source, tmp_path / "out")
    assert survives(*(json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", source)))


PRUNED = {
    "depth": lambda model: keep_layers(model, [0, 2, 4]),
    "width": lambda model: keep_width(model, [0, 2, 3, 5, 7], range(4, 60)),
    "uneven": lambda model: keep_width(model, [1, 6], range(0, 70, 2), only=[1, 3]),
}


@pytest.mark.parametrize("how", PRUNED)
@pytest.mark.parametrize("name", ["bunny", "internvl"])
def test_pruned_golden_there_and_back(goldens, tmp_path, name, how):
    """In the hub's layout: fused tensors of other widths, and a tower whose unused tensors come along."""
    source, tower = goldens / "ckpt" / name, goldens / "ckpt/siglip_tower" if name == "bunny" else None
    pruned, _ = PRUNED[how](vp.load(source, vision_dir=tower))
    vp.save(pruned, tmp_path / "out", source_dir=source, dtype="source")
    again = vp.load(tmp_path / "out", vision_dir=tower)
    assert again.cfg == pruned.cfg
    expected = flatten(pruned.params)
    for path, leaf in flatten(again.params).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    before, after = Checkpoint(source), Checkpoint(tmp_path / "out")
    unchanged = [key for key in before if "vision" in key]
    assert any(".encoder.layers.2." in key for key in unchanged)
    for key in unchanged:
        assert before.entries[key].raw().tobytes() == after.entries[key].raw().tobytes(), key
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert new["model_type"] == old["model_type"]
    if name == "internvl":
        assert new["llm_config"]["rope_scaling"] == old["llm_config"]["rope_scaling"]
        assert new["llm_config"]["model_type"] == "phi3"


def renamed(tmp_path, source, rules):
    """A copy of a folder with other spellings of its keys."""
    shutil.copytree(source, tmp_path)

    def rename(tensors):
        result = {}
        for key, value in tensors.items():
            for old, new in rules:
                if key.startswith(old):
                    key = new + key.removeprefix(old)
                    break
            result[key] = value
        return result

    edit_weights(tmp_path, rename)
    return tmp_path


SPELLINGS = {
    "memory of 4.57": [
        ("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head."),
        ("vision_tower.", "model.vision_tower."), ("multi_modal_projector.", "model.multi_modal_projector."),
    ],
    "memory of 5": [
        ("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head."),
        ("vision_tower.vision_model.", "model.vision_tower."), ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ],
    "files of 5": [("vision_tower.vision_model.", "vision_tower.")],
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", ["llava-siglip-phi", "internvl-phi3"])
def test_every_spelling_of_the_keys(tmp_path, name, spelling):
    source = make_vlm_folder(tmp_path / "source", CONFIGS[name])
    other = renamed(tmp_path / "other", source, SPELLINGS[spelling])
    expected, model = flatten(vp.load(source).params), vp.load(other)
    for path, leaf in flatten(model.params).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    vp.save(model, tmp_path / "out", source_dir=other, dtype="source")
    # LLaVA's towers in the hub's spelling, the only one that 4.57 and engines load
    assert_same_tensors(source if name.startswith("llava") else other, tmp_path / "out")


# towers of Bunny -----------------------------------------------------------------------------------------------------


def test_bunny_takes_the_tower_of_its_own_folder(goldens, tmp_path):
    """As the reference, which drops the tower in the checkpoint: what is in `vision_dir` counts."""
    tower, key = tmp_path / "tower", "vision_model.embeddings.position_embedding.weight"
    shutil.copytree(goldens / "ckpt/siglip_tower", tower)
    edit_weights(tower, lambda tensors: {**tensors, key: tensors[key] + 1})
    inside, beside = (vp.load(goldens / "ckpt/bunny", vision_dir=d) for d in (goldens / "ckpt/siglip_tower", tower))
    first, second = (np.asarray(m.params["vision"]["position_embedding"]["weight"]) for m in (inside, beside))
    np.testing.assert_allclose(second, first + 1, rtol=1e-6)


def test_bunny_with_the_tower_in_its_checkpoint(goldens, tmp_path):
    """A vision_dir with the config alone describes the tower that the checkpoint holds."""
    (tmp_path / "tower").mkdir()
    shutil.copy(goldens / "ckpt/siglip_tower/config.json", tmp_path / "tower")
    expected = flatten(vp.load(goldens / "ckpt/bunny", vision_dir=goldens / "ckpt/siglip_tower").params)
    for path, leaf in flatten(vp.load(goldens / "ckpt/bunny", vision_dir=tmp_path / "tower").params).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_bunny_without_a_description_of_its_tower(goldens):
    with pytest.raises(
        vp.UserError,
        match=r"google/siglip-so400m-patch14-384.*set vision_dir .--config.model.vision_dir. to the tower's folder",
    ):
        vp.load(goldens / "ckpt/bunny")


def test_the_hubs_bunny_needs_no_vision_dir(goldens, tmp_path):
    config = json.loads((goldens / "ckpt/bunny/config.json").read_text())
    config |= {
        "mm_hidden_size": 1152, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 50295,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, cfg = read_config(tmp_path)
    assert (cfg.tokens_per_image, len(cfg.vision.layers), cfg.vision.n_layers_total) == (729, 26, 27)
    # docs of the reference: 3,182,254,624 with the post layer norm, which is not computed
    assert vp.count_params(cfg) == 3_182_254_624 - 2 * 1152
    assert vp.count_params(cfg, "text") == 2_774_999_040
    assert vp.count_params(cfg, "projector") == 9_507_840


def test_what_an_internvl_chat_config_leaves_out(goldens, tmp_path):
    """The defaults of the hub's InternVLChatConfig: the first pixel shuffle, all blocks, half the side."""
    config = json.loads((goldens / "ckpt/internvl/config.json").read_text())
    stated = ("ps_version", "select_layer", "downsample_ratio")
    assert all(name in config for name in stated)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in stated}))
    _, cfg = read_config(tmp_path)
    assert (cfg.projector.shuffle_version, cfg.projector.downsample) == ("v1", 2)
    assert len(cfg.vision.layers) == cfg.vision.n_layers_total


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {"<IMG_CONTEXT>": "x"}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"393": "<IMG_CONTEXT>"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": 5}),
        ("tokenizer.json", {"added_tokens": [{"content": "<IMG_CONTEXT>"}]}),
    ],
)
def test_added_tokens_of_an_unknown_form(goldens, tmp_path, name, content):
    shutil.copy(goldens / "ckpt/internvl/config.json", tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    refused(f"{name}: does not have the expected content", read_config, tmp_path)


def test_parameters_of_mini_internvl(goldens, tmp_path):
    config = json.loads((goldens / "ckpt/internvl/config.json").read_text())
    config["force_image_size"] = config["vision_config"]["image_size"] = 448
    config["vision_config"] |= {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    }  # fmt: skip
    scaling = {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    config["llm_config"] |= {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32020, "rope_scaling": scaling,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, cfg = read_config(tmp_path)
    assert (cfg.tokens_per_image, cfg.image_token_id) == (256, 32013)
    assert vp.count_params(cfg) == 4_146_855_936
    assert (vp.count_params(cfg, "vision"), vp.count_params(cfg, "projector")) == (304_012_288, 22_034_432)


# what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("internvl", {"vision_config": {"qk_normalization": True}}, "qk_normalization"),
        ("internvl", {"vision_config": {"norm_type": "rms_norm"}}, "norm_type"),
        ("internvl", {"downsample_ratio": 0.3}, "downsample_ratio"),
        ("internvl", {"ps_version": "v3"}, "ps_version"),
        ("internvl", {"force_image_size": 70}, "are not divisible by the downsampling factor"),
        ("internvl", {"llm_config": {"model_type": "internlm2"}}, "internlm2"),
        ("bunny", {"mm_projector_type": "linear"}, "mm_projector_type"),
        ("bunny", {"use_s2": True}, "use_s2"),
        ("bunny", {"mm_hidden_size": 32}, "mm_hidden_size is 32"),
    ],
)
def test_options_that_are_not_computed_are_refused(goldens, tmp_path, name, changes, message):
    shutil.copytree(goldens / "ckpt" / name, tmp_path / name)
    config = json.loads((tmp_path / name / "config.json").read_text())
    nested = {k: {**config[k], **v} if isinstance(v, dict) else v for k, v in changes.items()}
    edit_config(tmp_path / name, **nested)
    refused(message, vp.load, tmp_path / name, vision_dir=goldens / "ckpt/siglip_tower" if name == "bunny" else None)


def test_images_of_a_wrong_size_are_refused(goldens):
    model = vp.load(goldens / "ckpt/internvl")
    inputs = random_ids(model)
    inputs["pixel_values"] = inputs["pixel_values"][..., :42, :42]
    refused(r"\[2, 3, 42, 42\], expected \[images, 3, 56, 56\]", vp.forward, model, **inputs)


def test_native_internvl_ties_unless_told_otherwise(tmp_path):
    config = internvl_config("qwen2")
    del config["tie_word_embeddings"]
    folder = make_vlm_folder(tmp_path / "five", config)
    assert vp.load(folder).cfg.text.tie_embeddings
    assert "language_model.lm_head.weight" not in Checkpoint(folder)
    four = make_vlm_folder(tmp_path / "four", {**config, "transformers_version": "4.57.1"})
    assert not vp.load(four).cfg.text.tie_embeddings
