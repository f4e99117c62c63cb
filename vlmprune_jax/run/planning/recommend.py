"""Advice of the guide for a model folder and a target, in words and as a config file."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import keyword
import math
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmprune_jax.base.errors import UserError, error_context
from vlmprune_jax.base.settings import override
from vlmprune_jax.base.weight_files import DTYPES
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.limits import ENGINES, why_not
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.prune import PrunePlan
from vlmprune_jax.io.checkpoints.read import read_config, resolve
from vlmprune_jax.io.data.inputs import count_records
from vlmprune_jax.io.exports.vllm_tpu import facts
from vlmprune_jax.io.families import family_of
from vlmprune_jax.io.families.limits import how_known
from vlmprune_jax.run.experiment.recipes import recipes
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.planning.case import predict_plan
from vlmprune_jax.run.planning.goals import MEASURED_ON, RATIO, Ranking, rank
from vlmprune_jax.run.planning.guide import METHODS, SOLVED, Evidence, Guide
from vlmprune_jax.run.planning.rules import Recommendation, Target, merge, recommend
from vlmprune_jax.run.stages.unused import unused_settings
from vlmprune_jax.run.workdir.artefact import read_artefact
from vlmprune_jax.run.workdir.speed import Bench

_UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6}
LARGE_VOCABULARY = 0.15  # share of the parameters from which trimming the vocabulary is advised first
_LARGE = 10**9  # parameters; larger models are loaded in bfloat16
_PRUNING = {
    "depth": "remove whole layers by Block Influence",
    "width": "remove neurons and heads by Taylor importance",
    "hybrid": "remove whole layers by Block Influence, and neurons and heads by Taylor importance",
}
DTYPE = "bfloat16"  # of the export, in which all sizes are counted
_FOLDERS_OWN = ("template", "system", "aspect_ratio")  # `data` settings that the model folder determines
PLACEHOLDERS = {"train": "TRAIN.json", "images": "IMAGES", "eval": "QUESTIONS.json"}  # for files not given
_TRAINED = {"projector": "the projector alone", "lora": "adapters and projector", "decoder": "decoder and projector"}
_LOSSES = {"ce": "SFT", "l2": "L2 distillation", "kl": "KL distillation"}


@dataclasses.dataclass(frozen=True)
class Advice:
    """Recommendation for a model folder: predicted plans by pruning method, and the text of a config file.

    `steps`: number of optimizer steps and records of the training, or why none is recommended. `own_data`: True if the
    config names the user's files. `missing`: settings of `data` that the user still has to set. `bench`: speeds
    measured on this machine. `most_bytes`: the requested maximum size. `ranking`: the compared methods for a goal.
    """

    folder: str
    cfg: ModelConfig
    recommendation: Recommendation
    plans: dict[str, PrunePlan]
    config: str
    steps: str | None
    own_data: bool
    missing: tuple[str, ...]
    bench: Bench | None = None
    most_bytes: float | None = None
    ranking: Ranking | None = None


def advise(
    hf_dir: str,
    *,
    vision_dir: str | None = None,
    ratio: float | None = None,
    most_bytes: float | None = None,
    data_fraction: float | None = None,
    compute: str = "full",
    speed: bool = False,
    goal: tuple[str, str] | None = None,
    guide: Guide,
    files: Mapping[str, str] | None = None,
    bench: Path | None = None,
) -> Advice:
    """Return the recommendation for a model folder or hub id, of which only JSON files are read.

    Args:
      hf_dir, vision_dir: see `load`.
      ratio: share of all parameters to remove.
      most_bytes: maximum size of the bfloat16 weights; set either `ratio` or `most_bytes` (neither with `goal`: 30 % of
        the decoder).
      data_fraction: share of the training data that is available; None: all records of `files["train"]`, else 5 %.
      compute, guide: see `recommend`.
      speed: True to choose only pruning that speeds up decoding.
      goal: (goal, machine) of `planning.goals.rank`, whose best pruning methods are the ones to choose from.
      files: values of `data.train`, `data.images` and `data.eval` for the config, instead of the evidence's data.
      bench: content of the file from `vlmprune bench --json`, shown with the recommendation.

    Raises:
      UserError: the model or file is missing, none or both targets are set, no plan reaches the target (the message has
        the nearest), or `recommend` fails.
    """
    files = dict(files or {})
    measured = None if bench is None else read_artefact(bench, Bench)
    folder = resolve(hf_dir)
    _, cfg = read_config(folder, None if vision_dir is None else resolve(vision_dir))
    whole, of_decoder = _bytes(count_params(cfg)), count_params(cfg, "text") / count_params(cfg)
    if goal is not None and ratio is most_bytes is None:
        ratio = RATIO * of_decoder
    if (ratio is None) == (most_bytes is None):
        raise UserError("give either --ratio=0.3 (share of all parameters to remove) or --bytes=2GB (maximum size)")
    flag, target = "--ratio", dict[str, Any](ratio=ratio)
    if most_bytes is not None:
        if most_bytes >= whole:
            raise UserError(
                f"--bytes={most_bytes:,.0f}: the unpruned weights have only {whole:,} bytes in {DTYPE}, so no "
                "pruning is needed"
            )
        flag, ratio, target = "--bytes", 1 - most_bytes / whole, {"budget": {"disk_bytes": most_bytes}}
    assert ratio is not None
    if compute == "projector" and cfg.projector is None:
        raise UserError("compute='projector': this model has no projector, use none or full")

    def predict(*settings: Mapping[str, Any]) -> PrunePlan:
        with error_context(flag):
            merged = merge(*settings, {"prune": target, "export": {"dtype": DTYPE}})
            return predict_plan(override(Experiment(), merged), cfg)

    def as_asked(share: float) -> str:
        """Return a share of the decoder as the value of the flag that the user set."""
        size = _size(whole * (1 - share * of_decoder)).replace(" ", "")
        return f"--ratio={share * of_decoder:.3g}" if most_bytes is None else f"--bytes={size}"

    aligned = {} if goal is None or goal[1] == MEASURED_ON else {"prune": {"align_to": "tpu"}}
    plans, align = dict[str, PrunePlan](), {"depth": {}, "width": aligned, "hybrid": aligned}
    for method in METHODS:
        with contextlib.suppress(UserError):
            plans[method] = predict(guide.settings[method], align[method])
    removed = {method: plan.actual_ratio / of_decoder for method, plan in plans.items()}
    ranking = None if goal is None else rank(cfg, folder, *goal, plans, ratio, as_asked, guide)
    methods = ("depth",) if speed else METHODS if ranking is None else ranking.methods
    if data_fraction is None:
        data_fraction = 1.0 if "train" in files else guide.data.least
    asked = Target(count_params(cfg), cfg.vision is not None, ratio, ratio / of_decoder, removed)
    own: dict[str, Any] = {"data": files} if files else {}
    records = count_records(override(Experiment(), own).data)
    recommendation, steps = _with_enough_steps(asked, cfg, records, data_fraction, compute, methods, guide)
    variants = {method: merge(settings, align[method]) for method, settings in recommendation.variants.items()}
    recommendation = dataclasses.replace(recommendation, variants=variants)
    plans = {method: predict(recommendation.recipe, settings) for method, settings in variants.items()}
    model = {"hf_dir": hf_dir, **({} if vision_dir is None else {"vision_dir": vision_dir})}
    data = own or recommendation.task
    known = {"train", "images", "eval"} if "source" in data.get("data", {}) else {*files}
    known |= {"images"} if files or cfg.vision is None else set()
    settings = merge({"model": model}, data, {"export": {"dtype": DTYPE}, "prune": target})
    missing = tuple(name for name in PLACEHOLDERS if name not in known)
    config = _config_file(recommendation, cfg, settings)
    return Advice(
        str(folder), cfg, recommendation, plans, config, steps, bool(files), missing, measured, most_bytes, ranking
    )


def _with_enough_steps(
    target: Target,
    cfg: ModelConfig,
    records: int | None,
    available: float,
    compute: str,
    methods: Sequence[str],
    guide: Guide,
) -> tuple[Recommendation, str | None]:
    """Return the recommendation, without training if the records are too few, and `Advice.steps`.

    The share of the data is raised, up to `available`, until training has as many steps as the shortest measured one.
    """
    recommendation = recommend(target, data_fraction=available, compute=compute, methods=methods, guide=guide)
    if not recommendation.data_fraction:
        return recommendation, None
    recover = _experiment(recommendation, cfg, *recommendation.variants.values())[2].recover
    batch, passes = recover.batch_size, f"{recover.epochs:g} pass{'es' * (recover.epochs != 1)}"
    least = math.ceil(guide.data.steps * batch / recover.epochs)
    if records is None:
        return recommendation, (
            f"at least {guide.data.steps}, as in the shortest measured training: {least:,} records in batches of "
            f"{batch} and {passes} (--train=FILE counts yours)"
        )
    share = min(max(recommendation.data_fraction, math.ceil(1e4 * least / records) / 1e4), available)
    used = max(1, int(records * share))
    steps = recover.num_steps(used)
    counted = f"{steps:,} of {batch} records ({used:,} of {records:,} records in {passes})"
    if steps >= guide.data.steps:
        return dataclasses.replace(recommendation, data_fraction=share), counted
    untrained = recommend(target, data_fraction=available, compute="none", methods=methods, guide=guide)
    return untrained, f"do not train: too few: {counted}; the shortest measured training has {guide.data.steps} steps"


def _bytes(parameters: int) -> int:
    return parameters * DTYPES[DTYPE].itemsize


def _size(n_bytes: float) -> str:
    unit, scale = next(((unit, scale) for unit, scale in _UNITS.items() if n_bytes >= scale), ("KB", 1e3))
    return f"{n_bytes / scale:.3g} {unit}"


def decision(advice: Advice) -> Iterator[tuple[str, str]]:
    """Yield (label, text) of the recommended steps: how to prune and recover, and the size of the pruned model."""
    recommendation, cfg = advice.recommendation, advice.cfg
    asked = recommendation.target
    yield "asked", _shares(asked.ratio, asked.decoder_ratio)
    yield from _vocabulary(advice)
    yield from _integers(advice)
    if advice.ranking is not None:
        yield "goal", advice.ranking.summary
    yield "prune", pruning_of(recommendation)
    yield "recover", recovery_of(recommendation)
    if advice.steps is not None:
        yield "steps", advice.steps
    sizes = []
    for method, plan in advice.plans.items():
        layers = f", {len(plan.stacks['text'].layers)} of {len(cfg.text.layers)} layers" if method != "width" else ""
        size = f"{_size(_bytes(plan.parameters_after))} of {_size(_bytes(count_params(cfg)))} in {DTYPE}"
        of_decoder = plan.actual_ratio * count_params(cfg) / count_params(cfg, "text")
        sizes.append(f"{size}{layers}, {_shares(plan.actual_ratio, of_decoder)} removed")
    yield "size", "; ".join(sizes)


def _shares(ratio: float, decoder_ratio: float) -> str:
    return f"{percent(ratio)} of the model ({percent(decoder_ratio)} of the decoder)"


def details(advice: Advice) -> list[str]:
    """Return additional lines: the model, engines that load the pruned models, the rule, and where sources disagree."""
    cfg, recommendation = advice.cfg, advice.recommendation
    lines = [f"{advice.folder}: {count_params(cfg):,} parameters"]
    for method, plan in advice.plans.items():
        lines += [f"{method}: {plan.parameters_after:,} parameters", *_loading_lines(plan.apply_to(cfg))]
    rule = [] if recommendation.head else [f"rule: {recommendation.rule.why}"]
    return [*lines, *rule, *(f"conflict: {text}" for text in recommendation.conflicts)]


def _loading_lines(cfg: ModelConfig) -> list[str]:
    """Return lines on which inference engines load the pruned model at its true size, and why others do not."""
    unmet = {target: why_not(cfg, target) for target in ENGINES}
    able = [f"{target} ({how_known(cfg, target)})" for target, reason in unmet.items() if reason is None]
    loads = ", ".join(able) or "no engine"
    on_tpus = [] if unmet["vllm_tpu"] else [f"  on TPUs: {facts(cfg)}"]
    return [f"  loads in {loads}", *on_tpus, *(f"  not in {name}: {why}" for name, why in unmet.items() if why)]


def evidence(recommendation: Recommendation, guide: Guide, own_data: bool) -> Iterator[tuple[str, str]]:
    """Yield (label, text) of the retention to expect, the measurements behind it, the reason, and warnings.

    `own_data`: True if the model is used with other data than the measurements, for which nothing is promised.
    """
    promise = None if own_data else recommendation.promise
    if promise is None:
        yield "expect", "unknown, as nothing was measured with this model, data and ratio: evaluate first"
    else:
        yield "expect", f"{promise[0]:.1f} to {promise[1]:.1f} % retained (95 % interval for another seed)"
    for row in recommendation.rows:
        yield "measured", _measured(row, guide)
    yield "because", recommendation.because
    for warning in recommendation.warnings:
        yield "warning", warning


def _measured(row: Evidence, guide: Guide) -> str:
    """Return a measurement as text: retention, interval, model, data, and what was removed."""
    ends = "" if row.interval is None else f"{row.interval[0]:.2f} to {row.interval[1]:.2f}, "
    seeds = "1 seed" if (row.seeds or 1) == 1 else f"{row.seeds} seeds"
    control = "" if row.of_control is None else f", {row.of_control:.1f} % of control"
    return (
        f"{row.retained:.2f} % ({ends}{seeds}{control}) with {row.model}, {percent(row.decoder_ratio)} of its decoder "
        f"removed, {row.method} + {row.recovery}: {guide.sources[row.source].measure}"
    )


def summarize(recommendation: Recommendation) -> str:
    """Return the recommendation in one sentence."""
    return f"{pruning_of(recommendation)}; {recovery_of(recommendation)}"


def pruning_of(recommendation: Recommendation) -> str:
    """Return how to prune, and whether to reconstruct the pruned weights, as text."""
    ways = []
    for method, settings in recommendation.variants.items():
        keeps_heads = settings.get("prune", {}).get("heads") == "keep"
        way = _PRUNING[method].replace("neurons and heads", "neurons") if keeps_heads else _PRUNING[method]
        ways.append(way + ", then reconstruct" * (SOLVED in settings))
    return "; beside it ".join(ways)


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
    fraction = {"data": {"fraction": recommendation.data_fraction}} if recommendation.data_fraction else {}
    only = next(iter(recommendation.variants.values())) if len(recommendation.variants) == 1 else {}
    recipe, changes, start = _experiment(recommendation, cfg, settings, fraction, only)
    data, default = start.data, Experiment().data
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
        "from vlmprune_jax.run.cli.config_files import experiment_config",
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


def _experiment(
    recommendation: Recommendation, cfg: ModelConfig, *settings: Mapping[str, Any]
) -> tuple[str | None, dict[str, Any], Experiment]:
    """Return the family's recipe by name if it is the start, all changes to it, and the resulting experiment."""
    named = family_of(cfg).name
    recipe = named if recommendation.of_family and named in recipes() else None
    large = {"model": {"dtype": "bfloat16"}, "mesh": {"fsdp": -1}} if count_params(cfg) >= _LARGE else {}
    changes = merge({"model": {}}, large, recommendation.recipe, *settings)
    start = Experiment() if recipe is None else override(Experiment(), recipes()[recipe])
    return recipe, changes, override(start, changes)


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
