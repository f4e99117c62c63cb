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
from vlmprune_jax.export.loads import TARGETS, why_not
from vlmprune_jax.export.vllm_tpu import facts
from vlmprune_jax.families import family_of
from vlmprune_jax.hf.read import read_config, resolve
from vlmprune_jax.models.params import count_params
from vlmprune_jax.planning.case import predict_plan
from vlmprune_jax.planning.guide import SOLVED, Guide
from vlmprune_jax.planning.rules import LIKE, Recommendation, Target, merge, recommend
from vlmprune_jax.prune import PrunePlan
from vlmprune_jax.workdir.artefact import read_artefact
from vlmprune_jax.workdir.speed import Bench

UNITS = {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
LARGE_VOCABULARY = 0.15  # share of the parameters from which trimming the vocabulary is advised first
_LARGE = 10**9  # parameters; larger models are loaded in bfloat16
_PRUNING = {"depth": "remove whole layers by Block Influence", "width": "remove neurons and heads by Taylor importance"}
_TRAINED = {"projector": "the projector alone", "lora": "adapters and projector", "decoder": "decoder and projector"}
_LOSSES = {"ce": "SFT", "l2": "L2 distillation", "kl": "KL distillation"}


@dataclasses.dataclass(frozen=True)
class Advice:
    """Recommendation for a model folder: predicted plans by pruning method, and the text of a config file.

    `bench`: speeds measured on this machine, shown instead of the guide's speeds; `most_bytes`: the size asked for.
    """

    folder: str
    cfg: ModelConfig
    recommendation: Recommendation
    plans: dict[str, PrunePlan]
    config: str
    bench: Bench | None = None
    most_bytes: float | None = None


def parse_bytes(text: str) -> float:
    """Convert a size such as 2e9, "2GB" (10**9) or "2GiB" (2**30) to a number of bytes.

    Raises UserError for text of another form, and numbers that are not above 0.
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
    """Convert a share such as 5%, 0.05 or "none" (0) to a fraction.

    Raises UserError for text of another form.
    """
    number = text.strip().removesuffix("%")
    try:
        return 0.0 if number == "none" else float(number) / (100 if "%" in text else 1)
    except ValueError:
        raise UserError(f"--{name}={text}: must be a share, such as 5% or 0.05") from None


def saved_as(text: str | None) -> Path:
    """Return the path of the recommended config file (default: recommended.py).

    Raises UserError if it is not the name of a Python file, or the file exists.
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
    """Return the recommendation for a model folder or hub id, of which only JSON files are read.

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
    measured = None if bench is None else read_artefact(bench, Bench)
    folder = resolve(hf_dir)
    _, cfg = read_config(folder, None if vision_dir is None else resolve(vision_dir))
    whole = count_params(cfg) * DTYPES["bfloat16"].itemsize
    target: dict[str, Any] = {"ratio": ratio}
    if most_bytes is not None:
        if most_bytes >= whole:
            raise UserError(
                f"--bytes={most_bytes:,.0f}: the unpruned weights have only {whole:,} bytes in bfloat16, so no "
                "pruning is needed"
            )
        ratio, target = 1 - most_bytes / whole, {"budget": {"disk_bytes": most_bytes}}
    assert ratio is not None
    if compute == "projector" and cfg.projector is None:
        raise UserError("compute='projector': this model has no projector, use none or full")
    decoder_ratio = ratio * count_params(cfg) / count_params(cfg, "text")
    asked = Target(count_params(cfg), cfg.vision is not None, ratio, decoder_ratio)
    found = recommend(asked, data_fraction=data_fraction, compute=compute, speed=speed, guide=guide)
    plans = {}
    for method, variant in found.variants.items():
        with error_context(f"--{'ratio' if most_bytes is None else 'bytes'}"):
            plans[method] = predict_plan(override(Experiment(), merge(found.recipe, variant, {"prune": target})), cfg)
    model = {"hf_dir": hf_dir, "vision_dir": vision_dir}
    told = found if measured is None else dataclasses.replace(found, speed=())
    return Advice(str(folder), cfg, told, plans, _config_file(found, cfg, model, target), measured, most_bytes)


def as_lines(advice: Advice) -> list[str]:
    """Return the recommendation as lines of text, without tables."""
    found, cfg, asked = advice.recommendation, advice.cfg, advice.recommendation.target
    lines = [
        f"{advice.folder}: {count_params(cfg):,} parameters, the decoder has "
        f"{percent(count_params(cfg, 'text') / count_params(cfg))} of them",
        f"asked: {percent(asked.ratio)} of all parameters ({percent(asked.decoder_ratio)} of the decoder)",
        "",
        *_vocabulary_lines(advice),
        *_integer_lines(advice),
    ]
    headline, *rest = advice_lines(found)
    sizes = []
    for method, plan in advice.plans.items():
        kept = plan.stacks["text"].layers
        size = plan.parameters_after * DTYPES["bfloat16"].itemsize / 1e9
        sizes.append(
            f"  {method}: {len(kept)} of {len(cfg.text.layers)} layers, {plan.parameters_after:,} parameters, "
            f"{size:.3g} GB in bfloat16, {percent(plan.reached)} removed"
        )
        sizes += _loading_lines(plan.apply_to(cfg))
    return [*lines, headline, *sizes, *rest]


def _loading_lines(cfg: ModelConfig) -> list[str]:
    """Return lines on which inference engines load the pruned model at its true size, and why others do not."""
    reasons = {target: why_not(cfg, target) for target in TARGETS}
    loads = ", ".join(target for target, reason in reasons.items() if reason is None) or "no engine"
    on_tpus = [] if reasons["vllm_tpu"] else [f"    on TPUs: {facts(cfg)}"]
    return [f"    loads in {loads}", *on_tpus, *(f"    not in {name}: {why}" for name, why in reasons.items() if why)]


def advice_lines(found: Recommendation) -> list[str]:
    """Return lines on what to do, the retention to expect, the reasons, and where sources disagree."""
    rule, head = found.rule, found.head
    sure = "recommended" if head is not None or rule.supported else "nothing supports this; the nearest"
    lines = [f"{sure}: {summarize(found)}", f"  expect: {expectation(found)}"]
    if head is None:
        lines += [f"  why: {rule.why}", f"  from: {rule.source} ({rule.label} of the decoder)"]
    else:
        lines.append("  why: this retained most of all that was measured on a model of this shape at this ratio")
    lines += [f"  note: {note}" for note in found.notes]
    return lines + [f"  conflict: {text}" for text in found.conflicts]


def expectation(found: Recommendation) -> str:
    """Return the expected retention as text, with its interval and what the interval covers (models or seeds)."""
    expected = found.expected
    if expected is None:
        return "unknown, as no model of like size was measured with these steps"
    models = len({row.model for row in expected.rows})
    of = "one model" if models == 1 else f"{models} models, on average,"
    told = f"{expected.value:.1f} % on {'this shape' if expected.same else f'{of} within {LIKE} times this size'}"
    if expected.of_control is not None:
        told += f", {expected.of_control:.1f} % of the unpruned model after the same recovery"
    if expected.interval is None:
        return f"about {told}; one measurement, which has no interval: evaluate before use"
    low, high = expected.interval
    other = "another seed of the same task" if expected.same else "another model, task and seed"
    return f"{low:.1f} to {high:.1f} % retained (95 % interval for {other}; measured: {told})"


def summarize(found: Recommendation) -> str:
    """Return the recommendation in one sentence."""
    parts = []
    for method, settings in found.variants.items():
        repaired = ", reconstruct the kept weights by least squares" if SOLVED in settings else ""
        parts.append(_PRUNING[method] + repaired)
    pruning, settings = "; and beside it ".join(parts), merge(found.recipe, *found.variants.values())
    recover = settings.get("recover", {})
    if recover.get("method") == "none":
        return f"{pruning}; no training"
    trained = _TRAINED.get(str(recover.get("trainable", "lora")), "the chosen weights")
    weights = recover.get("losses", {"ce": 1})
    losses = " + ".join(words for name, words in _LOSSES.items() if weights.get(name)) or "other losses"
    return f"{pruning}; then train {trained} by {losses} on {percent(found.data_fraction)} of the data"


def percent(value: float) -> str:
    """Format a fraction as a percentage, such as "30 %"."""
    return f"{100 * value:.4g} %"


def vocabulary_share(cfg: ModelConfig) -> float:
    """Return the share of a model's parameters in embedding, output head and output bias."""
    rows = cfg.text.vocab_size
    without = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, vocab_size=1))
    per_row = (count_params(cfg) - count_params(without)) / max(rows - 1, 1)
    return per_row * rows / count_params(cfg)


def _vocabulary_lines(advice: Advice) -> list[str]:
    """Return advice to trim a large vocabulary before other pruning; no lines for a small one."""
    share, rows = vocabulary_share(advice.cfg), advice.cfg.text.vocab_size
    if share <= LARGE_VOCABULARY:
        return []
    return [
        f"first: trim the vocabulary, whose {rows:,} tokens are {percent(share)} of the parameters; texts made of kept "
        "tokens stay the same",
        f"  sizes: vlmprune vocabulary --model={shlex.quote(advice.folder)} --sources=TRAIN.json --sizes=16k,32k,64k",
        "",
    ]


def _integer_lines(advice: Advice) -> list[str]:
    """Return advice to quantise the unpruned model if its integers are as small as the size asked for.

    The decoder's layers have 8 or 4 bits per parameter and a bfloat16 scale per 64 parameters, the rest bfloat16.
    """
    cfg = advice.cfg
    layers = count_params(cfg, "text") - vocabulary_share(cfg) * count_params(cfg)
    for quantize, n_bytes in (("w8a16", 1), ("w4a16", 0.5)):
        size = 2 * (count_params(cfg) - layers) + layers * (n_bytes + 2 / 64)
        if advice.most_bytes is not None and size <= advice.most_bytes:
            return [
                f'instead, if only the size matters: export the unpruned model with export.quantize="{quantize}" '
                f"(about {size / 1e9:.3g} GB): of equal size, quantised models were better than pruned ones",
                "  from: docs/explanation/results.md, Quantisation (SmolLM2-135M, with and without training)",
                "",
            ]
    return []


def commands(advice: Advice, config: str) -> list[str]:
    """Return the shell commands to run with the recommended config file."""
    workdir, config = shlex.quote(f"runs/{Path(config).stem}"), shlex.quote(config)
    run = f"vlmprune run --config={config} --workdir={workdir}"
    if not advice.recommendation.data_fraction:
        return [run]
    return [f"vlmprune plan --config={config} --topology=v5e:8x8 --records=N", run]


def _config_file(found: Recommendation, cfg: ModelConfig, model: dict[str, Any], target: dict[str, Any]) -> str:
    """Return the recommended config file's text: the family's recipe, model, data and advised settings."""
    named = family_of(cfg).name
    changes: dict[str, Any] = {"model": {name: value for name, value in model.items() if value is not None}}
    if count_params(cfg) >= _LARGE:
        changes["model"]["dtype"] = "bfloat16"
        changes["mesh"] = {"fsdp": -1}
    data = {"data": {"fraction": found.data_fraction}} if found.data_fraction else {}
    one = next(iter(found.variants.values())) if len(found.variants) == 1 else {}
    changes = merge(changes, found.recipe, data, one, {"prune": target})
    recipe = f"recipe={_literal(named)}" if found.of_family and named in recipes() else ""
    what = f"Advice of `vlmprune recommend` for {percent(found.target.ratio)} of all parameters: {summarize(found)}."
    given = "source" in found.recipe.get("data", {})
    todo = "Give data.train, data.images and data.eval here, or as --config.data.train=FILE.json ..."
    lines = [
        *textwrap.wrap(f'"""{what}', 110),
        "",
        "The settings are those that the evidence was measured with." if given else todo,
        '"""',
        "",
        "from ml_collections import ConfigDict",
        "",
        "from vlmprune_jax.cli.config_files import experiment_config",
        "",
        "",
        "def get_config() -> ConfigDict:",
        '    """Recommended settings, on top of the defaults or of the family\'s recipe."""',
        f"    config = experiment_config({recipe})",
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
    """Yield ("recover.losses.ce", 0.5) for every setting in nested settings."""
    for name, value in values.items():
        if isinstance(value, Mapping) and all(key.isidentifier() and not keyword.iskeyword(key) for key in value):
            yield from _leaves(value, f"{where}{name}.")
        else:
            yield where + name, value


def _literal(value: Any) -> str:
    """Return a JSON value as a Python literal, in source code."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_literal(name)}: {_literal(one)}' for name, one in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
