"""What stages share: where they work, how they report, and how they reach the model of an experiment."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from vlmprune_jax.core.console import Reporter
from vlmprune_jax.core.errors import Stopped, UserError, reason
from vlmprune_jax.core.source import ModelSpec
from vlmprune_jax.data.tokenizer_files import without_output
from vlmprune_jax.distributed.config import MeshSpec
from vlmprune_jax.distributed.journal import Journal
from vlmprune_jax.distributed.mesh import mesh_of
from vlmprune_jax.distributed.preemption import StopSignal, noticed
from vlmprune_jax.export.card import model_name
from vlmprune_jax.export.write import save
from vlmprune_jax.hf.layout import PARTS
from vlmprune_jax.hf.lazy import open_model
from vlmprune_jax.hf.read import load
from vlmprune_jax.models.vlm import Model
from vlmprune_jax.prune import PrunePlan
from vlmprune_jax.workdir.ledger import Json, Stage, run_stage
from vlmprune_jax.workdir.store import Store

# Raised whenever a stage's code gives other results for the same inputs: its outputs are then made again.
VERSIONS = {"score": 1, "prune": 1, "reconstruct": 1, "recover": 1, "evaluate": 2, "export": 1, "speed": 1}


@dataclass(frozen=True)
class Context:
    """What stages share beside the experiment: where they work, how they report, and whether they may replace.

    `store`: of a run of a sweep, where runs leave for each other what they made.
    """

    workdir: Path
    reporter: Reporter
    overwrite: bool
    store: Store | None = None

    def run(self, stage: Stage, body: Callable[[], Json]) -> Json:
        """`ledger.run_stage`, with a line when the work starts.

        Raises:
          Stopped: another process of the run got SIGTERM.
          UserError: it needs more memory than there is.
        """

        def announced() -> Json:
            if noticed():
                raise Stopped(f"stopped on SIGTERM before {stage.name}; the same command continues with it")
            self.reporter.say(f"{stage.name} ...")
            with without_output():
                jax.devices()  # starts them: where it finds no TPU, libtpu says so at length
            with in_memory(stage.name):
                return body()

        return run_stage(stage, announced, overwrite=self.overwrite, say=self.reporter.say)

    @contextlib.contextmanager
    def phase(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """`reporter.bar` that ends between two items on SIGTERM.

        Raises:
          Stopped: from the function that takes the number of items done; every process must call it in step.
        """
        with self.reporter.bar(what, total) as update, StopSignal() as stop:

            def progress(done: int) -> None:
                update(done)
                if stop.requested():
                    raise Stopped(f"{what} stopped on SIGTERM after {done} of {total}; the same command continues")

            yield progress

    def stage(self, kind: str, folder: Path, name: str, **parts: Any) -> Stage:
        """A stage named after its folder below the workdir, `depth/prune`; its ledger entry lies in the workdir."""
        below = folder.relative_to(self.workdir).as_posix()
        label = name if below == "." else f"{below}/{name}"
        return Stage(label, VERSIONS[kind], self.workdir, kind=kind, store=self.store, **parts)


@contextlib.contextmanager
def in_memory(what: str) -> Iterator[None]:
    """Tell in one line that work did not fit, which XLA does in fifty.

    Raises:
      UserError: says which settings make it smaller.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"{what}: needs more memory than there is ({reason(error)}): lower its batch_size, or what a row may hold "
            "(data.max_length, data.max_images, max_new_tokens, text_window), or give it more devices"
        ) from error


def journal_of(mesh: MeshSpec, path: Path, batches: int) -> Journal:
    """What an interrupted pass over so many batches left; another mesh may cut and round them in another way."""
    return Journal(path, {"batches": batches, "mesh": vars(mesh)})


def load_model(spec: ModelSpec, mesh: MeshSpec, folder: Path, parts: Collection[str] = PARTS) -> Model:
    """The model in a folder of this experiment, or parts of it, in its dtype and on its mesh."""
    return load(folder, vision_dir=spec.vision_dir, dtype=spec.dtype, mesh=mesh_of(mesh), parts=parts)


def open_folder(spec: ModelSpec, folder: Path) -> Model:
    """The model in a folder of this experiment, its weights in their files."""
    return open_model(folder, None if spec.vision_dir is None else Path(spec.vision_dir))


def teacher_folder(spec: ModelSpec) -> Path:
    """The unpruned model's folder.

    Raises:
      UserError: it is not set or not there.
    """
    if not spec.hf_dir:
        raise UserError("model.hf_dir is not set: give the Hugging Face folder to prune (--config.model.hf_dir=DIR)")
    folder = Path(spec.hf_dir)
    if not folder.is_dir():
        raise UserError(f"model.hf_dir={folder}: no such folder")
    return folder


def model_inputs(spec: ModelSpec, **folders: Path | str) -> dict[str, Path | str]:
    """The unpruned model's folders and others, by name."""
    found: dict[str, Path | str] = {"model.hf_dir": teacher_folder(spec), **folders}
    if spec.vision_dir is not None:
        found["model.vision_dir"] = Path(spec.vision_dir)
    return found


def journal_path(output: Path) -> Path:
    """Where the pass that makes a file keeps what its batches gave."""
    return output.with_name(f"{output.name}.journal")


def save_model(
    model: Model, out_dir: Path, spec: ModelSpec, source_dir: Path, plan: PrunePlan, *, reconstructed: bool = False
) -> None:
    """An intermediate folder: source layout, true widths, the experiment's dtype; `reconstructed` is for its card."""
    save(
        model,
        out_dir,
        source_dir=source_dir,
        dtype=spec.dtype,
        plan=plan,
        name=model_name(teacher_folder(spec)),
        reconstructed=reconstructed,
        recovered=out_dir.name == "recovered",
    )
