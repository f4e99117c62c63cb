"""Speed of text generation from wall-clock times: the workload, the turns that programs take, tokens per second.

Does not import jax, so that the process of another engine does not hold it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Protocol

import msgspec
from msgspec import Meta

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import Count
from vlmprune_jax.base.processes import on_process_zero
from vlmprune_jax.base.settings import check_settings, speed_setting
from vlmprune_jax.core.config import ModelConfig

# A program's time in a round is the minimum of several runs, because other work on the machine only slows runs down.
MIN_RUNS, MIN_SECONDS = 3, 0.5
Seconds = tuple[float, float]  # seconds to the first token, and from there to the last token
_MAX_TOKENS = 2**20
_Rounds = Annotated[tuple[Annotated[float, Meta(gt=0, lt=1e30)], ...], Meta(min_length=1, max_length=1000)]


@dataclass(frozen=True)
class SpeedConfig:
    """Settings of the speed measurement, in which models take turns on this machine.

    The FLOPs in the report are for the same prompt.
    """

    rounds: int = speed_setting(5, "Number of measurements per model (0 = none).", least=0, most=1000)
    prompt_tokens: int = speed_setting(
        640, "Length of the prompt, including the tokens of its image.", unit="tokens", least=1, most=_MAX_TOKENS
    )
    new_tokens: int = speed_setting(
        64, "Number of tokens to generate after the first one.", unit="tokens", least=1, most=_MAX_TOKENS
    )
    batch_size: int = speed_setting(1, "Number of prompts processed together.", unit="rows", least=1, most=8192)
    image: bool = speed_setting(True, "Put an image at the start of every prompt, if the model takes images.")

    def __post_init__(self) -> None:
        check_settings("speed", self)

    def with_image(self, cfg: ModelConfig) -> bool:
        """Return True if speed prompts for this model begin with an image."""
        return self.image and cfg.vision is not None and cfg.image_token_id is not None

    def check(self, cfg: ModelConfig, named: str = "speed.") -> None:
        """Raise UserError if the model cannot take the workload's prompt; messages prefix settings with `named`."""
        cfg.check_row(f"{named}prompt_tokens + new_tokens + 1", self.prompt_tokens + self.new_tokens + 1)
        if self.with_image(cfg) and cfg.tokens_per_image >= self.prompt_tokens:
            raise UserError(
                f"{named}prompt_tokens={self.prompt_tokens} must be more than the {cfg.tokens_per_image} tokens of an "
                f"image: raise it, or set {named}image=False"
            )


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """Speed of one model, with one value per repetition of the measurement (`rounds`).

    `prefill`: prompt tokens per second, image tokens included. `decode`: new tokens per second of all rows together,
    without the prefill. `first_token`: seconds from the prompts to the first token of every row. `peak_bytes`: memory
    of the compiled program on one device (weights and cache included), or of an engine's process; None if unknown.
    """

    prefill: _Rounds
    decode: _Rounds
    first_token: _Rounds
    peak_bytes: Count | None

    def __post_init__(self) -> None:
        if len({len(self.prefill), len(self.decode), len(self.first_token)}) > 1:
            raise ValueError("prefill, decode and first_token have different numbers of rounds")


class BenchSide(Measurement, frozen=True, kw_only=True):
    """Measured speed of one model in one engine, with data type and size (`bytes`) of the weights on disk."""

    model: str
    backend: str
    versions: dict[str, str]
    weights: str
    bytes: Count
    parameters: Count
    image: bool
    prompt_tokens: Count


class Program(Protocol):
    """Interface for timing the text generation of one model on one batch of prompts.

    A program may have `prompt_tokens`, its own number of tokens in a prompt, and `peak_bytes` (see `Measurement`).
    """

    def run(self) -> Seconds:
        """Generate all tokens once; return the seconds to the first token, and from the first to the last token."""


def measure(
    programs: Mapping[str, Program],
    config: SpeedConfig,
    *,
    min_runs: int = MIN_RUNS,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Measurement]:
    """Measure the speed of named programs in turns, in reverse order in every second round.

    Other work on the machine then slows all programs equally, so times of the same round can be compared. All processes
    of a run repeat a program equally often, and return the times of process 0.

    Raises UserError if a measured time is 0.
    """

    def agree(seconds: float) -> float:
        return float(on_process_zero(lambda: seconds))

    repeats = {
        name: max(min_runs, math.ceil(MIN_SECONDS / max(agree(sum(program.run())), 1e-6)))
        for name, program in programs.items()
    }
    times: dict[str, list[Seconds]] = {name: [] for name in programs}
    for number in range(config.rounds):
        for turn, name in enumerate([*programs][:: -1 if number % 2 else 1], start=1):
            runs = [programs[name].run() for _ in range(repeats[name])]
            first, rest = (agree(min(seconds)) for seconds in zip(*runs, strict=True))
            times[name].append((first, rest))
            progress(number * len(programs) + turn)
    measured = dict[str, Measurement]()
    for name, rounds in times.items():
        if min(map(min, rounds)) <= 0:
            raise UserError(
                f"{name}: the measured time is 0: raise new_tokens, or set rounds=0 to skip the measurement"
            )
        prompt_tokens = config.batch_size * getattr(programs[name], "prompt_tokens", config.prompt_tokens)
        measured[name] = Measurement(
            prefill=tuple(prompt_tokens / first for first, _ in rounds),
            decode=tuple(config.batch_size * config.new_tokens / rest for _, rest in rounds),
            first_token=tuple(first for first, _ in rounds),
            peak_bytes=getattr(programs[name], "peak_bytes", None),
        )
    return measured
