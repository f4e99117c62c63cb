"""Records in a tensorflow-datasets folder: those of the JSON file, with their pixels; hostile folders in one line."""

import errno
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.parse

import fsspec
import pytest
import tensorflow_datasets
from etils.epath.backend import fsspec_backend
from fsspec.implementations.local import LocalFileSystem
from PIL import Image
from refusal import refused
from repository import HANG

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.data import tfds
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.inputs import training_records
from vlmprune_jax.io.data.records import Record, read_records
from vlmprune_jax.io.data.tfds import read_tfds, tfds_source, write_tfds
from vlmprune_jax.io.families import templates
from vlmprune_jax.run.cli.main import main

SHARD = "{0}/1.0.0/{0}-train.array_record-00000-of-00001"


def entry(name, images, *turns, **fields):
    speakers = ("human", "gpt")
    conversation = [{"from": speakers[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": name, "images": images, "conversations": conversation, **fields}


ENTRIES = [
    entry("first", ["a.png"], "<image>\nIs it é or 你?", "no", "Why?", ""),
    entry("second", ["sub/b.jpg", "a.png"], "<image><image> Which?", "both"),
    entry(7, [], "Only text", "yes", answers=["yes", "yep"], choices=["5", "6"], question_id=3),
    entry("led", ["a.png"], "no mark: the template adds it", "a"),
]


@pytest.fixture
def source(tmp_path):
    """(JSON file, image folder): a palette PNG with transparency, and a JPEG."""
    (tmp_path / "images/sub").mkdir(parents=True)
    picture = Image.radial_gradient("L").resize((50, 30)).convert("RGB")
    picture.quantize(16).save(tmp_path / "images/a.png", transparency=3)
    picture.save(tmp_path / "images/sub/b.jpg")
    (tmp_path / "data.json").write_text(json.dumps(ENTRIES))
    return tmp_path / "data.json", tmp_path / "images"


@pytest.fixture
def folder(source, tmp_path):
    write_tfds(read_records(*source, image_lead=True), tmp_path / "set", image_root=source[1])
    return tmp_path / "set"


def content(records):
    """Texts, answers, fields and pixels of records."""
    return [(r.id, r.turns, r.references, r.fields, [i.read_bytes() for i in r.images]) for r in records]


def first_image(folder):
    return read_tfds(folder, image_lead=True)[0].images[0].read_bytes()


def test_the_same_records_and_bytes(source, tmp_path):
    file, root = source
    records, seen = read_records(file, root, image_lead=True), []
    write_tfds(records, tmp_path / "set", image_root=root, progress=seen.append)
    assert seen == [1, 2, 3, 4, 5, 6]  # four records and the two images that they share
    again = read_tfds(tmp_path / "set", image_lead=True)
    assert content(again) == content(records)
    assert [[i.name for i in r.images] for r in again] == [["a.png"], ["sub/b.jpg", "a.png"], [], ["a.png"]]
    assert again[0].images == again[3].images  # one image, decoded once
    assert len(set(again)) == 4
    for name, count in (("records", 4), ("images", 2)):  # as tfds itself reads them
        stored = tensorflow_datasets.builder_from_directory(str(tmp_path / "set" / name / "1.0.0"))
        assert len(stored.as_data_source("train")) == count
    refused(r"set, record led: text has 0 <image> placeholder\(s\)", read_tfds, tmp_path / "set")
    kept = read_tfds(tmp_path / "set", on_error="skip")
    assert [r.problem is None for r in kept] == [True, True, True, False]
    (tmp_path / "text.json").write_text(json.dumps(ENTRIES[2:3]))
    text = read_records(tmp_path / "text.json", None)
    write_tfds(text, tmp_path / "text", image_root=None)
    assert read_tfds(tmp_path / "text") == text
    assert sorted(path.name for path in (tmp_path / "text").iterdir()) == ["records"]


def test_a_folder_appears_whole_or_not_at_all(source, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file, root = source
    records = read_records(file, root, image_lead=True)
    with monkeypatch.context() as patch:
        patch.setattr(tfds, "_picture", full)
        told = r"set: cannot be written \(.*No space left on device.*\): free disk space or use"
        refused(told, write_tfds, records, tmp_path / "set", image_root=root)
    (root / "sub/b.jpg").unlink()
    refused(r"sub/b.jpg: no such file", write_tfds, records, tmp_path / "set", image_root=root)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "images"]
    video = Record("v", (("human", "<video>"),), (), videos=(tmp_path,))
    told = "record v: has a video, which TFDS folders do not hold"
    refused(told, write_tfds, [video], tmp_path / "v", image_root=None)
    (tmp_path / "set").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("set", "link"):
        refused(f"{name}: exists already", write_tfds, records, tmp_path / name, image_root=root)


def test_the_command_writes_what_a_config_reads(source, tmp_path, capsys):
    file, root = source
    out = tmp_path / "set"
    assert main(["tfds", f"--data={file}", f"--images={root}", f"--out={out}"]) == 0
    assert f"4 records, 2 images; use --config.data.train=tfds:{out}" in capsys.readouterr().out.replace("\n", "")
    data = DataSpec(train=f"tfds:{out}")
    assert [r.id for r in training_records(data, templates()["phi3-chat"])] == ["first", "second", "7", "led"]
    refused("record led: text has 0 <image>", training_records, data, templates()["llava_v1"])
    assert main(["tfds", f"--data={file}"]) == 2
    assert main(["tfds", "--data=x.json", "--out=gs://bucket/set"]) == 2


def test_torch_and_tensorflow_are_not_imported(source, tmp_path, goldens):
    """Nor is tfds before it is needed; torch need not be installed."""
    file, root = source
    code = f"""
import sys
sys.modules["torch"] = sys.modules["torchvision"] = None  # importing either now fails, as where it is not installed
from pathlib import Path
import vlmprune_jax.io.data.inputs
assert "tensorflow_datasets" not in sys.modules
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.images import load_image_processor
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.data.records import read_records
from vlmprune_jax.io.data.tfds import read_tfds, write_tfds
root, out = Path({str(root)!r}), Path({str(tmp_path / "set")!r})
write_tfds(read_records(Path({str(file)!r}), root, image_lead=True), out, image_root=root)
image, goldens = read_tfds(out, image_lead=True)[0].images[0], Path({str(goldens)!r})
loader = load_image_processor(goldens / "ckpt/clip_tower", DataSpec(aspect_ratio="pad", cache_megabytes=0))
assert loader.load(image, "r").shape == (1, 3, 28, 28)
assert load_tokenizer(goldens / "tokenizers/llava")("A dog?")["input_ids"]
sys.exit("tensorflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A folder that is also gs://bucket, and the requests for it: array_record's by HTTP, others as gcsfs would."""
    asked: list[str] = []
    folder = tmp_path / "store/bucket"
    folder.mkdir(parents=True)

    class Storage(http.server.BaseHTTPRequestHandler):
        """`GET /storage/v1/b/BUCKET/o/OBJECT?alt=media`, ranges included."""

        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path = urllib.parse.urlsplit(self.path).path.removeprefix("/storage/v1/b/bucket/o/")
            asked.append(path)
            content = (folder / urllib.parse.unquote(path)).read_bytes()
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            begin = int(first) if first else max(len(content) - int(last), 0)
            end = min(int(last) + 1, len(content)) if first and last else len(content)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
            self.send_header("Content-Length", str(end - begin))
            self.send_header("x-goog-generation", "1")
            self.end_headers()
            self.wfile.write(content[begin:end])

        def log_message(self, *args):
            pass

    class Gcs(LocalFileSystem):
        cachable = False

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(str(path).replace("gs://", f"{folder.parent}/"))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Storage)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(fsspec, "filesystem", lambda name, **options: Gcs())
    fsspec_backend._get_filesystem.cache_clear()
    yield folder, asked
    fsspec_backend._get_filesystem.cache_clear()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_folder_in_a_bucket(source, bucket, monkeypatch):
    (file, root), (bucket, asked) = source, bucket
    records = read_records(file, root, image_lead=True)
    write_tfds(records, bucket / "set", image_root=root)
    folder = tfds_source("tfds:gs://bucket/set")
    assert content(folder.read(image_lead=True)) == content(records)
    assert asked
    assert not any("records" in path for path in asked)  # one request each: they are copied
    assert folder.state
    refused(r"gs://bucket/other: was not written by `vlmprune tfds`", tfds_source("tfds:gs://bucket/other").read)
    shutil.rmtree(bucket / "set")
    assert tfds_source("tfds:gs://bucket/set").state == ""
    write_tfds(records[:2], bucket / "set", image_root=root)
    assert tfds_source("tfds:gs://bucket/set").state not in (folder.state, "")

    def missing(name, **options):
        raise ImportError("Please install gcsfs")

    fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.setattr(fsspec, "filesystem", missing)
    refused(r"gs://bucket/set.*: reading a bucket needs gcsfs", lambda: tfds_source("tfds:gs://bucket/set").read())


def test_sets_of_internvl(source, tmp_path):
    """Images of one name in two folders stay apart."""
    _, root = source
    (root / "other").mkdir()
    (root / "other/a.png").write_bytes((root / "sub/b.jpg").read_bytes())
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(entry("r", ["a.png"], "<image>\nWhat?", name)))
    one = {"root": "images", "annotation": "one.jsonl", "repeat_time": 2}
    two = {"root": "images/other", "annotation": "two.jsonl", "repeat_time": 1}
    (tmp_path / "meta.json").write_text(json.dumps({"one": one, "two": two}))
    records = read_records(tmp_path / "meta.json", tmp_path)
    write_tfds(records, tmp_path / "set", image_root=tmp_path)
    again = read_tfds(tmp_path / "set")
    assert content(again) == content(records)
    assert [r.images[0].name for r in again] == ["images/a.png", "images/a.png", "images/other/a.png"]


# --- folders that anybody may have written ----------------------------------------------------------------------------


def test_a_class_that_a_file_names_is_not_imported(folder, tmp_path, monkeypatch):
    (tmp_path / "evil_features.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Text: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    file = folder / "records/1.0.0/features.json"
    text = file.read_text()
    file.write_text(text.replace("tensorflow_datasets.core.features.text_feature.Text", "evil_features.Text", 1))
    assert file.read_text() != text
    refused("features.json: describes features that `vlmprune tfds` does not write", first_image, folder)
    assert not (tmp_path / "ran").exists()
    assert "evil_features" not in sys.modules


@pytest.mark.parametrize("name", ["records", "images"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fileFormat": "tfrecord"}, "as one split"),
        ({"splits": {}}, r"\$.splits"),
        ({"splits": [{"name": "train", "shardLengths": ["-1"]}]}, r"\$.splits\[0\].shardLengths\[0\]"),
        ({"splits": [{"name": "train", "shardLengths": ["9" * 40]}]}, r"\$.splits\[0\].shardLengths\[0\]"),
        ({"splits": [{"name": "train", "shardLengths": ["1"] * 9}]}, "-00000-of-00009: no such file"),
    ],
)
def test_a_damaged_description(folder, name, change, words):
    file = folder / name / "1.0.0/dataset_info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refused(words, first_image, folder)


def test_what_a_description_may_say(folder, tmp_path):
    """Fields that would lead elsewhere are not followed; more examples than there are."""
    file = folder / "records/1.0.0/dataset_info.json"
    info = json.loads(file.read_text())
    info["splits"][0]["filepathTemplate"] = "../../../../{SPLIT}"
    elsewhere = {"dataDir": "/etc", "gcs": "gs://other", "moduleName": "os"}
    file.write_text(json.dumps(info | elsewhere))
    assert len(read_tfds(folder, image_lead=True)) == 4
    file.write_text(file.read_text().replace('"4"', '"999999999999"'))
    refused("records, example 4: cannot be read", first_image, folder)
    refused("nothing: was not written by `vlmprune tfds`", read_tfds, tmp_path / "nothing")
    refused("tfds:s3://bucket/x: is not a folder: use tfds:DIR, or tfds:gs:", tfds_source, "tfds:s3://bucket/x")


@pytest.mark.parametrize("name", ["records", "images"])
def test_damaged_and_strange_files(folder, name):
    shard = folder / SHARD.format(name)
    whole = shard.read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], whole[:65_600] + b"\xff" * 8 + whole[65_608:], bytes(len(whole))):
        shard.write_bytes(damaged)
        refused(rf"{folder / name}, .*0: cannot be read \(", first_image, folder)
    shard.unlink()
    refused("-00000-of-00001: no such file", first_image, folder)
    shard.symlink_to("/dev/zero")
    refused(f"{shard}: is a device, expected a file", first_image, folder)
    info = folder / name / "1.0.0/dataset_info.json"
    info.unlink()
    os.mkfifo(info)
    refused(f"{info}: is a FIFO, expected a file", first_image, folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"id": b"\xff\xfe"}, "example 0: cannot be read ('utf-8' codec"),
        ({"others": "[" * 100_000}, "example 0: is not valid JSON (too deeply nested)"),
        ({"others": "[]"}, "set/records, example 0: does not have the expected content (Expected `object`"),
        ({"others": '{"image": "b.png"}'}, "has both 'image' and 'images'"),
        ({"images": [{"name": "\33[2Ja.png", "number": 2**62}]}, "4611686018427387904 is not in"),
        ({"images": [{"name": "a.png", "number": -1}]}, "image -1 is not in"),
    ],
)
def test_examples_that_we_would_not_write(source, tmp_path, change, words, monkeypatch):
    made = tfds._example
    monkeypatch.setattr(tfds, "_example", lambda *given: made(*given) | change)
    write_tfds(read_records(*source, image_lead=True)[:1], tmp_path / "set", image_root=source[1])
    with pytest.raises((UserError, OSError)) as caught:
        first_image(tmp_path / "set")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
