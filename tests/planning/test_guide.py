"""The decision guide: its rows against the paper's tables, its rules at the true shapes of the paper's models."""

import dataclasses
import importlib.util
import json

import prune_cases
import pytest
from paper_tables import TABLES
from repository import ROOT

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.settings import override
from vlmprune_jax.experiment.spec import Experiment
from vlmprune_jax.hf.read import read_config
from vlmprune_jax.planning.guide import COMPUTE, FILE, as_json, read_guide, recommend

GUIDE = read_guide()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The configs of the paper's models, by family."""
    spec = importlib.util.spec_from_file_location("full_size", ROOT / "benchmarks/full_size.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    found = {}
    for name in ("llava", "bunny", "internvl", "llama"):
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps(benchmark.MODELS[name]))
        found[name] = read_config(folder)[1]
    return found


def advised(cfg, ratio, compute="full", data=0.05, speed=False, guide=GUIDE):
    return recommend(cfg, ratio=ratio, data_fraction=data, compute=compute, speed=speed, guide=guide)


def of_paper(found):
    return next((one for one in found.expected if one.name == "paper"), None)


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


CASES = {
    # model, ratio, compute: methods, recovery, what the paper's rows leave
    ("llava", 0.15, "none"): (("width",), "none", (90.87, 94.74)),
    ("llava", 0.15, "projector"): (("depth",), "projector", None),
    ("llava", 0.15, "full"): (("depth",), "sft_l2", (98.10, 98.98)),
    ("llava", 0.2, "full"): (("depth",), "sft_l2", (94.37, 98.98)),  # between the rows of 15 and of 30 %
    ("llava", 0.3, "full"): (("depth",), "sft_l2", (94.37, 96.38)),
    ("llava", 0.35, "full"): (("depth", "width"), "sft_l2", (83.99, 96.38)),
    ("llava", 0.45, "full"): (("width",), "sft_l2", (83.99, 90.48)),
    ("llava", 0.6, "full"): (("width",), "sft_l2", (78.13, 83.86)),
    ("llava", 0.05, "full"): (("depth",), "sft_l2", (98.10, 100.0)),  # above: the unpruned model
    ("bunny", 0.3, "full"): (("depth", "width"), "sft_l2", (83.99, 96.38)),  # 34 % of the decoder
    ("internvl", 0.3, "full"): (("depth",), "sft_l2", (94.37, 96.38)),
}


@pytest.mark.parametrize(("name", "ratio", "compute"), CASES)
def test_rules(shapes, name, ratio, compute):
    methods, recovery, expected = CASES[name, ratio, compute]
    found = advised(shapes[name], ratio, compute)
    assert (found.rule.methods, found.rule.recovery) == (methods, recovery)
    assert found.rule.supported
    assert (of_paper(found) and (of_paper(found).low, of_paper(found).high)) == expected
    assert found.data_fraction == (0.0 if recovery == "none" else 0.05)


@pytest.mark.parametrize(("ratio", "compute"), [(0.3, "none"), (0.4, "projector"), (0.7, "full")])
def test_what_nothing_supports_says_so(shapes, ratio, compute):
    found = advised(shapes["llava"], ratio, compute)
    assert not found.rule.supported
    assert found.rule.source == "nothing"


def test_beyond_the_last_row_there_is_no_low_end(shapes):
    paper = of_paper(advised(shapes["llava"], 0.7))
    assert (paper.low, paper.high) == (None, 83.86)


def test_speed_takes_layers(shapes):
    for compute in ("none", "full"):
        for ratio in (0.1, 0.3, 0.36, 0.5):
            found = advised(shapes["llava"], ratio, compute, speed=True)
            assert found.rule.methods == ("depth",)
            assert found.speed
    assert advised(shapes["llava"], 0.5).speed == ()


def test_what_is_solved_for(shapes):
    """Without training always, with it where widths go."""
    assert "reconstruct" in advised(shapes["llava"], 0.1, "none").variants["width"]
    gap = advised(shapes["llava"], 0.36).variants
    assert {name: "reconstruct" in settings for name, settings in gap.items()} == {"depth": False, "width": True}
    assert "reconstruct" not in advised(shapes["llava"], 0.3).variants["depth"]


def test_data(shapes):
    cfg = shapes["llava"]
    assert advised(cfg, 0.3, data=1.0).data_fraction == 0.05  # suffices by the guide
    assert advised(cfg, 0.3, data=0.01).data_fraction == 0.01
    assert "less than 5 %" in advised(cfg, 0.3, data=0.01).notes[0]
    deep = advised(cfg, 0.6, data=0.2)
    assert deep.data_fraction == 0.2
    assert "recommends all training data; 20 % are available" in deep.notes[0]
    none = advised(cfg, 0.15, data=0.0)
    assert none.rule.compute == "none"
    assert "Training needs data" in none.notes[0]


def test_conflicts_are_named(shapes):
    told = " ".join(advised(shapes["llava"], 0.36).conflicts)
    for what in ("nominal", "AVG-%", "Between 30 and 45 %", "5 % of the data"):
        assert what in told
    assert any("up to 30 % in its Figure 1" in one for one in advised(shapes["llava"], 0.2, "projector").conflicts)


def test_a_decoder_alone_has_its_own_rows(shapes):
    found = advised(shapes["llama"], 0.2, "none")
    assert found.expected[0].name == "smollm2"
    assert found.expected[0].low == found.expected[0].high == 79.75
    assert not any("AVG-%" in one for one in found.conflicts)
    assert any("nothing is trained, round first" in one for one in found.conflicts)
    trained = advised(shapes["llama"], 0.2)
    assert not any("round first" in one for one in trained.conflicts)
    assert any("No measurement of a similar model" in one for one in trained.notes)
    with pytest.raises(UserError, match="this model has no projector: use none or full"):
        advised(shapes["llama"], 0.1, "projector")


def test_ratios_are_compared_by_the_share_of_the_decoder():
    """A decoder that is half of a model loses twice the ratio."""
    cfg = prune_cases.config(vision=True)
    found = advised(cfg, 0.2)
    assert found.decoder_ratio > 0.2
    assert found.rule.name != advised(cfg, 0.2 * 0.2 / found.decoder_ratio / 2).rule.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 0.0}, "ratio=0 must be above 0"),
        ({"ratio": 1.5}, "ratio=1.5 must be at least 0 and below 1"),
        ({"ratio": float("nan")}, "ratio=nan must be"),
        ({"data": 1.5}, "data=1.5 must be a share"),
        ({"data": float("nan")}, "data=nan must be a share"),
        (
            {"compute": "projektor"},
            "compute 'projektor' is not one of none, projector, full; did you mean 'projector'?",
        ),
    ],
)
def test_what_cannot_be_asked(shapes, changes, message):
    with pytest.raises(UserError) as error:
        advised(shapes["llava"], **{"ratio": 0.3, **changes})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "written in format 2, this version reads 1"),
        ({"sources": {}}, "a row has the unknown source 'paper'"),
        ({"settings": {}}, "advises 'depth', which has no settings"),
        ({"rules": ()}, "no rule for compute 'none' covers all ratios"),
        ({"conflicts": {}}, "names an unknown conflict"),
    ],
)
def test_a_guide_that_does_not_hold_together(tmp_path, changes, message):
    path = tmp_path / "guide.json"
    path.write_text(as_json(dataclasses.replace(GUIDE, **changes)))
    with pytest.raises(UserError, match=r"guide\.json") as error:
        read_guide(path)
    assert message in str(error.value)


def test_some_rule_fits_whatever_is_asked(shapes):
    for cfg in shapes.values():
        for compute in COMPUTE if cfg.projector is not None else ("none", "full"):
            for percent in range(1, 100, 7):
                assert advised(cfg, percent / 100, compute, speed=percent % 2 == 0).variants
