"""A stage is a declaration: the settings it takes, the files it reads and makes, and its function."""

from __future__ import annotations

import importlib
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

# What a stage is applied to: every prune variant, every recovery variant, every model made by these, the whole run.
SCOPES = ("variant", "recovery", "model", "run")


@dataclass(frozen=True)
class Files:
    """Inputs, outputs and settings of a stage that depend on the experiment.

    `settings` change the result beside those of the stage's sections; those in `without` do not.
    """

    inputs: Mapping[str, Path | str] = field(default_factory=dict)
    outputs: Sequence[Path] = ()
    journals: Sequence[Path] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    without: Collection[str] = ()


class NoFacts(msgspec.Struct, frozen=True):
    """Result of a stage that reports nothing."""


@dataclass(frozen=True)
class Stage:
    """Declaration of a pipeline stage, from which commands, sweeps and the ledger are derived.

    Args:
      help: one line, in the imperative.
      run: the function, or "module:name" of one of this package's: `run(work, *sections)` makes the outputs and returns
        facts for the ledger, a `msgspec.Struct` that is its annotated return type, or None.
      sections: the settings sections that it takes beside the model, in the order of its arguments.
      inputs: what it reads: "data.train" (records), "start" (the model it starts from), or names in its folder.
      outputs: names of what it makes in its folder, beside `model`; a pattern if `files` says which.
      model: the folder of the model that it makes, which is then evaluated and may be exported.
      scratch: what an interrupted run of it resumes from; `journals`: the same, dropped when inputs change.
      files: what depends on settings, or "module:name" of it: `files(work, *sections) -> Files`.
      per: what it is applied to, one of `SCOPES`.
      switch: the setting that turns it off by its value "none", as "recover.method".
      unneeded: says why settings need no run of it, or "module:name" of it: `unneeded(sections) -> str | None`.
      version: raise it whenever the code gives other results for the same inputs: outputs are then made again.
      details: more for `vlmprune NAME --help`.
      beside: how to write another result beside the first, for the error about outputs made from other inputs.
    """

    help: str
    run: Callable[..., msgspec.Struct | None] | str
    sections: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    model: str = ""
    scratch: tuple[str, ...] = ()
    journals: tuple[str, ...] = ()
    files: Callable[..., Files] | str | None = None
    per: str = "recovery"
    switch: str = ""
    unneeded: Callable[[Mapping[str, Any]], str | None] | str | None = None
    version: int = 1
    details: str = ""
    beside: str = "use another --workdir"

    @property
    def function(self) -> Callable[..., msgspec.Struct | None]:
        """Function that does the stage's work."""
        return _load(self.run)

    @property
    def facts(self) -> type[msgspec.Struct]:
        """Struct type that the stage's function returns."""
        return typing.get_type_hints(self.function).get("return", NoFacts)

    def is_on(self, sections: Mapping[str, Any]) -> bool:
        """Return True if the settings enable this stage."""
        return self.off(sections) is None

    def off(self, sections: Mapping[str, Any]) -> str | None:
        """Return why the settings disable this stage, and how to enable it; None if it is enabled."""
        section, _, name = self.switch.partition(".")
        if self.switch and getattr(sections[section], name) == "none":
            return f'{self.switch} is "none": choose a method (`vlmprune help {self.switch}`)'
        return None if self.unneeded is None else _load(self.unneeded)(sections)

    def more(self, work: Any, *sections: Any) -> Files:
        """Return the stage's inputs, outputs and settings that depend on the experiment."""
        return Files() if self.files is None else _load(self.files)(work, *sections)


def _load(function: Callable[..., Any] | str) -> Callable[..., Any]:
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(f"vlmprune_jax.{module}"), name)
