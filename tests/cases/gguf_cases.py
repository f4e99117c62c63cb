"""Tokenizers for tiny models, and how far llama.cpp's numbers may be from ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIALS = ("<unk>", "<s>", "</s>", "<pad>")


def byte_tokenizer(folder: Path, specials: tuple[str, ...] = SPECIALS) -> Path:
    """A byte-level tokenizer.json with these marks and all 256 bytes, without merges to speak of."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*specials, *bytes_])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(one, normalized=False, special=True) for one in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def differences(expected: Any, found: np.ndarray, top: int = 5) -> tuple[float, float, float]:
    """Largest and mean difference of the log-probabilities of the likeliest words, and the mean divergence (nats)."""
    ours, theirs = (log_softmax(np.asarray(one, np.float64), axis=-1) for one in (expected, found))
    best = np.argsort(-ours, axis=-1)[..., :top]
    gaps = np.abs(np.take_along_axis(ours - theirs, best, axis=-1))
    return float(gaps.max()), float(gaps.mean()), float((np.exp(ours) * (ours - theirs)).sum(-1).mean())
