"""Speed by the clock: what is computed of readings, whose turn it is, and that the program is the one of `generate`."""

import itertools

import jax
import msgspec
import numpy as np
import pytest
from prune_cases import config, model
from refusal import refused
from stack_cases import decoder_layer

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.models.generate import compile_generation, generate
from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.run.evaluation.config import SpeedConfig
from vlmprune_jax.run.speed import bench as speed
from vlmprune_jax.run.speed.bench import measure, measure_speed
from vlmprune_jax.run.speed.engines import Answer, jax_program, make_prompts
from vlmprune_jax.run.workdir.speed import Measurement


class Timed:
    """A program that takes known seconds to the first token and after it, in turn."""

    def __init__(self, name, ran, *seconds):
        self.name, self.ran, self.seconds = name, ran, itertools.cycle(seconds)

    def __call__(self):
        self.ran.append(self.name)
        return Answer(seconds=next(self.seconds), prompt_tokens=self.tokens, peak_bytes=7)


def measured(programs, **workload):
    for program in programs.values():
        program.tokens = workload["prompt_tokens"]
    speeds = measure(programs, SpeedConfig(**workload))
    return {name: msgspec.convert(speed, Measurement) for name, speed in speeds.items()}


def test_tokens_per_second_and_turns():
    ran = []
    programs = {"slow": Timed("slow", ran, (0.5, 2.0)), "fast": Timed("fast", ran, (0.25, 1.0))}
    found = measured(programs, prompt_tokens=100, new_tokens=10, batch_size=4, rounds=3)
    assert found["slow"] == Measurement(prefill=(800.0,) * 3, decode=(20.0,) * 3, first_token=(0.5,) * 3, peak_bytes=7)
    assert found["fast"].decode == (40.0,) * 3
    turns = ran[4:][:: speed.MIN_RUNS]
    assert turns == ["slow", "fast", "fast", "slow", "slow", "fast"]


def test_a_reading_is_the_fastest_of_its_runs():
    """Each run is disturbed at another place: prompt and tokens have their best runs apart."""
    runs = ((0.5, 3.0), (9.0, 1.0), (0.6, 2.0))
    program = Timed("a", [], *runs)
    found = measured({"a": program}, prompt_tokens=10, new_tokens=10, batch_size=1, rounds=2)
    assert found["a"].prefill == pytest.approx((20.0, 20.0))
    assert found["a"].decode == pytest.approx((10.0, 10.0))


def test_short_runs_are_repeated_until_a_clock_can_tell():
    ran = []
    program = Timed("a", ran, (0.01, 0.04))
    measured({"a": program}, prompt_tokens=1, new_tokens=1, batch_size=1, rounds=1)
    assert len(ran) == 2 + round(speed.MIN_SECONDS / 0.05)


def test_what_no_clock_can_tell_is_refused(monkeypatch):
    monkeypatch.setattr(speed, "MIN_SECONDS", 0)
    with pytest.raises(UserError, match=r"a: the measured time is 0: raise new_tokens"):
        measured({"a": Timed("a", [], (1.0, 0.0))}, prompt_tokens=1, new_tokens=1, batch_size=1, rounds=1)
    refused(r"speed\.rounds=0: must be at least 1 to measure speed", measure_speed, {}, rounds=0)


def test_the_program_is_that_of_generate(goldens):
    llava = load(goldens / "ckpt/llava_hf")
    config = SpeedConfig(prompt_tokens=24, batch_size=2, new_tokens=4)
    ids, pixels, _ = make_prompts(llava.cfg, config)
    assert (ids == llava.cfg.image_token_id).sum() == 2 * llava.cfg.tokens_per_image
    media = {"vision": Packed(pixels)}
    made = compile_generation(llava, ids, media=media, max_new_tokens=5)
    tokens, *_ = made.decode(made.params, *made.prefill(made.params, made.arrays))
    wanted = generate(llava, ids, media=media, max_new_tokens=5, eos_token_ids=())
    np.testing.assert_array_equal(tokens, wanted)
    program = jax_program(llava, config)()
    assert min(program.seconds) > 0
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(llava.params))
    assert weights < program.peak_bytes < 100 * weights
    found = measure_speed({"a": llava}, prompt_tokens=24, new_tokens=8, batch_size=2, rounds=1, image=True)["a"]
    assert min(*found.prefill, *found.decode, *found.first_token) > 0


def test_workloads_that_no_model_can_have(goldens):
    cfg = config((decoder_layer(4, 4, 12),))
    SpeedConfig(prompt_tokens=8, new_tokens=1).check(cfg)  # without an image: this model takes none
    with pytest.raises(UserError, match=r"speed\.prompt_tokens \+ new_tokens \+ 1=\d+ is more than 4 times"):
        measure_speed({"a": model(cfg)}, prompt_tokens=10**6)
    llava = load(goldens / "ckpt/llava_hf").cfg
    with pytest.raises(UserError, match=r"speed\.prompt_tokens=16 must be more than the 16 tokens of an image"):
        SpeedConfig(prompt_tokens=16).check(llava)
