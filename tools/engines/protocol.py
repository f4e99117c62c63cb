"""The part that all engine scripts share: read folders and prompts, print one JSON line per folder.

Run as `python run_ENGINE.py FOLDER...`. A script writes the log-probabilities of every prompt to FOLDER/ENGINE.npz:
arrays `ids{i}` int[tokens] and `logprobs{i}` float32[tokens, vocabulary], row t of which predicts token t + 1.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

Scores = Iterator[tuple[np.ndarray, np.ndarray]]  # ids and logits (or log-probabilities) of one prompt after another


def prompts(folder: Path) -> list[tuple[str, Any]]:
    """Return (text, PIL image or None) for every prompt stored in a model folder."""
    from PIL import Image

    texts = json.loads((folder / "prompts/texts.json").read_text())
    files = [folder / f"prompts/{i}.png" for i in range(len(texts))]
    images = [Image.open(file).convert("RGB") if file.is_file() else None for file in files]
    return [*zip(texts, images, strict=True)]


def save_inputs(folder: Path, i: int, inputs: dict[str, np.ndarray]) -> None:
    """Store the processor outputs of prompt `i`, for engines that have no processor of their own."""
    np.savez(folder / f"prompts/{i}.npz", **inputs)  # type: ignore[arg-type]


def read_inputs(folder: Path) -> Iterator[dict[str, np.ndarray]]:
    """Yield the stored processor outputs of every prompt, in order, as {name: array}."""
    for i in range(len(json.loads((folder / "prompts/texts.json").read_text()))):
        with np.load(folder / f"prompts/{i}.npz") as arrays:
            yield dict(arrays)


def run(engine: str, package: str, score: Callable[[Path], Scores]) -> None:
    """Score all model folders of the command line; print one JSON line per folder, with the error if it fails."""
    lines = sys.stdout
    sys.stdout = sys.stderr  # engines print progress
    for folder in map(Path, sys.argv[1:]):
        line: dict[str, Any] = {"folder": str(folder), "engine": engine, "version": version(package)}
        print(json.dumps({**line, "begun": True}), file=lines, flush=True)
        try:
            arrays: dict[str, np.ndarray] = {}
            for i, (ids, logits) in enumerate(score(folder)):
                logits = np.asarray(logits, np.float32)
                largest = logits.max(-1, keepdims=True)
                norm = largest + np.log(np.exp(logits - largest).sum(-1, keepdims=True))
                arrays |= {f"ids{i}": np.asarray(ids), f"logprobs{i}": logits - norm}
            np.savez(folder / f"{engine}.npz", **arrays)  # type: ignore[arg-type]
        except Exception as error:
            traceback.print_exc()
            line["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(json.dumps(line), file=lines, flush=True)
