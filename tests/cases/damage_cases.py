"""A sharded folder to damage, which loading, inspecting and file surgery must all refuse."""

from __future__ import annotations

import json
import struct

import pytest

import vlmprune_jax as vp
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.run.cli.main import main

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
KEY = "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"  # in the second shard


def refused_by_all(capsys, folder, plan, *parts):
    """The message of `load`, `prune_folder` and `vlmprune inspect`, which must be one line with all `parts`."""
    out = folder.parent / "out"
    messages = []
    for call in (lambda: vp.load(folder), lambda: vp.prune_folder(folder, plan, out)):
        with pytest.raises(UserError) as error:
            call()
        messages.append(str(error.value))
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]
    assert main(["inspect", str(folder)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("vlmprune: error: ")
    messages.append(said.err.removeprefix("vlmprune: error: ").removesuffix("\n"))
    assert len(set(messages)) == 1, messages
    assert "\n" not in messages[0]
    for part in parts:
        assert part in messages[0], messages[0]


def edit_header(path, edit):
    """Change the JSON header of a safetensors file and leave the data as it is."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    text = edit(header) or json.dumps(header)
    text = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def edit_index(folder, edit):
    """Change the weight_map of a folder's index."""
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))
