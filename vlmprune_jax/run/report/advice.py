"""A recommendation of the guide, for the terminal and for a page."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vlmprune_jax.base.console import Reporter
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import read_bytes
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.run.experiment.recipes import YAML
from vlmprune_jax.run.planning.guide import SOLVED, Guide, Recommendation, merge
from vlmprune_jax.run.planning.recommend import DTYPE, PLACEHOLDERS, Advice, exported_bytes, size_text
from vlmprune_jax.run.workdir.ledger import write_text

WIDTH = 80  # characters per line of a recommendation
_PRUNING = {
    "depth": "remove whole layers by Block Influence",
    "width": "remove neurons and heads by Taylor importance",
    "hybrid": "remove whole layers by Block Influence, and neurons and heads by Taylor importance",
}
_TRAINED = {"projector": "the projector alone", "lora": "adapters and projector", "decoder": "decoder and projector"}
_LOSSES = {"ce": "SFT", "l2": "L2 distillation", "kl": "KL distillation"}


def tell(advice: Advice, guide: Guide, save: str | None, given: Sequence[str], reporter: Reporter) -> None:
    """Print a recommendation, the command to run, and the evidence; with `save`, write the config to a file.

    `guide`: the guide of the recommendation. `given`: flags of this command; if `save` is None, the printed command
    repeats them and writes the config.
    """
    recommendation = advice.recommendation
    path = Path(save or f"recommended_{100 * recommendation.target.ratio:.3g}.yaml")
    if path.suffix not in YAML or "\0" in path.name:
        raise UserError(f"--save={save}: must be the name of a config file, such as recommended.yaml")
    if save is not None:
        text = advice.config.encode(errors="backslashreplace")
        same_size = path.is_file() and path.stat().st_size == len(text)
        if path.exists() and not (same_size and read_bytes(path, len(text)) == text):
            raise UserError(f"--save={path}: exists already: choose another name, or remove the file")
        write_text(path, advice.config)
    _say(decision(advice), reporter)
    first = [] if save is not None else ["vlmprune", "recommend", *given, f"--save={path}", "&&"]
    values = {"config": path, "workdir": f"runs/{path.stem}"}
    values |= {f"config.data.{name}": PLACEHOLDERS[name] for name in advice.missing}
    run = ["vlmprune", "run", *(shlex.quote(f"--{name}={value}") for name, value in values.items())]
    for line in ["", *_shell(first), *_shell(run), ""]:
        reporter.say(line)
    _say(evidence(recommendation, guide, advice.own_data), reporter)
    if not advice.own_data:
        _say([("more", "--train, --images and --eval set your files")], reporter)


def _say(pairs: Iterable[tuple[str, str]], reporter: Reporter) -> None:
    """Print (label, text) pairs in lines of at most `WIDTH` characters."""
    for label, text in pairs:
        for line in textwrap.wrap(f"{label}: {text}", WIDTH, subsequent_indent="  ", break_on_hyphens=False):
            reporter.say(line)


def _shell(arguments: Sequence[str]) -> list[str]:
    """Return a shell command in lines of at most `WIDTH` characters, as far as its arguments allow."""
    lines = list[str]()
    for argument in arguments:
        if lines and len(f"{lines[-1]} {argument} \\") <= WIDTH:
            lines[-1] += f" {argument}"
        else:
            lines.append(f"  {argument}" if not lines else f"      {argument}")
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def decision(advice: Advice) -> Iterator[tuple[str, str]]:
    """Yield (label, text) of the recommended steps: how to prune and recover, and the size of the pruned model."""
    recommendation, cfg = advice.recommendation, advice.cfg
    asked, whole = recommendation.target, size_text(exported_bytes(count_params(cfg)))

    def shares(ratio: float, decoder_ratio: float) -> str:
        return f"{percent(ratio)} of the model ({percent(decoder_ratio)} of the decoder)"

    yield "asked", shares(asked.ratio, asked.decoder_ratio)
    yield "prune", pruning_of(recommendation)
    yield "recover", recovery_of(recommendation)
    if advice.steps is not None:
        yield "steps", advice.steps
    sizes = []
    for method, plan in advice.plans.items():
        layers = f", {len(plan.stacks['text'].layers)} of {len(cfg.text.layers)} layers" if method != "width" else ""
        size = f"{size_text(exported_bytes(plan.parameters_after))} of {whole} in {DTYPE}"
        of_decoder = plan.actual_ratio * count_params(cfg) / count_params(cfg, "text")
        sizes.append(f"{size}{layers}, {shares(plan.actual_ratio, of_decoder)} removed")
    yield "size", "; ".join(sizes)


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
        ends = "" if row.interval is None else f"{row.interval[0]:.2f} to {row.interval[1]:.2f}, "
        seeds = "1 seed" if row.n_seeds == 1 else f"{row.seeds} seeds"
        control = "" if row.of_control is None else f", {row.of_control:.1f} % of control"
        yield (
            "measured",
            f"{row.retained:.2f} % ({ends}{seeds}{control}) with {row.model}, {percent(row.decoder_ratio)} of its "
            f"decoder removed, {row.way}: {guide.sources[row.source].measure}",
        )
    yield "because", recommendation.because
    for warning in recommendation.warnings:
        yield "warning", warning


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
