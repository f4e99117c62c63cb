"""Advice of the guide for a model folder and a target, in words and as a config file."""

from __future__ import annotations

import dataclasses
import json
import keyword
import math
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlmprune_jax.core.checks import one_of
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.errors import UserError, error_context
from vlmprune_jax.core.settings import override
from vlmprune_jax.core.weight_files import DTYPES
from vlmprune_jax.experiment.recipes import recipes
from vlmprune_jax.experiment.spec import Experiment
from vlmprune_jax.families import family_of
from vlmprune_jax.hf.read import read_config, resolve
from vlmprune_jax.models.params import count_params
from vlmprune_jax.planning.advice import expectation_lines, percent, rule_lines, summarize
from vlmprune_jax.planning.case import predict_plan
from vlmprune_jax.planning.guide import Guide, Recommendation, recommend
from vlmprune_jax.prune import PrunePlan
from vlmprune_jax.workdir.speed import Bench, read_bench

UNITS = {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
LARGE_VOCABULARY = 0.15  # share of the parameters from which trimming the vocabulary is advised first
_LARGE = 10**9  # parameters; larger models are loaded in bfloat16


@dataclasses.dataclass(frozen=True)
class Advice:
    """A recommendation for a folder: predicted plans by method, and the text of a config file.

    `bench`: speeds measured on this machine, shown instead of the guide's speeds.
    """

    folder: str
    cfg: ModelConfig
    recommendation: Recommendation
    plans: dict[str, PrunePlan]
    config: str
    bench: Bench | None = None


def parse_bytes(text: str) -> float:
    """Convert 2e9, "2GB" (10**9) or "2GiB" (2**30) to a number of bytes.

    Raises:
      UserError: another form, or not above 0.
    """
    found = re.fullmatch(r"\s*([\d.]+(?:[eE]\+?\d+)?)\s*([a-zA-Z]*)\s*", text)
    try:
        number = float(found[1]) if found else math.nan
    except ValueError:
        number = math.nan
    if found is None or not 0 < number < math.inf:
        raise UserError(f"--bytes={text}: must be a size above 0, such as 2e9, 2GB or 2GiB")
    return number * UNITS[one_of("--bytes: unit", found[2].upper(), tuple(UNITS))]


def parse_share(name: str, text: str) -> float:
    """Convert 5%, 0.05 or "none" (0) to a share.

    Raises:
      UserError: another form.
    """
    number = text.strip().removesuffix("%")
    try:
        return 0.0 if number == "none" else float(number) / (100 if "%" in text else 1)
    except ValueError:
        raise UserError(f"--{name}={text}: must be a share, such as 5% or 0.05") from None


def saved_as(text: str | None) -> Path:
    """Return the path of the config file (default: recommended.py).

    Raises:
      UserError: not the name of a Python file, or the file exists.
    """
    path = Path(text or "recommended.py")
    if path.suffix != ".py" or "\0" in path.name:
        raise UserError(f"--save={text}: must be the name of a config file, such as recommended.py")
    if text and path.exists():
        raise UserError(f"--save={text}: exists already: give another name, or remove it")
    return path


def advise(
    hf_dir: str,
    *,
    vision_dir: str | None = None,
    ratio: float | None = None,
    most_bytes: float | None = None,
    data_fraction: float,
    compute: str,
    speed: bool,
    guide: Guide,
    bench: Path | None = None,
) -> Advice:
    """Return the guide's advice for a model folder or hub id; reads only JSON files of the folder.

    Args:
      hf_dir, vision_dir: see `load`.
      ratio, most_bytes: share of all parameters to remove, or maximum size of the bfloat16 weights; give one.
      data_fraction, compute, speed, guide: see `recommend`.
      bench: what `vlmprune bench --json` wrote, told in place of the guide's speeds.

    Raises:
      UserError: the model or file is missing; none or both targets are given; no plan reaches the target (names the
        nearest); see `recommend`.
    """
    if (ratio is None) == (most_bytes is None):
        raise UserError("give either --ratio=0.3 (share of all parameters to remove) or --bytes=2GB (maximum size)")
    measured = None if bench is None else read_bench(bench)
    folder = resolve(hf_dir)
    _, cfg = read_config(folder, None if vision_dir is None else resolve(vision_dir))
    whole = count_params(cfg) * DTYPES["bfloat16"].itemsize
    target: dict[str, Any] = {"ratio": ratio}
    if most_bytes is not None:
        if most_bytes >= whole:
            raise UserError(
                f"--bytes={most_bytes:,.0f}: the weights need only {whole:,} bytes in bfloat16: no pruning is needed"
            )
        ratio, target = 1 - most_bytes / whole, {"budget": {"disk_bytes": most_bytes}}
    assert ratio is not None
    found = recommend(cfg, ratio=ratio, data_fraction=data_fraction, compute=compute, speed=speed, guide=guide)
    plans = {}
    for method, variant in found.variants.items():
        experiment = override(Experiment(), {"prune": target})
        with error_context(f"--{'ratio' if most_bytes is None else 'bytes'}"):
            plans[method] = predict_plan(override(experiment, variant), cfg)
    model = {"hf_dir": hf_dir, "vision_dir": vision_dir}
    told = found if measured is None else dataclasses.replace(found, speed=())
    return Advice(str(folder), cfg, told, plans, _config_file(found, cfg, model, target), measured)


def as_lines(advice: Advice) -> list[str]:
    """Return the recommendation for this model in words, without its tables."""
    found, cfg = advice.recommendation, advice.cfg
    lines = [
        f"{advice.folder}: {count_params(cfg):,} parameters, the decoder has "
        f"{percent(count_params(cfg, 'text') / count_params(cfg))} of them",
        f"asked: {percent(found.ratio)} of all parameters, {percent(found.decoder_ratio)} of the decoder",
        "",
        *_vocabulary_lines(advice),
        *rule_lines(found),
    ]
    for method, plan in advice.plans.items():
        kept = plan.stacks["text"].layers
        size = plan.parameters_after * DTYPES["bfloat16"].itemsize / 1e9
        lines.append(
            f"  {method}: {len(kept)} of {len(cfg.text.layers)} layers, {plan.parameters_after:,} parameters, "
            f"{size:.3g} GB in bfloat16, {percent(plan.reached)} removed"
        )
    return lines + expectation_lines(found)


def vocabulary_share(cfg: ModelConfig) -> float:
    """Return the share of all parameters in rows of the vocabulary: embedding, output head and its bias."""
    rows = cfg.text.vocab_size
    without = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, vocab_size=1))
    per_row = (count_params(cfg) - count_params(without)) / max(rows - 1, 1)
    return per_row * rows / count_params(cfg)


def _vocabulary_lines(advice: Advice) -> list[str]:
    """Return the advice to trim a large vocabulary first; nothing for a small one."""
    share, rows = vocabulary_share(advice.cfg), advice.cfg.text.vocab_size
    if share <= LARGE_VOCABULARY:
        return []
    return [
        f"first: trim the vocabulary, whose {rows:,} tokens are {percent(share)} of the parameters; texts made of kept "
        "tokens stay the same",
        f"  sizes: vlmprune vocabulary --model={shlex.quote(advice.folder)} --sources=TRAIN.json --sizes=16k,32k,64k",
        "",
    ]


def commands(advice: Advice, config: str) -> list[str]:
    """Return the commands to run for a config file."""
    workdir, config = shlex.quote(f"runs/{Path(config).stem}"), shlex.quote(config)
    run = f"vlmprune run --config={config} --workdir={workdir}"
    if advice.recommendation.rule.recovery == "none":
        return [run]
    return [f"vlmprune plan --config={config} --topology=v5e:8x8 --records=N", run]


def _config_file(found: Recommendation, cfg: ModelConfig, model: dict[str, Any], target: dict[str, Any]) -> str:
    """Return the text of a config file: recipe of the family, model, data and the advised settings."""
    named = family_of(cfg).name
    changes: dict[str, Any] = {"model": {name: value for name, value in model.items() if value is not None}}
    if count_params(cfg) >= _LARGE:
        changes["model"]["dtype"] = "bfloat16"
        changes["mesh"] = {"fsdp": -1}
    changes["data"] = {"fraction": found.data_fraction} if found.data_fraction else {}
    one = next(iter(found.variants.values())) if len(found.variants) == 1 else {}
    changes |= {**one, "prune": {**one.get("prune", {}), **target}}
    what = f"What `vlmprune recommend` advises for {percent(found.ratio)} of all parameters: {summarize(found)}."
    lines = [
        *textwrap.wrap(f'"""{what}', 110),
        "",
        "Give data.train, data.images and data.eval here, or as --config.data.train=FILE.json ...",
        '"""',
        "",
        "from ml_collections import ConfigDict",
        "",
        "from vlmprune_jax.cli.config_files import experiment_config",
        "",
        "",
        "def get_config() -> ConfigDict:",
        '    """Recommended settings, on top of the defaults or of the family\'s recipe."""',
        f"    config = experiment_config({f'recipe={_literal(named)}' if named in recipes() else ''})",
        *(f"    config.{name} = {_literal(value)}" for name, value in _leaves(changes)),
    ]
    if not one:
        lines.append("    config.prune_variants = {")
        for method, settings in found.variants.items():
            inner = [f"            {_literal(section)}: {_literal(value)}," for section, value in settings.items()]
            lines += [f"        {_literal(method)}: {{", *inner, "        },"]
        lines.append("    }")
    return "\n".join([*lines, "    return config", ""])


def _leaves(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield pairs such as ("recover.losses.ce", 0.5) from nested settings; a mapping with other keys is a value."""
    for name, value in values.items():
        if isinstance(value, Mapping) and all(key.isidentifier() and not keyword.iskeyword(key) for key in value):
            yield from _leaves(value, f"{where}{name}.")
        else:
            yield where + name, value


def _literal(value: Any) -> str:
    """Return a JSON value as Python code that evaluates to it and does nothing else."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_literal(name)}: {_literal(one)}' for name, one in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
