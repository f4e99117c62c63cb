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

from vlmprune_jax.core.checks import checked_call
from vlmprune_jax.core.errors import UserError

# Imported eagerly: the subpackages of the same names would otherwise shadow them. These import no jax.
from vlmprune_jax.families import FAMILIES as families
from vlmprune_jax.families import Family
from vlmprune_jax.stages.registry import STAGES as stages
from vlmprune_jax.stages.stage import Stage

importlib.import_module("vlmprune_jax.prune")
del globals()["prune"]  # the subpackage; the function of this name is loaded at first use, because it imports jax

if TYPE_CHECKING:
    from vlmprune_jax.core.channels import ChannelMixer
    from vlmprune_jax.core.config import ModelConfig
    from vlmprune_jax.core.mixers import Mixer
    from vlmprune_jax.core.part import Axis
    from vlmprune_jax.core.stack import Encoder
    from vlmprune_jax.data.placeholders import expand_images
    from vlmprune_jax.evaluation.answer import answer, questions
    from vlmprune_jax.evaluation.metrics import METRICS as metrics
    from vlmprune_jax.evaluation.metrics import Metric
    from vlmprune_jax.evaluation.runner import evaluate, perplexity
    from vlmprune_jax.evaluation.speed.clock import SpeedConfig
    from vlmprune_jax.evaluation.speed.measure import measure_questions, measure_speed
    from vlmprune_jax.export.format import Contents, Format
    from vlmprune_jax.export.formats import FORMATS as formats
    from vlmprune_jax.export.gptq import gptq, imatrix
    from vlmprune_jax.export.hub import push
    from vlmprune_jax.export.one_call import prune
    from vlmprune_jax.export.pruning import make_plan, prune_folder, prune_iteratively
    from vlmprune_jax.export.write import save
    from vlmprune_jax.hf.batches import batches
    from vlmprune_jax.hf.read import load
    from vlmprune_jax.models.channels import CHANNELS as channels
    from vlmprune_jax.models.encoders import ENCODERS as encoders
    from vlmprune_jax.models.encoders import EncoderModule
    from vlmprune_jax.models.generate import generate
    from vlmprune_jax.models.mixers import MIXERS as mixers
    from vlmprune_jax.models.params import count_params
    from vlmprune_jax.models.vlm import Model, forward, to_nnx
    from vlmprune_jax.prune import (
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
    from vlmprune_jax.prune.criteria import CRITERIA as criteria
    from vlmprune_jax.recovery.config import LossConfig, RecoverConfig
    from vlmprune_jax.recovery.loop import recover
    from vlmprune_jax.recovery.losses import losses
    from vlmprune_jax.recovery.terms import LossTerm

# Public name -> module, with ":NAME" if the module has another name for it. Loaded at first use, so that
# `import vlmprune_jax` takes milliseconds and imports no jax.
_HOMES = {
    "Axis": "core.part",
    "ChannelMixer": "core.channels",
    "Contents": "export.format",
    "Criterion": "prune",
    "Encoder": "core.stack",
    "EncoderModule": "models.encoders",
    "Format": "export.format",
    "KeptLayer": "prune",
    "LossConfig": "recovery.config",
    "LossTerm": "recovery.terms",
    "Metric": "evaluation.metrics",
    "Mixer": "core.mixers",
    "Model": "models.vlm",
    "ModelConfig": "core.config",
    "PlanConfig": "prune",
    "PrunePlan": "prune",
    "ReconstructConfig": "prune",
    "ScoreConfig": "prune",
    "RecoverConfig": "recovery.config",
    "Scores": "prune",
    "SpeedConfig": "evaluation.speed.clock",
    "VocabularyConfig": "prune",
    "answer": "evaluation.answer",
    "apply_plan": "prune",
    "batches": "hf.batches",
    "channels": "models.channels:CHANNELS",
    "compose": "prune",
    "count_params": "models.params",
    "criteria": "prune.criteria:CRITERIA",
    "encoders": "models.encoders:ENCODERS",
    "evaluate": "evaluation.runner",
    "expand_images": "data.placeholders",
    "fingerprint": "prune",
    "formats": "export.formats:FORMATS",
    "forward": "models.vlm",
    "generate": "models.generate",
    "gptq": "export.gptq",
    "imatrix": "export.gptq",
    "load": "hf.read",
    "losses": "recovery.losses",
    "make_plan": "export.pruning",
    "measure_questions": "evaluation.speed.measure",
    "measure_speed": "evaluation.speed.measure",
    "metrics": "evaluation.metrics:METRICS",
    "mixers": "models.mixers:MIXERS",
    "perplexity": "evaluation.runner",
    "prune": "export.one_call",
    "prune_folder": "export.pruning",
    "prune_iteratively": "export.pruning",
    "push": "export.hub",
    "questions": "evaluation.answer",
    "reconstruct": "prune",
    "recover": "recovery.loop",
    "save": "export.write",
    "score": "prune",
    "to_nnx": "models.vlm",
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
    "channels",
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
    "measure_questions",
    "measure_speed",
    "metrics",
    "mixers",
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
