"""Share of the vision tower in the FLOPs before the first token, and what removing 30 % of a part then saves at most.

    python benchmarks/tower_share.py

Nothing runs: FLOPs follow from published configs, summed over one question of each of nine benchmarks. The gains assume
that time is proportional to FLOPs. Images are prepared with the limits of benchmarks/plan.py. The last row is the model
of benchmarks/question_time.py, with its prompt of 576 tokens.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from models import MODELS
from plan import DATA, PROCESSORS

from vlmprune_jax.base.settings import override
from vlmprune_jax.core.models.flops import causal_flops, head_of, vision_flops, weight_flops
from vlmprune_jax.io.checkpoints.read import read_config
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.planning.evaluation import BENCHMARKS, Questions, preparation_of, prompt_of

NAMES = {
    "llava": "LLaVA-1.5-7B",
    "internvl3-8b": "InternVL3-8B",
    "qwen3vl": "Qwen3-VL-4B",
    "qwen2.5vl": "Qwen2.5-VL-3B",
    "smolvlm2": "SmolVLM2-2.2B",
    "gemma3": "Gemma-3-4B",
    "smolvlm-256m": "SmolVLM-256M",
}
REMOVED = 0.3  # share of the layers
TIMED: dict[str, Any] = {  # SmolLM2-135M with the tower of the demo, which benchmarks/question_time.py measures
    **MODELS["smolvlm-256m"],
    "scale_factor": 2,
    "vision_config": {
        "model_type": "smolvlm_vision", "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "image_size": 64, "patch_size": 8,
    },
}  # fmt: skip
TILED = {**PROCESSORS["smolvlm-256m"], "size": {"longest_edge": 256}, "max_image_size": {"longest_edge": 64}}
TIMED_PROMPT = 576  # tokens, with an image of 4 x 4 tiles and the overview


def tower_share(
    config: dict[str, Any],
    processor: dict[str, Any] | None,
    data: dict[str, Any],
    questions: Iterable[Questions],
    prompt: int | None = None,
) -> tuple[float, float]:
    """Return the tower's share (with projector) in the FLOPs of tower and prefill, and the mean prompt in tokens.

    `config`, `processor`: content of config.json and preprocessor_config.json. `data`: settings of images. `prompt`:
    tokens of every prompt, image included, instead of those of the questions.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        if processor is not None:
            (Path(folder) / "preprocessor_config.json").write_text(json.dumps(processor))
        _, cfg = read_config(Path(folder), None)
        preparation = preparation_of(override(Experiment(), {"data": data}).data, cfg, Path(folder))
    per_token, head = (weight_flops(cfg, part, (), False) for part in ("text/layers/", head_of(cfg)))
    tower, prefill, lengths = 0, 0, list[int]()
    for question in questions:
        length, image = prompt_of(cfg, preparation, question)
        lengths.append(prompt or length)
        tower += vision_flops(cfg, (), image.slots, image.tokens)
        prefill += lengths[-1] * per_token + head + causal_flops(cfg, lengths[-1])
    return tower / (tower + prefill), sum(lengths) / len(lengths)


def gain(share: float, removed: float = REMOVED) -> float:
    """Return how many times faster tower and prefill are without `removed` of a part with this share of the time."""
    return 1 / (1 - removed * share)


def main() -> None:
    """Print a row per model: share of the tower, and the gains of fewer decoder layers and of fewer tower layers."""
    print("|model|prompt, tokens|share of the tower, %|30 % fewer decoder layers|30 % fewer tower layers|")
    print("|---|---|---|---|---|")
    asked = BENCHMARKS.values()
    shares = {
        title: tower_share(MODELS[name], PROCESSORS.get(name), DATA.get(name, {}), asked)
        for name, title in NAMES.items()
    }
    shares["the timed model"] = tower_share(TIMED, TILED, {}, [Questions(256, 256, 0, 1)], TIMED_PROMPT)
    for title, (share, tokens) in shares.items():
        print(f"|{title}|{tokens:,.0f}|{100 * share:.0f}|{gain(1 - share):.2f}|{gain(share):.2f}|")


if __name__ == "__main__":
    main()
