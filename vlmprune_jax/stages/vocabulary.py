"""Measurement of a trimmed vocabulary on held-out texts -> `vocabulary.json`."""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlmprune_jax.data import inputs
from vlmprune_jax.data.config import DataSpec
from vlmprune_jax.data.datasets import PREFIX as DATASETS
from vlmprune_jax.data.prompts import load_tokenizer
from vlmprune_jax.data.tfds import PREFIX as TFDS
from vlmprune_jax.evaluation.runner import log_likelihoods
from vlmprune_jax.models.params import count_params
from vlmprune_jax.models.vlm import Model
from vlmprune_jax.prune.config import VocabularyConfig
from vlmprune_jax.prune.plan import KeptVocabulary
from vlmprune_jax.prune.surgery import trim_vocabulary
from vlmprune_jax.prune.token_sources import Source, read_sample, tokens_of
from vlmprune_jax.stages.work import Work
from vlmprune_jax.workdir.vocabulary import TextSample, VocabularyReport

_MEASURED = 2**15  # bytes of text for bits per byte
_WINDOW = 2048  # tokens, if the model has so many positions
_SCRIPTS = 8  # listed at most, the most frequent first


def sources_of(config: VocabularyConfig, data: DataSpec) -> VocabularyConfig:
    """Return the settings with the training records as sources if none are named."""
    named = config.sources or ((data.train,) if data.train is not None else ())
    return dataclasses.replace(config, sources=named)


def vocabulary_files(config: VocabularyConfig, data: DataSpec) -> dict[str, Path | str]:
    """Return the files that the tokens are chosen by, by name; none if the vocabulary is kept whole."""
    if config.size is None:
        return {}
    if not config.sources:
        return inputs.record_files(data, "train")
    named = (*config.sources, *config.held_out)
    files = {name: name if name.startswith((TFDS, DATASETS)) else Path(name) for name in named}
    return {f"prune.vocabulary {name}": file for name, file in files.items()}


def report_vocabulary(work: Work, config: VocabularyConfig, vocabulary: KeptVocabulary) -> VocabularyReport:
    """Compare both tokenizers, and the unpruned model with both vocabularies, on the held-out texts."""
    cfg = work.config(work.teacher)
    source = Source.of(work.teacher, cfg)
    texts = read_sample(source, config).held_out
    samples = [_sample("all", texts, source, work.out, vocabulary)] if texts else []
    scripts = _by_script(texts)
    if len(scripts) > 1:
        samples += [_sample(name, some, source, work.out, vocabulary) for name, some in scripts]
    if texts and config.bits:
        samples[0] = _with_bits(samples[0], work, texts, source, vocabulary)
    return VocabularyReport(
        rows_before=vocabulary.rows_before,
        rows=len(vocabulary.kept),
        parameters=count_params(cfg) - count_params(vocabulary.apply_to(cfg)),
        samples=samples,
    )


def vocabulary_lines(report: VocabularyReport) -> Iterator[str]:
    """Yield the report in words."""
    yield f"vocabulary: {report.rows:,} of {report.rows_before:,} tokens, {report.parameters:,} parameters fewer"
    for one in report.samples[:1]:
        bits = ""
        if one.bits_before is not None and one.bits_after is not None:
            bits = f"; {one.bits_before:.3f} bits per byte before, {one.bits_after:.3f} after"
        yield (
            f"on {one.texts:,} held-out texts: {one.equal:,} split as before, {one.growth:+.2%} tokens, {one.broken} "
            f"of {one.kept:,} texts of kept tokens split in another way{bits}"
        )


def _sample(name: str, texts: Sequence[str], source: Source, pruned: Path, vocabulary: KeptVocabulary) -> TextSample:
    """Split texts with both tokenizers."""
    kept, equal, whole, broken, sizes = set(vocabulary.kept), 0, 0, 0, Counter[str]()
    after = tokens_of(load_tokenizer(pruned), texts)
    for old, new in zip(source.tokens(texts), after, strict=True):
        same = old == [vocabulary.kept[i] for i in new]
        inside = kept.issuperset(old)
        equal, whole, broken = equal + same, whole + inside, broken + (inside and not same)
        sizes.update(before=len(old), after=len(new))
    return TextSample(
        name=name,
        texts=len(texts),
        equal=equal,
        kept=whole,
        broken=broken,
        bytes=sum(len(text.encode()) for text in texts),
        tokens_before=sizes["before"],
        tokens_after=sizes["after"],
    )


def _with_bits(
    sample: TextSample, work: Work, texts: Sequence[str], source: Source, vocabulary: KeptVocabulary
) -> TextSample:
    """Return the sample with the bits per byte of the unpruned model, with the whole and the trimmed vocabulary."""
    some, size = list[str](), 0
    for text in texts:
        if some and size + len(text.encode()) > _MEASURED:
            break
        some.append(text)
        size += len(text.encode())
    model = work.load(work.teacher, ("text", "projector"))
    bits = [
        _bits(one, [i for ids in tokens for i in ids], size)
        for one, tokens in (
            (model, source.tokens(some)),
            (trim_vocabulary(model, vocabulary), tokens_of(load_tokenizer(work.out), some)),
        )
    ]
    values = {f: getattr(sample, f) for f in sample.__struct_fields__}
    return TextSample(**{**values, "measured_bytes": size, "bits_before": bits[0], "bits_after": bits[1]})


def _bits(model: Model, ids: list[int], size: int) -> float | None:
    """Return the bits per byte of a text of `size` bytes; the first token of a window counts as its others do."""
    if len(ids) < 2:
        return None
    window = max(min(_WINDOW, model.cfg.text.max_positions), 2)
    scores = log_likelihoods(model, ids, window=window, batch_size=1)
    nats, predicted = (sum(score[name] for score in scores) for name in ("nll", "tokens"))
    return nats / predicted * len(ids) / math.log(2) / size


def _by_script(texts: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Group texts by the script of most of their letters, the largest group first."""
    groups: dict[str, list[str]] = {}
    for text in texts:
        letters = Counter(unicodedata.name(letter, "other").split()[0] for letter in text[:2000] if letter.isalpha())
        groups.setdefault(letters.most_common(1)[0][0].capitalize() if letters else "Other", []).append(text)
    return sorted(groups.items(), key=lambda item: -len(item[1]))[:_SCRIPTS]
