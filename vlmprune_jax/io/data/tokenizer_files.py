"""Checks of tokenizer files, with a trial run of their rules, before libraries load them."""

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

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import MAX_JSON_BYTES, read_bytes, read_parts

TOKENIZER, TOKENIZER_CONFIG, ADDED_TOKENS = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
# Files of a tokenizer without tokenizer.json.
SLOW = ("tokenizer.model", "vocab.json", "merges.txt", "tokenizer.tiktoken")
_OTHERS = ("special_tokens_map.json", "chat_template.json", "chat_template.jinja")  # also opened by the libraries

TokenId = Annotated[int, Meta(ge=0, lt=2**31)]  # range of int32, the dtype of token ids in batches


class _AddedToken(TypedDict):
    id: TokenId
    content: str


class _NamedToken(TypedDict):
    content: str


class _Vocabulary(TypedDict):
    """Vocabulary section of tokenizer.json: {text: id}, or for Unigram models a list of [text, score] ordered by id."""

    vocab: Annotated[dict[str, TokenId], Meta(min_length=1)] | Annotated[list[tuple[str, float]], Meta(min_length=1)]


class TokenizerFile(TypedDict):
    """Fields that are read from tokenizer.json."""

    model: _Vocabulary
    added_tokens: NotRequired[list[_AddedToken] | None]
    normalizer: NotRequired[dict[str, Any] | None]
    pre_tokenizer: NotRequired[dict[str, Any] | None]
    decoder: NotRequired[dict[str, Any] | None]


class TokenizerConfig(TypedDict):
    """Fields that are read from tokenizer_config.json; keys of `added_tokens_decoder` are token ids."""

    added_tokens_decoder: NotRequired[dict[Annotated[str, Meta(pattern="^[0-9]{1,9}$")], _NamedToken] | None]


def check_tokenizer_files(folder: Path) -> None:
    """Raise UserError if a folder's tokenizer files are malformed, or their rules take too long on plain text."""
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
    """Return the ids of a tokenizer's added tokens, from all files of the folder that list any.

    Raises UserError if a file cannot be read (see `read_parts`).
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

# Regular expressions can take exponential time, and replacements unlimited memory, which cannot be decided by analysis.
# The rules of a file are therefore tried on hard texts in a separate process with limited time and memory. The trial
# takes 0.2 s; it is skipped for files without regular expressions and lengthening replacements.
_RULES = ("normalizer", "pre_tokenizer", "decoder")
_TRIAL_SECONDS, _TRIAL_BYTES, _WALL_SECONDS = 10, 2**31, 50  # CPU time, memory, wall time on a busy machine
_MAX_RULE = 10_000  # characters of a rule's text
_RUN = 1000  # characters of a repetitive test text
TRIAL = """
from tokenizers import Tokenizer
rules, texts = values
limit()
try:
    tokenizer = Tokenizer.from_str(json.dumps(rules))
except Exception:
    sys.exit(0)  # reported when the whole tokenizer is loaded
tokenizer.encode_batch(texts)
if tokenizer.decoder is not None:
    tokenizer.decoder.decode(texts)
"""
LIMITED = """
import json, resource, sys
values, seconds, most = json.load(sys.stdin)
def limit():
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
"""
_MODEL = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}  # replaces the large real model
_FORMAT: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "post_processor": None,
}


def _try_rules(path: Path, rules: dict[str, Any]) -> None:
    suspects = [part for part in _walk(rules) if "Regex" in part or _lengthens(part)]
    texts = [text for part in suspects for text in part.values() if isinstance(text, str)]
    if max(map(len, texts), default=0) > _MAX_RULE:
        raise UserError(
            f"{path}: a rule for splitting or replacing text is longer than {_MAX_RULE:,} characters: use the model's "
            "own tokenizer"
        )
    if not suspects:
        return
    patterns = [str(part.get("Regex", part.get("pattern"))) for part in suspects]
    words = ["".join(filter(str.isalnum, pattern))[:100] for pattern in patterns]
    letters = "".join(sorted(set("".join(words))))[:100]  # all letters, so that no expression fails at once
    runs = dict.fromkeys(filter(None, [*words[:10], *letters, *"aA0 \n.-_'é中"]))
    texts = [f"{run * count}{end}" for run in runs for count in (40, _RUN // len(run)) for end in ("", f"!{letters}!")]
    tokenizer = {**_FORMAT, **rules, "model": _MODEL}
    if try_script(TRIAL, [tokenizer, texts], seconds=_TRIAL_SECONDS, memory=_TRIAL_BYTES, wall=_WALL_SECONDS) is None:
        raise UserError(
            f"{path}: its rules for splitting and replacing text need more than {_TRIAL_SECONDS} s or "
            f"{_TRIAL_BYTES >> 30} GiB for plain text, or crash: use the tokenizer of the model's source"
        )


def try_script(script: str, values: list[Any], *, seconds: int, memory: int, wall: int) -> bytes | None:
    """Run a script on JSON `values` in another process; return its output, or None if it fails or exceeds a limit.

    After its imports, the script calls `limit()`, which limits processor time (seconds) and memory (bytes) from then
    on. `wall`: seconds after which the process is killed.
    """
    command = [sys.executable, "-P", "-c", LIMITED + script]  # -P: do not import from the current folder
    request = json.dumps([values, seconds, memory]).encode()
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    with contextlib.suppress(subprocess.TimeoutExpired):
        trial = subprocess.run(command, input=request, capture_output=True, env=environment, timeout=wall)
        return trial.stdout if trial.returncode == 0 else None
    return None


def _walk(value: Any) -> Iterator[dict[str, Any]]:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, dict):
        yield value
    for child in children:
        yield from _walk(child)


def _lengthens(part: dict[str, Any]) -> bool:
    content, pattern = part.get("content", part.get("prepend")), part.get("pattern")
    replaced = pattern.get("String") if isinstance(pattern, dict) else None
    return isinstance(content, str) and len(content) > max(1, len(replaced) if isinstance(replaced, str) else 1)
