"""Folders that `save_to_disk` wrote: rows become the questions that benchmarks ask, images are read one by one."""

import dataclasses
import io
import json
import os
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from data_cases import write_split
from PIL import Image
from refusal import refused

from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.datasets import MAX_COLUMNS, datasets_source, fetch_dataset, read_datasets
from vlmprune_jax.io.data.images import load_image_processor
from vlmprune_jax.io.data.inputs import name_of_records
from vlmprune_jax.run.cli.config_files import experiment_config, placed, read_experiment
from vlmprune_jax.run.evaluation.metrics import METRICS


def picture(seed):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


A, B, C = picture(0), picture(1), picture(2)
POPE = [
    {"question_id": i, "question": f"A dog {i}?", "answer": ("yes", "no")[i % 2], "category": "random", "image": image}
    for i, image in enumerate((A, B, A, A, C))
]


@pytest.mark.parametrize(("files", "batch"), [(1, 10), (2, 2), (1, 1)])
def test_rows_are_records_and_images_are_read_where_they_are(tmp_path, files, batch):
    records = read_datasets(write_split(tmp_path / "test", POPE, files=files, batch=batch))
    assert [record.id for record in records] == ["0", "1", "2", "3", "4"]
    assert records[1].turns == (("human", "<image>\nA dog 1?"), ("gpt", "no"))
    assert records[1].fields == {"question_id": 1, "question": "A dog 1?", "answer": "no", "category": "random"}
    assert [record.images[0].read_bytes() for record in records] == [A, B, A, A, C]
    assert records[0].images == records[2].images == records[3].images  # prepared once
    scores = METRICS["pope"].score_all(["yes"] * 5, records)
    assert METRICS["pope"].values(scores, records)["accuracy"] == 0.6


def test_images_of_a_folder_are_its_own_and_reach_the_model(tmp_path, goldens):
    stored = read_datasets(write_split(tmp_path / "a", POPE))
    other = read_datasets(write_split(tmp_path / "b", [{**row, "image": C} for row in POPE]))
    assert stored[0].images[0].store.identity != other[0].images[0].store.identity
    assert stored[0].images != other[0].images
    (tmp_path / "a.png").write_bytes(A)
    data = DataSpec(aspect_ratio="pad", cache_megabytes=0)
    loader = load_image_processor(goldens / "ckpt/clip_tower", data)
    np.testing.assert_array_equal(loader.load(stored[0].images[0], "0"), loader.load(tmp_path / "a.png", "0"))
    small = load_image_processor(goldens / "ckpt/clip_tower", dataclasses.replace(data, max_image_pixels=700))
    refused(r"\(record r\): image of 9x8 pixels exceeds the limit of 700", small.load, stored[0].images[0], "r")


# The rows as the benchmarks have them, and what of them becomes a record: text, answer, images.
ROWS = {
    "scienceqa": (
        {"question": "Which?", "choices": ["red", "blue"], "answer": 1, "hint": "See it.", "image": A},
        ("<image>\nContext: See it.\nWhich?\nA. red\nB. blue", "B", [A]),
    ),
    "ai2d": (
        {"question": "How many?", "options": ["3", "2", "1"], "answer": "2", "image": A},
        ("<image>\nHow many?\nA. 3\nB. 2\nC. 1", "C", [A]),
    ),
    "mmmu": (
        {
            "id": "validation_Art_1",
            "question": "Between <image 2> and <image 1>?",
            "options": "['<image 1>', 'none']",
            "answer": "B",
            "question_type": "multiple-choice",
            "image_1": A,
            "image_2": B,
            "image_3": C,
        },
        ("<image>\nBetween <image> and <image>?\nA. <image>\nB. none", "B", [C, B, A, A]),
    ),
    "mathvista": (
        {
            "question": "How long?",
            "choices": ["2", "1"],
            "answer": "1",
            "question_type": "multi_choice",
            "answer_type": "text",
            "image": A,
        },
        ("<image>\nHow long?\nA. 2\nB. 1", "1", [A]),
    ),
    "exact_match": (
        {
            "id": "x",
            "conversations": [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "yes"}],
            "image": A,
        },
        ("<image>\nHi", "yes", [A]),
    ),
    "anls": ({"question": "Who?", "answers": ["Ann", "ann b"], "image": A}, ("<image>\nWho?", None, [A])),
    "gqa": ({"question": "Is it <image> red?", "answer": "no", "image": A}, ("Is it <image> red?", "no", [A])),
}


@pytest.mark.parametrize("metric", ROWS)
def test_rows_of_benchmarks(tmp_path, metric):
    row, (text, answer, images) = ROWS[metric]
    pictures = [name for name in row if name.startswith("image")]
    (record,) = read_datasets(write_split(tmp_path / "test", [row], pictures))
    assert record.turns == (("human", text), *((("gpt", answer),) if answer is not None else ()))
    assert [image.read_bytes() for image in record.images] == images
    (score,) = METRICS[metric].score_all([record.references[0]], [record])
    assert next(iter(score.values())) == 1.0


def test_the_only_split_need_not_be_named(tmp_path):
    write_split(tmp_path / "set/test", POPE)
    listed = tmp_path / "set/dataset_dict.json"
    listed.write_text(json.dumps({"splits": ["test"]}))
    found, named = datasets_source(f"datasets:{tmp_path}/set"), datasets_source(f"datasets:{tmp_path}/set/test")
    assert found.files == named.files == [tmp_path / "set/test"]
    assert found.state == named.state != ""
    for splits in (["a", "b"], [".."], ["../x"], ["a/b"]):
        listed.write_text(json.dumps({"splits": splits}))
        told = f"has the splits {', '.join(splits)}: use datasets:.*/set/SPLIT"
        refused(told, datasets_source, f"datasets:{tmp_path}/set")


@pytest.mark.parametrize(
    ("rows", "state", "message"),
    [
        (POPE, {"_data_files": [{"filename": "../data-00000-of-00001.arrow"}]}, "is not a file of this folder"),
        (POPE, {"_data_files": [{"filename": "gone.arrow"}]}, "gone.arrow: no such file"),
        (POPE, {"_data_files": [{"filename": "data-00000-of-00001.arrow"}] * 2}, "lists a file twice"),
        (POPE, {"files": []}, "state.json: does not have the expected content"),
        (POPE, {"_data_files": []}, "contains no rows"),
        ([{"text": "no question"}], None, "record 0: 'conversations' must be a non-empty list"),
        ([{"question": "a <image> <image>", "answer": "x", "image": A}], None, r"2 <image> placeholder\(s\) for 1"),
        ([{"question": "a", "image": {"bytes": None, "path": "/etc/hostname"}}], None, "has an image path instead of"),
    ],
)
def test_wrong_folders(tmp_path, rows, state, message):
    folder = write_split(tmp_path / "test", rows, () if isinstance(rows[0].get("image"), dict) else ("image",))
    if state is not None:
        (folder / "state.json").write_text(json.dumps(state))
    refused(message, read_datasets, folder)


def test_files_that_are_cut_or_lengthened(tmp_path):
    folder = write_split(tmp_path / "test", POPE, batch=1)
    records, file = read_datasets(folder), folder / "data-00000-of-00001.arrow"
    size = file.stat().st_size
    os.truncate(file, 2**40)  # zeros after the end of the stream
    assert len(read_datasets(folder)) == len(records)
    os.truncate(file, size)
    os.truncate(file, 1200)  # while it is read
    refused("row 4: cannot be read", records[4].images[0].read_bytes)


def test_what_the_library_itself_writes(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    images = [Image.open(io.BytesIO(row["image"])) for row in POPE]
    columns = {name: [row[name] for row in POPE] for name in POPE[0] if name != "image"}
    whole = datasets.Dataset.from_dict({**columns, "image": images, "pair": [images[:2]] * 5})
    whole = whole.cast_column("pair", datasets.Sequence(datasets.Image()))
    datasets.DatasetDict({"test": whole}).save_to_disk(tmp_path / "set")
    (record, *_) = datasets_source(f"datasets:{tmp_path}/set").read()
    assert record.turns == (("human", "<image>\n<image>\n<image>\nA dog 0?"), ("gpt", "yes"))
    for stored, image in zip(record.images, (images[0], *images[:2]), strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored.read_bytes()))), np.asarray(image))


# Arrow files of a few bytes that would decode to any size -------------------------------------------------------------

TEXT = pa.array(["x" * 1000] * 100)
ZSTD = pa.ipc.IpcWriteOptions(compression="zstd")


def views():
    return pa.ListViewArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array([100] * 1000, pa.int32()), TEXT)


def nulls_in_a_list():
    return pa.ListArray.from_arrays(pa.array([0, 2**31 - 2], pa.int32()), pa.nulls(2**31 - 2))


def deep():
    kind = pa.int8()
    for _ in range(50):
        kind = pa.list_(kind)
    return pa.nulls(3, kind)


def run_ends():
    return pa.RunEndEncodedArray.from_arrays(pa.array([2**31 - 2], pa.int32()), pa.array(["a"]))


BOMBS = {
    "nulls": (lambda: pa.nulls(200_000_000), None, "claims more than"),
    "nulls in a list": (nulls_in_a_list, None, "claims more than"),
    "zstd": (lambda: pa.array([" " * 10**6]), ZSTD, "has compressed record batches"),
    "run ends": (run_ends, None, ""),
    "views": (views, None, "column 'question' has type list_view<"),
    "text views": (lambda: pa.array(["a"], pa.string_view()), None, "has type string_view"),
    "empty structs": (lambda: pa.array([{}] * 9, pa.struct([])), None, "has type struct<>"),
    "texts of width 0": (lambda: pa.array([b""] * 9, pa.binary(0)), None, "has type fixed_size_binary"),
    "deep": (deep, None, "has type list<"),
    "a dictionary": (TEXT.dictionary_encode, None, ""),
    "columns": (None, None, "1,001 columns"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(tmp_path, name):
    make, options, told = BOMBS[name]
    one = pa.array([1])
    batch = pa.record_batch({"question": make()} if make else {f"c{n}": one for n in range(MAX_COLUMNS + 1)})
    with (tmp_path / "a.arrow").open("wb") as file, pa.ipc.new_stream(file, batch.schema, options=options) as stream:
        stream.write_batch(batch)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    del batch, stream
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    refused(rf"a\.arrow: cannot be read \(.*{told}.*save it again with save_to_disk", read_datasets, tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    assert pa.total_allocated_bytes() - before < 2**20
    tracemalloc.stop()


def test_rows_are_read_a_thousand_at_a_time(tmp_path):
    rows = [{"question": f"{number}?", "answer": "yes"} for number in range(2500)]
    folder = write_split(tmp_path / "set", rows, batch=2200)
    assert [record.turns[0][1] for record in read_datasets(folder)] == [f"{number}?" for number in range(2500)]


# --- data sets of the hub by name -------------------------------------------------------------------------------------


OF_THE_HUB = [{"question": f"How many, {number}?", "answer": str(number)} for number in range(5)]


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What load_dataset is asked for; its rows are `ROWS`."""
    calls = []

    class Rows(list):
        features = None

        def take(self, number):
            return Rows(self[:number])

        def save_to_disk(self, folder):
            write_split(Path(folder), self, ())

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        if name == "org/lost":
            raise ConnectionError("Couldn't reach the Hub")
        return Rows(OF_THE_HUB)

    made = SimpleNamespace(from_list=lambda rows, features: Rows(rows))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, Dataset=made))
    return calls


def test_a_set_is_stored_once_in_the_workdir(asked, tmp_path):
    config = experiment_config()
    config.data.train, config.data.eval = "hub:org/name:train", "hub:org/name/sub:test[:2]"
    config.evaluate.sets = {"short": {"data": "hub:org/name/sub:test[:2]"}, "text": {"text": "a.txt"}}
    found = placed(read_experiment(config), tmp_path / "w", dry_run=True).data
    assert len(datasets_source(found.train).read()) == len(OF_THE_HUB)
    assert not (tmp_path / "w").exists()
    asked.clear()
    for _ in range(2):
        experiment = placed(read_experiment(config), tmp_path / "w")
    data = experiment.data
    assert placed(read_experiment(config), tmp_path / "w", dry_run=True).data == data
    assert experiment.evaluate.sets["short"].data == data.eval
    assert asked == [("org/name", None, "train", False), ("org/name", "sub", "test", True)]
    train, test = (datasets_source(text).read() for text in (data.train, data.eval))
    assert [record.turns[0][1] for record in train] == [row["question"] for row in OF_THE_HUB]
    assert [record.references for record in test] == [("0",), ("1",)]
    assert name_of_records(data.train) == "org/name"
    assert name_of_records("DIR/mix665k.json") == "mix665k.json"


def test_what_is_not_there(asked, monkeypatch, tmp_path):
    def fetch(text):
        return fetch_dataset(text, tmp_path / "data", "data.train")

    refused("data.train=hub:name: expected hub:ORG/NAME:SPLIT, as hub:", fetch, "hub:name")
    told = r"data.train=hub:org/lost:train: not available from the hub \(Couldn't reach the Hub\): check"
    refused(told, fetch, "hub:org/lost:train")
    assert not (tmp_path / "data").exists()
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(r"needs the package datasets: pip install 'vlmprune-jax\[hub\]'", fetch, "hub:org/name:train")


def test_the_package_itself(monkeypatch, tmp_path):
    """It takes a folder of that name for the hub's."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install -e '.[hub]'")
    monkeypatch.chdir(tmp_path)
    images = [Image.new("RGB", (4, 4), (number, 0, 0)) for number in range(5)]
    rows = [{**row, "image": image} for row, image in zip(OF_THE_HUB, images, strict=True)]
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet("org/name/train.parquet")
    for text, count in (("hub:org/name:train", 5), ("hub:org/name:train[:2]", 2)):
        records = datasets_source(fetch_dataset(text, tmp_path / "data", "data.train")).read()
        questions = [f"<image>\n{row['question']}" for row in OF_THE_HUB[:count]]
        assert [record.turns[0][1] for record in records] == questions
        assert all(record.images[0].read_bytes().startswith(b"\x89PNG") for record in records)
    told = "hub:org/other:train: not available from the hub .*: check name, split and"
    refused(told, fetch_dataset, "hub:org/other:train", tmp_path, "data.train")
