"""Rotary position embedding of a decoder."""

from __future__ import annotations

from dataclasses import dataclass

from vlmprune_jax.base.errors import UserError


@dataclass(frozen=True)
class RopeConfig:
    """Parameters of rotary position embedding, as in the Hugging Face fields `rope_theta` and `rope_scaling`.

    `kind` is "default", "linear", "llama3", "yarn", "longrope" or "proportional"; the other fields are its parameters,
    0 or empty if unused. Proportional RoPE rotates only the share `rotated` of all frequencies (the fastest ones).
    LongRoPE divides each frequency by its short factor. As soon as one position reaches `original_max_positions`, the
    whole batch uses the long factors instead.

    `sections` (M-RoPE) are the numbers of frequencies that rotate with an image's frame, row and column. These
    frequencies are in consecutive blocks, or `interleaved`.
    """

    theta: float
    kind: str
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    beta_fast: float = 0.0
    beta_slow: float = 0.0
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    sections: tuple[int, ...] = ()
    interleaved: bool = False
    rotated: float = 1.0

    def __post_init__(self) -> None:
        wrong = (
            (self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor)
            or (self.kind == "yarn" and not (self.theta > 1 and 0 < self.beta_slow <= self.beta_fast))
            or (self.kind in ("llama3", "yarn") and self.original_max_positions < 1)
        )
        if wrong:
            raise UserError(
                f"{self.kind} rope with theta {self.theta:g}, original_max_position_embeddings "
                f"{self.original_max_positions}, low and high_freq_factor {self.low_freq_factor:g} and "
                f"{self.high_freq_factor:g}, beta_slow and beta_fast {self.beta_slow:g} and {self.beta_fast:g}: "
                "inconsistent values: check rope_parameters"
            )

    def check(self, rotary_dim: int) -> None:
        """Raise UserError unless scaling factors or M-RoPE sections match the number of rotary frequencies."""
        frequencies, sections = rotary_dim // 2, self.sections
        if sections and (len(sections) != 3 or min(sections) < 0 or sum(sections) != frequencies):
            raise UserError(
                f"mrope_section {list(sections)} must be three numbers that sum to {frequencies} (rotary_dim / 2)"
            )
        for factors in (self.short_factors, self.long_factors):
            if self.kind == "longrope" and len(factors) != frequencies:
                raise UserError(
                    f"longrope: short_factor and long_factor have {len(factors)} numbers, expected "
                    f"{frequencies} (one per rotary frequency)"
                )
