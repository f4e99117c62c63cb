"""Records of the evaluation sets as batches of questions."""

from __future__ import annotations

import functools

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.sections import ModelSpec
from vlmprune_jax.data.config import DataSpec
from vlmprune_jax.data.encoding import Encoder
from vlmprune_jax.data.inputs import load_inputs, read_set
from vlmprune_jax.data.records import Record
from vlmprune_jax.evaluation.config import EvaluateSpec, EvaluationSetSpec
from vlmprune_jax.evaluation.questions import ArrangedQuestions, arrange_questions


def evaluation_records(of: EvaluationSetSpec, *, image_lead: bool) -> tuple[Record, ...]:
    """The questions of an evaluation set, perhaps only the first `of.questions`."""
    return tuple(read_set(of.data, of.images, "data.eval", image_lead, "stop")[: of.questions])


def arranged_questions(
    model: ModelSpec,
    data: DataSpec,
    evaluate: EvaluateSpec,
    of: EvaluationSetSpec,
    cfg: ModelConfig,
    *,
    multiple: int,
) -> ArrangedQuestions:
    """The questions of an evaluation set as batches; every model of an experiment is asked from the same ones.

    `multiple`: devices that share a batch.
    """
    inputs = load_inputs(model, data, cfg)
    records = evaluation_records(of, image_lead=inputs.template.image_lead)
    cfg.check_row("evaluate.max_length", evaluate.max_length or 0)
    encoder = inputs.encoder(cfg, evaluate.max_length or 0)
    return _arranged(records, encoder, evaluate.batch_size, multiple, of.prompt_suffix or "")


@functools.lru_cache(maxsize=16)
def _arranged(
    records: tuple[Record, ...], encoder: Encoder, batch_size: int, multiple: int, suffix: str
) -> ArrangedQuestions:
    return arrange_questions(records, encoder, batch_size=batch_size, multiple=multiple, prompt_suffix=suffix)
