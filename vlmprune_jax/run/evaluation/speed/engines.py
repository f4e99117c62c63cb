"""The process of one engine with one model, whose memory is its own: a job comes in, the times of runs go out.

The first line of standard input is a `Job`; every line after it asks for one run of the program. One `Answer` goes out
when the model is ready, and one for every run; the last one has `error` if the engine failed. All lines are JSON.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import inspect
import io
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import parse_json
from vlmprune_jax.io.families.gguf import ENGINE
from vlmprune_jax.run.evaluation.speed.clock import Program, Seconds


class Job(msgspec.Struct, kw_only=True):
    """One benchmark job: model, engine (`backend`), prompts (`rows` at once), and number of tokens to generate."""

    name: str  # the model as the user named it
    model: str  # its folder or file
    weights: str  # type of the weights
    n_bytes: int
    parameters: int
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
    loader: tuple[str, str] = ("transformers", "")  # module and name of the class that loads the model
    by_row: bool = False  # True if the class takes one list of images per row
    # GGUF files.
    mmproj: str | None = None
    image_size: int = 224  # pixels per side of the image
    context: int = 0  # maximum tokens of a row


class Answer(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Times of one run (`seconds`), peak memory until now, and the engine's own count of prompt tokens."""

    seconds: Seconds = (0.0, 0.0)
    prompt_tokens: int = 0
    peak_bytes: int = 0
    error: str = ""


def in_jax(job: Job) -> Program:
    """Compile vlmprune's JAX generation program for a benchmark job."""
    from vlmprune_jax.core.models.generate import compile_generation
    from vlmprune_jax.core.models.media import Packed
    from vlmprune_jax.io.checkpoints.read import load

    model = load(job.model, vision_dir=job.vision_dir, dtype=job.dtype)
    images = Packed(_noise(job), job.grids and np.asarray(job.grids))
    media = {} if images.values is None else {"vision": images}
    return compile_generation(model, np.asarray(job.ids, np.int32), media=media, max_new_tokens=job.new_tokens + 1)


def _noise(job: Job) -> np.ndarray | None:
    """Return random pixels of the job's shape, float32; None if the prompt has no image."""
    return None if job.pixels is None else np.random.default_rng(0).standard_normal(tuple(job.pixels), np.float32)


class InTransformers:
    """Program that runs `generate` of the model's class in transformers, or of the class in the exported folder."""

    def __init__(self, job: Job):
        import torch
        import transformers

        torch.set_num_threads(job.threads)
        module, name = job.loader
        loader, dtype = getattr(importlib.import_module(module), name), getattr(torch, job.dtype)
        self.model = loader.from_pretrained(job.model, dtype=dtype, local_files_only=True).eval()
        ids, pixels, self.tokens = torch.tensor(job.ids), _noise(job), job.new_tokens + 1
        self.inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if pixels is not None:
            if not job.by_row:
                pixels = pixels.reshape(-1, pixels.shape[-1]) if job.grids else pixels[:, 0]
            self.inputs["pixel_values"] = torch.from_numpy(pixels).to(dtype)
        if job.grids:
            self.inputs["image_grid_thw"] = torch.tensor(job.grids).flatten(0, 1)
            if "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:  # from version 5 on
                self.inputs["mm_token_type_ids"] = torch.eq(ids, job.image_token or 0).int()
        self.inputs["generation_config"] = transformers.GenerationConfig(
            do_sample=False, min_new_tokens=self.tokens, max_new_tokens=self.tokens, pad_token_id=0
        )
        self.mode = torch.inference_mode

    def run(self) -> Seconds:
        """Generate all tokens once; return the seconds to the first token, and from the first to the last token."""
        self.times, start = list[float](), time.perf_counter()
        with self.mode():
            self.model.generate(**self.inputs, streamer=self)
        _, *times = self.times  # the prompt comes first
        if len(times) != self.tokens:
            raise UserError(f"generated {len(times)} of {self.tokens} tokens")
        return times[0] - start, times[-1] - times[0]

    def put(self, tokens: Any) -> None:
        """Record the arrival time of the prompt or of a token (a method of transformers' streamers)."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing after the last token (a method of transformers' streamers)."""


class InLlamaCpp:
    """Program that runs llama.cpp's server code in this process; prompt tokens and times are llama.cpp's own numbers.

    Raises UserError if llama.cpp cannot load the file or does not answer, or an image fills the whole prompt.
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
            raise UserError(
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
        from PIL import Image

        file, pixels = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

        def count(words: int) -> int:
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "a" + " a" * words}]
            self.request = {"messages": [{"role": "user", "content": content}]}
            return int(self._ask(1)["usage"]["prompt_tokens"])

        limit = self.prompt_tokens
        try:
            least, more = count(0), count(1)
            if least > limit:
                raise UserError(f"these need at least {least} tokens")
        except UserError as error:
            raise UserError(
                f"--prompt_tokens={limit} is too short for an image and the chat template ({error}): raise it, or add "
                "--image=False"
            ) from error
        self.prompt_tokens = count((limit - least) // max(1, more - least))

    def _ask(self, tokens: int) -> dict[str, Any]:
        """Ask llama.cpp's server code for `tokens` new tokens and return its response."""
        chat = "messages" in self.request
        call = self.server.handle_chat_completions if chat else self.server.handle_completions
        settings = {"max_tokens": tokens, "temperature": 0.0, "cache_prompt": False, "ignore_eos": True}
        answer = call({**self.request, **settings})
        answer = answer if isinstance(answer, dict) else parse_json(answer, "answer of llama.cpp", "report it")
        if "error" in answer:
            raise UserError(f"llama.cpp reports an error: {answer['error'].get('message', answer['error'])}")
        used = answer["usage"]
        if used["completion_tokens"] != tokens:
            raise UserError(f"llama.cpp generated {used['completion_tokens']} of {tokens} tokens")
        if (used.get("prompt_tokens_details") or {}).get("cached_tokens"):
            raise UserError(
                "llama.cpp reused a part of the prompt from its cache, so the time is wrong: report this error"
            )
        return answer


PROGRAMS: dict[str, Callable[[Job], Program]] = {"jax": in_jax, "transformers": InTransformers, ENGINE: InLlamaCpp}


def serve() -> None:
    """Run a job's program once per line on standard input, until standard input ends."""
    lines, out = sys.stdin, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to standard output as well

    def send(answer: Answer) -> None:
        print(msgspec.json.encode(answer).decode(), file=out, flush=True)

    try:
        job = msgspec.json.decode(lines.readline(), type=Job)
        os.environ |= {"OMP_NUM_THREADS": str(job.threads), "OPENBLAS_NUM_THREADS": str(job.threads)}
        if hasattr(os, "sched_setaffinity"):  # before libraries count the cores
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.threads])
        program = PROGRAMS[job.backend](job)
        program.run()
        send(Answer(prompt_tokens=getattr(program, "prompt_tokens", job.prompt_tokens)))
        for _ in lines:
            send(Answer(seconds=program.run(), peak_bytes=_peak_bytes()))
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        with contextlib.suppress(BrokenPipeError):
            send(Answer(error=text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"))


def _peak_bytes() -> int:
    """Return this process's peak memory in bytes, including libraries and loading."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts the memory of the parent at the fork as well
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    serve()
