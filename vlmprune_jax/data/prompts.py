"""Conversations to token ids and labels: one way to tokenise and to mask for all templates."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlmprune_jax.core.config import IGNORED, ImageShape
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.files import reading
from vlmprune_jax.data.records import IMAGE_TOKEN, Record
from vlmprune_jax.data.tokenizer_files import TOKENIZER, check_tokenizer_files, without_output
from vlmprune_jax.families import Family, template_of, templates
from vlmprune_jax.families.templates import Template

AUTO = "auto"


def load_tokenizer(folder: Path) -> Any:
    """Return the fast tokenizer of an HF folder (offsets are needed for the label mask); never goes to the hub.

    A `tokenizer.json` is taken as it is: LlamaTokenizer of transformers 5 replaces its normalisation (Phi-3 loses
    a space mark behind `</img>`). Without it the tokenizer's own config names the class; the model's config.json, which
    may name remote code, is not looked at.
    """
    from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast

    check_tokenizer_files(folder)
    todo = "give a folder with tokenizer.json (pip install sentencepiece protobuf if that is what is missing)"
    with reading(f"{folder}: its tokenizer", todo), without_output():
        if os.path.lexists(folder / TOKENIZER):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        else:
            options = {"config": PretrainedConfig(), "trust_remote_code": False, "local_files_only": True}
            tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
            _mark_every_piece(tokenizer)
        if not tokenizer.is_fast:
            raise UserError(f"{folder}: the tokenizer is a slow one without tokenizer.json; convert it")
        tokenizer.model_max_length = sys.maxsize  # what is too long is refused by its record, no warning
        # Switches off truncation and padding stored in the file, before several threads use it; and does it work?
        tokenizer("A word, 1 é\n")
    return tokenizer


def _mark_every_piece(tokenizer: Any) -> None:
    """Put a space mark before every piece of text, as SentencePiece does where `legacy` is true (Phi-3).

    LlamaTokenizer of transformers 5 leaves it out before a piece that begins with a space: `<img> z` loses one.
    """
    from tokenizers import normalizers, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    before = backend.pre_tokenizer
    if isinstance(before, pre_tokenizers.Metaspace) and before.prepend_scheme == "always":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None


def choose_template(
    name: str, family: Family, tokenizer: Any, *, config: Mapping[str, Any], has_vision: bool
) -> Template:
    """Return the template called `name`, or that of the model (`template_of` its `config`) where it is "auto".

    Raises UserError where the tokenizer lacks a token of the template.
    """
    template = template_of(family, config, tokenizer.eos_token) if name == AUTO else templates()[name]
    image = re.findall(r"<[^<>]+>", "".join(template.image_tokens or ()) if has_vision else "")
    needed = (*template.special, *image)
    known = tokenizer.get_vocab()
    missing = [token for token in needed if token not in known]
    if missing:
        raise UserError(
            f"template {template.name}: the tokenizer has no token {', '.join(missing)}; set data.template to one of "
            f"{', '.join(other for other in templates() if other != template.name)}, or use the model's own tokenizer"
        )
    return template


def render(turns: Sequence[tuple[str, str]], template: Template, *, has_image: bool, generation: bool = False) -> str:
    """Return the prompt string; with `generation` it ends with the assistant's role, ready for an answer.

    A turn without text is its bare role, as in the reference (LLaVA conversation.py `get_prompt`). An empty system text
    leaves out its marks as well, which is how `llava-hf` chat templates look.
    """
    text = template.start + (template.system_start + template.system + template.system_end if template.system else "")
    if has_image and template.image_lead:
        turns = _lead_with_image(turns)
    for speaker, content in turns:
        if has_image and template.image_first:
            content = move_images_first(content, template.behind_image)
        if has_image and template.tight_image:
            content = re.sub(rf"\s*{IMAGE_TOKEN}\s*", IMAGE_TOKEN, content)
        role, end = (
            (template.user, template.user_end) if speaker == "human" else (template.assistant, template.assistant_end)
        )
        gap = "" if template.tight_image and has_image and content.startswith(IMAGE_TOKEN) else template.gap
        text += role + gap + content + end if content or template.by_turn else role
    return text + template.assistant if generation else text


def _lead_with_image(turns: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
    """Return the turns, the first with a placeholder if it has none (reference: InternVL `multi_modal_get_item`).

    Only where there is one image; a placeholder in a later turn is plain text then.
    """
    (speaker, first), *rest = turns
    if IMAGE_TOKEN in first or sum(content.count(IMAGE_TOKEN) for _, content in rest) > 1:
        return turns
    return [(speaker, f"{IMAGE_TOKEN}\n{first}"), *rest]


def move_images_first(content: str, behind: str = "\n") -> str:
    """Return the turn with its `<image>` marks in front, `behind` each (reference: `preprocess_multimodal`)."""
    images = content.count(IMAGE_TOKEN)
    if not images:
        return content
    return (f"{IMAGE_TOKEN}{behind}" * images + content.replace(IMAGE_TOKEN, "").strip()).strip()


def tokenize_training(
    record: Record,
    tokenizer: Any,
    template: Template,
    *,
    image_token_id: int,
    tokens_per_image: int,
    cut_text_at: int | None,
    images: Sequence[ImageShape] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (input_ids, labels), both int32[tokens]; labels are IGNORED outside answers and their end marks.

    Every `<image>` becomes `tokens_per_image` copies of `image_token_id` (1 x -200 is the reference's form) for each
    slot of its shape in `images` (None = all stay whole), or the `tokens` that the shape says. With `cut_text_at` (the
    reference's model_max_length) a record without images is cut there, and a malformed round beyond that many tokens
    does not cost the record its labels; None never cuts. A record whose rounds cannot be told apart (an empty turn, a
    separator inside a text) has all labels ignored: the reference's "tokenization mismatch" rule.
    """
    images = _shapes(record, images)
    prompt = _training_prompt(record, template, images)
    tokens = _tokenize(prompt, record, tokenizer, template)
    spans, covered = _turn_spans(record, template, images) if template.by_turn else _answer_spans(prompt, template)
    keep = np.zeros(len(tokens.ids), bool)
    for start, stop in spans:
        # A token of the role may have swallowed the white space that begins the answer: it starts before the answer.
        keep |= (tokens.ends > start) & (tokens.starts >= start) & (tokens.starts < stop)
    repeats = _repeats(tokens.is_image, tokens_per_image, template, images)
    padding = tokenizer.convert_tokens_to_ids(template.padding_mark) if template.padding_mark else None
    if _is_mismatched(tokens, repeats, covered, prompt, padding, cut_text_at):
        keep[:] = False
    keep &= tokens.ids != (IGNORED if padding is None else padding)
    ids = np.where(tokens.is_image, image_token_id, tokens.ids).astype(np.int32)
    labels = np.where(keep & ~tokens.is_image, ids, IGNORED).astype(np.int32)
    ids, labels = np.repeat(ids, repeats), np.repeat(labels, repeats)
    return (ids, labels) if record.images else (ids[:cut_text_at], labels[:cut_text_at])


def prompt_pieces(record: Record, template: Template, images: Sequence[ImageShape]) -> list[str]:
    """Return the texts that `tokenize_training` tokenises, one behind each image written as `<image>`."""
    return _pieces(_training_prompt(record, template, images), record, template)


def count_tokens(prompts: Sequence[Sequence[str]], tokenizer: Any) -> np.ndarray:
    """Return int64[prompts]: the tokens of each prompt's pieces, a leading BOS once; on all cores, in Rust.

    Faster than tokenising for training, which needs every token's place in the text.
    """
    encoded = tokenizer.backend_tokenizer.encode_batch_fast([piece for pieces in prompts for piece in pieces])
    lengths = iter([len(encoding) for encoding in encoded])
    bos = len(tokenizer("")["input_ids"])
    return np.array([sum(next(lengths) for _ in p) - bos * (len(p) - 1) for p in prompts], np.int64)


def tokenize_prompt(
    record: Record,
    tokenizer: Any,
    template: Template,
    *,
    image_token_id: int,
    tokens_per_image: int,
    images: Sequence[ImageShape] | None = None,
) -> np.ndarray:
    """Return int32[tokens]: the conversation up to its last answer, ending with the assistant's role."""
    turns = record.turns[:-1] if record.turns[-1][0] == "gpt" else record.turns
    images = _shapes(record, images)
    prompt = render(turns, template, has_image=bool(record.images), generation=True)
    tokens = _tokenize(_write_images(prompt, record, template, images), record, tokenizer, template)
    ids = np.where(tokens.is_image, image_token_id, tokens.ids).astype(np.int32)
    return np.repeat(ids, _repeats(tokens.is_image, tokens_per_image, template, images))


def _is_mismatched(
    tokens: _Tokens, repeats: np.ndarray, covered: int, prompt: str, padding: int | None, cut_text_at: int | None
) -> bool:
    """Whether the reference loses count of a record's tokens, unless it has counted up to where it cuts.

    `padding`: the id that its phi3-chat mask takes for padding; it counts images written out, and an end mark behind
    an empty answer. LLaVA's and Bunny's masks count one token an image.
    """
    found = tokens.starts < covered
    if padding is None:
        return covered != len(prompt) and (cut_text_at is None or int(np.count_nonzero(found)) < cut_text_at)
    counted = int(repeats[found].sum()) + (covered > len(prompt))
    real = np.repeat(tokens.ids != padding, repeats)[:cut_text_at]
    return counted != int(np.count_nonzero(real)) and (cut_text_at is None or counted < cut_text_at)


def _shapes(record: Record, images: Sequence[ImageShape] | None) -> Sequence[ImageShape]:
    return [ImageShape()] * len(record.images) if images is None else images


def _training_prompt(record: Record, template: Template, images: Sequence[ImageShape]) -> str:
    return _write_images(render(record.turns, template, has_image=bool(record.images)), record, template, images)


def _write_images(prompt: str, record: Record, template: Template, images: Sequence[ImageShape]) -> str:
    """Return the prompt with its first placeholders, one per image, as image tokens, each context token once."""
    if template.image_tokens is None:
        return prompt
    first, *rest = prompt.split(IMAGE_TOKEN, len(record.images))
    context = template.image_tokens[1]
    if any(context in text for text in (first, *rest)):
        raise UserError(f"record {record.id}: its text holds {context}, which marks image positions; remove it")
    if template.videos is not None and template.videos in prompt:
        raise UserError(
            f"record {record.id}: its text holds {template.videos}, and no model here takes videos; drop it"
        )
    return first + "".join(template.image_text(image) + text for image, text in zip(images, rest, strict=False))


def _repeats(
    is_image: np.ndarray, tokens_per_image: int, template: Template, images: Sequence[ImageShape]
) -> np.ndarray:
    """Return how many positions each token takes."""
    repeats = np.ones(len(is_image), np.int64)
    each = [(template.context_tokens(image), image.positions(tokens_per_image)) for image in images]
    of_marks = [positions // marks for marks, positions in each for _ in range(marks)]
    repeats[is_image] = of_marks[: int(np.count_nonzero(is_image))]
    return repeats


def _pieces(prompt: str, record: Record, template: Template) -> list[str]:
    return prompt.split(IMAGE_TOKEN) if record.images and template.image_tokens is None else [prompt]


class _Tokens(NamedTuple):
    """Arrays [tokens]: ids, character places in the prompt (-1 for BOS, so that no span holds it), is it an image."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    is_image: np.ndarray


def _tokenize(prompt: str, record: Record, tokenizer: Any, template: Template) -> _Tokens:
    """Return the tokens of a prompt; without image tokens the text between images is tokenised piece by piece.

    A leading BOS is kept once and dropped from later pieces (reference: `tokenizer_image_token`).
    """
    ids: list[int] = []
    places: list[tuple[int, int]] = []
    is_image: list[bool] = []
    offset = 0
    for number, piece in enumerate(_pieces(prompt, record, template)):
        if number:
            ids.append(0)
            places.append((offset, offset + len(IMAGE_TOKEN)))
            is_image.append(True)
            offset += len(IMAGE_TOKEN)
        with reading(f"record {record.id}: its text", "drop the record, or use another tokenizer"):
            encoded = tokenizer(piece, return_offsets_mapping=True, return_attention_mask=False)
        piece_ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        has_bos = bool(piece_ids) and piece_ids[0] == tokenizer.bos_token_id and spans[0][1] == 0
        if has_bos and not number:
            ids.append(piece_ids[0])
            places.append((-1, -1))
        ids += piece_ids[has_bos:]
        places += [(offset + start, offset + end) for start, end in spans[has_bos:]]
        is_image += [False] * (len(ids) - len(is_image))
        offset += len(piece)
    starts, ends = np.array(places, np.int64).reshape(-1, 2).T
    found = np.array(is_image, bool)
    if record.images and template.image_tokens is not None:
        found = np.array(ids, np.int64) == tokenizer.convert_tokens_to_ids(template.image_tokens[1])
    # What int32 does not hold no vocabulary has either: it is refused as such.
    return _Tokens(np.minimum(np.array(ids, np.int64), 2**31 - 1).astype(np.int32), starts, ends, found)


def _turn_spans(record: Record, template: Template, images: Sequence[ImageShape]) -> tuple[list[tuple[int, int]], int]:
    """Return the character spans of the answers with their end marks, and the length of the prompt."""
    has_image = bool(record.images)
    turns: Sequence[tuple[str, str]] = record.turns
    if has_image and template.image_lead:
        turns, template = _lead_with_image(turns), replace(template, image_lead=False)
    until = [
        len(_write_images(render(turns[:n], template, has_image=has_image), record, template, images))
        for n in range(len(turns) + 1)
    ]
    role, space = len(template.assistant), len(template.assistant_end) - len(template.assistant_end.rstrip())
    answers = [n for n, (speaker, _) in enumerate(turns) if speaker != "human"]
    return [(until[n] + role, until[n + 1] - space) for n in answers], until[-1]


def _answer_spans(prompt: str, template: Template) -> tuple[list[tuple[int, int]], int]:
    """Return the character spans that are learnt, and how far the rounds could be followed from the start.

    A round is what ends with the assistant's end mark, which may end the system text and the question as well; it must
    hold the assistant's role exactly once.
    """
    end = template.assistant_end
    role = template.user_end + template.assistant + template.gap
    marks = 1 + (template.user_end == end)
    pieces = prompt.split(end)
    spans: list[tuple[int, int]] = []
    covered = 0
    first = marks + (template.system_end == end and bool(template.system))
    for begin in (0, *range(first, len(pieces), marks)):
        text = end.join(pieces[begin : begin + marks if begin else first])
        if text.count(role) != 1:  # the empty rest behind the last end mark, or a round that cannot be told apart
            break
        start = covered + text.index(role) + len(role) - len(template.gap)
        covered += len(text) + len(end)
        spans.append((start, covered))
    return spans, covered
