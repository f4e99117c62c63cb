"""One program per engine, and the process of one engine with one model, whose memory is its own.

The first line of standard input is a `Job`; every line after it asks for one run of the program. One `Answer` goes out
when the model is ready, and one for every run; the last one has `error` if the engine failed. All lines are JSON.
Importing this module does not import jax, so that the process of another engine does not hold it.
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
from msgspec.structs import replace

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import parse_json
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.io.families.gguf import ENGINE
from vlmprune_jax.run.evaluation.config import SpeedConfig


class Job(msgspec.Struct, kw_only=True):
    """One benchmark job: model, engine (`backend`) and prompts; for fields of the same name see `BenchSide`."""

    model: str  # as the user named it
    path: str  # folder or file
    tower: str | None = None  # folder or file of the vision tower, if it is not in `path`
    weights: str
    bytes: int
    parameters: int
    config: SpeedConfig
    backend: str = ""
    versions: dict[str, str] = {}
    threads: int = 1
    pixels: list[int] | None = None  # shape of the random images, in transformers and llama.cpp
    # For transformers.
    ids: list[list[int]] = []
    grids: list[list[int]] | None = None  # for images of varying size
    image_token: int | None = None
    loader: tuple[str, str] = ("transformers", "")  # module and name of the class that loads the model


class Answer(msgspec.Struct, kw_only=True):
    """One run of a program, which generates all tokens of a batch once.

    `seconds`: to the first token of all rows, and from the first to the last token. `prompt_tokens`: length of a prompt
    by the engine's own count. `peak_bytes`: see `Measurement`.
    """

    seconds: tuple[float, float] = (0.0, 0.0)
    prompt_tokens: int = 0
    peak_bytes: int | None = None
    error: str = ""


Program = Callable[[], Answer]


def make_prompts(cfg: ModelConfig, config: SpeedConfig) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Return prompts int32[batch, prompt] that repeat one token, and the pixels and grids of their images.

    Each row begins with an image of noise, if any: with dynamic resolution, one of a typical size.
    """
    rows = config.batch_size
    word = next(token for token in range(1, cfg.text.vocab_size) if token != cfg.image_token_id)
    ids = np.full((rows, config.prompt_tokens), word, np.int32)
    if not config.with_image(cfg) or cfg.vision is None or cfg.image_token_id is None:
        return ids, None, None
    ids[:, : cfg.tokens_per_image] = cfg.image_token_id
    vision, noise = cfg.vision, np.random.default_rng(0).standard_normal
    if not cfg.dynamic_resolution:
        return ids, noise((rows, 1, vision.channels, vision.image_size, vision.image_size), np.float32), None
    grids = np.tile(np.array([1, vision.grid, vision.grid], np.int32), (rows, 1, 1))
    return ids, noise((rows, vision.grid**2, vision.patch_values), np.float32), grids


def jax_program(model: Any, config: SpeedConfig) -> Program:
    """Compile the generation program of a `Model`."""
    from vlmprune_jax.core.models.generate import compile_generation
    from vlmprune_jax.core.models.media import Packed

    ids, pixels, grids = make_prompts(model.cfg, config)
    media = {} if pixels is None else {"vision": Packed(pixels, grids)}
    made = compile_generation(model, ids, media=media, max_new_tokens=config.new_tokens + 1)
    return lambda: Answer(seconds=made.run(), prompt_tokens=config.prompt_tokens, peak_bytes=made.peak_bytes)


def in_jax(job: Job) -> Program:
    """Load a folder and compile its generation program."""
    from vlmprune_jax.io.checkpoints.read import load

    return jax_program(load(job.path, vision_dir=job.tower, dtype=job.weights), job.config)


class InTransformers:
    """Program that runs `generate` of the model's class in transformers, or of the class in the exported folder."""

    def __init__(self, job: Job):
        import torch
        import transformers

        torch.set_num_threads(job.threads)
        module, name = job.loader
        loader, dtype = getattr(importlib.import_module(module), name), getattr(torch, job.weights)
        self.model = loader.from_pretrained(job.path, dtype=dtype, local_files_only=True).eval()
        ids, self.tokens = torch.tensor(job.ids), job.config.new_tokens + 1
        self.prompt_tokens = job.config.prompt_tokens
        self.inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if job.pixels:
            pixels = np.random.default_rng(0).standard_normal(tuple(job.pixels), np.float32)
            self.inputs["pixel_values"] = torch.from_numpy(pixels).to(dtype)
        if job.grids:
            self.inputs["image_grid_thw"] = torch.tensor(job.grids)
            if "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:  # from version 5 on
                self.inputs["mm_token_type_ids"] = torch.eq(ids, job.image_token or 0).int()
        self.inputs["generation_config"] = transformers.GenerationConfig(
            do_sample=False, min_new_tokens=self.tokens, max_new_tokens=self.tokens, pad_token_id=0
        )
        self.mode = torch.inference_mode

    def __call__(self) -> Answer:
        self.times, start = list[float](), time.perf_counter()
        with self.mode():
            self.model.generate(**self.inputs, streamer=self)
        _, *times = self.times  # the prompt comes first
        if len(times) != self.tokens:
            raise UserError(f"generated {len(times)} of {self.tokens} tokens")
        return Answer(seconds=(times[0] - start, times[-1] - times[0]), prompt_tokens=self.prompt_tokens)

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

        config, params = job.config, xllamacpp.CommonParams()
        self.rows, self.prompt_tokens, self.tokens = config.batch_size, config.prompt_tokens, config.new_tokens + 1
        context = self.rows * (self.prompt_tokens + self.tokens)
        params.model.path, params.n_parallel, params.warmup, params.verbosity = job.path, self.rows, False, -1
        params.n_ctx, params.cache_ram_mib, params.cache_prompt = context, 0, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job.threads
        if job.tower is not None:
            params.mmproj.path = job.tower
        try:
            self.server = xllamacpp.Server(params)
        except RuntimeError as error:  # it says no more than that
            raise UserError(
                "llama.cpp cannot load the file: it is damaged, too large, or needs another build of llama.cpp"
            ) from error
        self.request: dict[str, Any] = {"prompt": [1] * self.prompt_tokens}
        if job.pixels is not None:
            self._show_image(job.pixels)

    def __call__(self) -> Answer:
        """Generate all tokens once.

        For one row, the times are llama.cpp's own. Several rows are asked at once, by a thread each, and the first
        time lasts until every row has its first token: llama.cpp answers some rows while it still reads others.
        """

        def answer(row: int) -> tuple[float, float]:
            times = self._ask(self.tokens)["timings"]
            last = time.perf_counter()
            return last - times["predicted_ms"] / 1000, last

        if self.rows == 1:
            times = self._ask(self.tokens)["timings"]
            seconds = times["prompt_ms"] / 1000, times["predicted_ms"] / 1000
        else:
            start = time.perf_counter()
            with ThreadPoolExecutor(self.rows) as threads:
                first, last = map(max, zip(*threads.map(answer, range(self.rows)), strict=True))
            seconds = first - start, last - first
        return Answer(seconds=seconds, prompt_tokens=self.prompt_tokens)

    def _show_image(self, shape: list[int]) -> None:
        """Build a llama.cpp prompt from an image and as many words as the prompt length allows."""
        from PIL import Image

        file, pixels = io.BytesIO(), np.random.default_rng(0).integers(0, 256, shape, np.uint8)
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
        send(Answer())
        for _ in lines:
            send(replace(program(), peak_bytes=_peak_bytes()))
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
