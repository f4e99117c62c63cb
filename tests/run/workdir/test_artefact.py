"""The base of a workdir's files: written whole, read back equal, and refused in one line."""

import json
from typing import ClassVar

import pytest
from refusal import refused
from sweep_cases import some_runs, write_sweep

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.run.evaluation.statistics import interval_of_mean
from vlmprune_jax.run.workdir.artefact import Artefact, read_artefact, write_artefact
from vlmprune_jax.run.workdir.groups import groups_of
from vlmprune_jax.run.workdir.sweep import read_sweep


class Numbers(Artefact, frozen=True, kw_only=True, tag=2):
    """A file for these tests."""

    HINT: ClassVar[str] = "count again"
    COMPACT: ClassVar[bool] = True
    name: str
    values: list[float | None]
    note: str | None = None

    def problems(self, folder):
        """Return what is wrong."""
        return f"{folder.name} has no name" if not self.name else None


def test_it_is_read_back_as_written(tmp_path):
    path, numbers = tmp_path / "n.json", Numbers(name="\udcff", values=[1.0, None, float("inf")])
    write_artefact(path, numbers)
    assert read_artefact(path, Numbers) == numbers
    text = path.read_text()
    assert json.loads(text) == {"format": 2, "name": "\udcff", "values": [1.0, None, float("inf")]}
    assert len(text.splitlines()) == 5  # a line for each field


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"name": "a"}, "has no format that this version reads (format 2): count again"),
        ({"format": 1, "name": "a"}, "has no format that this version reads (format 2): count again"),
        ({"format": True, "name": "a"}, "has no format that this version reads (format 2): count again"),
        ({"format": 3, "name": "a"}, "(format 3, this version reads 2): upgrade vlmprune-jax"),
        ({"format": 2}, "does not have the expected content (Object missing required field `name`): count again"),
        ({"format": 2, "name": "", "values": []}, "has no name: count again"),
        ([], "count again"),
    ],
)
def test_what_is_refused(tmp_path, value, told):
    path = tmp_path / "n.json"
    path.write_text(json.dumps(value))
    with pytest.raises(UserError) as error:
        read_artefact(path, Numbers)
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).endswith(told)


def test_a_file_that_is_not_there(tmp_path):
    refused(r"n\.json: run it first", read_artefact, tmp_path / "n.json", Numbers, missing="run it first")


def test_fields_of_nobody_are_ignored(tmp_path):
    (tmp_path / "n.json").write_text('{"format": 2, "name": "a", "values": [], "more": 1}')
    assert read_artefact(tmp_path / "n.json", Numbers) == Numbers(name="a", values=[])


# --- `sweep.json` ----------------------------------------------------------------------------------------------------


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
