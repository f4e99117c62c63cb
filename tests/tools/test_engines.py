"""Serving engines: the table of stand-ins, engines that are missing or die, and their speed."""

import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from vlmprune_jax.io.checkpoints.read import load

sys.path.append(str(Path(__file__).parents[2] / "tools/engines"))
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import engines
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


def test_cells_of_a_stand_in(tmp_path):
    cells = [*standins.write_cells("Gemma 4 E", tmp_path, ["depth", "uneven, padded"], ["float32"])]
    assert [cell.name for cell in cells[:2]] == ["unpruned, float32", "depth, float32"]
    assert "not written" in cells[2]  # no class holds unequal heads
    assert [len(load(cell).cfg.text.layers) for cell in cells[:2]] == [6, 5]
    assert len(json.loads((cells[1] / "prompts/texts.json").read_text())) == standins.PROMPTS
    before = (cells[1] / "model.safetensors").stat().st_mtime_ns
    assert [*standins.write_cells("Gemma 4 E", tmp_path, ["depth"], ["float32"])] == cells[:2]
    assert (cells[1] / "model.safetensors").stat().st_mtime_ns == before, "an export was written again"


def test_vllm_reads_a_new_image_each_time(monkeypatch, tmp_path):
    """Otherwise it would take the image's features from its cache, and the time to the first token were wrong."""
    images = []

    class FakeLLM:
        def __init__(self, model, **settings):
            self.llm_engine, self.waiting = self, 0
            assert settings["max_model_len"] == 50 + 13 + 1
            assert not settings["enable_prefix_caching"]

        def add_request(self, number, prompt, sampling):
            images.append(prompt["multi_modal_data"]["image"].tobytes())
            self.waiting = sampling.max_tokens

        def has_unfinished_requests(self):
            return self.waiting > 0

        def step(self):
            self.waiting -= 1
            return [None]

    fake = types.SimpleNamespace(LLM=FakeLLM, SamplingParams=lambda **fields: types.SimpleNamespace(**fields))
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    options = types.SimpleNamespace(
        folder=tmp_path, dtype="float32", sees=True, side=8, prompt_tokens=50, new_tokens=13
    )
    options.rounds = 2
    generate = engines.in_vllm(options, {"placeholders": np.ones((1, 50), int)})
    rows = engines.measure(generate, 50, options)["rounds"]
    assert min(min(row["prefill"], row["decode"]) for row in rows) > 0
    assert len({*images}) == len(images) == 3
    options.new_tokens = 14
    with pytest.raises(SystemExit, match="generated 14 of 15 tokens"):
        engines.measure(generate, 50, options)


def test_joules_of_counters_that_start_again(tmp_path, monkeypatch):
    """Two packages and the memory of one, zones that others contain, and a counter that only root reads."""
    monkeypatch.setattr(engines, "POWERCAP", tmp_path)
    zones = {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram",
             "intel-rapl:1": "package-1", "intel-rapl-mmio:0": "package-0"}  # fmt: skip
    for zone, name in zones.items():
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(f"{name}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("1000000000\n")
        (tmp_path / zone / "energy_uj").write_text("999000000\n")
    (tmp_path / "intel-rapl:1/energy_uj").unlink()

    def generate(put):
        (tmp_path / "intel-rapl:0/energy_uj").write_text("2000000\n")  # 3 J, in which it started again at 0
        (tmp_path / "intel-rapl:0:1/energy_uj").write_text("999500000\n")
        put()
        put()

    options = types.SimpleNamespace(new_tokens=1, rounds=1)
    warm = iter([lambda put: None, generate])
    found = engines.measure(lambda put: next(warm)(put), 8, options)
    assert found["counters"] == ["RAPL package-0", "RAPL dram"]
    assert found["rounds"][0]["joules"] == pytest.approx(3.5)
