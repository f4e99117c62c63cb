"""Questions and the values of metrics on their answers."""

from vlmprune_jax.io.data.records import Record
from vlmprune_jax.run.evaluation.metrics import METRICS


def asked(*references, name="q", **fields):
    return Record(name, (("human", "What?"),), (), None, references, fields)


def measured(name, *answers):
    """(values, groups) of answers, each (prediction, record)."""
    records = [record for _, record in answers]
    scores = METRICS[name].score_all([prediction for prediction, _ in answers], records)
    return METRICS[name].values(scores, records), METRICS[name].values_of_groups(scores, records)


def value(name, prediction, record):
    return measured(name, (prediction, record))[0][METRICS[name].main]
