"""English text that every Python has: the topics of its language reference (`pydoc_data.topics`), in two halves."""

from __future__ import annotations

import os
import pydoc_data.topics
from pathlib import Path
from typing import Any

from vlmprune_jax.base.files import replacing
from vlmprune_jax.io.data.records import Record

ASKED = "Go on with the language reference."


def topics(half: int) -> str:
    """Return half of the English help texts that come with Python (`pydoc_data.topics`), for perplexity."""
    texts = pydoc_data.topics.topics
    return "".join(texts[name].replace("\n   ", "\n") + "\n" for name in sorted(texts)[half::2])


def write_topics(path: Path, half: int, letters: int) -> str:
    """Write the first `letters` characters of half of Python's help topics to a file; return its path."""
    return write_shared(path, topics(half)[:letters])


def write_shared(path: Path, text: str) -> str:
    """Write a text file that the runs of a sweep may write at the same time; return its path."""
    with replacing(path, writer=f".{os.getpid()}") as file:
        file.write(text.encode())
    return str(path)


def topic_records(half: int, letters: int) -> list[Record]:
    """Return every second help text of Python, from number `half` on, as records of `letters` characters."""
    text = topics(half)
    pieces = [text[at : at + letters] for at in range(0, len(text) - letters, letters)]
    return [Record(f"topics-{n}", (("human", ASKED), ("gpt", piece)), ()) for n, piece in enumerate(pieces)]


def topic_entries(half: int, letters: int) -> list[dict[str, Any]]:
    """Return half of Python's help topics as entries of a LLaVA data file."""
    return [
        {"id": record.id, "conversations": [{"from": who, "value": text} for who, text in record.turns]}
        for record in topic_records(half, letters)
    ]
