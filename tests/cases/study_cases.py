"""Sweeps made by hand: what `sweep.json` holds of models that nobody trained."""

from __future__ import annotations

from msgspec.structs import replace

from vlmprune_jax.run.workdir.artefact import write_artefact
from vlmprune_jax.run.workdir.result import Costs, Model, ModelEvaluation, Run, Set
from vlmprune_jax.run.workdir.sweep import Entry, SweepResult

SETS = {
    "questions": Set(
        name="exact_match", main="accuracy", unit="%", scale=100.0, full=1.0, higher_is_better=True,
        grouped_by=None, counted="questions", count=100,
    )
}  # fmt: skip
DECODER = 0.5  # of all parameters


def row(method, level, recovery, retained, *, data=0.0, seed=0, solved=False, **changes):
    """One evaluated model, by what matters of it."""
    name = f"{method},{level},{recovery},{solved},{data},{seed}"
    evaluation = ModelEvaluation(
        scores={"questions": {"accuracy": retained / 100}},
        retained={"questions": retained},
        retained_interval={"questions": (retained - 2, retained + 2)},
        mean_of_ratios=retained,
        paper_average=retained,
        seconds=0.5,
    )
    found = Run(
        name=method,
        model="models/teacher",
        method=method,
        criterion={"depth": "block_influence", "width": "taylor"}[method],
        target_ratio=DECODER * level,
        actual_ratio=DECODER * (level + 0.01),
        decoder_ratio=level + 0.01,
        parameters=900,
        costs=Costs(file_bytes=1800, forward_flops=1000),
        reconstruct="least_squares" if solved else "none",
        recovery="reconstructed" if solved and recovery == "none" else recovery,
        data_fraction=data,
        seconds=1.5,
        evaluation=evaluation,
        digest=name,
        path=f"runs/{name}/recovered",
    )
    return Entry(
        name=name, run=name, group=name.rpartition(",")[0], labels={"method": method}, overrides={}, seed=seed,
        found=replace(found, **changes),
    )  # fmt: skip


def changed(entry, **changes):
    """The entry with fields of its model replaced."""
    return replace(entry, found=replace(entry.found, **changes))


def sweep(rows):
    """A sweep of such models."""
    evaluation = ModelEvaluation(scores={"questions": {"accuracy": 1.0}})
    models, rows = {"models/teacher": 1_060_000}, list(rows)
    models |= {row.found.model: 135_200_000 for row in rows if row.found.model not in models}
    unpruned = {
        model: Model(parameters=parameters, costs=Costs(file_bytes=2000, forward_flops=1100), evaluation=evaluation)
        for model, parameters in models.items()
    }
    return SweepResult(config="sweep.py", sets=SETS, unpruned=unpruned, models=rows)


def rows():
    """Two levels and three seeds, in which some of the paper's insights hold and some do not."""
    found = []
    for seed in range(3):
        wobble = 0.1 * seed
        for level, depth, width in ((0.15, 90.0, 80.0), (0.45, 40.0, 60.0)):
            # without recovery widths are ahead at 45 % and behind at 15 %
            for method, plain in (("depth", depth), ("width", width)):
                trained = {("depth", 0.15): 98.0, ("width", 0.15): 97.5, ("depth", 0.45): 90.0, ("width", 0.45): 85.0}
                best = trained[method, level] + wobble
                at = {"seed": seed, "data": 0.05}
                found += [
                    row(method, level, "none", plain + wobble, seed=seed),
                    row(method, level, "none", (plain + wobble + best) / 2, seed=seed, solved=True),
                    row(method, level, "sft_l2", best, **at),
                    row(method, level, "sft_l2", best + 1, seed=seed, data=1.0),
                    row(method, level, "sft", best - 2 + (-1) ** seed * 5, **at),
                    row(method, level, "sft_l2", best + 0.5, solved=True, **at),
                ]
            found.append(row("depth", level, "projector", 97.5 + wobble if level < 0.3 else 60.0, seed=seed, data=0.05))
    return found


def write_sweep(folder, models):
    """A workdir of a sweep."""
    folder.mkdir(parents=True)
    write_artefact(folder / "sweep.json", sweep(models))
    return folder
