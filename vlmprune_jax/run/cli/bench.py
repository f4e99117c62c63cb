"""vlmprune bench --model=DIR_OR_GGUF [--against=DIR_OR_GGUF,...]: measure speed and memory of models on this processor.

Measures prefill and decode speed (tokens/s), time of a question, peak memory and file size in vlmprune's JAX forward
pass, transformers (folders) and llama.cpp (GGUF), in turns, one process per model and engine.
  vlmprune bench --model=DIR --against=runs/llava/export --backends=jax,transformers --threads=4 --json=bench.json
"""

from __future__ import annotations

from typing import Any

from absl import flags as absl_flags

from vlmprune_jax.base.settings import settings_of
from vlmprune_jax.run.cli.flags import Flags
from vlmprune_jax.run.evaluation.speed.clock import SpeedConfig


def define(values: Flags) -> None:
    """Define the command-line flags of `vlmprune bench`."""
    text, several, settings = absl_flags.DEFINE_string, absl_flags.DEFINE_list, settings_of(SpeedConfig())
    text("model", None, "Hugging Face folder, hub id or GGUF file (mmproj-*.gguf beside it)", flag_values=values)
    several("against", [], "more models to measure, in turns with --model", flag_values=values)
    text("vision_dir", None, "vision tower folder (original LLaVA, Bunny)", flag_values=values)
    several("backends", [], "jax, transformers, llama_cpp (default: installed engines)", flag_values=values)
    for name in ("prompt_tokens", "new_tokens", "batch_size", "rounds"):
        default, about = settings[name].default, settings[name].sentence
        absl_flags.DEFINE_integer(name, default, about, lower_bound=1, flag_values=values)
    absl_flags.DEFINE_bool("image", True, settings["image"].sentence, flag_values=values)
    absl_flags.DEFINE_integer("threads", None, "threads per engine (default: all)", lower_bound=1, flag_values=values)
    dtypes = ["float32", "bfloat16", "float16"]
    absl_flags.DEFINE_enum("dtype", "float32", dtypes, "data type of folders' weights", flag_values=values)
    text("json", None, "output file FILE.json for all measurements", flag_values=values)


def run(flags: Any) -> None:
    """Measure and print the speed of models (`vlmprune bench`); `--json=FILE` also saves the numbers."""
    from vlmprune_jax.base.console import make_reporter
    from vlmprune_jax.base.errors import UserError
    from vlmprune_jax.run.evaluation.speed.bench import bench, check_bench, find_jobs
    from vlmprune_jax.run.report.speed import tell_bench
    from vlmprune_jax.run.workdir.speed import make_bench

    if not flags.model:
        raise UserError("no model given: add --model=DIR_OR_GGUF")
    config = SpeedConfig(**{name: flags[name].value for name in settings_of(SpeedConfig())})
    options, reporter = {"dtype": flags.dtype, "threads": check_bench(flags.threads, flags.json)}, make_reporter(True)
    models = [flags.model, *flags.against]
    jobs, remarks = find_jobs(models, flags.vision_dir, config, backends=flags.backends, **options)
    results = make_bench(*bench(jobs, config, reporter), config, **options)
    tell_bench(results, remarks, flags.json, reporter)
