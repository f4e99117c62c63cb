"""Run the configs of four recommendations of `vlmprune recommend`; compare expected with measured retention.

    python benchmarks/recommend_check.py [--model=DIR] [--workdir=runs/recommend_check] [FLAG_OF_VLMPRUNE_RUN ...]

Without --model it is the demo's teacher, whose recommendations name their data: about four minutes on two cores. For a
model of your own, give the flags of its data, as --config.data.train=FILE.json. One JSON line per recommendation.
"""

from __future__ import annotations

import argparse
import json
from importlib import resources
from pathlib import Path

from vlmprune_jax.run.cli.main import main as vlmprune
from vlmprune_jax.run.planning.guide import read_guide
from vlmprune_jax.run.planning.recommend import advise
from vlmprune_jax.run.report.advice import pruning_of, recovery_of
from vlmprune_jax.run.workdir.result import read_result

CASES = {
    "trained": {"ratio": 0.305, "data_fraction": 0.05, "compute": "full"},
    "untrained": {"ratio": 0.245, "data_fraction": 0.0, "compute": "none"},
    "hybrid": {"ratio": 0.326, "data_fraction": 0.0, "compute": "none"},
    "projector": {"ratio": 0.15, "data_fraction": 0.05, "compute": "projector"},
}


def check(name: str, model: str, workdir: Path, flags: list[str]) -> dict[str, object]:
    """Run the config of one recommendation; return the expected and the measured retention in %."""
    advice = advise(model, **CASES[name], guide=read_guide())
    config = workdir / f"{name}.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(advice.config)
    if vlmprune(["run", f"--config={config}", f"--workdir={workdir / name}", *flags]):
        raise SystemExit(f"{name}: vlmprune run failed")
    run, promise = read_result(workdir / name).best_run, advice.recommendation.promise
    advised = f"{pruning_of(advice.recommendation)}; {recovery_of(advice.recommendation)}"
    retained = run.evaluation.mean_of_ratios
    inside = None if promise is None or retained is None else promise[0] <= retained <= max(100.0, promise[1])
    return {
        **{"case": name, **CASES[name], "advice": advised, "model": run.label},
        **{"interval": promise, "retained": retained, "inside": inside},
    }


def main() -> None:
    """Check every recommendation, and print one JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(resources.files("vlmprune_jax") / "demo" / "teacher"))
    parser.add_argument("--workdir", type=Path, default=Path("runs/recommend_check"))
    options, flags = parser.parse_known_args()
    lines = [json.dumps(check(name, options.model, options.workdir, flags)) for name in CASES]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
