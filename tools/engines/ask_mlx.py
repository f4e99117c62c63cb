"""Ask an exported LLaVA in mlx-vlm about an image: `.venv-mlx/bin/python ask_mlx.py FOLDER IMAGE QUESTION`.

mlx-vlm's own processor of LLaVA fails with transformers 5.4 or newer (github.com/Blaizzy/mlx-vlm/issues/870), and with
it `python -m mlx_vlm.generate`. This script prepares the inputs with the processor of transformers.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any


def main(folder: str, image: str, question: str) -> None:
    """Ask the model named on the command line about an image, and print its greedy answer."""
    if find_spec("mlx_vlm") is None:
        sys.exit("mlx-vlm is not installed in this environment: run make engines-mlx, then use .venv-mlx/bin/python")
    import mlx.core as mx
    from mlx_vlm import generate, load
    from PIL import Image
    from transformers import LlavaProcessor

    model, streaming = load(folder)
    processor = LlavaProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    chat: list[Any] = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=Image.open(image), text=prompt, return_tensors="np")
    ids, mask, pixels = (mx.array(inputs[name]) for name in ("input_ids", "attention_mask", "pixel_values"))
    answer = generate(model, streaming, prompt, input_ids=ids, mask=mask, pixel_values=pixels, temperature=0.0)
    print(answer.text.strip())


if __name__ == "__main__":
    main(*sys.argv[1:])
