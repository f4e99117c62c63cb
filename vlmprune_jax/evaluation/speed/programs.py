"""The engines: each loads a model's files and computes one prompt, and tokens after it, as often as it is asked."""

from __future__ import annotations

import base64
import importlib
import inspect
import io
from collections.abc import Callable
from typing import Any

import numpy as np

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.files import parse_json
from vlmprune_jax.evaluation.speed.clock import Program
from vlmprune_jax.families.gguf import ENGINE

Job = dict[str, Any]


def in_jax(job: Job) -> Program:
    """Our forward pass, compiled.

    `job`: model, vision_dir, dtype, ids, pixels (a shape, or None), grids (of images of any size, or None),
    image_token, new_tokens.
    """
    from vlmprune_jax.hf.read import load
    from vlmprune_jax.models.generate import compile_generation

    model = load(job["model"], vision_dir=job["vision_dir"], dtype=job["dtype"])
    ids = np.asarray(job["ids"], np.int32)
    images = {"pixel_values": _pixels(job), "image_grid_thw": job["grids"] and np.asarray(job["grids"])}
    return compile_generation(model, ids, **images, max_new_tokens=job["new_tokens"] + 1)


class InTransformers:
    """transformers' `generate` on torch. `job`: see `in_jax`, and loader (module and class), by_row, threads."""

    def __init__(self, job: Job):
        import torch
        import transformers

        torch.set_num_threads(job["threads"])
        module, name = job["loader"]
        loader = getattr(importlib.import_module(module), name)
        options = {"dtype": getattr(torch, job["dtype"]), "local_files_only": True}
        self.model = loader.from_pretrained(job["model"], **options).eval()
        ids, pixels = torch.tensor(job["ids"]), _pixels(job)
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if pixels is not None:
            shown = torch.from_numpy(pixels if job["by_row"] else pixels[:, 0])
            if job["grids"]:
                shown, self.inputs["image_grid_thw"] = shown[0], torch.tensor(job["grids"][0])
                if "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:  # from version 5 on
                    self.inputs["mm_token_type_ids"] = (ids == job["image_token"]).int()
            self.inputs["pixel_values"] = shown.to(self.model.dtype)
        self.new_tokens = job["new_tokens"]
        self.mode, self.settings = torch.inference_mode, transformers.GenerationConfig

    def prefill(self) -> None:
        """Compute the prompt and its first token."""
        self._generate(1)

    def generate(self) -> None:
        """Compute the prompt and all new tokens."""
        self._generate(self.new_tokens + 1)

    def _generate(self, tokens: int) -> None:
        settings = self.settings(do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0)
        with self.mode():
            found = self.model.generate(**self.inputs, generation_config=settings)
        made = found.shape[1] - self.inputs["input_ids"].shape[1]
        if made != tokens:
            raise UserError(f"generated {made} of {tokens} tokens")


class InLlamaCpp:
    """llama.cpp's server without the network.

    `job`: model, mmproj (or None), image_size, ids, prompt_tokens, context, new_tokens, threads.
    `prompt_tokens`: of the prompt as llama.cpp counts them.

    Raises:
      UserError: it does not load the file, does not answer, or an image fills the whole prompt.
    """

    def __init__(self, job: Job):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_parallel, params.warmup, params.verbosity = job["model"], 1, False, -1
        params.n_ctx, params.cache_ram_mib, params.cache_prompt = job["context"], 0, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
        if job["mmproj"] is not None:
            params.mmproj.path = job["mmproj"]
        try:
            self.server = xllamacpp.Server(params)
        except RuntimeError as error:  # it says no more than that
            raise UserError(
                "llama.cpp does not load it: it is damaged, too large, or needs another build of llama.cpp"
            ) from error
        self.new_tokens, self.prompt_tokens = job["new_tokens"], job["prompt_tokens"]
        self.asked: Job = {"prompt": job["ids"][0]}
        if job["mmproj"] is not None:
            self._show(job["image_size"])

    def prefill(self) -> None:
        """Compute the prompt and its first token."""
        self._ask(1)

    def generate(self) -> None:
        """Compute the prompt and all new tokens."""
        self._ask(self.new_tokens + 1)

    def _show(self, side: int) -> None:
        """Make a prompt of an image and as many words as are left."""
        from PIL import Image

        noise, file = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8), io.BytesIO()
        Image.fromarray(noise).save(file, "PNG")
        url, wanted = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}", self.prompt_tokens

        def count(words: int) -> int:
            shown = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "a" + " a" * words}]
            self.asked = {"messages": [{"role": "user", "content": shown}]}
            return self._ask(1)

        try:
            least, more = count(0), count(1)
            if least > wanted:
                raise UserError(f"they have {least} tokens")
        except UserError as error:
            raise UserError(
                f"--prompt_tokens={wanted}: an image and its chat template do not fit ({error}): raise it, or set "
                "--image=False"
            ) from error
        self.prompt_tokens = count((wanted - least) // max(1, more - least))

    def _ask(self, tokens: int) -> int:
        """Generate; returns the tokens of the prompt."""
        call = self.server.handle_chat_completions if "messages" in self.asked else self.server.handle_completions
        settings = {"max_tokens": tokens, "temperature": 0.0, "cache_prompt": False, "ignore_eos": True}
        answer = call({**self.asked, **settings})
        answer = answer if isinstance(answer, dict) else parse_json(answer, "what llama.cpp says", "report it")
        if "error" in answer:
            raise UserError(answer["error"].get("message", answer["error"]))
        used = answer["usage"]
        if used["completion_tokens"] != tokens:
            raise UserError(f"generated {used['completion_tokens']} of {tokens} tokens")
        if (used.get("prompt_tokens_details") or {}).get("cached_tokens"):
            raise UserError("llama.cpp took a part of the prompt from its cache: report it")
        return int(used["prompt_tokens"])


ENGINES: dict[str, Callable[[Job], Program]] = {
    "jax": in_jax, "transformers": InTransformers, ENGINE: InLlamaCpp
}  # fmt: skip


def _pixels(job: Job) -> np.ndarray | None:
    """float32[1, 1, channels, height, width] (or [1, 1, patches, values]) of noise, or None."""
    shape: list[int] | None = job["pixels"]
    return None if shape is None else np.random.default_rng(0).standard_normal(tuple(shape), np.float32)
