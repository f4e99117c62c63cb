"""The loss term of how-to/extend.md, from a config that imports it, through two steps of `vlmprune recover`."""

import importlib.util
import json

import numpy as np
import pytest
import recover_cases as cases
from experiment_cases import flags_of, registered

import vlmprune_jax as vp
from vlmprune_jax.core.models.vlm import apply
from vlmprune_jax.run.cli.main import main

CONFIG = """
import my_loss  # registers "jsd"

from vlmprune_jax.run.cli.config_files import experiment_config

def get_config():
    config = experiment_config()
    config.model.hf_dir = "{folder}/teacher"
    config.data.train = "{folder}/records.json"
    config.data.images = "{goldens}/data/images"
    config.data.system = ""
    config.data.max_length = 64
    config.score.width = "l2"
    config.prune.method = "width"
    config.prune.ratio = 0.2
    config.recover.trainable = "projector"
    config.recover.control = False
    config.recover.losses = {{"ce": 0.5, "extra": {{"jsd": 0.5}}}}
    config.recover.batch_size = 2
    config.recover.steps = 2
    config.recover.log_every = 1
    return config
"""


@pytest.fixture
def printed(tmp_path):
    with registered("A loss", tmp_path, vp.losses) as path:
        yield path


@pytest.fixture
def flags(printed, tmp_path, goldens):
    return flags_of(CONFIG, tmp_path, goldens)


def test_the_printed_term_trains(flags, tmp_path, capsys):
    assert main(["score", *flags]) == main(["prune", *flags]) == main(["recover", *flags]) == 0
    lines = [json.loads(line) for line in (tmp_path / "w/training/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert line["jsd"] > 0
        assert line["loss"] == pytest.approx(0.5 * line["ce"] + 0.5 * line["jsd"], rel=1e-5)
    capsys.readouterr()
    assert main(["recover", *flags, "--config.recover.losses.extra.jsd=0.7"]) == 2
    assert "recover.losses.extra.jsd was 0.5, now 0.7" in capsys.readouterr().err
    assert main(["recover", *flags]) == 0
    assert "recover: unchanged, skipped" in capsys.readouterr().out
    with (tmp_path / "my_loss.py").open("a") as file:
        file.write("# changed\n")
    assert main(["recover", *flags]) == 2
    assert "was made from other inputs (loss jsd changed)" in capsys.readouterr().err
    config = tmp_path / "experiment.py"
    config.write_text(config.read_text().replace('"jsd"', '"jsdd"'))
    assert main(["recover", *flags]) == 2
    assert "recover.losses.extra has no term 'jsdd'; did you mean 'jsd'?" in capsys.readouterr().err


def test_its_value(printed):
    """Against the definition over whole logits, with padding; 0 against oneself; and the weighted total."""
    spec = importlib.util.spec_from_file_location("my_loss", printed)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    cfg = cases.config(vision=False)
    student, teacher = cases.model(cfg, 1), cases.model(cfg, 2)
    batch = next(cases.Stream(cfg, rows=3))
    loss = vp.LossConfig(ce=0.25, extra={"jsd": 2.0}, temperature=1.7, chunk=4, teacher_inputs="own")
    found = vp.losses(student, batch, loss, teacher=teacher)
    ids, mask = batch.arrays["input_ids"], batch.arrays["attention_mask"]
    p, q = (probabilities(one, ids, mask, 1.7) for one in (teacher, student))
    m = 0.3 * p + 0.7 * q
    divergence = (0.3 * p * np.log(p / m) + 0.7 * q * np.log(q / m)).sum(-1)
    assert found["jsd"] == pytest.approx(1.7**2 * divergence[mask == 1].mean(), rel=1e-4)
    assert found["total"] == pytest.approx(0.25 * found["ce"] + 2.0 * found["jsd"], rel=1e-6)
    assert found.keys() == {"ce", "jsd", "total"}
    assert vp.losses(student, batch, loss, teacher=student)["jsd"] == pytest.approx(0.0, abs=1e-6)


def probabilities(model, ids, mask, temperature):
    logits, _ = apply(model.params, model.cfg, ids, attention_mask=mask)
    e = np.exp(np.asarray(logits, np.float64) / temperature)
    return e / e.sum(-1, keepdims=True)
