"""A stage is a declaration: the settings it takes, the files it reads and makes, and its function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from vlmprune_jax.workdir.ledger import Task

# What a stage is applied to: every prune variant, every recovery variant, every model made by these, the whole run.
SCOPES = ("variant", "recovery", "model", "run")


@dataclass(frozen=True)
class Stage:
    """Declaration of a pipeline stage, from which commands, sweeps and the ledger are derived.

    Args:
      help: one line, in the imperative.
      run: the function: `run(work, *sections)` makes the outputs and returns facts for the ledger, a `msgspec.Struct`
        that is its annotated return type, or None. Built-in stages leave it out, see `functions_of`.
      sections: the settings sections that it takes beside the model, in the order of its arguments.
      inputs: what it reads: "data.train" (records), "start" (the model it starts from), or names in its folder.
      outputs: names of what it makes in its folder, beside `model`; a pattern if `task` adds the files.
      model: the folder of the model that it makes, which is then evaluated and may be exported.
      scratch: what an interrupted run of it resumes from; `journals`: the same, dropped when inputs change.
      task: adds the files and settings that depend on the experiment: `task(task, work, *sections) -> Task`.
      per: what it is applied to, one of `SCOPES`.
      switch: the setting that turns it off by its value "none", as "recover.method".
      unneeded: says why settings need no run of it: `unneeded(sections) -> str | None`.
      version: raise it whenever the code gives other results for the same inputs: outputs are then made again.
      details: more for `vlmprune NAME --help`.
      beside: how to write another result beside the first, for the error about outputs made from other inputs.
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
