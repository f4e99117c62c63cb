"""Batches have the smallest shape that holds their rows, follow their seed, join over processes and resume exactly."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import refused

from vlmprune_jax.core.config import IGNORED
from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.core.recovery.loop import shapes_of
from vlmprune_jax.io.data.batching import MEGABATCH, Batch, grouped_order, train_batches
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.encoding import Encoder, measure
from vlmprune_jax.io.data.images import load_image_processor
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.data.records import Record, read_records
from vlmprune_jax.io.families import templates

TRAIN = {"batch_size": 4, "seed": 3, "drop_remainder": True, "epochs": 1, "threads": 2}
IN_ORDER = {"batch_size": 3, "threads": 1}
CONTEXT = 393
LENGTHS = (160, 256, 512)


def golden_encoder(goldens, **changes):
    """For rows with up to two images of the golden LLaVA."""
    images = load_image_processor(goldens / "ckpt/clip_tower", DataSpec(aspect_ratio="pad", cache_megabytes=1))
    options = {"max_images": 2, "truncate": False, "image_token_id": -200, "tokens_per_image": 16, **changes}
    tokenizer, template = load_tokenizer(goldens / "tokenizers/llava"), templates()["llava_v1"]
    return Encoder(tokenizer=tokenizer, template=template, image_loader=images, **options)


@pytest.fixture(scope="module")
def pictures(goldens):
    return read_records(goldens / "data/samples.json", goldens / "data/images")


@pytest.fixture(scope="module")
def two(pictures):
    turns, images = (("human", "<image>\n<image>\nSame?"), ("gpt", "No.")), pictures[0].images + pictures[2].images
    return Record("two", turns, images)


@pytest.fixture(scope="module")
def samples(pictures, two):
    """Short samples with one image, two images and none."""
    return [pictures[index] for index in (0, 2, 4, 7, 8, 11)] + [two]


@pytest.fixture(scope="module")
def encoder(goldens):
    return golden_encoder(goldens, max_length=220)


@pytest.fixture(scope="module")
def many(pictures, two):
    """The golden samples (images and text, 1 to 3 rounds), one with two images, and ever longer texts."""
    long = [Record(f"long{n}", (("human", "Say it."), ("gpt", "It is 10:45. " * n)), ()) for n in range(1, 17)]
    return [*pictures, two, *long]


@pytest.fixture(scope="module")
def bucketed(goldens):
    return golden_encoder(goldens, max_length=512, truncate=True, length_buckets=LENGTHS)


@pytest.fixture(scope="module")
def tiler(goldens):
    """The golden InternVL: 4 positions a tile; its images give 7, 4, 1 and 5 tiles of at most 6 and a thumbnail."""
    images = load_image_processor(
        goldens / "ckpt/internvl", DataSpec(aspect_ratio="pad", cache_megabytes=10, max_tiles=6)
    )
    return Encoder(
        tokenizer=load_tokenizer(goldens / "tokenizers/internvl"),
        template=templates()["phi3-chat"],
        max_length=292,
        image_loader=images,
        image_token_id=CONTEXT,
        tokens_per_image=4,
        max_images=2,
        truncate=False,
        tile_buckets=(1, 2, 4, 7),
    )


def slots_of(tiler, record):
    return tiler.image_sizes(record, tiler.shapes(record))[0]


def sizes_of(records, encoder, on_error="stop"):
    return measure(records, encoder, on_error=on_error, threads=2)


def equal(first, second):
    return (first.record_ids, first.skipped) == (second.record_ids, second.skipped) and jax.tree.all(
        jax.tree.map(np.array_equal, first.arrays, second.arrays)
    )


def test_training_rows(goldens, samples, encoder):
    batches = list(train_batches(samples, encoder, **{**TRAIN, "seed": None, "drop_remainder": False}))
    assert [name for batch in batches for name in batch.record_ids] == [*(record.id for record in samples), ""]
    for batch in batches:
        assert jax.tree.map(lambda array: f"{array.dtype}{list(array.shape)}", batch.arrays) == {
            "input_ids": "int32[4, 220]",
            "attention_mask": "int32[4, 220]",
            "labels": "int32[4, 220]",
            "media": {"vision": Packed("float32[4, 2, 3, 28, 28]")},
        }
    first, second = batches
    lengths = first.arrays["attention_mask"].sum(1)
    assert lengths.tolist() == [142 + 15, 145 + 15, 141, 134]
    assert all(first.arrays["attention_mask"][row, :length].all() for row, length in enumerate(lengths))
    assert (first.arrays["labels"][first.arrays["attention_mask"] == 0] == IGNORED).all()
    assert (first.arrays["input_ids"] == -200).sum(1).tolist() == [16, 16, 0, 0]
    stored = np.load(goldens / "data/images.npz")["clip_pad"]
    pixels = first.arrays["media"]["vision"].values
    np.testing.assert_allclose(pixels[0, 0], stored[0], atol=1e-5, rtol=0)
    assert not pixels[0, 1].any()  # an image row's free slot
    assert not pixels[2].any()  # a text-only row
    np.testing.assert_allclose(second.arrays["media"]["vision"].values[2], stored[[0, 2]], atol=1e-5, rtol=0)
    assert not second.arrays["attention_mask"][3].any()
    assert not second.arrays["media"]["vision"].values[3].any()
    assert (second.arrays["labels"][3] == IGNORED).all()
    text_only = dataclasses.replace(encoder, image_loader=None)
    assert not next(iter(train_batches(samples[2:4], text_only, **{**TRAIN, "batch_size": 2}))).arrays["media"]


def test_the_order_follows_the_seed(samples, encoder):
    def epochs(**changes):
        options = {**TRAIN, "batch_size": 7, "epochs": 3, **changes}
        return [batch.record_ids for batch in train_batches(samples, encoder, **options)]

    assert len(set(epochs())) == 3
    assert epochs() == epochs(threads=3)
    assert epochs() != epochs(seed=4)
    assert len(epochs(batch_size=4, epochs=2)) == 3  # over the border of the epochs, without the rest


def test_what_no_batch_takes(samples, encoder, pictures, tiler):
    def fill(records, encoder, changes, **options):
        return list(train_batches(records, dataclasses.replace(encoder, **changes), **IN_ORDER, **options))

    three = dataclasses.replace(pictures[0], turns=(("human", "<image>" * 3),), images=pictures[0].images * 3)
    longest = int(sizes_of(samples, encoder)[:, 0].max())
    assert len(fill(samples, encoder, {"max_length": longest})) == 3
    for fact, records, used, changes in (
        (f"has {longest} tokens .* maximum length {longest - 1}", samples, encoder, {"max_length": longest - 1}),
        ("record 000000: .* no vision tower", samples, encoder, {"image_loader": None}),
        (r"record two: has 2 images, more than data\.max_images=1", samples, encoder, {"max_images": 1}),
        (r"record 000000: has 3 images, more than data\.max_images=2", [three], tiler, {}),
        ("record 000000: needs 7 image tiles", [pictures[4], pictures[0]], tiler, {"tile_buckets": (1, 5)}),
        ("need record sizes: pass sizes=measure", samples, encoder, {"length_buckets": LENGTHS}),
    ):
        refused(fact, fill, records, used, changes)
    refused("do not fill one batch of 3", fill, samples[:2], encoder, {}, drop_remainder=True)


# --- batches of tiled images ------------------------------------------------------------------------------------------


def test_slots_are_the_smallest_bucket(pictures, tiler):
    chosen = [pictures[i] for i in (0, 4, 1, 2, 11, 4, 4, 5, 7, 3)]
    batches = list(train_batches(chosen, tiler, **IN_ORDER))
    assert [batch.arrays["media"]["vision"].values.shape for batch in batches] == [
        (3, slots, 3, 56, 56) for slots in (7, 1, 1, 7)
    ]
    packed = train_batches(chosen, tiler, **IN_ORDER, packs=1)
    for batch, other, records in zip(batches, packed, (chosen[:3], chosen[3:6], chosen[6:9], chosen[9:]), strict=True):
        pixels, tiles = batch.arrays["media"]["vision"].values, [slots_of(tiler, record) for record in records]
        for row, record in enumerate(records):
            assert (batch.arrays["input_ids"][row] == CONTEXT).sum() == 4 * tiles[row]
            assert not pixels[row, tiles[row] :].any()
            for path in record.images:
                assert np.array_equal(pixels[row, : tiles[row]], tiler.image_loader.load(path, record.id))
        (joined,) = other.arrays["media"]["vision"].values
        assert len(joined) == 3 * min(bucket for bucket in (1, 2, 4, 7) if 3 * bucket >= sum(tiles))
        real = [own[:count] for own, count in zip(pixels, tiles, strict=False)]
        assert np.array_equal(joined[: sum(tiles)], np.concatenate(real))
        assert not joined[sum(tiles) :].any()
    assert not batches[-1].arrays["attention_mask"][1:].any()  # padding rows
    assert not batches[-1].arrays["media"]["vision"].values[1:].any()


def test_other_processes_images_are_not_decoded(pictures, tiler, tmp_path):
    whole = pictures[0].images[0].read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    records = [pictures[2], dataclasses.replace(pictures[0], id="broken", images=(tmp_path / "half.png",))]
    options = {**IN_ORDER, "batch_size": 2}
    first = next(iter(train_batches(records, tiler, **options, mine=np.array([0]))))
    assert first.arrays["media"]["vision"].values.shape[1] == 7  # the header of the other row was enough
    second = train_batches(records, tiler, **options, mine=np.array([1]))
    refused(r"half\.png \(record broken\): not a readable image", lambda: next(iter(second)))


def test_collators_of_the_references(goldens, pictures, tiler):
    """InternVL's adds a white tile with flag 0 for a row of text, where ours leaves its slots empty."""
    arrays, data = np.load(goldens / "data/collators.npz"), DataSpec(aspect_ratio="pad", cache_megabytes=1)
    folders = {"internvl": (), "llava": ("clip_tower", "llava_v1"), "bunny": ("siglip_tower", "bunny")}
    for name, of in folders.items():
        stored = {key: arrays[f"{name}_collator_{key}"] for key in ("input_ids", "attention_mask", "labels")}
        mask, encoder = stored["attention_mask"].astype(bool), tiler
        if of:
            encoder = dataclasses.replace(
                golden_encoder(goldens, max_length=mask.shape[1], tokens_per_image=1, truncate=True),
                tokenizer=load_tokenizer(goldens / "tokenizers" / name),
                template=templates()[of[1]],
                image_loader=load_image_processor(goldens / "ckpt" / of[0], data),
            )
        found = next(iter(train_batches([pictures[i] for i in (0, 1, 4)], encoder, **IN_ORDER))).arrays
        for key, expected in stored.items():
            used = mask if (name, key) == ("internvl", "input_ids") else ...
            assert np.array_equal(found[key][used], expected[used]), (name, key)
    tiles = sum(slots_of(tiler, pictures[i]) for i in (0, 1, 4))
    assert int(arrays["internvl_collator_image_flags"].sum()) == tiles


def test_truncation_spares_images_and_their_closing_marks(pictures, tiler):
    record = pictures[1]  # four tiles, then a long conversation
    row = tiler.training_row(record)
    close = int(np.flatnonzero(row["input_ids"] == 392)[0])
    cut = dataclasses.replace(tiler, truncate=True)
    short = dataclasses.replace(cut, max_length=close + 30).training_row(record)
    for name, array in short.items():
        assert np.array_equal(array, row[name][: close + 30]), name
    assert (short["labels"] != IGNORED).any()
    for length in (close - 3, close):  # inside the image, and before the mark that closes it
        told = f"record 000001: an image ends at token .*, beyond the maximum length {length}"
        refused(told, dataclasses.replace(cut, max_length=length).training_row, record)
    assert dataclasses.replace(cut, max_length=close + 1).training_row(record)["input_ids"][-1] == 392


# --- batches of like length and modality ------------------------------------------------------------------------------


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
    sizes[draw.permutation(len(sizes))[: len(sizes) // 10]] = 0  # unreadable: spread like the others
    order = grouped_order(sizes, **options, epoch=0)
    assert (sizes[order, 0] == 0).reshape(-1, 8).sum(1).max() <= 5


def test_sizes_are_those_of_the_rows(goldens, many, bucketed, tiler, monkeypatch):
    """Of any length, with several cut, with the longest cut by one token, of tiles, and of a tokenizer without BOS."""
    plain = dataclasses.replace(bucketed, max_length=0, length_buckets=None)
    sizes, told = sizes_of(many, plain), []
    bunny = {"tokenizer": load_tokenizer(goldens / "tokenizers/bunny"), "template": templates()["bunny"]}
    tiled = dataclasses.replace(tiler, max_length=0, tile_buckets=(1, 4, 8))
    cut = [dataclasses.replace(plain, max_length=length) for length in (190, int(sizes[:, 0].max()) - 1)]
    for encoder in (plain, *cut, tiled, dataclasses.replace(plain, **bunny)):
        found = sizes_of(many, encoder)
        assert found[:, 0].tolist() == [len(encoder.training_tokens(record)[0]) for record in many]
        assert found[:, 1].tolist() == [slots_of(encoder, record) for record in many]
    monkeypatch.setattr("vlmprune_jax.io.data.encoding._CHUNK", 7)
    found = measure(many[:20], plain, on_error="stop", threads=2, progress=told.append)
    assert told == [7, 14, 20]
    assert np.array_equal(found, sizes[:20])


def test_batches_have_the_smallest_bucket(many, bucketed):
    sizes, by_id = sizes_of(many, bucketed), {record.id: place for place, record in enumerate(many)}
    shapes = set()
    for batch in train_batches(many, bucketed, **TRAIN, sizes=sizes, group_by="modality_length"):
        tokens, lengths = batch.arrays["input_ids"].shape[1], sizes[[by_id[name] for name in batch.record_ids], 0]
        assert tokens == next(bucket for bucket in LENGTHS if bucket >= lengths.max())
        assert np.array_equal(batch.arrays["attention_mask"].sum(1), lengths)
        shapes.add(tokens)
    assert len(shapes) == 3


@pytest.mark.parametrize("group_by", ["none", "length", "modality_length"])
def test_processes_join_to_the_global_batch_and_resume(many, bucketed, group_by):
    options = {**TRAIN, "sizes": sizes_of(many, bucketed), "group_by": group_by, "epochs": None}

    def stream(**place):
        return iter(train_batches(many, bucketed, **{**options, **place}))

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
        assert sorted(seen[epoch * len(many) : (epoch + 1) * len(many)]) == sorted(r.id for r in many)
    assert seen[: len(many)] != seen[len(many) : 2 * len(many)]
    resumed, fresh = stream(), stream()
    for _ in range(7):
        next(resumed)
    fresh.set_state(resumed.get_state())
    assert all(equal(next(fresh), batch) for batch in whole[7:])
    for first, last in ((0, 20), (7, 20), (7, 9), (9, 9)):  # what is compiled before such a training, or its rest
        kinds = train_batches(many, bucketed, **options).kinds(first, last)
        met = {shapes_of(batch.arrays) for batch in whole[first:last]}
        assert len(kinds) == len(met)
        assert set(map(shapes_of, kinds)) == met


@pytest.fixture
def broken(tmp_path, goldens):
    """A JSON-lines file whose records are good, or broken in each way; images beside it."""
    for number in range(4):
        (tmp_path / f"img{number}.png").write_bytes((goldens / f"data/images/img{number}.png").read_bytes())
    (tmp_path / "half.png").write_bytes((tmp_path / "img0.png").read_bytes()[:200])

    def line(name, image, text="It is."):
        question = "What?" if image is None else "<image>\nWhat?"
        talk = [{"from": "human", "value": question}, {"from": "gpt", "value": text}]
        return json.dumps({"id": name, "conversations": talk} | ({} if image is None else {"image": image}))

    lines = [line(f"good{n}", f"img{n % 4}.png" if n % 3 else None) for n in range(9)]
    bad = [line("missing", "none.png"), '{"id": "no JSON"', line("half", "half.png")]
    bad.append(line("late", "img1.png", "x" * 300 + "<image>"))
    (tmp_path / "data.jsonl").write_text("\n".join([*lines[:5], *bad, *lines[5:]]))
    return read_records(tmp_path / "data.jsonl", tmp_path, on_error="skip")


PROBLEMS = {
    "missing": "none.png does not exist",
    "6": "line 7: not valid JSON",
    "half": "not a readable image",
    "late": "2 <image> placeholder(s)",
}


def test_skipped_records_are_padding_in_their_places(broken, bucketed):
    refused("none.png does not exist", sizes_of, broken, bucketed)
    sizes = sizes_of(broken, bucketed, "skip")
    options = {**TRAIN, "batch_size": 5, "drop_remainder": False, "sizes": sizes, "on_error": "skip"}
    batches = list(train_batches(broken, bucketed, **options))
    skipped = dict(pair for batch in batches for pair in batch.skipped)
    assert skipped.keys() == PROBLEMS.keys()
    for name, words in PROBLEMS.items():
        assert words in skipped[name]
    stand_ins = [dataclasses.replace(r, turns=broken[0].turns, images=(), problem=None) for r in broken]
    plain = {**options, "sizes": sizes_of(stand_ins, bucketed), "on_error": "stop"}
    for batch, expected in zip(batches, train_batches(stand_ins, bucketed, **plain), strict=True):
        names = [name for name, _ in batch.skipped]
        assert batch.record_ids == tuple("" if name in names else name for name in expected.record_ids)
        empty = np.array([name == "" for name in batch.record_ids])
        assert np.array_equal(batch.arrays["attention_mask"].any(1), ~empty)
        assert (batch.arrays["labels"][empty] == IGNORED).all()
        assert not batch.arrays["media"]["vision"].values[empty].any()
    parts = [list(train_batches(broken, bucketed, **options, mine=np.array([row]))) for row in range(5)]
    for number, batch in enumerate(batches):
        assert tuple(part[number].record_ids[0] for part in parts) == batch.record_ids
        assert {part[number].arrays["input_ids"].shape for part in parts} == {(1, 160)}


def test_what_one_process_cannot_measure_no_process_reads(broken, bucketed):
    """Shapes must be equal everywhere: a record that measured zeros is skipped even where it could be read."""
    records = [record for record in broken if record.id == "good1"]
    uncut = dataclasses.replace(bucketed, max_length=100, truncate=False)
    sizes = sizes_of(records, uncut, "skip")
    assert not sizes.any()
    options = {**TRAIN, "batch_size": 1, "on_error": "skip"}
    (batch,) = train_batches(records, bucketed, **options, sizes=sizes)
    assert batch.skipped == (("good1", "record good1: could not be read when measured"),)
    assert not batch.arrays["attention_mask"].any()
