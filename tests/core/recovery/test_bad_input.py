"""`vlmprune recover` on wrong settings, data, meshes and checkpoints: one line that says what, where and what to do."""

import json
import shutil

import pytest
from hf_cases import copy_llava, edit_weights

from vlmprune_jax.core.recovery.metrics import Recorder
from vlmprune_jax.run.cli.main import main

CONFIG = """
from vlmprune_jax.run.cli.config_files import experiment_config

def get_config():
    config = experiment_config(recipe="llava")
    config.model.hf_dir = "{root}/teacher"
    config.data.train = "{root}/records.json"
    config.data.images = "{images}"
    config.data.system = ""
    config.data.max_length = 256
    config.score.samples = 2
    config.prune.layers_removed = 2
    config.recover.control = False
    config.recover.trainable = "projector"
    config.recover.batch_size = 2
    config.recover.steps = 3
    config.recover.save_every = 1
    config.recover.compute_dtype = "float32"
    return config
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory, goldens):
    """A folder with a teacher, four records, an experiment.py, and w/ with scores.npz, plan.json and pruned/."""
    root = tmp_path_factory.mktemp("experiment")
    copy_llava(goldens, root / "teacher")
    turns = [{"from": "human", "value": "<image>\nA dog?"}, {"from": "gpt", "value": "yes"}]
    records = [{"id": f"r{i}", "image": f"img{i}.png", "conversations": turns} for i in range(4)]
    (root / "records.json").write_text(json.dumps(records))
    (root / "empty.json").write_text("[]")
    (root / "experiment.py").write_text(CONFIG.format(root=root, images=goldens / "data/images"))
    assert run(root, "score") == run(root, "prune") == 0
    return root


def run(root, command, *settings):
    return main([command, f"--config={root / 'experiment.py'}", f"--workdir={root / 'w'}", *settings])


def refused(root, capsys, *settings):
    """The one line that `vlmprune recover` ends with, having made nothing."""
    assert run(root, "recover", *(f"--config.{setting}" for setting in settings)) == 2
    said = capsys.readouterr().err
    assert said.startswith("vlmprune: error: ")
    assert said.count("\n") == 1
    assert not (root / "w/recovered").exists()
    return said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["recover.losses.rlk=0.1"], "config.recover.losses has no setting 'rlk'; did you mean 'rkl'?"),
        (
            ["recover.trainable=lorra"],
            "recover.trainable 'lorra' is not one of projector, lora, routers, decoder, tower, all; did you mean "
            "'lora'?",
        ),
        (
            ["recover.save_adapter=True"],
            "recover.trainable='projector' trains no adapter: set it to \"lora\", or leave",
        ),
        (["recover.schedule=cosin"], "schedule 'cosin' is not one of cosine, linear, constant; did you mean 'cosine'?"),
        (["recover.remat=ful"], "remat 'ful' is not one of none, dots, full; did you mean 'full'?"),
        (["recover.compute_dtype=bfloat"], "did you mean 'bfloat16'?"),
        (["recover.losses.teacher_inputs=students"], "did you mean 'student'?"),
        (["recover.trainable=lora", "recover.lora.targets=('q_prj',)"], "q_prj is not a projection"),
        (["recover.losses.ce=0", "recover.losses.l2=0"], "set at least one above 0"),
        (["recover.losses.ce=nan"], "recover.losses.ce=nan must be at least 0"),
        (["recover.losses.temperature=nan"], "recover.losses.temperature=nan must be above 0"),
        (["recover.weight_decay=nan"], "weight_decay=nan must be at least 0"),
        (["recover.clip_norm=nan"], "clip_norm=nan must be above 0"),
        (["recover.batch_size=0"], "recover.batch_size=0 must be at least 1"),
        (["recover.trainable=lora", "recover.lora.alpha=0"], "recover.lora.alpha=0.0 must be above 0"),
        (["recover.losses.l2_layers=(9,)"], "l2_layers: 9 is outside the student's 5 hidden states"),
        (["mesh.data=3"], "needs 3 devices but there are 8"),
        (
            ["mesh.tensor=8", "recover.batch_size=8"],
            "= 4; q_heads of vision layer 1 = 4 …: use data=2 fsdp=1 tensor=4 or prune to widths",
        ),
        (["mesh.data=8"], "2 rows (batch_size / accumulation) must be a multiple of mesh.data x mesh.fsdp = 8 devices"),
        (["data.fraction=0"], "data.fraction=0.0 must be above 0 and at most 1"),
        (["data.train={root}/empty.json"], "empty.json: contains no records: check that it is a list"),
        (["data.max_length=10"], "beyond the maximum length 10: raise"),
        (
            ["data.max_length=10", "data.truncate=False"],
            "tokens with its images, more than the maximum length 10: raise data.max_length",
        ),
    ],
    ids=lambda value: value[0].split("=")[0] if isinstance(value, list) else "",
)
def test_wrong_settings(root, capsys, settings, message):
    said = refused(root, capsys, *(setting.format(root=root) for setting in settings))
    assert message in said
    assert "record r" in said or "max_length" not in said


def test_checkpoint_of_another_config(root, capsys, monkeypatch):
    step = Recorder.step

    def killed(self, number, *args):
        if number == 3:
            raise KeyboardInterrupt
        step(self, number, *args)

    monkeypatch.setattr(Recorder, "step", killed)
    assert run(root, "recover") == 130
    monkeypatch.undo()
    capsys.readouterr()
    said = refused(root, capsys, "recover.weight_decay=0.1", "recover.losses.cosine=0.5")
    assert "w/training/checkpoints was made from other inputs" in said
    assert "recover.losses.cosine was 0.0, now 0.5; recover.weight_decay was 0.0, now 0.1" in said
    assert "add --overwrite to replace it, or use another --workdir" in said
    shutil.rmtree(root / "w/training")


def test_another_teacher(root, capsys):
    """Of the same sizes, which would train without complaint."""
    other = root / "other"
    shutil.copytree(root / "teacher", other)
    for file in other.glob("*.safetensors"):
        edit_weights(other, lambda all_: {key: value + 1 for key, value in all_.items()}, file.name)
    losses = ["recover.losses.l2=0.0", "recover.losses.kl=0.5", "recover.losses.teacher_inputs=own"]
    for settings in ([], [*losses, f"recover.teacher_cache={root / 'cache'}"]):
        said = refused(root, capsys, f"model.hf_dir={other}", *settings)
        assert "plan of another model: sizes are equal, but fingerprints differ" in said
    assert not (root / "cache").exists()
