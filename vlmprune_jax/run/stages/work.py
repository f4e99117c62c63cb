"""One stage at one place of a workdir, its ledger task, and the steps of a command in their order."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from jax.sharding import Mesh

from vlmprune_jax.base.checks import file_of_users
from vlmprune_jax.base.console import Reporter
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.journal import Journal
from vlmprune_jax.base.settings import override
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import mesh_of_spec
from vlmprune_jax.core.mesh.stop import StopSignal
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.prune import PrunePlan, fingerprint, keep_everything
from vlmprune_jax.core.recovery.terms import terms_of
from vlmprune_jax.core.sections import ModelSpec
from vlmprune_jax.io.checkpoints import read
from vlmprune_jax.io.checkpoints.layout import PARTS
from vlmprune_jax.io.checkpoints.read import load, read_config
from vlmprune_jax.io.data.inputs import record_files
from vlmprune_jax.io.exports.card import model_name
from vlmprune_jax.io.exports.write import save
from vlmprune_jax.run.experiment.spec import Experiment, affecting
from vlmprune_jax.run.experiment.variants import CONTROL, NO_RECOVERY, Variant, variants_of
from vlmprune_jax.run.stages.stage import STAGES
from vlmprune_jax.run.workdir.content import content_key
from vlmprune_jax.run.workdir.evaluation import DEFAULT_SET
from vlmprune_jax.run.workdir.ledger import NoFacts, Task
from vlmprune_jax.run.workdir.result import Result, Run
from vlmprune_jax.run.workdir.steps import StepRecord
from vlmprune_jax.run.workdir.store import Store


@dataclass(frozen=True, eq=False, kw_only=True)
class Work:
    """Argument of a stage's function: settings, folders, models and console output of one stage in a workdir.

    `Work.at` makes the `Work` of a command; its `steps` are one `Work` for each stage of every variant.
    """

    experiment: Experiment
    workdir: Path
    reporter: Reporter
    overwrite: bool = False  # True to replace outputs that were made from other inputs
    store: Store | None = None  # results that the runs of a sweep share
    record: StepRecord  # stage, names and folders
    before: tuple[Work, ...] = ()  # the stages that led to `start`, the first one first
    start: Path  # model that the stage starts from: the last one made for the variant, at first the unpruned one
    subject: str = ""  # for evaluations and speed: name of the model
    part: str = ""  # name of the evaluation set or additional export
    loaded: dict[Path, Model] | None = None  # models that several evaluations share
    evaluation: tuple[Run, Result] | None = None  # of the exported model, and the result that the entry is from
    tokenizer: Path | None = None  # folder of the tokenizer if `start` has none (GGUF)

    @classmethod
    def at(cls, workdir: Path, experiment: Experiment, reporter: Reporter, **fields: Any) -> Work:
        """Return the `Work` of a command in a workdir, which starts from the unpruned model unless `fields` differ."""
        start, record = Path(experiment.model.hf_dir), StepRecord(stage="", folder=".", variant=".")
        root = cls(workdir=workdir, experiment=experiment, reporter=reporter, start=start, record=record)
        return root.replace(**fields)

    def replace(self, **fields: Any) -> Work:
        """Return a copy of the `Work` with other fields, also of its record."""
        if "stage" in fields:
            stage = STAGES[fields["stage"]]
            fields |= {"about": stage.help, "outputs": list(stage.outputs), "model": stage.model}
        changes = {name: fields.pop(name) for name in StepRecord.__struct_fields__ if name in fields}
        return dataclasses.replace(self, record=msgspec.structs.replace(self.record, **changes), **fields)

    @property
    def sections(self) -> dict[str, Any]:
        """Settings of the experiment, by config section."""
        return self.experiment.sections

    @property
    def model(self) -> ModelSpec:
        """Settings of the unpruned model."""
        return self.experiment.model

    @property
    def label(self) -> str:
        """Name of this work in messages: the evaluated model and set, or the additional export."""
        return " ".join(filter(None, (self.subject, self.part if self.part != DEFAULT_SET else "")))

    @property
    def stage(self) -> str:
        """Name of the stage."""
        return self.record.stage

    @property
    def folder(self) -> Path:
        """Folder of the outputs; after pruning, that of the recovery variant."""
        return self.workdir / self.record.folder

    @property
    def out(self) -> Path:
        """Folder of the model that the stage makes."""
        return self.workdir / self.record.path

    @property
    def reconstructed(self) -> bool:
        """True if this step or an earlier one repaired the model without training."""
        return any(step.stage == "reconstruct" for step in (*self.before, self))

    @property
    def recovered(self) -> bool:
        """True if this step or an earlier one trained the model."""
        return any(STAGES[step.stage].per == "recovery" for step in (*self.before, self))

    @functools.cached_property
    def task(self) -> Task:
        """Ledger task: the stage's settings, inputs and outputs for this variant and folder."""
        stage, sections = STAGES[self.stage], self.sections
        run, complete = stage.run, stage.task
        if run is None:  # built in
            module = importlib.import_module(f"{__package__}.{stage.module or self.stage}")
            run, complete = getattr(module, f"{self.stage}_stage"), getattr(module, f"{self.stage}_task", None)
        arguments = [sections[section] for section in stage.sections]
        inputs: dict[str, Path | str] = {**self.model_files}
        for source in stage.inputs:
            section, _, which = source.partition(".")
            path = self.start if source == "start" else self.folder / source
            inputs |= record_files(self.experiment.data, which) if section == "data" else {path.name: path}
        below, title = self.record.folder, f"{self.stage} {self.label}".strip()
        files = [name for name in (*stage.outputs, stage.model) if name and "*" not in name]
        task = Task(
            name=title if below == "." else f"{below}/{title}",
            function=functools.partial(run, self, *arguments),
            workdir=self.workdir,
            settings=affecting(self.stage, {section: sections[section] for section in ("model", *stage.sections)}),
            inputs=inputs,
            outputs=[self.folder / name for name in files],
            version=stage.version,
            facts=typing.get_type_hints(run).get("return", NoFacts),
            scratch=[self.folder / name for name in stage.scratch],
            journals=[self.folder / name for name in stage.journals],
            makers={pattern: name for name, maker in STAGES.items() for pattern in (*maker.outputs, maker.model)},
            kind=self.stage,
            store=self.store,
            beside=stage.beside,
        )
        task = task if complete is None else complete(task, self, *arguments)
        user_file = file_of_users(run)
        return task if user_file is None else task.add(inputs={f"stage {self.stage}": user_file})

    @functools.cached_property
    def steps(self) -> list[Work]:
        """Stages to run for every prune variant and its recovery variants, in order, from the `Work` of a command.

        A recovery's control comes after the first model with this recovery.
        """
        steps, controls = list[Work](), dict[str, Work]()  # controls by everything that they depend on
        for pruned in variants_of(self.experiment):
            is_pruned = pruned.experiment.prune.method != "none"  # otherwise the model is its own control
            folder = pruned.folder.as_posix()
            variant = self.replace(experiment=pruned.experiment, name=pruned.name, recovery=NO_RECOVERY)
            variant = variant.replace(variant=folder, folder=folder, pruned=is_pruned)
            shared = _chain("variant", variant, last=not pruned.recoveries)
            steps += shared
            for run in pruned.recoveries:
                spec, folder = run.experiment.recover, run.folder.as_posix()
                work = variant.replace(experiment=run.experiment, name=run.name, recovery=spec.name, folder=folder)
                work = work.replace(before=tuple(shared))
                if not (is_pruned and spec.control and terms_of(spec.losses, teacher=False)):
                    steps += _chain("recovery", work)
                    continue
                control = _control(self, run, pruned, {control.record.folder for control in controls.values()})
                data, model = control.experiment.data, control.model
                key = content_key(affecting("recover", control.sections), [data.train, data.images, model.hf_dir])
                steps += _chain("recovery", work.replace(compared_with=controls.get(key, control).record.path))
                if key not in controls:
                    controls[key] = control
                    steps.append(control)
        return steps

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
        return mesh_of_spec(self.experiment.mesh)

    @property
    def tokens(self) -> ModelSpec:
        """Model settings with the tokenizer folder that belongs to the stage's input model."""
        start = self.tokenizer or self.start
        rows = [self.config(folder).text.vocab_size for folder in (start, self.teacher)]
        return self.model if rows[0] == rows[1] else dataclasses.replace(self.model, hf_dir=str(start))

    @property
    def plan(self) -> PrunePlan:
        """Prune plan of the variant (for an unpruned model: a plan that removes nothing)."""
        if not self.record.pruned:
            whole = self.open_model(self.teacher)
            return keep_everything(whole.cfg, fingerprint(whole), count_params(whole.cfg))
        return PrunePlan.from_json(self.workdir / self.record.plan)

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
            return read.open_model(folder, self.tower, self.model.dtype)
        shared, mesh = {} if self.loaded is None else self.loaded, choose_mesh or self.devices
        if folder not in shared:
            dtype, tower = self.model.dtype, self.model.vision_dir
            shared[folder] = load(folder, vision_dir=tower, dtype=dtype, mesh=mesh, parts=parts)
        return shared[folder]

    def open_model(self, folder: Path) -> Model:
        """Open a model folder without reading its weights."""
        return read.open_model(folder, self.tower)

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
            plan=self.plan if self.record.pruned else None,
            name=model_name(self.teacher),
            reconstructed=self.reconstructed,
            recovered=self.recovered,
        )

    def journal(self, output: Path, made_from: Mapping[str, Any]) -> Journal:
        """Open the journal from which an interrupted pass resumes; a journal from another mesh is ignored."""
        return Journal(journal_path(output), {**made_from, "mesh": vars(self.experiment.mesh)})


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


def source_config(spec: ModelSpec) -> ModelConfig:
    """Return the config of the unpruned model."""
    return read_config(teacher_folder(spec), None if spec.vision_dir is None else Path(spec.vision_dir))[1]


def _chain(scope: str, place: Work, *, last: bool = True) -> list[Work]:
    """Return the stages of one variant that change the model, in order; `place` is the `Work` of the variant's folder.

    `last`: True if no recovery follows, so that the last model is evaluated in any case.
    """
    steps, settings = list[Work](), place.sections
    stages = {name: stage for name, stage in STAGES.items() if stage.per == scope and stage.off(settings) is None}
    final = [name for name, stage in stages.items() if stage.model and last][-1:]
    for name, stage in stages.items():
        title, recovery = place.record.name, place.record.recovery
        starts = [step.out for step in (place.before or steps) if step.record.model]
        if any(step.record.model for step in steps):
            title = f"{title}-{stage.model}"
            recovery = stage.model if recovery == NO_RECOVERY else f"{recovery}-{stage.model}"
        steps.append(
            place.replace(
                stage=name,
                name=title,
                recovery=recovery,
                evaluated=scope == "recovery" or place.experiment.evaluate.unrecovered or name in final,
                before=(*place.before, *steps),
                start=starts[-1] if starts else place.start,
            )
        )
    return steps


def _control(root: Work, run: Variant, pruned: Variant, taken: Collection[str]) -> Work:
    """Return the step that trains the control (an unpruned model) of a recovery; `taken`: folders of other controls."""
    spec, below = run.experiment, run.folder.relative_to(pruned.folder)
    if spec.prune.stack != "text" or spec.prune.vocabulary.size is not None:  # whose caches are of another model
        for section, cache in (("data", "feature_cache"), ("recover", "teacher_cache")):
            folder = getattr(spec.sections[section], cache)
            if folder is not None:
                spec = override(spec, {section: {cache: str(Path(folder) / CONTROL)}})
    name = CONTROL if below == Path() else f"{CONTROL}-{spec.recover.name}"
    folder = (CONTROL / below).as_posix()
    if folder in taken:
        name, folder = f"{pruned.name}-{name}", (pruned.folder / CONTROL / below).as_posix()
    return root.replace(
        stage="recover",
        experiment=spec,
        name=name,
        recovery=spec.recover.name,
        evaluated=True,
        variant=folder,
        folder=folder,
        pruned=False,
        control=True,
    )
