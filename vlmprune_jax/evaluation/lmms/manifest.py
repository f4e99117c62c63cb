"""What lmms-eval finds of this package: the entry point of group `lmms_eval.models`."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The model `vlmprune_jax` (lmms-eval's ModelManifest).

    Imports within: lmms-eval loads entry points while it is being imported itself, and one that fails takes those after
    it along.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="vlmprune_jax", chat_class_path="vlmprune_jax.stages.lmms_backend.VlmpruneJax")
