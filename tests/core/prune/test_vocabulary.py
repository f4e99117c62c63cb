"""Trimmed vocabularies: texts made of kept tokens are split as before, by every kind of subword model."""

import functools
import json
import pydoc_data.topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import refused
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from vlmprune_jax.core.prune.vocabulary import Subwords, choose_tokens
from vlmprune_jax.io.exports.vocabulary import trim_tokenizer

TOPICS = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)[::2]]
SOURCES, HELD_OUT = TOPICS[0::2], TOPICS[1::2]
KINDS = ("byte_level", "ignore_merges", "sentencepiece", "gemma", "unigram", "wordpiece")


@functools.cache
def trained(kind: str) -> Tokenizer:
    """A tokenizer of 3,000 tokens, as its family has it, trained on all topics."""
    special = [AddedToken("<pad>", special=True), AddedToken("<eos>", special=True), AddedToken("<unk>", special=True)]
    options = {"vocab_size": 3000, "special_tokens": special, "show_progress": False}
    if kind in ("byte_level", "ignore_merges"):
        tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "ignore_merges"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    elif kind in ("sentencepiece", "gemma"):
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        steps = [normalizers.Replace(" ", "\u2581")]
        steps = steps if kind == "gemma" else [normalizers.Prepend("\u2581"), *steps]
        tokenizer.normalizer = normalizers.Sequence(steps)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        options["special_tokens"] = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(**options)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **options)
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**options)
    words = [word for text in TOPICS for word in text.split()] if kind == "gemma" else TOPICS
    tokenizer.train_from_iterator(words, trainer)
    if kind in ("sentencepiece", "gemma"):  # bytes are ordinary tokens there, not matched in texts
        content = json.loads(tokenizer.to_str())
        content["added_tokens"] = content["added_tokens"][:3]
        tokenizer = Tokenizer.from_str(json.dumps(content))
    return tokenizer


@functools.cache
def trimmed(kind: str) -> tuple[Tokenizer, tuple[int, ...]]:
    full = trained(kind)
    content = json.loads(full.to_str())
    used = {i for text in SOURCES[:6] for i in full.encode(text).ids}
    subwords = Subwords.of(content, kind)
    kept = choose_tokens(subwords, used, size=len(subwords.closure(used)) + 100, multiple=8)
    return Tokenizer.from_str(json.dumps(trim_tokenizer(content, kept))), kept


def check(kind: str, text: str) -> bool:
    """Assert the guarantee for a text; returns True if the text is made of kept tokens.

    A unigram model can split a run such as "=====" into the same tokens in several orders. All are equally probable,
    so the last bit of a sum chooses one, and dropped tokens change the sums that are compared.
    """
    full, (small, kept) = trained(kind), trimmed(kind)
    before, after = full.encode(text), small.encode(text)
    whole = {*before.ids} <= {*kept}
    if whole:
        split = [kept[i] for i in after.ids]
        assert split == before.ids or (kind == "unigram" and sorted(split) == sorted(before.ids)), (split, before.ids)
    return whole


@pytest.mark.parametrize("kind", KINDS)
def test_words_made_of_kept_tokens_are_split_as_before(kind):
    whole = [check(kind, word) for word in {word for text in HELD_OUT for word in text.split()}]
    assert len(whole) / 20 < sum(whole) < len(whole)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_text_made_of_kept_tokens_is_split_as_before(kind, data):
    kept = trimmed(kind)[1]
    ids = data.draw(st.lists(st.sampled_from(kept), min_size=1, max_size=12))
    check(kind, trained(kind).decode(ids))


@pytest.mark.parametrize("kind", ["byte_level", "ignore_merges", "sentencepiece", "gemma"])
@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_every_text_stays_encodable(kind, text):
    """Kept bytes spell what no kept token does."""
    full, (small, _) = trained(kind), trimmed(kind)
    assert small.decode(small.encode(text).ids) == full.decode(full.encode(text).ids)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "gemma"])
def test_without_the_closure_the_guarantee_breaks(kind):
    full = trained(kind)
    content = json.loads(full.to_str())
    subwords = Subwords.of(content, kind)
    used = {i for text in SOURCES for i in full.encode(text).ids}
    kept = tuple(sorted(used | subwords.required))
    assert len(subwords.closure(used)) > len(kept)
    small = Tokenizer.from_str(json.dumps(trim_tokenizer(content, kept)))
    words = {word for text in HELD_OUT for word in text.split()}
    whole = [text for text in words if {*full.encode(text).ids} <= {*kept}]
    assert any([kept[i] for i in small.encode(text).ids] != full.encode(text).ids for text in whole)


def test_sizes_and_ids_are_checked():
    subwords = Subwords.of(json.loads(trained("byte_level").to_str()), "x")
    kept = choose_tokens(subwords, {300, 301}, size=500, multiple=64)
    assert len(kept) == 512
    assert {0, 1, 2, 300, 301} <= {*kept}
    refused("token id 9999 is not in the tokenizer", choose_tokens, subwords, {9999})
    refused(r"vocabulary.size=64: 2.. tokens must stay .* set at least 320", choose_tokens, subwords, {300}, size=64)
    refused("type 'Magic'", Subwords.of, {"model": {"type": "Magic", "vocab": {"a": 0}}}, "tokenizer.json")


def test_ids_in_post_processors_follow():
    content = json.loads(trained("byte_level").to_str())
    token = {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<eos>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<eos>": token},
    }
    kept = (1, *choose_tokens(Subwords.of(content, "x"), set())[2:])
    assert trim_tokenizer(content, kept)["post_processor"]["special_tokens"]["<eos>"]["ids"] == [0]
