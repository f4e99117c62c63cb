"""Questions for the report, chosen from the answers of all models while the data is at hand -> `eval/samples.json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmprune_jax.experiment.arguments import evaluation_sets
from vlmprune_jax.experiment.spec import Experiment
from vlmprune_jax.report.answers import UNPRUNED, find_evaluated, read_evaluated, scores_of
from vlmprune_jax.report.samples import SAMPLES, as_json, make_samples
from vlmprune_jax.stages import inputs
from vlmprune_jax.stages.context import Context
from vlmprune_jax.stages.evaluate import read_predictions
from vlmprune_jax.workdir.ledger import Json, write_text


def write_samples(experiment: Experiment, runs: Sequence[Json], context: Context) -> None:
    """Choose anew from the answers on disk, of every set of questions; `runs` are those of `result.json`."""
    sets = {}
    for key, of in evaluation_sets(experiment).items():
        if of.text is not None:
            continue
        records = inputs.evaluation_records(of, image_lead=True)
        said, scores = dict[str, list[str]](), dict[str, list[Any]]()
        for run in (None, *runs):
            path, name = find_evaluated(context.workdir, run, key), UNPRUNED if run is None else run["name"]
            if path is None:
                continue
            answers, worth = read_predictions(path), scores_of(read_evaluated(path))
            if len(answers) == len(worth) == len(records):  # else of an evaluation before, of other questions
                said[name], scores[name] = answers, worth
        if UNPRUNED in said and len(said) > 1:
            sets[key] = make_samples(records, runs, said, scores, max_pixels=experiment.data.max_image_pixels)
    if sets:
        write_text(context.workdir / SAMPLES, as_json(sets))
