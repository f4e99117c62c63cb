"""Metrics by name. A user's own file adds one by assignment: `vp.metrics["anls"] = vp.Metric(...)`."""

from __future__ import annotations

from vlmprune_jax.checks import one_of
from vlmprune_jax.evaluation.metrics.exact_match import EXACT_MATCH
from vlmprune_jax.evaluation.metrics.metric import Metric
from vlmprune_jax.evaluation.metrics.perplexity import PERPLEXITY

METRICS: dict[str, Metric] = {"exact_match": EXACT_MATCH, "perplexity": PERPLEXITY}

__all__ = ["METRICS", "Metric", "metric_named"]


def metric_named(name: str, what: str = "metric") -> Metric:
    """The metric of a name; `what` names the setting in the message.

    Raises:
      UserError: there is none, with the nearest that exists.
    """
    return METRICS[one_of(what, name, METRICS)]
