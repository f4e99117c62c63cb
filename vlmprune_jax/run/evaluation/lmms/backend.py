"""The model `vlmprune_jax` of lmms-eval: answers requests greedily with the JAX model, in batches, on a mesh.

python -m lmms_eval --model vlmprune_jax --model_args pretrained=DIR,dtype=bfloat16,fsdp=-1 --batch_size 32 --tasks ...

Only this module and the entry point (`manifest`) import lmms_eval.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from PIL.Image import Image
from tqdm import tqdm

from vlmprune_jax.base.checks import suggest
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import read_bytes
from vlmprune_jax.base.settings import check_settings, override
from vlmprune_jax.core.mesh.mesh import initialize, mesh_of, mesh_of_spec, row_ways
from vlmprune_jax.core.models.generate import on_decoding_mesh
from vlmprune_jax.core.sections import MeshSpec, ModelSpec
from vlmprune_jax.io.checkpoints.read import load, resolve
from vlmprune_jax.io.data.batching import PREFETCH
from vlmprune_jax.io.data.config import ROW_SETTINGS, DataSpec
from vlmprune_jax.io.data.forms import IMAGE_TOKEN, VIDEO_TOKEN
from vlmprune_jax.io.data.inputs import load_inputs
from vlmprune_jax.io.data.media import StoredImage
from vlmprune_jax.io.data.records import Record, make_record
from vlmprune_jax.run.evaluation.config import EvaluateSpec
from vlmprune_jax.run.evaluation.questions import arrange_questions
from vlmprune_jax.run.evaluation.runner import Answer, ask

# Default of requests without a limit, as in lmms-eval's own models.
NEW_TOKENS = 1024
# Minimum number of new tokens, even for prompts that fill the trained positions: rotary positions continue.
LEAST_NEW_TOKENS = 128


class VlmpruneJax(lmms):
    """lmms-eval model `vlmprune_jax`, which loads a model folder; its arguments come from `--model_args`.

    Args:
      pretrained: model folder or hub id.
      batch_size: rows per batch, also set by `--batch_size`; "auto" means the default of `evaluate.batch_size`.
      dtype: data type of the weights in memory.
      vision_dir: folder of the vision tower, if it is not in `pretrained`.
      data, fsdp, tensor: sizes of the device mesh.
      device, max_batch_size: options of lmms-eval for PyTorch; must not be set.
      settings: settings of the section `data` (`ROW_SETTINGS`); the default prompt format is the family's (`template`,
        `system`).

    Raises UserError if an argument or value is unknown, or the folder cannot be read.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "",
        batch_size: int | str = "auto",
        dtype: str = "float32",
        vision_dir: str | None = None,
        data: int = 1,
        fsdp: int = 1,
        tensor: int = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        unknown = next((name for name in settings if name not in ROW_SETTINGS), None)
        if unknown is not None:
            known = ("pretrained", "batch_size", "dtype", "vision_dir", "data", "fsdp", "tensor", *ROW_SETTINGS)
            raise UserError(f"--model_args: vlmprune_jax has no argument {unknown!r}{suggest(unknown, known)}")
        if not pretrained:
            raise UserError("--model_args: vlmprune_jax needs pretrained=DIR, a Hugging Face model folder")
        if device is not None or max_batch_size is not None:
            raise UserError(
                "--device, --max_batch_size: not supported, because jax chooses the devices: leave both out"
            )
        size = int(batch_size) if str(batch_size).isdecimal() else batch_size
        rows = override(EvaluateSpec(), {} if size == "auto" else {"batch_size": size}, "lmms-eval: -").batch_size
        initialize(None, None, None)
        mesh = override(MeshSpec(), {"data": data, "fsdp": fsdp, "tensor": tensor}, "--model_args")
        folders = {"hf_dir": pretrained, **({} if vision_dir is None else {"vision_dir": vision_dir})}
        spec = override(ModelSpec(), {name: str(resolve(str(folder))) for name, folder in folders.items()})
        spec = override(spec, {"dtype": dtype}, "--model_args")
        check_settings("--model_args", spec, elsewhere=True)
        data_spec = override(DataSpec(), settings, "--model_args")
        model = load(spec.hf_dir, vision_dir=spec.vision_dir, dtype=spec.dtype, mesh=mesh_of_spec(mesh))
        model = on_decoding_mesh(model)
        inputs = load_inputs(spec, data_spec, model.cfg)
        for note in inputs.notes:  # a prompt that differs from the model folder's own
            print(f"vlmprune_jax: {note}", file=sys.stderr)
        super().__init__()
        self._model, self._inputs, self._rows = model, inputs, rows

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Return greedy answers to lmms-eval requests.

        Stop texts (`until`) are ignored, as in lmms-eval's transformers models. Raises UserError if a request needs
        sampling or beam search, or has an input that the model cannot read.
        """
        start = time.perf_counter()
        groups: dict[int, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(_new_tokens(request), []).append(place)
        replies: dict[int, Answer] = {}
        for max_new_tokens, places in groups.items():
            pictures = _Pictures(self.task_dict)
            records = [pictures.record(requests[place]) for place in places]
            replies |= zip(places, self._replies(records, max_new_tokens), strict=True)
        tokens, seconds = sum(reply.tokens for reply in replies.values()), time.perf_counter() - start
        log_metrics(total_gen_tokens=tokens, total_elapsed_time=seconds, avg_speed=tokens / max(seconds, 1e-9))
        ordered = (replies[place] for place in range(len(requests)))
        return [GenerationResult(reply.prediction, TokenCounts(output_tokens=reply.tokens)) for reply in ordered]

    def _replies(self, records: Sequence[Record], max_new_tokens: int) -> list[Answer]:
        """Return greedy answers of at most `max_new_tokens` tokens, in the order of the records."""
        cfg, mesh = self._model.cfg, mesh_of(self._model.params)
        counts = {max(1, len(record.visuals)) for record in records}
        data = dataclasses.replace(self._inputs.data, max_images=max(counts))
        encoder = dataclasses.replace(self._inputs, data=data).encoder(cfg, 0)
        if not encoder.tile_buckets:  # one padded shape per number of images and videos keeps padding small
            encoder = dataclasses.replace(encoder, tile_buckets=tuple(sorted(counts)))
        arranged = arrange_questions(records, encoder, batch_size=self._rows, multiple=row_ways(mesh), by_length=True)
        with tqdm(total=len(arranged), desc="Model Responding") as bar:  # as lmms-eval's own models
            return ask(
                self._model,
                arranged.batches(threads=data.threads, prefetch=PREFETCH, mesh=mesh),
                tokenizer=encoder.tokenizer,
                max_new_tokens=min(max_new_tokens, max(cfg.text.max_positions - arranged.longest, LEAST_NEW_TOKENS)),
                progress=lambda done: bar.update(done - bar.n) and None,
            )

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Raise UserError for tasks that need log-likelihoods, which lmms-eval does not support for chat models."""
        raise UserError(
            "vlmprune_jax: tasks with log-likelihoods are not supported: use tasks with output_type generate_until"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raise UserError for tasks with several question rounds."""
        raise UserError(
            "vlmprune_jax: tasks with several rounds are not supported: use tasks with output_type generate_until"
        )


def _new_tokens(request: Any) -> int:
    """Return the maximum number of new tokens that an lmms-eval request allows."""
    options, task = request.args[2], request.args[4]
    temperature = options.get("temperature")
    wrong = {
        "temperature": temperature not in (None, 0),
        "do_sample": bool(options.get("do_sample")) and temperature is None,
        "num_beams": options.get("num_beams") not in (None, 1),
        "repetition_penalty": options.get("repetition_penalty") not in (None, 1),
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise UserError(
                f"task {task}: generation_kwargs {name}={options[name]}, but vlmprune_jax decodes greedily: set "
                "temperature: 0, num_beams: 1, do_sample: false (--gen_kwargs), or leave the task out"
            )
    return int(options.get("max_new_tokens") or NEW_TOKENS)


class _Pictures:
    """Image store for lmms-eval requests: finds pictures by pixel digest, and reloads them from their documents."""

    def __init__(self, task_dict: Mapping[str, Any]) -> None:
        self._task_dict = task_dict
        self._where: list[tuple[Any, int]] = []  # number -> (request, index of the picture in it)
        self._numbers: dict[str, int] = {}

    @property
    def identity(self) -> str:
        """Digest of all pictures in the store."""
        return hashlib.sha256("".join(self._numbers).encode()).hexdigest()[:16]

    def find(self, name: str, location: str) -> Path | StoredImage:
        """Return the stored picture with this digest, or the path of a video."""
        del location
        return StoredImage(name, self._numbers[name], self) if name in self._numbers else Path(name)

    def read(self, number: int) -> bytes:
        """Return a picture in a lossless image format, as bytes."""
        request, place = self._where[number]
        picture = self._messages(request).extract_media()[0][place]
        if isinstance(picture, str):
            return read_bytes(Path(picture))
        picture = picture if picture.mode in ("RGB", "RGBA", "L", "LA", "P", "1") else picture.convert("RGB")
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", compress_level=0)
        return buffer.getvalue()

    def _messages(self, request: Any) -> ChatMessages:
        _, doc_to_messages, _, doc, task, split = request.args
        return ChatMessages(messages=doc_to_messages(self._task_dict[task][split][doc]))

    def record(self, request: Any) -> Record:
        """Convert an lmms-eval request to a record whose last question is unanswered."""
        task, doc = request.args[4], request.args[3]
        name, turns, names, videos = f"{task}/{doc}", list[dict[str, str]](), list[str](), list[str]()
        part = dict[str, Any]()
        for message in self._messages(request).messages:
            if message.role == "system":
                raise UserError(
                    f"{name}: system messages of single requests are not supported: set system=TEXT in --model_args "
                    "for all requests"
                )
            texts = []
            for content in message.content:
                if content.type == "text":
                    for token in (IMAGE_TOKEN, VIDEO_TOKEN):
                        if token in content.text:
                            raise UserError(f"{name}: its text contains the token {token}: remove it")
                    texts.append(content.text)
                elif content.type == "image":
                    texts.append(IMAGE_TOKEN)
                    names.append(self._number(content.url, request, len(names), name))
                elif content.type == "video":
                    texts.append(VIDEO_TOKEN)
                    if not isinstance(content.url, str) or "://" in content.url:
                        raise UserError(f"{name}: its video is {str(content.url)[:100]!r}, expected the path of a file")
                    videos.append(content.url)
                    part = {"start": content.start_time, "end": content.end_time}
                else:
                    raise UserError(
                        f"{name}: contains {content.type}, which this model does not take: leave the task out"
                    )
            turns.append({"from": "human" if message.role == "user" else "gpt", "value": "\n".join(texts)})
        entry = {"id": name, "conversations": turns, "images": names, "videos": videos, **part}
        return make_record(entry, 0, PurePath("lmms-eval"), self, False)

    def _number(self, picture: Any, request: Any, place: int, name: str) -> str:
        """Return an image's hash, and remember which lmms-eval document contains the image."""
        if isinstance(picture, str):
            digest = hashlib.sha256(picture.encode())
        elif isinstance(picture, Image):
            digest = hashlib.sha256(json.dumps([picture.mode, picture.size]).encode() + picture.tobytes())
        else:
            raise UserError(f"{name}: its image is a {type(picture).__name__}, expected a Pillow image or a path")
        key = digest.hexdigest()[:20]
        if key not in self._numbers:
            self._numbers[key] = len(self._where)
            self._where.append((request, place))
        return key
