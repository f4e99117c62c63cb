"""Structured pruning and recovery of vision-language models, from Hugging Face folder to Hugging Face folder.

import vlmprune_jax as vp

model = vp.load("DIR/llava-1.5-7b-hf")
scores = vp.score(model, batches, criterion="block_influence")
plan = vp.make_plan(scores, model.cfg, method="depth", ratio=0.3)
vp.save(vp.apply_plan(model, plan), "DIR/pruned", source_dir="DIR/llava-1.5-7b-hf")

vp.prune_folder("DIR/llava-1.5-7b-hf", plan, "DIR/pruned")  # the same from file to file, without the model in memory
"""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vlmprune_jax.errors import UserError

if TYPE_CHECKING:
    from vlmprune_jax.config import ModelConfig
    from vlmprune_jax.evaluate.runner import evaluate, perplexity
    from vlmprune_jax.hf.read import load
    from vlmprune_jax.hf.write import save
    from vlmprune_jax.models.generate import generate
    from vlmprune_jax.models.vlm import Model, forward, to_nnx
    from vlmprune_jax.prune import PrunePlan, Scores, apply_plan, make_plan, prune_folder, score
    from vlmprune_jax.recover import RecoverConfig, recover

# Public name -> module. They load at first use: `import vlmprune_jax` takes milliseconds, jax comes with a call.
_HOMES = {
    "Model": "models.vlm",
    "ModelConfig": "config",
    "PrunePlan": "prune",
    "RecoverConfig": "recover",
    "Scores": "prune",
    "apply_plan": "prune",
    "evaluate": "evaluate.runner",
    "forward": "models.vlm",
    "generate": "models.generate",
    "load": "hf.read",
    "make_plan": "prune",
    "perplexity": "evaluate.runner",
    "prune_folder": "prune",
    "recover": "recover",
    "save": "hf.write",
    "score": "prune",
    "to_nnx": "models.vlm",
}

__all__ = [
    "Model",
    "ModelConfig",
    "PrunePlan",
    "RecoverConfig",
    "Scores",
    "UserError",
    "apply_plan",
    "evaluate",
    "forward",
    "generate",
    "load",
    "make_plan",
    "perplexity",
    "prune_folder",
    "recover",
    "save",
    "score",
    "to_nnx",
]


def _function(name: str) -> Any:
    return getattr(importlib.import_module(f"vlmprune_jax.{_HOMES[name]}"), name)


class _CallableModule(ModuleType):
    """The subpackages `recover` and `evaluate` are the public functions of their names as well: importing
    `vlmprune_jax.recover.losses` makes `vlmprune_jax.recover` the subpackage, and `vp.recover(...)` has to go on
    working.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _function(self.__name__.rpartition(".")[2])(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(_function(self.__name__.rpartition(".")[2]))


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vlmprune_jax' has no attribute {name!r}")
    if name in ("evaluate", "recover"):
        return importlib.import_module(f"vlmprune_jax.{name}")
    value = _function(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
