"""Log-probabilities of prompts in mlx-vlm, from inputs of transformers' processor."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_vlm.models.cache import make_prompt_cache
from mlx_vlm.utils import load_model
from protocol import Scores, read_inputs, run


def score(folder: Path) -> Scores:
    """Compute a model folder's prompts in mlx-vlm; yield (token ids, logits) for each."""
    model = load_model(folder)
    for arrays in read_inputs(folder):
        inputs = {name: mx.array(array) for name, array in arrays.items()}
        ids, pixels, mask = inputs.pop("input_ids"), inputs.pop("pixel_values", None), inputs.pop("attention_mask")
        embedded = model.get_input_embeddings(ids, pixels, mask=mask, **inputs).to_dict()
        inputs |= {name: value for name, value in embedded.items() if value is not None}
        output = model.language_model(ids, cache=make_prompt_cache(model.language_model), **inputs)
        logits = output.logits if hasattr(output, "logits") else output
        yield np.asarray(ids)[0], np.asarray(logits.astype(mx.float32))[0]


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    run("mlx", "mlx-vlm", score)
