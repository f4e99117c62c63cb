"""Resources of a stage beside its settings: its place in a workdir, the model folders, and the reporter."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.console import Reporter
from vlmprune_jax.core.errors import UserError, reason
from vlmprune_jax.core.sections import MeshSpec, ModelSpec
from vlmprune_jax.distributed.journal import Journal
from vlmprune_jax.distributed.mesh import mesh_of
from vlmprune_jax.distributed.preemption import StopSignal
from vlmprune_jax.export.card import model_name
from vlmprune_jax.export.write import save
from vlmprune_jax.hf import lazy
from vlmprune_jax.hf.layout import PARTS
from vlmprune_jax.hf.read import load, read_config
from vlmprune_jax.models.params import count_params
from vlmprune_jax.models.vlm import Model
from vlmprune_jax.prune import PrunePlan, fingerprint, keep_everything
from vlmprune_jax.workdir.store import Store


@dataclass(frozen=True, kw_only=True)
class Context:
    """Workdir and console output of a command; `overwrite` allows replacing outputs made from other inputs.

    `store`: in a run of a sweep, where runs share what they made.
    """

    workdir: Path
    reporter: Reporter
    overwrite: bool = False
    store: Store | None = None

    def say(self, text: str) -> None:
        """Print one line."""
        self.reporter.say(text)

    @contextlib.contextmanager
    def phase(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Context that shows a progress bar; on SIGTERM or SIGINT, work stops after the current item.

        Raises Stopped from the function that takes the number of items done; every process must call it in step.
        """
        with self.reporter.bar(title, total) as update, StopSignal() as stop:

            def progress(done: int) -> None:
                update(done)
                if stop.requested():
                    raise stop.stopped(title, f"after {done} of {total}; the same command continues")

            yield progress


@dataclass(frozen=True, eq=False)
class ModelFolder:
    """Model in a folder whose weights stay in files; `load` reads them in the experiment's dtype and mesh."""

    path: Path
    model: Model
    load: Callable[..., Model]


@dataclass(frozen=True, eq=False, kw_only=True)
class Pair:
    """Pruned model and its teacher, with the plan between them and their device mesh.

    `tokens`: settings of the teacher, with the folder whose tokenizer fits the student.
    """

    student: ModelFolder
    teacher: ModelFolder
    plan: PrunePlan
    tokens: ModelSpec
    mesh: Mesh | None


@dataclass(frozen=True, kw_only=True)
class Work(Context):
    """Folders that a stage reads and writes, with its models and device mesh.

    `variant`: folder of the prune variant, with scores, `plan.json` and the models made before recovery. `folder`:
    where outputs go, that of the recovery variant for stages after pruning. `start`: the model that the stage starts
    from, the last one made in `variant`, at first the unpruned one. `out`: the folder of the model that the stage
    makes. `part`: of a stage that works in parts, the name of one. `models`: all models of the run by name, for stages
    that compare them. `loaded`: models that several parts share. `pruned`: False for a control, the unpruned model that
    is trained like pruned ones; `control`: the control's folder, for a recovered model that has one. `reconstructed`,
    `recovered`, `benchmarks`: for the card of a model.
    """

    model: ModelSpec
    mesh: MeshSpec
    variant: Path
    folder: Path
    start: Path
    out: Path
    part: str = ""
    models: Mapping[str, Path] = field(default_factory=dict)
    loaded: dict[Path, Model] | None = None
    pruned: bool = True
    control: Path | None = None
    reconstructed: bool = False
    recovered: bool = False
    benchmarks: Sequence[Sequence[str]] = ()

    @property
    def teacher(self) -> Path:
        """Folder of the unpruned model."""
        return teacher_folder(self.model)

    @property
    def tower(self) -> Path | None:
        """Folder of the vision tower if it is separate; None otherwise."""
        return None if self.model.vision_dir is None else Path(self.model.vision_dir)

    @property
    def model_files(self) -> dict[str, Path | str]:
        """{name in the ledger: folder} of the unpruned model."""
        tower = {} if self.tower is None else {"model.vision_dir": self.tower}
        return {"model.hf_dir": Path(self.model.hf_dir), **tower}

    @property
    def devices(self) -> Mesh | None:
        """Device mesh of the experiment; None for one device."""
        return mesh_of(self.mesh)

    @property
    def tokens(self) -> ModelSpec:
        """Model settings with the tokenizer folder that belongs to the stage's input model."""
        rows = [self.config(folder).text.vocab_size for folder in (self.start, self.teacher)]
        return self.model if rows[0] == rows[1] else dataclasses.replace(self.model, hf_dir=str(self.start))

    @property
    def plan(self) -> PrunePlan:
        """Prune plan of the variant (for a control: a plan that removes nothing)."""
        if not self.pruned:
            whole = self.open_model(self.teacher)
            return keep_everything(whole.cfg, fingerprint(whole), count_params(whole.cfg))
        return PrunePlan.from_json(self.variant / "plan.json")

    def load(
        self,
        folder: Path,
        parts: Collection[str] = PARTS,
        choose_mesh: Callable[[ModelConfig], Mesh | None] | None = None,
        *,
        by_layer: bool = False,
    ) -> Model:
        """Load a model folder, or some parts of the model, in the experiment's dtype and mesh.

        `by_layer`: on one device, leave the weights in their files for a pass over the layers, so that any model fits.
        """
        if by_layer and (self.devices is None or self.devices.size == 1):
            return lazy.open_model(folder, self.tower, self.model.dtype)
        shared, mesh = {} if self.loaded is None else self.loaded, choose_mesh or self.devices
        if folder not in shared:
            dtype, tower = self.model.dtype, self.model.vision_dir
            shared[folder] = load(folder, vision_dir=tower, dtype=dtype, mesh=mesh, parts=parts)
        return shared[folder]

    def open_model(self, folder: Path) -> Model:
        """Open a model folder without reading its weights."""
        return lazy.open_model(folder, self.tower)

    def open_folder(self, folder: Path) -> ModelFolder:
        """Open a model folder whose weights are read later."""
        return ModelFolder(folder, self.open_model(folder), functools.partial(self.load, folder))

    def config(self, folder: Path) -> ModelConfig:
        """Return the config of the model in a folder."""
        return read_config(folder, self.tower)[1]

    def save(self, model: Model) -> None:
        """Save the model that a stage made, in the source's checkpoint layout and the experiment's dtype."""
        save(
            model,
            self.out,
            source_dir=self.start,
            dtype=self.model.dtype,
            plan=self.plan if self.pruned else None,
            name=model_name(self.teacher),
            reconstructed=self.reconstructed,
            recovered=self.recovered,
        )

    def journal(self, output: Path, made_from: Mapping[str, Any]) -> Journal:
        """Open the journal from which an interrupted pass resumes; a journal from another mesh is ignored."""
        return Journal(journal_path(output), {**made_from, "mesh": vars(self.mesh)})


def journal_path(output: Path) -> Path:
    """Return the path of the journal for a pass that writes this file."""
    return output.with_name(f"{output.name}.journal")


def teacher_folder(spec: ModelSpec) -> Path:
    """Return the unpruned model's folder; raise UserError if the setting is empty or the folder is missing."""
    if not spec.hf_dir:
        raise UserError("model.hf_dir is not set: name the Hugging Face folder to prune (--config.model.hf_dir=DIR)")
    folder = Path(spec.hf_dir)
    if not folder.is_dir():
        raise UserError(f"model.hf_dir={folder}: no such folder")
    return folder


@contextlib.contextmanager
def in_memory(stage: str) -> Iterator[None]:
    """Context that converts a stage's out-of-memory error to a one-line UserError."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"{stage}: needs more memory than the device has ({reason(error)}): lower its batch_size or the sequence "
            "length (data.max_length, data.max_images, max_new_tokens, text_window), or use more devices"
        ) from error
