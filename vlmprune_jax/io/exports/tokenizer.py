"""Tokenizer of an export in a transformers layout: the source's, with the tokens that the layout needs."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from vlmprune_jax.base.files import read_json
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.data.tokenizer_files import SLOW, TOKENIZER, TOKENIZER_CONFIG, TokenizerFile
from vlmprune_jax.io.families.table import JsonDict

# Settings of classes that rebuild tokenizer.json on loading; the file contains all rules.
_REBUILD = ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "sp_model_kwargs", "auto_map", "from_slow",
            "use_default_system_prompt", "spaces_between_special_tokens", "special_tokens_map_file", "name_or_path",
            "chat_template", "tokenizer_file", "added_tokens_decoder")  # fmt: skip
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def read_tokenizer(folder: Path) -> JsonDict | None:
    """Return the content of tokenizer.json, converted from older files if needed; None without a tokenizer."""
    if os.path.lexists(folder / TOKENIZER):
        return read_json(folder / TOKENIZER, TokenizerFile)
    if not any(os.path.lexists(folder / name) for name in SLOW):
        return None
    content: JsonDict = json.loads(load_tokenizer(folder).backend_tokenizer.to_str())
    return content


def token_id(tokenizer: JsonDict, token: str) -> int | None:
    """Return the id of a token, or None if the tokenizer lacks it."""
    return token_ids(tokenizer).get(token)


def vocabulary_digest(tokenizer: JsonDict) -> str:
    """Return a digest (16 hex digits) of the ids and texts of all tokens."""
    listed = sorted((i, text) for text, i in token_ids(tokenizer).items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


def add_token(tokenizer: JsonDict, token: str) -> tuple[JsonDict, int]:
    """Add a special token to a tokenizer unless it exists; return the tokenizer and the token's id."""
    ids = token_ids(tokenizer)
    if token in ids:
        return tokenizer, ids[token]
    number = max(ids.values()) + 1
    added = [*(tokenizer.get("added_tokens") or ()), {"id": number, "content": token, **_FLAGS, "special": True}]
    return {**tokenizer, "added_tokens": added}, number


def token_ids(tokenizer: JsonDict) -> dict[str, int]:
    """Return {token: id} of a tokenizer, including added tokens."""
    vocab = tokenizer["model"]["vocab"]
    # Unigram lists [piece, score] pairs, in the order of their ids
    ids = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
    return ids | {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens") or ()}


def prefixes_only_the_start(tokenizer: JsonDict) -> bool:
    """Return True if a tokenizer puts its space symbol only before the whole text, not after special tokens."""
    step = tokenizer.get("pre_tokenizer") or {}
    steps = [inner for inner in step.get("pretokenizers", [step]) if isinstance(inner, dict)]
    return any(inner.get("type") == "Metaspace" and inner.get("prepend_scheme") == "first" for inner in steps)


def write_tokenizer(folder: Path, source: Path, tokenizer: JsonDict, named: dict[str, str], processor: str) -> None:
    """Write tokenizer.json and tokenizer_config.json; `named` maps the processor's names to special tokens.

    The class is PreTrainedTokenizerFast, which uses tokenizer.json unchanged. LlamaTokenizer of transformers 5 would
    replace the file's rules by its own rules, which differ from Phi-3's.
    """
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", TOKENIZER_CONFIG):
        if os.path.lexists(source / name):
            config |= read_json(source / name)
    config = {name: value for name, value in config.items() if name not in _REBUILD}
    known = config.get("extra_special_tokens")
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": processor,
        "extra_special_tokens": (known if isinstance(known, dict) else {}) | named,
        "model_input_names": ["input_ids", "attention_mask"],  # no token types, which the plain class would add
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    for name, value in ((TOKENIZER, tokenizer), (TOKENIZER_CONFIG, config)):
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
