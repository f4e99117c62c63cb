"""`eval/*.json`: the scores of one model on one evaluation set, question by question."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from vlmprune_jax.base.files import Count, Finite, Positive
from vlmprune_jax.base.links import is_inside
from vlmprune_jax.run.workdir.artefact import Artefact, Part, read_artefact

Values = dict[str, float]
UNPRUNED = "unpruned"  # name of the unpruned model in tables
# The unpruned model's name in file names, and the set that file names leave out.
TEACHER, DEFAULT_SET = "teacher", "questions"


class MetricInfo(Part, frozen=True, kw_only=True):
    """Settings for displaying and comparing a metric's values.

    `main`: name of the value to compare. `scale`: factor on displayed values, which have the unit `unit`. `full`: value
    of a perfect model, if there is such a value. `grouped_by`: what questions of a group share (None = no groups).
    """

    name: str
    main: str
    unit: str
    scale: Finite
    full: Annotated[float, Meta(ge=1e-100, le=1e100)] | None
    higher_is_better: bool
    grouped_by: str | None

    @property
    def label(self) -> str:
        """Name of the main metric value with its unit, such as "accuracy in %"."""
        return self.main + (f" in {self.unit}" if self.unit else "")

    def show(self, value: float | None, *, unit: bool = True) -> str:
        """Return a metric value as text, with or without its unit; "" for None."""
        return "" if value is None else f"{self.scale * value:.2f} {self.unit if unit else ''}".strip()


class Group(Part, frozen=True, kw_only=True):
    """Metric values on one group of questions, such as a category of the benchmark."""

    questions: Count
    values: Values


class Evaluated(Artefact, frozen=True, kw_only=True, tag=1):
    """Evaluation of one model on one set: a file `eval/*.json`.

    `scores`: for each score of the metric, one number per question (or None). `answers`: name of the answers file in
    the same folder. `retained_interval`: 95 % interval of the retained percentage over questions; None for the unpruned
    model, if the unpruned model scores 0, or if the interval would take long to compute. `control_interval`: interval
    of the percentage relative to the control.
    """

    HINT: ClassVar[str] = "run `vlmprune evaluate` again"
    COMPACT: ClassVar[bool] = True
    metric: MetricInfo
    values: Values
    groups: dict[str, Group] = {}
    counted: Literal["questions", "tokens"]
    count: Count
    parameters: Positive
    seconds: float
    model_seconds: float = 0.0
    mean_generated_tokens: Finite | None = None
    retained_interval: tuple[float, float] | None = None
    control_interval: tuple[float, float] | None = None
    answers: str = ""
    scores: dict[str, list[float | None]] = {}

    def problems(self, folder: Path) -> str | None:
        """Return an error message if the metric's main value is missing; None otherwise."""
        main = self.metric.main
        return None if main in self.values else f"the metric's main value {main!r} is not among its values"

    @property
    def question_scores(self) -> list[float | None]:
        """Score of each question: the metric's main score, or its first score."""
        return self.scores.get(self.metric.main) or next(iter(self.scores.values()), [])

    def main_line(self) -> str:
        """Return an evaluation as text, such as "accuracy 81.25 % on 160 questions"."""
        return f"{self.metric.main} {self.metric.show(self.values[self.metric.main])} on {self.count:,} {self.counted}"


def evaluation_file(folder: Path, name: str, key: str) -> Path:
    """Return the path of a model's evaluation file: `eval/NAME.json`, or `eval/NAME.SET.json` for a named set."""
    return folder / "eval" / (f"{name}.json" if key == DEFAULT_SET else f"{name}.{key}.json")


def read_evaluated(path: Path) -> Evaluated:
    """Return the evaluation in a file `eval/*.json`."""
    return read_artefact(path, Evaluated, missing="no such file: run `vlmprune evaluate`")


def find_evaluated(workdir: Path, path: str | None, key: str) -> Path | None:
    """Return the evaluation file of the model at `path` (None = the unpruned model), or None if there is none."""
    if not re.fullmatch(r"[\w-]{1,100}", key, re.ASCII):  # a foreign result may name sets as it likes
        return None
    folder = workdir / (TEACHER if path is None else path)
    file = evaluation_file(folder.parent, folder.name, key)
    return file if is_inside(file, workdir) and file.is_file() else None


def evaluations_of(folder: Path, name: str) -> dict[str, Evaluated]:
    """Return {set: evaluation} of the model `name`; raise UserError if a file is damaged."""
    evaluations = {}
    for path in sorted((folder / "eval").glob(f"{name}*.json")):
        key = DEFAULT_SET if path.stem == name else path.stem.removeprefix(f"{name}.")
        if path == evaluation_file(folder, name, key):
            evaluations[key] = read_evaluated(path)
    return evaluations
