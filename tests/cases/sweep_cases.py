"""Sweeps without models: results of runs that never were."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

from msgspec.structs import replace
from report_cases import METRICS, found

from vlmprune_jax.base.settings import override
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.sweep import sweep as stages
from vlmprune_jax.run.sweep.hyper import Hyper, SweepRun, sweep_runs
from vlmprune_jax.run.sweep.sweep import Sweep, collect
from vlmprune_jax.run.workdir.artefact import write_artefact
from vlmprune_jax.run.workdir.comparison import compare, describe_sets, unpruned_of
from vlmprune_jax.run.workdir.result import Costs, Result, Run
from vlmprune_jax.run.workdir.speed import MedianSpeed, SpeedUp
from vlmprune_jax.run.workdir.sweep import SweepResult

TEACHER, CONTROL = found(0.8, 1500.0, 1.0), found(1.0, 1500.0, 1.0)
COSTS = {"forward_flops": 2_000_000_000, "kv_bytes_per_token": 40, "file_bytes": 8_000_000}


def some_runs(seeds=(1, 2), **base) -> list[SweepRun]:
    """Depth and width at two ratios, without training and with two shares of the data, over seeds."""
    hyper = Hyper()
    cuts = hyper.product([hyper.sweep("prune.method", ["depth", "width"]), hyper.sweep("prune.ratio", [0.1, 0.3])])
    trained = hyper.product(
        [
            hyper.named("recovery", {"sft": {"recover.name": "sft"}}),
            hyper.sweep("data.fraction", [0.05, 0.2]),
            hyper.zipit([hyper.sweep(f"{part}.seed", seeds) for part in ("data", "recover")]),
        ]
    )
    untrained = hyper.named("recovery", {"none": {"recover.method": "none"}})
    points = hyper.product([cuts, hyper.chainit([untrained, trained])])
    return sweep_runs(override(Experiment(), {"evaluate": {"unrecovered": False}, **base}), points)


def image_runs(limits=(70, 140, 280), seeds=(1,)) -> list[SweepRun]:
    """Depth at one ratio, without training, at limits of tokens per image, over seeds."""
    base = {"evaluate": {"unrecovered": False}, "recover": {"method": "none"}, "prune": {"ratio": 0.1}}
    swept = {"prune.method": ["depth"], "data.max_image_tokens": limits, "score.seed": seeds}
    points = Hyper().product([Hyper().sweep(setting, values) for setting, values in swept.items()])
    return sweep_runs(override(Experiment(), base), points)


def make_models(experiment: Experiment, context) -> Result:
    """In the place of `pipeline.make_models`: numbers that follow from settings, and a folder."""
    spec, trained = experiment.prune, experiment.recover.method != "none"
    path = "recovered" if trained else "pruned"
    folder = context.workdir / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_text(context.workdir.name)
    kept = 1 - spec.ratio * (2 if spec.method == "width" else 1) * (0.2 if trained else 1)
    kept -= 0.002 * experiment.data.seed * experiment.data.fraction if trained else 0
    size = round(1000 * (1 - spec.ratio))
    costs = Costs(**{name: round(value * size / 1000) for name, value in COSTS.items()})
    run = Run(
        name=spec.method, method=spec.method, criterion="l1", target_ratio=spec.ratio, actual_ratio=spec.ratio + 0.01,
        decoder_ratio=1.5 * spec.ratio, parameters=size, plan="plan.json", scores=["scores.npz"],
        recovery=experiment.recover.name if trained else "none", seconds=2.5,
        data_fraction=experiment.data.fraction if trained else 0.0, path=path,
        evaluation=compare(found(0.8 * kept, 1500.0 * kept, 1 / kept), TEACHER, CONTROL if trained else None),
        costs=costs,
        speed=MedianSpeed(
            prefill=1000.0 / size, decode=10.0, first_token=1.0, peak_bytes=None,
            prefill_speedup=SpeedUp(2000.0 / size, 1900.0 / size, 2100.0 / size, 0.05),
            decode_speedup=SpeedUp(1200.0 / size, 1150.0 / size, 1250.0 / size, 0.01),
        ),
    )  # fmt: skip
    speed = MedianSpeed(prefill=0.5, decode=10.0, first_token=1.0, peak_bytes=None)
    teacher = unpruned_of(TEACHER, Costs(**COSTS), speed)
    return Result(sets=describe_sets(TEACHER), teacher=teacher, runs=[run], best=run.name)


def write_sweep(workdir: Path, sets=tuple(METRICS), runs=None, **kind) -> SweepResult:
    """`sweep.json` of what `some_runs` would find, on some of the evaluation sets; `kind`: see there."""
    runs, sweep = runs or some_runs(**kind), Sweep(workdir, "configs/sweeps/made_up.py", overwrite=False)
    with (
        mock.patch.object(stages, "make_models", lambda work: make_models(work.experiment, work)),
        mock.patch.object(stages, "made_from_of", lambda run, sweep: run.name),
        mock.patch.object(stages, "preflight"),
    ):
        for run in runs:
            assert stages.attempt(run, sweep, QUIET) is None
        made = collect(runs, sweep)

    def some_sets(model):
        parts = {part: getattr(model.evaluation, part, None) for part in ("scores", "retained", "groups")}
        chosen = {part: {k: v for k, v in of.items() if k in sets} for part, of in parts.items() if of is not None}
        return replace(model, evaluation=replace(model.evaluation, **chosen))

    unpruned = {name: some_sets(model) for name, model in made.unpruned.items()}
    models = [replace(entry, found=some_sets(entry.found)) for entry in made.models]
    described = {name: of for name, of in made.sets.items() if name in sets}
    written = replace(made, sets=described, unpruned=unpruned, models=models)
    write_artefact(workdir / "sweep.json", written)
    return written


def with_models(sweep: SweepResult, **changes) -> SweepResult:
    """The sweep with fields of its models replaced; a function takes the entry."""
    return replace(
        sweep,
        models=[
            replace(one, found=replace(one.found, **{k: v(one) if callable(v) else v for k, v in changes.items()}))
            for one in sweep.models
        ],
    )


class _Quiet:
    """A reporter that nobody reads."""

    enabled = False

    def say(self, text: str) -> None:
        """Nothing."""


QUIET = _Quiet()
