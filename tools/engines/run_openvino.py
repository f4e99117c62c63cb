"""Log-probabilities of prompts in OpenVINO, converted by optimum-intel without compression,
from inputs of transformers' processor."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from optimum.intel import OVModelForCausalLM, OVModelForVisualCausalLM
from protocol import Scores, read_inputs, run


def score(folder: Path) -> Scores:
    """Compute a model folder's prompts in OpenVINO; yield (token ids, logits) for each."""
    sees = "vision_config" in json.loads((folder / "config.json").read_text())
    model_class = OVModelForVisualCausalLM if sees else OVModelForCausalLM
    settings = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": 1}
    model = model_class.from_pretrained(folder, export=True, load_in_8bit=False, ov_config=settings)
    for arrays in read_inputs(folder):
        inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
        yield arrays["input_ids"][0], model(**inputs).logits[0].float().numpy()


if __name__ == "__main__":
    run("openvino", "optimum-intel", score)
