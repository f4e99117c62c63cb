"""Score, plan, apply: choose layers, heads and neurons to remove, as numbers, a small JSON and pure indexing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmprune_jax.plans.kept import KeptLayer, KeptStack, KeptVocabulary
    from vlmprune_jax.plans.plan import PrunePlan, compose, keep_everything
    from vlmprune_jax.prune.config import METHODS, PlanConfig, ScoreConfig, VocabularyConfig
    from vlmprune_jax.prune.criteria import CRITERIA, Criterion
    from vlmprune_jax.prune.fingerprints import fingerprint
    from vlmprune_jax.prune.folder import prune_folder
    from vlmprune_jax.prune.iterative import prune_iteratively
    from vlmprune_jax.prune.reconstruct_config import ReconstructConfig
    from vlmprune_jax.prune.reconstruction import reconstruct
    from vlmprune_jax.prune.scores import Scores
    from vlmprune_jax.prune.scoring import score
    from vlmprune_jax.prune.select import make_plan
    from vlmprune_jax.prune.surgery import apply_plan

# Public name -> module; loaded at first use, because most import jax.
_HOMES = {
    "KeptLayer": "plans.kept",
    "KeptStack": "plans.kept",
    "KeptVocabulary": "plans.kept",
    "PrunePlan": "plans.plan",
    "compose": "plans.plan",
    "keep_everything": "plans.plan",
    "METHODS": "prune.config",
    "PlanConfig": "prune.config",
    "ScoreConfig": "prune.config",
    "VocabularyConfig": "prune.config",
    "CRITERIA": "prune.criteria",
    "Criterion": "prune.criteria",
    "fingerprint": "prune.fingerprints",
    "prune_folder": "prune.folder",
    "prune_iteratively": "prune.iterative",
    "ReconstructConfig": "prune.reconstruct_config",
    "reconstruct": "prune.reconstruction",
    "Scores": "prune.scores",
    "score": "prune.scoring",
    "make_plan": "prune.select",
    "apply_plan": "prune.surgery",
}

__all__ = [
    "CRITERIA",
    "METHODS",
    "Criterion",
    "KeptLayer",
    "KeptStack",
    "KeptVocabulary",
    "PlanConfig",
    "PrunePlan",
    "ReconstructConfig",
    "ScoreConfig",
    "Scores",
    "VocabularyConfig",
    "apply_plan",
    "compose",
    "fingerprint",
    "keep_everything",
    "make_plan",
    "prune_folder",
    "prune_iteratively",
    "reconstruct",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vlmprune_jax.prune' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"vlmprune_jax.{_HOMES[name]}"), name)
    return value
