"""Arrow files of a few bytes that would decode to any size."""

import json
import os
import tracemalloc

import pyarrow as pa
import pytest
from datasets_cases import write_split

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.data.arrow import MAX_COLUMNS
from vlmprune_jax.io.data.datasets import read_datasets

TEXT = pa.array(["x" * 1000] * 100)
ZSTD = pa.ipc.IpcWriteOptions(compression="zstd")


def views():
    return pa.ListViewArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array([100] * 1000, pa.int32()), TEXT)


def nulls_in_a_list():
    return pa.ListArray.from_arrays(pa.array([0, 2**31 - 2], pa.int32()), pa.nulls(2**31 - 2))


BOMBS = {
    "nulls": (lambda: {"question": pa.nulls(200_000_000)}, None, "claims more than"),
    "nulls in a list": (lambda: {"question": nulls_in_a_list()}, None, "claims more than"),
    "zstd": (lambda: {"question": pa.array([" " * 10**6])}, ZSTD, "has compressed record batches"),
    "run ends": (
        lambda: {"question": pa.RunEndEncodedArray.from_arrays(pa.array([2**31 - 2], pa.int32()), pa.array(["a"]))},
        None, "",
    ),
    "views": (lambda: {"question": views()}, None, "column 'question' has type list_view<"),
    "text views": (lambda: {"question": pa.array(["a"], pa.string_view())}, None, "has type string_view"),
    "empty structs": (lambda: {"question": pa.array([{}] * 9, pa.struct([]))}, None, "has type struct<>"),
    "texts of width 0": (lambda: {"question": pa.array([b""] * 9, pa.binary(0))}, None, "has type fixed_size_binary"),
    "deep": (lambda: {"question": deep()}, None, "has type list<"),
    "a dictionary": (lambda: {"question": TEXT.dictionary_encode()}, None, ""),
    "columns": (lambda: {f"c{n}": pa.array([1]) for n in range(MAX_COLUMNS + 1)}, None, "1,001 columns"),
}  # fmt: skip


def deep():
    kind = pa.int8()
    for _ in range(50):
        kind = pa.list_(kind)
    return pa.nulls(3, kind)


def write(folder, columns, options):
    batch = pa.record_batch(columns)
    folder.mkdir()
    with (folder / "a.arrow").open("wb") as file, pa.ipc.new_stream(file, batch.schema, options=options) as stream:
        stream.write_batch(batch)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    return folder


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(tmp_path, name):
    make, options, told = BOMBS[name]
    folder = write(tmp_path / "set", make(), options)
    del make
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    with pytest.raises(UserError, match=r"a\.arrow: cannot be read \(.*save it again with save_to_disk") as error:
        read_datasets(folder)
    assert told in str(error.value)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    assert pa.total_allocated_bytes() - before < 2**20
    tracemalloc.stop()


def test_a_file_is_listed_once_and_has_its_bytes(tmp_path):
    folder = write_split(tmp_path / "set", [{"question": "A dog?", "answer": "yes"}])
    (path,) = folder.glob("*.arrow")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": path.name}] * 2}))
    with pytest.raises(UserError, match="lists a file twice"):
        read_datasets(folder)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": path.name}]}))
    os.truncate(path, 2**40)  # zeros after the end of the stream
    assert len(read_datasets(folder)) == 1


def test_rows_are_read_a_thousand_at_a_time(tmp_path):
    rows = [{"question": f"{number}?", "answer": "yes"} for number in range(2500)]
    folder = write_split(tmp_path / "set", rows, batch=2200)
    assert [record.turns[0][1] for record in read_datasets(folder)] == [f"{number}?" for number in range(2500)]
