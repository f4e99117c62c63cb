"""A stage is a declaration: the settings it takes, the files it reads and makes, and its function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from vlmprune_jax.run.workdir.ledger import Task

# What a stage is applied to: every prune variant, every recovery variant, every model made by these, the whole run.
SCOPES = ("variant", "recovery", "model", "run")


@dataclass(frozen=True)
class Stage:
    """Declaration of a pipeline stage, from which commands, sweeps and the ledger are derived.

    Args:
      help: one line, in the imperative.
      run: function `run(work, *sections)` that makes the outputs and returns facts for the ledger: a `msgspec.Struct`
        (its annotated return type), or None. Built-in stages leave this field out, see `graph.BUILT_IN`.
      sections: config sections that `run` receives besides the model, in the order of its arguments.
      inputs: what the stage reads: "data.train" (records), "start" (the input model), or file names in its folder.
      outputs: names of the files that the stage writes besides `model`; a pattern if `task` adds the files.
      model: folder of the model that the stage makes. This model is then evaluated and may be exported.
      scratch: files from which an interrupted run of the stage continues.
      journals: like `scratch`, but deleted when inputs change.
      task: function that adds the files and settings that depend on the experiment: `task(task, work, *sections) ->
        Task`.
      per: what the stage is applied to, one of `SCOPES`.
      switch: setting whose value "none" turns the stage off, such as "recover.method".
      unneeded: function that returns why the settings make the stage unnecessary: `unneeded(sections) -> str | None`.
      version: number to raise whenever the code gives different results for the same inputs; then outputs are remade.
      details: more text for `vlmprune NAME --help`.
      beside: advice on how to make a second result, for the error about outputs made from other inputs.
    """

    help: str
    run: Callable[..., msgspec.Struct | None] | None = None
    sections: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    model: str = ""
    scratch: tuple[str, ...] = ()
    journals: tuple[str, ...] = ()
    task: Callable[..., Task] | None = None
    per: str = "recovery"
    switch: str = ""
    unneeded: Callable[[Mapping[str, Any]], str | None] | None = None
    version: int = 1
    details: str = ""
    beside: str = "use another --workdir"

    def off(self, sections: Mapping[str, Any]) -> str | None:
        """Return why the settings disable this stage, and how to enable it; None if it is enabled."""
        section, _, name = self.switch.partition(".")
        if self.switch and getattr(sections[section], name) == "none":
            return f'{self.switch} is "none": choose a method (`vlmprune help {self.switch}`)'
        return None if self.unneeded is None else self.unneeded(sections)
