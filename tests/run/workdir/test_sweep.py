"""`sweep.json`: groups over seeds, its table, and what is refused."""

import json

import pytest
from refusal import refused
from sweep_cases import some_runs, write_sweep

from vlmprune_jax.run.evaluation.statistics import interval_of_mean
from vlmprune_jax.run.workdir.groups import groups_of
from vlmprune_jax.run.workdir.sweep import read_sweep


def test_groups_differ_in_more_than_seeds(tmp_path):
    write_sweep(tmp_path)
    groups = groups_of(read_sweep(tmp_path))
    assert len(groups) == 12
    assert [len(group.models) for group in groups[:3]] == [1, 2, 2]
    assert groups[1].labels == {"method": "depth", "ratio": "0.1", "recovery": "sft", "fraction": "0.05"}
    kept = [one.evaluation.mean_of_ratios for one in groups[2].models]
    assert groups[2].retained == interval_of_mean(kept)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda sweep: sweep.update(format=7), "written by a newer vlmprune"),
        (lambda sweep: sweep["models"][0]["found"].pop("parameters"), "parameters"),
        (lambda sweep: sweep["models"][0]["found"].update(model="other"), "there are no results of 'other'"),
        (lambda sweep: sweep["models"][0]["found"]["evaluation"]["scores"].clear(), "there are no results of 'docs'"),
        (lambda sweep: sweep["models"].clear(), "models"),
    ],
)
def test_damage_is_one_line(tmp_path, edit, told):
    write_sweep(tmp_path, ("docs",), runs=some_runs(seeds=(1,))[:2])
    sweep = json.loads((tmp_path / "sweep.json").read_text())
    edit(sweep)
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    refused(f"sweep.json.*{told}", read_sweep, tmp_path)


def test_nothing_there_says_what_to_run(tmp_path):
    refused(r"sweep.json: no such file: run `vlmprune sweep` first", read_sweep, tmp_path)
