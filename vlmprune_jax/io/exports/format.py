"""Export formats: the options, the files, the check and the model-card section of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from vlmprune_jax.base.checks import file_of_users
from vlmprune_jax.base.files import Finite
from vlmprune_jax.base.settings import settings_of

if TYPE_CHECKING:  # configs import the options of formats, and load without jax
    import numpy as np

    from vlmprune_jax.core.models.vlm import Model
    from vlmprune_jax.io.checkpoints.disk.tensors import Tensor


@dataclass(frozen=True)
class Origin:
    """Origin of an exported model: folders of its configs, tokenizer, weights and vision tower, and its name.

    Attributes:
      folder: folder of the model's configs and tokenizer.
      name: the name for the export.
      vision_dir: folder of a separate vision tower.
      weights: folder of the model's tensors, if it differs from `folder` (when the vocabulary is trimmed).
      mtp: folder of the module for multi-token prediction, if it differs from that of the tensors.
      tpu_chips: tensor-parallel size if the plan was made for vLLM on TPUs (`loads_in`), else 0.
      pruned: True if the model was pruned.
    """

    folder: Path
    name: str
    vision_dir: Path | None = None
    weights: Path | None = None
    mtp: Path | None = None
    tpu_chips: int = 0
    pruned: bool = False


@dataclass(frozen=True)
class Contents:
    """Content of an export that is ready to be written: tensors, write function and model card section.

    Attributes:
      tensors: all tensors, in the order in which `write` fetches them. Their bytes must fit on the disk. Processes that
        share the weights fetch each tensor at the same time as the process that writes.
      write: writes all files of the format into an empty folder.
      card: section "Loading" of the model card, given the folder with all files.
    """

    tensors: Sequence[Tensor]
    write: Callable[[Path], None]
    card: Callable[[Path], str]


class Comparison(TypedDict):
    """Result of comparing the logits of a written model with those of the model in memory.

    `moved_by_rounding`: largest logit difference between the model with rounded weights, with which a quantised export
    is compared, and the model in memory.
    """

    backend: str
    max_abs_logit_difference: Finite
    tolerance: Finite
    moved_by_rounding: NotRequired[Finite]


@dataclass(frozen=True)
class Importance:
    """Mean squared inputs, float64[in], of every matrix in the decoder's layers, by parameter name.

    `rows` and `tokens` are the numbers of calibration records and tokens.
    """

    means: Mapping[str, np.ndarray]
    rows: int
    tokens: int


@dataclass(frozen=True)
class Calibration:
    """Statistic that an export format needs from calibration records, computed before it writes.

    Attributes:
      option: the option that receives the statistic.
      function: name of the function that computes the statistic, such as "gptq".
      settings: arguments of the function, besides the model and the batches.
    """

    option: str
    function: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """Export format; `vp.formats["mine"] = vp.Format(...)` registers a user's format.

    Attributes:
      options: frozen dataclass of `core.settings.setting` fields: keywords of `save`, and settings `export.NAME` of a
        config (in `export.options` if `export` has no such name). The choices of `quantize` are the quantisations.
      prepare: (model, origin, options) -> `Contents`; raises UserError for a model that the format cannot hold.
      check: (model, folder, origin, options) -> `Comparison` of written folder and model; raises UserError if they
      differ.
      read: (folder, exported model, options) -> model with the weights of a quantised export, to evaluate it; None if
        `load` reads the folder.
      library: `library_name` of the model card.
      calibration: options -> the `Calibration` that these options need, or None.
    """

    options: type
    prepare: Callable[[Model, Origin, Any], Contents]
    check: Callable[[Model, Path, Origin, Any], Comparison]
    read: Callable[[Path, Model, Any], Model] | None = None
    library: str = "transformers"
    calibration: Callable[[Any], Calibration | None] = lambda options: None

    @property
    def quantizations(self) -> tuple[str, ...]:
        """Allowed values of the format's option `quantize`."""
        declared = settings_of(self.options).get("quantize")
        return ("none",) if declared is None else declared.names()

    @property
    def file(self) -> Path | None:
        """Source file of a user's export format; None for a built-in format."""
        return file_of_users(self.prepare)
