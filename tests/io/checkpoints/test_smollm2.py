"""A real model, SmolLM2-135M: the same tokens and the same perplexity as torch, before and after depth pruning."""

import math

import numpy as np
import pytest
from repository import ROOT
from smollm2 import english_text, smollm2_folder
from transformers import AutoTokenizer

import vlmprune_jax as vp
from vlmprune_jax.io.exports.reload import check_export

pytestmark = pytest.mark.slow
PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time, in a small village by the sea,")
WINDOW, ROWS = 512, 2


@pytest.fixture(scope="module")
def folder():
    return smollm2_folder(ROOT)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def windows(tokenizer):
    """int[4, 512] of English, some 8 kB."""
    ids = np.asarray(tokenizer(english_text(16_000))["input_ids"])
    return ids[: 2 * ROWS * WINDOW].reshape(-1, WINDOW)


def test_greedy_continuations(folder, tokenizer, torch_outputs):
    """Padded into one batch here, which compiles once; each prompt by itself in torch."""
    rows = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    longest = max(map(len, rows))
    ids, mask = (np.zeros((len(rows), longest), np.int32) for _ in range(2))
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = row, 1
    found = vp.generate(vp.load(folder), ids, attention_mask=mask, max_new_tokens=32, eos_token_ids=())
    for row, tokens in zip(rows, found, strict=True):
        options = {"class_name": "AutoModelForCausalLM", "version": "5", "want": (), "max_new_tokens": 32}
        expected = torch_outputs(folder, {"input_ids": np.asarray([row], np.int32)}, **options)["tokens"]
        np.testing.assert_array_equal(tokens[None], expected)


def test_depth_pruned_export_has_the_same_perplexity(folder, windows, torch_outputs, tmp_path):
    from vlmprune_jax.run.evaluation.runner import perplexity

    model = vp.load(folder)
    calibration = {"input_ids": windows[:1].astype(np.int32), "attention_mask": np.ones((1, WINDOW), np.int32)}
    scores = vp.score(model, [calibration], criterion="block_influence")
    plan = vp.make_plan(scores, model.cfg, method="depth", layers_removed=3)
    assert len(plan.removed_layers) == 3
    assert len(plan.kept_layers) == 27
    pruned = vp.apply_plan(model, plan)
    vp.save(pruned, tmp_path / "pruned", source_dir=folder, dtype="float32", plan=plan)
    ours = perplexity(pruned, windows.reshape(-1), window=WINDOW, batch_size=ROWS).perplexity
    options = {"class_name": "AutoModelForCausalLM", "version": "5", "want": ("nll",)}
    total = sum(
        torch_outputs(tmp_path / "pruned", {"input_ids": windows[i : i + ROWS]}, **options)["nll"].sum()
        for i in range(0, len(windows), ROWS)
    )
    theirs = math.exp(total / (windows.size - len(windows)))
    assert ours == pytest.approx(theirs, rel=1e-6)
    report = check_export(pruned, tmp_path / "pruned")
    assert report["backend"] == "torch"
    assert report["max_abs_logit_difference"] <= report["tolerance"] < 1e-3
