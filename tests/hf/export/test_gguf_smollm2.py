"""A real model in llama.cpp: SmolLM2-135M whole, with layers of unequal width, and in 8 bits."""

import jax
import numpy as np
import pytest
from gguf_cases import differences
from hf_cases import keep_width
from llama_cpp import llama_cpp
from repository import ROOT
from smollm2 import english_text, smollm2_folder
from transformers import AutoTokenizer

from vlmprune_jax.hf.export.write import save
from vlmprune_jax.hf.read import load
from vlmprune_jax.models.vlm import forward

pytestmark = pytest.mark.slow
pytest.importorskip("xllamacpp")
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a small village by the sea,",
    "Water boils at a temperature of",
    "The three laws of motion say that",
)
ANSWER, WINDOW = 32, 512
# Of log-probabilities and of perplexity (share); None where activations are rounded to 8 bits as well.
CASES = {
    "F32": ("float32", "none", 0.1, 0.01, 5e-5, 0.001),
    "F16, unequal": ("float16", "none", 0.1, 0.01, 5e-5, 0.001),
    "Q8_0": ("bfloat16", "q8_0", None, None, 0.02, 0.015),
}


@pytest.fixture(scope="module")
def folder():
    return smollm2_folder(ROOT)


@pytest.fixture(scope="module")
def text(folder):
    return AutoTokenizer.from_pretrained(folder)(english_text(16_000))["input_ids"]


def logits_of(model, rows):
    """float[rows, longest, words] of rows that are padded on the right, where nothing before sees it."""
    longest = max(map(len, rows))
    ids = np.asarray([[*row, *[0] * (longest - len(row))] for row in rows], np.int32)
    return np.asarray(jax.jit(lambda given: forward(model, given)[0])(ids))


def losses(logits, row):
    return [-float(jax.nn.log_softmax(at)[token]) for at, token in zip(logits[:-1], row[1:], strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_the_same_model(folder, text, tmp_path, optimized, name):
    """128 positions, 32 greedy tokens of five prompts, and the perplexity of 1,022 tokens."""
    dtype, quantize, largest, mean, divergence, perplexity = CASES[name]
    model = load(folder)
    if "unequal" in name:
        for i in range(4, 26):
            model, _ = keep_width(model, [0, 2], range(992 + 32 * (i % 2)), only=[i])
    save(model, tmp_path / "out", source_dir=folder, format="gguf", dtype=dtype, quantize=quantize)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [text[:128], *(text[i : i + WINDOW] for i in (0, WINDOW)), *(tokenizer(one)["input_ids"] for one in PROMPTS)]
    found = llama_cpp(tmp_path / "out", rows=rows, greedy=ANSWER, texts=["The capital of France is 42."])
    ours = logits_of(model, rows[:3])
    seen = differences(ours[0, :128], found["logits"][0])
    sums = [sum(map(sum, ([losses(one[: len(row)], row)] for one, row in zip(logits, rows[1:3], strict=True))))
            for logits in (ours[1:3], found["logits"][1:3])]  # fmt: skip
    ratio = np.exp((sums[1] - sums[0]) / (2 * (WINDOW - 1)))
    print(f"{name}: largest, mean, divergence {seen}, perplexity x {ratio:.5f}")
    assert found["ids"][0].tolist() == tokenizer("The capital of France is 42.")["input_ids"]
    assert seen[2] <= divergence
    assert abs(ratio - 1) <= perplexity
    if largest is not None:
        assert seen[0] <= largest
        assert seen[1] <= mean
        answers = [[*row, *tokens] for row, tokens in zip(rows[3:], found["tokens"][3:], strict=True)]
        for row, one, logits in zip(rows[3:], answers, logits_of(model, answers), strict=True):
            assert logits[len(row) - 1 : len(one) - 1].argmax(-1).tolist() == one[len(row) :]
