"""A training run in its own process, for the tests that kill it: `python recover_worker.py WORKDIR`.

Prints each batch number as it is handed out, and "done" at the end. Run again, it resumes.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parent))
import recover_cases as cases

from vlmprune_jax.core.models.params import flatten
from vlmprune_jax.core.recovery.loop import recover

STEPS = 24
CFG = cases.config(vision=False)


class SlowStream(cases.Stream):
    """Announces every batch, and leaves time to be killed at it."""

    def __next__(self):
        print("batch", self.at, flush=True)
        time.sleep(0.02)
        return super().__next__()


def main(workdir: str) -> None:
    """Train all of a small decoder, saving at every step."""
    jax.config.update("jax_default_matmul_precision", "highest")
    config = cases.settings(trainable="decoder", steps=STEPS, save_every=1)
    trained, _ = recover(cases.model(CFG), SlowStream(CFG), config, workdir=workdir, progress=False)
    digest = {path: leaf.tobytes() for path, leaf in flatten(jax.device_get(trained.params)).items()}
    (Path(workdir) / "trained.bin").write_bytes(b"".join(digest[path] for path in sorted(digest)))
    print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
