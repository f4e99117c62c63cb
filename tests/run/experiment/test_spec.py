"""Settings as they are declared: bounds and choices, what a stage's ledger holds, the page and the help."""

import dataclasses
import importlib.util

import pytest
from refusal import refused
from repository import ROOT

from vlmprune_jax.base.console import make_reporter
from vlmprune_jax.base.settings import STAGES, override, settings_of
from vlmprune_jax.core.models.stack import REMAT_POLICIES
from vlmprune_jax.core.recovery.config import REMAT, LossConfig, RecoverConfig
from vlmprune_jax.core.recovery.losses import losses
from vlmprune_jax.run.experiment.arguments import recover_config
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


def test_one_set_of_defaults():
    """Those of the library and of a config."""
    assert recover_config(Experiment().recover) == RecoverConfig()
    assert LossConfig().weights().keys() == losses.keys()
    assert hash(RecoverConfig(losses=LossConfig(extra={"mine": 1.0}))) != hash(RecoverConfig())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"export": {"layout": "hf"}}, "export.layout 'hf' is not one of source, transformers"),
        ({"score": {"gqa": "group"}}, "score.gqa 'group' is not one of groups, q_heads; did you mean 'groups'"),
        ({"data": {"template": "buny"}}, "data.template 'buny' is not one of auto, .*; did you mean 'bunny'"),
        ({"prune_variants": {"a": {"prune": {"rounding": "up"}}}}, "prune.rounding 'up' is not one of nearest"),
        ({"recover_variants": {"a": {"recover": {"losses": {"extra": {"k": 1}}}}}}, "extra has no term 'k'"),
    ],
)
def test_a_command_refuses_at_its_start(values, message):
    refused(message, lambda: check_experiment(override(Experiment(), values)))


# --- what a stage's ledger holds --------------------------------------------------------------------------------------


def named(section: str, names: str) -> set[str]:
    return {f"{section}.{name}" for name in names.split()}


PRECISION = {"model.dtype"}
PICTURE = named(
    "data",
    "template system max_images aspect_ratio min_tiles max_tiles thumbnail max_image_tokens image_buckets tile_buckets "
    "video_fps video_frames video_tokens",
)
TRAINING = PICTURE | named("data", "max_length truncate length_buckets on_error")
SCORE = named(
    "score",
    "variant reduction gqa reference_compat layers_removed longest_text samples batch_size seed prompt_weight "
    "image_weight answer_weight by_token_type token_types",
)
PRUNE = named(
    "prune",
    "method stack ratio layers_removed layers protect deepstack rounding attn_layers mlp_layers heads_multiple "
    "neurons_multiple heads align_to tensor_parallel selection loads_in sparsity depth_share steps budget producers "
    "vocabulary experts experts_multiple",
)
RECOVER = named(
    "recover",
    "trainable epochs steps batch_size accumulation learning_rate projector_learning_rate weight_decay schedule "
    "warmup_ratio b1 b2 eps clip_norm compute_dtype quantize remat lora save_adapter losses teacher_top_k seed",
)
RECONSTRUCT = named(
    "reconstruct",
    "method readers refit samples batch_size longest_text seed held_out prompt_weight image_weight answer_weight",
)
# Stage -> the settings that it keeps: what is not here may be changed without making anything again.
EXPECTED = {
    "score": PRECISION | TRAINING | SCORE | {"criteria"},
    "prune": PRECISION | PRUNE,
    "prune in steps": PRECISION | PRUNE | TRAINING | SCORE | named("score", "depth width"),
    "reconstruct": PRECISION | TRAINING | RECONSTRUCT,
    "recover": PRECISION | TRAINING | RECOVER | named("data", "fraction seed group_by"),
    "evaluate": PRECISION | PICTURE | named("evaluate", "batch_size max_length max_new_tokens questions prompt_suffix"),
    "export": PRECISION
    | named(
        "export",
        "format layout uneven head_dim dtype quantize group_size symmetric rounding rolled_positions imatrix mtp "
        "evaluate",
    )
    | named("export", "base_model license push_to_hub max_image_tokens")
    | named("data", "max_image_tokens"),
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
        place = {"stage": stage, "start": tmp_path / "pruned"} | (
            {"subject": "pruned", "part": "questions"} if stage == "evaluate" else {}
        )
        return Work.at(tmp_path, experiment, make_reporter(False), **place).task.settings

    return of


def shipped(name: str) -> Experiment:
    spec = importlib.util.spec_from_file_location("config", ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return override(Experiment(), module.get_config().to_dict())


@pytest.mark.parametrize("name", ["demo", "llava15_7b", "mini_internvl_4b"])
def test_each_stage_keeps_what_changes_it(kept, name):
    experiment = shipped(name)
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
        declared -= {
            "recover.losses.extra",
            "score.options",
            "export.options",
            "evaluate.text_window",
        }  # empty, or of a text
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
    config = RecoverConfig(trainable="projector", steps=3)
    found = config.identity()
    assert found.keys() == {f.name for f in dataclasses.fields(config)} - {
        *("save_every", "keep_checkpoints", "log_every", "loggers", "merge_lora", "save_adapter"),
        *("method", "name", "control", "teacher_cache", "teacher_top_k"),
    }
    assert (found["lora"], found["epochs"], found["steps"]) == (None, None, 3)
    assert found["losses"].keys() == {*LOSSES, "teacher_top_k"}


# --- the help --------------------------------------------------------------------------------------------------------
