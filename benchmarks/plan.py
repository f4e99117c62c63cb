"""Results of `vlmprune plan` for the real families at full size, one JSON line per case.

    python benchmarks/plan.py --topology=v5e:8x8 [--remat=dots] [--cases=llava/depth15,bunny/width30]
    python benchmarks/plan.py --cases=qwen3vl_moe/experts96,qwen3vl_moe/routers96

LoRA of rank 128 on every projection, 0.5 cross-entropy + 0.5 hidden-state L2 against the unpruned teacher, full remat,
global batch 64 x 1,024 tokens and one image (InternVL: 4,096 tokens and 13 tiles; InternVL3.5-4B: 2,048 and 7;
SmolVLM2-2.2B: 2,048 and 17 sub-images; Qwen3-VL-4B and Qwen2.5-VL-3B: 2,048, images of up to 1,280; Gemma:
2,048). expertsN keeps N experts of every layer, with LoRA on attention and projector; routersN trains routers
alone. depthN removes N % of all parameters by layers, widthN by heads of layers 3-30 and neurons of layers 4-29
(SmolVLM2: 3-20, 4-19), which leaves five runs of equal layers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from models import MODELS

FAMILIES = (
    "llava", "bunny", "internvl", "internvl3.5", "smolvlm2", "qwen3vl", "qwen2.5vl", "qwen3.5-4b", "qwen3.5-9b",
    "gemma3", "gemma4_e4b",
)  # fmt: skip
KINDS = ("depth15", "depth30", "width30")
SETTINGS = {
    "recover": {
        "batch_size": 64,
        "compute_dtype": "bfloat16",
        "remat": "full",
        "losses": {"ce": 0.5, "l2": 0.5},
    },
    "mesh": {"fsdp": -1},
}
DATA = {
    "internvl": {"max_length": 4096, "max_tiles": 12, "thumbnail": True},
    "internvl3.5": {"max_length": 2048, "max_tiles": 6},
    "internvl3-8b": {"max_length": 2048, "max_tiles": 6},
    "smolvlm2": {"max_length": 2048},
    "smolvlm-256m": {"max_length": 2048},
    "qwen3vl": {"max_length": 2048, "max_image_tokens": 1280},
    "qwen2.5vl": {"max_length": 2048, "max_image_tokens": 1280},
    "qwen3.5-4b": {"max_length": 2048, "max_image_tokens": 1280},
    "qwen3.5-9b": {"max_length": 2048, "max_image_tokens": 1280},
    "gemma3": {"max_length": 2048},
    "gemma4_e4b": {"max_length": 2048},
}
MIXTURES = {"qwen3vl_moe": "qwen3vl", "internvl3.5_moe": "internvl3.5", "gemma4_moe": "gemma4_e4b"}  # dense sibling
PROCESSORS: dict[str, dict[str, Any]] = {
    "internvl3.5": {"image_processor_type": "GotOcr2ImageProcessor", "size": {"height": 448, "width": 448}},
    "smolvlm2": {
        "image_processor_type": "SmolVLMImageProcessor",
        "size": {"longest_edge": 1536},
        "max_image_size": {"longest_edge": 384},
    },
    "qwen3vl": {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    "qwen2.5vl": {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "gemma3": {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 896, "width": 896}},
    "gemma4_e4b": {
        "image_processor_type": "Gemma4ImageProcessor",
        "max_soft_tokens": 280,
        "patch_size": 16,
        "pooling_kernel_size": 3,
    },
}
PROCESSORS |= dict.fromkeys(("qwen3.5-4b", "qwen3.5-9b"), PROCESSORS["qwen3vl"])
PROCESSORS |= dict.fromkeys(("internvl3-8b", "internvl3-2b"), PROCESSORS["internvl3.5"])
PROCESSORS["qwen3vl-2b"] = PROCESSORS["qwen3vl"]
PROCESSORS["smolvlm-256m"] = {
    **PROCESSORS["smolvlm2"],
    "size": {"longest_edge": 2048},
    "max_image_size": {"longest_edge": 512},
}
for mixture, dense in MIXTURES.items():
    DATA[mixture], PROCESSORS[mixture] = DATA[dense], PROCESSORS[dense]
ATTENTION = {"lora": {"targets": ("q_proj", "k_proj", "v_proj", "o_proj")}}
RANGES = {"attn_layers": (3, 31), "mlp_layers": (4, 30)}
SMALL_RANGES = {"attn_layers": (3, 21), "mlp_layers": (4, 20)}  # of 24 layers


def main() -> None:
    """Plan every case by `vlmprune plan`, and print one JSON line per case."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from vlmprune_jax.base.settings import override
    from vlmprune_jax.io.checkpoints.read import read_config
    from vlmprune_jax.run.experiment.spec import Experiment
    from vlmprune_jax.run.planning.ahead_of_time import make_slice
    from vlmprune_jax.run.planning.case import estimate, make_case, predict_plan
    from vlmprune_jax.run.workdir.artefact import to_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:8x8")
    parser.add_argument("--remat", default=SETTINGS["recover"]["remat"])
    parser.add_argument("--cases", default=",".join(f"{family}/{kind}" for family in FAMILIES for kind in KINDS))
    args = parser.parse_args()
    for case in args.cases.split(","):
        family, _, kind = case.partition("/")
        method, count = kind.rstrip("0123456789"), int(kind.lstrip("abcdefghijklmnopqrstuvwxyz") or 0)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(MODELS[family]))
            if family in PROCESSORS:
                (Path(folder) / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[family]))
            ranges = SMALL_RANGES if family == "smolvlm2" else RANGES
            changes = {
                "model": {"hf_dir": folder, "dtype": "bfloat16"},
                "data": DATA.get(family, {"max_length": 1024}),
                "prune": {"method": method, "ratio": count / 100, **(ranges if method == "width" else {})},
                "recover": {"remat": args.remat},
            }
            if method in ("experts", "routers"):
                changes["prune"] = {"method": "experts", "experts": count}
                changes["recover"] |= ATTENTION if method == "experts" else {"trainable": "routers"}
            experiment = override(override(Experiment(), SETTINGS), changes)
            started = time.process_time()
            _, cfg = read_config(Path(folder), None)
            plan, target = predict_plan(experiment, cfg), make_slice(args.topology)
            step = estimate(make_case(experiment, cfg, plan, target))
        print(json.dumps({"case": case, "cpu_seconds": time.process_time() - started, **to_json(step)}), flush=True)


if __name__ == "__main__":
    main()
