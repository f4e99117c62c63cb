"""Conversion of tokenizer.json to GGUF: tokens, merges or scores, and the name of the pre-tokenizer.

llama.cpp has its pre-tokenizers built in, by name (`tokenizer.ggml.pre`). A wrong name changes token ids silently, so a
name is written only if tokenizer.json has exactly its rules; other tokenizers are refused.
tests/export/test_gguf_tokenizer.py tokenises with both sides under every name.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import parse_json
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.prune.vocabulary import Subwords
from vlmprune_jax.io.checkpoints.read import read_fields
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.data.tokenizer_files import SLOW, TOKENIZER
from vlmprune_jax.io.exports.target import chat_template
from vlmprune_jax.io.exports.vocabulary import token_ids
from vlmprune_jax.io.families import Family, template_of
from vlmprune_jax.io.families.gguf import BYTE_LEVEL, BYTES, KEEPING_MARKS, OF_WORDS, PRE, SPACED, WHOLE_WORDS, WORDS
from vlmprune_jax.io.families.table import JsonDict

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of tokens, gguf.TokenType
_SPACE = "▁"
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_METASPACE = {"type": "Metaspace", "replacement": _SPACE, "split": False}
# splits at spaces, of which the normalizer leaves none
_NEVER = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
# Rules of SentencePiece-like tokenizers: normalizer, pre_tokenizer, and True if a text gets a space mark in front.
_SPACED: tuple[tuple[Any, Any, bool], ...] = (
    ({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}, _REPLACE]}, None, True),
    (_REPLACE, None, False),
    (_REPLACE, _NEVER, False),
    *((None, _METASPACE | {"prepend_scheme": scheme}, scheme != "never") for scheme in ("first", "always", "never")),
)


@dataclass(frozen=True)
class Vocabulary:
    """Tokenizer in GGUF's form: token texts, scores, types, merges and special tokens.

    Attributes:
      fields: GGUF metadata; each key is the NAME of a method `add_NAME` of `gguf.GGUFWriter`.
      fast: the same tokenizer as a transformers object.
      normalises: True if the tokenizer normalises texts, as llama.cpp does not.
      marks_spaces: True if it does not put a space mark before every text, as llama.cpp does.
      drops: special tokens after which it drops white space, which llama.cpp keeps.
    """

    fields: JsonDict
    fast: Any
    normalises: bool
    marks_spaces: bool
    drops: list[str]


def make_vocabulary(folder: Path, cfg: ModelConfig, family: Family, tokenizer_model: str = "") -> Vocabulary:
    """Convert a folder's tokenizer for GGUF, padded to the number of rows of the model's embedding.

    `tokenizer_model`: llama.cpp's name for the architecture's tokenizer (SentencePiece's rules and a list of merges).

    Raises UserError if there is no tokenizer, llama.cpp would split texts differently, or it has too many tokens.
    """
    if not any(os.path.lexists(folder / name) for name in (TOKENIZER, *SLOW)):
        raise UserError(f"{folder}: has no tokenizer files, which llama.cpp needs: add them")
    fast, rows = load_tokenizer(folder), cfg.text.vocab_size
    # normalised by the library, whatever version wrote the file
    content = parse_json(
        fast.backend_tokenizer.to_str(), str(folder / TOKENIZER), "use the tokenizer of the source model"
    )
    model = content["model"]
    if model.get("type") != "BPE":
        raise UserError(
            f"{folder}: tokenizer type {model.get('type')!r} cannot be exported to GGUF, only BPE: use another format"
        )
    words = Subwords.of(content, str(folder))
    tokens, kinds = _tokens(words, rows, str(folder))
    fields: JsonDict = {"token_list": tokens, "token_types": kinds}
    merges = sorted(words.ranks, key=words.ranks.__getitem__)
    if words.byte_fallback:
        rules = [content.get("normalizer"), content.get("pre_tokenizer")]
        prefix = next((prefix for *known, prefix in _SPACED if rules == known), None)
        if prefix is None:
            found = f"normalizer and pre_tokenizer {json.dumps(rules, sort_keys=True)[:200]}"
            raise _refusal(folder, f"llama.cpp has no tokenizer with the rules of this tokenizer.json ({found})")
        pre = tokenizer_model or "default"
        fields |= {"tokenizer_model": tokenizer_model or SPACED, "tokenizer_pre": pre, "add_space_prefix": prefix}
        ranks: dict[str, int] = {}  # SentencePiece applies the merge of the highest score first
        for rank, (left, right) in enumerate(merges):
            ranks.setdefault(left + right, rank)
        fields["token_scores"] = [-float(ranks.get(token, len(merges))) for token in tokens]
        if tokenizer_model:
            crossing = next((pair for pair in merges if len({piece.strip("\n") == "" for piece in pair}) > 1), None)
            if crossing is not None:
                pair = f"{crossing[0]!r} and {crossing[1]!r}"
                raise _refusal(
                    folder, f"the tokenizer merges {pair}, a newline and other text, which llama.cpp never does"
                )
            fields["token_merges"] = [" ".join(pair) for pair in merges]
    else:
        pre = _pre(content, fast, folder)
        fields |= {"tokenizer_model": BYTE_LEVEL, "tokenizer_pre": pre, "add_space_prefix": False}
        # gguf omits an empty list, and llama.cpp then refuses the file: write a merge that never applies.
        specials = [token for token, kind in zip(tokens, kinds, strict=True) if kind in (CONTROL, UNUSED)] * 2
        fields["token_merges"] = [" ".join(pair) for pair in merges] or [" ".join(specials[:2] or tokens[:2])]
    fields |= _special_tokens(cfg, content, fast, folder)
    fields["chat_template"] = _chat_template(folder, family, fast)
    normalises = bool(content.get("normalizer")) and content["normalizer"].get("type") == "NFC"
    marks = (content.get("pre_tokenizer") or {}).get("type") == "Metaspace"
    drops = sorted(token.content for token in fast.added_tokens_decoder.values() if token.rstrip)
    return Vocabulary(fields, fast, normalises, marks, [] if drops_white_space(fast) else drops)


def _tokens(words: Subwords, rows: int, location: str) -> tuple[list[str], list[int]]:
    """Return text and type of every token id; ids without a token stand for unused embedding rows."""
    texts, spaced = {**words.tokens, **words.added}, words.byte_fallback
    if max(texts) >= rows:
        raise UserError(
            f"{location}: the tokenizer has token id {max(texts):,}, but the vocabulary has {rows:,} rows: use the "
            "model's tokenizer"
        )
    tokens, kinds = [], []
    for number in range(rows):
        text = texts.get(number)
        if text is None:
            text, kind = f"[PAD{number}]", UNUSED
        elif number in words.added:
            kind = CONTROL if number in words.special else USER_DEFINED
        else:
            kind = BYTE if spaced and len(text) == 6 and text.startswith("<0x") else NORMAL
        tokens.append(text)
        kinds.append(UNKNOWN if spaced and text == words.unknown else kind)
    return tokens, kinds


def _refusal(folder: Path, problem: str) -> UserError:
    return UserError(f"{folder}: {problem}: this model cannot be exported to GGUF")


def _rules(step: JsonDict | None) -> Iterator[str]:
    """Yield the pre-tokenizer's steps as text, for comparison with the rules that llama.cpp knows."""
    kind = None if step is None else step.get("type")
    if step is None:
        yield "none"
    elif kind == "Sequence":
        for inner in step.get("pretokenizers") or ():
            yield from _rules(inner)
    elif kind == "ByteLevel" and not step.get("add_prefix_space"):
        yield WORDS if step.get("use_regex", True) else BYTES
    elif kind == "Digits" and step.get("individual_digits"):
        yield "Digits"
    elif kind == "Split" and (step.get("behavior"), bool(step.get("invert"))) in (
        ("Isolated", False),
        ("Removed", True),
    ):
        yield str((step.get("pattern") or {}).get("Regex"))
    else:
        yield json.dumps(step, sort_keys=True)


def _pre(content: JsonDict, fast: Any, folder: Path) -> str:
    """Return llama.cpp's name for a byte-level tokenizer's pre-tokenizer rules."""
    rules, model = tuple(_rules(content.get("pre_tokenizer"))), content["model"]
    normalizer = content.get("normalizer")
    pre = PRE.get(rules) if normalizer is None or normalizer.get("type") == "NFC" else None
    if pre is None:
        found = f"found {' + '.join(rules)[:200]}, supported {', '.join(PRE.values())}"
        what = f"llama.cpp has no tokenizer that splits texts by the rules of this tokenizer.json ({found})"
        raise _refusal(folder, what)
    if bool(model.get("ignore_merges")) == (pre in WHOLE_WORDS):
        return pre
    if not model.get("merges") and model.get("ignore_merges") and _same_words(content, fast):
        return OF_WORDS
    ignores = bool(model.get("ignore_merges"))
    raise _refusal(folder, f"ignore_merges is {ignores} in this tokenizer.json, and the opposite in llama.cpp's {pre}")


def _same_words(content: JsonDict, fast: Any) -> bool:
    """Return True if a tokenizer without merges gives the same ids under llama.cpp's rules for whole words."""
    from tokenizers import Tokenizer

    split = next(rules[0] for rules, name in PRE.items() if name == OF_WORDS)
    steps = [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
    other = Tokenizer.from_str(json.dumps(content | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}))
    words = [fast.decode([number]) for number in content["model"]["vocab"].values()]
    texts = [*words, " ".join(words), "".join(words), *(f"{word}'s 12 {word}." for word in words)]
    return all(fast(text)["input_ids"] == other.encode(text).ids for text in texts)


def _special_tokens(cfg: ModelConfig, content: JsonDict, fast: Any, folder: Path) -> JsonDict:
    """Return GGUF metadata with special token ids, and flags for tokens that are added to every text."""
    ends = cfg.eos_token_ids or ((fast.eos_token_id,) if fast.eos_token_id is not None else ())
    bos = fast.bos_token_id if cfg.bos_token_id is None else cfg.bos_token_id
    unknown = content["model"].get("unk_token")
    ids = {
        "bos_token_id": bos,
        "eos_token_id": ends[0] if ends else None,
        "eot_token_id": ends[1] if len(ends) > 1 else None,
        "pad_token_id": cfg.pad_token_id,
        "unk_token_id": None if unknown is None else token_ids(content).get(unknown),
    }
    outside = [name for name, number in ids.items() if number is not None and not 0 <= number < cfg.text.vocab_size]
    if outside:
        raise UserError(
            f"{folder}: {outside[0]} {ids[outside[0]]} is outside the vocabulary of {cfg.text.vocab_size:,} tokens: "
            "use the model's tokenizer"
        )
    bare, marked = (fast("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    adds = {(): (False, False), (bos,): (True, False), (bos, ids["eos_token_id"]): (True, True)}
    added = tuple(marked[: len(marked) - len(bare)]) if marked[len(marked) - len(bare) :] == bare else None
    if added is None and marked[1:-1] == bare:
        added = (marked[0], marked[-1])
    if added not in adds:
        raise _refusal(folder, "the tokenizer adds other special tokens than begin and end")
    fields: JsonDict = {name: number for name, number in ids.items() if number is not None}
    return fields | dict(zip(("add_bos_token", "add_eos_token"), adds[added], strict=True))


def drops_white_space(tokenizer: Any) -> bool:
    """Return True if a tokenizer strips spaces after the same special tokens as Phi-3's."""
    strips = {token.content: token.rstrip for token in tokenizer.added_tokens_decoder.values() if token.special}
    keeping = {name for name, strip in strips.items() if not strip}
    return set(strips) >= KEEPING_MARKS | {"</s>"} and keeping == KEEPING_MARKS


def _chat_template(folder: Path, family: Family, fast: Any) -> str:
    """Return the chat template of a transformers folder, or the family's, with image tokens removed.

    llama.cpp keeps white space after special tokens, so white space that the tokenizer would drop is left out.
    """
    source_template = fast.chat_template
    source_template = source_template.get("default") if isinstance(source_template, dict) else source_template
    if isinstance(source_template, str) and family.layout == "transformers":
        return source_template
    template = template_of(family, read_fields(folder / "config.json"), fast.eos_token)
    drops = [token.content for token in fast.added_tokens_decoder.values() if token.rstrip]
    marks = {name: getattr(template, name) for name in ("system_start", "system_end", "user", "user_end", "assistant")}
    bare = {name: text.rstrip() for name, text in marks.items() if text.rstrip().endswith(tuple(drops))}
    return chat_template(dataclasses.replace(template, **bare), "")
