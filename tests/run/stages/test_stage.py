"""The registry of stages: each is declared."""

from vlmprune_jax.base.settings import STAGES
from vlmprune_jax.run.stages.stage import STAGES as DECLARED


def test_every_stage_is_declared():
    assert set(STAGES) - {"teacher_cache"} == set(DECLARED)
