"""The argument of a stage's function: settings, its place in a workdir, the model folders, and the reporter."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from vlmprune_jax.base.console import Reporter
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.journal import Journal
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import mesh_of_spec
from vlmprune_jax.core.mesh.stop import StopSignal
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.prune import PrunePlan, fingerprint, keep_everything
from vlmprune_jax.core.sections import MeshSpec, ModelSpec
from vlmprune_jax.io.checkpoints import lazy
from vlmprune_jax.io.checkpoints.layout import PARTS
from vlmprune_jax.io.checkpoints.read import load, read_config
from vlmprune_jax.io.exports.card import model_name
from vlmprune_jax.io.exports.write import save
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.workdir.evaluation import DEFAULT_SET
from vlmprune_jax.run.workdir.result import Result, Run
from vlmprune_jax.run.workdir.store import Store


@dataclass(frozen=True, eq=False, kw_only=True)
class Work:
    """Argument of a stage's function: settings, folders, models and console output of one stage in a workdir.

    `Work.at` makes the `Work` of a command; `steps_of` makes one `Work` for each stage that the command runs.
    """

    experiment: Experiment
    workdir: Path
    reporter: Reporter
    overwrite: bool = False  # True to replace outputs that were made from other inputs
    store: Store | None = None  # results that the runs of a sweep share
    stage: str = ""
    before: tuple[Work, ...] = ()  # the stages that led to `start`, the first one first
    variant: Path  # folder of the prune variant, with scores, plan.json and the models made before recovery
    folder: Path  # folder of the outputs; after pruning, that of the recovery variant
    start: Path  # model that the stage starts from: the last one made in `variant`, at first the unpruned one
    out: Path  # folder of the model that the stage makes
    name: str = ""  # name of the model in `out`, in result files
    recovery: str = ""  # name of the recovery of that model
    evaluated: bool = False  # True if that model is evaluated
    subject: str = ""  # for evaluations: name of the model in file names
    part: str = ""  # name of the evaluation set or additional export
    models: Mapping[str, Path] = field(default_factory=dict)  # all models of the run, for stages that compare them
    loaded: dict[Path, Model] | None = None  # models that several evaluations share
    pruned: bool = True  # False with prune.method="none", and for a control
    is_control: bool = False  # True for a control, the unpruned model that is trained like pruned ones
    control: Path | None = None  # model folder of the control of a recovered model
    reconstructed: bool = False  # this and the next two fields are for the model card
    recovered: bool = False
    evaluation: tuple[Run, Result] | None = None  # of the exported model, and the result that the entry is from
    tokenizer: Path | None = None  # folder of the tokenizer if `start` has none (GGUF)

    @classmethod
    def at(cls, workdir: Path, experiment: Experiment, reporter: Reporter, **fields: Any) -> Work:
        """Return the `Work` of a command in a workdir, which starts from the unpruned model unless `fields` differ."""
        place: dict[str, Any] = dict.fromkeys(("variant", "folder", "out"), workdir)
        place |= {"start": Path(experiment.model.hf_dir), **fields}
        return cls(workdir=workdir, experiment=experiment, reporter=reporter, **place)

    def replace(self, **fields: Any) -> Work:
        """Return a copy of the `Work` with other fields."""
        return dataclasses.replace(self, **fields)

    @property
    def sections(self) -> dict[str, Any]:
        """Settings of the experiment, by config section."""
        return self.experiment.sections

    @property
    def model(self) -> ModelSpec:
        """Settings of the unpruned model."""
        return self.experiment.model

    @property
    def mesh(self) -> MeshSpec:
        """Settings of the device mesh."""
        return self.experiment.mesh

    @property
    def label(self) -> str:
        """Name of this work in messages: the evaluated model and set, or the additional export."""
        return " ".join(filter(None, (self.subject, self.part if self.part != DEFAULT_SET else "")))

    @property
    def path(self) -> str:
        """Path of the stage's output folder `out`, relative to the workdir."""
        return self.out.relative_to(self.workdir).as_posix()

    def say(self, text: str) -> None:
        """Print one line to the console."""
        self.reporter.say(text)

    @contextlib.contextmanager
    def phase(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Context that shows a progress bar; on SIGTERM or SIGINT, work stops after the current item.

        The context yields a function of the number of finished items, which all processes call together. It raises
        Stopped.
        """
        with self.reporter.bar(title, total) as update, StopSignal() as stop:

            def progress(done: int) -> None:
                update(done)
                if stop.requested():
                    raise stop.stopped(title, f"after {done} of {total}; the same command continues")

            yield progress

    @property
    def teacher(self) -> Path:
        """Folder of the unpruned model."""
        return teacher_folder(self.model)

    @property
    def tower(self) -> Path | None:
        """Folder of a separate vision tower; None if the tower is in the model's folder."""
        return None if self.model.vision_dir is None else Path(self.model.vision_dir)

    @property
    def model_files(self) -> dict[str, Path | str]:
        """{name in the ledger: folder} of the unpruned model."""
        tower = {} if self.tower is None else {"model.vision_dir": self.tower}
        return {"model.hf_dir": Path(self.model.hf_dir), **tower}

    @property
    def devices(self) -> Mesh | None:
        """Device mesh of the experiment; None for one device."""
        return mesh_of_spec(self.mesh)

    @property
    def tokens(self) -> ModelSpec:
        """Model settings with the tokenizer folder that belongs to the stage's input model."""
        start = self.tokenizer or self.start
        rows = [self.config(folder).text.vocab_size for folder in (start, self.teacher)]
        return self.model if rows[0] == rows[1] else dataclasses.replace(self.model, hf_dir=str(start))

    @property
    def plan(self) -> PrunePlan:
        """Prune plan of the variant (for an unpruned model: a plan that removes nothing)."""
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

        `by_layer`: on one device, leave the weights in their files for a pass layer by layer, so that models of any
        size fit in memory.
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
    """Return the path of the journal for a pass that writes the file `output`."""
    return output.with_name(f"{output.name}.journal")


def teacher_folder(spec: ModelSpec) -> Path:
    """Return the unpruned model's folder; raise UserError if the setting is empty or the folder is missing."""
    if not spec.hf_dir:
        raise UserError("model.hf_dir is not set: name the Hugging Face folder to prune (--config.model.hf_dir=DIR)")
    folder = Path(spec.hf_dir)
    if not folder.is_dir():
        raise UserError(f"model.hf_dir={folder}: no such folder: set it to the folder of the model to prune")
    return folder
