"""The files of a tokenizer: what they may hold, and a trial of their rules, before the libraries get to see them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.files import MAX_JSON_BYTES, read_bytes, read_parts

TOKENIZER, TOKENIZER_CONFIG, ADDED_TOKENS = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
# Files that a tokenizer without tokenizer.json is made of.
SLOW = ("tokenizer.model", "vocab.json", "merges.txt", "tokenizer.tiktoken")
_OTHERS = ("special_tokens_map.json", "chat_template.json", "chat_template.jinja")  # which the libraries open as well

TokenId = Annotated[int, Meta(ge=0, lt=2**31)]  # as batches hold them


class _AddedToken(TypedDict):
    id: TokenId
    content: str


class _NamedToken(TypedDict):
    content: str


class _Vocabulary(TypedDict):
    """The ids of pieces, or (Unigram) a list of [piece, score] in the order of their ids."""

    vocab: Annotated[dict[str, TokenId], Meta(min_length=1)] | Annotated[list[tuple[str, float]], Meta(min_length=1)]


class TokenizerFile(TypedDict):
    """What is used of a tokenizer.json."""

    model: _Vocabulary
    added_tokens: NotRequired[list[_AddedToken] | None]
    normalizer: NotRequired[dict[str, Any] | None]
    pre_tokenizer: NotRequired[dict[str, Any] | None]
    decoder: NotRequired[dict[str, Any] | None]


class TokenizerConfig(TypedDict):
    """What is used of a tokenizer_config.json; the keys of `added_tokens_decoder` are ids."""

    added_tokens_decoder: NotRequired[dict[Annotated[str, Meta(pattern="^[0-9]{1,9}$")], _NamedToken] | None]


def check_tokenizer_files(folder: Path) -> None:
    """Refuse the tokenizer of a folder if a file of it is not what it should be.

    Raises:
      UserError: see `read_bytes`; a file holds something else than it should, or rules that run away on plain text.
    """
    kinds = {TOKENIZER: TokenizerFile, TOKENIZER_CONFIG: TokenizerConfig, ADDED_TOKENS: dict[str, TokenId]}
    for name, kind in kinds.items():
        if os.path.lexists(folder / name):
            content = read_parts(folder / name, kind)
            if name == TOKENIZER:
                _try_rules(folder / name, {part: content.get(part) for part in _RULES})
    for name in (*SLOW, *_OTHERS):
        if os.path.lexists(folder / name):
            read_bytes(folder / name, MAX_JSON_BYTES)


def added_tokens(folder: Path) -> dict[str, int]:
    """Ids of the added tokens of a folder's tokenizer, by any of the files that can list them; {} without one.

    Raises:
      UserError: see `read_parts`.
    """
    ids: dict[str, int] = {}
    if os.path.lexists(folder / ADDED_TOKENS):
        ids.update(read_parts(folder / ADDED_TOKENS, dict[str, TokenId]))
    if os.path.lexists(folder / TOKENIZER_CONFIG):
        listed = read_parts(folder / TOKENIZER_CONFIG, TokenizerConfig).get("added_tokens_decoder") or {}
        ids.update({token["content"]: int(number) for number, token in listed.items()})
    if os.path.lexists(folder / TOKENIZER):
        added = read_parts(folder / TOKENIZER, TokenizerFile).get("added_tokens") or ()
        ids.update({token["content"]: token["id"] for token in added})
    return ids


# Rules ----------------------------------------------------------------------------------------------------------------

# Regular expressions can take exponential time, and replacements memory. No analysis tells which do: those that a file
# brings along are tried on texts that such rules are bad at, in a process of its own, which may take only so much of
# either. It costs 0.2 s, and nothing where a file has no expression and no replacement that makes texts longer.
_RULES = ("normalizer", "pre_tokenizer", "decoder")
_TRIAL_SECONDS, _TRIAL_BYTES, _WALL_SECONDS = 10, 2**31, 50  # of the processor, and by the clock on a busy machine
_LONGEST = 10_000  # letters of a rule's text
_RUN = 1000
_TRIAL = """
import json, resource, sys
from tokenizers import Tokenizer
rules, texts, most, seconds = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (most, most))
try:
    tokenizer = Tokenizer.from_str(json.dumps(rules))
except Exception:
    sys.exit(0)  # what is wrong is told where the whole tokenizer is loaded
tokenizer.encode_batch(texts)
if tokenizer.decoder is not None:
    tokenizer.decoder.decode(texts)
"""
_MODEL = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}  # in the place of the real one, which is large
_FORMAT: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "post_processor": None,
}


def _try_rules(path: Path, rules: dict[str, Any]) -> None:
    parts = [part for part in _walk(rules) if "Regex" in part or _lengthens(part)]
    texts = [text for part in parts for text in part.values() if isinstance(text, str)]
    if max(map(len, texts), default=0) > _LONGEST:
        raise UserError(f"{path}: a rule holds a text of over {_LONGEST:,} letters: use the model's source's tokenizer")
    if not parts:
        return
    patterns = [str(part.get("Regex", part.get("pattern"))) for part in parts]
    words = ["".join(filter(str.isalnum, pattern))[:100] for pattern in patterns]
    letters = "".join(sorted(set("".join(words))))[:100]  # with all of them no expression is ruled out at once
    runs = dict.fromkeys(filter(None, [*words[:10], *letters, *"aA0 \n.-_'é中"]))
    texts = [f"{run * count}{end}" for run in runs for count in (40, _RUN // len(run)) for end in ("", f"!{letters}!")]
    command = [sys.executable, "-P", "-c", _TRIAL]  # -P: not from this folder
    given = json.dumps([{**_FORMAT, **rules, "model": _MODEL}, texts, _TRIAL_BYTES, _TRIAL_SECONDS]).encode()
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(command, input=given, capture_output=True, env=environment, timeout=_WALL_SECONDS)
        if done.returncode == 0:
            return
    raise UserError(
        f"{path}: its rules for splitting and replacing text run away on plain text (more than {_TRIAL_SECONDS} s, "
        f"{_TRIAL_BYTES >> 30} GiB, or a crash): use the tokenizer of the model's source"
    )


def _walk(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON value, which is not deeply nested."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, dict):
        yield value
    for one in inside:
        yield from _walk(one)


def _lengthens(part: dict[str, Any]) -> bool:
    """Whether a rule replaces something by more, or puts something before it."""
    content, pattern = part.get("content", part.get("prepend")), part.get("pattern")
    replaced = pattern.get("String") if isinstance(pattern, dict) else None
    return isinstance(content, str) and len(content) > max(1, len(replaced) if isinstance(replaced, str) else 1)


@contextlib.contextmanager
def without_output() -> Iterator[None]:
    """Nothing that is written to stdout or stderr meanwhile is seen, not even by native code, which writes to the file
    descriptors: panics and remarks of Rust, logs of C++. What they are about is raised as well, or of no consequence.
    """
    if sys.stdout is not None:
        sys.stdout.flush()
    nowhere = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    with nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        seen = {}
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):  # there is no such descriptor, and nobody to see it
                seen[descriptor] = os.dup(descriptor)
        try:
            for descriptor in seen:
                os.dup2(nowhere.fileno(), descriptor)
            yield
        finally:
            nowhere.flush()
            for descriptor, copy in seen.items():
                os.dup2(copy, descriptor)
                os.close(copy)
