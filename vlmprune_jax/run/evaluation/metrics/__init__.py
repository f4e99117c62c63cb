"""Metrics by name. A file of the user adds a metric by assignment: `vp.metrics["mine"] = vp.Metric(...)`."""

from __future__ import annotations

from vlmprune_jax.base.checks import Registry, one_of
from vlmprune_jax.run.evaluation.metrics.choices import AI2D, MATHVISTA, MMMU, SCIENCEQA
from vlmprune_jax.run.evaluation.metrics.metric import Metric
from vlmprune_jax.run.evaluation.metrics.texts import ANLS, EXACT_MATCH, GQA, PERPLEXITY, VQA_ACCURACY
from vlmprune_jax.run.evaluation.metrics.yes_no import MME, MME_COGNITION, MME_PERCEPTION, POPE

METRICS = Registry(
    "metrics",
    Metric,
    {
        "exact_match": EXACT_MATCH,
        "perplexity": PERPLEXITY,
        "vqa_accuracy": VQA_ACCURACY,
        "scienceqa": SCIENCEQA,
        "ai2d": AI2D,
        "mmmu": MMMU,
        "pope": POPE,
        "mme": MME,
        "mme_perception": MME_PERCEPTION,
        "mme_cognition": MME_COGNITION,
        "anls": ANLS,
        "gqa": GQA,
        "mathvista": MATHVISTA,
    },
)

__all__ = ["METRICS", "Metric", "metric_named"]


def metric_named(name: str, what: str = "metric") -> Metric:
    """Return the metric called `name`; error messages mention the setting `what`."""
    return METRICS[one_of(what, name, METRICS)]
