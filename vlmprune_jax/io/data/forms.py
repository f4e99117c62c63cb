"""Forms of a record besides LLaVA's `conversations`: OpenAI's `messages`, and columns `question` and `answer`."""

from __future__ import annotations

import ast
import itertools
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from vlmprune_jax.base.errors import UserError

IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"
SPEAKERS = {"human": "human", "gpt": "gpt", "user": "human", "assistant": "gpt"}
_MARK = re.compile(r"<image (\d+)>")  # MMMU's, in its questions and options


def from_messages(entry: Mapping[str, Any], location: str) -> dict[str, Any]:
    """Convert a data entry with OpenAI's `messages` [{role, content}] to one with LLaVA's `conversations`.

    A content is a string, or a list of parts: {"type": "text", "text"}, and images as {"type": "image"} (the next of
    the entry's `images`), {"type": "image", "image": PATH} or {"type": "image_url", "image_url": {"url": PATH}}. Videos
    are parts of type video or video_url in the same forms, whose value may be a list of frames. If no message has an
    image (or video), the entry's images (or videos) precede the first message. Raises UserError if a message has
    another form or role, or only some images have a path.
    """
    turns, names = list[dict[str, Any]](), {IMAGE_TOKEN: list[Any](), VIDEO_TOKEN: list[Any]()}
    messages = entry["messages"]
    for number, message in enumerate(messages if isinstance(messages, list) else [None]):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role == "system":
            raise UserError(f"{location}: has a system message: remove it, and set data.system for all records")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        texts = [_part(part, names) for part in parts]
        if role not in SPEAKERS or None in texts:
            raise UserError(
                f"{location}: message {number} must have 'role' user or assistant, and 'content' that is a text or a "
                "list of parts of type text, image, image_url, video or video_url"
            )
        # as chat templates write parts: a placeholder follows a text without a line break
        breaks = ["" if part in names and before not in names else "\n" for before, part in itertools.pairwise(texts)]
        value = "".join(f"{gap}{part}" for gap, part in zip(["", *breaks], texts, strict=False))
        turns.append({"from": role, "value": value})
    rest = {name: value for name, value in entry.items() if name != "messages"}
    for token, key in ((VIDEO_TOKEN, "video"), (IMAGE_TOKEN, "image")):
        if any(name is not None for name in names[token]):
            if None in names[token] or any(rest.get(name) is not None for name in (key, f"{key}s")):
                raise UserError(
                    f"{location}: some {key}s are in messages, others in '{key}s': put all paths into messages, or all "
                    f"into '{key}s'"
                )
            rest[f"{key}s"] = names[token]
        elif turns and not any(token in turn["value"] for turn in turns):
            values = rest.get(f"{key}s") or rest.get(key) or []
            marks = f"{token}\n" * (len(values) if isinstance(values, list) else 1)
            turns[0] = {**turns[0], "value": f"{marks}{turns[0]['value']}"}
    return {**rest, "conversations": turns}


def _part(part: Any, names: Mapping[str, list[Any]]) -> str | None:
    """Return the text of a chat message part, appending a path to the `names` of its token; None if malformed."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return part["text"] if isinstance(part.get("text"), str) else None
    if kind not in ("image", "image_url", "video", "video_url"):
        return None
    token = VIDEO_TOKEN if kind.startswith("video") else IMAGE_TOKEN
    value = part.get(kind)
    names[token].append(value.get("url") if isinstance(value, dict) else value)
    return token


def from_question(entry: Mapping[str, Any], names: Sequence[str], videos: int = 0) -> dict[str, Any]:
    """Convert a data entry with `question` and an optional `answer` to one with LLaVA's `conversations`."""
    row = {name: value for name, value in entry.items() if name not in ("image", "images")}
    if VIDEO_TOKEN not in row["question"]:
        row["question"] = f"{VIDEO_TOKEN}\n" * videos + row["question"]
    return to_entry(row, {"image": list(names)} if names else {})


def to_entry(row: dict[str, Any], images: Mapping[str, list[str]]) -> dict[str, Any]:
    """Convert a table row and its images to an entry in LLaVA's JSON form.

    The question consists of `Context: hint` if there is a hint, `question`, and a line `A. text` for each of its
    `choices` or `options`. A placeholder `<image N>` is replaced by the image of column `image_N`; other images precede
    the text. An answer that is the index of a choice (a whole number; with `options` also a number as text, as in AI2D)
    becomes the choice's letter.
    """
    others = {name: value for name, value in row.items() if value is not None}
    if "conversations" in others or "messages" in others:
        return {**others, "images": list(itertools.chain(*images.values()))}
    name = next((name for name in ("choices", "options") if name in others), "")
    choices = parse_choices(others[name]) if name else []
    lines = [f"Context: {others['hint']}"] if others.get("hint") else []
    lines += [str(others.get("question", ""))]
    lines += [f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, choices or (), strict=False)]
    text, placed = _with_marks("\n".join(lines), images)
    answer = _answer(others.get("answer"), len(choices or ()), by_text=name == "options")
    turns = [{"from": "human", "value": text}] + ([{"from": "gpt", "value": answer}] if answer is not None else [])
    return {**others, "conversations": turns, "images": placed} if others.get("question") else others


def _with_marks(text: str, images: Mapping[str, list[str]]) -> tuple[str, list[str]]:
    """Return the text with one `<image>` placeholder per image, and the images in the placeholders' order."""
    marked = {f"image_{number}" for number in _MARK.findall(text)}
    before = [name for column, names in images.items() if column not in marked for name in names]
    marks = "" if IMAGE_TOKEN in text else f"{IMAGE_TOKEN}\n" * len(before)
    placed: list[str] = []

    def place(mark: re.Match[str]) -> str:
        names = images.get(f"image_{mark[1]}", [])
        placed.extend(names)
        return IMAGE_TOKEN * len(names) or mark[0]

    return marks + _MARK.sub(place, text), before + placed


def _answer(answer: Any, choices: int, *, by_text: bool) -> str | None:
    whole = isinstance(answer, int) and not isinstance(answer, bool)
    if by_text and isinstance(answer, str) and answer.isdecimal():
        answer, whole = int(answer), True
    if whole and 0 <= answer < min(choices, len(string.ascii_uppercase)):
        return string.ascii_uppercase[answer]
    return None if answer is None else str(answer)


def parse_choices(value: Any) -> list[str] | None:
    """Return a question's answer choices, from a list or a list written as text (as in MMMU); None for other values."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return value if isinstance(value, list) and all(isinstance(choice, str) for choice in value) else None
