"""Questions, the answers of several models, and the values of metrics on answers."""

from __future__ import annotations

from PIL import Image
from report_cases import FACTS, evaluated

from vlmprune_jax.io.data.records import Record
from vlmprune_jax.run.evaluation.metrics import METRICS
from vlmprune_jax.run.workdir.comparison import compare
from vlmprune_jax.run.workdir.result import Run

SCORES = {"questions": evaluated(0.8)}
RUNS = [
    Run(**{**FACTS, "name": name, "plan": plan, "recovery": recovery}, evaluation=compare(SCORES, SCORES))
    for name, plan, recovery in (
        ("depth", "d", "none"),
        ("depth-sft", "d", "sft"),
        ("width", "w", "none"),
        ("width-reconstructed", "w", "reconstructed"),
    )
]


def write_records(folder):
    """40 questions about 20 images, the last of which is damaged; the answers are yes and no."""
    for number in range(19):
        Image.new("RGB", (400, 100), (number * 10, 0, 0)).save(folder / f"{number}.png")
    (folder / "19.png").write_text("no image")
    return [
        Record(
            f"r{place}",
            (("human", f"<image>\nIs <b>{place} red?"), ("gpt", "yes" if place % 4 else "no")),
            (folder / f"{place // 2}.png",),
        )
        for place in range(40)
    ]


def answered(right):
    """(said, scores) of models that are right on these questions."""
    scores = {name: [float(place in mine) for place in range(40)] for name, mine in right.items()}
    return {name: ["yes" if one else "" for one in of] for name, of in scores.items()}, scores


def asked(*references, name="q", **fields):
    return Record(name, (("human", "What?"),), (), None, references, fields)


def measured(name, *answers):
    """(values, groups) of answers, each (prediction, record)."""
    records = [record for _, record in answers]
    scores = METRICS[name].score_all([prediction for prediction, _ in answers], records)
    return METRICS[name].values(scores, records), METRICS[name].values_of_groups(scores, records)


def value(name, prediction, record):
    return measured(name, (prediction, record))[0][METRICS[name].main]
