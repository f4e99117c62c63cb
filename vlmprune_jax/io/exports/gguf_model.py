"""GGUF files from a model: one of the decoder with its tokenizer, and one of tower and projector."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.weight_files import WEIGHT_DTYPES, file_name
from vlmprune_jax.core.config import ModelConfig, TextConfig, VisionConfig
from vlmprune_jax.core.limits import first_unmet
from vlmprune_jax.core.mixers import DeltaNet
from vlmprune_jax.core.models.layers import inverse_frequencies
from vlmprune_jax.core.models.params import flatten
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.io.checkpoints.disk.tensors import Tensor, constant
from vlmprune_jax.io.checkpoints.layout import Slot, by_key, make_slots, weight_table
from vlmprune_jax.io.exports.card import languages_of, license_of
from vlmprune_jax.io.exports.formats import GgufOptions, Origin
from vlmprune_jax.io.exports.gguf_metadata import (
    BLOCK,
    differences,
    file_type,
    image_fields,
    image_options,
    text_fields,
    title,
)
from vlmprune_jax.io.exports.gguf_tokenizer import make_vocabulary
from vlmprune_jax.io.exports.weights import Convert, Weights, padded, with_whole_tower
from vlmprune_jax.io.families import Family, family_of
from vlmprune_jax.io.families.gguf import LAYOUTS, UNQUANTISED, Architecture
from vlmprune_jax.io.families.gguf_towers import (
    TOWER,
    WITHOUT_LEAF,
    projector_tensors,
    tower_fields,
    tower_tensors,
)
from vlmprune_jax.io.families.limits import architectures_of, tower_limit, width_limits
from vlmprune_jax.io.families.table import JsonDict, Weight

_CHUNK = 2**24  # values quantised at a time: gguf's quantisers need several copies
_FILTERS = "v.patch_embd.weight"
PATCHES, POSITIONS = "vision/patch_embedding/weight", "vision/position_embedding/weight"
_STILL = 1e-30  # frequency of channels that do not rotate
_EMBEDDINGS = ("token_embd.weight", "output.weight", "per_layer_token_embd.weight")
# Tensors whose rows some architectures interleave (rotary pairs).
ROTATED = ("attn_q", "attn_k")


@dataclass(frozen=True)
class GgufFile:
    """Tensors and metadata of one GGUF file to write.

    Attributes:
      fields: GGUF metadata; each key is the NAME of a method `add_NAME` of `gguf.GGUFWriter`.
      differences: how llama.cpp computes the model differently, for the model card.
      options: command-line options that llama.cpp's programs need for this file, each after a space.
    """

    name: str
    architecture: str
    fields: JsonDict
    tensors: list[Tensor]
    differences: str = ""
    options: str = ""

    @property
    def types(self) -> str:
        """Numbers of tensors by data type, and their size."""
        counts = Counter(tensor.dtype for tensor in self.tensors)
        size = sum(tensor.n_bytes for tensor in self.tensors)
        return f"{', '.join(f'{n} x {kind}' for kind, n in counts.most_common())}; {size / 1e6:,.1f} MB"

    @property
    def unquantised(self) -> tuple[str, ...]:
        """Names of decoder matrices that stay F16 because their rows are not a multiple of the quantisation block."""
        quantised = any(tensor.dtype.startswith("Q") for tensor in self.tensors)
        return tuple(tensor.key for tensor in self.tensors if quantised and tensor.dtype == "F16")


def make_gguf(model: Model, origin: Origin, options: GgufOptions) -> list[GgufFile]:
    """Return the model's GGUF files: `NAME-TYPE.gguf`, and for a vision-language model `mmproj-NAME-f16.gguf`.

    The folder of `origin` has the tokenizer, template, image statistics and licence; its name is that of the files, and
    ends with "-pruned" if the model was pruned.

    Raises UserError if llama.cpp does not support the model's architecture, vision tower or tokenizer.
    """
    family, cfg, source, name = family_of(model.cfg), model.cfg, origin.folder, origin.name
    architecture, wide = fit(cfg, options.uneven)
    embedding = flatten(model.params)["text/embed_tokens/weight"]
    plain = file_name(embedding.dtype.name if options.dtype == "source" else options.dtype)
    label = plain if options.quantize == "none" else options.quantize.upper()
    vocabulary = make_vocabulary(source, cfg, family, architecture.tokenizer)
    about = {"name": title(name, vocabulary.fast), **_name_parts(name, origin.pruned), **license_of(source)}
    about |= {"tags": ["vlmprune-jax", *(["pruned"] if origin.pruned else [])]}
    about |= {"languages": languages} if (languages := languages_of(source)) else {}
    fields = {"type": "model", **about, **file_type(label), **text_fields(wide, architecture), **vocabulary.fields}
    here = gguf_family(family, architecture, wide)
    parameters = Weights.of(model, here, wide)
    spell = functools.partial(spelled, cfg=wide, architecture=architecture, rolled=options.rolled_positions)
    tensors = _tensors(parameters, here, "text", spell, plain, options.quantize)
    tensors += _constants(wide.text, architecture, tensors)
    fields |= _size_label(tensors)
    stem = re.sub(r"[^\w.+-]+", "-", name.rpartition("/")[2]).lstrip("-.") or "model"
    remarks = differences(cfg, architecture, vocabulary, options.rolled_positions, source)
    files = [GgufFile(f"{stem}-{label}.gguf", architecture.name, fields, tensors, remarks)]
    if family.images == "splits" and len(vocabulary.fast("\n\n", add_special_tokens=False)["input_ids"]) != 1:
        raise UserError(
            f"{source}: its tokenizer has no token for two newlines, which llama.cpp puts before the overview of a "
            "split image: this model cannot be exported to GGUF"
        )
    if wide.vision is not None:
        plain = plain if plain == "F32" else "F16"  # the types that llama.cpp's convolution supports
        tensors = _tensors(parameters, here, "vision", spell, plain)
        tensors = [part for x in tensors for part in (_filters(x, wide.vision) if x.key == _FILTERS else (x,))]
        tensors += _tensors(parameters, here, "projector", spell, plain)
        pixels, limits = image_fields(wide, family, source)
        fields = {"type": "mmproj", **about, **file_type(plain), **pixels, **tower_fields(wide), **limits}
        fields |= _size_label(tensors)
        flags = image_options(family, source)
        files.append(GgufFile(f"mmproj-{stem}-{plain.lower()}.gguf", TOWER, fields, tensors, options=flags))
    return files


def fit(cfg: ModelConfig, uneven: str) -> tuple[Architecture, ModelConfig]:
    """Return llama.cpp's architecture for a model, and the model config after zero-padding if `uneven` is "pad"."""
    able, text = architectures_of(cfg), cfg.text
    first = able[0]
    if uneven == "pad":
        if first_unmet(width_limits(first, cfg), cfg) is not None:
            whole = None if first.free_heads else text.hidden_size // text.attention.head_dim
            cfg = cfg.with_layers(padded(text.layers, whole))
            if first_unmet(width_limits(first, cfg), cfg) is not None:
                raise UserError(
                    f"llama.cpp's {first.name} needs {whole} heads in equal groups in every layer, which zero "
                    "heads cannot make of these: prune without removing heads"
                )
        cfg = with_whole_tower(cfg)
    candidates = able[:1] if uneven == "refuse" and not cfg.text.uniform else able
    fits = [architecture for architecture in candidates if first_unmet(width_limits(architecture, cfg), cfg) is None]
    problem = first_unmet([tower_limit(first, cfg)] if fits else width_limits(first, cfg), cfg)
    if problem is not None:
        raise UserError(problem)
    return fits[0], cfg


def _name_parts(name: str, pruned: bool) -> JsonDict:
    """Return the GGUF metadata "basename" and "finetune": a model's name before and after its size."""
    from gguf import Metadata

    name = name.removesuffix("-pruned") if pruned else name
    _, _, basename, finetune, _, _ = Metadata.get_model_id_components(name)
    changes = [*([finetune] if finetune else []), *(["pruned"] if pruned else [])]
    parts = {"basename": basename or name.rpartition("/")[2]}
    return {**parts, "finetune": "-".join(changes)} if changes else parts


def _size_label(tensors: Sequence[Tensor]) -> JsonDict:
    """Return the GGUF metadata "size_label": a weight count in short form, such as "1.3B"."""
    from gguf.utility import size_label

    return {"size_label": size_label(sum(math.prod(tensor.shape) for tensor in tensors), 0, 0, 0)}


def _filters(table: Tensor, vision: VisionConfig) -> list[Tensor]:
    """Return patch filters as llama.cpp reads them, [vision, channel, row, column], one tensor per video frame."""
    rows, channels, copies = table.shape[0], vision.channels, vision.patches.temporal or 1
    if copies == 1 and not vision.patches.channels_last:
        return [table]
    side = math.isqrt(math.prod(table.shape[1:]) // (channels * copies))

    def blocks(number: int) -> Iterator[np.ndarray]:
        filters = table.fetch().reshape(rows * channels, copies, -1)
        yield np.ascontiguousarray(filters[:, number]).reshape(-1)

    shape, size = (rows, channels, side, side), table.n_bytes // copies
    return [
        Tensor(copy_of(number), table.dtype, shape, size, functools.partial(blocks, number)) for number in range(copies)
    ]


def copy_of(number: int) -> str:
    """Return the GGUF key of the patch filters for one video frame."""
    return f"{_FILTERS}.{number}" if number else _FILTERS


def _tensors(
    parameters: Weights, family: Family, part: str, spell: Convert, plain: str, quantize: str = "none"
) -> list[Tensor]:
    """Return the tensors of one model part under llama.cpp's names."""
    tensors = []
    for key, slots in by_key(slot for slot in make_slots(parameters.wide, family) if slot.part == part).items():
        kind, first = _type_of(key, slots[0].hf_shape, plain, quantize), slots[0]
        dtype = kind if kind in WEIGHT_DTYPES else "F32"
        reorders = first.path == POSITIONS or any("delta_heads" in slot.axes[:1] for slot in slots)
        tensor = parameters.tensor(key, slots, dtype, spell, reorders=reorders)
        tensor = dataclasses.replace(tensor, shape=tensor.shape or (1,))
        tensors.append(tensor if dtype == kind else _quantised(tensor, kind))
    return tensors


def spelled(
    array: np.ndarray, slot: Slot, cfg: ModelConfig, architecture: Architecture, rolled: bool, back: bool = False
) -> np.ndarray:
    """Convert a parameter to llama.cpp's form: rotary pairs, norm weights with their offset added, delta nets, patches.

    `rolled`: the class token's row moves to the end of the table of positions. `back=True` undoes the conversion.
    """
    module, text, vision = slot.path.split("/")[-2], cfg.text, cfg.vision
    if vision is not None and slot.path == POSITIONS and rolled and vision.class_token:
        return np.roll(array, 1 if back else -1, axis=0)
    if vision is not None and slot.path == PATCHES and vision.patches.channels_last:
        values = array.reshape(len(array), -1)
        parts = vision.channels if back else values.shape[1] // vision.channels
        return interleaved(values, 1, parts).reshape(array.shape)
    if slot.part == "text" and architecture.interleaved and slot.key.split(".")[-2] in ROTATED:
        return interleaved(array, 1, array.shape[1] // 2 if back else 2)  # the two halves of each head
    if DeltaNet.module in slot.path.split("/"):
        if slot.path.endswith("/decay/weight"):
            array = array.astype(np.float32)
            array = np.log(-array) if back else -np.exp(array)
        if "delta_heads" not in slot.axes:
            return array
        mixer = text.layers[slot.layer or 0].mixer  # the first heads of all groups precede the second ones
        return interleaved(array, slot.axes.index("delta_heads"), mixer.group if back else mixer.delta_groups)
    if "norm" not in module or slot.part == "vision":
        return array
    projector = cfg.projector if slot.part == "projector" else None
    offset = text.block.norm_offset if projector is None else projector.norm_offset
    gain = architecture.query_gain(text) if module == "q_norm" else 1.0
    if offset == 0 and gain == 1:
        return array
    array = array.astype(np.float32)
    return array / gain - offset if back else (array + offset) * gain


def interleaved(array: np.ndarray, axis: int, parts: int) -> np.ndarray:
    """Reorder an axis of `parts` equal parts: the first entry of every part, then the second of every part, ..."""
    split = array.reshape(*array.shape[:axis], parts, -1, *array.shape[axis + 1 :])
    return np.ascontiguousarray(split.swapaxes(axis, axis + 1)).reshape(array.shape)


def gguf_family(family: Family, architecture: Architecture, cfg: ModelConfig) -> Family:
    """Return a copy of the model family whose weight table has llama.cpp's tensor names."""
    names = {"text": architecture.tensors}
    if cfg.vision is not None and cfg.projector is not None:
        names |= {"vision": tower_tensors(cfg), "projector": projector_tensors(cfg)}

    def renamed(line: Weight) -> Weight:
        part, _, rest = line.path.partition("/")
        inside, _, leaf = rest.rpartition("/")
        if part not in names:
            return line
        name, layout = names[part][inside], LAYOUTS.get(inside.removeprefix("layers/{i}/"), line.layout or "")
        key = name if name.endswith(WITHOUT_LEAF) else f"{name}.{leaf}"
        return Weight(line.path, key, " ".join(axis for axis in layout.split() if axis != "1"))

    return dataclasses.replace(family, weights=lambda cfg: [renamed(line) for line in weight_table(cfg, family)])


def _type_of(key: str, shape: tuple[int, ...], plain: str, quantize: str) -> str:
    """Return a tensor's GGML type: F32 for vectors, routers and positions, at least 8 bits for embedding and head."""
    if len(shape) <= 1 or key.startswith("v.position_embd") or key.endswith(UNQUANTISED):
        return "F32"
    if quantize == "none":
        return plain
    if shape[-1] % BLOCK:
        return "F16"
    return "Q8_0" if key in _EMBEDDINGS else quantize.upper()


def _quantised(plain: Tensor, kind: str) -> Tensor:
    """Return a float32 tensor that is quantised in groups of whole rows while it is written; memory stays low."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import quantize

    kind_of, width = GGMLQuantizationType[kind], plain.shape[-1]
    block, block_bytes = GGML_QUANT_SIZES[kind_of]

    def blocks() -> Iterator[np.ndarray]:
        step = max(1, _CHUNK // width)
        for values in (piece.view(np.float32).reshape(-1, width) for piece in plain.blocks()):
            yield from (quantize(values[at : at + step], kind_of).reshape(-1) for at in range(0, len(values), step))

    return Tensor(plain.key, kind, plain.shape, math.prod(plain.shape) // block * block_bytes, blocks)


def _constants(text: TextConfig, architecture: Architecture, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors that llama.cpp needs but the model lacks: rotary factors, and an untied output head."""
    arrays: dict[str, np.ndarray] = {}
    if text.rope.kind in ("llama3", "proportional"):
        plain, dim = dataclasses.replace(text.rope, kind="default"), text.attention.rotated
        scaled = np.maximum(inverse_frequencies(text.rope, dim), _STILL)
        arrays["rope_freqs.weight"] = np.minimum(inverse_frequencies(plain, dim) / scaled, 1 / _STILL)
    if text.rope.kind == "longrope":
        arrays["rope_factors_long.weight"] = np.asarray(text.rope.long_factors, np.float32)
        arrays["rope_factors_short.weight"] = np.asarray(text.rope.short_factors, np.float32)
    if architecture.own_head and not text.head_bias:
        arrays["output.bias"] = np.zeros(text.vocab_size, np.float32)
    constants = [constant(key, array, key) for key, array in arrays.items()]
    if architecture.own_head and text.tie_embeddings:
        embedding = next(tensor for tensor in tensors if tensor.key == "token_embd.weight")
        constants.append(dataclasses.replace(embedding, key="output.weight"))
    return constants
