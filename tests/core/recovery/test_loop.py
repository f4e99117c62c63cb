"""Training batches of several lengths and with empty rows: the same training as without them; skipped rows are told;
and what all of them need is compiled before the first.
"""

import dataclasses
import functools
import itertools
import json
import os
import signal

import jax
import numpy as np
import pytest
import recover_cases as cases
from refusal import refused

from vlmprune_jax.base.errors import Stopped
from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.core.models.params import flatten
from vlmprune_jax.core.recovery.loop import prepare, recover
from vlmprune_jax.core.recovery.metrics import Recorder
from vlmprune_jax.core.recovery.program import place_rows, step_context
from vlmprune_jax.io.data.batching import Batch, train_batches
from vlmprune_jax.io.data.encoding import Encoder, measure
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.io.families import templates

CFG, IMAGES = cases.config(vision=False), cases.config()


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
    metrics = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens": 5.0}

    def run(first, last):
        with Recorder(tmp_path, first, 9, 1, False, jax.devices()) as recorder:
            for step in range(first + 1, last + 1):
                recorder.step(step, metrics, ["r"], 0.0, [(f"lost {step}", "why")] if step % 2 else [], 1)
            return recorder.summary()["skipped_rows"]

    assert run(0, 5) == 3
    assert run(2, 9) == 5  # steps 3 to 5 are repeated
    lines = [json.loads(line) for line in (tmp_path / "skipped-0.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "record": f"lost {step}", "reason": "why"} for step in (1, 3, 5, 7, 9)]


# --- compiled ahead ---------------------------------------------------------------------------------------------------


class Watched:
    """Batches that note in `log` each one that is handed out; SIGTERM comes with number `stop` (from 0)."""

    def __init__(self, batches, log, stop=None):
        self.kinds, self.stream, self.log, self.left = batches.kinds, iter(batches), log, stop
        self.get_state, self.set_state = self.stream.get_state, self.stream.set_state

    def __iter__(self):
        return self

    def __next__(self):
        self.log.append("batch")
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        self.left = None if self.left is None else self.left - 1
        return next(self.stream)


@pytest.fixture(scope="module")
def batches(goldens):
    """Texts of 134, 188 and 251 tokens in three buckets."""
    answers = ["It is 10:45. " * (1, 1, 7, 14)[n % 4] for n in range(64)]
    records = [Record(f"r{n}", (("human", "Say it."), ("gpt", text)), ()) for n, text in enumerate(answers)]
    tokenizer, lengths = load_tokenizer(goldens / "tokenizers/llava"), (140, 200, 260)
    encoder = Encoder(tokenizer, templates()["llava_v1"], lengths[-1], None, -1, 0, 1, False, length_buckets=lengths)
    sizes = measure(records, encoder, on_error="stop", threads=1)
    order = {"seed": 3, "group_by": "length", "epochs": None, "drop_remainder": True}
    return train_batches(records, encoder, batch_size=8, sizes=sizes, threads=1, **order)


def test_nothing_is_compiled_in_mid_run(batches, tmp_path, capsys):
    """Of three buckets, with checkpoints, stopped and resumed; and the numbers are those of the jitted step."""
    cfg = cases.config(vision=False, layers=1)
    cfg = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, vocab_size=512))
    config, mesh = cases.settings(steps=7, save_every=2), make_mesh(2, 1, 1, jax.devices()[:2])
    log, told = [], {}

    def note(event, seconds, *, fun_name="", **_):
        # orbax cuts what is replicated before it saves it for the first time: some copies, of milliseconds
        if event == "/jax/core/compile/backend_compile_duration" and fun_name != "jit(slice)":
            log.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        for name, stop in (("stopped", 2), ("resumed", None)):
            log.clear()
            try:
                watched = Watched(batches, log, stop)
                trained, summary = recover(cases.model(cfg), watched, config, workdir=tmp_path, mesh=mesh)
            except Stopped:
                assert stop is not None
            told[name] = [line for line in capsys.readouterr().out.splitlines() if "compiling" in line]
            first = log.index("batch")
            assert log[:first].count("jit(_step)") == (3 if stop else 2)
            assert log[first:] == ["batch"] * (3 if stop else 4), name
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert told == {
        "stopped": ["  train: compiling 3 programs: sequences of 260, 200, 140 tokens"],
        "resumed": ["  train: compiling 2 programs: sequences of 260, 140 tokens"],
    }
    lines = cases.metrics_of(tmp_path)
    assert summary["compile_seconds"] > lines[4]["seconds"]
    run = prepare(cases.model(cfg), config, None, None, mesh, 7)
    state = run.state
    with step_context(mesh, "float32"):
        for line, batch in zip(lines, itertools.islice(batches, 7), strict=True):
            state, metrics = run.program.step(state, run.frozen, run.teacher_params, place_rows(batch.arrays, mesh))
            assert line["loss"] == float(metrics["loss"])
    whole = flatten(jax.device_get(trained.params))
    assert all(np.array_equal(whole[path], master) for path, master in jax.device_get(state.params).items())


@pytest.mark.slow
def test_nan_stops_and_names_the_records(tmp_path):
    """Batch 3 is poisoned: steps 1 to 3 are saved, nothing of step 4 is."""
    config = cases.settings(save_every=1)
    train = functools.partial(recover, cases.model(IMAGES), config=config, workdir=tmp_path, progress=False)
    fact = r"step 4: loss nan.* records record-3-0, record-3-1.* last checkpoint: step 3"
    refused(fact, train, cases.Stream(IMAGES, poison=3))
    listed = json.loads((tmp_path / "nonfinite-0.json").read_text())
    assert listed["step"] == 4
    assert listed["records"] == [f"record-3-{row}" for row in range(8)]
    assert max(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == 3
    _, summary = train(cases.Stream(IMAGES))
    assert summary["resumed_from"] == 3


def test_ids_outside_the_vocabulary_are_refused():
    stream = cases.Stream(IMAGES)
    stream.cfg = dataclasses.replace(IMAGES, image_token_id=None)
    wrong = dataclasses.replace(IMAGES, text=dataclasses.replace(IMAGES.text, vocab_size=32))
    refused("outside the vocabulary of 32", recover, cases.model(wrong), stream, cases.settings(), progress=False)
