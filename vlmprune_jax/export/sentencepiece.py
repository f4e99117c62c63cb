"""Trimming of a SentencePiece `tokenizer.model`: its protobuf is edited, not interpreted, so nothing else changes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from vlmprune_jax.core.errors import UserError

_PIECE, _TRAINER = 1, 2  # fields of ModelProto
_VOCAB_SIZE, _IDS = 4, {40: 0, 41: 1, 42: 2, 43: -1}  # of TrainerSpec; unk, bos, eos and pad with their defaults
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


def trim_pieces(content: bytes, kept: Collection[int], new_ids: Mapping[int, int], where: str) -> bytes:
    """Return a SentencePiece model file with only the kept pieces, in their old order, scores and types unchanged.

    Args:
      content: the file.
      kept: old ids; those beyond the pieces are added tokens of other files.
      new_ids: old id -> new id.
      where: name of the file, for messages.

    Raises:
      UserError: not a SentencePiece model.
    """
    wanted = set(kept)
    fields = list(_fields(content, where))
    numbers = iter(range(len(fields)))
    pieces = [raw for field, raw, _ in fields if field == _PIECE and next(numbers) in wanted]
    if not pieces:
        raise UserError(f"{where}: contains none of the tokens that the plan keeps: restore it from its source")
    rest = [
        _length_delimited(_TRAINER, _trainer(value, len(pieces), new_ids, where)) if field == _TRAINER else raw
        for field, raw, value in fields
        if field != _PIECE
    ]
    return b"".join([*pieces, *rest])


def _trainer(content: bytes, size: int, new_ids: Mapping[int, int], where: str) -> bytes:
    """Return the trainer_spec with the new size and ids; a dropped special token gets id -1 ("none")."""
    kept = [raw for field, raw, _ in _fields(content, where) if field not in (_VOCAB_SIZE, *_IDS)]
    stated = {field: int.from_bytes(value, "little") for field, _, value in _fields(content, where) if field in _IDS}
    changed = [_number(_VOCAB_SIZE, size)]
    for field, default in _IDS.items():
        old = stated.get(field, default)
        changed.append(_number(field, new_ids.get(old, -1) if 0 <= old < 2**31 else -1))
    return b"".join([*kept, *changed])


def _fields(content: bytes, where: str) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield (number, field bytes, value) for each field of a protobuf message; integers are little-endian bytes."""
    at = 0
    try:
        while at < len(content):
            start = at
            key, at = _varint(content, at)
            kind = key & 7
            if kind == _VARINT:
                number, at = _varint(content, at)
                value = number.to_bytes(8, "little")
            else:
                if kind == _BYTES:
                    size, at = _varint(content, at)
                else:
                    size = {_FIXED64: 8, _FIXED32: 4}[kind]
                value, at = content[at : at + size], at + size
            if at > len(content):
                raise IndexError
            yield key >> 3, content[start:at], value
    except (IndexError, KeyError, OverflowError):
        raise UserError(f"{where}: is no SentencePiece model, or is damaged: restore it from its source") from None


def _varint(content: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = content[at]
        number |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return number, at
        if shift > 63:
            raise OverflowError


def _encoded(number: int) -> bytes:
    number &= 2**64 - 1  # negative numbers take ten bytes
    groups = [number >> shift & 127 for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])


def _number(field: int, value: int) -> bytes:
    return _encoded(field << 3 | _VARINT) + _encoded(value)


def _length_delimited(field: int, value: bytes) -> bytes:
    return _encoded(field << 3 | _BYTES) + _encoded(len(value)) + value
