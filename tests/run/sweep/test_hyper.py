"""Runs of a sweep: what `get_hyper` puts together, what each run is called, and what is refused before any of them."""

import re

import pytest
from refusal import refused

from vlmprune_jax.base.settings import override
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.experiment.variants import variants_of
from vlmprune_jax.run.sweep.hyper import LONGEST_NAME, Hyper, sweep_runs

HYPER = Hyper()


def names(points):
    return [run.name for run in sweep_runs(Experiment(), points)]


def test_product_zip_and_chain():
    methods, ratios = HYPER.sweep("config.prune.method", ["depth", "width"]), HYPER.sweep("prune.ratio", [0.1, 0.2])
    assert HYPER.product([methods, ratios]) == [
        {"prune.method": method, "prune.ratio": ratio} for method in ("depth", "width") for ratio in (0.1, 0.2)
    ]
    assert HYPER.zipit([methods, ratios]) == [
        {"prune.method": "depth", "prune.ratio": 0.1}, {"prune.method": "width", "prune.ratio": 0.2},
    ]  # fmt: skip
    assert HYPER.chainit([methods, HYPER.fixed("config.prune.ratio", 0.3)]) == [*methods, {"prune.ratio": 0.3}]
    assert HYPER.product([]) == [{}]
    refused(r"hyper.zipit: the sweeps have 2, 1 values", HYPER.zipit, [methods, HYPER.fixed("prune.ratio", 0.3)])
    twice = [ratios, HYPER.named("cut", {"a": {"config.prune.ratio": 0.3}})]
    refused(r"hyper.product: two of the sweeps set prune.ratio", HYPER.product, twice)


def test_names_are_what_differs():
    seeds = HYPER.zipit([HYPER.sweep(f"{part}.seed", [1, 2]) for part in ("data", "recover")])
    recoveries = {"sft_l2": {"recover.losses": {"ce": 0.5, "l2": 0.5}}, "none": {"config.recover.method": "none"}}
    ratios = HYPER.product([seeds, HYPER.sweep("prune.ratio", [0.3, 0.1 + 0.2 + 0.1])])
    points = [HYPER.fixed("prune.method", "width"), ratios, HYPER.named("recovery", recoveries)]
    runs = sweep_runs(Experiment(), HYPER.product(points))
    assert [run.name for run in runs[:4]] == [
        "ratio=0.3,recovery=sft_l2,seed=1", "ratio=0.3,recovery=none,seed=1",
        "ratio=0.4,recovery=sft_l2,seed=1", "ratio=0.4,recovery=none,seed=1",
    ]  # fmt: skip
    first = runs[0]
    assert (first.group, first.seed) == ("ratio=0.3,recovery=sft_l2", 1)
    assert first.labels == {"ratio": "0.3", "recovery": "sft_l2", "seed": "1"}
    assert first.experiment.prune.method == "width"
    assert (first.experiment.recover.losses.ce, first.experiment.recover.losses.l2) == (0.5, 0.5)
    assert (first.experiment.data.seed, first.experiment.recover.seed) == (1, 1)
    assert runs[1].experiment.recover.method == "none"
    assert sum(run.group == first.group for run in runs) == 2


def test_names_have_as_many_words_as_tell_settings_apart():
    points = [{"data.seed": 1, "recover.seed": 2}, {"data.seed": 3, "recover.seed": 3}]
    assert names(points) == ["data.seed=1,recover.seed=2", "data.seed=3,recover.seed=3"]
    assert [run.seed for run in sweep_runs(Experiment(), points)] == [None, 3]
    assert names([{"prune.ratio": 0.1}, {"score.samples": 3}]) == ["ratio=0.1", "samples=3"]
    assert names([{"prune.ratio": 0.1}]) == ["only"]


def test_names_are_names_of_folders():
    paths = ["/models/a b/../c", "\x1b[2J\u202eevil\n", "x" * 300, "x" * 301, "..", ""]
    found = names([{"model.hf_dir": path} for path in paths])
    assert len(set(found)) == len(paths)
    for name in found:
        assert re.fullmatch(r"[A-Za-z0-9_.,=+-]+", name), name
        assert len(name) <= LONGEST_NAME
        assert name not in (".", "..")
    long = {f"label{i}": {f"{i}" * 60: {"data.seed": i}, "b": {"score.seed": i}} for i in range(6)}
    found = names(HYPER.product([HYPER.named(label, {k: {} for k in of}) for label, of in long.items()]))
    assert len(set(found)) == 64
    assert max(map(len, found)) == LONGEST_NAME


@pytest.mark.parametrize(
    ("points", "told"),
    [
        ([{"prune.rato": 0.1}], r"run only: config.prune has no setting 'rato'; did you mean 'ratio'\?"),
        ([{"prunes.ratio": 0.1}], r"config has no setting 'prunes'; did you mean 'prune'\?"),
        ([{"prune.ratio.x": 0.1}], r"config.prune.ratio={'x': 0.1} must be a number or None"),
        ([{"prune.ratio": "much"}], r"config.prune.ratio='much' must be a number"),
        ([{"prune.ratio": 0.1}, {"prune.ratio": 0.1}], r"lists only twice: remove one of them"),
        (
            [{"prune.ratio": 0.1}, {"prune.ratio": 0.1 + 1e-12}, {"prune.ratio": 0.2}],
            r"two runs have the name ratio=0.1 \(prune.ratio was .*name them with hyper.named",
        ),
        ([{"recover.name": "sft"}, {"recover.name": "SFT"}], r"two runs have the name name=SFT"),
        ([], r"lists 0 runs"),
        (None, r"must return a list of overrides"),
        ([("prune.ratio", 0.1)], r"must return a list of overrides"),
    ],
)
def test_bad_sweeps_are_refused(points, told):
    refused(told, sweep_runs, Experiment(), points)


def test_overrides_are_settings_of_one_experiment():
    base = override(Experiment(), {"score": {"options": {"a": 1}}})
    (run,) = sweep_runs(base, [{"score.options.b": 2}])
    assert run.experiment.score.options == {"a": 1, "b": 2}  # what a mapping holds beside stays
    # Settings are checked together: without the first alone no loss would have a weight.
    (run,) = sweep_runs(Experiment(), [{"recover.losses.ce": 0.0, "recover.losses.l2": 1.0}])
    assert run.experiment.recover.losses.weights() == {"ce": 0.0, "l2": 1.0, "kl": 0.0, "rkl": 0.0, "cosine": 0.0}
    none = {"recover": {"method": "none"}}  # nothing trained is no recovery
    for changes, recoveries in (({"recover_variants": {"off": none, "sft": {}}}, ["depth-sft"]), (none, [])):
        (pruned,) = variants_of(override(Experiment(), {"prune": {"ratio": 0.1}, **changes}))
        assert [run.name for run in pruned.recoveries] == recoveries
