"""What a command checks and says before the first model call: files, sizes, memory, settings without effect."""

import itertools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from experiment_cases import record, write_experiment
from refusal import refused

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import STAGES as names_of_stages
from vlmprune_jax.base.settings import nested, override
from vlmprune_jax.core.prune.config import ScoreConfig
from vlmprune_jax.core.sections import ModelSpec
from vlmprune_jax.io.checkpoints.read import read_config
from vlmprune_jax.io.data import batching, inputs
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.run.cli.config_files import read_experiment, read_hyper, starting_point
from vlmprune_jax.run.cli.flags import parse
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.cli.stages import stage_command
from vlmprune_jax.run.evaluation.config import EvaluateSpec, SpeedConfig
from vlmprune_jax.run.evaluation.questions import arranged_questions
from vlmprune_jax.run.experiment.arguments import evaluation_sets
from vlmprune_jax.run.experiment.recipes import shipped_configs
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.stages import evaluate, pipeline
from vlmprune_jax.run.stages.stage import STAGES, Stage
from vlmprune_jax.run.stages.unused import unused_settings
from vlmprune_jax.run.sweep.hyper import sweep_runs
from vlmprune_jax.run.workdir.ledger import in_memory

LONG = "ab " * 100_000
WIDTH = {"prune.method": "width", "score.width": "l1"}
VOCABULARY, TRIMMED = "prune.vocabulary", {"prune.vocabulary.size": 300}


@pytest.fixture(scope="module")
def cfg(goldens):
    return read_config(goldens / "ckpt/llava_hf")[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory, goldens):
    """A teacher, images, six records of one image each, and two texts of which one is too long for the model."""
    root = tmp_path_factory.mktemp("preflight")
    shutil.copytree(goldens / "data/images", root / "images")
    write_experiment(
        root, goldens, [record(f"r{i}", f"img{i % 4}.png", "Is it?", "yes") for i in range(6)],
        data={"eval": f"{root}/records.json", "images": f"{root}/images"}, prune={"ratio": 0.2},
        score={"samples": 2, "batch_size": 2}, recover={"trainable": "projector", "batch_size": 2},
    )  # fmt: skip
    texts = [record("short", None, "What?", "Nothing."), record("long", None, LONG, "Yes.")]
    (root / "texts.json").write_text(json.dumps(texts))
    (root / "short.json").write_text(json.dumps(texts[:1]))
    (root / "none.json").write_text('[{"text": "a"}]')
    return root


@pytest.fixture
def run(root, tmp_path, capfd, monkeypatch):
    """Callable (flags, command) -> exit code and what was printed; a stage that begins is an error."""
    monkeypatch.setattr(pipeline, "run_task", None)
    monkeypatch.setattr(evaluate, "run_task", None)

    def call(*flags, command="run"):
        code = main([command, f"--config={root}/experiment.yaml", f"--workdir={tmp_path / 'w'}", *flags])
        out, err = capfd.readouterr()
        return code, out + err

    return call


def test_a_dry_run_says_what_will_be_done_and_stops(run, root, tmp_path, monkeypatch):
    def written(folder):
        folder.mkdir(parents=True)  # not in the workdir
        return {"train": root / "records.json", "test": root / "records.json", "images": root / "images"}

    monkeypatch.setattr("vlmprune_jax.run.demo.easyvqa.write_dataset", written)
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
    assert (code, "(6 questions)" in out) == (0, True)
    assert not (tmp_path / "w").exists()


def test_a_dry_run_reports_empty_answers_and_repeated_ids(run, root, tmp_path):
    """Such training records are kept; a question without an answer is refused, before the first model call."""
    records = json.loads((root / "records.json").read_text())
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
        ("data.train=None", "data.train is not set: use --config.data.train=FILE"),
        ("data.source=easyvqa", "data.train is set, but this config reads easyvqa: add"),
        ("data.train={root}/no.json", "no.json: no such file or folder"),
        ("data.train={root}/images", "data.train={root}/images: is a folder, expected a file of records: "),
        (
            f"{VOCABULARY}.size=400 {VOCABULARY}.sources=('{{root}}/images',)",
            f"{VOCABULARY}={{root}}/images: is a folder",
        ),
        ("data.eval={root}/no.json", "evaluate: data.eval is {root}/no.json: no such file or folder"),
        ("data.train={root}/none.json", "none.json, record 0: 'conversations' must be a non-empty list of"),
        ("data.images={root}/teacher", "img0.png does not exist: check the image root"),
        ("evaluate.text={root}/no.txt", "no.txt: no such file"),
        ("export.max_image_tokens=9", "export.max_image_tokens=9: every image of this model has"),
        ("export.push_to_hub=me/x", "export.push_to_hub=me/x: HF_HUB_OFFLINE is set: log in by"),
        ("prune.ratio=None prune.layers_removed=9", "prune: layers_removed=9 must be between"),
        ("prune.vocabulary.size=9999", "prune: prune.vocabulary.size=9,999 is more than the model's"),
        ("prune.ratio=0.99", "prune: ratio 0.99 cannot be reached by depth pruning of the text stack"),
    ],
)
def test_what_is_missing_is_told_before_the_first_model_call(run, root, tmp_path, flags, message):
    code, out = run(*[f"--config.{flag}".format(root=root) for flag in flags.split()])
    assert code == 2
    assert message.format(root=root) in out
    assert not (tmp_path / "w").exists()


def test_truncated_weights(run, root, tmp_path, capfd):
    """The line of `vlmprune inspect`."""
    shutil.copytree(root / "teacher", tmp_path / "teacher")
    shard = max((tmp_path / "teacher").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-64])
    assert main(["inspect", str(tmp_path / "teacher")]) == 2
    _, refusal = capfd.readouterr()
    assert f"{shard}: truncated: tensor " in refusal
    for command in ("run", "evaluate", "prune"):
        assert run("--dry_run", f"--config.model.hf_dir={tmp_path / 'teacher'}", command=command) == (2, refusal)


def test_an_image_that_cannot_be_read(run, root, tmp_path):
    shutil.copytree(root / "images", tmp_path / "images")
    (tmp_path / "images/img3.png").write_bytes(b"no image")
    only_text = ["--config.data.eval=None", f"--config.evaluate.text={root / 'records.json'}"]
    code, out = run(f"--config.data.images={tmp_path / 'images'}", *only_text)
    assert code == 2
    assert "data.train: " in out
    assert "img3.png (record r3): not a readable image" in out


def test_a_machine_that_is_too_small(run, monkeypatch):
    monkeypatch.setattr(pipeline, "free_memory", lambda: 2**10)
    code, out = run()
    assert code == 2
    assert 'per device in float32, but 0.0 GiB are free: set model.dtype="bfloat16", or use more devices' in out
    monkeypatch.undo()
    monkeypatch.setattr("vlmprune_jax.base.atomic.shutil.disk_usage", lambda path: SimpleNamespace(free=2**20))
    code, out = run("--dry_run")
    assert (code, "w/models: needs " in out) == (2, True)
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


# --- what records and settings ask for against what the model and the machine hold -----------------------------------


def data(root, **changes):
    texts = str(root / "texts.json")
    return DataSpec(**{"train": texts, "eval": texts, **changes})


def calibrated(root, cfg, samples, **changes):
    score = ScoreConfig(samples=samples)
    model = ModelSpec(hf_dir=str(root / "teacher"))
    return inputs.calibration_batches(model, data(root, **changes), score, cfg, seed=0)


def asked(root, cfg, spec, **changes):
    experiment = Experiment(data=data(root, **changes), evaluate=spec)
    questions = evaluation_sets(experiment.data, experiment.evaluate)["questions"]
    model = ModelSpec(hf_dir=str(root / "teacher"))
    return arranged_questions(model, experiment.data, spec, questions, cfg, multiple=1)


def test_a_record_that_is_too_long_for_the_model_is_named(root, cfg):
    said = rf"record long: has \d+ tokens with its images, more than the model's maximum of {cfg.longest_row}"
    refused(said, calibrated, root, cfg, 2)
    refused(said, asked, root, cfg, EvaluateSpec())
    (batch,) = calibrated(root, cfg, 1, on_error="skip")
    assert batch.record_ids == ("short",)
    cut = calibrated(root, cfg, 2, max_length=64)
    assert {batch.arrays["input_ids"].shape for batch in cut} == {(1, 64)}


def test_settings_that_are_too_large_for_the_model(root, cfg):
    most = rf" is more than 4 times the model.s max_position_embeddings \({cfg.text.max_positions}\): lower it"
    for change in ({"max_length": 10**8}, {"max_length": 10**8, "truncate": False}):
        refused(f"data.max_length=100000000{most}", calibrated, root, cfg, 2, **change)
    refused(f"the last of data.length_buckets=100000000{most}", calibrated, root, cfg, 2, length_buckets=(64, 10**8))
    refused(f"evaluate.max_length=100000000{most}", asked, root, cfg, EvaluateSpec(max_length=10**8))


@pytest.mark.parametrize(
    ("asked", "setting"),
    [("data.eval={root}/short.json", "max_new_tokens"), ("evaluate.text={root}/texts.json", "text_window")],
)
def test_answers_and_windows_that_are_too_large_for_the_model(root, tmp_path, capfd, asked, setting):
    flags = ["data.eval=None", asked.format(root=root), f"evaluate.{setting}=1000000000"]
    config = [f"--config={root}/experiment.yaml", f"--workdir={tmp_path / 'w'}"]
    assert main(["evaluate", *config, *[f"--config.{flag}" for flag in flags]]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert f"evaluate's {setting}=1000000000 is more than 4 times the" in line


def test_batches_that_do_not_fit_this_machine(root, cfg, monkeypatch):
    assert cfg.vision is not None
    sizes = {"SC_PHYS_PAGES": 25, "SC_PAGE_SIZE": 2**20}  # 25 MiB
    monkeypatch.setattr(batching.os, "sysconf", sizes.__getitem__)
    few = {"fraction": 1.0, "max_length": 64}
    assert calibrated(root, cfg, 2, **few, max_images=10)
    said = "batches of 1 rows of 64 tokens and 10000 images: 5 batches take .* more than this machine has: lower batch_"
    refused(said, calibrated, root, cfg, 2, **few, max_images=10000)
    arranged = asked(root, cfg, EvaluateSpec(), eval=str(root / "short.json"), max_images=10_000)
    refused("and 10000 images: ", arranged.batches, threads=1, prefetch=4)


def test_what_xla_cannot_allocate_is_one_line():
    said = r"^score: needs more memory than the device has \(RESOURCE_EXHAUSTED.*\): lower its batch_size"
    for error in (
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\n\nline\n"),
        MemoryError("RESOURCE_EXHAUSTED"),
    ):
        with pytest.raises(UserError, match=said), in_memory("score"):
            raise error
    with pytest.raises(jax.errors.JaxRuntimeError), in_memory("score"):
        raise jax.errors.JaxRuntimeError("INTERNAL: ours")


def test_a_long_text_is_tokenised_without_a_word(root, tmp_path, capfd):
    """transformers warns of texts that are longer than `model_max_length`."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((root / "teacher" / file).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"model_max_length": 32}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ids = load_tokenizer(tmp_path)(LONG)["input_ids"]
    assert np.asarray(ids).size > 100_000
    assert capfd.readouterr() == ("", "")


# --- settings that change nothing are named with the reason, and no others are ---------------------------------------


def unused(cfg, changes, sections=()):
    found = unused_settings([(override(Experiment(), nested(Experiment(), changes)), cfg)], sections)
    return sorted(name for names in found.values() for name in names)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"score.variant": "param_mix", "score.reference_compat": True}, "score.variant"),
        (WIDTH | {"score.image_weight": 0.1, "score.samples": 9, "score.seed": 1},
         "score.image_weight score.samples score.seed"),
        ({"prune.method": "width", "score.depth": "angular", "score.memory_budget": 9}, "score.depth"),
        ({"score.width": "l1", "score.options": {"candidates": 3}}, "score.options score.width"),
        (TRIMMED | {"prune.protect": (1,), "score.samples": 9}, "prune.protect score.samples"),
        ({"prune.ratio": 0.2, "prune.vocabulary.bits": False}, "prune.vocabulary.bits"),
        ({"prune.layers_removed": 1, "prune.rounding": "at_least"}, "prune.rounding"),
        (WIDTH | {"prune.heads": "keep", "prune.attn_layers": (1, 2), "prune.mlp_layers": (1, 2)}, "prune.attn_layers"),
        ({"prune.deepstack": "move", "prune.producers": "redirect"}, "prune.deepstack prune.producers"),
        ({"prune.budget.flops": 1e9, "prune.budget.context": 99, "prune.budget.batch": 2}, "prune.budget.batch"),
        ({"prune.budget.step_ms": 9, "prune.budget.slice": "v5e:2x4", "prune.budget.images": 2}, ""),
        ({"reconstruct.samples": 9, "reconstruct.refit": True}, "reconstruct.refit reconstruct.samples"),
        ({"reconstruct.samples": 9, "export.quantize": "w8a16", "export.rounding": "gptq"}, ""),
        ({"recover.steps": 3, "recover.epochs": 2.0, "data.seed": 1}, "data.seed recover.epochs"),
        ({"recover.trainable": "decoder", "recover.lora.rank": 4}, "recover.lora.rank"),
        ({"recover.losses.ce": 0.0, "recover.losses.l2": 1.0, "recover.losses.chunk": 9, "recover.control": False},
         "recover.control recover.losses.chunk"),
        ({"recover.method": "none", "evaluate.unrecovered": False}, "evaluate.unrecovered"),
        ({"recover.teacher_cache": "t", "recover.teacher_top_k": 9}, "recover.teacher_cache recover.teacher_top_k"),
        ({"recover.losses.kl": 1.0, "recover.losses.temperature": 3.0, "recover.teacher_top_k": 9},
         "recover.teacher_top_k"),
        ({"recover.losses.l2_layers": (1,), "recover.losses.temperature": 3.0, "recover.losses.teacher_inputs": "own"},
         "recover.losses.l2_layers recover.losses.teacher_inputs recover.losses.temperature"),
        ({"recover.method": "none", "recover.teacher_cache": "t", "data.fraction": 0.1},
         "data.fraction recover.teacher_cache"),
        ({"prune.layers": (1,), "prune.rounding": "at_least", "score.samples": 9}, "prune.rounding score.samples"),
        ({"prune.method": "none", "prune.ratio": 0.3, "reconstruct.method": "least_squares"},
         "prune.ratio reconstruct.method"),
        ({"evaluate.text_window": 99}, "evaluate.text_window"),
        ({"evaluate.sets": {"a": {"data": "a.json", "metric": "pope"}}, "data.eval": "b", "evaluate.metric": "mme",
          "evaluate.max_length": 9}, "data.eval evaluate.metric"),
        ({"evaluate.sets": {"a": {"text": "a.txt"}}, "data.eval": "b", "evaluate.text_window": 99}, "data.eval"),
        ({"model.vision_dir": "tower", "data.aspect_ratio": "square"}, "model.vision_dir"),
        ({"export.format": "gguf", "export.rolled_positions": True, "speed.batch_size": 2}, "speed.batch_size"),
        ({"recover_variants": {"a": {"recover": {"steps": 3}}, "b": {"recover": {"epochs": 2.0}}}}, ""),
        ({"recover_variants": {"a": {"recover": {"steps": 3, "epochs": 2.0}}, "b": {"recover": {"steps": 1}}}},
         "recover.epochs"),
    ],
)  # fmt: skip
def test_settings_without_effect(cfg, changes, names):
    assert unused(cfg, changes) == names.split()


def test_a_decoder_takes_no_images(cfg):
    decoder = replace(cfg, vision=None, projector=None, family="llama", layout="transformers")
    changes = {"data.max_image_tokens": 9, "data.max_length": 9, "speed.image": False}
    changes |= {"recover.projector_learning_rate": 1e-3}
    assert unused(decoder, changes) == ["data.max_image_tokens", "recover.projector_learning_rate", "speed.image"]
    assert unused(decoder, changes, ("recover",)) == ["recover.projector_learning_rate"]


def test_a_stage_of_the_users_own_may_use_any_setting_of_its_sections(cfg, monkeypatch):
    changes = {"recover.steps": 3, "recover.epochs": 2.0, "data.seed": 1}
    monkeypatch.setitem(
        STAGES, "average", Stage(help="Average weights.", run=lambda work, recover: None, sections=("recover",))
    )
    assert unused(cfg, changes) == ["data.seed"]
    assert unused(cfg, changes, ("recover",)) == []


def test_every_stage_is_declared():
    assert set(names_of_stages) - {"teacher_cache"} == set(STAGES)


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_shipped_configs_print_no_note_on_their_own_settings(goldens, cfg, name):
    """Not even if a user's settings or --only leave some of them without effect."""
    variants = {"demo": ("", ":full", ":quick"), "demo_reconstruct": ("", ":tower")}
    variants |= dict.fromkeys(
        ("sweeps/image_tokens", "sweeps/study_vlm", "sweeps/study_vlm_text"), (f":{goldens / 'ckpt/llava_hf'}",)
    )
    for variant in variants.get(name, ("",)):
        flags = parse("run", stage_command("run"), [f"--config={name}{variant}", "--workdir=w"])
        start, whole = starting_point(flags), read_experiment(flags.config)
        if name.startswith("sweeps/"):
            runs = [run.experiment for run in sweep_runs(whole, read_hyper(flags.config_file))]
            assert unused_settings([(run, cfg) for run in runs], start=start) == {}
            continue
        assert unused_settings([(whole, cfg)]) == {}
        runs = [read_experiment(flags.config, only=only) for only in whole.prune_variants]
        runs.append(replace(whole, recover=replace(whole.recover, method="none"), speed=SpeedConfig()))
        for run in runs:
            assert unused_settings([(run, cfg)], start=start) == {}


def test_settings_that_a_config_file_took_over_are_not_the_users(tmp_path, cfg):
    file, body = tmp_path / "mine.py", "config = shipped_config('demo')\n    config.recover.lora.rank = 9"
    file.write_text(
        "from vlmprune_jax.run.cli.config_files import shipped_config\n\n\n"
        f"def get_config():\n    {body}\n    return config\n"
    )
    argv = [f"--config={file}", "--workdir=w", "--config.speed.rounds=0", "--config.speed.new_tokens=7"]
    flags = parse("run", stage_command("run"), argv)
    unused = unused_settings([(read_experiment(flags.config), cfg)], start=starting_point(flags))
    assert sorted(itertools.chain(*unused.values())) == ["recover.lora.rank", "speed.new_tokens"]
