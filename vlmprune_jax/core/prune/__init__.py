"""Score, plan, apply: choose layers, heads and neurons to remove, as numbers, a small JSON and pure indexing."""

from vlmprune_jax.core.plans.kept import KeptLayer, KeptStack, KeptVocabulary
from vlmprune_jax.core.plans.plan import PrunePlan, compose, keep_everything
from vlmprune_jax.core.prune.config import METHODS, PlanConfig, ScoreConfig, VocabularyConfig
from vlmprune_jax.core.prune.criteria import CRITERIA, Criterion
from vlmprune_jax.core.prune.fingerprints import fingerprint
from vlmprune_jax.core.prune.reconstruct_config import ReconstructConfig
from vlmprune_jax.core.prune.reconstruction import reconstruct
from vlmprune_jax.core.prune.scores import Scores, score
from vlmprune_jax.core.prune.surgery import apply_plan

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
    "reconstruct",
    "score",
]
