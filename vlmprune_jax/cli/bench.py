"""vlmprune bench --model=DIR_OR_GGUF [--against=DIR_OR_GGUF,...]: speed and memory of models on this processor.

Prefill and decoding in tokens per second, time to the first token (with an image where the model sees any), peak memory
and bytes on disk: of our JAX forward, and where installed of transformers (folders) and llama.cpp (GGUF files). All are
in memory together, each in a process of its own, and take turns.
  vlmprune bench --model=DIR --against=runs/llava/export --backends=jax,transformers --threads=4 --json=bench.json
"""

from __future__ import annotations

from typing import Any

from absl import flags as absl_flags

from vlmprune_jax.cli.flags import Flags


def define(values: Flags) -> None:
    """Flags of this command."""
    text, whole = absl_flags.DEFINE_string, absl_flags.DEFINE_integer
    text("model", None, "Hugging Face folder, hub id or GGUF file (mmproj-*.gguf beside it)", flag_values=values)
    absl_flags.DEFINE_list("against", [], "more of them, measured in the same rounds", flag_values=values)
    text("vision_dir", None, "vision tower folder (original LLaVA, Bunny)", flag_values=values)
    about = "of jax, transformers, llama_cpp; without it all that are installed and can read a model"
    absl_flags.DEFINE_list("backends", [], about, flag_values=values)
    whole("prompt_tokens", 640, "tokens of the prompt, those of its image included", flag_values=values)
    whole("new_tokens", 32, "tokens that are generated after the first one", flag_values=values)
    whole("rounds", 5, "how often each is measured", flag_values=values)
    whole("threads", None, "cores that each may use; without it all", flag_values=values)
    absl_flags.DEFINE_bool("image", True, "prompts begin with an image, where a model sees any", flag_values=values)
    text("dtype", "float32", "of the weights of folders: float32, bfloat16 or float16", flag_values=values)
    text("json", None, "write every round there as well, FILE.json", flag_values=values)


def run(flags: Any) -> None:
    """Measure, print the tables, and perhaps write the numbers."""
    from pathlib import Path

    from vlmprune_jax.core.console import make_reporter
    from vlmprune_jax.core.errors import UserError
    from vlmprune_jax.distributed.processor import cores
    from vlmprune_jax.evaluation.speed.bench import Workload, bench, check_bench, find_sides
    from vlmprune_jax.report.speed import bench_notes, bench_tables
    from vlmprune_jax.workdir.ledger import write_json

    if not flags.model:
        raise UserError("no model given: --model=DIR_OR_GGUF")
    names = ("prompt_tokens", "new_tokens", "rounds", "image", "dtype")
    threads = cores() if flags.threads is None else flags.threads
    workload = Workload(**{name: flags[name].value for name in names}, threads=threads)
    check_bench(workload, flags.json)
    sides, left_out = find_sides([flags.model, *flags.against], flags.backends, flags.vision_dir, workload)
    reporter = make_reporter(True)
    found = bench(sides, workload, reporter)
    if flags.json is not None:
        write_json(Path(flags.json), found)
    for table in bench_tables(found):
        reporter.table(table.title, table.header, table.rows)
    for line in (*bench_notes(found), *left_out):
        reporter.say(line)
