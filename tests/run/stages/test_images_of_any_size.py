"""Qwen-VL and Gemma from folder to folder: scored, pruned, recovered, evaluated, exported, read by transformers."""

import json

import numpy as np
import pytest
from hf_cases import random_ids

import vlmprune_jax as vp
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.workdir.result import read_result

CONFIG = """
from vlmprune_jax.run.cli.config_files import experiment_config

def get_config():
    config = experiment_config()
    config.model.hf_dir = "{golden}/ckpt"
    config.data.train = config.data.eval = "{root}/records.json"
    config.data.images = "{golden}/images"
    config.data.max_length = 128
    config.score.samples = 4
    config.score.batch_size = 2
    config.prune.method = "hybrid"
    config.prune.ratio = 0.15
    config.prune.heads = "keep"
    config.evaluate.batch_size = 4
    config.evaluate.max_new_tokens = 2
    config.export.dtype = "float32"
    config.recover.batch_size = 2
    config.recover.steps = 3
    config.recover.log_every = 1
    config.recover.lora.rank = 2
    config.recover.losses = {{"kl": 0.5, "l2": 0.5}}
    config.speed.rounds = 1
    config.speed.prompt_tokens, config.speed.new_tokens = 700, 2
    return config
"""


CACHES = (
    "--config.recover.losses={{'kl': 0.5, 'l2': 0.0, 'teacher_inputs': 'own'}}",
    "--config.recover.teacher_cache={root}/teacher",
    "--config.recover.teacher_top_k=8",
    "--config.data.feature_cache={root}/features",
    "--config.data.max_length=160",
)
VOCABULARY = (
    "--config.prune.vocabulary.size=400",
    "--config.prune.vocabulary.sources=('{root}/records.json',)",
    "--config.prune.vocabulary.multiple=8",
)
REPAIR = ("--config.prune.stack=both", "--config.reconstruct.method=least_squares", "--config.reconstruct.samples=8")
RUNS = {
    "qwen3_vl": ("qwen3_vl", ()),
    "qwen2_5_vl": ("qwen2_5_vl", ()),
    "gemma3, caches and vocabulary": ("gemma3", (*CACHES, *VOCABULARY)),
    "gemma4, tower and vocabulary, repaired": ("gemma4", (*VOCABULARY, *REPAIR, "--config.data.max_length=160")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_whole_run(goldens, tmp_path, torch_outputs, name):
    family, flags = RUNS[name]
    golden = goldens / "families" / family
    records = [
        {
            "id": f"r{i}",
            **({} if i == 3 else {"image": f"{i % 4}.png"}),
            "conversations": [
                {"from": "human", "value": ("" if i == 3 else "<image>\n") + f"What is in picture {i}?"},
                {"from": "gpt", "value": "a red box" if i % 3 else "a dog"},
            ],
        }
        for i in range(8)
    ]
    (tmp_path / "records.json").write_text(json.dumps(records))
    (tmp_path / "run.py").write_text(CONFIG.format(golden=golden, root=tmp_path))
    flags = [flag.format(root=tmp_path) for flag in flags]
    assert main(["run", f"--config={tmp_path / 'run.py'}", f"--workdir={tmp_path / 'w'}", *flags]) == 0
    result = read_result(tmp_path / "w")
    assert result.sets["questions"].count == 8
    assert len(result.runs) == 2 + ("repaired" in name)
    assert result.export.max_abs_logit_difference <= 1e-4
    model = vp.load(tmp_path / "w/export")
    assert (model.cfg.text.vocab_size == 400) == ("vocabulary" in name)
    assert len(model.cfg.text.layers) < len(vp.load(golden / "ckpt").cfg.text.layers)
    inputs = random_ids(model) if family.startswith("qwen") else {"input_ids": np.arange(9, 49)[None]}
    found = torch_outputs(tmp_path / "w/export", inputs, class_name="AutoModelForImageTextToText", version="5")
    np.testing.assert_allclose(found["logits"], vp.forward(model, **inputs)[0], atol=1e-4, rtol=0)
