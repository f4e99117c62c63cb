"""Vision-language folders of every decoder and tower: byte for byte there and back, and the logits of stock torch."""

import json
import shutil

import numpy as np
import pytest
from hf_cases import (
    assert_equal,
    assert_same_tensors,
    edit_weights,
    keep_layers,
    keep_width,
    make_vlm_folder,
    random_ids,
    transformers_5,
)
from refusal import refused
from vlm_cases import TEXTS, TOWERS, internvl_chat_config, internvl_config, llava_config

import vlmprune_jax as vp
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


PRUNED = {
    "whole": lambda model: keep_layers(model, range(len(model.cfg.text.layers))),
    "depth": lambda model: keep_layers(model, [0, 2, 4]),
    "width": lambda model: keep_width(model, [0, 2, 3, 5, 7], range(4, 60)),
    "uneven": lambda model: keep_width(model, [1, 6], range(0, 70, 2), only=[1, 3]),
}


@pytest.mark.parametrize("how", PRUNED)
@pytest.mark.parametrize("name", ["bunny", "internvl"])
def test_golden_there_and_back(goldens, tmp_path, name, how):
    """In the hub's layout: fused tensors of other widths, and a tower whose unused tensors come along."""
    source, tower = goldens / "ckpt" / name, goldens / "ckpt/siglip_tower" if name == "bunny" else None
    pruned, _ = PRUNED[how](vp.load(source, vision_dir=tower))
    vp.save(pruned, tmp_path / "out", source_dir=source, dtype="source")
    again = vp.load(tmp_path / "out", vision_dir=tower)
    assert again.cfg == pruned.cfg
    assert_equal(again, pruned)
    if how == "whole":
        assert_same_tensors(source, tmp_path / "out")
    before, after = Checkpoint(source), Checkpoint(tmp_path / "out")
    unchanged = [key for key in before if "vision" in key]
    assert any(".encoder.layers.2." in key for key in unchanged)
    for key in unchanged:
        assert before.entries[key].raw().tobytes() == after.entries[key].raw().tobytes(), key
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert new["model_type"] == old["model_type"]
    assert how != "whole" or survives(new, old)
    if name == "internvl":
        assert new["llm_config"]["rope_scaling"] == old["llm_config"]["rope_scaling"]
        assert new["llm_config"]["model_type"] == "phi3"


def test_another_spelling_of_the_keys(tmp_path):
    """As in the memory of transformers; LLaVA's and Gemma 3's are in tests/io/exports/test_write.py."""
    source = make_vlm_folder(tmp_path / "source", CONFIGS["internvl-phi3"])
    other = shutil.copytree(source, tmp_path / "other")
    edit_weights(other, lambda tensors: {transformers_5(key): value for key, value in tensors.items()})
    assert set(Checkpoint(other)).isdisjoint(key for key in Checkpoint(source) if "lm_head" not in key)
    model = vp.load(other)
    assert_equal(model, vp.load(source))
    vp.save(model, tmp_path / "out", source_dir=other, dtype="source")
    assert_same_tensors(other, tmp_path / "out")


# towers of Bunny -----------------------------------------------------------------------------------------------------


def test_bunny_takes_the_tower_of_its_own_folder(goldens, tmp_path):
    """As the reference, which drops the tower in the checkpoint: what is in `vision_dir` counts, if it has weights."""
    bunny, tower = goldens / "ckpt/bunny", tmp_path / "tower"
    shutil.copytree(goldens / "ckpt/siglip_tower", tower)
    expected = vp.load(bunny, vision_dir=tower)
    key = "vision_model.embeddings.position_embedding.weight"
    edit_weights(tower, lambda tensors: {**tensors, key: tensors[key] + 1})
    moved = vp.load(bunny, vision_dir=tower)
    tables = [np.asarray(model.params["vision"]["position_embedding"]["weight"]) for model in (expected, moved)]
    np.testing.assert_allclose(tables[1], tables[0] + 1, rtol=1e-6)
    (tower / "model.safetensors").unlink()  # the config describes the tower that the checkpoint holds
    assert_equal(vp.load(bunny, vision_dir=tower), expected)
    fact = r"google/siglip-so400m-patch14-384.*set vision_dir .--config.model.vision_dir. to the tower's folder"
    refused(fact, vp.load, bunny)


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


NO_TOKENS = "does not have the expected content"
REFUSED = [
    ("internvl", "config", "vision_config.qk_normalization", True, "qk_normalization"),
    ("internvl", "config", "vision_config.norm_type", "rms_norm", "norm_type"),
    ("internvl", "config", "downsample_ratio", 5e-324, "downsample_ratio.*expected a number above 0"),
    ("internvl", "config", "downsample_ratio", 0.3, "downsample_ratio.*1 divided by an integer"),
    ("internvl", "config", "downsample_ratio", 2.0, "downsample_ratio.*1 divided by an"),
    ("internvl", "config", "ps_version", "v3", "ps_version"),
    ("internvl", "config", "force_image_size", 70, "are not divisible by the downsampling factor"),
    ("internvl", "config", "llm_config.model_type", "internlm2", "internlm2"),
    ("internvl", "added_tokens", "<IMG_CONTEXT>", "x", NO_TOKENS),
    ("internvl", "tokenizer_config", "added_tokens_decoder", {"393": "<IMG_CONTEXT>"}, NO_TOKENS),
    ("internvl", "tokenizer_config", "added_tokens_decoder", 5, NO_TOKENS),
    ("internvl", "tokenizer", "added_tokens", [{"content": "<IMG_CONTEXT>"}], NO_TOKENS),
    ("bunny", "config", "mm_projector_type", "linear", "mm_projector_type"),
    ("bunny", "config", "use_s2", True, "use_s2"),
    ("bunny", "config", "mm_hidden_size", 32, "mm_hidden_size is 32"),
]


@pytest.mark.parametrize(("name", "file", "field", "value", "fact"), REFUSED)
def test_options_that_are_not_computed(goldens, tmp_path, name, file, field, value, fact):
    shutil.copy(goldens / "ckpt" / name / "config.json", tmp_path)
    path, (*section, field) = tmp_path / f"{file}.json", field.split(".")
    content = json.loads(path.read_text()) if path.exists() else {}
    (content[section[0]] if section else content)[field] = value
    path.write_text(json.dumps(content))
    tower = goldens / "ckpt/siglip_tower" if name == "bunny" else None
    refused(f"{path.name}: .*{fact}", read_config, tmp_path, tower)


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
