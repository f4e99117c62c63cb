"""Integer storage of compressed-tensors, as vLLM and transformers read it: 4 or 8 bits with scales.

`pack-quantized`: KEY_packed int32 holds the codes of a row in sequence, low bits first, each plus 2^(bits-1);
KEY_scale [rows, groups]; KEY_shape; and KEY_zero_point, packed along the rows, for asymmetric groups.
`int-quantized`: KEY int8 and KEY_scale. A weight is scale * (code - zero point), in the scale's dtype.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NotRequired, TypedDict

import numpy as np
from msgspec import Meta

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import checked
from vlmprune_jax.base.weight_files import Entry

JsonDict = dict[str, Any]
_METHOD = "compressed-tensors"
_CHOOSE_EXPERTS = ("/router/weight", "/dense_gate/weight")
# Quantisation, by its name in vLLM and llm-compressor -> (bits of weights, True if activations have 8 bits).
SCHEMES = {"w8a16": (8, False), "w4a16": (4, False), "w8a8": (8, True)}
# Values that may share a scale, the largest first: sizes for which serving engines have kernels.
GROUPS = (128, 64, 32)


class _Arguments(TypedDict):
    """Quantisation settings of weights or activations in config.json."""

    num_bits: Literal[4, 8]
    type: NotRequired[Literal["int"]]
    symmetric: NotRequired[bool]
    strategy: NotRequired[Literal["channel", "group", "token"] | None]
    group_size: NotRequired[Annotated[int, Meta(ge=-1)] | None]
    dynamic: NotRequired[bool]
    actorder: NotRequired[Literal["weight", "static", False] | None]


class _Group(TypedDict):
    """Quantisation settings of a group of modules in config.json."""

    weights: _Arguments
    input_activations: NotRequired[_Arguments | None]
    output_activations: NotRequired[None]
    format: NotRequired[str | None]


class _Settings(TypedDict):
    """Fields of config.json's `quantization_config` that are read."""

    format: Literal["pack-quantized", "int-quantized"]
    config_groups: Annotated[dict[str, _Group], Meta(min_length=1, max_length=1)]
    quantization_status: NotRequired[Literal["compressed", "frozen"]]
    kv_cache_scheme: NotRequired[None]


@dataclass(frozen=True)
class CompressedTensors:
    """Storage format compressed-tensors, in which the matrices of decoder layers are integers.

    Attributes:
      bits: 4 or 8.
      group: number of values of a row that share a scale, or 0 for one scale per row.
      symmetric: True if there are no zero points.
      activations: True if engines round activations to 8 bits per token; weights are then plain int8, otherwise packed.
      rounding: how weights are rounded, for model cards.
    """

    bits: int
    group: int = 0
    symmetric: bool = True
    activations: bool = False
    rounding: ClassVar[str] = "to the nearest integer"

    @classmethod
    def from_config(cls, settings: JsonDict) -> CompressedTensors:
        """Return the storage format that a folder's `quantization_config` describes.

        Raises UserError unless weights are integers of 4 or 8 bits with the same settings in all modules.
        """
        todo = "only 4- or 8-bit integers with row or group scales can be read: use the checkpoint before quantisation"
        checked(settings, _Settings, _METHOD, todo)
        (group,) = settings["config_groups"].values()
        weights, inputs = group["weights"], group.get("input_activations")
        size = max(0, weights.get("group_size") or 0)
        strategy = weights.get("strategy") or ("group" if size else "channel")
        storage = cls(weights["num_bits"], size, weights.get("symmetric", True), inputs is not None)
        packed = settings["format"] == "pack-quantized"
        fits = packed != storage.activations and (packed or (storage.bits == 8 and storage.symmetric))
        fits = fits and strategy == ("group" if size else "channel") and not weights.get("dynamic")
        fits = fits and (inputs is None or (inputs["num_bits"] == 8 and bool(inputs.get("dynamic"))))
        if not fits or group.get("format") not in (None, settings["format"]):
            raise UserError(f"{_METHOD}: fields of quantization_config contradict each other: {todo}")
        return storage

    def to_config(self, shapes: Mapping[str, tuple[int, ...]]) -> JsonDict:
        """Return the `quantization_config` for transformers and vLLM; its list `ignore` has the unquantised modules."""
        held = {key.removesuffix("_scale") for key in shapes if key.endswith(".weight_scale")}
        matrices = [key for key, shape in shapes.items() if len(shape) == 2 and key.endswith(".weight")]
        inside = {name for key in held for name in _modules(key)}
        free = [next(name for name in _modules(key) if name not in inside) for key in matrices if key not in held]
        weights = {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "dynamic": False}
        weights |= {"strategy": "group", "group_size": self.group} if self.group else {"strategy": "channel"}
        inputs = None
        if self.activations:
            inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
        return {
            "quant_method": _METHOD,
            "format": "int-quantized" if self.activations else "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(dict.fromkeys(map(_pattern, ["lm_head", *free]))),
            "kv_cache_scheme": None,
        }

    @property
    def name(self) -> str:
        """Display name of the storage format for `inspect` and model cards."""
        scales = f"a scale for every {self.group} values" if self.group else "a scale for every row"
        zeros = "" if self.symmetric else " and zero points"
        return f"{_METHOD} (int{self.bits}, {scales}{zeros}{', activations int8' if self.activations else ''})"

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Key suffixes of the tensors that store one weight (packed integers, scales, zero points, shape)."""
        return tuple(self.tensors("F32", (1, 1)))

    def holds(self, name: str, shape: tuple[int, ...]) -> bool:
        """Return True if a weight is a decoder layer's matrix and the group size divides its rows."""
        return is_matrix(name, shape) and (not self.group or shape[1] % self.group == 0)

    def weight(self, tensors: Mapping[str, Entry]) -> tuple[str, tuple[int, ...]]:
        """Return dtype and shape of the weight that these tensors encode; raise ValueError if they are inconsistent."""
        shape = tensors[""].shape if self.activations else _read_shape(tensors["_shape"])
        if len(shape) != 2 or min(shape) < 1 or (self.group and shape[1] % self.group):
            raise ValueError(f"shape {list(shape)}, expected rows of {f'groups of {self.group}' if self.group else 1}")
        return tensors["_scale"].dtype, shape

    def tensors(self, dtype: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return {suffix: (dtype, shape)} of the tensors that encode a weight."""
        rows, columns = shape
        scales = (rows, columns // self.group if self.group else 1)
        if self.activations:
            return {"": ("I8", shape), "_scale": (dtype, scales)}
        tensors = {"_packed": ("I32", (rows, self._words(columns))), "_scale": (dtype, scales), "_shape": ("I64", (2,))}
        return tensors if self.symmetric else tensors | {"_zero_point": ("I32", (self._words(rows), scales[1]))}

    def decode(self, tensors: Mapping[str, Entry], start: int, stop: int) -> np.ndarray:
        """Dequantise rows `start` to `stop` - 1 of a weight."""
        scale = tensors["_scale"].rows(start, stop)
        if self.activations:
            codes = tensors[""].rows(start, stop)
        else:
            codes = self._unpack(tensors["_packed"].rows(start, stop), int(self.weight(tensors)[1][1]))
        values = codes.astype(np.float32).reshape(*scale.shape, -1)
        if not self.symmetric:
            per_word = 32 // self.bits
            first = start // per_word
            words = tensors["_zero_point"].rows(first, -(-stop // per_word))
            zeros = self._unpack(words.T, words.shape[0] * per_word).T
            values -= zeros[start - first * per_word :][: stop - start, :, None]
        # exact in float32 for scales of 16 bits, so the result is rounded once, as in torch
        return (values * scale.astype(np.float32)[..., None]).astype(scale.dtype).reshape(codes.shape)

    def encode(self, name: str, values: np.ndarray) -> dict[str, np.ndarray]:
        """Quantise a weight by rounding to nearest; return its tensors by suffix."""
        scale, zeros = self.grid(values.astype(np.float32), values.dtype)
        groups = values.astype(np.float32).reshape(*scale.shape, -1)
        codes = self.round(groups, scale[..., None], zeros[..., None]).reshape(values.shape)
        return self.parts(codes, scale.astype(values.dtype), zeros)

    def grid(self, values: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Return the quantisation grid for these values: scales and zero points, [rows, groups] each.

        As in compressed-tensors, the largest value of a symmetric group is half a step above the largest code.
        """
        groups = values.reshape(len(values), values.shape[1] // self.group if self.group else 1, -1)
        steps = 2**self.bits - 1
        if self.symmetric:
            scale = np.abs(groups).max(axis=2) / np.float32(steps / 2)
        else:
            low, high = np.minimum(groups.min(axis=2), 0), np.maximum(groups.max(axis=2), 0)
            scale = (high - low) / steps
        scale = scale.astype(dtype).astype(np.float32)
        scale = np.where(scale == 0, np.float32(1), scale)
        zeros = np.zeros_like(scale) if self.symmetric else np.rint(-low / scale) - (steps + 1) // 2
        return scale, np.clip(zeros, *self._ends).astype(np.int8)

    def round(self, values: np.ndarray, scale: np.ndarray, zeros: np.ndarray) -> np.ndarray:
        """Round values to the nearest integer codes, int8."""
        return np.clip(np.rint(values / scale) + zeros, *self._ends).astype(np.int8)

    def parts(self, codes: np.ndarray, scale: np.ndarray, zeros: np.ndarray) -> dict[str, np.ndarray]:
        """Return the tensors by suffix for integer codes int8[rows, columns] and their scales and zero points."""
        if self.activations:
            return {"": codes, "_scale": scale}
        tensors = {"_packed": self._pack(codes), "_scale": scale, "_shape": np.asarray(codes.shape, np.int64)}
        return tensors if self.symmetric else tensors | {"_zero_point": self._pack(zeros.T).T}

    @property
    def _ends(self) -> tuple[int, int]:
        """Lowest and highest integer code of the format."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def _words(self, count: int) -> int:
        return -(-count * self.bits // 32)

    def _pack(self, codes: np.ndarray) -> np.ndarray:
        """Pack int8[rows, count] codes into int32[rows, words]."""
        rows, count = codes.shape
        unsigned = np.zeros((rows, self._words(count) * 32 // self.bits), np.uint8)
        unsigned[:, :count] = codes.astype(np.int16) + 2 ** (self.bits - 1)
        return (unsigned if self.bits == 8 else unsigned[:, ::2] | unsigned[:, 1::2] << 4).view("<i4")

    def _unpack(self, words: np.ndarray, count: int) -> np.ndarray:
        """Unpack int32[rows, words] into int8[rows, count] codes."""
        unsigned = np.ascontiguousarray(words).view(np.uint8)
        if self.bits == 4:
            unsigned = np.stack([unsigned & 15, unsigned >> 4], axis=-1).reshape(len(words), -1)
        return (unsigned[:, :count].astype(np.int16) - 2 ** (self.bits - 1)).astype(np.int8)


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Return True for a matrix of a decoder layer, except those that choose experts: engines read them as floats."""
    return len(shape) == 2 and name.startswith("text/layers/") and not name.endswith(_CHOOSE_EXPERTS)


def check_scheme(quantize: str, group_size: int | None, symmetric: bool) -> None:
    """Raise UserError for a group size or zero points that a quantisation scheme does not support."""
    if quantize == "w8a8" and (group_size is not None or not symmetric):
        raise UserError("w8a8 has one scale per row and no zero points: leave out group_size and symmetric")
    if group_size is not None and group_size not in GROUPS:
        raise UserError(f"group_size={group_size} is not one of {', '.join(map(str, GROUPS))}")


def _read_shape(part: Entry) -> tuple[int, ...]:
    if (part.dtype, part.shape) != ("I64", (2,)):
        raise ValueError(f"{part.key} is {part.dtype} {list(part.shape)}, expected I64 [2]")
    return tuple(part.array().tolist())


def _modules(key: str) -> list[str]:
    """Return the names of the modules that contain a weight, outermost first."""
    names = key.removesuffix(".weight").split(".")
    return [".".join(names[: end + 1]) for end in range(len(names))]


def _pattern(module: str) -> str:
    """Return a regex that matches a module name and its submodules, with any prefix."""
    layer = re.search(r"layers\.\d+(\..*)?$", module)
    return rf"re:.*\b{re.escape(layer[0] if layer else module.rpartition('.')[2])}\b.*"
