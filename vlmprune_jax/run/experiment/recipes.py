"""Starting points of a config: shipped configs, recipes (the reference's recovery of each family), the paper's cuts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmprune_jax.base.checks import fraction, one_of, suggest
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.families import FAMILIES

# Nominal ratio in the paper's tables -> number of layers (of 32) that its code removes: for 15 %, this is 12 to 14 % of
# the whole model, and so on.
PAPER_LAYERS = {0.15: 5, 0.3: 10, 0.45: 15, 0.6: 20}

# Last word of a variant -> settings of the section `export`.
EXPORTS = {"bf16": {}, "w4a16": {"quantize": "w4a16"}, "gguf": {"format": "gguf", "quantize": "q4_0"}}

YAML = (".yaml", ".yml")  # file extensions of YAML configs


def shipped_configs() -> dict[str, Path]:
    """Return {name: file} of the config files bundled with vlmprune, such as `demo` and `sweeps/demo_cut`.

    These files are in the installed package, and in a checkout beside the package.
    """
    package = Path(__file__).parents[2]
    folder = package / "configs"
    folder = folder if folder.is_dir() else package.parent / "configs"
    files = [*sorted(folder.glob("*.py")), *sorted(folder.glob("sweeps/*.py"))]
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def locate(config: str) -> str:
    """Return the path of a config file, or FILE.py:VARIANT for the name of a bundled config (NAME or NAME:VARIANT)."""
    if config.endswith((".py", *YAML)) or ".py:" in config or (os.path.lexists(config) and not os.path.isdir(config)):
        return config
    name, colon, variant = config.partition(":")
    known = shipped_configs()
    if name not in known:
        raise UserError(f"--config={config}: no such file, and no shipped config of this name{suggest(name, known)}")
    return f"{known[name]}{colon}{variant}"


def file_of(config: str) -> Path:
    """Return the path of the file in a config argument, such as FILE.py:VARIANT."""
    file, mark, _ = config.partition(".py:")
    return Path(f"{file}.py" if mark else config)


def recipes() -> dict[str, Mapping[str, Any]]:
    """Return {family name: recipe} of all families with a recipe (a partial experiment)."""
    return {family.name: family.recipe for family in FAMILIES.values() if family.recipe is not None}


def recipe(name: str) -> Mapping[str, Any]:
    """Return a recipe's settings as a nested mapping, the starting point of a config or variant."""
    known = recipes()
    if name not in known:
        raise UserError(f"no recipe {name!r}{suggest(name, known)}")
    return known[name]


def paper_cut(
    variant: str,
    *,
    attn_layers: tuple[int, int] = (3, 31),
    mlp_layers: tuple[int, int] = (4, 30),
    longest_text: int = 128,
) -> dict[str, dict[str, Any]]:
    """Return {section: settings} for a variant METHOD,TARGET[,OPTION...] such as "depth,0.3", with the paper's choices.

    "depth,0.3" removes layers by Block Influence on 50 records. The ratios in the paper's tables stand for numbers of
    layers (`PAPER_LAYERS`), other ratios for shares of the whole model; "depth,5layers" sets the number. "width,0.3"
    removes this share of the whole model by first-order Taylor importance on 10 records. The first and last layers are
    not pruned, except with the option "uniform", whose result stock transformers can load. The ranges in the
    reference's example script, [3, 21) and [3, 20), cannot reach the published 60 %; these ranges can. The option
    "reconstruct" adds reconstruction before the recovery.

    Args:
      attn_layers: layers that lose heads, as a half-open range of 32 layers.
      mlp_layers: layers that lose neurons, likewise.
      longest_text: maximum tokens of a calibration record for Taylor.

    Raises UserError for another form, an unknown method or option, or a ratio outside of 0 to 1.
    """
    method, target, *options = variant.split(",") if "," in variant else (variant, "")
    one_of("method of the variant", method, ("depth", "width"))
    known = ("reconstruct", *(("uniform",) if method == "width" else ()))
    for option in options:
        one_of("option of the variant", option, known)
    goal = _target(variant, method, target)
    sections = {"reconstruct": {"method": "least_squares"}} if "reconstruct" in options else {}
    if method == "depth":
        return {"score": {"samples": 50, "batch_size": 1}, "prune": {"method": "depth", **goal}, **sections}
    ranges = {} if "uniform" in options else {"attn_layers": attn_layers, "mlp_layers": mlp_layers}
    return {
        "score": {"reduction": "sum", "longest_text": longest_text, "samples": 10, "batch_size": 10},
        "prune": {"method": "width", "heads": "proportional", **goal, **ranges},
        **sections,
    }


def vocabulary_cut(
    variant: str, cuts: Mapping[str, Mapping[str, Any]], ratio: float = 0.3
) -> dict[str, dict[str, Any]]:
    """Return {section: settings} for a variant METHOD,RATIO,EXPORT: 65,536 tokens are kept, then METHOD's cut follows.

    Least squares repairs the kept weights, then SFT and KL distillation train on 5 % of the data.

    Args:
      cuts: {method: settings of the section `prune`}; the method "vocabulary" trims tokens alone.
      ratio: share of all parameters to remove if the variant has none.

    Raises UserError for an unknown method, or a ratio outside of 0 to 1.
    """
    method, *options = variant.split(",")
    one_of("method of the variant", method, ("vocabulary", *cuts))
    export = options.pop() if options and options[-1] in EXPORTS else "bf16"
    sections: dict[str, dict[str, Any]] = {
        "data": {"fraction": 0.05, "max_length": 2048, "length_buckets": (768, 1024, 1536, 2048)},
        "prune": {"vocabulary": {"size": 65536, "multiple": 128}},
        "score": {"samples": 64},
        "recover": {
            "name": "sft_kl",
            "losses": {"ce": 0.5, "kl": 0.5, "l2": 0.0, "teacher_inputs": "own"},
            "accumulation": 2,  # one row of 2,048 tokens per chip on 64 chips
        },
        "export": EXPORTS[export],
    }
    if method != "vocabulary":
        target = fraction("ratio of the variant", float(options[0] if options else ratio))
        sections["prune"] |= {**cuts[method], "ratio": target}
        sections["reconstruct"] = {"method": "least_squares"}
    return sections


def _target(variant: str, method: str, target: str) -> dict[str, Any]:
    layers = target.removesuffix("layers")
    if method == "depth" and layers != target and layers.isascii() and layers.isdecimal():
        return {"layers_removed": int(layers)}
    try:
        ratio = fraction("ratio of the variant", float(target))
    except ValueError:
        raise UserError(
            f"variant {variant!r} must be METHOD,TARGET, as depth,0.3, depth,5layers or width,0.45"
        ) from None
    return {"layers_removed": PAPER_LAYERS[ratio]} if method == "depth" and ratio in PAPER_LAYERS else {"ratio": ratio}
