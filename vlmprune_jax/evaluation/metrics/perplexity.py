"""Perplexity of running text: exp of the mean negative log-likelihood per predicted token."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vlmprune_jax.data.records import Record
from vlmprune_jax.evaluation.metrics.metric import Metric, Scores


def _aggregate(scores: Sequence[Scores], records: Sequence[Record]) -> dict[str, float]:
    del records
    nats, tokens = 0.0, 0.0
    for score in scores:
        nats, tokens = nats + score["nll"], tokens + score["tokens"]
    return {"perplexity": math.exp(nats / tokens) if nats / tokens < 700 else math.inf}


PERPLEXITY = Metric("perplexity", None, _aggregate, full=None, unit="", higher_is_better=False)
