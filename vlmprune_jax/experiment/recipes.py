"""The reference's recovery of each family: fine-tuning of adapters and projector with hidden-state distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune_jax.checks import suggest
from vlmprune_jax.errors import UserError

_LORA: dict[str, Any] = {
    "name": "sft_l2",
    "trainable": "lora",
    "lora": {"rank": 128, "alpha": 256.0, "dropout": 0.05},
    "losses": {"ce": 0.5, "l2": 0.5, "l2_layers": (-1,), "teacher_inputs": "student"},
    "learning_rate": 2e-4,
    "projector_learning_rate": 2e-5,
    "weight_decay": 0.0,
    "schedule": "cosine",
    "warmup_ratio": 0.03,
    "epochs": 1.0,
    "batch_size": 128,
    "compute_dtype": "bfloat16",
    "remat": "full",
}

# Partial experiments. Sources: VLM/llava/train/train_pruned.py, VLM/bunny/train/train_pruned.py and InternVL's slurm
# scripts. The first two leave rates, batch and (Bunny) schedule and adapters to the command line, which the repository
# has only for InternVL: theirs are those of LLaVA's and Bunny's own LoRA scripts, which they continue. InternVL adapts
# its fused qkv_proj and gate_up_proj and decays every tensor; here each projection has its own adapter, and biases and
# norms do not decay.
RECIPES: dict[str, dict[str, Any]] = {
    "llava": {"data": {"max_length": 2048}, "recover": _LORA},
    "bunny": {"data": {"max_length": 2048}, "recover": _LORA},
    "internvl": {
        "data": {"max_length": 4096},
        "recover": {
            **_LORA,
            "lora": {"rank": 16, "alpha": 32.0, "dropout": 0.05},
            "losses": {**_LORA["losses"], "teacher_inputs": "own"},
            "learning_rate": 4e-5,
            "projector_learning_rate": None,
            "weight_decay": 0.05,
        },
    },
}


def recipe(name: str) -> Mapping[str, Any]:
    """The settings of RECIPES[name], to start a config or a variant from.

    Raises:
      UserError: an unknown name, with the nearest that exists.
    """
    if name not in RECIPES:
        raise UserError(f"no recipe {name!r}{suggest(name, RECIPES)}")
    return RECIPES[name]
