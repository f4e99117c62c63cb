"""Comparison of recovery from `reconstructed/` and from `pruned/`: perplexities of SmolLM2-135M by `vlmprune run`.

  python benchmarks/recover_reconstructed.py --work=DIR [--steps 24] [--ratio 0.2]

20 % of all parameters are removed by width (heads kept). SFT + L2 trains on 5 % of about 1,870 records, which are
docstrings and every second topic of Python's language reference. Perplexity is measured on 12 x 512 tokens of the other
topics.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

from reconstruction import ROOT, smollm2_folder

from vlmprune_jax.run.demo.topics import topics

CONFIG = """
from vlmprune_jax.run.cli.config_files import experiment_config


def get_config():
    config = experiment_config()
    config.model.hf_dir = {model!r}
    config.data.train = {records!r}
    config.data.max_length = 192
    config.data.fraction = 0.05
    config.evaluate.text = {text!r}
    config.score.samples, config.score.batch_size = 16, 4
    config.reconstruct.samples = 64
    config.recover.trainable = "decoder"
    config.recover.batch_size = 4
    config.recover.steps = {steps}
    config.recover.learning_rate = 2e-5
    config.recover.losses = {{"ce": 0.5, "l2": 0.5, "l2_layers": (-1,)}}
    config.export.dtype = "float32"
    width = {{"prune": {{"method": "width", "ratio": {ratio}, "heads": "keep"}}}}
    config.prune_variants = {{"width": width, "solved": {{**width, "reconstruct": {{"method": "least_squares"}}}}}}
    return config
"""
LEAST, MOST = 250, 1000  # letters of a docstring that is taken, and of an answer


def records() -> list[dict[str, object]]:
    """Return records made from docstrings of the standard library, and from pieces of every second Python topic."""
    pairs = []
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py")):
        if {"site-packages", "test", "idlelib", "lib2to3", "pydoc_data"} & set(path.parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                name, text = getattr(node, "name", path.stem), ast.get_docstring(node) or ""
                if len(text) > LEAST:
                    pairs.append((f"What does {name} of Python's {path.stem} do?", text[:MOST]))
    text = topics(0)
    pairs += [("Go on with the language reference.", text[at : at + MOST]) for at in range(0, len(text), MOST)]
    turns = [[{"from": "human", "value": asked}, {"from": "gpt", "value": told}] for asked, told in pairs]
    return [{"id": str(number), "conversations": turn} for number, turn in enumerate(turns)]


def main() -> None:
    """Write the records, the evaluation text and the config, and run `vlmprune run` on them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--ratio", type=float, default=0.2)
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    files = {name: str(work / name) for name in ("records.json", "text.txt", "config.py")}
    Path(files["records.json"]).write_text(json.dumps(records()))
    Path(files["text.txt"]).write_text(topics(1)[:26_000])  # about 12 x 512 tokens
    config = CONFIG.format(
        model=str(smollm2_folder(ROOT)),
        records=files["records.json"],
        text=files["text.txt"],
        steps=options.steps,
        ratio=options.ratio,
    )
    Path(files["config.py"]).write_text(config)
    command = ["-m", "vlmprune_jax", "run", f"--config={files['config.py']}", f"--workdir={work / 'run'}"]
    sys.exit(subprocess.call([sys.executable, *command]))


if __name__ == "__main__":
    main()
