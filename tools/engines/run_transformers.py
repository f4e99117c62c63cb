"""Log-probabilities in stock transformers, in float32: the reference of the other engines."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import torch
import transformers
from protocol import Scores, prompts, run, save_inputs


def score(folder: Path, causal: bool = False) -> Scores:
    """Compute a model folder's prompts in transformers; yield (token ids, logits) for each.

    With `causal`, image tokens do not attend to later tokens of the same image.
    """
    config = json.loads((folder / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    settings = model_class.config_class.from_pretrained(folder)
    sees = "vision_config" in config
    if causal:
        settings.text_config.use_bidirectional_attention = None
    model = model_class.from_pretrained(
        folder, config=settings, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    reader = (transformers.AutoProcessor if sees else transformers.AutoTokenizer).from_pretrained(folder)
    for i, (text, image) in enumerate(prompts(folder)):
        pieces = {"images": [image]} if sees else {}
        inputs = dict(reader(text=[text], **pieces, return_tensors="pt", add_special_tokens=False))
        save_inputs(folder, i, {name: tensor.numpy() for name, tensor in inputs.items()})
        if causal:
            inputs = {name: tensor for name, tensor in inputs.items() if not name.endswith("token_type_ids")}
        with torch.inference_mode():
            logits = model(**inputs).logits[0].float().numpy()
        yield inputs["input_ids"][0].numpy(), logits


if __name__ == "__main__":
    torch.set_num_threads(1)
    causal = "--causal" in sys.argv
    if causal:
        sys.argv.remove("--causal")
    run("causal" if causal else "transformers", "transformers", functools.partial(score, causal=causal))
