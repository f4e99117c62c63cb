"""What records and settings ask for is compared with what the model and the machine hold before memory is taken."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hf_cases import copy_llava
from refusal import refused

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.prune.config import ScoreConfig
from vlmprune_jax.core.sections import ModelSpec
from vlmprune_jax.io.checkpoints.read import read_config
from vlmprune_jax.io.data import batching, inputs
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.evaluation.config import EvaluateSpec
from vlmprune_jax.run.evaluation.questions import arranged_questions
from vlmprune_jax.run.experiment.arguments import evaluation_sets
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.workdir.ledger import in_memory

LONG = "ab " * 100_000
TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Nothing."}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, goldens: Path) -> Path:
    folder = tmp_path_factory.mktemp("limits")
    copy_llava(goldens, folder / "teacher")
    long = [{"from": "human", "value": LONG}, {"from": "gpt", "value": "Yes."}]
    entries = [{"id": "short", "conversations": TURNS}, {"id": "long", "conversations": long}]
    (folder / "records.json").write_text(json.dumps(entries))
    (folder / "text.txt").write_text("The car is red. " * 20)
    return folder


@pytest.fixture(scope="module")
def cfg(folder: Path) -> ModelConfig:
    return read_config(folder / "teacher", None)[1]


def data(folder: Path, **changes: Any) -> DataSpec:
    return DataSpec(train=str(folder / "records.json"), eval=str(folder / "records.json"), **changes)


def calibrated(folder: Path, cfg: ModelConfig, samples: int, **changes: Any) -> list[batching.Batch]:
    score = ScoreConfig(samples=samples)
    model = ModelSpec(hf_dir=str(folder / "teacher"))
    return inputs.calibration_batches(model, data(folder, **changes), score, cfg, seed=0)


def asked(folder: Path, cfg: ModelConfig, spec: EvaluateSpec, **changes: Any) -> Any:
    experiment = Experiment(data=data(folder, **changes), evaluate=spec)
    questions = evaluation_sets(experiment.data, experiment.evaluate)["questions"]
    model = ModelSpec(hf_dir=str(folder / "teacher"))
    return arranged_questions(model, experiment.data, spec, questions, cfg, multiple=1)


def test_a_record_that_is_too_long_for_the_model_is_named(folder: Path, cfg: ModelConfig) -> None:
    said = rf"record long: has \d+ tokens with its images, more than the model's maximum of {cfg.longest_row}"
    refused(said, calibrated, folder, cfg, 2)
    refused(said, asked, folder, cfg, EvaluateSpec())
    (batch,) = calibrated(folder, cfg, 1, on_error="skip")
    assert batch.record_ids == ("short",)
    cut = calibrated(folder, cfg, 2, max_length=64)
    assert {batch.arrays["input_ids"].shape for batch in cut} == {(1, 64)}


def test_settings_that_are_too_large_for_the_model(folder: Path, cfg: ModelConfig) -> None:
    most = rf" is more than 4 times the model.s max_position_embeddings \({cfg.text.max_positions}\): lower it"
    for change in ({"max_length": 10**8}, {"max_length": 10**8, "truncate": False}):
        refused(f"data.max_length=100000000{most}", calibrated, folder, cfg, 2, **change)
    with pytest.raises(UserError, match=f"the last of data.length_buckets=100000000{most}"):
        calibrated(folder, cfg, 2, length_buckets=(64, 10**8))
    refused(f"evaluate.max_length=100000000{most}", asked, folder, cfg, EvaluateSpec(max_length=10**8))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("evaluate.max_new_tokens=1000000000", "evaluate's max_new_tokens=1000000000 is more than 4 times the"),
        ("evaluate.text_window=1000000000", "evaluate's text_window=1000000000 is more than 4 times the"),
        ("evaluate.batch_size=1000000000", "evaluate.batch_size=1000000000 must be at least 1 and at most 8192"),
        ("recover.batch_size=1000000000", "recover.batch_size=1000000000 must be at least 1 and at most 8192"),
        ("score.batch_size=1000000000", "score.batch_size=1000000000 must be at least 1 and at most 8192"),
        ("data.max_images=1000000000", "data.max_images=1000000000 must be at least 1 and at most 10000"),
        ("data.threads=1000000000", "data.threads=1000000000 must be at least 0 and at most 1024"),
    ],
)
def test_settings_of_commands(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], setting: str, said: str
) -> None:
    of = "text" if "text" in setting else "questions"
    (tmp_path / "few.json").write_text(json.dumps([{"id": "short", "conversations": TURNS}]))
    asked = {"text": f"evaluate.text={folder / 'text.txt'}", "questions": f"data.eval={tmp_path / 'few.json'}"}[of]
    config = "from vlmprune_jax.run.cli.config_files import experiment_config as get_config\n"
    (tmp_path / "config.py").write_text(config)
    flags = [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'w'}"]
    flags += [f"--config.{one}" for one in (f"model.hf_dir={folder / 'teacher'}", asked, setting)]
    assert main(["evaluate", *flags]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert said in lines[0]


def test_batches_that_do_not_fit_this_machine(folder: Path, cfg: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cfg.vision is not None
    sizes = {"SC_PHYS_PAGES": 25, "SC_PAGE_SIZE": 2**20}  # 25 MiB
    monkeypatch.setattr(batching.os, "sysconf", sizes.__getitem__)
    few = {"fraction": 1.0, "max_length": 64}
    assert calibrated(folder, cfg, 2, **few, max_images=10)
    said = (
        r"batches of 1 rows of 64 tokens and 10000 images: 5 batches take .* more than this machine has: lower batch_"
    )
    refused(said, calibrated, folder, cfg, 2, **few, max_images=10000)
    (folder / "few.json").write_text(json.dumps([{"id": "short", "conversations": TURNS}]))
    questions = dataclasses.replace(data(folder), eval=str(folder / "few.json"), max_images=10_000)
    model, spec = ModelSpec(hf_dir=str(folder / "teacher")), EvaluateSpec()
    of = evaluation_sets(questions, spec)["questions"]
    arranged = arranged_questions(model, questions, spec, of, cfg, multiple=1)
    refused("and 10000 images: ", arranged.batches, threads=1, prefetch=4)


def test_what_xla_cannot_allocate_is_one_line() -> None:
    said = r"^score: needs more memory than the device has \(RESOURCE_EXHAUSTED.*\): lower its batch_size"
    for error in (
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\n\nline\n"),
        MemoryError("RESOURCE_EXHAUSTED"),
    ):
        with pytest.raises(UserError, match=said), in_memory("score"):
            raise error
    with pytest.raises(jax.errors.JaxRuntimeError), in_memory("score"):
        raise jax.errors.JaxRuntimeError("INTERNAL: ours")


def test_a_long_text_is_tokenised_without_a_word(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """transformers warns of texts that are longer than `model_max_length`."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((folder / "teacher" / file).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"model_max_length": 32}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ids = load_tokenizer(tmp_path)(LONG)["input_ids"]
    assert np.asarray(ids).size > 100_000
    assert capfd.readouterr() == ("", "")
