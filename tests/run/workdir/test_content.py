"""Content keys: hashes of settings and files, by samples of large files or by every byte."""

import os
import shutil

import pytest
from refusal import refused

from vlmprune_jax.run.workdir.content import _SAMPLED, content_key, digest, made_from


def test_digest_sees_content_names_and_sampled_blocks(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    big = folder / "weights"
    big.write_bytes(b"a" * (_SAMPLED + 10))
    (folder / "config.json").write_text("{}")
    first = digest(folder)
    (folder / ".hidden").write_text("x")
    assert digest(folder) == first
    shutil.copytree(folder, tmp_path / "copy")
    assert digest(tmp_path / "copy") == first
    with big.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"b")
    assert digest(folder) != first
    (tmp_path / "copy" / "config.json").rename(tmp_path / "copy" / "other.json")
    assert digest(tmp_path / "copy") != first
    refused("no such file or folder", digest, tmp_path / "none")


@pytest.mark.parametrize("every_byte", [False, True])
def test_hidden_folders_are_no_part_of_a_model(tmp_path, every_byte):
    """Downloads of the hub and clones of git leave folders of their own beside, and below, the model's files."""
    model = tmp_path / ".cache/model"  # may lie in one
    (model / "more").mkdir(parents=True)
    (model / "more/config.json").write_text("{}")
    first = digest(model, every_byte=every_byte)
    for name in (".cache/huggingface/download/config.json.metadata", ".git/HEAD", "more/.git/HEAD"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("of this copy")
        assert digest(model, every_byte=every_byte) == first
    (model / "more/config.json").write_text("[]")
    assert digest(model, every_byte=every_byte) != first


def test_a_large_file_is_hashed_in_no_time_and_its_size_counts(tmp_path):
    path, found = tmp_path / "weights", []
    for size in (1 << 42, (1 << 42) + 1):
        path.touch()
        os.truncate(path, size)  # holes, which read as zeros
        found.append(digest(path))
    assert found[0] != found[1]


@pytest.mark.parametrize("every_byte", [False, True])
def test_digests_are_of_names_and_content(tmp_path, every_byte):
    for name in "ab":
        (tmp_path / name / "x").mkdir(parents=True)
        (tmp_path / name / "x/one").write_text("1")

    def of(name):
        return digest(tmp_path / name, every_byte=every_byte)

    assert of("a") == of("b")
    (tmp_path / "b/x/one").rename(tmp_path / "b/x/two")
    assert of("a") != of("b")
    assert digest("text", every_byte=every_byte) != digest("texts", every_byte=every_byte)


def test_every_byte_of_a_large_file_counts_where_asked(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(_SAMPLED * 2))
    sampled, full = digest(path), digest(path, every_byte=True)
    with path.open("r+b") as file:
        file.seek(_SAMPLED * 2 // 3)
        file.write(b"x")
    assert digest(path) == sampled
    assert digest(path, every_byte=True) != full


def test_a_key_is_of_settings_inputs_and_version(tmp_path):
    (tmp_path / "in.txt").write_text("input")
    inputs = {"data.train": tmp_path / "in.txt"}
    first = made_from({"ratio": 0.3, "layers": (1, 2)}, inputs, 1)
    assert first == made_from({"ratio": 0.3, "layers": [1, 2]}, dict(inputs), 1)
    others = [made_from({"ratio": 0.4, "layers": (1, 2)}, inputs, 1), made_from({"ratio": 0.3}, inputs, 1)]
    others += [
        made_from({"ratio": 0.3, "layers": (1, 2)}, inputs, 2),
        made_from({"ratio": 0.3, "layers": (1, 2)}, {}, 1),
    ]
    assert len({content_key(one) for one in [first, *others]}) == 5
    assert content_key(first, "more") != content_key(first)


def test_the_holes_of_a_sparse_file_take_no_time(tmp_path):
    """A terabyte beside a model, of which a page was written; what was written counts, and where."""
    found = []
    for at, text in ((0, b"a"), (0, b"b"), (1 << 39, b"a")):
        with (tmp_path / "weights").open("wb") as file:
            file.truncate(1 << 40)
            file.seek(at)
            file.write(text * 4096)
        found.append(digest(tmp_path, every_byte=True))
    assert len(set(found)) == 3


def test_a_linked_folder_counts_by_its_name(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/more").symlink_to(tmp_path / "a")
    first = digest(tmp_path / "model")
    (tmp_path / "a/inner").write_text("not read")
    assert digest(tmp_path / "model") == first
    (tmp_path / "model/more").unlink()
    assert digest(tmp_path / "model") != first
    (tmp_path / "model/more").symlink_to(tmp_path / "b")
    assert digest(tmp_path / "model") != first
