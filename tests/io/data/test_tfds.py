"""Records in a tensorflow-datasets folder are the records of the JSON file, with the same pixels; no TensorFlow."""

import http.server
import json
import shutil
import subprocess
import sys
import threading
import urllib.parse

import fsspec
import numpy as np
import pytest
from etils.epath.backend import fsspec_backend
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.images import load_image_processor
from vlmprune_jax.io.data.media import StoredImage
from vlmprune_jax.io.data.records import Record, read_records
from vlmprune_jax.io.data.tfds import ImageStore, read_tfds, tfds_source, write_tfds
from vlmprune_jax.run.cli.main import main


def entry(name, images, *turns):
    speakers = ("human", "gpt")
    conversation = [{"from": speakers[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": name, "images": images, "conversations": conversation}


ENTRIES = [
    entry("first", ["a.png"], "<image>\nIs it é or 你?", "no", "Why?", ""),
    entry("second", ["sub/b.jpg", "a.png"], "<image><image> Which?", "both"),
    entry(7, [], "Only text", "yes"),
    entry("led", ["a.png"], "no mark: the template adds it", "a"),
]


@pytest.fixture
def source(tmp_path):
    """(JSON file, image folder): a palette PNG with transparency, and a JPEG."""
    (tmp_path / "images/sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (30, 50, 3), np.uint8))
    palette = picture.quantize(16)
    palette.save(tmp_path / "images/a.png", transparency=3)
    picture.save(tmp_path / "images/sub/b.jpg")
    (tmp_path / "data.json").write_text(json.dumps(ENTRIES))
    return tmp_path / "data.json", tmp_path / "images"


def test_the_same_records_and_bytes(source, tmp_path):
    file, root = source
    records, seen = read_records(file, root, image_lead=True), []
    write_tfds(records, tmp_path / "set", image_root=root, progress=seen.append)
    assert seen == [1, 2, 3, 4, 5, 6]  # four records and the two images that they share
    again = read_tfds(tmp_path / "set", image_lead=True)
    assert [(r.id, r.turns) for r in again] == [(r.id, r.turns) for r in records]
    assert [[i.name for i in r.images] for r in again] == [["a.png"], ["sub/b.jpg", "a.png"], [], ["a.png"]]
    for ours, theirs in zip(again, records, strict=True):
        assert [i.read_bytes() for i in ours.images] == [i.read_bytes() for i in theirs.images]
    assert again[0].images == again[3].images  # one image, decoded once
    assert len(set(again)) == 4


def test_the_same_limits_and_messages(source, tmp_path, goldens):
    file, root = source
    (root / "sub/b.jpg").write_bytes(b"not an image")
    write_tfds(read_records(file, root, image_lead=True), tmp_path / "set", image_root=root)
    records = read_tfds(tmp_path / "set", image_lead=True)
    small = load_image_processor(
        goldens / "ckpt/clip_tower", DataSpec(aspect_ratio="pad", max_image_pixels=2000, cache_megabytes=0)
    )
    with pytest.raises(UserError, match=r"a.png \(record first\): image of 50x30 pixels exceeds the limit of 2000"):
        small.load(records[0].images[0], "first")
    with pytest.raises(UserError, match=r"sub/b.jpg \(record second\): not a readable image \(none of JPEG, PNG"):
        small.load(records[1].images[0], "second")
    with pytest.raises(UserError, match=r"set, record led: text has 0 <image> placeholder\(s\)"):
        read_tfds(tmp_path / "set")


def test_text_alone_needs_no_images(tmp_path):
    (tmp_path / "text.json").write_text(json.dumps([entry("a", [], "Hi", "yes")]))
    write_tfds(read_records(tmp_path / "text.json", None), tmp_path / "set", image_root=None)
    assert read_tfds(tmp_path / "set") == read_records(tmp_path / "text.json", None)
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["records"]


def test_answers_and_other_fields_come_along(tmp_path):
    asked = {**entry("a", [], "How many é?"), "answers": ["5", "five"], "choices": ["5", "6"], "question_id": 3}
    (tmp_path / "text.json").write_text(json.dumps([asked, entry("b", [], "Hi", "yes")]))
    write_tfds(read_records(tmp_path / "text.json", None), tmp_path / "set", image_root=None)
    first, second = read_tfds(tmp_path / "set")
    assert (first.references, second.references) == (("5", "five"), ("yes",))
    assert (first.fields, second.fields) == ({"choices": ["5", "6"], "question_id": 3}, {})


def test_a_folder_appears_whole_or_not_at_all(source, tmp_path):
    file, root = source
    records = read_records(file, root, image_lead=True)
    (root / "sub/b.jpg").unlink()
    with pytest.raises(UserError, match=r"sub/b.jpg: no such file"):
        write_tfds(records, tmp_path / "set", image_root=root)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "images"]
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match="record v: has a video, which TFDS folders do not hold"):
        write_tfds([Record("v", (("human", "<video>"),), (), videos=(tmp_path,))], tmp_path / "v", image_root=None)
    with pytest.raises(UserError, match="set: exists already"):
        write_tfds(records, tmp_path / "set", image_root=root)


def test_what_is_not_such_a_folder_is_refused(source, tmp_path):
    file, root = source
    with pytest.raises(UserError, match=r"nothing: was not written by `vlmprune tfds`"):
        read_tfds(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"tfds:s3://bucket/x: is not a folder: use tfds:DIR, or tfds:gs:"):
        tfds_source("tfds:s3://bucket/x")
    write_tfds(read_records(file, root, image_lead=True), tmp_path / "set", image_root=root)
    for shard in (tmp_path / "set/records/1.0.0").glob("*array_record*"):
        shard.unlink()
    with pytest.raises(UserError, match=r"set/records/.*-00000-of-00001: no such file"):
        read_tfds(tmp_path / "set")
    with pytest.raises(OSError, match="image 99 is not in"):
        StoredImage("x", 99, ImageStore(tmp_path / "set")).read_bytes()


def test_the_command_writes_what_a_config_reads(source, tmp_path, capsys):
    from vlmprune_jax.io.data.inputs import training_records
    from vlmprune_jax.io.families import templates

    file, root = source
    out = tmp_path / "set"
    assert main(["tfds", f"--data={file}", f"--images={root}", f"--out={out}"]) == 0
    assert f"4 records, 2 images; use --config.data.train=tfds:{out}" in capsys.readouterr().out.replace("\n", "")
    data = DataSpec(train=f"tfds:{out}")
    assert [r.id for r in training_records(data, templates()["phi3-chat"])] == ["first", "second", "7", "led"]
    with pytest.raises(UserError, match="record led: text has 0 <image>"):
        training_records(data, templates()["llava_v1"])
    assert main(["tfds", f"--data={file}"]) == 2


def test_tensorflow_is_not_imported_nor_is_tfds_before_it_is_needed(source, tmp_path):
    file, root = source
    code = (
        "import sys; from pathlib import Path; import vlmprune_jax.io.data.inputs; "
        "assert 'tensorflow_datasets' not in sys.modules; "
        "from vlmprune_jax.io.data.records import read_records; "
        "from vlmprune_jax.io.data.tfds import read_tfds, write_tfds; "
        f"root = Path({str(root)!r}); out = Path({str(tmp_path / 'set')!r}); "
        f"write_tfds(read_records(Path({str(file)!r}), root, image_lead=True), out, image_root=root); "
        "read_tfds(out, image_lead=True)[0].images[0].read_bytes(); "
        "sys.exit('tensorflow' in sys.modules or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=300)
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


def test_a_folder_in_a_bucket(source, bucket):
    (file, root), (bucket, asked) = source, bucket
    records = read_records(file, root, image_lead=True)
    write_tfds(records, bucket / "set", image_root=root)
    folder = tfds_source("tfds:gs://bucket/set")
    again = folder.read(image_lead=True)
    assert [(r.id, r.turns) for r in again] == [(r.id, r.turns) for r in records]
    for ours, theirs in zip(again, records, strict=True):
        assert [i.read_bytes() for i in ours.images] == [i.read_bytes() for i in theirs.images]
    assert asked
    assert not any("records" in path for path in asked)  # one request each: they are copied
    assert folder.state
    with pytest.raises(UserError, match=r"gs://bucket/other: was not written by `vlmprune tfds`"):
        tfds_source("tfds:gs://bucket/other").read()
    shutil.rmtree(bucket / "set")
    assert tfds_source("tfds:gs://bucket/set").state == ""
    write_tfds(records[:2], bucket / "set", image_root=root)
    assert tfds_source("tfds:gs://bucket/set").state not in (folder.state, "")


def test_a_bucket_needs_gcsfs(bucket, monkeypatch):
    def missing(name, **options):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(UserError, match=r"gs://bucket/set.*: reading a bucket needs gcsfs"):
        tfds_source("tfds:gs://bucket/set").read()
    assert main(["tfds", "--data=x.json", "--out=gs://bucket/set"]) == 2


def test_sets_of_internvl_and_records_of_bunny(source, tmp_path):
    """Images of one name in two folders stay apart; Bunny's records are LLaVA's."""
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
    assert [r.id for r in again] == ["one/r", "one/r", "two/r"]
    assert [r.images[0].name for r in again] == ["images/a.png", "images/a.png", "images/other/a.png"]
    assert [r.images[0].read_bytes() for r in again] == [r.images[0].read_bytes() for r in records]


def test_skipped_entries_of_a_folder_keep_their_places(source, tmp_path):
    file, root = source
    write_tfds(read_records(file, root, image_lead=True), tmp_path / "set", image_root=root)
    records = read_tfds(tmp_path / "set", on_error="skip")
    assert [(r.id, r.problem is None) for r in records] == [
        ("first", True),
        ("second", True),
        ("7", True),
        ("led", False),
    ]
