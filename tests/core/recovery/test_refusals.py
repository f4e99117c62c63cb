"""What recovery refuses: settings, losses, terms, rules and adapters that cannot be, and input that does not fit."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import pytest
import recover_cases as cases
from experiment_cases import record, write_experiment
from hf_cases import edit_weights
from refusal import refused

import vlmprune_jax as vp
from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.core.models.params import param_shapes
from vlmprune_jax.core.recovery.config import LossConfig
from vlmprune_jax.core.recovery.loop import recover
from vlmprune_jax.core.recovery.terms import check_losses
from vlmprune_jax.core.recovery.trainable import add_lora, assign_groups
from vlmprune_jax.core.sections import LoraConfig
from vlmprune_jax.run.cli.main import main

CFG, DECODER = cases.config(), cases.config(vision=False)  # the decoder has no projector
INF, NAN = float("inf"), float("nan")


settings = cases.settings


def losses(**changes):
    check_losses(LossConfig(**changes))


def term(**values):
    vp.LossTerm(**{"value": jnp.sum, "needs": ("logits",), "counts": "positions", **values})


def rules(trainable, cfg=CFG):
    assign_groups(list(param_shapes(cfg)), trainable)


@pytest.mark.parametrize(
    ("call", "values", "fact"),
    [
        (settings, {"learning_rate": 0.0}, "recover.learning_rate=0.0 must be above 0"),
        (settings, {"projector_learning_rate": -1.0}, "recover.projector_learning_rate=-1.0 must be above 0"),
        (settings, {"schedule": "cosin"}, "is not one of cosine, linear, constant; did you mean 'cosine'"),
        (settings, {"warmup_ratio": 1.0}, "warmup_ratio=1.0 must be at least 0 and below 1"),
        (settings, {"weight_decay": -0.1}, "weight_decay=-0.1 must be at least 0"),
        (settings, {"b2": 1.0}, "b2=1.0 must be at least 0 and below 1"),
        (settings, {"clip_norm": 0.0}, "clip_norm=0.0 must be above 0"),
        (settings, {"batch_size": 0}, "recover.batch_size=0 must be at least 1"),
        (settings, {"batch_size": 6, "accumulation": 4}, "multiple of recover.accumulation=4"),
        (settings, {"steps": 0}, "steps=0 must be at least 1"),
        (settings, {"epochs": 0.0}, "epochs=0.0 must be above 0"),
        (settings, {"remat": "ful"}, "'ful' is not one of none, dots, full; did you mean 'full'"),
        (settings, {"compute_dtype": "float16"}, "'float16' is not one of float32, bfloat16"),
        (settings, {"save_every": -1}, "save_every=-1 must be at least 0"),
        (settings, {"log_every": 0}, "log_every=0 must be at least 1"),
        (settings, {"trainable": "lorra"}, "'lorra' is not one of projector, .*, tower, all; did you mean 'lora'"),
        (settings, {"trainable": "lora", "quantize": "w4a16"}, 'quantize="w4a16" rounds .* recover.trainable to'),
        (losses, {"cosine": 1.0, "l2_layers": ()}, "cosine needs l2_layers"),
        (losses, {"ce": 0.0}, "set at least one above 0"),
        (losses, {"l2": -0.5}, "recover.losses.l2=-0.5 must be at least 0"),
        (losses, {"l2": INF}, "recover.losses.l2=inf must be at least 0"),
        (losses, {"temperature": 0.0}, "recover.losses.temperature=0.0 must be above 0"),
        (losses, {"l2": 1.0, "cosine": 0.5, "l2_layers": ()}, "l2 and cosine needs l2_layers"),
        (losses, {"extra": {"jsd": 1.0}}, "extra has no term 'jsd'"),
        (losses, {"extra": {"kl": 1.0}}, "kl is a built-in term: set recover.losses.kl instead"),
        (losses, {"extra": {"jsd": -1.0}}, "recover.losses.extra={'jsd': -1.0} must be at least 0"),
        (losses, {"teacher_inputs": "students"}, "'students' is not one of student, own; did you mean 'student'"),
        (term, {"needs": ("logit",)}, "needs 'logit' is not one of logits, .*; did you mean 'logits'"),
        (term, {"needs": ()}, "must list names of"),
        (term, {"needs": ("logits", "hidden")}, "must list names of"),
        (term, {"counts": "tokens"}, "counts 'tokens' is not one of labels, positions"),
        (term, {"needs": ("hidden",), "counts": "labels"}, "counts 'labels' is not one of tokens, features"),
        (term, {"needs": ("logits", "teacher_logits"), "reported": True}, "reported=True is not allowed"),
        (rules, {"trainable": "projektor"}, "did you mean 'projector'"),
        (rules, {"trainable": [("text/layers/.*/q_prj", True)]}, "matches no parameter .*full path; similar"),
        (rules, {"trainable": [("text/norm/weight", False)]}, "selects no parameter of this model"),
        (rules, {"trainable": [("text/(norm", True)]}, "not a regular expression"),
        (rules, {"trainable": [("text/.*", "decoder")]}, "one of main, projector"),
        (rules, {"trainable": []}, "empty: use"),
        *((rules, {"cfg": DECODER, "trainable": name}, "selects no") for name in ("projector", "lora", "tower")),
    ],
)
def test_settings(call, values, fact):
    refused(fact, call, **values)


def test_adapters():
    def add(model, *targets, alpha=8.0):
        return add_lora(model, LoraConfig(4, alpha, 0.0, targets), jax.random.key(0))

    refused(r"qproj is not a projection .* use down_proj, ", add, cases.model(CFG), "q_proj", "qproj")
    refused("merge them first", add, add(cases.model(CFG), "q_proj"), "q_proj")
    refused("recover.lora.alpha=0.0 must be above 0", add, cases.model(CFG), "q_proj", alpha=0.0)


def test_settings_that_do_not_fit_the_model():
    """All but the last two are refused before a weight is looked at."""
    original = cases.model(CFG)

    def train(stream=None, mesh=None, teacher=None, **settings):
        return recover(original, stream or cases.Stream(CFG), cases.settings(**settings), mesh=mesh, teacher=teacher)

    def teacher(cfg=CFG, **sizes):
        return original.replace(cfg=dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, **sizes)))

    l2, larger, own = LossConfig(l2=1.0), teacher(vocab_size=72), LossConfig(l2=1.0, teacher_inputs="own")
    refused("l2 needs a teacher", train, losses=l2)
    refused("hidden_size 8 differs from the student's 16", train, losses=l2, teacher=teacher(hidden_size=8))
    for losses in (LossConfig(kl=1.0), LossConfig(rkl=1.0), LossConfig(cosine=1.0, teacher_inputs="own")):
        refused("vocab_size 72 differs from the student's 64", train, losses=losses, teacher=larger)
    marked = teacher(dataclasses.replace(CFG, image_token_id=61))
    refused("image_token_id 61 differs from the student's 62", train, losses=own, teacher=marked)
    refused(r"micro-batch of 4 rows .* mesh.data x mesh.fsdp = 8", train, accumulation=2, mesh=make_mesh(8, 1, 1))
    refused("does not divide", train, mesh=make_mesh(1, 1, 8))
    refused("no term 'klx'; did you mean 'kl'", train, losses=LossConfig(extra={"klx": 1.0}))
    refused("pass num_steps", train, steps=None, epochs=2.5)
    refused("has 8 rows, expected 16", train, batch_size=16, trainable="projector")
    refused("ended after 2 steps", train, cases.Stream(CFG, end=2), trainable="projector")


# --- by the command: one line that says what, where and what to do, and nothing is made -------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory, goldens):
    """A folder with a teacher, four records, a config, and w/ with scores.npz, plan.json and pruned/."""
    root = tmp_path_factory.mktemp("experiment")
    records = [record(f"r{i}", f"img{i}.png", "A dog?", "yes") for i in range(4)]
    recover = {"trainable": "projector", "batch_size": 2, "steps": 3, "save_every": 1, "compute_dtype": "float32"}
    sections = {"score": {"samples": 2}, "prune": {"layers_removed": 2}, "recover": {"control": False, **recover}}
    write_experiment(root, goldens, records, recipe="llava", data={"max_length": 256}, **sections)
    assert run(root, "score") == run(root, "prune") == 0
    return root


def run(root, command, *settings):
    return main([command, f"--config={root / 'experiment.yaml'}", f"--workdir={root / 'w'}", *settings])


def refused_by_recover(root, capsys, *settings):
    """The one line that `vlmprune recover` ends with, having made nothing."""
    assert run(root, "recover", *(f"--config.{setting}" for setting in settings)) == 2
    said = capsys.readouterr().err
    assert said.startswith("vlmprune: error: ")
    assert said.count("\n") == 1
    assert not (root / "w/recovered").exists()
    return said


def test_no_usable_record(root, capsys):
    said = refused_by_recover(root, capsys, "data.on_error=skip", f"data.images={root}")
    assert "none of the 4 records is usable (the first: " in said
    assert "img0.png does not exist" in said


def test_another_teacher(root, capsys):
    """Of the same sizes, which would train without complaint."""
    other = root / "other"
    shutil.copytree(root / "teacher", other)
    for file in other.glob("*.safetensors"):
        edit_weights(other, lambda all_: {key: value + 1 for key, value in all_.items()}, file.name)
    losses = ["recover.losses.l2=0.0", "recover.losses.kl=0.5", "recover.losses.teacher_inputs=own"]
    for settings in ([], [*losses, f"recover.teacher_cache={root / 'cache'}"]):
        said = refused_by_recover(root, capsys, f"model.hf_dir={other}", *settings)
        assert "plan of another model: sizes are equal, but fingerprints differ" in said
    assert not (root / "cache").exists()
