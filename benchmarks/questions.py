"""Lower bounds on the chip-seconds of 1,000 benchmark questions on a TPU, by phase, for pruned and quantised models.

    python benchmarks/questions.py --topologies=v5e:2x4,v6e:2x4 [--models=llava,internvl] [--save=questions.json]

Models are unpruned, or without 30 % of the decoder by layers or by widths (multiples of 128), each with weights in
bfloat16, w8a8 (int8 units) and w4a16. Nothing runs: times are computed from FLOPs at the chip's peak and from one
reading of weights and cache; communication between chips is left out. Prints a table with the mean over nine
benchmarks, and the time of one question alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models import MODELS
from plan import DATA, PROCESSORS

NAMES = ("llava", "qwen3vl", "internvl", "gemma4_e4b")
CUTS: dict[str, dict[str, Any]] = {
    "unpruned": {},
    "depth 30 %": {"method": "depth"},
    "width 30 %": {"method": "width", "align_to": "tpu", "heads": "keep"},
}
FORMATS = ("bf16", "w8a8", "w4a16")


def variants(name: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name of the pruning, pruned model config, image preparation) for every pruning of a model."""
    from vlmprune_jax.base.settings import override
    from vlmprune_jax.core.models.params import count_params
    from vlmprune_jax.io.checkpoints.read import read_config
    from vlmprune_jax.run.experiment.spec import Experiment
    from vlmprune_jax.run.planning.case import predict_plan
    from vlmprune_jax.run.planning.evaluation import preparation_of

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[name]))
        if name in PROCESSORS:
            (Path(folder) / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[name]))
        _, cfg = read_config(Path(folder), None)
        ratio = 0.3 * count_params(cfg, "text") / count_params(cfg)
        for cut, settings in CUTS.items():
            changes = {"data": DATA.get(name, {}), "prune": {"ratio": ratio, **settings}}
            experiment = override(Experiment(), changes)
            pruned = predict_plan(experiment, cfg).apply_to(cfg) if settings else cfg
            yield cut, pruned, preparation_of(experiment.data, cfg, Path(folder))


def rows(name: str, topology: str) -> Iterator[dict[str, Any]]:
    """Yield a row per cut and format: mean chip-seconds of 1,000 questions by phase, seconds of a single question."""
    from vlmprune_jax.base.chips import slice_of
    from vlmprune_jax.run.planning.evaluation import BATCH, BENCHMARKS, bound, prompt_of

    chip, chips = slice_of(topology)
    for cut, cfg, preparation in variants(name):
        for form in FORMATS:
            phases, single = dict[str, float](), 0.0
            for question in BENCHMARKS.values():
                case = (cfg, chip, chips, form, *prompt_of(cfg, preparation, question), question.answer)
                for phase, seconds in bound(*case).seconds(BATCH, chips).items():
                    phases[phase] = phases.get(phase, 0) + chips * seconds / len(BENCHMARKS)
                single += sum(bound(*case, rows=1).phases.values()) / len(BENCHMARKS)
            yield {"model": name, "slice": topology, "cut": cut, "weights": form, **phases, "single": single}


def main() -> None:
    """Compute and print the table of bounds, and save its rows if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topologies", default="v5e:2x4,v6e:2x4")
    parser.add_argument("--models", default=",".join(NAMES))
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    found = [row for topology in args.topologies.split(",") for name in args.models.split(",")
             for row in rows(name, topology)]  # fmt: skip
    print("model|slice|cut|weights|tower|prefill|decoding|chip-s, 1,000 questions|ms, one question")
    print("|".join(["---"] * 9))
    for row in found:
        numbers = [row[phase] for phase in ("tower", "prefill", "decode")]
        columns = (*numbers, sum(numbers))
        print(
            f"{row['model']}|{row['slice']}|{row['cut']}|{row['weights']}|"
            f"{'|'.join(f'{number:.1f}' for number in columns)}|{1000 * row['single']:.0f}"
        )
    if args.save:
        args.save.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
