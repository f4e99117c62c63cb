"""The rules of the decision guide at the true shapes of the paper's models, and evidence of the same model."""

import contextlib
import dataclasses
import json
import math
import re

import prune_cases
import pytest
from paper_tables import TABLES
from refusal import refused
from repository import ROOT, full_size_models
from study_guide import as_json, settings_of_config

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import override
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.io.checkpoints.read import read_config
from vlmprune_jax.run.cli.config_files import read_experiment, shipped_config
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.planning.guide import COMPUTE, FILE, METHODS, Target, is_better, merge, read_guide, recommend
from vlmprune_jax.run.report.advice import evidence

GUIDE = read_guide()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The configs of the paper's models, by family."""
    found = {}
    for name in ("llava", "bunny", "internvl", "llama"):
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps(full_size_models()[name]))
        found[name] = read_config(folder)[1]
    return found


OTHER = 1.01  # times the parameters of a model that was measured, so that it is another


def advised(cfg, ratio, compute="full", data=0.05, methods=METHODS, guide=GUIDE, size=OTHER):
    decoder = ratio * count_params(cfg) / count_params(cfg, "text")
    removed = dict.fromkeys(METHODS, decoder)
    parameters, options = round(size * count_params(cfg)), (data, compute, methods)
    return recommend(Target(parameters, cfg.vision is not None, ratio, decoder, removed, *options), guide)


@pytest.mark.parametrize(
    # the last: what the paper's models retain at such a ratio, the most similar first
    ("name", "ratio", "compute", "methods", "recovery", "retained"),
    [
        ("llava", 0.15, "none", ("width",), "none", [90.87, 94.74, 90.87]),
        ("llava", 0.15, "projector", ("depth",), "projector", []),
        ("llava", 0.15, "full", ("depth",), "sft_l2", [98.10, 98.98]),
        ("llava", 0.3, "full", ("depth",), "sft_l2", [96.38, 94.37]),
        ("llava", 0.45, "full", ("width",), "sft_l2", [83.99, 90.48]),
        ("llava", 0.6, "full", ("width",), "sft_l2", [78.13, 83.86]),
        ("internvl", 0.3, "full", ("depth",), "sft_l2", [94.37, 96.38]),
    ],
)
def test_rules(shapes, name, ratio, compute, methods, recovery, retained):
    found = advised(shapes[name], ratio, compute)
    assert (found.rule.methods, found.rule.recovery) == (methods, recovery)
    assert [row.retained for row in found.rows] == retained
    assert found.promise is None  # of other models on other data
    assert any("evaluate first" in warning for warning in found.warnings) == (not retained)
    assert found.data_fraction == (0.0 if recovery == "none" else 0.05)
    assert found.of_family


def test_retention_is_also_told_relative_to_the_unpruned_model_trained_alike(shapes):
    """Where no such model was trained, a warning says what the number may contain."""
    found = advised(shapes["llava"], 0.3)
    assert any("no unpruned model was trained alike" in warning for warning in found.warnings)
    assert not any("trained alike" in warning for warning in advised(shapes["llava"], 0.15, "none").warnings)
    rows = tuple(dataclasses.replace(row, of_control=0.99 * row.retained) for row in GUIDE.evidence)
    found = advised(shapes["llava"], 0.3, guide=dataclasses.replace(GUIDE, evidence=rows))
    assert (
        "96.38 % (1 seed, 95.4 % of control) with LLaVA-1.5-7B"
        in dict([*evidence(found, GUIDE, False)][:2])["measured"]
    )
    assert not any("trained alike" in warning for warning in found.warnings)


# --- evidence of the same model ---------------------------------------------------------------------------------------


def demo_advice(ratio=0.305, data=0.05, compute="full", guide=GUIDE, size=1, methods=METHODS, **removed):
    share = ratio * 1056576 / 573888
    removed = {**dict.fromkeys(METHODS, share), **removed}
    return recommend(Target(size * 1056576, True, ratio, share, removed, data, compute, methods), guide)


def test_evidence_of_the_same_model_comes_first():
    """The demo's teacher: the guide's rule would take widths, and one seed of the demo retained 99.88 %."""
    found = demo_advice()
    assert found.rule.methods == ("width",)
    head = found.head
    assert (head.source, head.method, head.recovery, head.seeds) == ("study_easyvqa", "depth", "sft", 6)
    assert found.rows == (head,)
    half = (head.interval[1] - head.interval[0]) / 2 * math.sqrt(7)  # for one seed more
    assert found.promise == pytest.approx((head.retained - half, min(100.0, head.retained + half)))
    none = demo_advice(data=0.0)
    assert (none.head.method, none.head.recovery) == ("depth", "reconstruct")
    assert none.variants["depth"]["recover"] == {"method": "none"}
    assert "needs data" in none.warnings[0]


def test_rows_are_matched_by_what_a_plan_removes():
    """Layers come in tenths of the demo: 60 % asked is 55.8 % removed, and the row of 55.8 % is measured."""
    asked = {"ratio": 0.326, "data": 0.0, "compute": "none"}
    best = demo_advice(**asked)
    assert (best.head.method, best.head.retained) == ("hybrid", 98.08)
    assert "depth + reconstruct" not in best.because  # no plan of 60 % by layers alone
    assert best.promise[0] < 95.54 < best.promise[1]  # followed to the end
    ways = [row for row in GUIDE.evidence if row.method == "depth" and row.decoder_ratio == 0.558 and row.seeds == 12]
    assert {row.recovery for row in ways if not row.data_fraction} == {"none", "reconstruct"}
    refused("no measurement supports removing 60 % of the decoder", demo_advice, **asked, methods=("depth",))
    only = demo_advice(**asked, methods=("depth",), depth=0.558)
    assert (only.head.retained, only.head.decoder_ratio) == (97.73, 0.558)


@pytest.mark.parametrize("data", [0.0, 0.05])
def test_no_option_of_a_like_budget_was_measured_to_be_better(data):
    """Hybrid is an option like any other: nothing within the options is better beyond chance than what is advised."""
    seen = 0
    for percent in range(3, 55, 2):
        with contextlib.suppress(UserError):  # no measurement supports this
            found = demo_advice(percent / 100, data)
            if found.head is None:
                continue
            near = [row for row in GUIDE.evidence if abs(row.decoder_ratio - found.target.decoder_ratio) <= GUIDE.at]
            rows = [row for row in near if row.parameters == 1056576 and (row.seeds or 1) > 1]
            rows = [row for row in rows if (row.data_fraction or 0.0) <= data]
            assert not any(is_better(row, found.head) for row in rows), percent
            seen += 1
    assert seen > 5


def test_other_data_than_that_of_the_evidence_is_promised_nothing():
    found = demo_advice()
    assert found.promise is not None
    assert dict(evidence(found, GUIDE, own_data=False))["expect"].endswith("(95 % interval for another seed)")
    lines = dict(evidence(found, GUIDE, own_data=True))
    assert lines["expect"] == "unknown, as nothing was measured with this model, data and ratio: evaluate first"
    assert lines["measured"].endswith("depth + sft on 5 % of the data: accuracy on easy-VQA, 2,000 questions")


def rows_of(*rows):
    """Return the guide with only these rows (method, recovery, retained, half an interval, seeds) of the teacher."""
    like = next(row for row in GUIDE.evidence if row.source == "study_easyvqa")
    evidence = [
        dataclasses.replace(
            like,
            **{"method": method, "recovery": recovery, "retained": retained, "seeds": seeds, "decoder_ratio": 0.5},
            **{"interval": half and (retained - half, retained + half), "note": f"{seeds}"},
            data_fraction=0.0 if recovery in ("none", "reconstruct") else 0.05,
        )
        for method, recovery, retained, half, seeds in rows
    ]
    return dataclasses.replace(GUIDE, evidence=tuple(evidence))


NONE, RECONSTRUCT = ("depth", "none", 96.0, 0.5, 6), ("width", "reconstruct", 99.0, 0.3, 6)


@pytest.mark.parametrize(
    ("rows", "chosen", "because"),
    [
        ([NONE, RECONSTRUCT, ("depth", "sft_l2", 99.3, 0.3, 6)], 1, "depth + sft_l2 on 5 % of the data (99.30 %) is"),
        ([NONE, RECONSTRUCT, ("depth", "sft_l2", 99.6, 0.3, 6)], 2, "best of "),
        ([RECONSTRUCT, ("depth", "sft_l2", 99.9, None, 1)], 0, "best of "),  # one seed does not decide
        ([("depth", "none", 98.0, 9.0, 2), RECONSTRUCT], 1, "best of "),  # nor what is known badly
        ([("depth", "sft", 99.0, 0.3, 6), ("depth", "sft_l2", 99.1, 0.3, 6)], 0, "by chance at most"),
        ([("width", "reconstruct", 99.5, None, 1), RECONSTRUCT], 1, "best of "),  # most seeds, not the highest
        ([RECONSTRUCT, ("hybrid", "reconstruct", 99.9, 0.1, 6)], 1, "next is width + reconstruct (99.00 %)"),
        ([RECONSTRUCT, ("depth", "lora", 99.9, 0.1, 6)], 0, "outside them, depth + lora on 5 % of the data (99.90 %)"),
        ([("width", "none", 80.0, None, 1), ("width", "reconstruct", 90.0, None, 1)], 1, "best of "),
    ],
)
def test_ties_go_to_less_work(rows, chosen, because):
    guide = rows_of(*rows)
    found = demo_advice(0.5 * 573888 / 1056576, guide=guide)
    assert found.head == guide.evidence[chosen]
    assert because in found.because


def test_what_is_advised_for_the_demo_is_its_own_arm():
    """Section by section the experiment that measured the evidence."""
    found = demo_advice(
        guide=dataclasses.replace(GUIDE, evidence=[one for one in GUIDE.evidence if one.source == "demo"])
    )
    ours = merge(found.recipe, found.task, found.variants["depth"], {"data": {"fraction": 0.05}})
    ours, demo = override(Experiment(), ours), read_experiment(shipped_config("demo"))
    demo = override(demo, merge(demo.prune_variants["depth"], demo.recover_variants["sft_l2"]))
    for section in ("data", "score", "reconstruct", "evaluate", "speed", "export"):
        assert getattr(ours, section) == getattr(demo, section), section
    assert dataclasses.replace(ours.recover, name="") == dataclasses.replace(demo.recover, name="")


def test_evidence_of_a_million_parameters_never_heads_advice_for_a_large_model(shapes):
    for name in ("llava", "bunny", "internvl", "llama"):
        for compute in ("none", "full"):
            for ratio in (0.1, 0.13) if compute == "none" else (0.1, 0.2, 0.3, 0.45, 0.5):
                found = advised(shapes[name], ratio, compute)
                assert {row.source for row in found.rows} <= {"paper"}
                assert found.task == {}
    other = demo_advice(size=3)
    assert other.head is other.promise is None
    assert {row.parameters for row in other.rows} == {1056576}


def test_speed_takes_layers_and_what_is_solved_for(shapes):
    """Reconstruction is advised without training always, with it where widths go."""
    for compute, ratio in [("none", 0.1), *(("full", ratio) for ratio in (0.1, 0.3, 0.36, 0.5))]:
        found = advised(shapes["llava"], ratio, compute, methods=("depth",))
        assert {*found.variants} == {"depth"}
        assert ("reconstruct" in found.variants["depth"]) == (compute == "none")
    assert "reconstruct" in advised(shapes["llava"], 0.1, "none").variants["width"]
    gap = advised(shapes["llava"], 0.36).variants
    assert {name: "reconstruct" in settings for name, settings in gap.items()} == {"depth": False, "width": True}
    assert "reconstruct" not in advised(shapes["llava"], 0.3).variants["depth"]


def test_data(shapes):
    cfg = shapes["llava"]
    assert advised(cfg, 0.3, data=1.0).data_fraction == 0.05  # suffices by the guide
    assert advised(cfg, 0.3, data=0.01).data_fraction == 0.01
    assert any("less than 5 %" in warning for warning in advised(cfg, 0.3, data=0.01).warnings)
    deep = advised(cfg, 0.6, data=0.2)
    assert deep.data_fraction == 0.2
    assert any("recommends all training data; 20 % are available" in warning for warning in deep.warnings)
    none = advised(cfg, 0.15, data=0.0)
    assert none.rule.compute == "none"
    assert any("training needs data" in warning for warning in none.warnings)


def test_a_decoder_alone_has_its_own_rows(shapes):
    decoder = Target(134515008, False, 0.2, 0.2, dict.fromkeys(METHODS, 0.2), data=0.05, compute="none")
    found = recommend(decoder, GUIDE)
    assert (found.head.model, found.head.retained) == ("SmolLM2-135M", 76.41)  # of two single seeds, not the higher one
    assert found.variants["width"]["prune"] == {"method": "width", "heads": "keep"}  # as measured
    assert found.promise is None  # nobody else has these texts
    trained = advised(shapes["llama"], 0.2)
    assert any("no model of this kind within 10 times its size" in one for one in trained.warnings)


def test_ratios_are_compared_by_the_share_of_the_decoder():
    """A decoder that is half of a model loses twice the ratio."""
    cfg = prune_cases.config(vision=True)
    found = advised(cfg, 0.2)
    assert found.target.decoder_ratio > 0.2
    assert found.rule.name != advised(cfg, 0.2 * 0.2 / found.target.decoder_ratio / 2).rule.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 0.0}, "ratio=0 must be above 0"),
        ({"ratio": 1.5}, "ratio=1.5 must be at least 0 and below 1"),
        ({"ratio": float("nan")}, "ratio=nan must be"),
        ({"data": 1.5}, "data=1.5 must be a share"),
        ({"data": float("nan")}, "data=nan must be a share"),
        ({"compute": "projektor"}, "compute 'projektor' is not one of none, projector, full; did you mean"),
        *(
            ({"ratio": ratio, "compute": compute}, rf"no measurement supports removing .* \(at most {most} %\): remove")
            for ratio, compute, most in ((0.3, "none", 18), (0.4, "projector", 33), (0.7, "full", 63))
        ),
    ],
)
def test_what_cannot_be_asked_and_what_nothing_supports(shapes, changes, message):
    refused(message, advised, shapes["llava"], **{"ratio": 0.3, **changes})


def test_some_rule_fits_up_to_what_was_measured(shapes):
    for cfg in shapes.values():
        for compute in COMPUTE if cfg.projector is not None else ("none", "full"):
            most = max(rule.up_to for rule in GUIDE.rules if rule.compute == compute) * count_params(cfg, "text")
            for percent in range(1, int(100 * most / count_params(cfg)), 5):
                assert advised(cfg, percent / 100, compute, methods=METHODS[: 1 + percent % 3]).variants


# --- the decision guide ----------------------------------------------------------------------------------------------


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


def test_the_file_is_as_a_study_would_write_it_and_its_settings_are_experiments():
    assert FILE.read_text() == as_json(GUIDE)
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
        ({"settings": dict(list(GUIDE.settings.items())[:3])}, "which has no settings"),
        ({"data": dataclasses.replace(GUIDE.data, steps=0)}, "data.steps is 0, but must be at least 1"),
    ],
)
def test_a_guide_that_does_not_hold_together(tmp_path, changes, message):
    path = tmp_path / "guide.json"
    path.write_text(as_json(dataclasses.replace(GUIDE, **changes)))
    refused(rf"guide\.json: .*{re.escape(message)}", read_guide, path)
