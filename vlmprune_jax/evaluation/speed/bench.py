"""`vlmprune bench`: the speed and memory of models by the engines that read them, in turns, each in its own process."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vlmprune_jax.core.checks import suggest
from vlmprune_jax.core.console import Reporter
from vlmprune_jax.core.errors import UserError, error_context, printable
from vlmprune_jax.core.files import open_file, parse_json, reading
from vlmprune_jax.distributed.processor import cores, cpu
from vlmprune_jax.evaluation.speed.measure import check_workload, grids_of, prompts
from vlmprune_jax.export.per_layer import loader_class
from vlmprune_jax.export.reload import torch_loads
from vlmprune_jax.families.gguf import ENGINE, TOWER, WHEEL
from vlmprune_jax.hf.disk.checkpoint import Checkpoint, has_weights
from vlmprune_jax.hf.disk.dtypes import DTYPES
from vlmprune_jax.hf.read import read_config, read_fields, resolve
from vlmprune_jax.models.params import count_params

Json = dict[str, Any]
FOLDER, GGUF = "folder", "GGUF"
# Engine -> what it reads, the packages that it is, and how to install them.
BACKENDS = {
    "jax": (FOLDER, ("jax",), ""),
    "transformers": (FOLDER, ("torch", "transformers"), "pip install 'vlmprune-jax[torch]'"),
    ENGINE: (GGUF, (WHEEL,), f"pip install {WHEEL}"),
}
_LOADERS = "vlmprune_jax.export.remote.modeling_per_layer"


@dataclass(frozen=True)
class Workload:
    """What every model is given: one prompt, with an image first where the model sees any, and tokens after it.

    `dtype`: of the weights of folders; GGUF files have their own. `threads`: cores that each engine may use.
    """

    prompt_tokens: int
    new_tokens: int
    rounds: int
    image: bool
    dtype: str
    threads: int


@dataclass(frozen=True)
class Side:
    """A model and an engine: what the engine's process is given, and what is known without it."""

    model: str
    backend: str
    weights: str
    n_bytes: int
    parameters: int
    image: bool
    job: Json


def check_bench(workload: Workload, json_file: str | None) -> None:
    """Refuse numbers that nothing can be measured with, and a file that cannot be written.

    Raises:
      UserError: names the flag.
    """
    for name in ("prompt_tokens", "new_tokens", "rounds", "threads"):
        if getattr(workload, name) < 1:
            raise UserError(f"--{name}={getattr(workload, name)}: must be at least 1")
    if workload.threads > cores():
        raise UserError(f"--threads={workload.threads}: this process may use {cores()} cores: lower it")
    if workload.dtype not in DTYPES:
        raise UserError(f"--dtype={workload.dtype}: is not one of {', '.join(DTYPES)}")
    if json_file is not None and (Path(json_file).is_dir() or not Path(json_file).absolute().parent.is_dir()):
        raise UserError(f"--json={json_file}: must be the name of a file in a folder that exists")


def find_sides(
    models: Sequence[str], backends: Sequence[str], vision_dir: str | None, workload: Workload
) -> tuple[list[Side], list[str]]:
    """Every model with every engine that can read it; and why those that were not asked for by name are left out.

    Args:
      models: folders, hub ids, GGUF files, or folders with one GGUF model.
      backends: names of `BACKENDS`; none: all that are installed and can read a model.
      vision_dir: see `load`.
      workload: what they will be given.

    Raises:
      UserError: a model is missing or damaged, no engine reads it, or one that was named cannot; a prompt does not
        fit.
    """
    for name in backends:
        if name not in BACKENDS:
            raise UserError(f"--backends={name}: is not one of {', '.join(BACKENDS)}{suggest(name, BACKENDS)}")
    twice = sorted({name for name in models if models.count(name) > 1})
    if twice:
        raise UserError(f"{twice[0]}: is given twice: drop one")
    sides, left_out = list[Side](), list[str]()
    for model in models:
        file = _gguf_file(model)
        kind = FOLDER if file is None else GGUF
        able = [name for name in backends or BACKENDS if BACKENDS[name][0] == kind]
        if not able:
            raise UserError(_of_the_other_kind(model, kind, backends))
        known = _folder(model, vision_dir, workload) if file is None else _gguf(model, file, workload)
        reasons = {name: _why_not(name, model, known.job) for name in able}
        refused = [f"{model} in {name}: {why}" for name, why in reasons.items() if why]
        if refused and (backends or len(refused) == len(able)):
            raise UserError(refused[0])
        left_out += refused
        sides += [
            Side(model, name, **{**vars(known), "job": {**known.job, "backend": name}})
            for name, why in reasons.items()
            if not why
        ]
    return sides, left_out


def bench(sides: Sequence[Side], workload: Workload, reporter: Reporter) -> Json:
    """Measure them once a round, every other round in reverse; all are in memory together.

    Returns: see `report.speed.bench_tables`.

    Raises:
      UserError: an engine does not load its model, or ends.
    """
    load, found = os.getloadavg()[0], [list[Json]() for _ in sides]
    with contextlib.ExitStack() as stack:
        with reporter.bar("load", len(sides)) as progress:
            started = []
            for number, side in enumerate(sides, start=1):  # one after the other: loading takes memory and cores
                started.append(stack.enter_context(_Process.of(side)))
                progress(number)
        with reporter.bar("measure", len(sides) * workload.rounds) as progress:
            done = 0
            for number in range(workload.rounds):
                for place in range(len(sides))[:: -1 if number % 2 else 1]:
                    found[place].append(started[place].reading())
                    progress(done := done + 1)
    counts = [one.prompt_tokens for one in started]
    return {
        "processor": cpu(),
        "threads": workload.threads,
        "load": round(load, 1),
        "workload": {name: value for name, value in vars(workload).items() if name != "threads"},
        "sides": [_side(*one, workload.new_tokens) for one in zip(sides, counts, found, strict=True)],
    }


def _side(side: Side, prompt_tokens: int, readings: Sequence[Mapping[str, Any]], new_tokens: int) -> Json:
    versions = {name: importlib.metadata.version(name) for name in BACKENDS[side.backend][1]}
    return {
        "model": side.model,
        "backend": side.backend,
        "versions": versions,
        "weights": side.weights,
        "bytes": side.n_bytes,
        "parameters": side.parameters,
        "image": side.image,
        "prompt_tokens": prompt_tokens,
        "prefill": [prompt_tokens / one["first"] for one in readings],
        "decode": [new_tokens / one["rest"] for one in readings],
        "first_token": [one["first"] for one in readings],
        "peak_bytes": readings[-1]["peak_bytes"],
    }


@dataclass
class _Process:
    """A running engine."""

    side: Side
    process: subprocess.Popen[str]
    said: IO[bytes]
    prompt_tokens: int = 0

    @classmethod
    @contextlib.contextmanager
    def of(cls, side: Side) -> Iterator[_Process]:
        """The engine with its model, once it is ready; its process ends here."""
        command = [sys.executable, "-m", "vlmprune_jax.evaluation.speed"]
        quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
        # One engine is alive beside another: none may take an accelerator, of which the wheels of others know nothing.
        environment = {**os.environ, **quiet, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        with (
            tempfile.TemporaryFile() as said,
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, env=environment
            ) as process,
        ):
            try:
                one = cls(side, process, said)
                one.prompt_tokens = one._answer(json.dumps(side.job))["prompt_tokens"]
                yield one
            finally:
                process.kill()
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError):  # what it no longer took
                    process.stdin.close()

    def reading(self) -> Json:
        """`first` and `rest` (seconds), and `peak_bytes`."""
        return self._answer("")

    def _answer(self, line: str) -> Json:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        where = f"{self.side.model} in {self.side.backend}"
        with contextlib.suppress(BrokenPipeError):  # it ended, and what it said comes below
            print(line, file=self.process.stdin, flush=True)
        text = self.process.stdout.readline()
        if not text:
            raise UserError(f"{where}: its process ended ({self._last_words()}): the model is damaged, or too large")
        answer: Json = parse_json(text, where, "report it")
        if "error" in answer:
            raise UserError(f"{where}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        code = self.process.wait()
        self.said.seek(0)
        lines = [line.strip() for line in self.said.read().decode(errors="replace").splitlines() if line.strip()]
        return printable(f"exit code {code}{': ' + lines[-1] if lines else ''}")


@dataclass(frozen=True)
class _Known:
    """What is known of a model before an engine has it."""

    weights: str
    n_bytes: int
    parameters: int
    image: bool
    job: Json


def _folder(model: str, vision_dir: str | None, workload: Workload) -> _Known:
    folder, tower = resolve(model), None if vision_dir is None else resolve(vision_dir)
    family, cfg = read_config(folder, tower)
    image = workload.image and cfg.vision is not None
    tokens = {"prompt": workload.prompt_tokens, "new_tokens": workload.new_tokens}
    with error_context(model):
        check_workload(cfg, **tokens, image=image, named="--")
    held = [folder, *([tower] if tower is not None and family.separate_vision and has_weights(tower) else [])]
    files = {entry.file for one in held for entry in Checkpoint(one).tensors.values()}
    ids, pixels = prompts(cfg, workload.prompt_tokens, 1, image)
    grids = grids_of(cfg, 1) if image else None
    class_ = loader_class(read_fields(folder / "config.json"))
    stock = family.stock.name if family.stock is not None else None
    job = {
        "model": str(folder),
        "vision_dir": None if tower is None else str(tower),
        "dtype": workload.dtype,
        "ids": ids.tolist(),
        "pixels": None if pixels is None else list(pixels.shape),
        "grids": None if grids is None else grids.tolist(),
        "image_token": cfg.image_token_id,
        "loader": [_LOADERS, class_] if class_ is not None else ["transformers", stock],
        "loads": torch_loads(folder, tower),
        "by_row": family.stock is not None and family.stock.by_row,
        "new_tokens": workload.new_tokens,
        "threads": workload.threads,
    }
    n_bytes = sum(file.stat().st_size for file in files)
    return _Known(workload.dtype, n_bytes, count_params(cfg), image, job)


def _gguf(model: str, file: Path, workload: Workload) -> _Known:
    fields, weights, count = _header(file)
    if fields.get("general.type") == "mmproj" or fields.get("general.architecture") == TOWER:
        raise UserError(f"{file}: is the tower of a model (mmproj): give the decoder's file beside it")
    towers = sorted(file.parent.glob("mmproj-*.gguf")) if workload.image else []
    if len(towers) > 1:
        raise UserError(f"{file}: {len(towers)} towers (mmproj-*.gguf) are beside it: keep one there, or --image=False")
    context = workload.prompt_tokens + workload.new_tokens + 1
    longest = fields.get(f"{fields.get('general.architecture')}.context_length")
    if isinstance(longest, int) and context > longest:
        raise UserError(
            f"{file}: --prompt_tokens + new_tokens + 1={context} is more than its context of {longest} tokens: lower it"
        )
    tower, _, of_tower = _header(towers[0]) if towers else ({}, "", 0)
    job = {
        "model": str(file),
        "mmproj": str(towers[0]) if towers else None,
        "image_size": tower.get("clip.vision.image_size", 224) if towers else None,
        "ids": [[1] * workload.prompt_tokens],
        "prompt_tokens": workload.prompt_tokens,
        "context": context,
        "new_tokens": workload.new_tokens,
        "threads": workload.threads,
    }
    n_bytes = sum(one.stat().st_size for one in (file, *towers))
    return _Known(weights, n_bytes, count + of_tower, bool(towers), job)


def _header(file: Path) -> tuple[Json, str, int]:
    """Fields of a GGUF file, the type that most of its weights have, and how many these are."""
    from gguf import GGUFReader

    open_file(file).close()  # a FIFO would be waited for
    with reading(file, "export it again, or download it again"):
        reader = GGUFReader(file)
        wanted = ("general.", "clip.vision.image_size", ".context_length")
        fields = {name: one.contents() for name, one in reader.fields.items() if any(part in name for part in wanted)}
        types: dict[str, int] = {}
        for tensor in reader.tensors:
            types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
        count = sum(int(tensor.n_elements) for tensor in reader.tensors)
        return fields, max(types, key=lambda name: types[name]), count


def _gguf_file(model: str) -> Path | None:
    """The GGUF file that this names, or the one decoder of the folder that it names; None: a Hugging Face folder."""
    path = Path(model)
    if model.endswith(".gguf") and not path.is_dir():
        return path
    if not path.is_dir() or os.path.lexists(path / "config.json"):
        return None
    files = [one for one in sorted(path.glob("*.gguf")) if not one.name.startswith("mmproj-")]
    if len(files) > 1:
        raise UserError(f"{model}: holds {len(files)} GGUF models: give one file, as {files[0]}")
    return files[0] if files else None


def _of_the_other_kind(model: str, kind: str, backends: Sequence[str]) -> str:
    named = ", ".join(backends)
    if kind == GGUF:
        todo = f"give the Hugging Face folder that it was made from, or --backends={ENGINE}"
        return f"{model}: is a GGUF file, and --backends={named} reads Hugging Face folders: {todo}"
    todo = 'export it as one (--config.export.format=gguf, vp.save(format="gguf")), or --backends=jax,transformers'
    return f"{model}: is a Hugging Face folder, and --backends={named} reads GGUF files: {todo}"


def _why_not(backend: str, model: str, job: Json) -> str | None:
    """Why an engine cannot read a model; None where it can."""
    _, packages, install = BACKENDS[backend]
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        return f"{missing[0]} is not installed: {install}, or leave {backend} out of --backends"
    if backend == "transformers" and not job["loads"]:
        return "no class of transformers computes this folder (`vlmprune inspect` says what an export would become)"
    return None
