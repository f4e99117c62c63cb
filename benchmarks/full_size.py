"""Loading, pruning and exporting at full size, against `cp` of the same bytes and mergekit, in one run.

    python benchmarks/full_size.py --model=llama --work=/big/disk --mergekit=/path/to/venv/bin/mergekit-yaml
    python benchmarks/full_size.py --folder=DIR/llava-1.5-7b-hf --work=/big/disk

Without --folder it makes a checkpoint with the true shapes of --model (llava 14 GB, bunny 6.4, internvl 8.3,
internvl3.5 9.5, smolvlm2 4.5, qwen3vl 8.9, qwen2.5vl 7.5, gemma3 8.6, gemma4_e4b 15.3 without audio, qwen3vl_moe 62,
or llama 13.5; --layers=12 takes fewer decoder layers) and random finite bfloat16 weights, in shards of 5 GB. Every step
is a process of its own and starts with the source out of the page cache; its wall time includes the start of Python,
and `cp` ends when everything is on the disk. `cat` reads the weights into nothing, `read` into memory that holds them
all, which is the least that a loader does. One JSON line per step, and a last one with the ratios. Needs free disk for
three times the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

STEPS = ("cp_input", "cat", "read", "load", "inspect", "depth", "cp_output", "width", "mergekit")
DEVICES = 8
DROPPED = 5  # of 32 layers; the middle ones, but for one, so that the kept ones are three runs
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
    },
    "llava": {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 32000,
        "projector_hidden_act": "gelu", "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        "torch_dtype": "bfloat16", "pad_token_id": 32001,
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
        },
    },
    "bunny": {
        "architectures": ["BunnyPhiForCausalLM"], "model_type": "bunny-phi", "hidden_size": 2560,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 10240,
        "vocab_size": 50295, "max_position_embeddings": 2048, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.4, "rope_theta": 10000.0, "tie_word_embeddings": False, "qk_layernorm": False,
        "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 1152, "use_mm_proj": True,
        "mm_vision_tower": "google/siglip-so400m-patch14-384", "bos_token_id": 50256, "eos_token_id": 50256,
        "pad_token_id": 50256, "torch_dtype": "bfloat16",
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
            "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
        },
    },
    "internvl": {
        "architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "downsample_ratio": 0.5,
        "ps_version": "v2", "select_layer": -1, "force_image_size": 448, "template": "phi3-chat", "use_thumbnail": True,
        "min_dynamic_patch": 1, "max_dynamic_patch": 12, "torch_dtype": "bfloat16",
        "llm_config": {
            "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": 3072, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 8192, "vocab_size": 32020,
            "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "hidden_act": "silu", "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": False,
            "bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000,
            "rope_scaling": {"type": "su", "short_factor": [1.1] * 48, "long_factor": [32.0] * 48},
        },
        "vision_config": {
            "architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", "hidden_size": 1024,
            "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 448,
            "patch_size": 14, "num_channels": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True,
            "qk_normalization": False, "norm_type": "layer_norm",
        },
    },
    "internvl3.5": {
        "architectures": ["InternVLForConditionalGeneration"], "model_type": "internvl", "image_token_id": 151671,
        "image_seq_length": 256, "downsample_ratio": 0.5, "projector_hidden_act": "gelu", "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
            "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 1000000.0,
            "attention_bias": False, "tie_word_embeddings": False, "eos_token_id": 151645, "pad_token_id": 151643,
        },
        "vision_config": {
            "model_type": "internvl_vision", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True,
        },
    },
    "smolvlm2": {
        "architectures": ["SmolVLMForConditionalGeneration"], "model_type": "smolvlm", "image_token_id": 49190,
        "scale_factor": 3, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
            "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 64, "vocab_size": 49280,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 130000.0,
            "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 49279, "pad_token_id": 2,
        },
        "vision_config": {
            "model_type": "smolvlm_vision", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
            "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
        },
    },
    "qwen3vl": {
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "image_token_id": 151655,
        "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "text_config": {
            "model_type": "qwen3_vl_text", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
            "max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 5000000.0,
            "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
            "attention_bias": False, "tie_word_embeddings": True, "eos_token_id": 151645, "pad_token_id": 151643,
        },
        "vision_config": {
            "model_type": "qwen3_vl", "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
            "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
            "out_hidden_size": 2560, "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17],
            "hidden_act": "gelu_pytorch_tanh",
        },
    },
    "qwen2.5vl": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "image_token_id": 151655,
        "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "hidden_size": 2048, "intermediate_size": 11008,
        "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936,
        "max_position_embeddings": 128000, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "use_sliding_window": False,
        "sliding_window": 32768, "max_window_layers": 36, "eos_token_id": 151645, "pad_token_id": 151643,
        "vision_config": {
            "model_type": "qwen2_5_vl", "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_chans": 3, "window_size": 112,
            "out_hidden_size": 2048, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
            "hidden_act": "silu",
        },
    },
    "gemma3": {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "image_token_index": 262144,
        "boi_token_index": 255999, "eoi_token_index": 256000, "mm_tokens_per_image": 256, "torch_dtype": "bfloat16",
        "eos_token_id": [1, 106],
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
            "sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
            "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 896, "patch_size": 14,
            "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh", "vision_use_head": False,
        },
    },
    "gemma4_e4b": {
        "architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "image_token_id": 258880,
        "boi_token_id": 255999, "eoi_token_id": 258882, "torch_dtype": "bfloat16", "eos_token_id": [1, 106],
        "text_config": {
            "model_type": "gemma4_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 42,
            "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "global_head_dim": 512,
            "vocab_size": 262144, "vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256,
            "num_kv_shared_layers": 18, "sliding_window": 512, "final_logit_softcapping": 30.0,
            "max_position_embeddings": 131072,
        },
        "vision_config": {
            "model_type": "gemma4_vision", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16,
            "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64, "patch_size": 16,
            "pooling_kernel_size": 3, "position_embedding_size": 10240, "use_clipped_linears": True,
        },
    },
}  # fmt: skip
_QWEN35 = {
    "architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "image_token_id": 248056,
    "video_token_id": 248057, "vision_start_token_id": 248053, "vision_end_token_id": 248054,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "qwen3_5_text", "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 248320,
        "max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "hidden_act": "silu", "full_attention_interval": 4,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10],
        },
    },
    "vision_config": {
        "model_type": "qwen3_5", "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
        "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
        "out_hidden_size": 2560, "num_position_embeddings": 2304, "hidden_act": "gelu_pytorch_tanh",
    },
}  # fmt: skip
MODELS["qwen3.5-4b"] = _QWEN35
MODELS["qwen3.5-9b"] = {
    **_QWEN35, "tie_word_embeddings": False,
    "text_config": {
        **_QWEN35["text_config"], "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False,
    },
    "vision_config": {
        **_QWEN35["vision_config"], "depth": 27, "hidden_size": 1152, "intermediate_size": 4304,
        "out_hidden_size": 4096,
    },
}  # fmt: skip
MODELS["llava"]["text_config"] = {**MODELS["llama"], "vocab_size": 32064}
_EXPERTS = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_key_value_heads": 4,
    "tie_word_embeddings": False, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}  # fmt: skip
MODELS["qwen3vl_moe"] = {  # 30B-A3B
    **MODELS["qwen3vl"],
    **{"architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe"},
    "tie_word_embeddings": False,
    "text_config": {**MODELS["qwen3vl"]["text_config"], **_EXPERTS, "model_type": "qwen3_vl_moe_text"},
    "vision_config": {
        **MODELS["qwen3vl"]["vision_config"], "model_type": "qwen3_vl_moe", "depth": 27, "hidden_size": 1152,
        "intermediate_size": 4304, "out_hidden_size": 2048, "deepstack_visual_indexes": [8, 16, 24],
    },
}  # fmt: skip
# Sizes of --tiny, which the tests run.
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4,
    "num_hidden_layers": 8, "vocab_size": 120, "image_size": 28, "force_image_size": 28, "mm_hidden_size": 64,
    "image_token_index": 100, "image_token_id": 100, "pad_token_id": 101, "scale_factor": 2,
    "short_factor": [1.1] * 8, "long_factor": [32.0] * 8,
}  # fmt: skip


def shrink(config: Any) -> Any:
    """A config with the sizes of --tiny."""
    if not isinstance(config, dict):
        return config
    return {key: TINY.get(key, shrink(value)) if value is not None else None for key, value in config.items()}


def make_checkpoint(config: dict[str, Any], folder: Path) -> None:
    """A folder with random weights: bits of numbers below 2, the same 64 MiB again and again from other places."""
    from vlmprune_jax.export.folder import MAX_SHARD_BYTES
    from vlmprune_jax.hf.disk.tensors import Tensor, write_weights
    from vlmprune_jax.hf.layout import make_slots
    from vlmprune_jax.hf.read import read_config

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    family, cfg = read_config(folder)
    if cfg.vision is not None and cfg.family == "llava":  # its files hold the blocks above the feature layer as well
        cfg = cfg.with_layers(cfg.vision.layers[:1] * cfg.vision.n_layers_total, "vision")
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 2**16, 2**25, np.uint16) & np.uint16(0xBFFF)
    shapes = {slot.key: slot.hf_shape for slot in make_slots(cfg, family)}

    def fill(shape: tuple[int, ...]) -> np.ndarray:
        return np.resize(noise[int(draw.integers(0, 2**20)) :], int(np.prod(shape))).view(np.uint8)

    tensors = [
        Tensor(key, "BF16", shape, 2 * int(np.prod(shape)), lambda shape=shape: fill(shape))
        for key, shape in shapes.items()
    ]
    write_weights(tensors, folder, MAX_SHARD_BYTES)


def make_plans(folder: Path, work: Path) -> None:
    """depth.json and width.json for a folder."""
    from vlmprune_jax.hf.lazy import open_model
    from vlmprune_jax.models.params import count_params
    from vlmprune_jax.prune import KeptLayer, KeptStack, PrunePlan, fingerprint
    from vlmprune_jax.prune.width import kept_layer

    model = open_model(folder)
    sizes, draw = [layer.sizes for layer in model.cfg.text.layers], np.random.default_rng(1)
    middle = len(sizes) // 2
    free = [i for i in range(middle, len(sizes)) if i not in model.cfg.text.producers]
    gone = {middle - 3, *free[: DROPPED - 1]}
    depth = [KeptLayer.whole(i, layer) for i, layer in enumerate(model.cfg.text.layers) if i not in gone]
    width = []
    for i, axes in enumerate(sizes):
        root = model.cfg.text.layers[i].channel.root  # neurons or experts
        shares, heads, units = bool(model.cfg.text.producers), axes["kv_heads"], axes[root]
        order = np.arange(heads) if shares else draw.permutation(heads)
        kept = {
            "kv_heads": np.sort(order[: max(1, heads * 3 // 4)]),
            root: np.sort(draw.permutation(units)[: units * 3 // 4]),
        }
        width.append(kept_layer(i, kept, model.cfg.text.layers[i]))
    mark, before = fingerprint(model), count_params(model.cfg)
    for name, layers in (("depth", depth), ("width", width)):
        stack = KeptStack(tuple(sizes), tuple(layers))
        after = count_params(model.cfg.with_layers(stack.of(model.cfg.text.layers)))
        plan = PrunePlan(mark, name, "benchmark", {"text": stack}, before, after, before)
        plan.to_json(work / f"{name}.json")


def child(args: argparse.Namespace) -> None:
    """Run our side in a process of its own: a child's peak memory is at least its parent's, which stays small so."""
    step, folder, work = args.child, args.folder, args.work
    if step == "make":
        config = MODELS[args.model]
        if args.layers:
            config = {**config, "text_config": {**config["text_config"], "num_hidden_layers": args.layers}}
        make_checkpoint(shrink(config) if args.tiny else config, folder)
        return
    if step == "plan":
        make_plans(folder, work)
        return
    if step == "read":
        held = [np.fromfile(path, np.uint8) for path in sorted(folder.glob("*.safetensors"))]
        assert sum(array.nbytes for array in held)
        return
    import vlmprune_jax as vp

    if step == "load":
        import jax

        from vlmprune_jax.distributed.mesh import make_mesh

        model = vp.load(folder, dtype="bfloat16", mesh=make_mesh(1, DEVICES, 1))
        jax.block_until_ready(model.params)
    elif step == "inspect":
        from vlmprune_jax.cli.main import main

        sys.exit(main(["inspect", str(folder)]))
    else:
        vp.prune_folder(folder, vp.PrunePlan.from_json(work / f"{step}.json"), work / step)


def own(args: argparse.Namespace, step: str, folder: Path, work: Path) -> list[str]:
    """Command line of one of our steps."""
    options = [
        f"--model={args.model}",
        f"--layers={args.layers}",
        f"--folder={folder}",
        f"--work={work}",
        *["--tiny"] * args.tiny,
    ]
    return [sys.executable, __file__, *options, f"--child={step}"]


def commands(args: argparse.Namespace, folder: Path, work: Path) -> dict[str, list[str]]:
    """Step -> command line."""
    copy = 'cp -r "$0" "$1" && sync -f "$1" && for f in "$1"/*; do sync "$f"; done'
    found = {
        "cp_input": ["sh", "-c", copy, str(folder), str(work / "cp_input")],
        "cat": ["sh", "-c", 'cat "$0"/*.safetensors > /dev/null', str(folder)],
        "cp_output": ["sh", "-c", copy, str(work / "depth"), str(work / "cp_output")],
    }
    found |= {step: own(args, step, folder, work) for step in ("read", "load", "inspect", "depth", "width")}
    vision = "vision_config" in json.loads((folder / "config.json").read_text())
    if args.mergekit and not vision:  # mergekit slices decoders only
        import vlmprune_jax as vp

        kept = vp.PrunePlan.from_json(work / "depth.json").kept_layers
        starts = [i for i in range(len(kept)) if i == 0 or kept[i] != kept[i - 1] + 1]
        ends = [*starts[1:], len(kept)]
        slices = [
            {"sources": [{"model": str(folder), "layer_range": [kept[a], kept[b - 1] + 1]}]}
            for a, b in zip(starts, ends, strict=True)
        ]
        recipe = work / "mergekit.yml"  # JSON is YAML
        recipe.write_text(json.dumps({"slices": slices, "merge_method": "passthrough", "dtype": "bfloat16"}))
        options = ["--lazy-unpickle", "--no-copy-tokenizer", "--out-shard-size=5B"]
        found["mergekit"] = [args.mergekit, str(recipe), str(work / "mergekit"), *options]
    return {step: found[step] for step in STEPS if step in found}


def measure(command: list[str], folder: Path) -> dict[str, float]:
    """Wall and processor seconds and peak resident GiB of a command that starts with `folder` out of the page cache."""
    for path in folder.iterdir():
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{said[-3000:]}")
    processor = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu_seconds": processor, "peak_rss_gib": usage.ru_maxrss / 2**20}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def ratios(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """The bars of the design, as far as their steps ran."""
    seconds, result = {step: one["seconds"] for step, one in found.items()}, {}
    if {"depth", "cp_input", "cp_output"} <= set(seconds):
        copies = seconds["cp_input"] + seconds["cp_output"]
        result["depth_to_cp_of_input_and_output"] = seconds["depth"] / copies
    for base in ("read", "cat"):
        if {"load", base} <= set(seconds):
            result[f"load_to_{base}"] = seconds["load"] / seconds[base]
    if {"depth", "mergekit"} <= set(seconds):
        result["depth_to_mergekit"] = seconds["depth"] / seconds["mergekit"]
        result["depth_rss_to_mergekit"] = found["depth"]["peak_rss_gib"] / found["mergekit"]["peak_rss_gib"]
    return {name: round(value, 3) for name, value in result.items()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="llama")
    parser.add_argument("--folder", type=Path, help="an existing folder instead of a random one")
    parser.add_argument("--work", type=Path, required=True, help="where to write; what is made there is removed")
    parser.add_argument("--mergekit", help="path of mergekit-yaml, for decoders; without it that step is left out")
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the benchmark itself")
    parser.add_argument("--keep", action="store_true", help="leave the random checkpoint in --work")
    parser.add_argument("--child", choices=(*STEPS, "make", "plan"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure every step that was asked for."""
    args = arguments()
    if args.child:
        child(args)
        return
    name = args.folder.name if args.folder else f"{args.model}{'_tiny' if args.tiny else ''}"
    folder = (args.folder or args.work / name).resolve()
    work = args.work.resolve() / f"{name}_results"
    shutil.rmtree(work, ignore_errors=True)  # of a run that failed
    work.mkdir(parents=True)
    try:
        if not folder.exists():
            subprocess.run(own(args, "make", folder, work), check=True)
        subprocess.run(own(args, "plan", folder, work), check=True)
        run(args, name, folder, work)
    finally:
        shutil.rmtree(work)
    if not args.folder and not args.keep:
        shutil.rmtree(folder)


def run(args: argparse.Namespace, name: str, folder: Path, work: Path) -> None:
    """All steps in order, a line each, and the ratios."""
    found = {}
    for step, command in commands(args, folder, work).items():
        if step not in args.steps.split(","):
            continue
        found[step] = measure(command, folder)
        line: dict[str, Any] = {"model": name, "step": step, "input_bytes": size_of(folder)}
        line |= {key: round(value, 3) for key, value in found[step].items()}
        if (work / step).is_dir():
            line["output_bytes"] = size_of(work / step)
            if step != "depth":  # which is copied next
                shutil.rmtree(work / step)
        print(json.dumps(line), flush=True)
    load = f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(json.dumps({"model": name, "step": "ratios", **ratios(found), "load_average": load}), flush=True)


if __name__ == "__main__":
    main()
