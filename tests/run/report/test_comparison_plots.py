"""Lines, colours and Pareto fronts of the figures that compare models."""

import dataclasses

from msgspec.structs import replace
from sweep_cases import some_runs, with_models, write_sweep

from vlmprune_jax.run.report import comparison_plots as plots
from vlmprune_jax.run.report.style import COLOURS
from vlmprune_jax.run.workdir.groups import groups_of


def test_lines_are_of_what_differs(tmp_path):
    """A learning rate that some share a place with makes lines of its own; criteria too."""
    sweep = write_sweep(tmp_path, ("docs",))
    groups = groups_of(sweep)
    assert set(plots.series_of(groups).values()) == {"depth", "width"}
    rates = {"0.05": "1e-3"}
    labelled = [
        replace(one, labels={**one.labels, "rate": rates.get(one.labels.get("fraction"), "1e-4")})
        for one in sweep.models
    ]
    sweep = with_models(
        replace(sweep, models=labelled), data_fraction=lambda one: 0.05 if one.found.data_fraction else 0.0
    )
    assert set(plots.series_of(groups_of(sweep)).values()) >= {"depth, 0.05, 1e-3", "width, 0.2, 1e-4"}
    sweep = with_models(sweep, criterion=lambda one: "l1" if one.labels["ratio"] == "0.1" else "l2")
    assert any(name.startswith("width, l2") for name in plots.series_of(groups_of(sweep)).values())


def test_ways(tmp_path):
    sweep = write_sweep(tmp_path, ("docs",), runs=some_runs(seeds=(1,))[:2])
    none, sft = groups_of(sweep)
    assert (plots.way_of(none), plots.way_of(sft)) == ("without recovery", "SFT")
    recovery = {"none": "reconstructed", "sft": "sft"}
    sweep = with_models(sweep, reconstruct="least_squares", recovery=lambda one: recovery[one.found.recovery])
    none, sft = groups_of(sweep)
    assert (plots.way_of(none), plots.way_of(sft)) == ("reconstructed", "reconstructed + SFT")


def test_the_front_is_what_nothing_beats(tmp_path):
    groups = groups_of(write_sweep(tmp_path, ("docs",)))
    places = [group.mean("parameters") for group in groups]
    front = plots._front([(place, place, place) for place in places], groups, rising=False)
    assert front == sorted(front)
    worth = {(x, group.retained[0]) for x, group in zip(places, groups, strict=True)}
    for x, value in worth:
        beaten = any(one <= x and kept >= value and (one, kept) != (x, value) for one, kept in worth)
        assert ((x, value) in front) is not beaten
    assert len(front) == 2


def test_the_front_ignores_differences_inside_the_range_of_speeds(tmp_path):
    """1.81 times is not faster than 1.54 where rounds range from 1.4 to 1.9; it is where they range by 0.1."""
    groups = groups_of(write_sweep(tmp_path, ("docs",), runs=some_runs(seeds=(1,))[:3]))
    groups = [
        dataclasses.replace(group, retained=(kept, kept, kept))
        for group, kept in zip(groups, (90.0, 99.0, 95.0), strict=True)
    ]
    noisy = [(1.81, 1.4, 1.9), (1.54, 1.5, 1.6), (1.48, 1.4, 1.5)]
    assert plots._front(noisy, groups, rising=True) == [(1.54, 99.0)]
    sure = [(1.81, 1.8, 1.9), (1.54, 1.5, 1.6), (1.48, 1.4, 1.5)]
    assert plots._front(sure, groups, rising=True) == [(1.81, 90.0), (1.54, 99.0)]


def test_colours_repeat_with_other_dashes_and_markers():
    styles = plots._styles(["without recovery", *"abcdefgh"])
    assert styles["a"]["color"] == styles["g"]["color"] == COLOURS[0]
    assert len({tuple(style.values()) for style in styles.values()}) == 9
    assert len({(style["color"], style["marker"]) for style in styles.values()}) == 9  # a single point has no dashes
