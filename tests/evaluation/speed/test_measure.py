"""Speed by the clock: what is computed of readings, whose turn it is, and that the program is the one of `generate`."""

import types

import jax
import numpy as np
import pytest
from prune_cases import config, model

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.stack import LayerShape
from vlmprune_jax.evaluation.speed import clock as clock_file
from vlmprune_jax.evaluation.speed import measure as speed
from vlmprune_jax.evaluation.speed.clock import Measurement, SpeedConfig
from vlmprune_jax.evaluation.speed.measure import measure_speed
from vlmprune_jax.hf.read import load
from vlmprune_jax.models.generate import compile_generation, generate


class Clock:
    """A program that takes known seconds on a clock of its own."""

    def __init__(self):
        self.now, self.ran = 0.0, []

    def perf_counter(self):
        return self.now

    def program(self, name, first, rest):
        def run(what, seconds):
            self.ran.append((name, what))
            self.now += next(seconds) if hasattr(seconds, "__next__") else seconds

        return types.SimpleNamespace(
            prefill=lambda: run("prefill", first), generate=lambda: run("generate", rest), peak_bytes=7
        )


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(clock_file, "time", clock)
    return clock


def measured(monkeypatch, programs, **workload):
    monkeypatch.setattr(speed, "_compile", lambda model, _: programs[model])
    return measure_speed({name: name for name in programs}, **workload)


def test_tokens_per_second_and_turns(clock, monkeypatch):
    programs = {"slow": clock.program("slow", 0.5, 2.5), "fast": clock.program("fast", 0.25, 1.25)}
    found = measured(monkeypatch, programs, prompt_tokens=100, new_tokens=10, batch_size=4, rounds=3)
    assert found["slow"] == Measurement(prefill=(800.0,) * 3, decode=(20.0,) * 3, first_token=(0.5,) * 3, peak_bytes=7)
    assert found["fast"].decode == (40.0,) * 3
    turns = [name for name, what in clock.ran[2:] if what == "generate"][:: clock_file.MIN_RUNS]
    assert turns == ["slow", "fast", "fast", "slow", "slow", "fast"]


def test_a_reading_is_the_fastest_of_its_runs(clock, monkeypatch):
    """One run in three is disturbed, sometimes so that a prompt takes longer than prompt and tokens together."""
    prompts = iter([0.5, *[9.0, 0.5, 0.6] * 2])
    tokens = iter([3.0, 1.5, 2.0] * 2)
    found = measured(
        monkeypatch, {"a": clock.program("a", prompts, tokens)}, prompt_tokens=10, new_tokens=10, batch_size=1, rounds=2
    )
    assert found["a"].prefill == pytest.approx((20.0, 20.0))
    assert found["a"].decode == pytest.approx((10.0, 10.0))


def test_what_no_clock_can_tell_is_refused(clock, monkeypatch):
    with pytest.raises(UserError, match=r"a: generating 10 times took no longer than the prompt alone"):
        measured(
            monkeypatch, {"a": clock.program("a", 1.0, 1.0)}, prompt_tokens=1, new_tokens=1, batch_size=1, rounds=1
        )
    with pytest.raises(UserError, match=r"speed\.rounds=0: must be at least 1 to measure speed"):
        measure_speed({}, rounds=0)


def test_the_program_is_that_of_generate(goldens):
    llava = load(goldens / "ckpt/llava_hf")
    ids, images = speed.make_prompts(llava.cfg, SpeedConfig(prompt_tokens=24, batch_size=2))
    pixels = images["pixel_values"]
    assert (ids == llava.cfg.image_token_id).sum() == 2 * llava.cfg.tokens_per_image
    made = compile_generation(llava, ids, pixel_values=pixels, max_new_tokens=5)
    ended = np.array([[False, False], [True, True]])
    tokens = [np.asarray(made.program(made.params, {**made.arrays, "ended": rows})[0]) for rows in ended]
    wanted = generate(llava, ids, pixel_values=pixels, max_new_tokens=5, eos_token_ids=())
    np.testing.assert_array_equal(tokens[0], wanted)
    assert (tokens[1] == (llava.cfg.pad_token_id or 0)).all()  # the loop did not run
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(llava.params))
    assert weights < made.peak_bytes < 100 * weights
    found = measure_speed({"a": llava}, prompt_tokens=24, new_tokens=8, batch_size=2, rounds=1, image=True)["a"]
    assert min(*found.prefill, *found.decode, *found.first_token) > 0


def test_workloads_that_no_model_can_have(goldens):
    cfg = config((LayerShape(4, 4, 12),))
    SpeedConfig(prompt_tokens=8, new_tokens=1).check(cfg)  # without an image: this model takes none
    with pytest.raises(UserError, match=r"speed\.prompt_tokens \+ new_tokens \+ 1=\d+ is more than 4 times"):
        measure_speed({"a": model(cfg)}, prompt_tokens=10**6)
    llava = load(goldens / "ckpt/llava_hf").cfg
    with pytest.raises(UserError, match=r"speed\.prompt_tokens=16 must be more than the 16 tokens of an image"):
        SpeedConfig(prompt_tokens=16).check(llava)
