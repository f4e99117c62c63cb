"""Speed of text generation from wall-clock times: the workload, the turns that models take, tokens per second.

Does not import jax, so that the process of another engine does not hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import Count
from vlmprune_jax.base.settings import check_settings, speed_setting
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.run.evaluation.speed.process import Seconds

_MAX_TOKENS = 2**20
_T = TypeVar("_T")
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


class QuestionTime(msgspec.Struct, frozen=True, kw_only=True):
    """Duration of each phase (in seconds) for one batch of questions, with one value per repetition.

    `tower`, `projector`: of the images. `first_token`: from the prompts with their images to the first token. `token`:
    every further token.
    """

    tower: tuple[float, ...]
    projector: tuple[float, ...]
    first_token: tuple[float, ...]
    token: tuple[float, ...]

    @property
    def prefill(self) -> tuple[float, ...]:
        """Seconds to the first token without tower and projector."""
        phases = zip(self.first_token, self.tower, self.projector, strict=True)
        return tuple(max(first - tower - projector, 0.0) for first, tower, projector in phases)

    def answer(self, tokens: int) -> tuple[float, ...]:
        """Return the seconds of the whole question with an answer of `tokens` tokens."""
        return tuple(first + (tokens - 1) * each for first, each in zip(self.first_token, self.token, strict=True))


def to_speed(rounds: Sequence[Seconds], prompt_tokens: int, new_tokens: int) -> dict[str, tuple[float, ...]]:
    """Convert the measured seconds of every repetition to prefill and decoding speeds, in tokens/s over all rows.

    Raises UserError if a time is 0.
    """
    if min(map(min, rounds)) <= 0:
        raise UserError("the measured time is 0: raise new_tokens, or set rounds=0 to skip the measurement")
    return {
        "prefill": tuple(prompt_tokens / first for first, _ in rounds),
        "decode": tuple(new_tokens / rest for _, rest in rounds),
        "first_token": tuple(first for first, _ in rounds),
    }


def take_turns(
    reads: Sequence[Callable[[], _T]], rounds: int, progress: Callable[[int], None] = lambda done: None
) -> list[list[_T]]:
    """Call every function once per round, in reverse order in every second round; return the results for each function.

    Other work on the machine then slows all functions equally, so results of the same round can be compared.
    """
    results: list[list[_T]] = [[] for _ in reads]
    for number in range(rounds):
        for turn, place in enumerate(range(len(reads))[:: -1 if number % 2 else 1], start=1):
            results[place].append(reads[place]())
            progress(number * len(reads) + turn)
    return results
