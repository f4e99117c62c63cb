"""The process of one engine with one model, whose memory is its own: a job comes in, readings go out.

The first line of standard input is a job, every line after it asks for a reading. One line goes out when the model is
ready and one for every reading; the last one has `error` if the engine failed. All lines are JSON, as `engines.Job` and
`engines.Answer` describe them.

Imports nothing but the standard library and numpy, and runs by its path, in the Python environment of vLLM, mlx-vlm or
OpenVINO, which need not hold vlmprune.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import math
import os
import resource
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

# A reading is the fastest of several runs, because other work on the machine only slows runs down.
MIN_RUNS, MIN_SECONDS = 3, 0.5
Seconds = tuple[float, float]  # seconds to the first token, and from there to the last token


class EngineError(Exception):
    """Failure of an engine, with a message that is enough without the exception's name."""


class Program(Protocol):
    """Interface for timing the text generation of one model on one batch of prompts."""

    def run(self) -> Seconds:
        """Generate all tokens once; return the seconds to the first token, and from the first to the last token."""


class Stopwatch:
    """Timer that repeats a compiled program and keeps the fastest run.

    `agree(seconds)` returns the same value on all processes of a run, so that they repeat the program equally often.
    """

    def __init__(self, program: Program, *, min_runs: int = MIN_RUNS, agree: Callable[[float], float] = float):
        self._program, self._agree = program, agree
        self._runs = max(min_runs, math.ceil(MIN_SECONDS / max(agree(sum(program.run())), 1e-6)))

    def read(self) -> Seconds:
        """Run the program several times; return the minimum seconds to the first token, and from there to the last."""
        runs = [self._program.run() for _ in range(self._runs)]
        first, rest = (self._agree(min(seconds)) for seconds in zip(*runs, strict=True))
        return first, rest


class Stamps:
    """Arrival times of tokens; a streamer for transformers' `generate`, which sends the prompt first."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.times: list[float] = []

    def put(self, tokens: Any = None) -> None:
        """Record the arrival time of the prompt or of a token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing (transformers calls this method of a streamer after the last token)."""

    def seconds(self, tokens: int) -> Seconds:
        """Return the seconds to the first token, and from first to last; raise EngineError if tokens are missing."""
        if len(self.times) != tokens:
            raise EngineError(f"generated {len(self.times)} of {tokens} tokens")
        return self.times[0] - self.start, self.times[-1] - self.times[0]


def longest_prompt(count: Callable[[int], int], limit: int) -> int:
    """Return the tokens of the longest prompt (image and words) within a limit; `count(n)`: tokens with n words.

    Raises EngineError if the image and the chat template alone have more tokens than the limit.
    """
    try:
        least, more = count(0), count(1)
        if least > limit:
            raise EngineError(f"these need at least {least} tokens")
    except EngineError as error:
        raise EngineError(
            f"--prompt_tokens={limit} is too short for an image and the chat template ({error}): raise it, or add "
            "--image=False"
        ) from error
    return count((limit - least) // max(1, more - least))


def noise(job: Any) -> np.ndarray | None:
    """Return random pixels of the job's shape, float32; None if the prompt has no image."""
    return None if job.pixels is None else np.random.default_rng(0).standard_normal(tuple(job.pixels), np.float32)


def _hf_pixels(job: Any) -> np.ndarray | None:
    """Return random pixels in the shape that the model's class in transformers takes; None without an image."""
    pixels = noise(job)
    if pixels is None or job.by_row:
        return pixels
    return pixels.reshape(-1, pixels.shape[-1]) if job.grids else pixels[:, 0]


class TorchProgram:
    """Program that runs `generate` of transformers or optimum-intel."""

    def __init__(self, model: Any, job: Any, dtype: str):
        import torch
        import transformers

        ids, pixels = torch.tensor(job.ids), _hf_pixels(job)
        self.model, self.tokens = model, job.new_tokens + 1
        self.inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if pixels is not None:
            self.inputs["pixel_values"] = torch.from_numpy(pixels).to(getattr(torch, dtype))
        if job.grids:
            self.inputs["image_grid_thw"] = torch.tensor(job.grids).flatten(0, 1)
            if "mm_token_type_ids" in inspect.signature(model.forward).parameters:  # from version 5 on
                self.inputs["mm_token_type_ids"] = torch.eq(ids, job.image_token or 0).int()
        self.settings = transformers.GenerationConfig(
            do_sample=False, min_new_tokens=self.tokens, max_new_tokens=self.tokens, pad_token_id=0
        )
        self.mode = torch.inference_mode

    def run(self) -> Seconds:
        """Generate all tokens once; return the seconds to the first token, and from the first to the last token."""
        stamps = Stamps()
        with self.mode():
            self.model.generate(**self.inputs, generation_config=self.settings, streamer=stamps)
        del stamps.times[:1]
        return stamps.seconds(self.tokens)


def in_openvino(job: Any) -> TorchProgram:
    """Convert a model with optimum-intel, without compression, to a program of OpenVINO."""
    from optimum.intel import OVModelForCausalLM, OVModelForVisualCausalLM

    precision = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[job.dtype]
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": job.threads}
    settings |= {"KV_CACHE_PRECISION": precision} if job.dtype == "float32" else {}
    loader = OVModelForVisualCausalLM if job.sees else OVModelForCausalLM
    return TorchProgram(
        loader.from_pretrained(job.model, export=True, load_in_8bit=False, ov_config=settings), job, "float32"
    )


class InMlx:
    """Program that runs mlx-vlm's generation on the CPU."""

    def __init__(self, job: Any):
        import mlx.core as mx
        from mlx_vlm.generate import generate_step
        from mlx_vlm.utils import load_model

        mx.set_default_device(mx.cpu)
        model, pixels, ids = load_model(Path(job.model)), _hf_pixels(job), mx.array(job.ids)
        dtype = getattr(mx, job.dtype)
        model.set_dtype(dtype)
        grids = {"image_grid_thw": mx.array(job.grids[0])} if job.grids else {}
        images = None if pixels is None else mx.array(pixels).astype(dtype)
        self.tokens = job.new_tokens + 1

        def generate() -> Iterator[Any]:
            mask = mx.ones_like(ids)
            yield from generate_step(ids, model, images, mask, max_tokens=self.tokens, temperature=0.0, **grids)

        self.generate = generate

    def run(self) -> Seconds:
        """Generate all tokens once; return the seconds to the first token, and from the first to the last token."""
        stamps = Stamps()
        for _ in self.generate():
            stamps.put()
        return stamps.seconds(self.tokens)


class InVllm:
    """Program that runs vLLM's engine in this process; its time to the first token includes reading the image."""

    def __init__(self, job: Any):
        # One process, so that its memory and threads are those that are measured.
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
        os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
        from vllm import LLM, SamplingParams

        limits = {"limit_mm_per_prompt": {"image": 1, "video": 0, "audio": 0}, "mm_processor_cache_gb": 0}
        self.model = LLM(
            job.model, dtype=job.dtype, max_model_len=job.prompt_tokens + job.new_tokens + 1, max_num_seqs=1, seed=0,
            enable_prefix_caching=False, disable_log_stats=True, **(limits if job.sees else {}),
        )  # fmt: skip
        self.sampling, self.numbers, self.tokens = SamplingParams, itertools.count(), job.new_tokens + 1
        self.ids, self.side = job.ids[0], job.image_size
        self.shows_image = job.pixels is not None
        self.prompt_tokens = longest_prompt(self._count, job.prompt_tokens) if self.shows_image else job.prompt_tokens

    def run(self) -> Seconds:
        """Generate all tokens once; return the seconds to the first token, and from the first to the last token."""
        return self._generate(self.tokens)[0].seconds(self.tokens)

    def _count(self, words: int) -> int:
        """Make a prompt of an image and some words; return how many tokens it has in vLLM."""
        content = [{"type": "image"}, {"type": "text", "text": "a" + " a" * words}]
        tokenizer = self.model.get_tokenizer()
        text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        self.ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        try:
            return self._generate(1)[1]
        except ValueError as error:  # longer than the context
            raise EngineError(str(error)) from error

    def _generate(self, tokens: int) -> tuple[Stamps, int]:
        """Return the times of new tokens, and the number of the prompt's tokens."""
        number, prompt = next(self.numbers), {"prompt_token_ids": self.ids}
        if self.shows_image:  # a new image every time, because vLLM caches image features
            prompt["multi_modal_data"] = {"image": random_image(self.side, number)}
        sampling = self.sampling(temperature=0.0, ignore_eos=True, max_tokens=tokens)
        engine, length, stamps = self.model.llm_engine, 0, Stamps()
        engine.add_request(str(number), prompt, sampling)
        while engine.has_unfinished_requests():
            for output in engine.step():
                length = len(output.prompt_token_ids)
                stamps.put()
        return stamps, length


def random_image(side: int, seed: int) -> Any:
    """Return a square image of random colours (a `PIL.Image`)."""
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))


PROGRAMS: dict[str, Callable[[Any], Program]] = {"vllm": InVllm, "openvino": in_openvino, "mlx": InMlx}


def serve(programs: Mapping[str, Callable[[Any], Program]], plain: type[Exception] = EngineError) -> None:
    """Run one measurement per line on standard input, until standard input ends (in the engine's process).

    `plain`: exceptions that are sent as their message only, like EngineError; others are sent with their type.
    """
    lines, out = sys.stdin, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to standard output as well

    def send(**answer: Any) -> None:
        print(json.dumps(answer), file=out, flush=True)

    try:
        job = types.SimpleNamespace(**json.loads(lines.readline()))
        os.environ |= {"OMP_NUM_THREADS": str(job.threads), "OPENBLAS_NUM_THREADS": str(job.threads)}
        if hasattr(os, "sched_setaffinity"):  # before libraries count the cores
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.threads])
        program = programs[job.backend](job)
        program.run()
        watch = Stopwatch(program, min_runs=1)
        prompt_tokens = getattr(program, "prompt_tokens", job.prompt_tokens)
        send(prompt_tokens=prompt_tokens)
        for _ in lines:
            send(prompt_tokens=prompt_tokens, seconds=watch.read(), peak_bytes=_peak_bytes())
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        with contextlib.suppress(BrokenPipeError):
            send(error=text if isinstance(error, (plain, EngineError)) else f"{type(error).__name__}: {text}")


def _peak_bytes() -> int:
    """Return this process's peak memory in bytes, including libraries and loading."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts the memory of the parent at the fork as well
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    serve(PROGRAMS)
