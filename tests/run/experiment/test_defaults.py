"""The Python functions and the command line have the same defaults."""

import inspect

import pytest
from prune_cases import EQUAL, config, model

import vlmprune_jax as vp
from vlmprune_jax.base.settings import override, settings_of
from vlmprune_jax.core.prune import CRITERIA, PlanConfig, ReconstructConfig, ScoreConfig
from vlmprune_jax.core.prune.reconstruct_config import TokenWeights
from vlmprune_jax.core.sections import ModelSpec
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.exports.card import CardFacts
from vlmprune_jax.io.exports.formats import ExportSpec
from vlmprune_jax.run.evaluation.config import EvaluateSpec, SpeedConfig
from vlmprune_jax.run.experiment.arguments import plan_config
from vlmprune_jax.run.experiment.spec import Experiment

# Functions that take single settings as keywords -> their section, and parameters that are no setting of that name.
KEYWORDS = [
    (vp.save, ExportSpec, set()),
    (vp.gptq, ExportSpec, set()),
    (vp.load, ModelSpec, set()),
    (vp.evaluate, EvaluateSpec, set()),
    (vp.perplexity, EvaluateSpec, set()),
]


def differences(function, section, apart):
    """Return {name: (default of the function, of the section)} where they differ, and the number compared."""
    declared = settings_of(section)
    parameters = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if name in declared and name not in apart and parameter.default is not inspect.Parameter.empty
    }
    found = {n: (value, declared[n].default) for n, value in parameters.items() if value != declared[n].default}
    return found, len(parameters)


@pytest.mark.parametrize(("function", "section", "apart"), KEYWORDS, ids=lambda value: getattr(value, "__name__", ""))
def test_keyword_defaults_are_those_of_the_section(function, section, apart):
    assert differences(function, section, apart)[0] == {}


def test_a_difference_is_noticed():
    def other(*, dtype="float64", layout="source", imatrix=None):
        pass

    assert differences(other, ExportSpec, {"imatrix"}) == ({"dtype": ("float64", "bfloat16")}, 2)
    assert differences(vp.gptq, ExportSpec, set())[1] >= 3


def test_save_takes_every_setting_of_the_export():
    configs = {"evaluate", "base_model", "push_to_hub"}  # settings that only configs have
    taken = {*inspect.signature(vp.save).parameters, *CardFacts.__dataclass_fields__}
    taken = taken.union(*(settings_of(one.options) for one in vp.formats.values()))
    assert settings_of(ExportSpec).keys() - taken == configs


@pytest.mark.parametrize(
    ("kind", "section"),
    [(ScoreConfig, "score"), (PlanConfig, "prune"), (ReconstructConfig, "reconstruct"), (SpeedConfig, "speed")],
)
def test_a_section_has_the_defaults_of_the_dataclass_that_the_function_takes(kind, section):
    spec, own = getattr(Experiment(), section), kind()
    assert isinstance(spec, kind)
    # a run measures speed and reconstructs on request, `measure_speed` and `reconstruct` always
    names = settings_of(kind).keys() - {"speed": {"rounds"}, "reconstruct": {"method"}}.get(section, set())
    assert {name: getattr(spec, name) for name in names} == {name: getattr(own, name) for name in names}
    assert vars(TokenWeights()).items() <= vars(ReconstructConfig()).items()


@pytest.mark.parametrize("name", vp.formats)
def test_formats_have_the_defaults_of_the_export_section(name):
    """`save` takes the options of a format as keywords."""
    own, section = settings_of(vp.formats[name].options), settings_of(ExportSpec)
    assert len(own) >= 4
    assert {n: about.default for n, about in own.items()} == {n: section[n].default for n in own}


def test_criteria_have_the_defaults_of_the_score_section():
    shared = {(name, option) for name, one in CRITERIA.items() for option in one.settings} & {
        (name, option) for name in CRITERIA for option in settings_of(ScoreConfig)
    }
    differ = {(n, o) for n, o in shared if CRITERIA[n].settings[o] != getattr(ScoreConfig(), o)}
    assert len(shared) > 20
    # None in the section: each criterion has its own reduction
    assert differ == {(name, "reduction") for name in CRITERIA if "reduction" in CRITERIA[name].settings}


def test_a_plan_is_the_same_from_python_and_from_a_config():
    teacher = model(config(EQUAL))
    scores = vp.score(teacher, None, criterion="l1")
    by_keywords = vp.make_plan(scores, teacher.cfg, method="width", ratio=0.2)
    spec = plan_config(override(PlanConfig(), {"method": "width", "ratio": 0.2}), ModelSpec(), DataSpec(), ExportSpec())
    assert vp.make_plan(scores, teacher.cfg, spec) == by_keywords
    assert by_keywords.options["heads"] == "auto"
    random = vp.score(teacher, None, criterion="random")
    assert random.options["seed"] == Experiment().score.seed
