"""A recommendation of the guide in words."""

from __future__ import annotations

from vlmprune_jax.planning.guide import Recommendation

_PRUNING = {"depth": "remove whole layers by Block Influence", "width": "remove neurons and heads by Taylor importance"}
_TRAINED = {"projector": "the projector alone", "sft_l2": "adapters and projector, SFT + L2 distillation,"}


def summarize(found: Recommendation) -> str:
    """Return the recommendation in one sentence."""
    parts = []
    for method, settings in found.variants.items():
        repaired = ", reconstruct the kept weights by least squares" if "reconstruct" in settings else ""
        parts.append(_PRUNING[method] + repaired)
    pruning = "; and beside it ".join(parts)
    if found.rule.recovery == "none":
        return f"{pruning}; no training"
    return f"{pruning}; then train {_TRAINED[found.rule.recovery]} on {percent(found.data_fraction)} of the data"


def rule_lines(found: Recommendation) -> list[str]:
    """Return the recommendation, or the nearest one if nothing supports it, with its reason and source."""
    rule = found.rule
    return [
        f"{'recommended' if rule.supported else 'nothing supports this; the nearest'}: {summarize(found)}",
        f"  why: {rule.why}",
        f"  from: {rule.source} ({rule.label})",
    ]


def expectation_lines(found: Recommendation) -> list[str]:
    """Return the expected retention source by source, the notes, and where sources contradict each other."""
    lines = []
    for one in found.expected:
        beside = "" if one.alike else " (of another kind of model)"
        kinds = " and ".join(dict.fromkeys(row.recovery for row in one.rows))
        low = "at most " if one.low is None else "" if one.low == one.high else f"{one.low:.1f} to "
        said = f"{one.source.measure}{beside}, after {kinds} [{one.source.title}]"
        lines.append(f"  expect {low}{one.high:.1f} % retained: {said}")
    lines += [f"  note: {note}" for note in found.notes]
    return lines + [f"  conflict: {text}" for text in found.conflicts]


def percent(value: float) -> str:
    """Format a share as a percentage."""
    return f"{100 * value:.4g} %"
