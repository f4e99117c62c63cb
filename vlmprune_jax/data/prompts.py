"""Conversations to token ids and labels: a table of templates, and one way to tokenise and to mask for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlmprune_jax.data.records import IMAGE_TOKEN, Record
from vlmprune_jax.errors import UserError

IGNORE = -100


@dataclass(frozen=True)
class Template:
    """How turns become one string: `system + system_end`, then per turn `role + gap + text + end`.

    `image_first` moves the placeholders of a turn in front of its stripped text, one a line.
    """

    name: str
    system: str
    system_end: str
    user: str
    user_end: str
    assistant: str
    assistant_end: str
    gap: str
    image_first: bool


_LLAVA_V1 = Template(
    name="llava_v1",
    system="A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    system_end=" ",
    user="USER:",
    user_end=" ",
    assistant="ASSISTANT:",
    assistant_end="</s>",
    gap=" ",
    image_first=True,
)
TEMPLATES = {
    template.name: template for template in (_LLAVA_V1, replace(_LLAVA_V1, name="bunny", assistant_end="<|endoftext|>"))
}


def load_tokenizer(folder: Path) -> Any:
    """Return the fast tokenizer of an HF folder (offsets are needed for the label mask); never goes to the hub."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises OSError, ValueError, TypeError, ... for a broken folder
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: no loadable tokenizer ({reason}); give a folder with tokenizer.json") from error
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: the tokenizer is a slow one without tokenizer.json; convert it")
    tokenizer("")  # switches off truncation and padding stored in the file, before several threads use it
    return tokenizer


def render(turns: Sequence[tuple[str, str]], template: Template, *, has_image: bool, generation: bool = False) -> str:
    """Return the prompt string; with `generation` it ends with the assistant's role, ready for an answer.

    A turn without text is its bare role, as in the reference (LLaVA conversation.py `get_prompt`). An empty system text
    leaves out its end mark as well, which is how `llava-hf` chat templates look.
    """
    text = template.system + template.system_end if template.system else ""
    for speaker, content in turns:
        if has_image and template.image_first:
            content = move_images_first(content)
        role, end = (
            (template.user, template.user_end) if speaker == "human" else (template.assistant, template.assistant_end)
        )
        text += role + template.gap + content + end if content else role
    return text + template.assistant if generation else text


def move_images_first(content: str) -> str:
    """Return the turn with its `<image>` marks in front, one a line (reference: `preprocess_multimodal`)."""
    images = content.count(IMAGE_TOKEN)
    if not images:
        return content
    return (f"{IMAGE_TOKEN}\n" * images + content.replace(IMAGE_TOKEN, "").strip()).strip()


def tokenize_training(
    record: Record,
    tokenizer: Any,
    template: Template,
    *,
    image_token_id: int,
    tokens_per_image: int,
    cut_text_at: int | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (input_ids, labels), both int32[tokens]; labels are IGNORE outside answers and their end marks.

    Every `<image>` becomes `tokens_per_image` copies of `image_token_id` (1 x -200 is the reference's form). With
    `cut_text_at` (the reference's model_max_length) a record without images is cut there, and a malformed round
    beyond that many tokens does not cost the record its labels; None never cuts.
    A record whose rounds cannot be told apart (an empty turn, a separator inside a text) has all labels ignored: the
    reference's "tokenization mismatch" rule.
    """
    prompt = render(record.turns, template, has_image=bool(record.images))
    ids, ends, is_image = _tokenize(prompt, tokenizer, has_image=bool(record.images))
    spans, covered = _answer_spans(prompt, template)
    keep = np.zeros(len(ids), bool)
    for start, stop in spans:
        keep |= (ends > start) & (ends <= stop)
    if covered < len(prompt) and (cut_text_at is None or np.count_nonzero(ends <= covered) < cut_text_at):
        keep[:] = False
    ids[is_image] = image_token_id
    labels = np.where(keep & ~is_image, ids, IGNORE).astype(np.int32)
    if cut_text_at is not None and not record.images:
        ids, labels, is_image = ids[:cut_text_at], labels[:cut_text_at], is_image[:cut_text_at]
    repeats = np.where(is_image, tokens_per_image, 1)
    return np.repeat(ids, repeats), np.repeat(labels, repeats)


def tokenize_prompt(
    record: Record, tokenizer: Any, template: Template, *, image_token_id: int, tokens_per_image: int
) -> np.ndarray:
    """Return int32[tokens]: the conversation up to its last answer, ending with the assistant's role."""
    turns = record.turns[:-1] if record.turns[-1][0] == "gpt" else record.turns
    prompt = render(turns, template, has_image=bool(record.images), generation=True)
    ids, _, is_image = _tokenize(prompt, tokenizer, has_image=bool(record.images))
    ids[is_image] = image_token_id
    return np.repeat(ids, np.where(is_image, tokens_per_image, 1))


def _tokenize(prompt: str, tokenizer: Any, *, has_image: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (ids, end offset in `prompt`, is image) per token; the text between images is tokenised piece by piece.

    A leading BOS is kept once and dropped from later pieces (reference: `tokenizer_image_token`). Its end is -1, so no
    span holds it.
    """
    ids: list[int] = []
    ends: list[int] = []
    is_image: list[bool] = []
    offset = 0
    for number, piece in enumerate(prompt.split(IMAGE_TOKEN) if has_image else [prompt]):
        if number:
            offset += len(IMAGE_TOKEN)
            ids.append(0)
            ends.append(offset)
            is_image.append(True)
        encoded = tokenizer(piece, return_offsets_mapping=True, return_attention_mask=False)
        piece_ids, piece_ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
        has_bos = bool(piece_ids) and piece_ids[0] == tokenizer.bos_token_id and piece_ends[0] == 0
        if has_bos and not number:
            ids.append(piece_ids[0])
            ends.append(-1)
        ids += piece_ids[has_bos:]
        ends += [offset + end for end in piece_ends[has_bos:]]
        is_image += [False] * (len(ids) - len(is_image))
        offset += len(piece)
    return np.array(ids, np.int32), np.array(ends, np.int64), np.array(is_image, bool)


def _answer_spans(prompt: str, template: Template) -> tuple[list[tuple[int, int]], int]:
    """Return the character spans that are learnt, and how far the rounds could be followed from the start.

    A round is what ends with the assistant's end mark; it must hold the assistant's role exactly once.
    """
    role = template.user_end + template.assistant + template.gap
    spans: list[tuple[int, int]] = []
    covered = 0
    for text in prompt.split(template.assistant_end):
        if text.count(role) != 1:  # the empty rest behind the last end mark, or a round that cannot be told apart
            break
        start = covered + text.index(role) + len(role) - len(template.gap)
        covered += len(text) + len(template.assistant_end)
        spans.append((start, covered))
    return spans, covered
