"""A tfds folder that anybody may have written: one line that names the file or example; nothing it names is run."""

import errno
import json
import os
import sys

import pytest
import tensorflow_datasets
from PIL import Image

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.data import tfds
from vlmprune_jax.io.data.records import read_records
from vlmprune_jax.io.data.tfds import read_tfds, write_tfds

SHARD = "{0}/1.0.0/{0}-train.array_record-00000-of-00001"


def entry(name, *images):
    turns = [{"from": "human", "value": "<image>" * len(images) + "What?"}, {"from": "gpt", "value": "It."}]
    return {"id": name, "images": images, "conversations": turns}


@pytest.fixture
def source(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "images/a.png")
    (tmp_path / "data.json").write_text(json.dumps([entry("x", "a.png"), entry("y")]))
    return tmp_path / "data.json", tmp_path / "images"


@pytest.fixture
def folder(source, tmp_path):
    write_tfds(read_records(*source), tmp_path / "set", image_root=source[1])
    return tmp_path / "set"


def refused(folder):
    """What is said of the records, or of the first image."""
    with pytest.raises((UserError, OSError)) as caught:
        read_tfds(folder)[0].images[0].read_bytes()
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tfds_itself_reads_what_we_write(folder):
    for name in ("records", "images"):
        data = tensorflow_datasets.builder_from_directory(str(folder / name / "1.0.0")).as_data_source("train")
        assert len(data) == {"records": 2, "images": 1}[name]
    assert [record.id for record in read_tfds(folder)] == ["x", "y"]


def test_a_class_that_a_file_names_is_not_imported(folder, tmp_path, monkeypatch):
    (tmp_path / "evil_features.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Text: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    file = folder / "records/1.0.0/features.json"
    text = file.read_text()
    file.write_text(text.replace("tensorflow_datasets.core.features.text_feature.Text", "evil_features.Text", 1))
    assert file.read_text() != text
    assert "features.json: describes features that `vlmprune tfds` does not write: write it again" in refused(folder)
    assert not (tmp_path / "ran").exists()
    assert "evil_features" not in sys.modules


@pytest.mark.parametrize("name", ["records", "images"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fileFormat": "tfrecord"}, "as one split"),
        ({"fileFormat": 3}, "$.fileFormat"),
        ({"splits": []}, "as one split"),
        ({"splits": {}}, "$.splits"),
        ({"splits": [{"name": "train", "shardLengths": [2]}]}, "$.splits[0].shardLengths[0]"),
        ({"splits": [{"name": "train", "shardLengths": ["-1"]}]}, "$.splits[0].shardLengths[0]"),
        ({"splits": [{"name": "train", "shardLengths": ["9" * 40]}]}, "$.splits[0].shardLengths[0]"),
        ({"splits": [{"name": "train", "shardLengths": ["1"] * 9}]}, "-00000-of-00009: no such file"),
        ({"splits": [{"name": "train", "shardLengths": []}]}, ""),
    ],
)
def test_a_damaged_description(folder, name, change, words):
    file = folder / name / "1.0.0/dataset_info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    if name == "images" and not words:
        with pytest.raises(OSError, match="image 0 is not in"):
            read_tfds(folder)[0].images[0].read_bytes()
    else:
        assert words in refused(folder)


def test_fields_that_would_lead_elsewhere_are_not_followed(folder):
    file = folder / "records/1.0.0/dataset_info.json"
    info = json.loads(file.read_text())
    info["splits"][0]["filepathTemplate"] = "../../../../{SPLIT}"
    elsewhere = {
        "dataDir": "/etc",
        "gcs": "gs://other",
        "moduleName": "os",
        "redistributionInfo": {"license": "\33[2J"},
    }
    file.write_text(json.dumps(info | elsewhere))
    assert [record.id for record in read_tfds(folder)] == ["x", "y"]


def test_more_examples_than_there_are(folder):
    file = folder / "records/1.0.0/dataset_info.json"
    file.write_text(file.read_text().replace('"2"', '"999999999999"'))
    assert "records, example 2: cannot be read" in refused(folder)


@pytest.mark.parametrize("name", ["records", "images"])
def test_damaged_and_strange_files(folder, name):
    shard = folder / SHARD.format(name)
    whole = shard.read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], whole[:65_600] + b"\xff" * 8 + whole[65_608:], bytes(len(whole))):
        shard.write_bytes(damaged)
        message = refused(folder)
        assert f"{folder / name}, " in message
        assert "0: cannot be read (" in message
    shard.unlink()
    os.mkfifo(shard)
    assert refused(folder) == f"{shard}: is a FIFO, expected a file"
    shard.unlink()
    shard.symlink_to("/dev/zero")
    assert refused(folder) == f"{shard}: is a device, expected a file"
    info = folder / name / "1.0.0/dataset_info.json"
    info.unlink()
    os.mkfifo(info)
    assert refused(folder) == f"{info}: is a FIFO, expected a file"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"id": b"\xff\xfe"}, "example 0: cannot be read ('utf-8' codec"),
        ({"others": "[" * 100_000}, "example 0: is not valid JSON (too deeply nested)"),
        (
            {"others": "[]"},
            "set/records, example 0: does not have the expected content (Expected `object`, got `array`",
        ),
        ({"others": '{"image": "b.png"}'}, "has both 'image' and 'images'"),
        ({"images": [{"name": "\33[2Ja.png", "number": 2**62}]}, "4611686018427387904 is not in"),
        ({"images": [{"name": "a.png", "number": -1}]}, "image -1 is not in"),
    ],
)
def test_examples_that_we_would_not_write(source, tmp_path, change, words, monkeypatch):
    made = tfds._example
    monkeypatch.setattr(tfds, "_example", lambda *given: made(*given) | change)
    write_tfds(read_records(*source)[:1], tmp_path / "set", image_root=source[1])
    with pytest.raises((UserError, OSError)) as caught:
        read_tfds(tmp_path / "set")[0].images[0].read_bytes()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_disk_that_is_full_leaves_nothing(source, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    records = read_records(*source)
    monkeypatch.setattr(tfds, "_picture", full)
    with pytest.raises(
        UserError, match=r"set: cannot be written \(.*No space left on device.*\): free disk space or use"
    ):
        write_tfds(records, tmp_path / "set", image_root=source[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "images"]
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match="link: exists already"):
        write_tfds(records, tmp_path / "link", image_root=source[1])
