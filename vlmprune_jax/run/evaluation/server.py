"""Answers of a server with OpenAI's chat completions, such as vLLM's, to the questions of an evaluation set."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from vlmprune_jax.base.errors import UserError, reason
from vlmprune_jax.base.files import MAX_COPY_BYTES, checked, parse_json, read_bytes
from vlmprune_jax.base.journal import Journal, continued, is_of
from vlmprune_jax.io.data.forms import IMAGE_TOKEN, VIDEO_TOKEN
from vlmprune_jax.io.data.media import StoredImage, Video
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.run.evaluation.questions import with_suffix
from vlmprune_jax.run.evaluation.runner import Answers, Progress, Reply

MAX_ANSWER_BYTES = 2**24
SECONDS = 600.0  # timeout of one answer; a busy server queues requests
KEY = "OPENAI_API_KEY"  # environment variable with the key that the server asks for, if any
_MIME = {b"\xff\xd8": "jpeg", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp"}
_Text = Annotated[str, Meta(max_length=2**20)]


class _Served(msgspec.Struct):
    id: Annotated[str, Meta(min_length=1, max_length=1000)]
    owned_by: _Text = ""


class _Models(msgspec.Struct):
    data: Annotated[list[_Served], Meta(max_length=10_000)]


class _Tokens(msgspec.Struct):
    tokens: Annotated[list[int], Meta(max_length=2**20)]


class _Message(msgspec.Struct):
    content: _Text | None = None


class _Choice(msgspec.Struct):
    message: _Message


class _Usage(msgspec.Struct):
    completion_tokens: Annotated[int, Meta(ge=0, le=2**31)]


class _Completion(msgspec.Struct):
    choices: Annotated[list[_Choice], Meta(min_length=1, max_length=100)]
    usage: _Usage


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """HTTP handler that refuses redirects, which could send the API key and images to another host."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


@dataclass(frozen=True)
class Server:
    """OpenAI-compatible server at `url` (ending in "/v1"), and the name of the served model.

    `adds_begin`: True if requests must ask for the tokenizer's begin token, because the model's chat template lacks it.
    """

    url: str
    model: str
    adds_begin: bool = False

    @classmethod
    def connect(cls, url: str) -> Server:
        """Connect to a server, and return it with the name of its single model.

        Raises UserError if the address is not http, no server answers, or the server has no model or several models.
        """
        address = urllib.parse.urlsplit(url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise UserError(f"--server={url}: must be an address such as http://localhost:8000/v1")
        url = url.rstrip("/")
        models = _request(f"{url}/models", None, _Models).data
        if len(models) != 1:
            raise UserError(f"{url}/models: the server lists {len(models)} models, expected 1: serve one model")
        return cls(url, models[0].id, models[0].owned_by == "vllm" and _template_lacks_begin(url, models[0].id))

    def answer(self, record: Record, suffix: str, max_new_tokens: int) -> tuple[str, int]:
        """Return the server's greedy answer to a record's last question, and the answer's length in tokens."""
        body = {
            "model": self.model,
            "messages": _messages(with_suffix(record, suffix)),
            "max_tokens": max_new_tokens,
            "temperature": 0,
            **({"add_special_tokens": True} if self.adds_begin else {}),
        }
        completion = _request(f"{self.url}/chat/completions", body, _Completion)
        return (completion.choices[0].message.content or "").strip(), completion.usage.completion_tokens


def ask_server(
    server: Server,
    records: Sequence[Record],
    *,
    prompt_suffix: str,
    max_new_tokens: int,
    parallel: int,
    progress: Progress,
    journal: Journal | None,
) -> list[Reply]:
    """Return the server's answers to all questions, sending `parallel` requests at a time.

    Args:
      prompt_suffix, max_new_tokens: see `EvaluateSpec`.
      progress: called with the number of batches done.
      journal: stores the answers of each batch, to continue after an interruption.

    Raises UserError if the server refuses a question, or its answer is not a chat completion.
    """
    batches = [records[start : start + parallel] for start in range(0, len(records), parallel)]
    replies = list[Reply]()
    with ThreadPoolExecutor(parallel) as threads:

        def ask(batch: Sequence[Record]) -> list[tuple[str, int]]:
            return list(threads.map(lambda record: server.answer(record, prompt_suffix, max_new_tokens), batch))

        def answers_all(batch: Sequence[Record], entry: Any) -> bool:
            return is_of(Answers, entry) and len(entry) == len(batch)

        answers = continued(ask, batches, journal, answers_all)
        for done, (batch, answered) in enumerate(zip(batches, answers, strict=True), start=1):
            replies += [Reply(record, *answer) for record, answer in zip(batch, answered, strict=True)]
            progress(done)
    return replies


def _messages(record: Record) -> list[dict[str, Any]]:
    """Convert a record's turns before the answer to chat messages, with images and videos as data URLs."""
    if record.part is not None:
        raise UserError(f"record {record.id}: uses a part of its video, and servers take whole files: cut the file")
    turns = record.turns[:-1] if record.turns[-1][0] == "gpt" else record.turns
    images, videos, messages = iter(record.images), iter(record.videos), list[dict[str, Any]]()
    lead = "" if any(IMAGE_TOKEN in text for _, text in turns) else IMAGE_TOKEN * len(record.images)
    for place, (speaker, text) in enumerate(turns):
        if speaker == "gpt":
            messages.append({"role": "assistant", "content": text})
            continue
        content = list[dict[str, Any]]()
        for part in re.split(f"({IMAGE_TOKEN}|{VIDEO_TOKEN})", (lead if place == 0 else "") + text):
            if part == IMAGE_TOKEN:
                content.append({"type": "image_url", "image_url": {"url": _data_url(next(images))}})
            elif part == VIDEO_TOKEN:
                content.append({"type": "video_url", "video_url": {"url": _video_url(next(videos))}})
            elif part.strip():
                content.append({"type": "text", "text": part.strip()})
        messages.append({"role": "user", "content": content})
    return messages


def _template_lacks_begin(url: str, model: str) -> bool:
    """Return True if vLLM's prompts of chats lack the begin token that the model's tokenizer adds to texts.

    Chat templates of LLaVA-1.5 leave the token to the processor, but vLLM calls it without special tokens.
    """
    body = {"model": model, "messages": [{"role": "user", "content": "?"}]}
    with contextlib.suppress(UserError):  # a proxy may pass on only addresses of OpenAI's interface
        as_served, with_begin = (
            _request(f"{url.removesuffix('/v1')}/tokenize", body | {"add_special_tokens": adds}, _Tokens).tokens
            for adds in (False, True)
        )
        return with_begin[1:] == as_served and with_begin[:1] != as_served[:1]
    return False


def _data_url(image: Path | StoredImage) -> str:
    content = _content(image)
    kind = next((kind for start, kind in _MIME.items() if content.startswith(start)), "png")
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _video_url(video: Video) -> str:
    """Return a video as a data URL; a list of frames is joined by commas, as vLLM reads it."""
    files = video if isinstance(video, tuple) else (video,)
    encoded = ",".join(base64.b64encode(_content(file)).decode() for file in files)
    return f"data:video/{'jpeg' if isinstance(video, tuple) else 'mp4'};base64,{encoded}"


def _content(file: Path | StoredImage) -> bytes:
    return read_bytes(file, MAX_COPY_BYTES) if isinstance(file, Path) else file.read_bytes()


def _request(url: str, body: Any, kind: Any) -> Any:
    """Send an HTTP request (POST of JSON, or GET) with limits on time and size; return the parsed response."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    deadline = time.monotonic() + SECONDS
    try:
        with urllib.request.build_opener(_NoRedirects).open(
            urllib.request.Request(url, data, headers), timeout=SECONDS
        ) as answer:
            content = _read(answer, url, deadline)
    except urllib.error.HTTPError as error:
        with error:
            message = reason(Exception(error.read(1000).decode(errors="replace")))
        raise UserError(f"{url}: the server returned HTTP error {error.code} ({message}): check its log") from error
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"{url}: the server does not answer ({reason(error)}): start it, then repeat this command to continue"
        ) from error
    todo = "use a server with OpenAI's chat completions"
    return msgspec.convert(checked(parse_json(content, url, todo), kind, url, todo), kind)


def _read(answer: Any, url: str, deadline: float) -> bytes:
    content = bytearray()
    while part := answer.read1(2**16):
        content += part
        if len(content) > MAX_ANSWER_BYTES or time.monotonic() > deadline:
            raise UserError(
                f"{url}: the answer has more than {MAX_ANSWER_BYTES:,} bytes, or takes more than {SECONDS:.0f} s: "
                "check the server"
            )
    return bytes(content)
