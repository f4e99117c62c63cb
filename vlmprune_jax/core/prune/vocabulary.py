"""Choose the tokens that a smaller vocabulary keeps, so that texts made of kept tokens are split as before.

The guarantee: a text whose full tokenisation uses kept tokens only gets the same tokens from the trimmed tokenizer.

BPE applies the merge of lowest rank that is present, and never undoes one. If every merge of the full run is kept, the
kept merge of lowest rank is the same at every step, so both runs are identical. No merge crosses the borders of a final
token, so the merges that build a token are those of the full run on the string of that token: `Subwords.closure` adds
their operands and results. Unigram (best path) and WordPiece (longest match) need no closure: the best of more paths
that uses kept tokens only is still the best. Only the order in a run such as "=====", all orders of which are equally
probable, may change: rounding decides it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vlmprune_jax.base.errors import UserError

CLOSED, LOCAL = ("BPE",), ("Unigram", "WordPiece", "WordLevel")
SPACE = "\u2581"  # how SentencePiece spells a space


def byte_symbols() -> frozenset[str]:
    """Return the 256 characters that represent bytes in byte-level tokenizers (GPT-2's `bytes_to_unicode`)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return frozenset([*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))])


@dataclass(frozen=True, eq=False)
class Subwords:
    """Subword model of a tokenizer.json: tokens and merges.

    `tokens`: id -> text of every token that is not an added one. `ranks`: rank of each merge (BPE). `added`: id -> text
    of added tokens, which are matched before the subword model sees the text. `byte_level`: bytes are spelt by
    `byte_symbols`; `byte_fallback`: characters without a token are spelt by `<0x00>` ... `<0xFF>`.
    """

    kind: str
    tokens: Mapping[int, str]
    ranks: Mapping[tuple[str, str], int]
    added: Mapping[int, str]
    special: frozenset[int]
    unknown: str | None
    byte_level: bool
    byte_fallback: bool

    @classmethod
    def of(cls, content: Mapping[str, Any], location: str) -> Subwords:
        """Return the subword model in the content of a tokenizer.json.

        Raises UserError for a type of tokenizer for which trimming is not exact.
        """
        model = content["model"]
        kind = model.get("type") or ("BPE" if "merges" in model else "Unigram")
        if kind not in (*CLOSED, *LOCAL):
            raise UserError(
                f"{location}: tokenizers of type {kind!r} cannot be trimmed (supported: {', '.join(CLOSED + LOCAL)})"
            )
        vocab = model["vocab"]
        if isinstance(vocab, list):
            texts = dict(enumerate(piece for piece, _ in vocab))
        else:
            texts = {i: text for text, i in vocab.items()}
        additions = content.get("added_tokens") or ()
        added = {token["id"]: token["content"] for token in additions}
        merges = [tuple(x) if isinstance(x, list) else tuple(x.split(" ", 1)) for x in model.get("merges") or ()]
        unknown = model.get("unk_token")
        if unknown is None and model.get("unk_id") is not None:
            unknown = texts[model["unk_id"]]
        return cls(
            kind=kind,
            tokens={i: text for i, text in texts.items() if i not in added},
            ranks={pair: rank for rank, pair in reversed(list(enumerate(merges)))},
            added=added,
            special=frozenset(token["id"] for token in additions if token.get("special")),
            unknown=unknown,
            byte_level="ByteLevel" in _types(content.get("pre_tokenizer")) | _types(content.get("decoder")),
            byte_fallback=bool(model.get("byte_fallback")),
        )

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """Mapping {token text: id} of the subword model."""
        return {text: i for i, text in self.tokens.items()}

    @functools.cached_property
    def required(self) -> frozenset[int]:
        """Tokens that any text may need: bytes, the unknown token, and SentencePiece's space symbol."""
        texts = {*byte_symbols()} if self.byte_level else set[str]()
        if self.byte_fallback or self.kind == "Unigram":
            texts |= {SPACE, *(f"<0x{byte:02X}>" for byte in range(256))}
        texts |= {self.unknown} if self.unknown is not None else set()
        reserved = ("<unused", "<|reserved_")  # added tokens that occur in no text
        added = frozenset(i for i, text in self.added.items() if not text.startswith(reserved))
        return added | frozenset(self.ids[text] for text in texts if text in self.ids)

    def derivation(self, text: str) -> Iterator[tuple[str, str]]:
        """Yield, in order, the merges by which BPE builds a token from characters."""
        symbols = [symbol for letter in text for symbol in self._spell(letter)]
        while len(symbols) > 1:
            ranked = ((self.ranks.get(pair), place) for place, pair in enumerate(itertools.pairwise(symbols)))
            best = min(((rank, place) for rank, place in ranked if rank is not None), default=None)
            if best is None:
                return
            place = best[1]
            yield symbols[place], symbols[place + 1]
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]

    def _spell(self, letter: str) -> list[str]:
        """Return the symbols from which BPE starts for a character: itself, or its bytes if it has no token."""
        if letter in self.ids or not self.byte_fallback:
            return [letter]
        return [f"<0x{byte:02X}>" for byte in letter.encode()]

    def closure(self, kept: Iterable[int]) -> set[int]:
        """Return these tokens plus all tokens that BPE needs to build them, and the `required` tokens."""
        closed = {*self.required, *kept}
        return closed.union(*(self.needs(i) for i in closed))

    @functools.cache  # noqa: B019 (lives as long as the tokenizer; closures repeat while filling)
    def needs(self, i: int) -> frozenset[int]:
        """Return the intermediate tokens from which BPE builds a token (none for tokenizers without merges)."""
        text = self.tokens.get(i, "") if self.kind in CLOSED else ""
        pieces = {symbol for letter in text for symbol in self._spell(letter)}
        pieces |= {piece for pair in self.derivation(text) for piece in (*pair, "".join(pair))}
        return frozenset(self.ids[piece] for piece in pieces if piece in self.ids)

    def by_rank(self) -> Iterator[int]:
        """Yield the tokens in the order in which the tokenizer was trained: by merge rank (BPE) or by id."""
        if self.kind not in CLOSED:
            yield from sorted(self.tokens)
            return
        yield from (i for text, i in sorted(self.ids.items(), key=lambda item: item[1]) if len(text) == 1)
        merged = (self.ids.get("".join(pair)) for pair in sorted(self.ranks, key=self.ranks.__getitem__))
        yield from dict.fromkeys(i for i in merged if i is not None)


def check_size(size: int | None, rows: int) -> None:
    """Raise UserError if `size` exceeds the number of rows of the model's vocabulary; None = no limit."""
    if size is not None and size > rows:
        raise UserError(
            f"prune.vocabulary.size={size:,} is more than the model's vocabulary of {rows:,} tokens: set a smaller "
            "size, or leave it out"
        )


def choose_tokens(
    subwords: Subwords,
    used: Mapping[int, int] | Collection[int],
    *,
    size: int | None = None,
    multiple: int = 64,
    always: Collection[int] = (),
) -> tuple[int, ...]:
    """Return the sorted ids of tokens to keep: required tokens, then the most frequent, then by merge rank.

    Args:
      subwords: the tokenizer's subword model.
      used: ids that the source texts use, with their counts if known.
      size: number of tokens to keep, rounded up to a multiple; None keeps only the closure of `used` and `always`.
      multiple: number of which the embedding's rows are a multiple (64; 128 per shard of a sharded vocabulary).
      always: additional ids to keep (ids in config files, chat templates, label sets).

    Raises UserError for ids beyond the vocabulary, or if `size` is smaller than what must be kept.
    """
    tokens = {*subwords.tokens, *subwords.added}
    beyond = sorted(set(used) - tokens)
    if beyond:
        raise UserError(f"vocabulary: token id {beyond[0]} is not in the tokenizer, which has {len(tokens):,} tokens")
    counts = used if isinstance(used, Mapping) else dict.fromkeys(used, 1)
    kept = subwords.closure(always if size is not None else {*used, *always})
    least = -(-len(kept) // multiple) * multiple
    wanted = least if size is None else min(-(-size // multiple) * multiple, max(len(tokens), len(kept)))
    if len(kept) > wanted:
        raise UserError(
            f"prune.vocabulary.size={size}: {len(kept):,} tokens must stay (bytes, special tokens, templates): set "
            f"at least {least:,}"
        )
    by_count = sorted(counts, key=lambda i: (-counts[i], i))
    for i in itertools.chain(by_count, subwords.by_rank(), sorted(tokens)):
        if len(kept) >= wanted:
            break
        missing = (subwords.needs(i) | {i}) - kept
        if len(kept) + len(missing) <= wanted:
            kept |= missing
    return tuple(sorted(kept))


def _types(step: Any) -> set[str]:
    """Return the type names of a tokenizer.json step and of all steps nested in it."""
    names = {str(step.get("type"))} if isinstance(step, dict) else set[str]()
    nested = step.values() if isinstance(step, dict) else step if isinstance(step, list) else ()
    return names.union(*map(_types, nested))
