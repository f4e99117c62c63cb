"""What an export copies from its source: files of that folder, and nothing that a link leads to elsewhere."""

import os

import pytest
from hf_cases import LLAMA, make_folder

import vlmprune_jax as vp
from vlmprune_jax.io.checkpoints.read import open_model

TEMPLATES = "additional_chat_templates"


@pytest.fixture
def source(tmp_path):
    (tmp_path / "secret").write_text("private")
    return make_folder(tmp_path / "source", LLAMA)


def export(source):
    out = source.parent / "out"
    vp.save(open_model(source), out, source_dir=source, dtype="source")
    return out


def refused(source, name, said):
    with pytest.raises(vp.UserError, match=said) as error:
        export(source)
    assert str(error.value).startswith(f"{source / name}: ")
    assert not (source.parent / "out").exists()


@pytest.mark.parametrize(
    "name", ["LICENSE", "tokenizer.model", f"{TEMPLATES}/rag.jinja", f"{TEMPLATES}/deep/er/a.jinja"]
)
@pytest.mark.parametrize("target", ["{tmp}/secret", "../secret"])
def test_links_out_of_the_folder(source, name, target):
    (source / name).parent.mkdir(parents=True, exist_ok=True)
    (source / name).symlink_to(target.format(tmp=source.parent))
    said = "outside the folder" if os.path.exists(source / name) else "which does not exist"
    refused(source, name, said)


def test_a_linked_folder_of_templates(source):
    (source.parent / "private").mkdir()
    (source.parent / "private/a.jinja").write_text("private")
    (source / TEMPLATES).symlink_to("../private")
    refused(source, TEMPLATES, "outside the folder")
    (source / TEMPLATES).unlink()
    (source / TEMPLATES).mkdir()
    (source / TEMPLATES / "more").symlink_to("../../private")
    refused(source, f"{TEMPLATES}/more", "is a folder, expected a file")


@pytest.mark.parametrize("name", ["LICENSE", "vocab.json", "merges.txt", f"{TEMPLATES}/a.jinja", TEMPLATES])
def test_links_that_lead_nowhere(source, name):
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to("gone")
    refused(source, name, "is a link to gone, which does not exist")
    (source / name).unlink()
    (source / name).symlink_to((source / name).name)
    refused(source, name, "is a link to itself")


def test_a_fifo_and_a_huge_file(source):
    (source / TEMPLATES).write_text("a")
    refused(source, TEMPLATES, "is a file, expected a folder")
    (source / TEMPLATES).unlink()
    os.mkfifo(source / "LICENSE")
    refused(source, "LICENSE", "is a FIFO, expected a file")
    (source / "LICENSE").unlink()
    with (source / "LICENSE").open("wb") as file:
        file.truncate(2**40)
    refused(source, "LICENSE", r"has 1,099,511,627,776 bytes, more than the maximum")


def test_what_is_copied(source):
    """Files and links within the folder, whatever their names; folders that happen to fit a pattern are not."""
    (source / "files").mkdir()
    (source / "files/mit").write_text("terms")
    (source / "LICENSE").symlink_to("files/mit")
    (source / os.fsdecode(b"LICENSE-\xff")).write_text("more")
    (source / "LICENSES").mkdir()
    (source / TEMPLATES / "deep").mkdir(parents=True)
    (source / TEMPLATES / "deep/a.jinja").write_text("a")
    (source / "notes.txt").write_text("private")
    out = export(source)
    assert not (out / "LICENSE").is_symlink()
    assert (out / "LICENSE").read_text() == "terms"
    assert (out / os.fsdecode(b"LICENSE-\xff")).read_text() == "more"
    assert (out / TEMPLATES / "deep/a.jinja").read_text() == "a"
    assert not (out / "notes.txt").exists()
    assert not (out / "LICENSES").exists()


def test_a_snapshot_of_the_hub(source):
    """Every file is a link to ../../blobs."""
    (source / "LICENSE").write_text("terms")
    (source / TEMPLATES).mkdir()
    (source / TEMPLATES / "a.jinja").write_text("a")
    cache = source.parent / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots/1"
    for number, path in enumerate(sorted(path for path in source.rglob("*") if path.is_file())):
        path.rename(cache / f"blobs/{number}")
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(cache / f"blobs/{number}", link.parent))
    out = snapshot.parents[1] / "out"
    vp.save(open_model(snapshot), out, source_dir=snapshot, dtype="source")
    assert (out / "LICENSE").read_text() == "terms"
    assert (out / TEMPLATES / "a.jinja").read_text() == "a"
    assert not any(path.is_symlink() for path in out.rglob("*"))
