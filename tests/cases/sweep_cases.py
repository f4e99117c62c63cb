"""Sweeps without models: results of runs that never were."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

from report_cases import METRICS, found

from vlmprune_jax.core.settings import override
from vlmprune_jax.experiment.spec import Experiment
from vlmprune_jax.report.result import describe_sets, make_result, make_run
from vlmprune_jax.report.sweep import make_sweep
from vlmprune_jax.sweep import run as stages
from vlmprune_jax.sweep.hyper import Hyper, SweepRun, sweep_runs
from vlmprune_jax.sweep.run import Sweep, collect

TEACHER = found(0.8, 1500.0, 1.0)
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


def make_models(experiment: Experiment, context) -> dict:
    """In the place of `stages.run.make_models`: numbers that follow from settings, and a folder."""
    spec, trained = experiment.prune, experiment.recover.method != "none"
    path = "recovered" if trained else "pruned"
    folder = context.workdir / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_text(context.workdir.name)
    kept = 1 - spec.ratio * (2 if spec.method == "width" else 1) * (0.2 if trained else 1)
    kept -= 0.002 * experiment.data.seed * experiment.data.fraction if trained else 0
    size = round(1000 * (1 - spec.ratio))
    facts = {
        "method": spec.method, "criterion": "l1", "ratio_asked": spec.ratio, "ratio_reached": spec.ratio + 0.01,
        "decoder_ratio": 1.5 * spec.ratio, "parameters": size, "removed_layers": [], "plan": "plan.json",
        "scores": ["scores.npz"], "recovery": experiment.recover.name if trained else "none", "seconds": 2.5,
        "data_fraction": experiment.data.fraction if trained else 0.0, "reconstruct": "none",
    }  # fmt: skip
    run = make_run(spec.method, facts, found(0.8 * kept, 1500.0 * kept, 1 / kept), TEACHER, path)
    run["costs"] = {name: round(value * size / 1000) for name, value in COSTS.items()}
    run["speed"] = {"prefill": 1000.0 / size, "decode": 10.0, "first_token": 1.0, "peak_bytes": None}
    speed = {"prefill": 0.5, "decode": 10.0, "first_token": 1.0, "peak_bytes": None}
    return make_result(TEACHER, [run], run["name"], None, facts={"costs": COSTS, "speed": speed})


def write_sweep(workdir: Path, sets=tuple(METRICS), runs=None, **kind) -> dict:
    """`sweep.json` of what `some_runs` would find, on some of the evaluation sets; `kind`: see there."""
    runs, sweep = runs or some_runs(**kind), Sweep(workdir, "configs/sweeps/made_up.py", overwrite=False)
    with (
        mock.patch.object(stages, "make_models", make_models),
        mock.patch.object(stages, "_inputs", return_value={}),
    ):
        for run in runs:
            stages.do_run(run, sweep, QUIET)
        made = collect(runs, sweep)
    unpruned, models = made["unpruned"], made["models"]
    for model in (*unpruned.values(), *models):
        for part in ("scores", "retained", "groups"):
            of = model["evaluation"].get(part, {})
            model["evaluation"][part] = {name: value for name, value in of.items() if name in sets}
    described = {name: of for name, of in describe_sets(TEACHER).items() if name in sets}
    found = make_sweep(made["config"], described, unpruned, models)
    (workdir / "sweep.json").write_text(json.dumps(found))
    return found


class _Quiet:
    """A reporter that nobody reads."""

    enabled = False

    def say(self, text: str) -> None:
        """Nothing."""


QUIET = _Quiet()
