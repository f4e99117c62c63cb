"""Advice of the guide for a model folder and a target, in words and as a config file."""

from __future__ import annotations

import dataclasses
import itertools
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
from vlmprune_jax.core.limits import ENGINES, why_not
from vlmprune_jax.core.settings import override
from vlmprune_jax.core.weight_files import DTYPES
from vlmprune_jax.experiment.recipes import recipes
from vlmprune_jax.experiment.spec import Experiment
from vlmprune_jax.export.vllm_tpu import facts
from vlmprune_jax.families import family_of
from vlmprune_jax.families.limits import how_known
from vlmprune_jax.hf.read import read_config, resolve
from vlmprune_jax.models.params import count_params
from vlmprune_jax.planning.case import predict_plan
from vlmprune_jax.planning.guide import SOLVED, Evidence, Guide
from vlmprune_jax.planning.rules import LIKE, Expected, Recommendation, Target, is_better, merge, recommend
from vlmprune_jax.prune import PrunePlan
from vlmprune_jax.stages.unused import unused_settings
from vlmprune_jax.workdir.artefact import read_artefact
from vlmprune_jax.workdir.speed import Bench

UNITS = {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
LARGE_VOCABULARY = 0.15  # share of the parameters from which trimming the vocabulary is advised first
_LARGE = 10**9  # parameters; larger models are loaded in bfloat16
_PRUNING = {"depth": "remove whole layers by Block Influence", "width": "remove neurons and heads by Taylor importance"}
DTYPE = "bfloat16"  # of the export, in which all sizes are counted
_FOLDERS_OWN = ("template", "system", "aspect_ratio")  # `data` settings that the model folder determines
PLACEHOLDERS = {"train": "TRAIN.json", "images": "IMAGES", "eval": "QUESTIONS.json"}  # for files not given
_TRAINED = {"projector": "the projector alone", "lora": "adapters and projector", "decoder": "decoder and projector"}
_LOSSES = {"ce": "SFT", "l2": "L2 distillation", "kl": "KL distillation"}


@dataclasses.dataclass(frozen=True)
class Advice:
    """Recommendation for a model folder: predicted plans by pruning method, and the text of a config file.

    `own_data`: True if the config names the user's files. `missing`: settings of `data` that the user still has to set.
    `bench`: speeds measured on this machine. `most_bytes`: the requested maximum size.
    """

    folder: str
    cfg: ModelConfig
    recommendation: Recommendation
    plans: dict[str, PrunePlan]
    config: str
    own_data: bool
    missing: tuple[str, ...]
    bench: Bench | None = None
    most_bytes: float | None = None


def parse_bytes(text: str) -> float:
    """Convert a size such as 2e9, "2GB" (10**9) or "2GiB" (2**30) to a number of bytes.

    Raises UserError for text of another form, or a number that is not above 0.
    """
    match = re.fullmatch(r"\s*([\d.]+(?:[eE]\+?\d+)?)\s*([a-zA-Z]*)\s*", text)
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or not 0 < number < math.inf:
        raise UserError(f"--bytes={text}: must be a size above 0, such as 2e9, 2GB or 2GiB")
    return number * UNITS[one_of("--bytes: unit", match[2].upper(), tuple(UNITS))]


def parse_share(name: str, text: str) -> float:
    """Convert a share such as 5%, 0.05 or "none" (0) to a fraction.

    Raises UserError for text of another form.
    """
    number = text.strip().removesuffix("%")
    try:
        return 0.0 if number == "none" else float(number) / (100 if "%" in text else 1)
    except ValueError:
        raise UserError(f"--{name}={text}: must be a share, such as 5% or 0.05") from None


def saved_as(text: str | None, ratio: float = 0.0) -> Path:
    """Return the path for the recommended config file (default: recommended_30.py for 30 %).

    Raises UserError if the name is not that of a Python file.
    """
    path = Path(text or f"recommended_{100 * ratio:.3g}.py")
    if path.suffix != ".py" or "\0" in path.name:
        raise UserError(f"--save={text}: must be the name of a config file, such as recommended.py")
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
    files: Mapping[str, str] | None = None,
    bench: Path | None = None,
) -> Advice:
    """Return the recommendation for a model folder or hub id, of which only JSON files are read.

    Args:
      hf_dir, vision_dir: see `load`.
      ratio: share of all parameters to remove.
      most_bytes: maximum size of the bfloat16 weights; set either `ratio` or `most_bytes`.
      data_fraction, compute, speed, guide: see `recommend`.
      files: values of `data.train`, `data.images` and `data.eval` for the config, instead of the evidence's data.
      bench: content of the file from `vlmprune bench --json`, shown with the recommendation.

    Raises:
      UserError: the model or file is missing, none or both targets are set, no plan reaches the target (the message has
        the nearest), or `recommend` fails.
    """
    if (ratio is None) == (most_bytes is None):
        raise UserError("give either --ratio=0.3 (share of all parameters to remove) or --bytes=2GB (maximum size)")
    measured = None if bench is None else read_artefact(bench, Bench)
    folder = resolve(hf_dir)
    _, cfg = read_config(folder, None if vision_dir is None else resolve(vision_dir))
    whole = _bytes(count_params(cfg))
    target: dict[str, Any] = {"ratio": ratio}
    if most_bytes is not None:
        if most_bytes >= whole:
            raise UserError(
                f"--bytes={most_bytes:,.0f}: the unpruned weights have only {whole:,} bytes in {DTYPE}, so no "
                "pruning is needed"
            )
        ratio, target = 1 - most_bytes / whole, {"budget": {"disk_bytes": most_bytes}}
    assert ratio is not None
    if compute == "projector" and cfg.projector is None:
        raise UserError("compute='projector': this model has no projector, use none or full")
    decoder_ratio = ratio * count_params(cfg) / count_params(cfg, "text")
    asked = Target(count_params(cfg), cfg.vision is not None, ratio, decoder_ratio)
    recommendation = recommend(asked, data_fraction=data_fraction, compute=compute, speed=speed, guide=guide)
    plans, export = {}, {"export": {"dtype": DTYPE}}
    for method, variant in recommendation.variants.items():
        with error_context(f"--{'ratio' if most_bytes is None else 'bytes'}"):
            settings = merge(recommendation.recipe, variant, {"prune": target}, export)
            plans[method] = predict_plan(override(Experiment(), settings), cfg)
    model = {"hf_dir": hf_dir, **({} if vision_dir is None else {"vision_dir": vision_dir})}
    data = {"data": dict(files)} if files else recommendation.task
    known = {"train", "images", "eval"} if "source" in data.get("data", {}) else {*(files or ())}
    known |= {"images"} if files or cfg.vision is None else set()
    config = _config_file(recommendation, cfg, merge({"model": model}, data, export, {"prune": target}))
    missing = tuple(name for name in PLACEHOLDERS if name not in known)
    return Advice(str(folder), cfg, recommendation, plans, config, bool(files), missing, measured, most_bytes)


def _bytes(parameters: int) -> int:
    return parameters * DTYPES[DTYPE].itemsize


def _size(n_bytes: float) -> str:
    unit = next((name for name in ("TB", "GB", "MB") if n_bytes >= UNITS[name]), "KB")
    return f"{n_bytes / UNITS[unit]:.3g} {unit}"


def decision(advice: Advice) -> Iterator[tuple[str, str]]:
    """Yield (label, text) of the recommended steps: how to prune and recover, and the size of the pruned model."""
    recommendation, cfg = advice.recommendation, advice.cfg
    yield from _vocabulary(advice)
    yield from _integers(advice)
    yield "prune", pruning_of(recommendation)
    yield "recover", recovery_of(recommendation)
    sizes = []
    for method, plan in advice.plans.items():
        layers = f", {len(plan.stacks['text'].layers)} of {len(cfg.text.layers)} layers" if method == "depth" else ""
        size = f"{_size(_bytes(plan.parameters_after))} of {_size(_bytes(count_params(cfg)))} in {DTYPE}"
        sizes.append(f"{size}{layers}, {percent(plan.actual_ratio)} removed")
    yield "size", "; ".join(sizes)


def details(advice: Advice) -> list[str]:
    """Return additional lines: the target, engines that load the pruned models, reasons, and where sources disagree."""
    cfg, asked = advice.cfg, advice.recommendation.target
    lines = [
        f"{advice.folder}: {count_params(cfg):,} parameters, the decoder has "
        f"{percent(count_params(cfg, 'text') / count_params(cfg))} of them",
        f"asked: {percent(asked.ratio)} of all parameters ({percent(asked.decoder_ratio)} of the decoder)",
    ]
    for method, plan in advice.plans.items():
        lines += [f"{method}: {plan.parameters_after:,} parameters", *_loading_lines(plan.apply_to(cfg))]
    return [*lines, *reasons(advice.recommendation)]


def _loading_lines(cfg: ModelConfig) -> list[str]:
    """Return lines on which inference engines load the pruned model at its true size, and why others do not."""
    unmet = {target: why_not(cfg, target) for target in ENGINES}
    able = [f"{target} ({how_known(cfg, target)})" for target, reason in unmet.items() if reason is None]
    loads = ", ".join(able) or "no engine"
    on_tpus = [] if unmet["vllm_tpu"] else [f"  on TPUs: {facts(cfg)}"]
    return [f"  loads in {loads}", *on_tpus, *(f"  not in {name}: {why}" for name, why in unmet.items() if why)]


def reasons(recommendation: Recommendation) -> list[str]:
    """Return lines with the guide's rule, remarks, and where its sources disagree."""
    rule = [] if recommendation.head else [f"rule: {recommendation.rule.why}", f"from: {recommendation.rule.source}"]
    return [
        *rule,
        *(f"note: {note}" for note in recommendation.notes),
        *(f"conflict: {text}" for text in recommendation.conflicts),
    ]


def evidence(recommendation: Recommendation) -> Iterator[tuple[str, str]]:
    """Yield (label, text) of the retention to expect, the measurements behind it, and why this is recommended."""
    expected, head, rival = recommendation.expected, recommendation.head, recommendation.rival
    if expected is None:
        yield "expect", "unknown, as no model of like size was measured with these steps"
    elif expected.interval is None:
        yield "expect", f"about {expected.value:.1f} % retained (one measurement without an interval)"
    else:
        other, (low, high) = "seed" if expected.same else "model, task and seed", expected.interval
        yield "expect", f"{low:.1f} to {high:.1f} % retained (95 % interval for another {other})"
    if expected is not None:
        yield "measured", measured(expected)
    if head is not None and rival is not None and rival != head:
        data = f" on {percent(rival.data_fraction)} of data" if rival.data_fraction else ""
        way = f"{rival.method} + {rival.recovery}{data}"
        outside, chance = ("outside these options, ", "") if is_better(rival, head) else ("", " by chance at most")
        yield "because", f"{outside}{way} is better{chance} ({rival.retained:.2f} %)"
    elif head is not None:
        yield "because", "nothing measured on this shape and ratio is better beyond chance"
    elif recommendation.rule.supported:
        yield "because", f"this is the guide's rule for {recommendation.rule.label} of the decoder"
    else:
        yield "because", f"nothing supports this; nearest rule: {recommendation.rule.label} of the decoder"


def measured(expected: Expected) -> str:
    """Return the measurements behind an expected retention as text, and the retention relative to the control."""
    rows, models = expected.rows, dict.fromkeys(row.model for row in expected.rows)
    control = "" if expected.of_control is None else f", {expected.of_control:.1f} % of control"
    if expected.same:
        row = rows[0]
        ends = "" if row.interval is None else f"{row.interval[0]:.2f} to {row.interval[1]:.2f}, "
        return f"{row.retained:.2f} % ({ends}{_seeds(row)}), same shape{control}"
    basis = f"on {next(iter(models))}" if len(models) == 1 else f"on average of {len(models)} models"
    return f"{expected.value:.1f} % {basis} within {LIKE} times this size{control}"


def _seeds(row: Evidence) -> str:
    return "1 seed" if (row.seeds or 1) == 1 else f"{row.seeds} seeds"


def summarize(recommendation: Recommendation) -> str:
    """Return the recommendation in one sentence."""
    return f"{pruning_of(recommendation)}; {recovery_of(recommendation)}"


def pruning_of(recommendation: Recommendation) -> str:
    """Return how to prune, and whether to reconstruct the pruned weights, as text."""
    then = ", then reconstruct"
    return "; beside it ".join(
        f"{_PRUNING[name]}{then * (SOLVED in settings)}" for name, settings in recommendation.variants.items()
    )


def recovery_of(recommendation: Recommendation) -> str:
    """Return the training after pruning as text."""
    recover = merge(recommendation.recipe, *recommendation.variants.values()).get("recover", {})
    if recover.get("method") == "none":
        return "no training"
    trained = _TRAINED.get(str(recover.get("trainable", "lora")), "the chosen weights")
    weights = recover.get("losses", {"ce": 1})
    losses = " + ".join(words for name, words in _LOSSES.items() if weights.get(name)) or "other losses"
    return f"train {trained} by {losses} on {percent(recommendation.data_fraction)} of the data"


def percent(value: float) -> str:
    """Format a fraction as a percentage, such as "30 %"."""
    return f"{100 * value:.4g} %"


def vocabulary_share(cfg: ModelConfig) -> float:
    """Return the share of a model's parameters in embedding, output head and output bias."""
    rows = cfg.text.vocab_size
    without = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, vocab_size=1))
    per_row = (count_params(cfg) - count_params(without)) / max(rows - 1, 1)
    return per_row * rows / count_params(cfg)


def _vocabulary(advice: Advice) -> Iterator[tuple[str, str]]:
    """Yield advice to trim a large vocabulary before other pruning; nothing for a small one."""
    share, rows = vocabulary_share(advice.cfg), advice.cfg.text.vocab_size
    if share > LARGE_VOCABULARY:
        command = f"vlmprune vocabulary --model={shlex.quote(advice.folder)} --sources=TRAIN.json --sizes=16k,32k,64k"
        yield "first", f"trim the vocabulary, whose {rows:,} tokens are {percent(share)} of the parameters: {command}"


def _integers(advice: Advice) -> Iterator[tuple[str, str]]:
    """Yield advice to quantise instead of pruning, if the quantised unpruned model meets the requested size.

    The decoder's layers have 8 or 4 bits per parameter and a bfloat16 scale per 64 parameters, the rest bfloat16.
    """
    cfg = advice.cfg
    layers = count_params(cfg, "text") - vocabulary_share(cfg) * count_params(cfg)
    for quantize, n_bytes in (("w8a16", 1), ("w4a16", 0.5)):
        size = 2 * (count_params(cfg) - layers) + layers * (n_bytes + 2 / 64)
        if advice.most_bytes is not None and size <= advice.most_bytes:
            about = f'export the unpruned model with export.quantize="{quantize}" (about {_size(size)})'
            yield "instead", f"if only the size matters, {about}: better than pruning in docs/explanation/results.md"
            return


def command(advice: Advice, config: str) -> list[str]:
    """Return the arguments of the shell command to run with the recommended config file."""
    flags = {"config": config, "workdir": f"runs/{Path(config).stem}"}
    flags |= {f"config.data.{name}": PLACEHOLDERS[name] for name in advice.missing}
    return ["vlmprune", "run", *(shlex.quote(f"--{name}={value}") for name, value in flags.items())]


def _config_file(recommendation: Recommendation, cfg: ModelConfig, settings: dict[str, Any]) -> str:
    """Return the recommended config file's text: the family's recipe, advised settings, and `settings`.

    Prompts and images are prepared as the model folder says, and settings without effect are left out.
    """
    named, changes = family_of(cfg).name, dict[str, Any]()
    recipe = named if recommendation.of_family and named in recipes() else None
    if count_params(cfg) >= _LARGE:
        changes = {"model": {"dtype": "bfloat16"}, "mesh": {"fsdp": -1}}
    fraction = {"data": {"fraction": recommendation.data_fraction}} if recommendation.data_fraction else {}
    only = next(iter(recommendation.variants.values())) if len(recommendation.variants) == 1 else {}
    changes = merge({"model": {}}, changes, recommendation.recipe, settings, fraction, only)
    start = Experiment() if recipe is None else override(Experiment(), recipes()[recipe])
    data, default = override(start, changes).data, Experiment().data
    folders = {name: getattr(default, name) for name in _FOLDERS_OWN if getattr(data, name) != getattr(default, name)}
    changes = merge(changes, {"data": folders})
    variants = {} if only else {"prune_variants": recommendation.variants}
    unused = unused_settings([(override(start, {**changes, **variants}), cfg)]).values()
    without_effect = {*itertools.chain(*unused)}
    share = percent(recommendation.target.ratio)
    about = f"Advice of `vlmprune recommend` for {share} of all parameters: {summarize(recommendation)}."
    lines = [
        *textwrap.wrap(f'"""{about}', 110),
        '"""',
        "",
        "from ml_collections import ConfigDict",
        "",
        "from vlmprune_jax.cli.config_files import experiment_config",
        "",
        "",
        "def get_config() -> ConfigDict:",
        '    """Recommended settings, on top of the defaults or of the family\'s recipe."""',
        f"    config = experiment_config({'' if recipe is None else f'recipe={_literal(recipe)}'})",
        *(f"    config.{name} = {_literal(to)}" for name, to in _leaves(changes) if name not in without_effect),
    ]
    if not only:
        lines.append("    config.prune_variants = {")
        for method, values in recommendation.variants.items():
            inner = [f"            {_literal(section)}: {_literal(value)}," for section, value in values.items()]
            lines += [f"        {_literal(method)}: {{", *inner, "        },"]
        lines.append("    }")
    return "\n".join([*lines, "    return config", ""])


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ("recover.losses.ce", 0.5) for every setting in nested settings."""
    for name, value in values.items():
        if isinstance(value, Mapping) and all(key.isidentifier() and not keyword.iskeyword(key) for key in value):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _literal(value: Any) -> str:
    """Return a JSON value as a Python literal, in source code."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_literal(name)}: {_literal(item)}' for name, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
