"""Questions for the report, chosen from the answers of all models while the data is at hand -> `eval/samples.json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmprune_jax.data.config import DataSpec
from vlmprune_jax.evaluation.config import EvaluateSpec
from vlmprune_jax.evaluation.questions import evaluation_records
from vlmprune_jax.experiment.arguments import evaluation_sets
from vlmprune_jax.stages.evaluate import read_predictions
from vlmprune_jax.workdir.artefact import write_artefact
from vlmprune_jax.workdir.evaluation import UNPRUNED, find_evaluated, read_evaluated
from vlmprune_jax.workdir.result import Run
from vlmprune_jax.workdir.samples import SAMPLES, Samples, make_samples


def write_samples(workdir: Path, data: DataSpec, evaluate: EvaluateSpec, runs: Sequence[Run]) -> None:
    """Choose samples from the answers on disk, for every set of questions."""
    sets = {}
    for key, of in evaluation_sets(data, evaluate).items():
        if of.text is not None:
            continue
        records = evaluation_records(of, image_lead=True)
        said, scores = dict[str, list[str]](), dict[str, list[float | None]]()
        for name, folder in [(UNPRUNED, None), *((run.name, run.path) for run in runs)]:
            path = find_evaluated(workdir, folder, key)
            if path is None:
                continue
            answers, worth = read_predictions(path), read_evaluated(path).question_scores
            if len(answers) == len(worth) == len(records):  # else an earlier evaluation, on other questions
                said[name], scores[name] = answers, worth
        if UNPRUNED in said and len(said) > 1:
            sets[key] = make_samples(records, runs, said, scores, max_pixels=data.max_image_pixels)
    if sets:
        write_artefact(workdir / SAMPLES, Samples(sets=sets))
