"""Settings of reconstruction, declared once for Python, configs and the command line; no jax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmprune_jax.base.settings import FRACTION, MAX_ROWS, check_settings, reconstruct_setting

RECONSTRUCTIONS = ("none", "least_squares", "layerwise")


@dataclass(frozen=True)
class TokenWeights:
    """Weights of calibration tokens by type (prompt, image, answer) in reconstruction, GPTQ and importance matrices."""

    prompt_weight: float = reconstruct_setting(
        1.0, "Weight of prompt tokens in the reconstruction error (0 = ignored).", least=0
    )
    image_weight: float = reconstruct_setting(
        0.1,
        "Weight of image and video tokens in the reconstruction error (0 = ignored; low because they are many).",
        least=0,
    )
    answer_weight: float = reconstruct_setting(
        1.0, "Weight of answer tokens in the reconstruction error (0 = ignored).", least=0
    )

    def __post_init__(self) -> None:
        check_settings("reconstruct", self)


@dataclass(frozen=True)
class ReconstructConfig(TokenWeights):
    """Settings of reconstruction, the least-squares repair of pruned weights before any training."""

    SECTION: ClassVar[str] = "reconstruct"

    method: str = reconstruct_setting(
        "least_squares",
        'Repair of the pruned weights: none ("none"), least squares ("least_squares"), or least squares and then '
        "training of each layer alone to match the unpruned model's hidden states "
        '("layerwise", for plans that remove layers).',
        choices=RECONSTRUCTIONS,
    )
    samples: int = reconstruct_setting(512, "Number of calibration records for the fit.", unit="records", least=2)
    batch_size: int = reconstruct_setting(
        8, "Number of calibration records per batch.", unit="rows", least=1, most=MAX_ROWS
    )
    longest_text: int | None = reconstruct_setting(
        None,
        "Maximum length of a calibration record, counting 1 token per image; longer records are not used (None = any).",
        unit="tokens",
        least=1,
    )
    seed: int = reconstruct_setting(42, "Random seed for drawing the calibration records.", least=0, below=2**32)
    readers: str = reconstruct_setting(
        "auto",
        "Also repair the weights that read the residual stream (q, k, v, gate, up): if less than 40 % of the neurons "
        'remain and the held-out error falls ("auto"), or never ("none").',
        choices=("auto", "none"),
    )
    refit: bool | None = reconstruct_setting(
        None,
        "Solve again on all records after the ridge penalty is chosen; otherwise the weights never depend on the "
        "held-out records. None = True, except for `layerwise` training, which uses these records to stop.",
    )
    held_out: float = reconstruct_setting(
        0.125,
        "Share of calibration records held out to choose each weight's ridge penalty, or to reject its repair.",
        unit=FRACTION,
        above=0,
        below=1,
    )

    @property
    def refits(self) -> bool:
        """True if weights are solved again on all records after the ridge penalty is chosen."""
        return self.method != "layerwise" if self.refit is None else self.refit
