"""What a command checks and says before the first model call."""

import json
import shutil
from types import SimpleNamespace

import pytest
from experiment_cases import record, write_experiment

from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.stages import evaluate, pipeline


@pytest.fixture
def run(goldens, tmp_path, capsys, monkeypatch):
    """Callable (flags, command) -> exit code and what was printed; a stage that begins is an error."""
    shutil.copytree(goldens / "data/images", tmp_path / "images")
    config = write_experiment(
        tmp_path, goldens, [record(f"r{i}", f"img{i % 4}.png", "Is it?", "yes") for i in range(6)],
        data={"eval": f"{tmp_path}/records.json", "images": f"{tmp_path}/images"}, prune={"ratio": 0.2},
        score={"samples": 2, "batch_size": 2}, recover={"trainable": "projector", "batch_size": 2},
    )  # fmt: skip
    monkeypatch.setattr(pipeline, "run_task", None)
    monkeypatch.setattr(evaluate, "run_task", None)

    def call(*flags, command="run"):
        code = main([command, config, f"--workdir={tmp_path / 'w'}", *flags])
        out, err = capsys.readouterr()
        return code, out + err

    return call


def test_a_dry_run_says_what_will_be_done_and_stops(run, tmp_path):
    code, out = run("--dry_run", "--config.score.samples=64", "--config.mesh.data=8", "--config.recover.batch_size=8")
    assert code == 2  # six records do not fill a batch of eight rows
    assert "6 training records in 1 epochs fill no batch of 8 rows" in out
    idle = ["--config.recover.lora.rank=4", "--config.recover.lora.alpha=8"]
    code, out = run("--dry_run", "--config.score.samples=64", "--config.data.fraction=0.7", *idle)
    assert code == 0, out
    first, *lines = out.splitlines()
    assert first.startswith("  cpu: ")
    assert first.endswith(" MiB in float32")
    assert lines == [
        "  evaluate teacher and every model: questions (6 questions)",
        "  score: 6 of 6 records (score.samples=64 is more than there are)",
        "  prune",
        "  recover: 4 of 6 records, 2 steps of 2 rows (few steps: raise recover.epochs or data.fraction, which is 0.7)",
        "  control/recover: 4 of 6 records, 2 steps of 2 rows (the unpruned model, for comparison: "
        "recover.control=False leaves it out)",
        "  export as huggingface, reloaded and compared in torch",
        "  no effect: recover.lora.rank, recover.lora.alpha, because recover.trainable='projector' trains no adapters",
    ]
    assert not (tmp_path / "w").exists()
    code, out = run("--dry_run", *idle, command="prune")
    assert (code, out.splitlines()[1:]) == (0, ["  prune"])
    demo = ["--config.data.source=easyvqa", "--config.data.train=None", "--config.data.eval=None"]
    code, out = run("--dry_run", *demo, "--config.data.images=None", command="evaluate")
    assert (code, " questions)" in out) == (0, True)
    assert not (tmp_path / "w").exists()


def test_a_dry_run_reports_empty_answers_and_repeated_ids(run, tmp_path):
    """Such training records are kept; a question without an answer is refused, before the first model call."""
    records = json.loads((tmp_path / "records.json").read_text())
    for one, text in ((records[1], " "), (records[4], "")):
        one["conversations"][1]["value"] = text
    records[3]["id"] = records[5]["id"] = "r2"
    (tmp_path / "odd.json").write_text(json.dumps(records))
    code, out = run("--dry_run", f"--config.data.train={tmp_path / 'odd.json'}")
    assert code == 0, out
    assert "data.train: 2 of the records have an empty answer (first: r1); all are kept\n" in out
    assert "data.train: 1 of the ids belong to several records (first: r2); all are kept\n" in out
    code, out = run("--dry_run", f"--config.data.eval={tmp_path / 'odd.json'}")
    assert (code, "record r1: has no reference answer" in out) == (2, True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.data.train=None"], "data.train is not set: use --config.data.train=FILE"),
        (["--config.data.source=easyvqa"], "data.train is set, but this config reads easyvqa: add"),
        (["--config.data.train={root}/no.json"], "no.json: no such file or folder"),
        (["--config.data.train={root}/images"], "data.train={root}/images: is a folder, expected a file of records: "),
        (
            ["--config.prune.vocabulary.size=400", "--config.prune.vocabulary.sources=('{root}/images',)"],
            "prune.vocabulary={root}/images: is a folder, expected a file of records",
        ),
        (["--config.data.eval={root}/no.json"], "evaluate: data.eval is {root}/no.json: no such file or folder"),
        (["--config.data.train={root}/text.json"], "text.json, record 0: 'conversations' must be a non-empty list of"),
        (["--config.data.images={root}/teacher"], "img0.png does not exist: check the image root"),
        (["--config.evaluate.text={root}/no.txt"], "no.txt: no such file"),
        (["--config.export.max_image_tokens=9"], "export.max_image_tokens=9: every image of this model has"),
        (["--config.export.push_to_hub=me/x"], "export.push_to_hub=me/x: HF_HUB_OFFLINE is set: log in by"),
        (["--config.prune.ratio=None", "--config.prune.layers_removed=9"], "prune: layers_removed=9 must be between"),
        (["--config.prune.vocabulary.size=9999"], "prune: prune.vocabulary.size=9,999 is more than the model's"),
        (["--config.prune.ratio=0.99"], "prune: ratio 0.99 cannot be reached by depth pruning of the text stack"),
    ],
)
def test_what_is_missing_is_told_before_the_first_model_call(run, tmp_path, flags, message):
    (tmp_path / "text.json").write_text('[{"text": "a"}]')
    code, out = run(*[flag.format(root=tmp_path) for flag in flags])
    assert code == 2
    assert message.format(root=tmp_path) in out
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("command", ["run", "evaluate", "prune"])
def test_truncated_weights(run, tmp_path, capsys, command):
    """The line of `vlmprune inspect`."""
    shard = max((tmp_path / "teacher").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-64])
    assert main(["inspect", str(tmp_path / "teacher")]) == 2
    _, refusal = capsys.readouterr()
    assert f"{shard}: truncated: tensor " in refusal
    assert run("--dry_run", command=command) == (2, refusal)


def test_an_image_that_cannot_be_read(run, tmp_path):
    (tmp_path / "images/img3.png").write_bytes(b"no image")
    code, out = run("--config.data.eval=None", f"--config.evaluate.text={tmp_path / 'records.json'}")
    assert code == 2
    assert "data.train: " in out
    assert "img3.png (record r3): not a readable image" in out


def test_a_machine_that_is_too_small(run, monkeypatch):
    monkeypatch.setattr(pipeline, "free_memory", lambda: 2**10)
    code, out = run()
    assert code == 2
    assert 'per device in float32, but 0.0 GiB are free: set model.dtype="bfloat16", or use more devices' in out
    monkeypatch.undo()
    usage = type("Usage", (), {"free": 2**20})
    monkeypatch.setattr("vlmprune_jax.base.atomic.shutil.disk_usage", lambda path: usage)
    code, out = run("--dry_run")
    assert code == 2
    assert "w/models: needs " in out
    assert " MiB but only 1 MiB are free: make room or choose another disk" in out


def test_a_disk_that_fills_up_meanwhile(run, monkeypatch):
    """Space is checked again before every stage, and not only at the start."""
    usage, begun = SimpleNamespace(free=2**40), []
    monkeypatch.setattr("vlmprune_jax.base.atomic.shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr(pipeline, "evaluate_model", lambda *_: {})

    def run_task(task, **options):
        begun.append(task.name)
        usage.free = 2**20

    monkeypatch.setattr(pipeline, "run_task", run_task)
    code, out = run()
    assert (code, begun) == (2, ["score"])
    assert out.endswith(" MiB but only 1 MiB are free: make room or choose another disk\n")
