"""A model's folder and a wish -> what the guide advises, in words, and a config file that does it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlmprune_jax.checks import one_of
from vlmprune_jax.config import ModelConfig
from vlmprune_jax.errors import UserError, about
from vlmprune_jax.experiment.recipes import recipes
from vlmprune_jax.experiment.spec import Experiment, override
from vlmprune_jax.families import family_of
from vlmprune_jax.hf.disk.dtypes import DTYPES
from vlmprune_jax.hf.read import read_config, resolve
from vlmprune_jax.models.params import count_params
from vlmprune_jax.prune import PrunePlan
from vlmprune_jax.report.guide import Evidence, Guide, Recommendation, recommend
from vlmprune_jax.stages.console import Reporter
from vlmprune_jax.stages.ledger import write_text
from vlmprune_jax.stages.tpu_fit import predict_plan

UNITS = {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_LARGE = 10**9  # parameters, from which weights are held in bfloat16


@dataclasses.dataclass(frozen=True)
class Advice:
    """A recommendation for a folder: the plans it leads to, by method, and the text of a config file."""

    folder: str
    cfg: ModelConfig
    recommendation: Recommendation
    guide: Guide
    plans: dict[str, PrunePlan]
    config: str


def parse_bytes(text: str) -> float:
    """2e9, "2GB" (10**9) or "2GiB" (2**30) as a number of bytes.

    Raises:
      UserError: something else, or nothing that a model could fit in.
    """
    found = re.fullmatch(r"\s*([\d.]+(?:[eE]\+?\d+)?)\s*([a-zA-Z]*)\s*", text)
    try:
        number = float(found[1]) if found else math.nan
    except ValueError:
        number = math.nan
    if found is None or not 0 < number < math.inf:
        raise UserError(f"--bytes={text}: must be a size above 0, as 2e9, 2GB or 2GiB")
    return number * UNITS[one_of("--bytes: unit", found[2].upper(), tuple(UNITS))]


def parse_share(name: str, text: str) -> float:
    """5%, 0.05 or "none" (0) as a share.

    Raises:
      UserError: something else.
    """
    number = text.strip().removesuffix("%")
    try:
        return 0.0 if number == "none" else float(number) / (100 if "%" in text else 1)
    except ValueError:
        raise UserError(f"--{name}={text}: must be a share, as 5% or 0.05") from None


def saved_as(text: str | None) -> Path:
    """Where the config file goes, or would.

    Raises:
      UserError: not the name of a Python file, or one that is there.
    """
    path = Path(text or "recommended.py")
    if path.suffix != ".py" or "\0" in path.name:
        raise UserError(f"--save={text}: must be the name of a config file, as recommended.py")
    if text and path.exists():
        raise UserError(f"--save={text}: is there already: give another name, or remove it")
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
) -> Advice:
    """What the guide advises for the model in a folder (or hub id); of the folder only JSON files are read.

    Args:
      ratio, most_bytes: share of all parameters to remove, or bytes of bfloat16 weights to keep to; one of them.
      data_fraction, compute, speed, guide: as `recommend` takes them.

    Raises:
      UserError: no such model; not one of both targets, or one that no plan reaches, with the nearest; see `recommend`.
    """
    if (ratio is None) == (most_bytes is None):
        raise UserError("give --ratio=0.3 (of all parameters to remove) or --bytes=2GB (to fit in), and not both")
    folder = resolve(hf_dir)
    _, cfg = read_config(folder, None if vision_dir is None else resolve(vision_dir))
    whole = count_params(cfg) * DTYPES["bfloat16"].itemsize
    target: dict[str, Any] = {"ratio": ratio}
    if most_bytes is not None:
        if most_bytes >= whole:
            raise UserError(f"--bytes={most_bytes:,.0f}: the weights have {whole:,} in bfloat16: nothing has to go")
        ratio, target = 1 - most_bytes / whole, {"budget": {"disk_bytes": most_bytes}}
    assert ratio is not None
    found = recommend(cfg, ratio=ratio, data_fraction=data_fraction, compute=compute, speed=speed, guide=guide)
    plans = {}
    for method, variant in found.variants.items():
        experiment = override(Experiment(), {"prune": target})
        with about(f"--{'ratio' if most_bytes is None else 'bytes'}"):
            plans[method] = predict_plan(override(experiment, variant), cfg)
    model = {"hf_dir": hf_dir, "vision_dir": vision_dir}
    return Advice(str(folder), cfg, found, guide, plans, _config_file(found, cfg, model, target))


def as_lines(advice: Advice) -> list[str]:
    """The recommendation in words, without its tables."""
    found, cfg, rule = advice.recommendation, advice.cfg, advice.recommendation.rule
    lines = [
        f"{advice.folder}: {count_params(cfg):,} parameters, the decoder has "
        f"{_percent(count_params(cfg, 'text') / count_params(cfg))} of them",
        f"asked: {_percent(found.ratio)} of all parameters, {_percent(found.decoder_ratio)} of the decoder",
        "",
        f"{'recommended' if rule.supported else 'nothing supports this; the nearest'}: {_in_words(found)}",
        f"  why: {rule.why}",
        f"  from: {rule.source} ({rule.label})",
    ]
    for method, plan in advice.plans.items():
        kept = plan.stacks["text"].layers
        size = plan.parameters_after * DTYPES["bfloat16"].itemsize / 1e9
        lines.append(
            f"  {method}: {len(kept)} of {len(cfg.text.layers)} layers, {plan.parameters_after:,} parameters, "
            f"{size:.3g} GB in bfloat16, {_percent(plan.reached)} removed"
        )
    sources = advice.guide.sources
    for one in found.expected:
        source = sources[one.source]
        beside = "" if source.vision == (cfg.vision is not None) else " (of another kind of model)"
        kinds = " and ".join(dict.fromkeys(row.recovery for row in one.rows))
        said = f"{source.measure}{beside}, after {kinds} [{source.title}]"
        reach = f"{one.low:.1f} to {one.high:.1f} %" if one.low is not None else f"at most {one.high:.1f} %"
        lines.append(f"  expect {reach} retained: {said}")
    lines += [f"  note: {note}" for note in found.notes]
    return lines + [f"  conflict: {text}" for text in found.conflicts]


def as_tables(advice: Advice) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """(title, header, rows): what the expectation is from, and what else was measured at a like ratio."""
    found = advice.recommendation
    header = ("model", "prune + recover", "from", "of decoder", "data", "retained, %", "95 %", "seeds")
    rows = {
        "Expected from": [row for one in found.expected for row in one.rows],
        "Beside it, at a like ratio": list(found.beside),
    }
    tables = [(title, header, [_row(row) for row in of]) for title, of in rows.items() if of]
    if found.speed:
        fast = [
            (f"{one.model}, {one.format}, llama.cpp", one.method, _percent(one.removed), f"{one.decode:.2f}")
            for one in found.speed
        ]
        tables.append(("Decoding, times the unpruned speed", ("model", "prune", "of all", "times"), fast))
    return tables


def _row(row: Evidence) -> tuple[str, ...]:
    interval = "" if row.interval is None else f"{row.interval[0]:.2f} to {row.interval[1]:.2f}"
    data = "not told" if row.data_fraction is None else _percent(row.data_fraction)
    retained = f"{row.retained:.2f}{'' if row.counts else ' *'}"
    cut = f"{row.method} + {row.recovery}"
    return (row.model, cut, row.source, _percent(row.decoder_ratio), data, retained, interval, str(row.seeds or ""))


def footnotes(advice: Advice) -> list[str]:
    """What is to be known of rows of the tables; those with a star are left out of ranges."""
    found = advice.recommendation
    rows = [*(row for one in found.expected for row in one.rows), *found.beside]
    noted = (
        f"{'' if row.counts else '* '}{row.model}, {row.method} + {row.recovery}: {row.note}"
        for row in rows
        if row.note
    )
    return list(dict.fromkeys(noted))


_CUTS = {"depth": "remove whole layers by Block Influence", "width": "remove neurons and heads by Taylor importance"}
_TRAINED = {"projector": "the projector alone", "sft_l2": "adapters and projector, SFT + L2 distillation,"}


def _in_words(found: Recommendation) -> str:
    words = []
    for method, settings in found.variants.items():
        words.append(f"{_CUTS[method]}{', solve for the kept weights' if 'reconstruct' in settings else ''}")
    cut = "; and beside it ".join(words)
    if found.rule.recovery == "none":
        return f"{cut}; no training"
    return f"{cut}; then train {_TRAINED[found.rule.recovery]} on {_percent(found.data_fraction)} of the data"


def _percent(value: float) -> str:
    return f"{100 * value:.4g} %"


def tell(advice: Advice, save: str | None, reporter: Reporter) -> None:
    """Print a recommendation, and its config, or write that to `save`.

    Raises:
      UserError: see `saved_as`.
    """
    path = saved_as(save)
    for line in as_lines(advice):
        reporter.say(line)
    for table in as_tables(advice):
        reporter.table(*table)
    for line in footnotes(advice):
        reporter.say(line)
    if save is not None:
        write_text(path, advice.config)
        reporter.say(f"config: {path}")
    else:
        for line in ["", "config, which --save=FILE.py writes:", *advice.config.splitlines()]:
            reporter.say(f"  {line}" if line else "")
    reporter.say("commands:")
    for line in commands(advice, str(path)):
        reporter.say(f"  {line}")


def commands(advice: Advice, config: str) -> list[str]:
    """What to run, for a config that lies in a file."""
    place = f"--config={config} --workdir=runs/{Path(config).stem}"
    if advice.recommendation.rule.recovery != "none":
        return [f"vlmprune plan --config={config} --topology=v5e:8x8 --records=N", f"vlmprune run {place}"]
    stages = ["score", "prune"]
    if any("reconstruct" in one for one in advice.recommendation.variants.values()):
        stages.append("reconstruct")
    return [f"vlmprune {stage} {place}" for stage in (*stages, "evaluate", "export")]


def _config_file(found: Recommendation, cfg: ModelConfig, model: dict[str, Any], target: dict[str, Any]) -> str:
    """The text of a config file: the family's recipe, the model, the data and what is advised."""
    named = family_of(cfg).name
    changes: dict[str, Any] = {"model": {name: value for name, value in model.items() if value is not None}}
    if count_params(cfg) >= _LARGE:
        changes["model"]["dtype"] = "bfloat16"
        changes["mesh"] = {"fsdp": -1}
    changes["data"] = {"fraction": found.data_fraction} if found.data_fraction else {}
    one = next(iter(found.variants.values())) if len(found.variants) == 1 else {}
    changes |= one
    changes["prune"] = {**one.get("prune", {}), **target}
    what = f"What `vlmprune recommend` advises for {_percent(found.ratio)} of all parameters: {_in_words(found)}."
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
        '    """What is advised, on top of the defaults or of the family\'s recipe."""',
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
    """`recover.losses.ce` -> 0.5 of nested settings."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{where}{name}.")
        else:
            yield where + name, value


def _literal(value: Any) -> str:
    """A value of JSON as Python spells it."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_literal(name)}: {_literal(one)}' for name, one in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
