"""Speed of the shapes of a run: measured once, also by the runs of a sweep."""

import shutil

from report_cases import SPEED
from repository import ROOT
from sweep_cases import QUIET

from vlmprune_jax.base.settings import override
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.stages import evaluate as stage
from vlmprune_jax.run.stages.work import Work
from vlmprune_jax.run.workdir.artefact import read_artefact
from vlmprune_jax.run.workdir.speed import Speed
from vlmprune_jax.run.workdir.store import Store


def test_runs_of_a_sweep_measure_a_shape_once(tmp_path, monkeypatch):
    """Three runs with models of one shape have the same numbers; another prompt is measured anew."""
    measured = []
    pair = SPEED.pairs[0]

    def measure(models, spec):
        measured.append(spec.prompt_tokens)
        return {"unpruned": pair.unpruned, "pruned": pair.pruned}

    monkeypatch.setattr(stage, "measure_speed", measure)
    monkeypatch.setattr(Work, "load", lambda self, folder: None)
    teacher = str(ROOT / "vlmprune_jax/demo/teacher")
    for number, tokens in enumerate((640, 640, 100)):
        workdir = tmp_path / f"run{number}"
        shutil.copytree(teacher, workdir / "pruned")
        spec = {"rounds": 5, "prompt_tokens": tokens}
        experiment = override(Experiment(), {"model": {"hf_dir": teacher}, "speed": spec})
        work = Work.at(workdir, experiment, QUIET, store=Store(tmp_path / "shared"))
        for _ in range(2):
            stage.measure_shapes(work, {f"depth-{number}": workdir / "pruned"})
        (measured_pair,) = read_artefact(workdir / "speed.json", Speed).pairs
        assert measured_pair.models == [f"depth-{number}"]
        assert measured_pair.prefill_limit == measured_pair.decode_limit == 1.0  # nothing is removed
    assert measured == [640, 100]
