"""Speed of models in turns: of JAX models in this process, of `vlmprune bench` in one process per model and engine."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import asdict, replace

from vlmprune_jax.base.checks import suggest
from vlmprune_jax.base.console import Reporter
from vlmprune_jax.base.errors import UserError, error_context, printable
from vlmprune_jax.base.files import parse_json
from vlmprune_jax.base.processes import on_process_zero
from vlmprune_jax.base.settings import override
from vlmprune_jax.core.mesh.machine import cpu
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint, has_weights
from vlmprune_jax.io.checkpoints.disk.gguf import read_gguf_header
from vlmprune_jax.io.checkpoints.read import read_config, read_fields, resolve
from vlmprune_jax.io.exports.card import loader_class
from vlmprune_jax.io.exports.reload import torch_loads
from vlmprune_jax.io.families.gguf import ENGINE, WHEEL
from vlmprune_jax.io.families.gguf_towers import TOWER
from vlmprune_jax.run.evaluation.config import SpeedConfig
from vlmprune_jax.run.speed.engines import Answer, Job, Program, jax_program, make_prompts
from vlmprune_jax.run.workdir.content import versions
from vlmprune_jax.run.workdir.speed import Bench, BenchSide, Measurement, SpeedWorkload

# A program's time in a round is the minimum of several runs, because other work on the machine only slows runs down.
MIN_RUNS, MIN_SECONDS = 3, 0.5
_MAX_SIDE = 4096  # pixels of a square image
_MAX_ROWS = 256  # sequences that llama.cpp answers at once (LLAMA_MAX_SEQ)
_LOADERS = "vlmprune_jax.io.exports.remote.modeling_per_layer"
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
    for model in models.values():
        if not isinstance(model, Model):
            raise UserError(f"models: must be Model objects, got {type(model).__name__}: pass vp.load(DIR)")
        config.check(model.cfg)
    measured = measure({name: jax_program(model, config) for name, model in models.items()}, config)
    return {name: msgspec.convert(speed, Measurement) for name, speed in measured.items()}


def measure(
    programs: Mapping[str, Program],
    config: SpeedConfig,
    *,
    min_runs: int = MIN_RUNS,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, dict[str, Any]]:
    """Measure named programs in turns, in reverse order in every second round; return the fields of a `BenchSide`.

    Other work on the machine then slows all programs equally, so times of the same round can be compared. All processes
    of a run repeat a program equally often, and return the times of process 0.

    Raises UserError if a measured time is 0.
    """

    def agree(seconds: float) -> float:
        return float(on_process_zero(lambda: seconds))

    for program in programs.values():
        program()  # to warm up
    repeats = {
        name: max(min_runs, math.ceil(MIN_SECONDS / max(agree(sum(program().seconds)), 1e-6)))
        for name, program in programs.items()
    }
    speeds: dict[str, dict[str, Any]] = {name: {"prefill": [], "decode": [], "first_token": []} for name in programs}
    for number in range(config.rounds):
        for turn, name in enumerate([*programs][:: -1 if number % 2 else 1], start=1):
            runs = [programs[name]() for _ in range(repeats[name])]
            first, rest = (agree(min(seconds)) for seconds in zip(*(run.seconds for run in runs), strict=True))
            if min(first, rest) <= 0:
                raise UserError(
                    f"{name}: the measured time is 0: raise new_tokens, or set rounds=0 to skip the measurement"
                )
            speed, prompt_tokens = speeds[name], runs[-1].prompt_tokens
            speed["prefill"].append(config.batch_size * prompt_tokens / first)
            speed["decode"].append(config.batch_size * config.new_tokens / rest)
            speed["first_token"].append(first)
            speed |= {"peak_bytes": runs[-1].peak_bytes, "prompt_tokens": prompt_tokens}
            progress(number * len(programs) + turn)
    return speeds


def find_jobs(
    models: Sequence[str], vision_dir: str | None, config: SpeedConfig, *, backends: Sequence[str], dtype: str
) -> tuple[list[Job], list[str]]:
    """Pair each model with each engine that can load it; return the pairs, and remarks on pairs that are left out.

    `models`: folders, hub ids, GGUF files, or folders with one GGUF model. `backends`: names of `BACKENDS`; none: all
    that are installed and can read a model. `dtype`: type of the weights of folders; GGUF files have their own.

    Raises UserError if a model is missing or damaged, no engine reads it, a named engine cannot, or the prompt does
    not fit.
    """
    for name in backends:
        if name in _ELSEWHERE:
            raise UserError(
                f"--backends={name}: is not measured by this command: run benchmarks/engines.py of vlmprune's "
                f"repository with the python of {name}'s environment"
            )
        if name not in BACKENDS:
            raise UserError(f"--backends={name}: is not one of {', '.join(BACKENDS)}{suggest(name, BACKENDS)}")
    if twice := sorted({name for name in models if models.count(name) > 1}):
        raise UserError(f"models to measure: {twice[0]} is listed twice: remove one of the two")
    jobs, remarks = list[Job](), list[str]()
    installed = versions(tuple(package for packages in BACKENDS.values() for package in packages))
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
        refused = list[str]()
        for name in able:
            found = {package: installed[package] for package in BACKENDS[name] if package in installed}
            missing = [package for package in BACKENDS[name] if package not in installed]
            if missing:
                why = f"{missing[0]} is not installed: {_INSTALL[name]}, or leave {name} out of --backends"
                refused.append(f"{model} in {name}: {why}")
            elif name == "transformers" and not torch_loads(Path(job.path), Path(job.tower) if job.tower else None):
                why = "no transformers class can run this model (`vlmprune inspect` lists the exports that it can load)"
                refused.append(f"{model} in {name}: {why}")
            else:
                jobs.append(replace(job, backend=name, versions=found))
        if refused and (backends or len(refused) == len(able)):
            raise UserError(refused[0])
        remarks += refused
    return jobs, remarks


def bench(jobs: Sequence[Job], config: SpeedConfig, reporter: Reporter, *, dtype: str, threads: int) -> Bench:
    """Measure all pairs of model and engine in turns; all models stay in memory.

    `dtype`: see `find_jobs`. `threads`: cores that each engine may use.

    Raises UserError if an engine does not load its model, or ends.
    """
    load = round(os.getloadavg()[0], 1)
    with contextlib.ExitStack() as stack:
        engines = dict[str, Program]()
        with reporter.bar("load", len(jobs)) as progress:
            for number, job in enumerate(jobs, start=1):  # one after the other: loading takes memory and cores
                engines[f"{job.model} in {job.backend}"] = stack.enter_context(start(replace(job, threads=threads)))
                progress(number)
        with reporter.bar("measure", len(jobs) * config.rounds) as progress:
            measured = measure(engines, config, min_runs=1, progress=progress)
    sides = [
        msgspec.convert({**asdict(job), "image": job.pixels is not None, **speed}, BenchSide)
        for job, speed in zip(jobs, measured.values(), strict=True)
    ]
    workload = SpeedWorkload(**vars(config), dtype=dtype)
    return Bench(processor=cpu(), threads=threads, load=load, workload=workload, sides=sides)


@contextlib.contextmanager
def start(job: Job) -> Iterator[Program]:
    """Context that starts an engine's process and ends it; yields the job's program, which runs there."""
    command = [sys.executable, "-P", "-m", Job.__module__]  # -P: modules in the current folder are not imported
    quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    # Several engines are alive at once: none may take an accelerator, which other wheels know nothing of.
    environment = {**os.environ, **quiet, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    name = f"{job.model} in {job.backend}"
    with (
        tempfile.TemporaryFile() as stderr,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
        ) as child,
    ):
        stdin, stdout = child.stdin, child.stdout
        assert stdin is not None
        assert stdout is not None

        def ask(line: str = "") -> Answer:
            with contextlib.suppress(BrokenPipeError):  # the process ended: its last words are in the error below
                print(line, file=stdin, flush=True)
            text = stdout.readline()
            if not text:
                code = child.wait()
                stderr.seek(0)
                lines = [*filter(str.strip, stderr.read().decode(errors="replace").splitlines())]
                ended = printable(f"exit code {code}{': ' + lines[-1].strip() if lines else ''}")
                raise UserError(f"{name}: its process ended ({ended}): the model may be damaged, or need more memory")
            answer = msgspec.convert(parse_json(text, name, "report it"), Answer)
            if answer.error:
                raise UserError(f"{name}: {answer.error}")
            return answer

        try:
            ask(msgspec.json.encode(job).decode())
            yield ask
        finally:
            child.kill()
            with contextlib.suppress(BrokenPipeError):  # the process did not read all lines
                stdin.close()


def _folder(model: str, vision_dir: str | None, config: SpeedConfig, dtype: str) -> Job:
    folder, tower = resolve(model), None if vision_dir is None else resolve(vision_dir)
    family, cfg = read_config(folder, tower)
    with error_context(model):
        config.check(cfg, "--")
    sources = [folder, *([tower] if tower is not None and family.separate_vision and has_weights(tower) else [])]
    files = {entry.file for source in sources for entry in Checkpoint(source).tensors.values()}
    shipped, stock = loader_class(read_fields(folder / "config.json")), family.stock
    ids, pixels, grids = make_prompts(cfg, config)
    if pixels is not None and (stock is None or not stock.by_row):  # the class takes one list of images for all rows
        pixels = pixels.reshape(-1, *pixels.shape[2:])
    return Job(
        model=model,
        path=str(folder),
        tower=None if tower is None else str(tower),
        weights=dtype,
        bytes=sum(file.stat().st_size for file in files),
        parameters=count_params(cfg),
        config=config,
        pixels=None if pixels is None else list(pixels.shape),
        ids=ids.tolist(),
        grids=None if grids is None else grids.reshape(-1, 3).tolist(),
        image_token=cfg.image_token_id,
        loader=("transformers", "" if stock is None else stock.name) if shipped is None else (_LOADERS, shipped),
    )


def _gguf(model: str, file: Path, config: SpeedConfig) -> Job:
    fields, types, count = read_gguf_header(file)
    architecture, context = fields.get("general.architecture"), config.prompt_tokens + config.new_tokens + 1
    longest = fields.get(f"{architecture}.context_length")
    towers = sorted(file.parent.glob("mmproj-*.gguf")) if config.image else []
    problem = ""
    if not types:
        problem = "this GGUF file has no tensors: export it again, or download it again"
    elif fields.get("general.type") == "mmproj" or architecture == TOWER:
        problem = "is the vision tower of a GGUF model (mmproj): name the file of its decoder instead"
    elif len(towers) > 1:
        problem = f"its folder has {len(towers)} vision towers (mmproj-*.gguf): keep one, or add --image=False"
    elif config.batch_size > _MAX_ROWS:
        raise UserError(
            f"--batch_size={config.batch_size}: llama.cpp takes at most {_MAX_ROWS} prompts at once: lower it"
        )
    elif isinstance(longest, int) and context > longest:
        problem = (
            f"--prompt_tokens + --new_tokens + 1 = {context} is more than the model's context of {longest} tokens: "
            "lower one of them"
        )
    if problem:
        raise UserError(f"{file}: {problem}")
    job = Job(
        model=model,
        path=str(file),
        weights=max(types, key=lambda name: types[name]),
        bytes=sum(part.stat().st_size for part in (file, *towers)),
        parameters=count,
        config=config,
    )
    if not towers:
        return job
    fields, _, tower_count = read_gguf_header(towers[0])
    side = fields.get("clip.vision.image_size", 224)
    if not isinstance(side, int) or not 0 < side <= _MAX_SIDE:
        raise UserError(f"{towers[0]}: has clip.vision.image_size {side!r}, expected 1 to {_MAX_SIDE}: export it again")
    return replace(job, tower=str(towers[0]), parameters=count + tower_count, pixels=[side, side, 3])


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
