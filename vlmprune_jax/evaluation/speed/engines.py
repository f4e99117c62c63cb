"""One engine with one model in a process of its own, so that its memory is its own: a job comes in, readings go out.

The first line of standard input is a `Job`; every line after it asks for a reading. One line goes out when the model
is ready and one for every reading: an `Answer`, the last one with `error` if the engine failed.
"""

from __future__ import annotations

import base64
import importlib
import inspect
import io
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from vlmprune_jax.core.errors import UserError, reason
from vlmprune_jax.core.files import parse_json, read_text
from vlmprune_jax.evaluation.speed.clock import Program, Seconds, Stopwatch
from vlmprune_jax.families.gguf import ENGINE


class Job(msgspec.Struct, kw_only=True):
    """One benchmark job: model, engine (`backend`), prompt, and number of tokens to generate."""

    model: str
    backend: str = ""
    threads: int = 1
    prompt_tokens: int
    new_tokens: int
    # Hugging Face folders.
    vision_dir: str | None = None
    dtype: str = "float32"
    ids: list[list[int]] = []
    pixels: list[int] | None = None  # shape, for noise
    grids: list[list[list[int]]] | None = None  # of images of any size
    image_token: int | None = None
    loader: tuple[str, str] = ("transformers", "")  # module and class
    by_row: bool = False  # the class takes the images of each row, not one list of images
    # GGUF files.
    mmproj: str | None = None
    image_size: int = 224
    context: int = 0


class Answer(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One engine measurement: times (`seconds`), peak memory, and the engine's own count of prompt tokens."""

    seconds: Seconds | None = None
    prompt_tokens: int = 0
    peak_bytes: int = 0
    error: str = ""


def in_jax(job: Job) -> Program:
    """Compile vlmprune's JAX generation program for a benchmark job."""
    from vlmprune_jax.hf.read import load
    from vlmprune_jax.models.generate import compile_generation

    model = load(job.model, vision_dir=job.vision_dir, dtype=job.dtype)
    images = {"pixel_values": _pixels(job), "image_grid_thw": job.grids and np.asarray(job.grids)}
    return compile_generation(model, np.asarray(job.ids, np.int32), **images, max_new_tokens=job.new_tokens + 1)


class InTransformers:
    """Program that runs `generate` of transformers in PyTorch."""

    def __init__(self, job: Job):
        import torch
        import transformers

        torch.set_num_threads(job.threads)
        module, name = job.loader
        loader = getattr(importlib.import_module(module), name)
        options = {"dtype": getattr(torch, job.dtype), "local_files_only": True}
        self.model = loader.from_pretrained(job.model, **options).eval()
        ids, pixels = torch.tensor(job.ids), _pixels(job)
        self.inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if pixels is not None:
            shown = torch.from_numpy(pixels if job.by_row or job.grids else pixels[:, 0])
            if job.grids:
                shown, self.inputs["image_grid_thw"] = shown[0], torch.tensor(job.grids[0])
                if "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:  # from version 5 on
                    self.inputs["mm_token_type_ids"] = torch.eq(ids, job.image_token or 0).int()
            self.inputs["pixel_values"] = shown.to(self.model.dtype)
        self.new_tokens = job.new_tokens
        self.mode, self.settings = torch.inference_mode, transformers.GenerationConfig

    def run(self) -> Seconds:
        """Generate all tokens once; return the seconds to the first token, and from the first to the last token."""
        tokens, stamps = self.new_tokens + 1, _Stamps()
        settings = self.settings(do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0)
        start = time.perf_counter()
        with self.mode():
            self.model.generate(**self.inputs, generation_config=settings, streamer=stamps)
        _, *arrived = stamps.times
        if len(arrived) != tokens:
            raise UserError(f"llama.cpp generated {len(arrived)} of {tokens} tokens")
        return arrived[0] - start, arrived[-1] - arrived[0]


class _Stamps:
    """Streamer for transformers' `generate` that records when the prompt and each token arrive."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class InLlamaCpp:
    """Program that runs llama.cpp's server code in this process; prompt tokens and times are llama.cpp's own numbers.

    Raises UserError if it does not load the file, does not answer, or an image fills the whole prompt.
    """

    def __init__(self, job: Job):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_parallel, params.warmup, params.verbosity = job.model, 1, False, -1
        params.n_ctx, params.cache_ram_mib, params.cache_prompt = job.context, 0, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job.threads
        if job.mmproj is not None:
            params.mmproj.path = job.mmproj
        try:
            self.server = xllamacpp.Server(params)
        except RuntimeError as error:  # it says no more than that
            raise UserError(
                "llama.cpp cannot load the file: it is damaged, too large, or needs another build of llama.cpp"
            ) from error
        self.new_tokens, self.prompt_tokens = job.new_tokens, job.prompt_tokens
        self.request: dict[str, Any] = {"prompt": [1] * job.prompt_tokens}
        if job.mmproj is not None:
            self._show_image(job.image_size)

    def run(self) -> Seconds:
        """Generate all tokens once; return llama.cpp's seconds for prompt and first token, and for the other tokens."""
        times = self._ask(self.new_tokens + 1)["timings"]
        return times["prompt_ms"] / 1000, times["predicted_ms"] / 1000

    def _show_image(self, side: int) -> None:
        """Build a llama.cpp prompt from an image and as many words as the prompt length allows."""
        from PIL import Image

        noise, file = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8), io.BytesIO()
        Image.fromarray(noise).save(file, "PNG")
        url, wanted = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}", self.prompt_tokens

        def count(words: int) -> int:
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "a" + " a" * words}]
            self.request = {"messages": [{"role": "user", "content": content}]}
            return int(self._ask(1)["usage"]["prompt_tokens"])

        try:
            least, more = count(0), count(1)
            if least > wanted:
                raise UserError(f"these need at least {least} tokens")
        except UserError as error:
            raise UserError(
                f"--prompt_tokens={wanted} is too short for an image and the chat template ({error}): raise it, or add "
                "--image=False"
            ) from error
        self.prompt_tokens = count((wanted - least) // max(1, more - least))

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


ENGINES: dict[str, Callable[[Job], Program]] = {
    "jax": in_jax, "transformers": InTransformers, ENGINE: InLlamaCpp
}  # fmt: skip


def _pixels(job: Job) -> np.ndarray | None:
    """Return random pixels of shape `job.pixels`; None if the prompt has no image."""
    return None if job.pixels is None else np.random.default_rng(0).standard_normal(tuple(job.pixels), np.float32)


def serve() -> None:
    """Run one measurement per line on standard input, until standard input ends (in the engine's process)."""
    lines, out = sys.stdin, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries print to standard output as well

    def send(answer: Answer) -> None:
        out.write(msgspec.json.encode(answer) + b"\n")
        out.flush()

    try:
        job = msgspec.convert(parse_json(lines.readline(), "the job", "report it"), Job)
        if hasattr(os, "sched_setaffinity"):  # before jax counts the cores
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.threads])
        program = ENGINES[job.backend](job)
        program.run()
        watch = Stopwatch(program, "speed", min_runs=1)
        prompt_tokens = getattr(program, "prompt_tokens", job.prompt_tokens)
        send(Answer(prompt_tokens=prompt_tokens))
        for _ in lines:
            send(Answer(prompt_tokens=prompt_tokens, seconds=watch.read(), peak_bytes=_peak_bytes()))
    except Exception as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        send(Answer(error=f"{kind}{reason(error)}"))


def _peak_bytes() -> int:
    """Return this process's peak memory in bytes, including libraries and loading."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts the memory of the parent at the fork as well
        return int(read_text(status).partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    serve()
