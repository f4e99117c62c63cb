"""The decision guide: its rows against the paper's tables and the configs that made them, and damaged files."""

import dataclasses

import pytest
from paper_tables import TABLES
from repository import ROOT
from study_guide import as_json, settings_of_config

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import override
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.planning.guide import FILE, read_guide

GUIDE = read_guide()


def test_rows_of_the_paper_are_the_published_ones():
    ours = sorted(one.retained for one in GUIDE.evidence if one.source == "paper")
    assert ours == sorted(average for _, rows in TABLES.values() for _, average in rows)
    for table, name in (("llava", "LLaVA"), ("internvl", "InternVL"), ("bunny", "Bunny")):
        plain = {one.retained for one in GUIDE.evidence if name in one.model and one.recovery == "none"}
        assert plain == {average for _, average in TABLES[table][1][:4]}


def test_rows_that_are_one_constant_times_the_original_do_not_count():
    """All nine scores of InternVL's recovered rows are the original's times one number: no measurement."""
    original, _ = TABLES["internvl"]
    for row, average in TABLES["internvl, second table"][1][1:]:
        factor = row[5] / original[5]  # of the largest scores
        assert [theirs * factor for theirs in original] == pytest.approx(row, abs=0.009)
        (one,) = [one for one in GUIDE.evidence if one.retained == average]
        assert not one.counts


def test_the_file_is_as_a_study_would_write_it():
    assert FILE.read_text() == as_json(GUIDE)


def test_every_word_of_advice_is_an_experiment():
    for name, settings in GUIDE.settings.items():
        assert override(Experiment(), settings, name)


@pytest.mark.parametrize(("source", "config"), [("demo", "demo"), ("study_easyvqa", "configs/sweeps/study_easyvqa.py"),
                                                ("study_smollm2", "configs/sweeps/study_smollm2.py:x")])  # fmt: skip
def test_the_recipe_is_that_of_the_config_that_made_the_rows(source, config, tmp_path, monkeypatch):
    known = GUIDE.sources[source]
    path = str(ROOT / ("configs/demo.py" if config == "demo" else config))
    monkeypatch.chdir(tmp_path)  # where a config writes its records
    assert settings_of_config(path) == (known.recipe, known.task)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "written in format 1, this version reads 6"),
        ({"sources": {"paper": GUIDE.sources["paper"]}}, "a row has the unknown source 'demo'"),
        ({"sources": {}}, "there must be a source 'paper'"),
        ({"settings": {}}, "settings must include depth, width, hybrid"),
        (
            {"settings": {n: s for n, s in GUIDE.settings.items() if n != "none"}},
            "advises 'none', which has no settings",
        ),
        ({"data": dataclasses.replace(GUIDE.data, steps=0)}, "data.steps is 0, but must be at least 1"),
    ],
)
def test_a_guide_that_does_not_hold_together(tmp_path, changes, message):
    path = tmp_path / "guide.json"
    path.write_text(as_json(dataclasses.replace(GUIDE, **changes)))
    with pytest.raises(UserError, match=r"guide\.json") as error:
        read_guide(path)
    assert message in str(error.value)
