"""Links in a folder that a command writes to."""

import os

import pytest

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.links import check_links, is_inside, real_path
from vlmprune_jax.run.cli.config_files import to_workdir


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("eval", "outside"), ("training/tensorboard", "outside"), ("runs/a", "outside"), ("eval", "w/training"),
        ("shared/x/pruned/.hidden", "outside/mine"), ("plan.json", "outside/mine"), ("eval", "nowhere"),
    ],
)  # fmt: skip
def test_a_workdir_leads_nowhere_else(tmp_path, link, target):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/mine").write_text("mine")
    (tmp_path / "w/training").mkdir(parents=True)
    place = tmp_path / "w" / link
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(tmp_path / target)
    with pytest.raises(
        UserError, match=rf"w/{link}: is a symbolic link to .*{target}, and vlmprune .*: replace it by a copy"
    ):
        to_workdir(str(tmp_path / "w"))


def test_paths_that_lead_nowhere(tmp_path):
    """A link to itself has a path; a text that no path can have is refused, or lies nowhere."""
    os.symlink("loop", tmp_path / "loop")
    assert real_path(tmp_path / "loop/x") == tmp_path / "loop/x"
    assert is_inside(tmp_path / "loop", tmp_path)
    for text in ("a\0b", "\ud800"):
        assert not is_inside(tmp_path / text, tmp_path)
        with pytest.raises(UserError, match="contains a NUL character or half of a surrogate pair: choose another"):
            real_path(text)


def test_links_to_files_inside_are_as_good_as_files(tmp_path):
    """As in a hub cache; the workdir itself may be a link; a link to itself is told when it is opened."""
    (tmp_path / "w/hub/blobs").mkdir(parents=True)
    (tmp_path / "w/hub/snapshots").mkdir()
    (tmp_path / "w/hub/blobs/1").write_text("{}")
    (tmp_path / "w/hub/snapshots/config.json").symlink_to("../blobs/1")
    os.symlink("loop", tmp_path / "w/loop")
    (tmp_path / "other").symlink_to(tmp_path / "w")
    for folder in ("w", "other", "none"):
        check_links(tmp_path / folder)
