"""The tokens that a trimmed vocabulary keeps: those of texts, and those that the files of the model need."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import read_json, read_text, reading
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.plans.kept import TOKEN_IDS, KeptVocabulary
from vlmprune_jax.core.prune.config import VocabularyConfig
from vlmprune_jax.core.prune.vocabulary import Subwords, check_size, choose_tokens
from vlmprune_jax.io.data.chat_template import AUTO, choose_template
from vlmprune_jax.io.data.forms import IMAGE_TOKEN, VIDEO_TOKEN
from vlmprune_jax.io.data.prompts import load_tokenizer, render
from vlmprune_jax.io.data.records import (
    DATASETS,
    TFDS,
    Record,
    data_files,
    has_lone_surrogate,
    make_record,
    read_entries,
)
from vlmprune_jax.io.exports.vocabulary import CONFIGS, ids_in, read_tokenizer, trim_tokenizer, vocabulary_digest
from vlmprune_jax.io.families import family_of
from vlmprune_jax.io.families.templates import Template
from vlmprune_jax.io.families.tiles import VideoShape

_ROLES = ("system", "user", "assistant", "model", "tool")
_PART = 2000  # characters of a text file per text, cut at the end of a line
_CHUNK = 10_000  # texts that are tokenised together
_FRAMES = 1000  # frames of a video whose text contains all tokens of times and numbers to keep
HELD_BACK, LEAST_TEXTS = 10, 20  # every tenth text is held back, of at least 20


@dataclass(frozen=True, eq=False)
class Source:
    """Tokenizer to trim: content of tokenizer.json, its subword model, token digest and prompt template.

    `needed`: {token id: reason why the model's files need this token}.
    """

    folder: Path
    rows: int
    content: Mapping[str, Any]
    tokenizer: Any
    subwords: Subwords
    digest: str
    template: Template
    needed: Mapping[int, str]

    @classmethod
    def of(cls, folder: Path, cfg: ModelConfig) -> Source:
        """Return the tokenizer of a model folder, for trimming.

        Raises UserError if there is no tokenizer, it cannot be trimmed, or it has ids beyond the model's vocabulary.
        """
        content = read_tokenizer(folder)
        if content is None:
            raise UserError(f"{folder}: has no tokenizer, so its vocabulary cannot be trimmed: add tokenizer.json")
        with reading(f"{folder}: its tokenizer"):
            subwords, rows = Subwords.of(content, str(folder)), cfg.text.vocab_size
        last = max({*subwords.tokens, *subwords.added})
        if last >= rows:
            raise UserError(
                f"{folder}: the tokenizer has token id {last:,}, but the model has {rows:,} tokens: use the model's "
                "own tokenizer"
            )
        tokenizer, config = load_tokenizer(folder), read_json(folder / "config.json")
        has_vision = cfg.vision is not None
        template = choose_template(AUTO, family_of(cfg), tokenizer, config=config, has_vision=has_vision)
        needed = {i: why for i, why in _needed(folder, cfg, tokenizer, template) if 0 <= i < rows}
        return cls(folder, rows, content, tokenizer, subwords, vocabulary_digest(content), template, needed)

    def trimmed(self, vocabulary: KeptVocabulary) -> Any:
        """Return a tokenizer object with only the kept tokens."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(json.dumps(trim_tokenizer(self.content, vocabulary.kept)))

    def keep(self, used: Mapping[int, int], listed: Iterable[int], size: int | None, multiple: int) -> KeptVocabulary:
        """Choose the most frequent tokens as a kept vocabulary of this size."""
        always = {*self.needed, *listed}
        kept = choose_tokens(self.subwords, used, size=size, multiple=multiple, always=always)
        return KeptVocabulary(self.rows, kept, self.digest)

    def check(self, vocabulary: KeptVocabulary) -> None:
        """Raise UserError if a kept vocabulary lacks tokens that the tokenizer or the model's files need."""
        kept = set(vocabulary.kept)
        missing = sorted(i for i in {*self.needed, *self.subwords.required} if i not in kept)
        if missing:
            why = self.needed.get(missing[0], "texts would lose characters or special tokens without it")
            raise UserError(
                f"prune plan: removes {len(missing):,} token(s) that the model needs, first token {missing[0]} "
                f"({self._text(missing[0])!r}: {why}): keep these tokens"
            )
        broken = sorted(self.subwords.closure(kept) - kept)
        if broken:
            raise UserError(
                f"prune plan: removes token {broken[0]} ({self._text(broken[0])!r}), from which kept tokens are "
                "merged: choose the tokens with prune.vocabulary, which keeps such tokens"
            )

    def _text(self, i: int) -> str:
        return self.subwords.tokens.get(i) or self.subwords.added.get(i, "")


@dataclass(frozen=True)
class Sample:
    """Data for trimming a vocabulary: token counts for the choice, and held-out texts for measurements."""

    used: Counter[int]
    listed: tuple[int, ...]
    held_out: tuple[str, ...]


def read_sample(source: Source, config: VocabularyConfig) -> Sample:
    """Read the texts in `config.sources` and `config.held_out`.

    Raises UserError if a source cannot be read (see `read_texts`), no source is named, or a listed id is too large.
    """
    if not config.sources:
        raise UserError("prune.vocabulary.sources: name at least one file of records or texts whose tokens are kept")
    read = [text for name in config.sources for text in read_texts(name, source.template)]
    texts, listed = [x for x in read if isinstance(x, str)], [x for x in read if isinstance(x, int)]
    beyond = [i for i in listed if not 0 <= i < source.rows]
    if beyond:
        raise UserError(
            f"prune.vocabulary.sources: token id {beyond[0]} is outside the model's vocabulary of {source.rows:,} "
            "tokens"
        )
    read = [text for name in config.held_out for text in read_texts(name, source.template)]
    held_out = [text for text in read if isinstance(text, str)]
    if not config.held_out and len(texts) >= LEAST_TEXTS:
        held_out = texts[HELD_BACK - 1 :: HELD_BACK]
        texts = [text for i, text in enumerate(texts) if i % HELD_BACK != HELD_BACK - 1]
    used = Counter[int]()
    for ids in tokens_of(source.tokenizer, texts):
        used.update(ids)
    return Sample(used, tuple(listed), tuple(held_out))


def choose_vocabulary(cfg: ModelConfig, config: VocabularyConfig) -> KeptVocabulary | None:
    """Choose the tokens that a model keeps, by the settings in `prune.vocabulary`; None if all are kept.

    Raises UserError if the size is too large or too small, no folder with a tokenizer is passed, its tokenizer cannot
    be trimmed, or a source cannot be read.
    """
    if config.size is None:
        return None
    if config.source_dir is None:
        raise UserError(
            'vocabulary.source_dir must name the model folder with the tokenizer, as in vocabulary={"size": 16384, '
            '"sources": ("train.json",), "source_dir": "DIR"}'
        )
    check_size(config.size, cfg.text.vocab_size)
    source = Source.of(Path(config.source_dir), cfg)
    sample = read_sample(source, config)
    return source.keep(sample.used, sample.listed, config.size, config.multiple)


def tokens_of(tokenizer: Any, texts: Sequence[str]) -> Iterator[list[int]]:
    """Yield the token ids of each text, without special tokens at its ends."""
    for start in range(0, len(texts), _CHUNK):
        part = [*texts[start : start + _CHUNK]]
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        for encoding in backend.encode_batch_fast(part, add_special_tokens=False):
            yield encoding.ids


def _needed(folder: Path, cfg: ModelConfig, tokenizer: Any, template: Template) -> Iterator[tuple[int, str]]:
    """Yield (token id, reason) for the tokens that a model's files need."""
    for why, texts in (
        ("the chat template uses it", _template_texts(tokenizer.chat_template)),
        (f"the prompt template {template.name} uses it", _prompt_texts(template)),
    ):
        for ids in tokens_of(tokenizer, list(texts)):
            yield from ((i, why) for i in ids)
    for name in TOKEN_IDS:
        value = getattr(cfg, name)
        yield from ((i, f"it is the model's {name}") for i in (value if isinstance(value, tuple) else (value,)) if i)
    for name in CONFIGS:
        if os.path.lexists(folder / name):
            yield from ((i, f"{name} has it as {field}") for i, field in ids_in(read_json(folder / name)).items())


def _prompt_texts(template: Template) -> Iterator[str]:
    """Yield the literal texts of a prompt template, alone and inside a conversation."""
    for field in fields(template):
        value = getattr(template, field.name)
        yield from (
            text for text in (value if isinstance(value, tuple) else (value,)) if isinstance(text, str) and text
        )
    for has_image in (False, True):
        turns = [("human", f"{IMAGE_TOKEN}\na" if has_image else "a"), ("gpt", "a"), ("human", "a")]
        yield from render(turns, template, has_image=has_image, generation=True).text.split(IMAGE_TOKEN)
    if template.video is not None:
        question = render([("human", f"{VIDEO_TOKEN}\na")], template, has_image=False, has_video=True).text
        times = tuple(second + second % 10 / 10 for second in range(_FRAMES))
        for frames in (*range(1, 100), _FRAMES):  # all digits, and the numbers in words
            video = VideoShape(times=times[:frames], duration=37 * frames)
            yield question.replace(VIDEO_TOKEN, template.video.write(video))
    yield from ("\n", "\n\n", " ", *_ROLES, *(f"{role}\n" for role in _ROLES))


def _template_texts(template: Any) -> Iterator[str]:
    """Yield the literal texts of chat templates: text outside Jinja tags, and quoted text inside them."""
    named = template.values() if isinstance(template, Mapping) else [template]
    for text in (text for text in named if isinstance(text, str)):
        yield from (part for part in re.split(r"\{[{%#].*?[}%#]\}", text, flags=re.DOTALL) if part)
        for quoted in re.findall(r"'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\"", text):
            with contextlib.suppress(ValueError, SyntaxError):
                yield str(ast.literal_eval(quoted))


def read_texts(source: str, template: Template) -> list[str | int]:
    """Read texts (and listed token ids): records for `data.train`, a JSON list of texts or of ids, or a text file.

    Records are rendered with `template`, and their images are not opened. A text file is split into parts of a few
    paragraphs. Raises UserError if there is no such file, or it has none of these forms.
    """
    if source.startswith((TFDS, DATASETS)):
        from vlmprune_jax.io.data.inputs import read_set  # with grain, which `vlmprune inspect` starts without

        records = read_set(source, None, "prune.vocabulary.sources", True, "skip")
        return [text for record in records for text in _texts_of(record, template)]
    path = Path(source)
    if path.suffix not in (".json", ".jsonl"):
        return [*_parts(read_text(path, missing="no such file (set in prune.vocabulary)"))]
    texts: list[str | int] = []
    first, *listed = data_files(path, None)
    for file in listed or [first]:
        for number, entry in enumerate(read_entries(file, "stop")):
            if isinstance(entry, (str, int)) and not isinstance(entry, bool):
                texts.append(entry)
            else:
                texts += _texts_of(make_record(entry, number, file, _Unopened(), True), template)
    if any(isinstance(text, str) and has_lone_surrogate(text) for text in texts):
        raise UserError(f"{source}: a text contains a lone surrogate (\\ud800 to \\udfff): remove it")
    return texts


class _Unopened:
    def find(self, name: str, location: str) -> Path:
        return Path(name)


def _parts(text: str) -> Iterator[str]:
    part = ""
    for line in text.replace("\r\n", "\n").splitlines(keepends=True):
        part += line
        if len(part) >= _PART:
            yield part
            part = ""
    if part:
        yield part


def _texts_of(record: Record, template: Template) -> Iterator[str]:
    prompt = render(record.turns, template, has_image=bool(record.images), has_video=bool(record.videos)).text
    yield from (piece for piece in re.split(f"{IMAGE_TOKEN}|{VIDEO_TOKEN}", prompt) if piece)
    yield from record.answers
    for value in record.fields.values():
        if isinstance(value, list):
            yield from (text for text in value if isinstance(text, str))
