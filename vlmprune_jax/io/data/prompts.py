"""Conversations to token ids and labels, in the same way for all templates."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlmprune_jax.base.console import without_output
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import reading
from vlmprune_jax.core.config import IGNORED, ModelConfig
from vlmprune_jax.core.models.vlm import Model, config_of
from vlmprune_jax.io.data.forms import IMAGE_TOKEN, VIDEO_TOKEN
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.io.data.tokenizer_files import TOKENIZER, check_tokenizer_files
from vlmprune_jax.io.families.templates import Template
from vlmprune_jax.io.families.tiles import ImageShape


def load_tokenizer(folder: Path) -> Any:
    """Load the fast tokenizer of a Hugging Face folder, without network access.

    Label masks need the character offsets of a fast tokenizer. A `tokenizer.json` is loaded unchanged, because
    transformers 5's LlamaTokenizer replaces its normalisation (Phi-3 loses a space symbol after `</img>`). Without this
    file, tokenizer_config.json names the class; the model's config.json is not read, because it may name remote code.
    """
    from tokenizers import normalizers, pre_tokenizers
    from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast

    check_tokenizer_files(folder)
    todo = "use a folder with tokenizer.json (or pip install sentencepiece protobuf if these are missing)"
    with reading(f"{folder}: its tokenizer", todo), without_output():
        if os.path.lexists(folder / TOKENIZER):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        else:
            options = {"config": PretrainedConfig(), "trust_remote_code": False, "local_files_only": True}
            tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
            # transformers 5's LlamaTokenizer omits the space symbol before a piece that begins with a space, which
            # SentencePiece writes with `legacy` (Phi-3: `<img> z` loses one)
            backend = tokenizer.backend_tokenizer
            split = backend.pre_tokenizer
            if isinstance(split, pre_tokenizers.Metaspace) and split.prepend_scheme == "always":
                backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
                backend.pre_tokenizer = None
        if not tokenizer.is_fast:
            raise UserError(f"{folder}: has no tokenizer.json: convert its slow tokenizer to a fast one")
        tokenizer.model_max_length = sys.maxsize  # long records raise errors elsewhere; no warning
        # the first call switches off stored truncation and padding, before several threads use the tokenizer
        tokenizer("A word, 1 é\n")
    return tokenizer


class Rendered(NamedTuple):
    """Prompt text, the character spans (start, stop) of its answers with their end tokens, and its text pieces.

    Pieces are tokenised separately; they are the texts between images if images have no tokens of their own.
    """

    text: str
    answers: list[tuple[int, int]]
    pieces: list[str]


def render(
    turns: Sequence[tuple[str, str]],
    template: Template,
    *,
    has_image: bool,
    has_video: bool = False,
    generation: bool = False,
    visuals: Iterable[str] = (),
) -> Rendered:
    """Format a conversation as prompt text; with `generation`, the prompt ends where the assistant's answer begins.

    A turn without text consists only of its role, as in the reference (LLaVA conversation.py `get_prompt`). An empty
    system text omits its start and end as well, as in `llava-hf` chat templates. In conversations with a video, all
    placeholders stay at their positions. `visuals`: texts that replace the placeholders in order.
    """
    placeholder = "|".join([IMAGE_TOKEN] * has_image + [VIDEO_TOKEN] * has_video)
    text = template.start + (template.system_start + template.system + template.system_end if template.system else "")
    unplaced, answers = iter(visuals), list[tuple[int, int]]()
    if has_image and template.image_lead:  # reference: InternVL `multi_modal_get_item`, for records with one image
        (speaker, first), *rest = turns
        if IMAGE_TOKEN not in first and sum(content.count(IMAGE_TOKEN) for _, content in rest) <= 1:
            turns = [(speaker, f"{IMAGE_TOKEN}\n{first}"), *rest]  # a placeholder in a later turn is then plain text
    for speaker, content in turns:
        if has_image and template.image_first and not has_video:
            content = move_images_first(content, template.behind_image)
        content = content.strip() if template.strips else content
        if placeholder and template.tight_image:
            content = re.sub(rf"\s*({placeholder})\s*", r"\1", content)
        role, end = (
            (template.user, template.user_end) if speaker == "human" else (template.assistant, template.assistant_end)
        )
        gap = "" if template.tight_image and has_image and content.startswith(IMAGE_TOKEN) else template.gap
        if placeholder:
            content = re.sub(placeholder, lambda mark: next(unplaced, mark[0]), content)
        start = len(text) + len(role)
        text += role + gap + content + end if content or template.by_turn else role
        if speaker != "human":
            answers.append((start, len(text) - len(end) + len(end.rstrip())))
    text += template.assistant if generation else ""
    splits = has_image and template.image_tokens is None
    return Rendered(text, answers, text.split(IMAGE_TOKEN) if splits else [text])


def move_images_first(content: str, behind: str = "\n") -> str:
    """Move the `<image>` placeholders of a turn's text to its front, each followed by the text `behind`."""
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
    """Tokenise a conversation to ids and labels, int32[tokens] each; only answers and their end tokens have labels.

    Every `<image>` becomes `tokens_per_image` copies of `image_token_id` (1 x -200 in the reference) for each tile of
    its shape in `images` (None = whole images), or as many copies as the shape's `tokens`. `images` also has the shapes
    of videos, which become times as text and copies of the template's video token. `cut_text_at` (the reference's
    model_max_length) truncates a record without images at this length (None = never); a malformed turn beyond this
    length does not remove the record's labels. If the turns cannot be parsed (an empty turn, a separator inside a
    text), all labels are IGNORED: the reference's "tokenization mismatch" rule.
    """
    (text, spans, _), tokens = _encode(record, tokenizer, template, image_token_id, tokens_per_image, images)
    covered = len(text)
    if not template.by_turn:
        spans, covered = _answer_spans(text, template)
    keep = np.zeros(len(tokens.ids), bool)
    for start, stop in spans:
        # a token of the role may include the white space that begins the answer: it starts before the answer
        keep |= (tokens.ends > start) & (tokens.starts >= start) & (tokens.starts < stop)
    padding = tokenizer.convert_tokens_to_ids(template.padding_mark) if template.padding_mark else None
    if _is_mismatched(tokens, covered, text, padding, cut_text_at):
        keep[:] = False
    keep &= tokens.ids != (IGNORED if padding is None else padding)
    labels = np.where(keep & ~tokens.is_image, tokens.ids, IGNORED).astype(np.int32)
    ids, labels = np.repeat(tokens.ids, tokens.repeats), np.repeat(labels, tokens.repeats)
    return (ids, labels) if record.visuals else (ids[:cut_text_at], labels[:cut_text_at])


def count_tokens(prompts: Sequence[Sequence[str]], tokenizer: Any) -> np.ndarray:
    """Return the number of tokens of each prompt, int64[prompts], with a BOS token and without images; uses all cores.

    Counting is faster than tokenising for training, which needs character offsets.
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
    """Tokenise a conversation up to its last answer, which the model is to generate: int32[tokens]."""
    _, tokens = _encode(record, tokenizer, template, image_token_id, tokens_per_image, images, generation=True)
    return np.repeat(tokens.ids, tokens.repeats)


def _is_mismatched(tokens: _Tokens, covered: int, prompt: str, padding: int | None, cut_text_at: int | None) -> bool:
    """Return True if LLaVA's code would ignore this record's labels because of a "tokenization mismatch".

    A mismatch beyond `cut_text_at` does not count. `padding` is the id that the reference's phi3-chat mask takes for
    padding; that mask counts every image position, and an end token after an empty answer. LLaVA's and Bunny's masks
    count one token per image.
    """
    parsed = tokens.starts < covered
    if padding is None:
        return covered != len(prompt) and (cut_text_at is None or int(np.count_nonzero(parsed)) < cut_text_at)
    counted = int(tokens.repeats[parsed].sum()) + (covered > len(prompt))
    real = np.repeat(tokens.ids != padding, tokens.repeats)[:cut_text_at]
    return counted != int(np.count_nonzero(real)) and (cut_text_at is None or counted < cut_text_at)


def render_record(
    record: Record, template: Template, images: Sequence[ImageShape], *, generation: bool = False
) -> Rendered:
    """Return a record's prompt, with the placeholder of each image and video replaced by its text.

    With `generation`, the last answer is left out, and the prompt ends where it begins.
    """
    turns = record.turns[:-1] if generation and record.turns[-1][0] == "gpt" else record.turns
    visuals = [] if template.image_tokens is None else [template.image_text(image) for image in images]
    shown = {"has_image": bool(record.images), "has_video": bool(record.videos)}
    prompt = render(turns, template, **shown, generation=generation, visuals=visuals)
    if template.image_tokens is None:
        return prompt
    for context in {template.image_tokens[1], *([] if template.video is None else [template.video.token])}:
        if prompt.text.count(context) > sum(text.count(context) for text in visuals):
            raise UserError(
                f"record {record.id}: its text contains {context}, the placeholder token of images or videos: remove "
                "it from the text"
            )
    return prompt


class _Tokens(NamedTuple):
    """Token arrays of a prompt; BOS, which has no characters, has the span (-1, -1)."""

    ids: np.ndarray
    starts: np.ndarray  # character spans
    ends: np.ndarray
    is_image: np.ndarray  # True for tokens of images and videos
    repeats: np.ndarray  # number of decoder positions


def _encode(
    record: Record,
    tokenizer: Any,
    template: Template,
    image_token_id: int,
    tokens_per_image: int,
    images: Sequence[ImageShape] | None,
    *,
    generation: bool = False,
) -> tuple[Rendered, _Tokens]:
    """Return a record's prompt and its tokens; images have the token `image_token_id`.

    Without a special image token, the texts between images are tokenised separately. A leading BOS is kept once and
    dropped from later pieces (reference: `tokenizer_image_token`).
    """
    images = [ImageShape()] * len(record.visuals) if images is None else images
    prompt = render_record(record, template, images, generation=generation)
    ids, places, is_image = list[int](), list[tuple[int, int]](), list[bool]()
    offset = 0
    for number, piece in enumerate(prompt.pieces):
        if number:
            ids, places = [*ids, image_token_id], [*places, (offset, offset + len(IMAGE_TOKEN))]
            is_image.append(True)
            offset += len(IMAGE_TOKEN)
        with reading(f"record {record.id}: its text", "drop the record or use another tokenizer"):
            encoded = tokenizer(piece, return_offsets_mapping=True, return_attention_mask=False)
        piece_ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        has_bos = bool(piece_ids) and piece_ids[0] == tokenizer.bos_token_id and spans[0][1] == 0
        if has_bos and not number:
            ids, places = [piece_ids[0]], [(-1, -1)]
        ids += piece_ids[has_bos:]
        places += [(offset + start, offset + end) for start, end in spans[has_bos:]]
        is_image += [False] * (len(ids) - len(is_image))
        offset += len(piece)
    starts, ends = np.array(places, np.int64).reshape(-1, 2).T
    # ids beyond int32 are clipped, and refused later as outside the vocabulary
    values, flags = np.minimum(np.array(ids, np.int64), 2**31 - 1).astype(np.int32), np.array(is_image, bool)
    if record.visuals and template.image_tokens is not None:
        flags = values == tokenizer.convert_tokens_to_ids(template.image_tokens[1])
        values = np.where(flags, np.int32(image_token_id), values)
        if record.videos and template.video is not None and template.video.token != template.image_tokens[1]:
            flags |= values == tokenizer.convert_tokens_to_ids(template.video.token)
    per_image = [image.positions_by_mark(tokens_per_image, template.context_tokens(image)) for image in images]
    repeats = np.ones(len(values), np.int64)
    repeats[flags] = [*itertools.chain(*per_image)][: int(np.count_nonzero(flags))]
    return prompt, _Tokens(values, starts, ends, flags, repeats)


def _answer_spans(prompt: str, template: Template) -> tuple[list[tuple[int, int]], int]:
    """Return the character spans to label, and where the last parsed question-answer round ends.

    A round ends with the assistant's end token, which may also end the system text and the question; it must contain
    the assistant's role exactly once.
    """
    end = template.assistant_end
    role = template.user_end + template.assistant + template.gap
    ends = 1 + (template.user_end == end)  # end tokens per round
    pieces = prompt.split(end)
    spans: list[tuple[int, int]] = []
    covered = 0
    first = ends + (template.system_end == end and bool(template.system))
    for begin in (0, *range(first, len(pieces), ends)):
        text = end.join(pieces[begin : begin + ends if begin else first])
        if text.count(role) != 1:  # the empty rest after the last end token, or a malformed round
            break
        start = covered + text.index(role) + len(role) - len(template.gap)
        covered += len(text) + len(end)
        spans.append((start, covered))
    return spans, covered


def expand_images(
    input_ids: Any,
    cfg: ModelConfig | Model,
    *,
    attention_mask: Any = None,
    labels: Any = None,
    tiles: Any = None,
    image_grid_thw: Any = None,
) -> dict[str, np.ndarray]:
    """Return arrays for `vp.forward` and `vp.score`, from sequences with one `cfg.image_token_id` per image.

    This is only needed for ids from a tokenizer; transformers processors expand images themselves. Rows are padded on
    the right to the longest row, with id 0.

    Args:
      input_ids: int[batch, seq], image positions not expanded.
      cfg: the model or its config; an image has `cfg.tokens_per_image` positions per tile, or the positions of its grid
        if images have varying size.
      attention_mask: int[batch, seq], 1 = real token; default all 1. Padding is dropped on either side.
      labels: int[batch, seq], -100 for positions without loss; image positions always get -100.
      tiles: int[images], number of tiles of each image, in order of appearance; default 1.
      image_grid_thw: int[images, 3], frames, rows and columns of patches, for images of varying size.

    Returns input_ids and attention_mask int32[batch, longest], and labels if passed. Raises UserError if the model
    takes no images, shapes differ, or the number of `tiles` or grids is not that of images.
    """
    ids, cfg = np.asarray(input_ids), config_of(cfg)
    if cfg.image_token_id is None or not cfg.tokens_per_image:
        raise UserError("expand_images: this model takes no images: call it for vision-language models only")
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids) if attention_mask is None else attention_mask}
    inputs |= {} if labels is None else {"labels": labels}
    arrays = {name: np.asarray(array) for name, array in inputs.items()}
    wrong = {name: array.shape for name, array in arrays.items() if array.shape != ids.shape or ids.ndim != 2}
    if wrong:
        raise UserError(f"expand_images: arrays must have one shape [batch, seq], got {wrong or ids.shape}")
    real = arrays["attention_mask"] == 1
    is_image = (ids == cfg.image_token_id) & real
    times = real.astype(np.int64)
    times[is_image] = _tokens_of_images(cfg, int(is_image.sum()), tiles, image_grid_thw)
    if labels is not None:
        arrays["labels"] = np.where(is_image, IGNORED, arrays["labels"])
    longest = int(times.sum(axis=1).max(initial=0))
    result = {n: np.full((len(ids), longest), IGNORED if n == "labels" else 0, np.int32) for n in arrays}
    for row, repeats in enumerate(times):
        for name, array in arrays.items():
            result[name][row, : repeats.sum()] = np.repeat(array[row], repeats)
    return result


def _tokens_of_images(cfg: ModelConfig, images: int, tiles: Any, image_grid_thw: Any) -> np.ndarray:
    if (tiles if cfg.dynamic_resolution else image_grid_thw) is not None:
        wanted, passed = ("image_grid_thw", "tiles") if cfg.dynamic_resolution else ("tiles", "image_grid_thw")
        raise UserError(f"expand_images: this model takes {wanted}, not {passed}: omit {passed}")
    if cfg.dynamic_resolution:
        assert cfg.projector is not None
        grids = np.asarray(np.zeros((0, 3)) if image_grid_thw is None else image_grid_thw, np.int64)
        if grids.shape != (images, 3) or (grids < 1).any():
            raise UserError(f"expand_images: image_grid_thw must be {images} x 3 numbers above 0, got {image_grid_thw}")
        return grids.prod(axis=1) // cfg.projector.downsample**2
    counts = np.ones(images, np.int64) if tiles is None else np.asarray(tiles, np.int64)
    if counts.shape != (images,) or (counts < 1).any():
        raise UserError(f"expand_images: tiles must be {images} positive numbers, one per image, got {tiles}")
    return counts * cfg.tokens_per_image
