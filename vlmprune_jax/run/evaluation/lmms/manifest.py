"""Entry point of the group `lmms_eval.models`, through which lmms-eval finds this package."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """Return lmms-eval's plug-in description (ModelManifest) of the model `vlmprune_jax`.

    The import is inside the function because lmms-eval loads entry points while it is being imported itself. An entry
    point that fails disables all later entry points.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="vlmprune_jax", chat_class_path="vlmprune_jax.run.evaluation.lmms.backend.VlmpruneJax"
    )
