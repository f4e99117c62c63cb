"""Configs and files of families that are refused in one line: a table of damage and of the fact that is said."""

import json
import shutil

import numpy as np
import pytest
from hf_cases import LFM2_VL, edit_weights, make_folder
from refusal import refused

import vlmprune_jax as vp

# family, section of config.json, fields that change in it, fact
CONFIGS = [
    ("qwen3_5", "text_config", {"layer_types": ["full_attention"] * 4}, "_layers is 5 but layer_types lists 4 layers"),
    ("qwen3_5", "text_config", {"layer_types": ["mamba"] * 5}, r"layer_types \['mamba'\] are not supported"),
    ("qwen3_5", "text_config", {"layer_types": ["linear_attention"] * 5}, "layer_types has no full_attention"),
    ("qwen3_5", "text_config", {"hidden_act": "gelu"}, r"hidden_act 'gelu' is not supported \(delta nets: silu\)"),
    ("qwen3_5", "text_config", {"linear_num_value_heads": 7}, "7 delta-net heads are not divisible by 3 delta-net g"),
    ("lfm2_vl", "text_config", {"full_attn_idxs": []}, "layer_types has no full_attention"),
    ("lfm2_vl", "text_config", {"conv_bias": True}, "conv_bias true is not supported"),
    ("lfm2_vl", "text_config", {"norm_eps": float("inf")}, "text_config.norm_eps is inf, expected a number"),
    ("lfm2_vl", "text_config", {"block_multiple_of": 0}, "block_multiple_of is 0, expected a whole number above 0"),
    ("lfm2_vl", None, {"projector_hidden_size": -1}, "projector_hidden_size is -1, expected a whole number above"),
    ("smolvlm", None, {"scale_factor": 3}, "are not divisible by the downsampling factor 3"),
    ("qwen3_vl", "vision_config", {"deepstack_visual_indexes": [0, 4]}, r"\[0, 4\] must be ascending .* 0 to 3"),
    ("qwen3_vl", "text_config", {"num_hidden_layers": 1}, "has 1 layers, but the vision tower has features"),
    ("qwen3_vl", "vision_config", {"num_position_embeddings": 24}, "24 is not the square"),
    ("qwen3_vl", "vision_config", {"out_hidden_size": 40}, r"40 must be the decoder's hidden_size \(44\)"),
    ("qwen3_vl", "vision_config", {"num_heads": 16}, "head_dim 2 must be a multiple of 4"),
    ("qwen3_vl", "text_config", {"rope_parameters": {"mrope_section": [5, 3, 3]}}, "must .* sum to 10"),
    ("qwen2_5_vl", "vision_config", {"window_size": 9}, "window_size 9 must be at least"),
    ("qwen2_5_vl", "vision_config", {"fullatt_block_indexes": [1, 7]}, r"\[1, 7\] must be layer numbers .* 0 to 3"),
    ("qwen2_5_vl", "text_config", {"rope_parameters": {"type": "yarn", "mrope_section": [1, 2, 3]}}, "yarn rope"),
    ("gemma4", "text_config", {"per_layer_config": {"1": {"head_dim": 20}}}, "out of date.*layer 1"),
    ("qwen3_vl_moe", "text_config", {"num_experts": 6}, r"layers\.0\.\S+ has shape \[8, .*\], config\.json says \[6, "),
    ("qwen3_vl_moe", "text_config", {"num_experts": 1}, "has 1 experts, but every token uses 2: keep at least 2"),
    ("qwen3_vl_moe", "text_config", {"num_local_experts": 6}, "num_experts is 8 but num_local_experts is 6"),
    ("qwen3_vl_moe", "text_config", {"num_experts": 10**9}, "num_experts is 1000000000, expected .* 1 to 4096"),
    ("qwen3_vl_moe", "text_config", {"moe_intermediate_size": 14}, r"has shape \[8, 28, 24\]"),
    ("gemma4_moe", "text_config", {"num_experts": None}, "num_experts is missing: set num_experts"),
    ("internvl_moe", "text_config", {"num_experts": 8}, r"missing key \S+layers\.0\.mlp\.experts\.7\.gate_proj"),
    ("internvl_moe", "text_config", {"num_experts": 6}, r"unknown key \S+experts\.6"),
    ("internvl_moe", "text_config", {"num_experts": 4096, "num_hidden_layers": 1000, "layer_types": None},
     "1000 layers have 4,096 experts each, more than any model .131,072 in all.: correct"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "section", "changes", "fact"), CONFIGS)
def test_configs(goldens, tmp_path, family, section, changes, fact):
    if family == "lfm2_vl":
        folder = make_folder(tmp_path / "model", LFM2_VL)
    else:
        folder = shutil.copytree(goldens / "families" / family / "ckpt", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    inner = config if section is None else config[section]
    inner |= {k: {**inner[k], **v} if k == "per_layer_config" else v for k, v in changes.items()}
    (folder / "config.json").write_text(json.dumps(config))
    refused(fact, vp.load, folder)


@pytest.mark.parametrize(
    ("end", "edit", "fact"),
    [
        ("down_proj", lambda x: x[:7], r"layers\.2\.\S+down_proj has shape \[7, 12, 28\]"),
        ("up_proj", lambda x: np.where(x == x[5, 3, 2], np.nan, x), r"layers\.2\.\S+gate_up_proj\[5\] has 1 NaN"),
    ],
)
def test_tensors_of_experts(goldens, tmp_path, end, edit, fact):
    folder = shutil.copytree(goldens / "families/qwen3_vl_moe/ckpt", tmp_path / "model")

    def damage(held):
        key = next(key for key in held if "layers.2." in key and key.endswith(end))
        held[key] = edit(held[key]).astype(held[key].dtype)

    edit_weights(folder, damage)
    refused(fact, vp.load, folder)


PATCHES = "returns patches of {} values, {} per side of a token"


@pytest.mark.parametrize(
    ("family", "video", "fact"),
    [
        ("qwen3_vl", {"patch_size": 8}, PATCHES.format(384, 2) + ", but .* takes patches of 96"),
        ("qwen3_vl", {"merge_size": 4}, PATCHES.format(96, 4) + ", but the vision tower"),
        ("qwen3_vl", {"do_sample_frames": False}, "processor_config.json: do_sample_frames false .* is not supported"),
        ("gemma4", {"pooling_kernel_size": 2}, PATCHES.format(12, 2)),
        ("gemma4", {"max_soft_tokens": 71}, "max_soft_tokens 71 is not one of 70, 140, 280, 560, 1120: restore"),
        ("smolvlm", {"max_image_size": {"longest_edge": 48}}, "returns 48 x 48 pixels, but .* takes 24 x 24"),
        ("qwen2_5_vl", {"min_pixels": 2**27, "max_pixels": 2**27}, "a quarter of data.max_video_pixels=500,000,000"),
    ],
)
def test_video_processors(goldens, tmp_path, family, video, fact):
    """Settings of the file that stock reads are read, and refused with the tower's size or before a frame is made."""
    golden = goldens / "video" / family
    folder = shutil.copytree(golden / "ckpt", tmp_path / "model")
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["video_processor"] |= video
    (folder / "processor_config.json").write_text(json.dumps(settings))
    case = json.loads((golden / "golden.json").read_text())["cases"]["single"]
    refused(fact, vp.batches, folder, [case["record"]], images=goldens / "video/clips", **case["setting"])
