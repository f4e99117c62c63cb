"""Commands that look at models and results, or help with data: `inspect`, `plan`, `bench`, `chat` and others."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Callable
from inspect import cleandoc
from pathlib import Path
from typing import Any

from vlmprune_jax.base.console import make_reporter
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.run.cli.flags import CONFIG, ONLY, Command, Flags, Spec, Specs, parse_bytes, parse_share

_MODEL = "Hugging Face folder or hub id of the model"
_VISION = "vision tower folder (original LLaVA, Bunny)"
_DTYPE = ("float32", "bfloat16", "float16")
# Packages that `env` lists.
_REQUIRED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "tokenizers", "safetensors",
             "huggingface_hub", "numpy")  # fmt: skip
_OPTIONAL = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "torch", "compressed-tensors", "lmms_eval", "datasets",
             "gcsfs", "easy-vqa", "wandb", "trackio")  # fmt: skip
_VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "CUDA_VISIBLE", "HF_HUB_OFFLINE", "HF_HOME", "VLMPRUNE_")
TOOLS = dict[str, Command]()
_Run = Callable[[Flags], None]


def command(*, arguments: bool = False, more: Callable[[], Specs] = dict, **specs: Spec) -> Callable[[_Run], _Run]:
    """Decorate a function that runs a command and has its help text as docstring; add the command to `TOOLS`.

    `specs`: its flags by name. `more`: returns further flags, whose defaults take long to import.
    """

    def declare(run: _Run) -> _Run:
        text = cleandoc(run.__doc__ or "")
        TOOLS[run.__name__] = Command(text, run, lambda: {**specs, **more()}, arguments)
        return run

    return declare


@command(
    arguments=True,
    config=CONFIG,
    vision_dir=_VISION,
    json=(False, "machine-readable output"),
)
def inspect(flags: Any) -> None:
    """vlmprune inspect HF_DIR: print a model's family, layout, shapes and size, what can be pruned and where it loads.

    Reads configs and tensor headers only. --config=FILE.py makes the model families that the file registers available.
    """
    import json

    from vlmprune_jax.io.exports.describe import as_lines, describe

    if len(flags.args) != 1:
        raise UserError("inspect takes one folder: vlmprune inspect HF_DIR")
    found = describe(flags.args[0], flags.vision_dir)
    print(json.dumps(found, indent=2) if flags.json else "\n".join(as_lines(found)))


@command(
    model="Hugging Face folder or hub id of the model to prune",
    vision_dir=_VISION,
    ratio="share of all parameters to remove, as 0.3 or 30%",
    bytes="maximum size of the bfloat16 weights, instead of --ratio: 2e9, 2GB, 2GiB",
    data="share of the training data to use at most, as 5%, 0.05 or none",
    compute=("full", "parameters you can train: none, projector, or full (LoRA + teacher)"),
    speed=(False, "prefer pruning that speeds up decoding"),
    train="value of data.train in the config, whose records are counted",
    images="value of data.images in the config",
    eval="value of data.eval in the config",
    guide="guide file with your own measurements",
    save="output file FILE.yaml for the config",
)
def recommend(flags: Any) -> None:
    """vlmprune recommend --model=DIR --ratio=0.3 [--data=5%] [--compute=full]: recommend a pruning method and recovery.

    Uses the guide of arXiv 2604.24380 and measurements; reads no weights.
    """
    from vlmprune_jax.run.planning.guide import FILE, read_guide
    from vlmprune_jax.run.planning.recommend import PLACEHOLDERS, advise
    from vlmprune_jax.run.report.advice import tell

    if not flags.model:
        raise UserError("no model given: add --model=DIR")
    guide = read_guide(Path(flags.guide or FILE))
    given = [shlex.quote(flags[name].serialize()) for name in flags if flags[name].present]
    advice = advise(
        flags.model, vision_dir=flags.vision_dir,
        ratio=None if flags.ratio is None else parse_share("ratio", flags.ratio),
        most_bytes=None if flags.bytes is None else parse_bytes(flags.bytes),
        data_fraction=None if flags.data is None else parse_share("data", flags.data),
        compute=flags.compute, speed=flags.speed,
        files={name: flags[name].value for name in PLACEHOLDERS if flags[name].value},
        guide=guide,
    )  # fmt: skip
    tell(advice, guide, flags.save, given, make_reporter(True))


@command(
    config=CONFIG,
    only=ONLY,
    workdir="workdir of the run: its plan.json files are read, and its report shows the numbers",
    topology="TPU slice, such as v5e:8x8, v5p:4x4x4, v6e:8x8 or tpu7x:2x2x2; two slices: v5e:8x8:2",
    records=(int, "number of training records, if data.train is not on this machine"),
    evaluation=(False, "also plan the evaluation of every pruned model"),
    weights=(["bf16"], "formats of the decoder's weights for --evaluation: bf16, w8a8, w4a16"),
    save="JSON file for the results (default: WORKDIR/tpu_plan.json)",
)
def plan(flags: Any) -> None:
    """vlmprune plan --config=FILE.py --topology=v5e:8x8: memory and minimum time of recovery on a TPU slice.

    Needs no TPU: compiles the real training step of student and teacher for every variant (1 to 2 minutes each), for
    the largest length and tile buckets. Prints memory, FLOPs, communication and minimum time; the report of --workdir
    shows them as well.
    Reads config.json but no weights. Pruned shapes come from plan.json in --workdir, or are predicted.
    --evaluation adds memory and the minimum time for 1,000 questions of each benchmark by phase, computed from shapes;
    --weights=bf16,w8a8,w4a16 includes quantised weights.
    """
    import jax

    from vlmprune_jax.run.cli.config_files import read_experiment, to_workdir
    from vlmprune_jax.run.planning.case import fit_all
    from vlmprune_jax.run.workdir.artefact import write_artefact
    from vlmprune_jax.run.workdir.tpu_plan import TPU_PLAN

    jax.config.update("jax_platforms", "cpu")  # libtpu is here to compile, there may be no TPU and it stays free
    experiment = read_experiment(flags.config, only=flags.only, explicit=flags.explicit)
    if not flags.topology:
        raise UserError("no TPU slice given: add --topology=v5e:8x8 (or v5p:4x4x4, v6e:8x8, tpu7x:2x2x2)")
    workdir = None if flags.workdir is None else to_workdir(flags.workdir)
    formats = tuple(flags.weights) if flags.evaluation else ()
    planned = fit_all(experiment, workdir, make_reporter(True), flags.topology, flags.records, formats)
    saved = flags.save or (workdir and workdir / TPU_PLAN)
    if saved:
        write_artefact(Path(saved), planned)


@command(
    model=_MODEL,
    vision_dir=_VISION,
    sources=([], "files with texts whose tokens are kept"),
    held_out=([], "files with texts to measure (default: a tenth of the sources)"),
    sizes=(["16k", "32k", "64k"], "numbers of tokens, as 16384 or 16k (x 1,024)"),
    multiple=(64, "round each size up to a multiple of this number"),
)
def vocabulary(flags: Any) -> None:
    """vlmprune vocabulary --model=DIR --sources=FILE,... --sizes=16k,32k: print what fewer tokens save and cost.

    Writes no files. Flags are settings of prune.vocabulary (`vlmprune help prune.vocabulary`).
      vlmprune vocabulary --model=DIR --sources=train.json,captions.txt --sizes=16k,32k,64k --multiple=128
    """
    from vlmprune_jax.core.prune.config import VocabularyConfig
    from vlmprune_jax.io.checkpoints.read import read_config, resolve
    from vlmprune_jax.run.stages.vocabulary import parse_size, trade

    if not flags.model:
        raise UserError("no model given: add --model=DIR")
    sizes = [parse_size(size) for size in flags.sizes]
    folder = resolve(flags.model)
    cfg = read_config(folder, None if flags.vision_dir is None else resolve(flags.vision_dir))[1]
    config = VocabularyConfig(
        sources=tuple(flags.sources), held_out=tuple(flags.held_out), multiple=flags.multiple, bits=False
    )
    reporter = make_reporter(True)
    reporter.table(*trade(Path(folder), cfg, config, sizes))
    reporter.say("to apply a size: --config.prune.vocabulary.size=N --config.prune.vocabulary.sources=\"('FILE',)\"")


def _bench_flags() -> Specs:
    from vlmprune_jax.base.settings import settings_of
    from vlmprune_jax.run.evaluation.config import SpeedConfig

    known = settings_of(SpeedConfig())
    names = ("prompt_tokens", "new_tokens", "batch_size", "rounds", "image")
    return {name: (known[name].default, known[name].sentence) for name in names}


@command(
    more=_bench_flags,
    model="Hugging Face folder, hub id or GGUF file (mmproj-*.gguf beside it)",
    against=([], "more models to measure, in turns with --model"),
    vision_dir=_VISION,
    backends=([], "jax, transformers, llama_cpp (default: installed engines)"),
    threads=(int, "threads per engine (default: all)"),
    dtype=(_DTYPE, "data type of folders' weights"),
    json="output file FILE.json for all measurements",
)
def bench(flags: Any) -> None:
    """vlmprune bench --model=DIR_OR_GGUF [--against=DIR_OR_GGUF,...]: measure speed and memory of models.

    Measures prefill and decode speed (tokens/s), time of a question, peak memory and file size on this processor, in
    vlmprune's JAX forward pass, transformers (folders) and llama.cpp (GGUF); in turns, one process per model and
    engine.
      vlmprune bench --model=DIR --against=runs/llava/export --backends=jax,transformers --threads=4 --json=bench.json
    """
    from vlmprune_jax.core.mesh.machine import cores
    from vlmprune_jax.run.evaluation.config import SpeedConfig
    from vlmprune_jax.run.report.speed import bench_notes, bench_tables
    from vlmprune_jax.run.speed.bench import bench, find_jobs
    from vlmprune_jax.run.workdir.artefact import write_artefact

    if not flags.model:
        raise UserError("no model given: add --model=DIR_OR_GGUF")
    config = SpeedConfig(**{name: flags[name].value for name in _bench_flags()})
    threads, file = cores() if flags.threads is None else flags.threads, flags.json and Path(flags.json)
    if not 0 < threads <= cores():
        raise UserError(f"--threads={threads}: must be 1 to {cores()}, the cores that this process may use")
    if file and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise UserError(f"--json={file}: must be a file name in an existing folder")
    models, dtype, reporter = [flags.model, *flags.against], flags.dtype, make_reporter(True)
    jobs, remarks = find_jobs(models, flags.vision_dir, config, backends=flags.backends, dtype=dtype)
    results = bench(jobs, config, reporter, dtype=dtype, threads=threads)
    if file:
        write_artefact(file, results)
    for table in bench_tables(results):
        reporter.table(*table.printed)
    for line in (*bench_notes(results), *remarks):
        reporter.say(line)


@command(
    arguments=True,
    vision_dir=_VISION,
    dtype=(_DTYPE, "data type of the weights in memory"),
    max_new_tokens=(64, "maximum length of an answer (tokens)"),
    video_frames=(int, "frames to sample from a video (default: the folder's)"),
)
def chat(flags: Any) -> None:
    """vlmprune chat MODEL [MODEL ...] [FILE ...] "QUESTION": ask models a question, as before and after pruning.

    Models are Hugging Face folders or hub ids; files are images and videos. Answers are greedy.
      vlmprune chat DIR/llava-1.5-7b-hf runs/llava/export cat.png "What animal is this?"
      vlmprune chat DIR/Qwen3-VL-2B-Instruct clip.mp4 "What happens?" --video_frames=8
    """
    from vlmprune_jax.core.mesh.mesh import start_devices
    from vlmprune_jax.core.models.params import count_params
    from vlmprune_jax.io.checkpoints.read import load, resolve
    from vlmprune_jax.run.evaluation.answer import answer, is_file

    *names, question = flags.args or [""]
    files = [name for name in names if is_file(name)]
    models = [name for name in names if name not in files]
    usage = 'vlmprune chat MODEL image.png "What is this?"'
    if os.path.exists(question) or (" " not in question and is_file(question)):
        raise UserError(f"chat: the last argument is {question}, not a question: add one ({usage})")
    if not models or not question:
        raise UserError(f"chat takes models, images or videos and a question: {usage}")
    if missing := [name for name in files if not os.path.isfile(name)]:
        raise UserError(f"{missing[0]}: no such file: name an image or a video that exists")
    for name in models:
        resolve(name)
    start_devices()
    reporter = make_reporter(True)
    for name in models:
        model = load(name, vision_dir=flags.vision_dir, dtype=flags.dtype)
        options = {"source_dir": name, "vision_dir": flags.vision_dir, "max_new_tokens": flags.max_new_tokens}
        options |= {} if flags.video_frames is None else {"video_frames": flags.video_frames}
        text = answer(model, files or None, question, **options)
        reporter.say(f"{name} ({count_params(model):,} parameters)")
        reporter.say(f"  {text}")


@command(arguments=True)
def diff(flags: Any) -> None:
    """vlmprune diff A B: compare the heads and neurons that two plans for one model keep, layer by layer.

    A and B are plan.json files or folders with one. Prints Jaccard indices of kept heads and neurons per layer and
    overall.
    """
    from vlmprune_jax.core.plans.plan import PrunePlan
    from vlmprune_jax.core.prune.tables import compare

    if len(flags.args) != 2:
        raise UserError("diff takes two plans: vlmprune diff A B (plan.json files, or folders that contain one)")
    reporter = make_reporter(True)
    for table in compare(*map(PrunePlan.from_json, flags.args)):
        reporter.table(*table)


@command(arguments=True)
def help(flags: Any) -> None:
    """vlmprune help NAME: print meaning, default and allowed values of a setting, or of all settings of a section.

    NAME is a full name (`vlmprune help recover.losses.kl`) or its last part (`vlmprune help kl`). Without NAME,
    `vlmprune help` lists the commands.
    """
    from vlmprune_jax.base.console import wrap_lines
    from vlmprune_jax.run.experiment.spec import describe

    for name in flags.args:
        print("\n".join(wrap_lines(describe(name))))


@command()
def env(flags: Any) -> None:
    """vlmprune env: versions, devices and installed packages of this machine, for a bug report.

    Also shows the environment variables that jax and the hub client read.
    """
    import jax

    from vlmprune_jax.core.mesh.machine import cores, cpu, processor
    from vlmprune_jax.core.mesh.mesh import start_devices
    from vlmprune_jax.run.workdir.content import commit, versions

    try:
        start_devices()
        devices = f"{jax.device_count()} on {jax.default_backend()}: {processor()}"
    except UserError as error:
        devices = f"none: {error}"
    installed = versions((*_REQUIRED, *_OPTIONAL))
    variables = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)]
    print("vlmprune  ", ", commit ".join(filter(None, (version(), commit()))))
    print("python    ", f"{installed['python']}, {platform.platform()}")
    print("processor ", f"{cpu()}, {cores()} cores")
    print("devices   ", devices)
    print("packages  ", ", ".join(f"{name} {number}" for name, number in installed.items() if name != "python"))
    print("missing   ", ", ".join(name for name in _OPTIONAL if name not in installed))
    print("variables ", ", ".join(variables))


@command(
    data="JSON or JSON-lines file of records in LLaVA's format",
    images="folder to which image paths in the records are relative",
    out="folder to write",
)
def tfds(flags: Any) -> None:
    """vlmprune tfds --data=FILE.json --images=DIR --out=DIR: pack records into a tensorflow-datasets data set.

    Writes a few large ArrayRecord files, without TensorFlow. --config.data.train=tfds:DIR reads the data set.
    """
    from vlmprune_jax.io.data.records import read_records
    from vlmprune_jax.io.data.tfds import write_tfds

    if not flags.data or not flags.out:
        raise UserError("tfds needs --data=FILE.json and --out=DIR (and --images=DIR if records have images)")
    if "://" in flags.out:
        raise UserError(
            f"--out={flags.out}: must be a local folder: write DIR, then run gcloud storage cp -r DIR {flags.out}"
        )
    root = None if flags.images is None else Path(flags.images)
    # image_lead: a prompt template may add missing placeholders later
    records = read_records(Path(flags.data), root, image_lead=True)
    images = len({image for record in records for image in record.images})
    reporter = make_reporter(True)
    with reporter.bar("write", len(records) + images) as progress:
        write_tfds(records, Path(flags.out), image_root=root, progress=progress)
    reporter.say(f"{flags.out}: {len(records):,} records, {images:,} images; use --config.data.train=tfds:{flags.out}")


def version() -> str:
    """Return the version of vlmprune-jax."""
    from vlmprune_jax.run.workdir.content import versions

    return versions(("vlmprune-jax",)).get("vlmprune-jax", "not installed")
