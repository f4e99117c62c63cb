"""Training batches of several lengths and with empty rows: the same training as without them; skipped rows are told."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import recover_cases as cases

from vlmprune_jax.data.batching import Batch
from vlmprune_jax.recovery.loop import recover
from vlmprune_jax.recovery.metrics import Recorder

CFG = cases.config(vision=False)


class Padded(cases.Stream):
    """The batches padded to `lengths` in turn, with `empty` rows behind every batch."""

    def __init__(self, lengths, empty=0, **options):
        super().__init__(CFG, **options)
        self.lengths, self.empty = lengths, empty

    def __next__(self):
        length = self.lengths[self.at % len(self.lengths)]
        batch = super().__next__()
        padding = ((0, self.empty), (0, length - self.length))
        arrays = {
            name: np.pad(array, padding, constant_values=-100 if name == "labels" else 0)
            for name, array in batch.arrays.items()
        }
        skipped = tuple((f"lost-{self.at}-{row}", "why") for row in range(self.empty))
        return Batch(arrays, batch.record_ids + ("",) * self.empty, skipped=skipped)


def train(stream, **changes):
    return recover(cases.model(CFG), stream, cases.settings(**changes), progress=False)


@pytest.mark.slow
def test_lengths_in_turn_train_the_same():
    plain, _ = train(Padded((11,)), accumulation=2, steps=4)
    varied, _ = train(Padded((11, 20)), accumulation=2, steps=4)
    assert cases.largest_difference(plain, varied) < 1e-6


def test_empty_rows_weigh_nothing():
    plain, before = train(Padded((11,), rows=6), batch_size=6, steps=3)
    with_empty, summary = train(Padded((11,), rows=6, empty=2), batch_size=8, steps=3)
    assert cases.largest_difference(plain, with_empty) < 1e-6
    assert (before["skipped_rows"], summary["skipped_rows"]) == (0, 6)
    assert (before["last"]["empty_rows"], summary["last"]["empty_rows"]) == (0, 2)


def test_the_list_of_skipped_records_goes_on(tmp_path):
    metrics = {"loss": 1.0, "grad_norm": 1.0, "tokens": 5.0}

    def run(first, last):
        with Recorder(tmp_path, first, 9, 1, False, jax.devices()) as recorder:
            for step in range(first + 1, last + 1):
                recorder.step(step, metrics, ["r"], 0.0, [(f"lost {step}", "why")] if step % 2 else [], 1)
            return recorder.summary()["skipped_rows"]

    assert run(0, 5) == 3
    assert run(2, 9) == 5  # steps 3 to 5 are repeated
    lines = [json.loads(line) for line in (tmp_path / "skipped-0.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "record": f"lost {step}", "reason": "why"} for step in (1, 3, 5, 7, 9)]
