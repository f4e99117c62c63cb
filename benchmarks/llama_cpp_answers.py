"""Comparison of llama.cpp's answers with those of `vlmprune evaluate` on easy-VQA, for pruned models of the demo.

  python benchmarks/llama_cpp_answers.py --work=DIR [--questions 200]

The demo's teacher is pruned until it makes errors, and exported to GGUF in F32. xllamacpp's chat calls (with the file's
own chat template and unchanged images) and `vp.evaluate` answer the same questions; the table has the number of equal
answers. Builds of llama.cpp up to October 2026 put the class token behind the patches (#25814). The files are therefore
written with the normal position table and with that for such builds (`rolled_positions`). Both are also compared with
vlmprune's own tower in that token order (the first word of the answer). Needs the [demo] and [test] extras.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import vlmprune_jax as vp
from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.core.models.params import flatten, unflatten
from vlmprune_jax.core.models.vlm import encode, head_of, tower_features
from vlmprune_jax.core.sections import ModelSpec
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.run.cli.config_files import shipped_config
from vlmprune_jax.run.demo.easyvqa import write_dataset
from vlmprune_jax.run.evaluation.config import EvaluateSpec, EvaluationSetSpec
from vlmprune_jax.run.evaluation.questions import arranged_questions

TEACHER = Path(shipped_config("demo").model.hf_dir)
LONGEST = 4  # tokens of an answer
DATA: dict[str, Any] = {"system": "", "aspect_ratio": "square", "max_length": 88}
CUTS: dict[str, dict[str, Any]] = {
    "width 20 %": {"method": "width", "ratio": 0.2, "heads": "keep", "neurons_multiple": 32},
    "width 28 %": {"method": "width", "ratio": 0.28, "heads": "keep", "neurons_multiple": 32},
    "depth, 6 of 10 layers": {"method": "depth", "layers_removed": 6},
}


def questions(work: Path, count: int) -> list[dict[str, Any]]:
    """Return a fixed sample of `count` test records, and write it to sample-COUNT.json in `work`."""
    paths = write_dataset(work / "easyvqa")
    records = json.loads(paths["test"].read_text())
    chosen = np.sort(np.random.default_rng(0).permutation(len(records))[:count])
    sample = [records[place] for place in chosen]
    (work / f"sample-{count}.json").write_text(json.dumps(sample))
    return sample


def calibration(work: Path, count: int) -> list[Any]:
    """Return batches of `count` training records in a fixed random order, for calibration."""
    paths = write_dataset(work / "easyvqa")
    records = json.loads(paths["train"].read_text())
    chosen = np.random.default_rng(0).permutation(len(records))[:count]
    rows = [records[place] for place in chosen]
    return vp.batches(TEACHER, rows, images=paths["images"], batch_size=32, **DATA)


def evaluate(model: vp.Model, work: Path, count: int) -> Any:
    """Evaluate a model on the records of `questions`, as `vlmprune evaluate` does."""
    questions(work, count)
    images = str(work / "easyvqa" / "images")
    data = DataSpec(**DATA, eval=str(work / f"sample-{count}.json"), eval_images=images)
    asked = EvaluationSetSpec(
        data=data.eval, images=images, max_new_tokens=LONGEST, metric="exact_match", prompt_suffix=""
    )
    arranged = arranged_questions(
        ModelSpec(hf_dir=str(TEACHER)), data, EvaluateSpec(batch_size=200), asked, model.cfg, multiple=1
    )
    found = arranged.batches(threads=1, prefetch=1)
    return vp.evaluate(model, found, tokenizer=load_tokenizer(TEACHER), max_new_tokens=LONGEST)


def by_llama_cpp(folder: Path, records: Sequence[dict[str, Any]], images: Path) -> list[str]:
    """Return llama.cpp's answers to these records, for the GGUF files in a folder; runs in a child process."""
    files = sorted(folder.glob("*.gguf"), key=lambda path: path.name.startswith("mmproj"))
    asked = [[str(images / one["image"]), one["conversations"][0]["value"].removeprefix("<image>")] for one in records]
    job = json.dumps({"files": list(map(str, files)), "asked": asked})
    done = subprocess.run([sys.executable, __file__, "--answer"], input=job, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def in_that_order(model: vp.Model, records: Sequence[dict[str, Any]], images: Path, rolled: bool) -> list[str]:
    """Return each answer's first token if the tower's class token comes last and the first patch is lost (#25814)."""
    flat = flatten(model.params)
    if not rolled:
        flat["vision/position_embedding/weight"] = jnp.roll(flat["vision/position_embedding/weight"], 1, axis=0)
    params, cfg = unflatten(flat), dataclasses.replace(model.cfg, feature_select="full")
    rest = {name: part for name, part in params.items() if name != "vision"}
    tokenizer, said = load_tokenizer(TEACHER), list[str]()
    for batch in vp.batches(TEACHER, records, images=images, batch_size=50, **DATA):
        arrays = batch.arrays
        states = tower_features(params["vision"], cfg, arrays["media"]["vision"])
        states = jnp.concatenate([states[:, 2:], states[:, :1]], axis=1)
        last, _ = encode(
            rest, dataclasses.replace(model.cfg, tower=False), jnp.asarray(arrays["input_ids"]),
            media={"vision": Packed(states[:, None])}, attention_mask=jnp.asarray(arrays["attention_mask"]),
        )  # fmt: skip
        places = (arrays["labels"] != -100).argmax(axis=1) - 1
        tokens = head_of(params, model.cfg)(last[np.arange(len(places)), places]).argmax(-1)
        said += [tokenizer.decode([int(token)]).strip() for token in tokens[: len(records) - len(said)]]
    return said


def _answer() -> None:
    """Answer the questions of a job (JSON on standard input) by llama.cpp, and print the answers as JSON."""
    import xllamacpp

    job, params = json.load(sys.stdin), xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = job["files"]
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 256, 1, False, -1
    params.cache_ram_mib, params.cpuparams.n_threads, params.cpuparams_batch.n_threads = 0, 1, 1
    server, said = xllamacpp.Server(params), []
    for image, question in job["asked"]:
        url = f"data:image/png;base64,{base64.b64encode(Path(image).read_bytes()).decode()}"
        # the server joins the parts without the line break that the template has behind an image
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        found = server.handle_chat_completions({"messages": messages, "max_tokens": LONGEST, "temperature": 0.0})
        found = found if isinstance(found, dict) else json.loads(found)
        if "error" in found:
            sys.exit(str(found["error"]))
        said.append((found["choices"][0]["message"]["content"] or "").strip())
    print(json.dumps(said))


def main() -> None:
    """Print a Markdown table of equal answers and accuracy, with a row per pruned model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=200)
    options = parser.parse_args()
    work, count = options.work.resolve(), options.questions
    model, records = vp.load(TEACHER), questions(work, count)
    rows = calibration(work, 64)
    header = ("model", "right here", *("equal", "to that order") * 2)
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|", flush=True)
    for name, cut in {"unpruned": None, **CUTS}.items():
        criterion = {"criterion": "taylor" if name.startswith("width") else "block_influence"}
        pruned = model
        if cut is not None:
            pruned = vp.apply_plan(model, vp.make_plan(vp.score(model, rows, **criterion), model.cfg, **cut))
        ours = evaluate(pruned, work, count)
        cells = [name, f"{sum(one.scores['accuracy'] for one in ours.answers):.0f} of {count}"]
        for rolled in (False, True):
            out = work / f"gguf-{name.replace(' ', '-').replace(',', '')}-{rolled}"
            save = {"format": "gguf", "dtype": "float32", "rolled_positions": rolled, "overwrite": True}
            vp.save(pruned, out, source_dir=TEACHER, **save)
            theirs = by_llama_cpp(out, records, work / "easyvqa" / "images")
            turned = in_that_order(pruned, records, work / "easyvqa" / "images", rolled)
            first = [said.partition(" ")[0] for said in theirs]
            for said, others in ((theirs, [one.prediction for one in ours.answers]), (first, turned)):
                same = sum(map(str.__eq__, said, others))
                cells.append(f"{same} of {count} ({same / count:.1%})")
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    _answer() if "--answer" in sys.argv else main()
