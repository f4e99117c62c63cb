"""`vlmprune bench`: speed and memory of models in the engines that read them, in turns, each in its own process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, NoReturn

import msgspec

from vlmprune_jax.base.checks import suggest
from vlmprune_jax.base.console import Reporter
from vlmprune_jax.base.errors import UserError, error_context, printable
from vlmprune_jax.base.files import parse_json
from vlmprune_jax.core.limits import ENGINES, why_not
from vlmprune_jax.core.mesh.machine import cores
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint, has_weights
from vlmprune_jax.io.checkpoints.disk.gguf import GgufHeader, read_gguf_header
from vlmprune_jax.io.checkpoints.read import read_config, read_fields, resolve
from vlmprune_jax.io.exports.reload import torch_loads
from vlmprune_jax.io.exports.uneven import loader_class
from vlmprune_jax.io.families.gguf import ENGINE
from vlmprune_jax.io.families.gguf_towers import TOWER
from vlmprune_jax.run.evaluation.speed import process
from vlmprune_jax.run.evaluation.speed.backends import BACKENDS, FOLDER, GGUF, versions_of
from vlmprune_jax.run.evaluation.speed.clock import BenchSide, SpeedConfig, take_turns, to_speed
from vlmprune_jax.run.evaluation.speed.engines import Answer, Job
from vlmprune_jax.run.evaluation.speed.measure import make_prompts
from vlmprune_jax.run.evaluation.speed.process import PROGRAMS

_MAX_SIDE = 4096  # pixels of a square image
_MAX_ROWS = 256  # sequences that llama.cpp answers at once (LLAMA_MAX_SEQ)
_LOADERS = "vlmprune_jax.io.exports.remote.modeling_per_layer"
_ENGINES = "vlmprune_jax.run.evaluation.speed.engines"


@dataclass(frozen=True)
class Side:
    """One model in one engine of a speed benchmark: the engine's job, and size and data type of the weights."""

    model: str
    weights: str
    n_bytes: int
    parameters: int
    image: bool
    job: Job
    python: str | None = None  # interpreter of the engine's environment; None: this process's
    versions: Mapping[str, str] = field(default_factory=dict)
    remark: str = ""  # set if the engine has another version than the tested one


def check_bench(threads: int | None, json_file: str | None) -> int:
    """Return the threads per engine, by default as many as CPU cores.

    Raises UserError for more threads than CPU cores, or an output file that cannot be written.
    """
    threads = threads or cores()
    if threads > cores():
        raise UserError(f"--threads={threads} is more than the {cores()} cores that this process may use: lower it")
    if json_file is not None and (Path(json_file).is_dir() or not Path(json_file).absolute().parent.is_dir()):
        raise UserError(f"--json={json_file}: must be a file name in an existing folder")
    return threads


def find_sides(
    models: Sequence[str],
    vision_dir: str | None,
    config: SpeedConfig,
    *,
    backends: Sequence[str],
    engine_python: Sequence[str],
    dtype: str,
    threads: int,
) -> tuple[list[Side], list[str]]:
    """Pair each model with each engine that can load it; return the pairs, and remarks on versions and left-out pairs.

    Args:
      models: folders, hub ids, GGUF files, or folders with one GGUF model.
      vision_dir: see `load`.
      config: workload; engines of `PROGRAMS` take one prompt at a time.
      backends: names of `BACKENDS`; none: all that are installed and can read a model.
      engine_python: texts `ENGINE:PYTHON` for engines in other environments than this process.
      dtype: type of the weights of folders; GGUF files have their own.
      threads: cores that each engine may use.

    Raises:
      UserError: a model is missing or damaged, no engine reads it, or a named engine cannot; a prompt does not fit.
    """
    for name in backends:
        if name not in BACKENDS:
            raise UserError(f"--backends={name}: is not one of {', '.join(BACKENDS)}{suggest(name, BACKENDS)}")
    twice = sorted({name for name in models if models.count(name) > 1})
    if twice:
        raise UserError(f"models to measure: {twice[0]} is listed twice: remove one of the two")
    pythons = dict(_engine_and_python(text) for text in engine_python)
    sides, remarks = list[Side](), dict[str, None]()
    for model in models:
        file = _gguf_file(model)
        kind = FOLDER if file is None else GGUF
        able = [name for name in backends or _installed_backends(pythons) if BACKENDS[name].reads == kind]
        if not able:
            _refuse(model, kind, ", ".join(backends))
        side = _folder(model, vision_dir, config, dtype) if file is None else _gguf(model, file, config)
        reasons = {name: _why_not(name, side, pythons.get(name)) for name in able}
        refused = [f"{model} in {name}: {why}" for name, why in reasons.items() if why]
        if refused and (backends or len(refused) == len(able)):
            raise UserError(refused[0])
        new = [_with_engine(side, name, pythons.get(name), threads) for name, why in reasons.items() if not why]
        remarks |= dict.fromkeys([*refused, *(side.remark for side in new if side.remark)])
        sides += new
    return sides, [*remarks]


def _engine_and_python(text: str) -> tuple[str, str]:
    """Split a text `ENGINE:PYTHON`; raise UserError if that engine runs in vlmprune's own environment only."""
    engine, _, python = text.partition(":")
    if engine not in PROGRAMS or not python:
        engines = ", ".join(PROGRAMS)
        raise UserError(f"--engine_python={text}: must be ENGINE:PYTHON, with an engine of {engines} and a python")
    return engine, python


def _installed_backends(pythons: Mapping[str, str]) -> list[str]:
    """Return the built-in engines, and those optional engines that are installed here or named in `pythons`."""
    missing = [name for name in PROGRAMS if name not in pythons and None in versions_of(name, None).values()]
    return [name for name in BACKENDS if name not in missing]


def _with_engine(side: Side, backend: str, python: str | None, threads: int) -> Side:
    """Return a model's side of the benchmark with its engine, and a remark if this version was not tested."""
    versions = {name: version for name, version in versions_of(backend, python).items() if version is not None}
    remark = ""
    if backend in PROGRAMS:
        (name, version), tested = next(iter(versions.items())), ENGINES[backend].version
        if not f"{version}.".startswith(f"{tested.split()[-1]}."):
            remark = f"{backend}: {name} {version} is installed, but vlmprune was tested with {tested}"
    job = msgspec.structs.replace(side.job, backend=backend, threads=threads)
    return replace(side, job=job, python=python, versions=versions, remark=remark)


def bench(sides: Sequence[Side], config: SpeedConfig, reporter: Reporter) -> tuple[float, list[BenchSide]]:
    """Measure all pairs of model and engine in turns; all models stay in memory.

    Returns: the machine's load average before, and the measurements.

    Raises UserError if an engine does not load its model, or ends.
    """
    load = round(os.getloadavg()[0], 1)
    with contextlib.ExitStack() as stack:
        engines = list[_Engine]()
        with reporter.bar("load", len(sides)) as progress:
            for number, side in enumerate(sides, start=1):  # one after the other: loading takes memory and cores
                engines.append(stack.enter_context(_Engine.start(side)))
                progress(number)
        with reporter.bar("measure", len(sides) * config.rounds) as progress:
            answers = take_turns([engine.read for engine in engines], config.rounds, progress)
    return load, [_result(side, rounds, config) for side, rounds in zip(sides, answers, strict=True)]


def _result(side: Side, answers: Sequence[Answer], config: SpeedConfig) -> BenchSide:
    prompt_tokens, rows = answers[0].prompt_tokens, config.batch_size
    seconds = [answer.seconds for answer in answers if answer.seconds]
    with error_context(f"{side.model} in {side.job.backend}"):
        speeds = to_speed(seconds, rows * prompt_tokens, rows * config.new_tokens)
    return BenchSide(
        model=side.model,
        backend=side.job.backend,
        versions=dict(side.versions),
        weights=side.weights,
        bytes=side.n_bytes,
        parameters=side.parameters,
        image=side.image,
        prompt_tokens=prompt_tokens,
        **speeds,
        peak_bytes=answers[-1].peak_bytes,
    )


@dataclass
class _Engine:
    """Running process of one engine with one model loaded."""

    name: str
    process: subprocess.Popen[str]
    stderr: IO[bytes]
    remark: str

    @classmethod
    @contextlib.contextmanager
    def start(cls, side: Side) -> Iterator[_Engine]:
        """Context that starts an engine's process, waits until its model is loaded, and ends it."""
        # -P and -I: modules in this folder are not imported; -I: nor those that vlmprune's environment names.
        flags = [side.python, "-I"] if side.python else [sys.executable, "-P"]
        command = [*flags, *([process.__file__] if side.job.backend in PROGRAMS else ["-m", _ENGINES])]
        quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
        # Several engines are alive at once: none may take an accelerator, which other wheels know nothing of.
        environment = {**os.environ, **quiet, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        with (
            tempfile.TemporaryFile() as stderr,
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
            ) as child,
        ):
            try:
                remark = f" ({side.remark})" if side.remark else ""
                engine = cls(f"{side.model} in {side.job.backend}", child, stderr, remark)
                engine.read(msgspec.json.encode(side.job).decode())
                yield engine
            finally:
                child.kill()
                assert child.stdin is not None
                with contextlib.suppress(BrokenPipeError):  # the process did not read all lines
                    child.stdin.close()

    def read(self, line: str = "") -> Answer:
        """Ask the engine process for one measurement and return its times."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the process ended: its last words are in the error below
            print(line, file=self.process.stdin, flush=True)
        text = self.process.stdout.readline()
        if not text:
            raise UserError(
                f"{self.name}: its process ended ({self._last_words()}){self.remark}: the model may be damaged, or "
                "need more memory"
            )
        answer = msgspec.convert(parse_json(text, self.name, "report it"), Answer)
        if answer.error:
            raise UserError(f"{self.name}: {answer.error}{self.remark}")
        return answer

    def _last_words(self) -> str:
        code = self.process.wait()
        self.stderr.seek(0)
        lines = [line.strip() for line in self.stderr.read().decode(errors="replace").splitlines() if line.strip()]
        return printable(f"exit code {code}{': ' + lines[-1] if lines else ''}")


def _folder(model: str, vision_dir: str | None, config: SpeedConfig, dtype: str) -> Side:
    folder, tower = resolve(model), None if vision_dir is None else resolve(vision_dir)
    family, cfg = read_config(folder, tower)
    with error_context(model):
        config.check(cfg, "--")
    sources = [folder, *([tower] if tower is not None and family.separate_vision and has_weights(tower) else [])]
    files = {entry.file for source in sources for entry in Checkpoint(source).tensors.values()}
    ids, images = make_prompts(cfg, config)
    shipped = loader_class(read_fields(folder / "config.json"))
    stock = "" if family.stock is None else family.stock.name
    job = Job(
        model=str(folder),
        rows=config.batch_size,
        prompt_tokens=config.prompt_tokens,
        new_tokens=config.new_tokens,
        vision_dir=None if tower is None else str(tower),
        dtype=dtype,
        ids=ids.tolist(),
        pixels=list(images["pixel_values"].shape) if images else None,
        grids=images["image_grid_thw"].tolist() if "image_grid_thw" in images else None,
        image_token=cfg.image_token_id,
        sees=cfg.vision is not None,
        image_size=224 if cfg.vision is None else cfg.vision.image_size,
        loader=("transformers", stock) if shipped is None else (_LOADERS, shipped),
        by_row=family.stock is not None and family.stock.by_row,
    )
    n_bytes = sum(file.stat().st_size for file in files)
    return Side(model, dtype, n_bytes, count_params(cfg), bool(images), job)


def _gguf(model: str, file: Path, config: SpeedConfig) -> Side:
    fields, types, count = read_gguf_header(file)
    if not types:
        raise UserError(f"{file}: this GGUF file has no tensors: export it again, or download it again")
    if fields.get("general.type") == "mmproj" or fields.get("general.architecture") == TOWER:
        raise UserError(f"{file}: is the vision tower of a GGUF model (mmproj): name the file of its decoder instead")
    towers = sorted(file.parent.glob("mmproj-*.gguf")) if config.image else []
    if len(towers) > 1:
        raise UserError(
            f"{file}: its folder has {len(towers)} vision towers (mmproj-*.gguf): keep one, or add --image=False"
        )
    if config.batch_size > _MAX_ROWS:
        raise UserError(
            f"--batch_size={config.batch_size}: llama.cpp takes at most {_MAX_ROWS} prompts at once: lower it"
        )
    context = config.prompt_tokens + config.new_tokens + 1
    longest = fields.get(f"{fields.get('general.architecture')}.context_length")
    if isinstance(longest, int) and context > longest:
        raise UserError(
            f"{file}: --prompt_tokens + --new_tokens + 1 = {context} is more than the model's context of {longest} "
            "tokens: lower one of them"
        )
    tower, _, tower_count = read_gguf_header(towers[0]) if towers else GgufHeader({}, {}, 0)
    image_size = tower.get("clip.vision.image_size", 224)
    if not isinstance(image_size, int) or not 0 < image_size <= _MAX_SIDE:
        raise UserError(
            f"{towers[0]}: has clip.vision.image_size {image_size!r}, expected 1 to {_MAX_SIDE}: export it again"
        )
    job = Job(
        model=str(file),
        rows=config.batch_size,
        prompt_tokens=config.prompt_tokens,
        new_tokens=config.new_tokens,
        mmproj=str(towers[0]) if towers else None,
        image_size=image_size,
        context=context,
    )
    n_bytes = sum(part.stat().st_size for part in (file, *towers))
    weights = max(types, key=lambda name: types[name])
    return Side(model, weights, n_bytes, count + tower_count, bool(towers), job)


def _gguf_file(model: str) -> Path | None:
    """Return the GGUF file at this path, or the only decoder file in a folder; None for a Hugging Face folder."""
    path = Path(model)
    if model.endswith(".gguf") and not path.is_dir():
        return path
    if not path.is_dir() or os.path.lexists(path / "config.json"):
        return None
    files = [file for file in sorted(path.glob("*.gguf")) if not file.name.startswith("mmproj-")]
    if len(files) > 1:
        raise UserError(f"{model}: contains {len(files)} GGUF models: name one file, as {files[0]}")
    return files[0] if files else None


def _refuse(model: str, kind: str, backends: str) -> NoReturn:
    """Raise UserError because none of the engines can load a model."""
    if kind == GGUF:
        raise UserError(
            f"{model}: is a GGUF file, but --backends={backends} reads Hugging Face folders: name the model's folder, "
            f"or add --backends={ENGINE}"
        )
    raise UserError(
        f"{model}: is a Hugging Face folder, but --backends={backends} reads GGUF files: export it as GGUF "
        '(vlmprune export --format=gguf, vp.save(format="gguf")), or add --backends=jax,transformers'
    )


def _why_not(backend: str, side: Side, python: str | None) -> str | None:
    """Return why an engine cannot load a model; None if it can."""
    missing = [name for name, version in versions_of(backend, python).items() if version is None]
    if missing:
        place = "" if python is None else f" in the environment of {python}"
        elsewhere = f"name its environment by --engine_python={backend}:PYTHON, " if backend in PROGRAMS else ""
        install = BACKENDS[backend].install
        return f"{missing[0]} is not installed{place}: {install}, {elsewhere}or leave {backend} out of --backends"
    folder, tower = Path(side.job.model), None if side.job.vision_dir is None else Path(side.job.vision_dir)
    if backend == "transformers" and not torch_loads(folder, tower):
        return "no transformers class can run this model (`vlmprune inspect` lists the exports that it can load)"
    if backend in PROGRAMS:
        if side.job.rows > 1:
            return f"this engine is measured with one prompt at a time: leave --batch_size or {backend} out"
        family, cfg = read_config(folder, tower)
        if family.layout != "transformers":
            return f"the model is not in transformers layout: export it, or leave {backend} out of --backends"
        return why_not(cfg, backend)
    return None
