"""Speed, memory and energy of a Hugging Face folder in vLLM, OpenVINO or mlx-vlm on the CPU.

    .venv-vllm/bin/python benchmarks/engines.py vllm FOLDER [--prompt_tokens=640] [--new_tokens=64] [--no-image]

`make engines-vllm`, `engines-openvino` and `engines-mlx` make the environments, which need not hold vlmprune. A run
reads an image and words, and generates `--new_tokens` tokens after the first; vLLM's prefill includes preparing the
image. Prints a JSON line with tokens/s of each round, and the joules of the whole machine if this process may read its
counters: RAPL of Linux, and NVML with nvidia-ml-py.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import math
import os
import resource
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Inputs = dict[str, np.ndarray]  # prompt of one row, by the names of transformers' processors
Generate = Callable[[Callable[[], None]], None]  # calls its argument at each new token
Counter = tuple[str, Callable[[], float], float]  # name, joules until now, and joules after which it starts again at 0
POWERCAP = Path("/sys/class/powercap")


def find_counters() -> list[Counter]:
    """Return the energy counters of CPU packages, memory and NVIDIA GPUs that this process may read."""
    found = list[Counter]()
    for zone in sorted(POWERCAP.glob("intel-rapl:*")):
        with contextlib.suppress(OSError, ValueError):  # most systems let only root read them
            name = (zone / "name").read_text().strip()
            read = lambda zone=zone: int((zone / "energy_uj").read_text()) / 1e6  # noqa: E731
            if name.startswith(("package", "dram")) and read() >= 0:
                found.append((f"RAPL {name}", read, int((zone / "max_energy_range_uj").read_text()) / 1e6))
    with contextlib.suppress(Exception):  # without nvidia-ml-py, a driver or a GPU that counts
        import pynvml

        pynvml.nvmlInit()
        for number in range(pynvml.nvmlDeviceGetCount()):
            device = pynvml.nvmlDeviceGetHandleByIndex(number)
            read = lambda device=device: pynvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1e3  # noqa: E731
            read()
            found.append((f"NVML GPU {number}", read, math.inf))
    return found


def measure(generate: Generate, prompt_tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """Generate once to warm up; return tokens/s and joules of each round, and the names of the counters."""
    generate(lambda: None)
    counters, tokens, rows = find_counters(), options.new_tokens + 1, list[dict[str, float]]()
    for _ in range(options.rounds):
        before, times, start = [read() for _, read, _ in counters], list[float](), time.perf_counter()
        generate(lambda times=times: times.append(time.perf_counter()))
        used = [(read() - joules) % wraps for (_, read, wraps), joules in zip(counters, before, strict=True)]
        if len(times) != tokens:
            sys.exit(f"generated {len(times)} of {tokens} tokens: the engine ended the answer early")
        row = {"prefill": prompt_tokens / (times[0] - start), "decode": (tokens - 1) / (times[-1] - times[0])}
        rows.append(row | ({"joules": sum(used)} if counters else {}))
    return {"rounds": rows, "counters": [name for name, *_ in counters]}


def random_image(side: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))


def make_inputs(folder: Path, tokens: int, side: int) -> Inputs:
    """Return the longest prompt of an image (unless `side` is 0) and words; vLLM expands `placeholders` itself."""
    if not side:
        return {name: np.ones((1, tokens), np.int64) for name in ("input_ids", "attention_mask", "placeholders")}
    from transformers import AutoProcessor

    processor, picture = AutoProcessor.from_pretrained(folder, local_files_only=True), random_image(side)

    def prompt(words: int) -> Inputs:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a" + " a" * words}]}]
        text = processor.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        inputs = processor(images=[picture], text=[text], return_tensors="np", add_special_tokens=False)
        placeholders = processor.tokenizer([text], return_tensors="np", add_special_tokens=False)["input_ids"]
        return {**inputs, "placeholders": placeholders}

    least, more = (prompt(words)["input_ids"].shape[1] for words in (0, 1))
    if least > tokens:
        sys.exit(f"--prompt_tokens={tokens} is too short (an image needs {least}): raise it, or add --no-image")
    return prompt((tokens - least) // max(1, more - least))


def in_vllm(options: argparse.Namespace, inputs: Inputs) -> Generate:
    """Load a folder in vLLM's engine, in this process, so that its memory and threads are those that are measured."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from vllm import LLM, SamplingParams

    limits = {"limit_mm_per_prompt": {"image": 1, "video": 0, "audio": 0}, "mm_processor_cache_gb": 0}
    limits, longest = limits if options.sees else {}, options.prompt_tokens + options.new_tokens + 1
    model = LLM(
        str(options.folder), dtype=options.dtype, max_model_len=longest, max_num_seqs=1, seed=0,
        enable_prefix_caching=False, disable_log_stats=True, **limits,
    )  # fmt: skip
    numbers, engine = itertools.count(), model.llm_engine
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=options.new_tokens + 1)

    def generate(put: Callable[[], None]) -> None:
        number = next(numbers)
        request: dict[str, Any] = {"prompt_token_ids": inputs["placeholders"][0].tolist()}
        if options.side:  # a new image every time, because vLLM caches image features
            request["multi_modal_data"] = {"image": random_image(options.side, number)}
        engine.add_request(str(number), request, sampling)
        while engine.has_unfinished_requests():
            for _ in engine.step():
                put()

    return generate


def in_openvino(options: argparse.Namespace, inputs: Inputs) -> Generate:
    """Convert a folder with optimum-intel, without compression, to a program of OpenVINO."""
    import torch
    from optimum.intel import OVModelForCausalLM, OVModelForVisualCausalLM
    from transformers import GenerationConfig

    precision, tokens = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[options.dtype], options.new_tokens + 1
    settings = dict.fromkeys(("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION"), precision)
    settings["INFERENCE_NUM_THREADS"] = options.threads
    loader = OVModelForVisualCausalLM if options.sees else OVModelForCausalLM
    model = loader.from_pretrained(options.folder, export=True, load_in_8bit=False, ov_config=settings)
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items() if name != "placeholders"}
    limits = GenerationConfig(do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0)

    def generate(put: Callable[[], None]) -> None:
        calls = itertools.count()  # the prompt comes first
        streamer = types.SimpleNamespace(put=lambda _: put() if next(calls) else None, end=lambda: None)
        with torch.inference_mode():
            model.generate(**tensors, generation_config=limits, streamer=streamer)

    return generate


def in_mlx(options: argparse.Namespace, inputs: Inputs) -> Generate:
    """Load a folder in mlx-vlm."""
    import mlx.core as mx
    from mlx_vlm.generate import generate_step
    from mlx_vlm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, dtype, tokens = load_model(options.folder), getattr(mx, options.dtype), options.new_tokens + 1
    model.set_dtype(dtype)
    arrays = {name: mx.array(array) for name, array in inputs.items() if not name.endswith(("holders", "type_ids"))}
    ids, mask, pixels = (arrays.pop(name, None) for name in ("input_ids", "attention_mask", "pixel_values"))
    pixels = None if pixels is None else pixels.astype(dtype)

    def generate(put: Callable[[], None]) -> None:
        for _ in generate_step(ids, model, pixels, mask, max_tokens=tokens, temperature=0.0, **arrays):
            put()

    return generate


ENGINES = {"vllm": (in_vllm, "vllm"), "openvino": (in_openvino, "openvino"), "mlx": (in_mlx, "mlx_vlm")}


def main() -> None:
    """Measure the folder of the command line in its engine, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("folder", type=Path)
    for name, value in (("prompt_tokens", 640), ("new_tokens", 64), ("rounds", 5), ("threads", os.cpu_count())):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--image", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    load, package = ENGINES[options.engine]
    if importlib.util.find_spec(package) is None:
        sys.exit(f"{options.engine} is not installed here: run make engines-{options.engine}, and use its python")
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])  # before libraries count the cores
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines print to standard output as well
    config = json.loads((options.folder / "config.json").read_text())
    options.sees, side = "vision_config" in config, config.get("vision_config", {}).get("image_size", 224)
    options.side = (side if isinstance(side, int) else side[0]) if options.sees and options.image else 0
    inputs = make_inputs(options.folder, options.prompt_tokens, options.side)
    length = inputs["input_ids"].shape[1]
    line = {"prompt_tokens": length, "image": bool(options.side), **measure(load(options, inputs), length, options)}
    line |= {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    print(json.dumps(line), file=out)


if __name__ == "__main__":
    main()
