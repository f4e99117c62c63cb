"""Speed of models in turns: of JAX models in this process, of `vlmprune bench` in one process per model and engine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
from msgspec.structs import asdict, replace

from vlmprune_jax.base.checks import suggest
from vlmprune_jax.base.console import Reporter
from vlmprune_jax.base.errors import UserError, error_context, printable
from vlmprune_jax.base.files import parse_json
from vlmprune_jax.base.settings import override
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.machine import cores
from vlmprune_jax.core.models.generate import CompiledGeneration, compile_generation
from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint, has_weights
from vlmprune_jax.io.checkpoints.disk.gguf import GgufHeader, read_gguf_header
from vlmprune_jax.io.checkpoints.read import read_config, read_fields, resolve
from vlmprune_jax.io.exports.card import loader_class
from vlmprune_jax.io.exports.reload import torch_loads
from vlmprune_jax.io.families.gguf import ENGINE, WHEEL
from vlmprune_jax.io.families.gguf_towers import TOWER
from vlmprune_jax.run.evaluation.speed.clock import BenchSide, Measurement, Seconds, SpeedConfig, measure
from vlmprune_jax.run.evaluation.speed.engines import Answer, Job

_MAX_SIDE = 4096  # pixels of a square image
_MAX_ROWS = 256  # sequences that llama.cpp answers at once (LLAMA_MAX_SEQ)
_LOADERS = "vlmprune_jax.io.exports.remote.modeling_per_layer"
_ENGINES = "vlmprune_jax.run.evaluation.speed.engines"
_ELSEWHERE = ("vllm", "openvino", "mlx")  # engines that need an environment of their own
BACKENDS = {"jax": ("jax",), "transformers": ("torch", "transformers"), ENGINE: (WHEEL,)}  # packages of each engine
_INSTALL = {"transformers": "pip install 'vlmprune-jax[torch]'", ENGINE: f"pip install {WHEEL}"}


def measure_speed(
    models: Mapping[str, Model], config: SpeedConfig | None = None, **options: Any
) -> dict[str, Measurement]:
    """Measure the prefill and decoding speed of several models in turns.

    All programs are compiled and run once before the measurement. Rows never end early, so that speed depends on the
    shapes of a model and not on its answers.

    Args:
      models: models by name; all must fit in memory together.
      config: workload; `options` override single settings of `SpeedConfig`.

    Raises UserError if a model cannot take the prompt, or a measured time is 0.
    """
    config = override(config or SpeedConfig(), options, "measure_speed")
    if not config.rounds:
        raise UserError("speed.rounds=0: must be at least 1 to measure speed")
    return measure({name: _compile(model, config) for name, model in models.items()}, config)


def _compile(model: Model, config: SpeedConfig) -> CompiledGeneration:
    if not isinstance(model, Model):
        raise UserError(f"models: must be Model objects, got {type(model).__name__}: pass vp.load(DIR)")
    config.check(model.cfg)
    ids, media = make_prompts(model.cfg, config)
    program = compile_generation(model, ids, media=media, max_new_tokens=config.new_tokens + 1)
    program.run()  # to warm up
    return program


def make_prompts(cfg: ModelConfig, config: SpeedConfig) -> tuple[np.ndarray, dict[str, Packed]]:
    """Return prompts int32[batch, prompt] that repeat one token, and a leading image of noise in each row, if any.

    With dynamic resolution, the image has a typical size.
    """
    rows = config.batch_size
    word = next(token for token in range(1, cfg.text.vocab_size) if token != cfg.image_token_id)
    ids = np.full((rows, config.prompt_tokens), word, np.int32)
    if not config.with_image(cfg) or cfg.vision is None or cfg.image_token_id is None:
        return ids, {}
    ids[:, : cfg.tokens_per_image] = cfg.image_token_id
    vision = cfg.vision
    size = (
        (vision.grid**2, vision.patch_values)
        if cfg.dynamic_resolution
        else (1, vision.channels, vision.image_size, vision.image_size)
    )
    values = np.random.default_rng(0).standard_normal((rows, *size), np.float32)
    grid = np.tile(np.array([1, vision.grid, vision.grid], np.int32), (rows, 1, 1)) if cfg.dynamic_resolution else None
    return ids, {"vision": Packed(values, grid)}


def check_bench(threads: int | None, json_file: str | None) -> int:
    """Return the threads per engine, by default as many as CPU cores.

    Raises UserError for no threads or more than CPU cores, or an output file that cannot be written.
    """
    threads = cores() if threads is None else threads
    if not 0 < threads <= cores():
        raise UserError(f"--threads={threads}: must be 1 to {cores()}, the cores that this process may use")
    if json_file is not None and (Path(json_file).is_dir() or not Path(json_file).absolute().parent.is_dir()):
        raise UserError(f"--json={json_file}: must be a file name in an existing folder")
    return threads


def find_jobs(
    models: Sequence[str],
    vision_dir: str | None,
    config: SpeedConfig,
    *,
    backends: Sequence[str],
    dtype: str,
    threads: int,
) -> tuple[list[Job], list[str]]:
    """Pair each model with each engine that can load it; return the pairs, and remarks on pairs that are left out.

    Args:
      models: folders, hub ids, GGUF files, or folders with one GGUF model.
      vision_dir: see `load`.
      config: workload.
      backends: names of `BACKENDS`; none: all that are installed and can read a model.
      dtype: type of the weights of folders; GGUF files have their own.
      threads: cores that each engine may use.

    Raises:
      UserError: a model is missing or damaged, no engine reads it, or a named engine cannot; a prompt does not fit.
    """
    for name in backends:
        if name in _ELSEWHERE:
            raise UserError(
                f"--backends={name}: is not measured by this command: run benchmarks/engines.py of vlmprune's "
                f"repository with the python of {name}'s environment"
            )
        if name not in BACKENDS:
            raise UserError(f"--backends={name}: is not one of {', '.join(BACKENDS)}{suggest(name, BACKENDS)}")
    twice = sorted({name for name in models if models.count(name) > 1})
    if twice:
        raise UserError(f"models to measure: {twice[0]} is listed twice: remove one of the two")
    jobs, remarks = list[Job](), list[str]()
    for model in models:
        file = _gguf_file(model)
        able = [name for name in backends or BACKENDS if (name == ENGINE) == (file is not None)]
        if not able and file is not None:
            raise UserError(
                f"{model}: is a GGUF file, but --backends={','.join(backends)} reads Hugging Face folders: name the "
                f"model's folder, or add --backends={ENGINE}"
            )
        if not able:
            raise UserError(
                f"{model}: is a Hugging Face folder, but --backends={','.join(backends)} reads GGUF files: export it "
                'as GGUF (vlmprune export --format=gguf, vp.save(format="gguf")), or add --backends=jax,transformers'
            )
        job = _folder(model, vision_dir, config, dtype) if file is None else _gguf(model, file, config)
        reasons = {name: _why_not(name, job) for name in able}
        refused = [f"{model} in {name}: {why}" for name, why in reasons.items() if why]
        if refused and (backends or len(refused) == len(able)):
            raise UserError(refused[0])
        for name in [name for name in able if not reasons[name]]:
            jobs.append(replace(job, backend=name, threads=threads))
        remarks += refused
    return jobs, remarks


def versions_of(backend: str) -> dict[str, str | None]:
    """Return {package: version} of an engine, with None for what is not installed."""
    installed = {name: importlib.metadata.distributions(name=name) for name in BACKENDS[backend]}
    return {name: next((package.version for package in found), None) for name, found in installed.items()}


def bench(jobs: Sequence[Job], config: SpeedConfig, reporter: Reporter) -> tuple[float, list[BenchSide]]:
    """Measure all pairs of model and engine in turns; all models stay in memory.

    Returns: the machine's load average before, and the measurements.

    Raises UserError if an engine does not load its model, or ends.
    """
    load = round(os.getloadavg()[0], 1)
    with contextlib.ExitStack() as stack:
        engines = dict[str, _Engine]()
        with reporter.bar("load", len(jobs)) as progress:
            for number, job in enumerate(jobs, start=1):  # one after the other: loading takes memory and cores
                engine = stack.enter_context(_Engine.start(job))
                engines[engine.name] = engine
                progress(number)
        with reporter.bar("measure", len(jobs) * config.rounds) as progress:
            measured = measure(engines, config, min_runs=1, progress=progress)
    sides = [
        BenchSide(
            model=job.name,
            backend=job.backend,
            versions={name: version for name, version in versions_of(job.backend).items() if version is not None},
            weights=job.weights,
            bytes=job.n_bytes,
            parameters=job.parameters,
            image=bool(job.pixels or job.mmproj),
            prompt_tokens=engine.prompt_tokens,
            **asdict(measured[engine.name]),
        )
        for job, engine in zip(jobs, engines.values(), strict=True)
    ]
    return load, sides


@dataclass
class _Engine:
    """Running process of one engine with one model loaded: a `Program` that runs there."""

    name: str
    process: subprocess.Popen[str]
    stderr: IO[bytes]
    prompt_tokens: int = 0
    peak_bytes: int = 0

    @classmethod
    @contextlib.contextmanager
    def start(cls, job: Job) -> Iterator[_Engine]:
        """Context that starts an engine's process, waits until its model is loaded, and ends it."""
        command = [sys.executable, "-P", "-m", _ENGINES]  # -P: modules in the current folder are not imported
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
                engine = cls(f"{job.name} in {job.backend}", child, stderr)
                engine.prompt_tokens = engine._ask(msgspec.json.encode(job).decode()).prompt_tokens
                yield engine
            finally:
                child.kill()
                assert child.stdin is not None
                with contextlib.suppress(BrokenPipeError):  # the process did not read all lines
                    child.stdin.close()

    def run(self) -> Seconds:
        """Generate all tokens once; return the seconds to the first token, and from the first to the last token."""
        answer = self._ask()
        self.peak_bytes = answer.peak_bytes
        return answer.seconds

    def _ask(self, line: str = "") -> Answer:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the process ended: its last words are in the error below
            print(line, file=self.process.stdin, flush=True)
        text = self.process.stdout.readline()
        if not text:
            code = self.process.wait()
            self.stderr.seek(0)
            lines = [line.strip() for line in self.stderr.read().decode(errors="replace").splitlines() if line.strip()]
            ended = printable(f"exit code {code}{': ' + lines[-1] if lines else ''}")
            raise UserError(f"{self.name}: its process ended ({ended}): the model may be damaged, or need more memory")
        answer = msgspec.convert(parse_json(text, self.name, "report it"), Answer)
        if answer.error:
            raise UserError(f"{self.name}: {answer.error}")
        return answer


def _folder(model: str, vision_dir: str | None, config: SpeedConfig, dtype: str) -> Job:
    folder, tower = resolve(model), None if vision_dir is None else resolve(vision_dir)
    family, cfg = read_config(folder, tower)
    with error_context(model):
        config.check(cfg, "--")
    sources = [folder, *([tower] if tower is not None and family.separate_vision and has_weights(tower) else [])]
    files = {entry.file for source in sources for entry in Checkpoint(source).tensors.values()}
    ids, media = make_prompts(cfg, config)
    images = media.get("vision", Packed(None))
    shipped = loader_class(read_fields(folder / "config.json"))
    stock = "" if family.stock is None else family.stock.name
    return Job(
        name=model,
        model=str(folder),
        weights=dtype,
        n_bytes=sum(file.stat().st_size for file in files),
        parameters=count_params(cfg),
        rows=config.batch_size,
        prompt_tokens=config.prompt_tokens,
        new_tokens=config.new_tokens,
        vision_dir=None if tower is None else str(tower),
        dtype=dtype,
        ids=ids.tolist(),
        pixels=None if images.values is None else list(images.values.shape),
        grids=None if images.grid is None else images.grid.tolist(),
        image_token=cfg.image_token_id,
        loader=("transformers", stock) if shipped is None else (_LOADERS, shipped),
        by_row=family.stock is not None and family.stock.by_row,
    )


def _gguf(model: str, file: Path, config: SpeedConfig) -> Job:
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
    return Job(
        name=model,
        model=str(file),
        weights=max(types, key=lambda name: types[name]),
        n_bytes=sum(part.stat().st_size for part in (file, *towers)),
        parameters=count + tower_count,
        rows=config.batch_size,
        prompt_tokens=config.prompt_tokens,
        new_tokens=config.new_tokens,
        mmproj=str(towers[0]) if towers else None,
        image_size=image_size,
        context=context,
    )


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


def _why_not(backend: str, job: Job) -> str | None:
    """Return why an engine cannot load a model; None if it can."""
    missing = [name for name, version in versions_of(backend).items() if version is None]
    if missing:
        return f"{missing[0]} is not installed: {_INSTALL[backend]}, or leave {backend} out of --backends"
    tower = None if job.vision_dir is None else Path(job.vision_dir)
    if backend == "transformers" and not torch_loads(Path(job.model), tower):
        return "no transformers class can run this model (`vlmprune inspect` lists the exports that it can load)"
    return None
