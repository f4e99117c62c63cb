"""`vlmprune bench`: whose turn it is, what is computed of readings, what is refused, and every engine once."""

import contextlib
import itertools
import sys

import jax
import msgspec
import numpy as np
import pytest
from gguf import GGUFWriter
from gguf_cases import byte_tokenizer, make_qwen
from hf_cases import LLAVA, make_folder
from refusal import refused

from vlmprune_jax.base.console import make_reporter
from vlmprune_jax.core.models.generate import compile_generation, generate
from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.exports.write import save
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.evaluation.config import SpeedConfig
from vlmprune_jax.run.report.speed import bench_notes, bench_tables
from vlmprune_jax.run.speed import bench as speed
from vlmprune_jax.run.speed.bench import bench, measure, measure_speed
from vlmprune_jax.run.speed.engines import Answer, Job, jax_program, make_prompts
from vlmprune_jax.run.workdir.artefact import read_artefact
from vlmprune_jax.run.workdir.speed import Bench, Measurement

PROMPT = SpeedConfig(rounds=2, prompt_tokens=90, new_tokens=16, batch_size=2)


def job(model, backend):
    sizes = {"weights": "float32", "bytes": 2**21, "parameters": 1000, "pixels": [1]}
    return Job(model=model, path=model, backend=backend, versions={backend: "0.9"}, config=PROMPT, **sizes)


def test_turns_and_tokens_per_second(monkeypatch):
    """Each side once a round, every other round in reverse; a model is compared with the first in the same engine."""
    jobs = [job("a", "jax"), job("a", "transformers"), job("b", "jax")]
    seconds = {("a", "jax"): 2.0, ("a", "transformers"): 4.0, ("b", "jax"): 1.0}
    turns = []

    @contextlib.contextmanager
    def engine(of):
        def run():
            turns.append((of.model, of.backend))
            took, peak = seconds[of.model, of.backend], 2**20 * (len(turns) - 2 * len(jobs))
            tokens = 90 if of.backend == "jax" else 88
            return Answer(seconds=(took, 2 * took), prompt_tokens=tokens, peak_bytes=peak)

        yield run

    monkeypatch.setattr(speed, "start", engine)
    file = bench(jobs, PROMPT, make_reporter(False), dtype="float32", threads=1)
    order = [(one.model, one.backend) for one in jobs]
    assert turns == [*order, *order, *order, *order[::-1]]  # to warm up, and to choose the number of runs in a turn
    a, other, b = file.sides
    assert (a.prefill, a.decode, a.first_token) == ((90.0,) * 2, (8.0,) * 2, (2.0,) * 2)
    assert (other.prefill, b.decode) == ((44.0,) * 2, (16.0,) * 2)
    assert (a.peak_bytes, b.peak_bytes) == (6 * 2**20, 4 * 2**20)  # of the last turn
    speeds, sizes, times = bench_tables(file)
    assert speeds.rows[1] == ("a", "transformers", "44 (44 to 44)", "4 (4 to 4)", "12,000 (12,000 to 12,000)")
    assert sizes.rows[2] == ("b", "jax", "float32", "90, image", "2.0", "4.0")
    assert times.rows == (("b", "jax", "a", "2.00 (2.00 to 2.00)", "2.00 (2.00 to 2.00)"),)
    assert file.decode_rates() == {1000: 6.0}  # of a row, between those of a and b
    assert "2 row(s) of 90 tokens" in bench_notes(file)[0]
    assert "with 1 thread(s)" in bench_notes(file)[1]
    assert "jax 0.9, transformers 0.9." in bench_notes(file)[1]


def write_gguf(path, architecture="llama"):
    """A GGUF file of no model."""
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_tensor("x", np.zeros((4, 32), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of GGUF files that say too little."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("two/a.gguf", "two/b.gguf", "model.gguf", "towers/model.gguf"):
        (folder / name).parent.mkdir(exist_ok=True)
        write_gguf(folder / name)
    for name in ("a", "b"):
        write_gguf(folder / f"towers/mmproj-{name}.gguf", "clip")
    write_gguf(folder / "other.gguf", "no_such")
    (folder / "cut.gguf").write_bytes(b"GGUF" + bytes(8))
    return folder


def refusal(capsys, *flags):
    assert main(["bench", *flags]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    return error.removeprefix("vlmprune: error: ")


LLAVA_HF, FILE = "--model={goldens}/ckpt/llava_hf", "--model={files}/model.gguf"


@pytest.mark.parametrize(
    ("flags", "fact"),
    [
        ("", "no model given"),
        ("--model={files}/none", "no such folder"),
        ("--model={files}/none.gguf", "none.gguf: no such file"),
        (f"{LLAVA_HF} --against={{goldens}}/ckpt/llava_hf", "is listed twice"),
        (f"{FILE} --backends=jax", "is a GGUF file, but --backends=jax reads Hugging"),
        (f"{LLAVA_HF} --backends=llama_cpp", "reads GGUF files: export it"),
        (f"{FILE} --backends=llama_cp", "did you mean 'llama_cpp'?"),
        (f"{LLAVA_HF} --backends=jax,vllm", "run benchmarks/engines.py"),
        ("--model={files}/two", "two: contains 2 GGUF models: name one file"),
        ("--model={files}/towers/mmproj-a.gguf", "is the vision tower of a GGUF model"),
        ("--model={files}/towers/model.gguf", "its folder has 2 vision towers (mmproj-*.gguf)"),
        ("--model={files}/cut.gguf", "cut.gguf: cannot be read"),
        (f"{FILE} --prompt_tokens=40", " = 105 is more than the model's context of 64 tokens"),
        (f"{FILE} --batch_size=257", "--batch_size=257: llama.cpp takes at most 256 prompts"),
        (f"{LLAVA_HF} --prompt_tokens=100000", "--prompt_tokens + new_tokens + 1=100065 is more"),
        (f"{LLAVA_HF} --prompt_tokens=16", "the 16 tokens of an image: raise it, or set --image=False"),
        *((f"{LLAVA_HF} --{name}=0", f"{name}=0: 0 is not a positive") for name in ("new_tokens", "rounds")),
        *((f"{LLAVA_HF} --threads={n}", f"--threads={n}: must be 1 to ") for n in (0, 100_000)),
        (f"{LLAVA_HF} --dtype=int8", "flag --dtype=int8: value should be one of"),
        (f"{LLAVA_HF} --json={{files}}", "must be a file name in an existing folder"),
        ("--model={goldens}/ckpt/internvl --backends=transformers --prompt_tokens=64", "no transformers class can run"),
    ],
)
def test_what_cannot_be_measured(goldens, files, capsys, flags, fact):
    assert fact in refusal(capsys, *flags.format(goldens=goldens, files=files).split())


def test_engines_that_are_missing_or_end_are_told_in_a_line(goldens, files, capsys, monkeypatch):
    """A process that ends is as where an engine is killed for its memory."""
    pytest.importorskip("xllamacpp")
    short = ["--prompt_tokens=8", "--new_tokens=8", "--threads=1"]
    told = refusal(capsys, f"--model={files}/other.gguf", *short)
    assert "other.gguf in llama_cpp: llama.cpp cannot load the file" in told
    monkeypatch.setattr(sys, "executable", "/bin/false")
    told = refusal(capsys, f"--model={goldens / 'ckpt/llava_hf'}", "--backends=jax", "--prompt_tokens=24")
    assert "llava_hf in jax: its process ended (exit code 1): the model may be damaged, or need more memory" in told
    monkeypatch.setattr(speed, "versions", lambda packages: {})
    told = refusal(capsys, f"--model={files}/model.gguf", *short)
    assert "in llama_cpp: xllamacpp is not installed: pip install xllamacpp" in told


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


# --- speed by the clock ----------------------------------------------------------------------------------------------


class Timed:
    """A program that takes known seconds to the first token and after it, in turn."""

    def __init__(self, *seconds):
        self.ran, self.seconds = 0, itertools.cycle(seconds)

    def __call__(self):
        self.ran += 1
        return Answer(seconds=next(self.seconds), prompt_tokens=self.tokens, peak_bytes=7)


def measured(program, **workload):
    program.tokens = workload["prompt_tokens"]
    return msgspec.convert(measure({"a": program}, SpeedConfig(**workload))["a"], Measurement)


def test_a_reading_is_the_fastest_of_its_runs():
    """Each run is disturbed at another place: prompt and tokens have their best runs apart."""
    found = measured(Timed((0.5, 3.0), (9.0, 1.0), (0.6, 2.0)), prompt_tokens=10, new_tokens=10, batch_size=1, rounds=2)
    assert found.prefill == pytest.approx((20.0, 20.0))
    assert found.decode == pytest.approx((10.0, 10.0))


def test_short_runs_are_repeated_until_a_clock_can_tell(monkeypatch):
    program = Timed((0.01, 0.04))
    one = {"prompt_tokens": 1, "new_tokens": 1, "batch_size": 1, "rounds": 1}
    measured(program, **one)
    assert program.ran == 2 + round(speed.MIN_SECONDS / 0.05)
    monkeypatch.setattr(speed, "MIN_SECONDS", 0)
    refused("a: the measured time is 0: raise new_tokens", measured, Timed((1.0, 0.0)), **one)
    refused(r"speed\.rounds=0: must be at least 1 to measure speed", measure_speed, {}, rounds=0)


def test_the_program_is_that_of_generate(goldens):
    llava = load(goldens / "ckpt/llava_hf")
    config = SpeedConfig(prompt_tokens=24, batch_size=2, new_tokens=4)
    ids, pixels, _ = make_prompts(llava.cfg, config)
    assert (ids == llava.cfg.image_token_id).sum() == 2 * llava.cfg.tokens_per_image
    media = {"vision": Packed(pixels)}
    made = compile_generation(llava, ids, media=media, max_new_tokens=5)
    tokens, *_ = made.decode(made.params, *made.prefill(made.params, made.arrays))
    wanted = generate(llava, ids, media=media, max_new_tokens=5, eos_token_ids=())
    np.testing.assert_array_equal(tokens, wanted)
    program = jax_program(llava, config)()
    assert min(program.seconds) > 0
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(llava.params))
    assert weights < program.peak_bytes < 100 * weights
    found = measure_speed({"a": llava}, prompt_tokens=24, new_tokens=4, batch_size=2, rounds=1, image=True)["a"]
    assert min(*found.prefill, *found.decode, *found.first_token) > 0
