"""Engines that live in vlmprune's own Python environment, and the lines that every engine's process reads and writes.

`process.py` has the engines that may live in another environment, and the loop that all engines run.
"""

from __future__ import annotations

import base64
import importlib
import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import parse_json
from vlmprune_jax.io.families.gguf import ENGINE
from vlmprune_jax.run.evaluation.speed.process import (
    EngineError,
    Program,
    Seconds,
    TorchProgram,
    longest_prompt,
    noise,
    random_image,
    serve,
)


class Job(msgspec.Struct, kw_only=True):
    """One benchmark job: model, engine (`backend`), prompts (`rows` at once), and number of tokens to generate."""

    model: str
    backend: str = ""
    threads: int = 1
    rows: int = 1
    prompt_tokens: int
    new_tokens: int
    # Hugging Face folders.
    vision_dir: str | None = None
    dtype: str = "float32"
    ids: list[list[int]] = []
    pixels: list[int] | None = None  # shape of the random pixels
    grids: list[list[list[int]]] | None = None  # image grids, for images of varying size
    image_token: int | None = None
    sees: bool = False  # True if the model has a vision tower
    loader: tuple[str, str] = ("transformers", "")  # module and name of the class that loads the model
    by_row: bool = False  # True if the class takes one list of images per row
    image_size: int = 224  # pixels per side of the image
    # GGUF files.
    mmproj: str | None = None
    context: int = 0  # maximum tokens of a row


class Answer(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One engine measurement: times (`seconds`), peak memory, and the engine's own count of prompt tokens."""

    seconds: Seconds | None = None
    prompt_tokens: int = 0
    peak_bytes: int = 0
    error: str = ""


def in_jax(job: Job) -> Program:
    """Compile vlmprune's JAX generation program for a benchmark job."""
    from vlmprune_jax.core.models.generate import compile_generation
    from vlmprune_jax.io.checkpoints.read import load

    model = load(job.model, vision_dir=job.vision_dir, dtype=job.dtype)
    images = {"pixel_values": noise(job), "image_grid_thw": job.grids and np.asarray(job.grids)}
    return compile_generation(model, np.asarray(job.ids, np.int32), **images, max_new_tokens=job.new_tokens + 1)


def in_transformers(job: Job) -> TorchProgram:
    """Load a model with its class of transformers, or with the class in the exported folder."""
    import torch

    torch.set_num_threads(job.threads)
    module, name = job.loader
    loader = getattr(importlib.import_module(module), name)
    model = loader.from_pretrained(job.model, dtype=getattr(torch, job.dtype), local_files_only=True).eval()
    return TorchProgram(model, job, job.dtype)


class InLlamaCpp:
    """Program that runs llama.cpp's server code in this process; prompt tokens and times are llama.cpp's own numbers.

    Raises EngineError if llama.cpp cannot load the file or does not answer, or an image fills the whole prompt.
    """

    def __init__(self, job: Job):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_parallel, params.warmup, params.verbosity = job.model, job.rows, False, -1
        params.n_ctx, params.cache_ram_mib, params.cache_prompt = job.rows * job.context, 0, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job.threads
        if job.mmproj is not None:
            params.mmproj.path = job.mmproj
        try:
            self.server = xllamacpp.Server(params)
        except RuntimeError as error:  # it says no more than that
            raise EngineError(
                "llama.cpp cannot load the file: it is damaged, too large, or needs another build of llama.cpp"
            ) from error
        self.rows, self.new_tokens, self.prompt_tokens = job.rows, job.new_tokens, job.prompt_tokens
        self.request: dict[str, Any] = {"prompt": [1] * job.prompt_tokens}
        if job.mmproj is not None:
            self._show_image(job.image_size)

    def run(self) -> Seconds:
        """Generate all tokens once; return the seconds to the first token, and from there to the last.

        For one row, these are llama.cpp's own times. Several rows are asked at once, by a thread each, and the first
        time lasts until every row has its first token: llama.cpp answers some rows while it still reads others.
        """
        if self.rows == 1:
            times = self._ask(self.new_tokens + 1)["timings"]
            return times["prompt_ms"] / 1000, times["predicted_ms"] / 1000

        def answer(row: int) -> Seconds:
            times = self._ask(self.new_tokens + 1)["timings"]
            last = time.perf_counter()
            return last - times["predicted_ms"] / 1000, last

        start = time.perf_counter()
        with ThreadPoolExecutor(self.rows) as threads:
            first, last = map(max, zip(*threads.map(answer, range(self.rows)), strict=True))
        return first - start, last - first

    def _show_image(self, side: int) -> None:
        """Build a llama.cpp prompt from an image and as many words as the prompt length allows."""
        file = io.BytesIO()
        random_image(side, 0).save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

        def count(words: int) -> int:
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "a" + " a" * words}]
            self.request = {"messages": [{"role": "user", "content": content}]}
            return int(self._ask(1)["usage"]["prompt_tokens"])

        self.prompt_tokens = longest_prompt(count, self.prompt_tokens)

    def _ask(self, tokens: int) -> dict[str, Any]:
        """Ask llama.cpp's server code for `tokens` new tokens and return its response."""
        chat = "messages" in self.request
        call = self.server.handle_chat_completions if chat else self.server.handle_completions
        settings = {"max_tokens": tokens, "temperature": 0.0, "cache_prompt": False, "ignore_eos": True}
        answer = call({**self.request, **settings})
        answer = answer if isinstance(answer, dict) else parse_json(answer, "answer of llama.cpp", "report it")
        if "error" in answer:
            raise EngineError(f"llama.cpp reports an error: {answer['error'].get('message', answer['error'])}")
        used = answer["usage"]
        if used["completion_tokens"] != tokens:
            raise EngineError(f"llama.cpp generated {used['completion_tokens']} of {tokens} tokens")
        if (used.get("prompt_tokens_details") or {}).get("cached_tokens"):
            raise EngineError(
                "llama.cpp reused a part of the prompt from its cache, so the time is wrong: report this error"
            )
        return answer


ENGINES: dict[str, Callable[[Job], Program]] = {
    "jax": in_jax, "transformers": in_transformers, ENGINE: InLlamaCpp
}  # fmt: skip


if __name__ == "__main__":
    serve(ENGINES, UserError)
