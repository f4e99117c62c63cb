"""Structured pruning and recovery of vision-language models, from Hugging Face folder to Hugging Face folder.

import vlmprune_jax as vp

vp.prune("DIR/llava-1.5-7b-hf", "train.json", ratio=0.3, images="DIR").save("DIR/pruned")  # or step by step:

batches = vp.batches("DIR/llava-1.5-7b-hf", "train.json", images="DIR", samples=50)
model = vp.load("DIR/llava-1.5-7b-hf")
scores = vp.score(model, batches, criterion="block_influence")
plan = vp.make_plan(scores, model.cfg, method="depth", ratio=0.3)
vp.apply_plan(model, plan).save("DIR/pruned")

vp.prune_folder("DIR/llava-1.5-7b-hf", plan, "DIR/pruned")  # the same without the model in memory
"""

from __future__ import annotations

import importlib
from types import FunctionType
from typing import TYPE_CHECKING, Any

from vlmprune_jax.base.checks import checked_call
from vlmprune_jax.base.errors import UserError

if TYPE_CHECKING:
    from vlmprune_jax.core.channels import ChannelMixer
    from vlmprune_jax.core.config import ModelConfig
    from vlmprune_jax.core.layer import Encoder
    from vlmprune_jax.core.mixers import Mixer
    from vlmprune_jax.core.models.block import PARTS as parts
    from vlmprune_jax.core.models.generate import generate
    from vlmprune_jax.core.models.params import count_params
    from vlmprune_jax.core.models.stack import ENCODERS as encoders
    from vlmprune_jax.core.models.stack import EncoderModule
    from vlmprune_jax.core.models.vlm import Model, forward, to_nnx
    from vlmprune_jax.core.part import Axis, Part
    from vlmprune_jax.core.prune import (
        Criterion,
        KeptLayer,
        PlanConfig,
        PrunePlan,
        ReconstructConfig,
        ScoreConfig,
        Scores,
        VocabularyConfig,
        apply_plan,
        compose,
        fingerprint,
        reconstruct,
        score,
    )
    from vlmprune_jax.core.prune.criteria import CRITERIA as criteria
    from vlmprune_jax.core.recovery.config import LossConfig, RecoverConfig
    from vlmprune_jax.core.recovery.loop import recover
    from vlmprune_jax.core.recovery.losses import losses
    from vlmprune_jax.core.recovery.terms import LossTerm
    from vlmprune_jax.io.checkpoints.batches import batches
    from vlmprune_jax.io.checkpoints.read import load
    from vlmprune_jax.io.data.prompts import expand_images
    from vlmprune_jax.io.exports.card import push
    from vlmprune_jax.io.exports.formats import FORMATS as formats
    from vlmprune_jax.io.exports.formats import Contents, Format
    from vlmprune_jax.io.exports.gptq import gptq, imatrix
    from vlmprune_jax.io.exports.pruning import make_plan, prune, prune_folder, prune_iteratively
    from vlmprune_jax.io.exports.write import save
    from vlmprune_jax.io.families import FAMILIES as families
    from vlmprune_jax.io.families import Family
    from vlmprune_jax.run.evaluation.answer import answer, questions
    from vlmprune_jax.run.evaluation.config import SpeedConfig
    from vlmprune_jax.run.evaluation.metrics import METRICS as metrics
    from vlmprune_jax.run.evaluation.metrics import Metric
    from vlmprune_jax.run.evaluation.runner import evaluate, perplexity
    from vlmprune_jax.run.speed.bench import measure_speed
    from vlmprune_jax.run.stages.stage import STAGES as stages
    from vlmprune_jax.run.stages.stage import Stage

# Public name -> module, with ":NAME" if the module has another name for it. Loaded at first use, so that
# `import vlmprune_jax` takes milliseconds and imports no jax.
_HOMES = {
    "Family": "io.families",
    "Stage": "run.stages.stage",
    "families": "io.families:FAMILIES",
    "stages": "run.stages.stage:STAGES",
    "Axis": "core.part",
    "ChannelMixer": "core.channels",
    "Contents": "io.exports.formats",
    "Criterion": "core.prune",
    "Encoder": "core.layer",
    "EncoderModule": "core.models.stack",
    "Format": "io.exports.formats",
    "KeptLayer": "core.prune",
    "LossConfig": "core.recovery.config",
    "LossTerm": "core.recovery.terms",
    "Metric": "run.evaluation.metrics",
    "Mixer": "core.mixers",
    "Model": "core.models.vlm",
    "ModelConfig": "core.config",
    "Part": "core.part",
    "PlanConfig": "core.prune",
    "PrunePlan": "core.prune",
    "ReconstructConfig": "core.prune",
    "ScoreConfig": "core.prune",
    "RecoverConfig": "core.recovery.config",
    "Scores": "core.prune",
    "SpeedConfig": "run.evaluation.config",
    "VocabularyConfig": "core.prune",
    "answer": "run.evaluation.answer",
    "apply_plan": "core.prune",
    "batches": "io.checkpoints.batches",
    "compose": "core.prune",
    "count_params": "core.models.params",
    "criteria": "core.prune.criteria:CRITERIA",
    "encoders": "core.models.stack:ENCODERS",
    "evaluate": "run.evaluation.runner",
    "expand_images": "io.data.prompts",
    "fingerprint": "core.prune",
    "formats": "io.exports.formats:FORMATS",
    "forward": "core.models.vlm",
    "generate": "core.models.generate",
    "gptq": "io.exports.gptq",
    "imatrix": "io.exports.gptq",
    "load": "io.checkpoints.read",
    "losses": "core.recovery.losses",
    "make_plan": "io.exports.pruning",
    "measure_speed": "run.speed.bench",
    "metrics": "run.evaluation.metrics:METRICS",
    "parts": "core.models.block:PARTS",
    "perplexity": "run.evaluation.runner",
    "prune": "io.exports.pruning",
    "prune_folder": "io.exports.pruning",
    "prune_iteratively": "io.exports.pruning",
    "push": "io.exports.card",
    "questions": "run.evaluation.answer",
    "reconstruct": "core.prune",
    "recover": "core.recovery.loop",
    "save": "io.exports.write",
    "score": "core.prune",
    "to_nnx": "core.models.vlm",
}

__all__ = [
    "Axis",
    "ChannelMixer",
    "Contents",
    "Criterion",
    "Encoder",
    "EncoderModule",
    "Family",
    "Format",
    "KeptLayer",
    "LossConfig",
    "LossTerm",
    "Metric",
    "Mixer",
    "Model",
    "ModelConfig",
    "Part",
    "PlanConfig",
    "PrunePlan",
    "ReconstructConfig",
    "RecoverConfig",
    "ScoreConfig",
    "Scores",
    "SpeedConfig",
    "Stage",
    "UserError",
    "VocabularyConfig",
    "answer",
    "apply_plan",
    "batches",
    "compose",
    "count_params",
    "criteria",
    "encoders",
    "evaluate",
    "expand_images",
    "families",
    "fingerprint",
    "formats",
    "forward",
    "generate",
    "gptq",
    "imatrix",
    "load",
    "losses",
    "make_plan",
    "measure_speed",
    "metrics",
    "parts",
    "perplexity",
    "prune",
    "prune_folder",
    "prune_iteratively",
    "push",
    "questions",
    "reconstruct",
    "recover",
    "save",
    "score",
    "stages",
    "to_nnx",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vlmprune_jax' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    value = getattr(importlib.import_module(f"vlmprune_jax.{module}"), attribute or name)
    value = checked_call(value) if isinstance(value, FunctionType) else value
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__]
