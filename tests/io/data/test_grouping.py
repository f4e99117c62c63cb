"""Training records of like length and modality share batches in length buckets; what cannot be read keeps its place."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from batch_cases import ORDERED, golden_encoder, golden_records
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.recovery.loop import shapes_of
from vlmprune_jax.io.data.batching import MEGABATCH, Batch, grouped_order, train_batches
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.encoding import measure
from vlmprune_jax.io.data.images import load_image_processor
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.data.records import Record, read_records
from vlmprune_jax.io.families import templates

TRAIN = ORDERED | {"epochs": 2, "threads": 2}


@pytest.fixture(scope="module")
def samples(goldens):
    """The golden samples (images and text, 1 to 3 rounds), one with two images, and ever longer texts."""
    *records, two = golden_records(goldens)
    long = [Record(f"long{n}", (("human", "Say it."), ("gpt", "It is 10:45. " * n)), ()) for n in range(1, 17)]
    return [*records, two, *long]


@pytest.fixture(scope="module")
def encoder(goldens):
    return golden_encoder(goldens, max_length=512, truncate=True, length_buckets=(160, 256, 512))


def sizes_of(records, encoder, on_error="stop"):
    return measure(records, encoder, on_error=on_error, threads=2)


def equal(first, second):
    return (first.record_ids, first.skipped) == (second.record_ids, second.skipped) and jax.tree.all(
        jax.tree.map(np.array_equal, first.arrays, second.arrays)
    )


# --- the order ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    records=st.integers(1, 300),
    batch_size=st.integers(1, 9),
    epoch=st.integers(0, 5),
    group_by=st.sampled_from(["length", "modality_length"]),
    seed=st.integers(0, 9),
)
def test_every_record_once_an_epoch_and_batches_stay_whole(records, batch_size, epoch, group_by, seed):
    draw = np.random.default_rng(seed)
    sizes = np.stack([draw.integers(1, 99, records), draw.integers(0, 2, records)], 1)
    options = {"group_by": group_by, "batch_size": batch_size, "seed": seed, "epoch": epoch}
    order = grouped_order(sizes, **options)
    assert sorted(order.tolist()) == [*range(records)]
    assert np.array_equal(order, grouped_order(sizes.copy(), **options))
    begun = -epoch * records % batch_size  # what fills up the batch that the last epoch left open
    whole = (records - begun) // batch_size if records > begun else 0
    mixed = 0
    for number in range(whole):
        rows = sizes[order[begun + number * batch_size :][:batch_size]]
        mixed += group_by == "modality_length" and len(set(rows[:, 1].tolist())) > 1
    assert mixed <= 1  # the two modalities' rests


def test_batches_are_of_like_length_and_in_random_order():
    draw = np.random.default_rng(0)
    sizes = np.stack([draw.integers(1, 1000, 8 * 2 * MEGABATCH), np.ones(8 * 2 * MEGABATCH, int)], 1)
    options = {"group_by": "length", "batch_size": 8, "seed": 1}
    first, second = (sizes[grouped_order(sizes, epoch=epoch, **options), 0].reshape(-1, 8) for epoch in range(2))
    for epoch in (first, second):
        spread = (epoch.max(1) - epoch.min(1)).mean()
        assert spread < 30, spread  # of 1,000; 778 without grouping
        assert epoch[0].max() == sizes[:, 0].max()  # what may not fit in memory is met at once
        assert abs(np.corrcoef(epoch.mean(1), np.arange(len(epoch)))[0, 1]) < 0.3  # nor short ones first
    assert not np.array_equal(np.sort(first, 1), np.sort(second, 1))


def test_unreadable_records_do_not_empty_a_batch():
    draw = np.random.default_rng(0)
    sizes = np.stack([draw.integers(1, 1000, 6400), np.ones(6400, int)], 1)
    sizes[draw.permutation(6400)[:640]] = 0
    order = grouped_order(sizes, group_by="modality_length", batch_size=16, seed=1, epoch=0)
    lost = (sizes[order, 0] == 0).reshape(-1, 16).sum(1)
    assert lost.sum() == 640
    assert lost.max() <= 8


# --- sizes and buckets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [0, 190, -1])
def test_sizes_are_those_of_the_rows(samples, encoder, max_length):
    """Of any length, with several of them cut, and with the longest cut by one token."""
    if max_length == -1:
        max_length += int(sizes_of(samples, dataclasses.replace(encoder, max_length=0))[:, 0].max())
    changed = dataclasses.replace(encoder, max_length=max_length, length_buckets=None)
    sizes = sizes_of(samples, changed)
    assert sizes[:, 0].tolist() == [len(changed.training_tokens(record)[0]) for record in samples]
    assert sizes[:, 1].tolist() == [len(record.images) for record in samples]
    assert max_length in (0, sizes[:, 0].max())


def test_measuring_tells_how_far_it_is(samples, encoder, monkeypatch):
    """And the sizes are the same in chunks of any length."""
    expected, told = sizes_of(samples, encoder), []
    monkeypatch.setattr("vlmprune_jax.io.data.encoding._CHUNK", 7)
    found = measure(samples[:20], encoder, on_error="stop", threads=2, progress=told.append)
    assert told == [7, 14, 20]
    assert np.array_equal(found, expected[:20])


def test_sizes_of_tiles_and_a_tokenizer_without_bos(goldens, samples, encoder):
    images = load_image_processor(
        goldens / "ckpt/internvl", DataSpec(aspect_ratio="pad", cache_megabytes=10, max_tiles=6)
    )
    loaded = load_tokenizer(goldens / "tokenizers/internvl")
    changes = {"template": templates()["phi3-chat"], "tokens_per_image": 4, "tile_buckets": (1, 4, 8)}
    tiled = dataclasses.replace(encoder, tokenizer=loaded, image_loader=images, max_length=0, **changes)
    bunny = dataclasses.replace(
        encoder, tokenizer=load_tokenizer(goldens / "tokenizers/bunny"), template=templates()["bunny"], max_length=0
    )
    for other in (tiled, bunny):
        sizes = sizes_of(samples, other)
        assert sizes[:, 0].tolist() == [len(other.training_tokens(record)[0]) for record in samples]
        assert sizes[:, 1].tolist() == [other.image_sizes(record, other.shapes(record))[0] for record in samples]


def test_batches_have_the_smallest_bucket(samples, encoder):
    sizes, by_id = sizes_of(samples, encoder), {record.id: place for place, record in enumerate(samples)}
    shapes = set()
    for batch in train_batches(samples, encoder, **TRAIN, sizes=sizes, group_by="modality_length"):
        tokens = batch.arrays["input_ids"].shape[1]
        longest = sizes[[by_id[name] for name in batch.record_ids], 0].max()
        assert tokens == next(bucket for bucket in (160, 256, 512) if bucket >= longest)
        assert np.array_equal(batch.arrays["attention_mask"].sum(1), sizes[[by_id[n] for n in batch.record_ids], 0])
        shapes.add(tokens)
    assert len(shapes) == 3


@pytest.mark.parametrize("group_by", ["none", "length", "modality_length"])
def test_processes_join_to_the_global_batch_and_resume(samples, encoder, group_by):
    options = {**TRAIN, "sizes": sizes_of(samples, encoder), "group_by": group_by, "epochs": None}

    def stream(**place):
        return iter(train_batches(samples, encoder, **{**options, **place}))

    running = stream()
    whole = [next(running) for _ in range(20)]
    parts = [stream(mine=mine) for mine in np.split(np.arange(options["batch_size"]), 2)]
    for batch in whole:
        halves = [next(part) for part in parts]
        names = tuple(name for half in halves for name in half.record_ids)
        arrays = jax.tree.map(lambda *arrays: np.concatenate(arrays), *(half.arrays for half in halves))
        assert equal(batch, Batch(arrays, names))
    seen = [name for batch in whole for name in batch.record_ids]
    for epoch in range(2):
        assert sorted(seen[epoch * len(samples) : (epoch + 1) * len(samples)]) == sorted(r.id for r in samples)
    assert seen[: len(samples)] != seen[len(samples) : 2 * len(samples)]
    resumed = stream()
    for _ in range(7):
        next(resumed)
    state = resumed.get_state()
    fresh = stream()
    fresh.set_state(state)
    assert all(equal(next(fresh), batch) for batch in whole[7:])
    for first, last in ((0, 20), (7, 20), (7, 9), (9, 9)):  # what is compiled before such a training, or its rest
        kinds = train_batches(samples, encoder, **options).kinds(first, last)
        arrays = [batch.arrays for batch in whole[first:last]]
        met = {shapes_of(of) for of in arrays}
        assert len(kinds) == len(met)
        assert set(map(shapes_of, kinds)) == met


# --- records that cannot be read --------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path, goldens):
    """A JSON-lines file whose records are good, or broken in each way; images beside it."""
    for number in range(4):
        (tmp_path / f"img{number}.png").write_bytes((goldens / f"data/images/img{number}.png").read_bytes())
    (tmp_path / "half.png").write_bytes((tmp_path / "img0.png").read_bytes()[:200])
    (tmp_path / "bomb.png").write_bytes(_png_header(40_000, 40_000))

    def line(name, image, text="It is."):
        question = "What?" if image is None else "<image>\nWhat?"
        talk = [{"from": "human", "value": question}, {"from": "gpt", "value": text}]
        return json.dumps({"id": name, "conversations": talk} | ({} if image is None else {"image": image}))

    lines = [line(f"good{n}", f"img{n % 4}.png" if n % 3 else None) for n in range(9)]
    bad = [line("missing", "none.png"), '{"id": "no JSON"', line("half", "half.png"), line("bomb", "bomb.png")]
    bad += ['{"id": "empty", "conversations": []}', line("late", "img1.png", "x" * 300 + "<image>")]
    (tmp_path / "data.jsonl").write_text("\n".join([*lines[:5], *bad, *lines[5:]]))
    return tmp_path / "data.jsonl"


def _png_header(width, height):
    import struct
    import zlib

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


PROBLEMS = {
    "missing": "none.png does not exist",
    "6": "line 7: not valid JSON",
    "half": "not a readable image",
    "bomb": "bomb.png (record bomb): image is far too large",
    "empty": "'conversations' must be a non-empty list",
    "late": "2 <image> placeholder(s)",
}


def test_skipped_records_are_padding_in_their_places(broken, encoder):
    records = read_records(broken, broken.parent, on_error="skip")
    assert len(records) == 15
    sizes = sizes_of(records, encoder, "skip")
    options = {**TRAIN, "epochs": 1, "batch_size": 5, "sizes": sizes, "on_error": "skip"}
    batches = list(train_batches(records, encoder, **options))
    skipped = dict(pair for batch in batches for pair in batch.skipped)
    assert skipped.keys() == PROBLEMS.keys()
    for name, words in PROBLEMS.items():
        assert words in skipped[name]
    stand_ins = [dataclasses.replace(r, turns=records[0].turns, images=(), problem=None) for r in records]
    plain = {**options, "sizes": sizes_of(stand_ins, encoder), "on_error": "stop"}
    for batch, expected in zip(batches, train_batches(stand_ins, encoder, **plain), strict=True):
        names = [name for name, _ in batch.skipped]
        assert batch.record_ids == tuple("" if name in names else name for name in expected.record_ids)
        empty = np.array([name == "" for name in batch.record_ids])
        assert np.array_equal(batch.arrays["attention_mask"].any(1), ~empty)
        assert (batch.arrays["labels"][empty] == -100).all()
        assert not batch.arrays["media"]["vision"].values[empty].any()
    parts = [list(train_batches(records, encoder, **options, mine=np.array([row]))) for row in range(5)]
    for number, batch in enumerate(batches):
        assert tuple(part[number].record_ids[0] for part in parts) == batch.record_ids
        assert {part[number].arrays["input_ids"].shape for part in parts} == {(1, 160)}


def test_what_one_process_cannot_measure_no_process_reads(broken, encoder):
    """Shapes must be equal everywhere: a record that measured zeros is skipped even where it could be read."""
    records = [record for record in read_records(broken, broken.parent, on_error="skip") if record.id == "good1"]
    options = {**TRAIN, "batch_size": 1, "epochs": 1, "on_error": "skip"}
    (batch,) = train_batches(records, encoder, **options, sizes=np.zeros((1, 3), np.int32))
    assert batch.skipped == (("good1", "record good1: could not be read when measured"),)
    assert not batch.arrays["attention_mask"].any()


def test_stopping_names_the_record(broken, encoder):
    with pytest.raises(UserError, match=r"none\.png does not exist"):
        read_records(broken, broken.parent)
    records = {record.id: record for record in read_records(broken, broken.parent, on_error="skip")}
    for name in ("missing", "6", "empty", "late"):
        with pytest.raises(UserError, match=r"data\.jsonl"):
            sizes_of([records[name]], encoder)
    for name in ("half", "bomb"):
        sizes = sizes_of([records[name]], encoder)
        with pytest.raises(UserError, match=rf"\(record {name}\)"):
            next(iter(train_batches([records[name]], encoder, **{**TRAIN, "batch_size": 1}, sizes=sizes)))
    uncut = dataclasses.replace(encoder, max_length=100, truncate=False)
    with pytest.raises(
        UserError, match=r"record good1: has \d+ tokens with its images, more than the maximum length 100"
    ):
        sizes_of([records["good1"]], uncut)
    assert not sizes_of([records["good1"]], uncut, "skip").any()


def test_refused_settings(samples, encoder):
    plain = dataclasses.replace(encoder, length_buckets=None)
    for changed, options in ((plain, {"group_by": "length"}), (plain, {"on_error": "skip"}), (encoder, {})):
        with pytest.raises(UserError, match="need record sizes: pass sizes=measure"):
            train_batches(samples, changed, **TRAIN, **options)
