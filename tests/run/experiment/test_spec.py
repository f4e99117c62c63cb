"""Settings as they are declared, their defaults in Python and on the command line, and what a stage's ledger holds."""

import dataclasses
import inspect

import pytest
from prune_cases import EQUAL, config, model
from refusal import refused

import vlmprune_jax as vp
from vlmprune_jax.base.console import make_reporter
from vlmprune_jax.base.settings import STAGES, override, settings_of
from vlmprune_jax.core.models.stack import REMAT_POLICIES
from vlmprune_jax.core.prune import CRITERIA, PlanConfig, ReconstructConfig, ScoreConfig
from vlmprune_jax.core.prune.reconstruct_config import TokenWeights
from vlmprune_jax.core.recovery.config import REMAT, LossConfig, RecoverConfig
from vlmprune_jax.core.recovery.losses import losses
from vlmprune_jax.core.sections import ModelSpec
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.exports.card import CardFacts
from vlmprune_jax.io.exports.formats import ExportSpec
from vlmprune_jax.run.cli.config_files import shipped_config
from vlmprune_jax.run.evaluation.config import EvaluateSpec, SpeedConfig
from vlmprune_jax.run.experiment.arguments import plan_config, recover_config
from vlmprune_jax.run.experiment.spec import Experiment, options, sections
from vlmprune_jax.run.experiment.variants import check_experiment
from vlmprune_jax.run.stages.recover import _made_from
from vlmprune_jax.run.stages.work import Work

# --- declarations -----------------------------------------------------------------------------------------------------


def test_every_field_of_every_section_is_declared():
    nested = {"prune": {"budget", "vocabulary"}, "recover": {"lora", "losses"}, "evaluate": {"sets"}}
    for place, section in sections().items():
        fields = {f.name for f in dataclasses.fields(section)}
        assert fields - set(settings_of(section)) == nested.get(place, set()), place
    for option in options():
        assert set(option.about.affects) <= set(STAGES), option.name
        assert option.about.sentence.endswith((".", '."')), option.name
        if option.about.choices:
            assert len(option.about.names()) > 1, option.name
    assert set(REMAT) == set(REMAT_POLICIES)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"score": {"gqa": "group"}}, "score.gqa 'group' is not one of groups, q_heads; did you mean 'groups'"),
        ({"data": {"template": "buny"}}, "data.template 'buny' is not one of auto, .*; did you mean 'bunny'"),
        ({"data": {"video_fps": 2.0, "video_frames": 8}}, "data.video_fps=2 and data.video_frames=8 are both set"),
        ({"prune_variants": {"a": {"prune": {"rounding": "up"}}}}, "prune.rounding 'up' is not one of nearest"),
        ({"recover_variants": {"a": {"recover": {"losses": {"extra": {"k": 1}}}}}}, "extra has no term 'k'"),
        *(
            ({section: {name: 10**9}}, f"{section}.{name}=1000000000 must be at least . and at most {most}$")
            for section, name, most in [
                *[(section, "batch_size", 8192) for section in ("evaluate", "recover", "score")],
                *[("data", name, most) for name, most in (("max_images", 10_000), ("threads", 1024))],
            ]
        ),
    ],
)
def test_a_command_refuses_at_its_start(values, message):
    refused(message, lambda: check_experiment(override(Experiment(), values)))


# --- defaults ---------------------------------------------------------------------------------------------------------


def differences(function, section):
    """Return {name: (default of the function, of the section)} where they differ, and the number compared."""
    declared = settings_of(section)
    parameters = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if name in declared and parameter.default is not inspect.Parameter.empty
    }
    found = {n: (value, declared[n].default) for n, value in parameters.items() if value != declared[n].default}
    return found, len(parameters)


def test_keyword_defaults_are_those_of_the_section():
    for function, section in (
        (vp.save, ExportSpec),
        (vp.gptq, ExportSpec),
        (vp.load, ModelSpec),
        (vp.evaluate, EvaluateSpec),
        (vp.perplexity, EvaluateSpec),
    ):
        assert differences(function, section)[0] == {}, function

    def other(*, dtype="float64", layout="source"):
        pass

    assert differences(other, ExportSpec) == ({"dtype": ("float64", "bfloat16")}, 2)
    assert differences(vp.gptq, ExportSpec)[1] >= 3


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


def test_one_set_of_defaults():
    """Those of the library, of its parts, and of a config."""
    assert recover_config(Experiment().recover) == RecoverConfig()
    assert LossConfig().weights().keys() == losses.keys()
    assert hash(RecoverConfig(losses=LossConfig(extra={"mine": 1.0}))) != hash(RecoverConfig())
    assert vars(TokenWeights()).items() <= vars(ReconstructConfig()).items()
    section = settings_of(ExportSpec)
    for one in vp.formats.values():  # whose options `save` takes as keywords
        own = settings_of(one.options)
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


# --- what a stage's ledger holds --------------------------------------------------------------------------------------


def named(section: str, names: str) -> set[str]:
    return {f"{section}.{name}" for name in names.split()}


def whole(section: str, without: str = "") -> set[str]:
    fields = dataclasses.fields(sections()[section])
    assert {field.name for field in fields} >= set(without.split())
    return {f"{section}.{field.name}" for field in fields} - named(section, without)


PRECISION = {"model.dtype"}
TRAINING = whole(
    "data",
    "source train eval images eval_images fraction seed group_by cache_megabytes feature_cache threads "
    "max_image_pixels max_video_frames max_video_megabytes max_video_pixels max_video_seconds video_timeout",
)
PICTURE = TRAINING - named("data", "max_length truncate length_buckets on_error")
SCORE, PRUNE, RECONSTRUCT = whole("score", "depth width options memory_budget"), whole("prune"), whole("reconstruct")
RECOVER = whole("recover", "method name control loggers log_every save_every keep_checkpoints merge_lora teacher_cache")
# Stage -> the settings that it keeps: what is not here may be changed without making anything again.
EXPECTED = {
    "score": PRECISION | TRAINING | SCORE | {"criteria"},
    "prune": PRECISION | PRUNE,
    "prune in steps": PRECISION | PRUNE | TRAINING | SCORE | named("score", "depth width"),
    "reconstruct": PRECISION | TRAINING | RECONSTRUCT,
    "recover": PRECISION | TRAINING | RECOVER | named("data", "fraction seed group_by"),
    "evaluate": PRECISION | PICTURE | named("evaluate", "batch_size max_length max_new_tokens questions prompt_suffix"),
    "export": PRECISION | whole("export", "options mtp_dir storage") | named("data", "max_image_tokens"),
}
LOSSES = {
    *("ce", "l2", "cosine", "kl", "rkl", "l2_layers", "temperature", "teacher_inputs", "reference_compat", "chunk"),
    "kl_positions",
}


@pytest.fixture
def kept(tmp_path):
    """Callable (experiment, stage) -> the settings that its ledger keeps."""
    (tmp_path / "records.json").write_text("[]")

    def of(experiment, stage):
        files = {"train": str(tmp_path / "records.json"), "eval": str(tmp_path / "records.json"), "images": None}
        experiment = override(experiment, {"model": {"hf_dir": str(tmp_path / "model")}, "data": files})
        place = {"stage": stage, "start": tmp_path / "pruned"}
        if stage == "evaluate":
            place |= {"subject": "pruned", "part": "questions"}
        return Work.at(tmp_path, experiment, make_reporter(False), **place).task.settings

    return of


@pytest.mark.parametrize("name", ["demo", "llava15_7b"])
def test_each_stage_keeps_what_changes_it(kept, name):
    experiment = override(Experiment(), shipped_config(name).to_dict())
    for stage, expected in EXPECTED.items():
        asked = override(experiment, {"prune": {"steps": 2}}) if stage == "prune in steps" else experiment
        assert kept(asked, stage.split()[0]).keys() == expected, stage
    found = kept(experiment, "recover")
    assert found["recover.losses"].keys() == LOSSES
    assert found["recover.lora"].keys() == {"rank", "alpha", "dropout", "targets"}
    assert found["recover.teacher_top_k"] == 0


def test_only_what_a_setting_affects_is_made_again(kept):
    """For every setting, against its declaration; files and folders are inputs and none of the settings."""
    experiment = Experiment()
    for stage in ("score", "prune", "reconstruct", "recover", "evaluate", "export"):
        found = kept(experiment, stage)
        names = {name for name in found if not isinstance(found[name], dict)}
        names |= {f"{name}.{inner}" for name, value in found.items() if isinstance(value, dict) for inner in value}
        declared = {o.name for o in options() if stage in o.about.affects and not o.about.by_content}
        declared = {name for name in declared if not name.startswith("evaluate.sets.")}
        # empty, or of a text
        declared -= {"recover.losses.extra", "score.options", "export.options", "evaluate.text_window"}
        if stage == "score":
            names = (names - {"criteria.scores.npz"}) | {"score.depth", "score.width"}
        assert names == declared, stage


def test_terms_of_ones_own_are_kept(kept):
    experiment = override(Experiment(), {"recover": {"losses": {"extra": {"mine": 0.5}}}})
    losses["mine"] = losses["kl"]
    try:
        assert kept(experiment, "recover")["recover.losses"]["extra"] == {"mine": 0.5}
    finally:
        del losses["mine"]


def test_a_teacher_cache_is_of_what_its_logits_depend_on(tmp_path):
    spec = {"teacher_cache": "x", "teacher_top_k": 5, "losses": {"kl": 1.0, "teacher_inputs": "own"}}
    experiment = override(
        Experiment(), {"model": {"hf_dir": str(tmp_path)}, "recover": spec, "data": {"max_length": 9}}
    )
    assert _made_from(experiment.model, experiment.data, experiment.recover, None).keys() == {
        *("holds", "model.hf_dir", "model.vision_dir", "model.dtype", "data.max_length", "recover.teacher_top_k"),
        *named("data", "template system truncate aspect_ratio min_tiles max_tiles thumbnail max_image_tokens"),
        *named("data", "video_fps video_frames video_tokens"),
        *named("recover", "compute_dtype losses.temperature losses.kl_positions"),
    }


def test_a_checkpoint_is_of_what_changes_the_numbers():
    recover = RecoverConfig(trainable="projector", steps=3)
    found = recover.identity()
    assert found.keys() == {f.name for f in dataclasses.fields(recover)} - {
        *("save_every", "keep_checkpoints", "log_every", "loggers", "merge_lora", "save_adapter"),
        *("method", "name", "control", "teacher_cache", "teacher_top_k"),
    }
    assert (found["lora"], found["epochs"], found["steps"]) == (None, None, 3)
    assert found["losses"].keys() == {*LOSSES, "teacher_top_k"}
