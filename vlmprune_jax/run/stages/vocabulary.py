"""Measurement of a trimmed vocabulary on held-out texts -> `vocabulary.json`."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.plans.kept import KeptVocabulary
from vlmprune_jax.core.prune.config import VocabularyConfig
from vlmprune_jax.core.prune.surgery import trim_vocabulary
from vlmprune_jax.core.prune.tables import Table
from vlmprune_jax.io.data import inputs
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.data.records import DATASETS, TFDS
from vlmprune_jax.io.exports.token_sources import Source, read_sample, tokens_of
from vlmprune_jax.run.evaluation.runner import log_likelihoods
from vlmprune_jax.run.stages.work import Work
from vlmprune_jax.run.workdir.vocabulary import TextSample, VocabularyReport

_MEASURED = 2**15  # bytes of text on which bits per byte are measured
_WINDOW = 2048  # window in tokens (at most the model's positions)
_SCRIPTS = 8  # maximum number of writing systems listed, most frequent first


def sources_of(config: VocabularyConfig, data: DataSpec) -> VocabularyConfig:
    """Return the vocabulary settings; if they name no source texts, the training records are the source."""
    named = config.sources or ((data.train,) if data.train is not None else ())
    return dataclasses.replace(config, sources=named)


def vocabulary_files(config: VocabularyConfig, data: DataSpec) -> dict[str, Path | str]:
    """Return {input name: file} of the texts from which the trimmed vocabulary is chosen; {} without trimming."""
    if config.size is None:
        return {}
    if not config.sources:
        return inputs.record_files(data, "train")
    named = (*config.sources, *config.held_out)
    for name in named:
        inputs.refuse_folder(name, "prune.vocabulary")
    files = {name: name if name.startswith((TFDS, DATASETS)) else Path(name) for name in named}
    return {f"prune.vocabulary {name}": file for name, file in files.items()}


def report_vocabulary(work: Work, config: VocabularyConfig, vocabulary: KeptVocabulary) -> VocabularyReport:
    """Compare original and trimmed tokenizer on held-out texts: tokens, and bits per byte of the model."""
    cfg = work.config(work.teacher)
    source = Source.of(work.teacher, cfg)
    texts, trimmed = read_sample(source, config).held_out, load_tokenizer(work.out)
    samples = [_sample("all", texts, source, trimmed, vocabulary)] if texts else []
    scripts = _by_script(texts)
    if len(scripts) > 1:
        samples += [_sample(name, some, source, trimmed, vocabulary) for name, some in scripts]
    if texts and config.bits:
        some, size = list[str](), 0
        for text in texts:
            if some and size + len(text.encode()) > _MEASURED:
                break
            some.append(text)
            size += len(text.encode())
        model = work.load(work.teacher, ("text", "projector"))
        versions = ((model, source.tokenizer), (trim_vocabulary(model, vocabulary), trimmed))
        bits = [_bits(version, [*itertools.chain(*tokens_of(by, some))], size) for version, by in versions]
        samples[0] = replace(samples[0], measured_bytes=size, bits_before=bits[0], bits_after=bits[1])
    return VocabularyReport(
        rows_before=vocabulary.rows_before,
        rows=len(vocabulary.kept),
        parameters=count_params(cfg) - count_params(vocabulary.apply_to(cfg)),
        samples=samples,
    )


def parse_size(text: str) -> int:
    """Convert a vocabulary size such as "16384" or "16k" (k = 1,024) to a number of tokens.

    Raises UserError for text of another form.
    """
    match = re.fullmatch(r"(\d{1,9})(k?)", text.strip().lower())
    if match is None or not int(match[1]):
        raise UserError(f"--sizes={text}: must be a number of tokens, such as 16384 or 16k")
    return int(match[1]) * (1024 if match[2] else 1)


def trade(folder: Path, cfg: ModelConfig, config: VocabularyConfig, sizes: Sequence[int]) -> Table:
    """Return a table by vocabulary size: parameters and bytes saved, and the increase in tokens per text."""
    source = Source.of(folder, cfg)
    sample, whole, rows = read_sample(source, config), count_params(cfg), list[list[str]]()
    before = max(sum(map(len, tokens_of(source.tokenizer, sample.held_out))), 1)
    for size in sizes:
        vocabulary = source.keep(sample.used, sample.listed, size, config.multiple)
        left, cost = count_params(vocabulary.apply_to(cfg)), ("", "", "")
        if sample.held_out:
            trimmed = _sample("all", sample.held_out, source, source.trimmed(vocabulary), vocabulary)
            texts = f"{trimmed.equal:,} of {trimmed.texts:,}"
            cost = (f"{100 * trimmed.growth:.2f}", f"{trimmed.tokens_after / trimmed.texts:,.1f}", texts)
        share = 100 * (whole - left) / whole
        rows.append([f"{len(vocabulary.kept):,}", f"{left:,}", f"{share:.1f}", f"{2 * left / 1e9:.3f}", *cost])
    per_text = f"{before / max(len(sample.held_out), 1):,.1f}"
    unpruned = [f"{cfg.text.vocab_size:,}", f"{whole:,}", "0.0", f"{2 * whole / 1e9:.3f}", "0.00", per_text, ""]
    costs = ["tokens, +%", "tokens a text", "texts split as before"]
    header = ["tokens", "parameters", "removed, %", "bfloat16, GB", *costs]
    return f"Vocabularies, on {len(sample.held_out):,} held-out texts", header, [unpruned, *rows]


def vocabulary_lines(report: VocabularyReport) -> Iterator[str]:
    """Yield the vocabulary report as lines of text."""
    yield f"vocabulary: {report.rows:,} of {report.rows_before:,} tokens, {report.parameters:,} parameters fewer"
    for sample in report.samples[:1]:
        bits = ""
        if sample.bits_before is not None and sample.bits_after is not None:
            bits = f"; {sample.bits_before:.3f} bits per byte before, {sample.bits_after:.3f} after"
        yield (
            f"on {sample.texts:,} held-out texts: {sample.equal:,} split as before, {sample.growth:+.2%} tokens, "
            f"{sample.broken} of {sample.kept:,} texts of kept tokens split in another way{bits}"
        )


def _sample(name: str, texts: Sequence[str], source: Source, trimmed: Any, vocabulary: KeptVocabulary) -> TextSample:
    """Count the tokens of texts before and after trimming the vocabulary."""
    kept, counts = set(vocabulary.kept), Counter[str]()
    for old, new in zip(tokens_of(source.tokenizer, texts), tokens_of(trimmed, texts), strict=True):
        equal, inside = old == [vocabulary.kept[i] for i in new], kept.issuperset(old)
        counts.update(equal=equal, kept=inside, broken=inside and not equal)
        counts.update(tokens_before=len(old), tokens_after=len(new))
    names = ("equal", "kept", "broken", "tokens_before", "tokens_after")
    size = sum(len(text.encode()) for text in texts)
    return TextSample(name=name, texts=len(texts), bytes=size, **{field: counts[field] for field in names})


def _bits(model: Model, ids: list[int], size: int) -> float | None:
    """Return a model's bits per byte on a text of `size` bytes; None if the text is too short."""
    if len(ids) < 2:
        return None
    window = max(min(_WINDOW, model.cfg.text.max_positions), 2)
    scores = log_likelihoods(model, ids, window=window, batch_size=1)
    nats, predicted = (sum(score[name] for score in scores) for name in ("nll", "tokens"))
    return nats / predicted * len(ids) / math.log(2) / size


def _by_script(texts: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Group texts by the writing system of most of their letters, largest group first."""
    groups: dict[str, list[str]] = {}
    for text in texts:
        letters = Counter(unicodedata.name(letter, "other").split()[0] for letter in text[:2000] if letter.isalpha())
        groups.setdefault(letters.most_common(1)[0][0].capitalize() if letters else "Other", []).append(text)
    return sorted(groups.items(), key=lambda item: -len(item[1]))[:_SCRIPTS]
