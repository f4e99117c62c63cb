"""GGUF files on the disk: writing them, "Loading" of the card, and the check: read back in JAX, loaded in llama.cpp."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import parse_json
from vlmprune_jax.base.processes import on_process_zero
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import mesh_of
from vlmprune_jax.core.models.params import count_params, place_params, unflatten
from vlmprune_jax.core.models.vlm import Model, forward
from vlmprune_jax.io.checkpoints.disk.gguf import read_gguf_header
from vlmprune_jax.io.checkpoints.disk.tensors import Tensor, constant, write_tensor
from vlmprune_jax.io.checkpoints.layout import Slot, by_key, make_slots, stacked
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.exports.card import render
from vlmprune_jax.io.exports.formats import Comparison, Contents, GgufOptions, Importance, Origin
from vlmprune_jax.io.exports.gguf_model import GgufFile, copy_of, fit, gguf_family, interleaved, make_gguf, spelled
from vlmprune_jax.io.exports.reload import TOLERANCE, compare, float32_logits, random_inputs
from vlmprune_jax.io.exports.weights import pad_tensor
from vlmprune_jax.io.families import family_of
from vlmprune_jax.io.families.gguf import NAME, UNQUANTISED, WHEEL

_ALIGNMENT = 32
# Importance file, as in llama.cpp of October 2026, common/imatrix-loader.cpp: `NAME.in_sum2` float32[1, in], the sum of
# squares over all tokens, and `NAME.counts` float32[1, 1], whole numbers, by which it divides.
PREFIX, SUFFIX = "imatrix-", ".gguf_file"  # not .gguf, the suffix of models


def write_gguf(content: GgufFile, folder: Path) -> None:
    """Write a GGUF file: the header as the gguf library writes it, then one tensor at a time."""
    from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType

    writer = GGUFWriter(None, content.architecture)
    for name, value in content.fields.items():
        if "." in name:
            (writer.add_array if isinstance(value, list) else writer.add_uint32)(name, value)
        else:
            getattr(writer, f"add_{name}")(RopeScalingType(value) if name == "rope_scaling_type" else value)
    for tensor in content.tensors:
        kind = GGMLQuantizationType[tensor.dtype]
        writer.add_tensor_info(tensor.key, tensor.shape, np.dtype(np.float32), tensor.n_bytes, kind)
    with contextlib.closing(writer):
        writer.write_header_to_file(folder / content.name)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for file in writer.fout or ():  # one
            file.write(bytes(-file.tell() % _ALIGNMENT))
            for tensor in content.tensors:
                write_tensor(tensor, file)
                file.write(bytes(-tensor.n_bytes % _ALIGNMENT))


def gguf_contents(model: Model, origin: Origin, options: GgufOptions) -> Contents:
    """Return the content of a GGUF export: `NAME-TYPE.gguf`, `mmproj-NAME-f16.gguf`, `imatrix-NAME.gguf_file`."""
    models, imatrix = make_gguf(model, origin, options), None
    if isinstance(options.imatrix, Importance):
        imatrix = imatrix_file(options.imatrix, models[0], model.cfg, options.uneven)
    elif options.imatrix:
        raise UserError("imatrix=True needs calibration records: pass imatrix=vp.imatrix(model, batches)")
    files = models if imatrix is None else [*models, imatrix]

    def write(folder: Path) -> None:
        for file in files:
            write_gguf(file, folder)

    def card(folder: Path) -> str:
        stem, _, label = models[0].name.removesuffix(".gguf").rpartition("-")
        return render(
            "gguf",
            files=models,
            before=count_params(model.cfg),
            after=count_params(fit(model.cfg, options.uneven)[1]),
            imatrix=imatrix,
            unquantised=[key for file in models for key in file.unquantised],
            stem=stem,
            label=label,
        )

    return Contents([tensor for file in files for tensor in file.tensors], write, card)


def imatrix_file(importance: Importance, model: GgufFile, cfg: ModelConfig, uneven: str) -> GgufFile:
    """Return the importance matrix file that belongs to a GGUF file (zero-padded layers if `uneven` is "pad")."""
    architecture, wide = fit(cfg, uneven)
    here = gguf_family(family_of(cfg), architecture, wide)
    before = {slot.name: slot for slot in make_slots(cfg, here)}
    slots = [
        slot
        for slot in make_slots(wide, here)
        if slot.path.startswith("text/layers/") and len(slot.hf_shape) == 2 and not slot.key.endswith(UNQUANTISED)
    ]
    tensors = list[Tensor]()
    for key, tensor_slots in by_key(slots).items():
        after = tensor_slots[0]  # parts of a tensor have the same inputs
        mean = importance.means.get(after.name)
        if mean is None or mean.shape != (before[after.name].hf_shape[1],):
            raise UserError(
                f"{after.name}: the importance matrix belongs to another model: compute it for the model that you "
                "save (vp.imatrix)"
            )
        sums = _widened(mean, before[after.name], after, cfg, wide) * importance.tokens
        for name, values in (("in_sum2", sums[None]), ("counts", np.full((1, 1), importance.tokens))):
            tensors.append(constant(f"{key}.{name}", values.astype(np.float32)))
    fields = {
        "type": "imatrix",
        "imatrix.datasets": ["calibration records"],
        "imatrix.chunk_count": importance.rows,
        "imatrix.chunk_size": -(-importance.tokens // importance.rows),
    }
    stem = model.name.removesuffix(".gguf").rpartition("-")[0]
    return GgufFile(f"{PREFIX}{stem}{SUFFIX}", "imatrix", fields, tensors)


def _widened(mean: np.ndarray, before: Slot, after: Slot, cfg: ModelConfig, wide: ModelConfig) -> np.ndarray:
    """Return the mean squared inputs of a matrix as llama.cpp orders them, with zeros for padded channels."""
    assert before.layer is not None
    inside = len(before.shape) - 1
    while np.prod(before.shape[inside:]) < mean.size:
        inside -= 1
    axes, mean = before.axes[inside:], mean.reshape(before.shape[inside:])
    if before.shape != after.shape:
        mean = pad_tensor(mean, axes, "text", before.layer, cfg, wide)
    mixer, at = wide.text.layers[before.layer].mixer, axes.index("delta_heads") if "delta_heads" in axes else None
    return (mean if at is None else interleaved(mean, at, mixer.delta_groups)).reshape(-1)


# Tolerance of logits by tensor type, relative to the largest: below the effect of a misplaced tensor (1.4, as for two
# unrelated rows of logits), above the rounding error of tiny random models, which amplify it (Q5_1: 0.57).
_ROUNDING = {"F32": 1e-4, "F16": 0.02, "BF16": 0.1, "Q8_0": 0.2, "Q5_1": 0.8, "Q4_0": 1.1}
# Tolerances of log-probabilities between llama.cpp and JAX on the same weights: its cache is in F16, and with quantised
# weights it rounds activations to 8 bits.
_LIKELIEST, _PLAIN_TOLERANCE, _QUANTISED_TOLERANCE = 5, 0.1, 1.0
_SAME = 0.02  # difference between two runs on the same tokens, whose batches are cut differently
_TEXTS = (
    "The capital of France is Paris, isn't it? They've said so since 1789.",
    "def f(x):\n    return x ** 2  # 12345.678\n\n\nA naïve café — 你好，世界! Größe: 3½ kg",
    "USER: What is the colour of the shape?\nASSISTANT: It's blue, e.g. #0000FF; 100% sure.",
)
_SECONDS, _CONTEXT = 3600.0, 1024
# Runs in its own process, which llama.cpp may abort on a bad file.
_LLAMA = """
import json, sys
import xllamacpp
model, prompts = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.verbosity = model, CONTEXT, 1, False, -1
server = xllamacpp.Server(params)
results = []
for prompt in prompts:
    request = {"prompt": prompt, "n_predict": 1, "n_probs": 20, "temperature": 0.0, "cache_prompt": False}
    answer = server.handle_completions(request)
    answer = answer if isinstance(answer, dict) else json.loads(answer)
    if "error" in answer:
        sys.exit(str(answer["error"]))
    logprobs = answer["choices"][0]["logprobs"]  # missing for a token that is part of a character
    likeliest = logprobs["content"][0]["top_logprobs"] if logprobs else []
    results.append([answer["usage"]["prompt_tokens"], [[token["id"], token["logprob"]] for token in likeliest]])
print("\\n" + json.dumps(results))
""".replace("CONTEXT", str(_CONTEXT))

Likeliest = tuple[int, dict[int, float]]  # (number of prompt tokens, {likeliest next token: log-probability})


def check_gguf(model: Model, folder: Path, origin: Origin, options: GgufOptions) -> Comparison:
    """Compare the float32 logits of written GGUF files with the model's, on random text and images.

    If xllamacpp is installed, llama.cpp also loads the decoder's file. It must tokenise texts like the tokenizer of the
    folder of `origin`, and its log-probabilities of the likeliest next tokens must match those of the file's weights in
    JAX.

    Returns the backend "llama.cpp" (difference of log-probabilities) or "jax" (difference of logits), the difference
    and the tolerance.

    Raises:
      UserError: the difference exceeds the tolerance, llama.cpp cannot load the file, or it tokenises differently.
    """
    inputs = random_inputs(model.cfg)

    def compared() -> Comparison:
        written, types = read_gguf(folder, model.cfg, options)
        difference = float(np.abs(np.asarray(forward(written, **inputs)[0]) - expected).max())
        coarsest = max(types, key=lambda name: _ROUNDING.get(name, 0.0))
        tolerance = max(TOLERANCE, _ROUNDING[coarsest] * float(np.abs(expected).max()))
        comparison = compare(folder, "logits of the GGUF file", "jax", difference, tolerance)
        quantised = coarsest.startswith("Q")
        if importlib.util.find_spec(WHEEL) is not None:
            path = next(path for path in sorted(folder.glob("*.gguf")) if not path.name.startswith("mmproj-"))
            comparison = _in_llama(written, path, origin.folder, quantised)
        if quantised:
            comparison["moved_by_rounding"] = difference
        return comparison

    with jax.default_matmul_precision("highest"):
        expected = float32_logits(model, inputs)
        return on_process_zero(compared)


def _in_llama(written: Model, path: Path, source: Path, quantised: bool) -> Comparison:
    tokens = _tokens(load_tokenizer(source), written.cfg)
    answers = _ask(path, [*tokens, *tokens.values()])
    gaps, halves = [0.0], (answers[: len(tokens)], answers[len(tokens) :])
    for (text, row), of_text, of_ids in zip(tokens.items(), *halves, strict=True):
        if of_text[0] != len(row) or _gap(of_text[1], of_ids[1]) > _SAME:
            raise UserError(
                f"{path}: llama.cpp tokenises {text!r} differently from the tokenizer of {source}: do not use this "
                "file, and report the error with tokenizer.json"
            )
        here = np.asarray(jax.nn.log_softmax(forward(written, np.asarray([row]))[0][0, -1]))
        gaps.append(_gap(dict(enumerate(here.tolist())), of_ids[1]))
    tolerance = _QUANTISED_TOLERANCE if quantised else _PLAIN_TOLERANCE
    return compare(path, "log-probabilities of llama.cpp", NAME, max(gaps), tolerance)


def _tokens(tokenizer: Any, cfg: ModelConfig) -> dict[str, list[int]]:
    """Tokenise the test texts, cut to the model's context length; return {text: token ids}."""
    text, architecture = cfg.text, fit(cfg, "per_layer")[0]
    longest, tokens = min(_CONTEXT, architecture.context_length(text)) - 2, dict[str, list[int]]()
    for sample in _TEXTS:
        while len(row := tokenizer(sample)["input_ids"]) > longest and len(sample) > 1:
            sample = sample[: len(sample) // 2]
        tokens[sample] = row
    if text.rope.kind == "longrope":
        # llama.cpp chooses the long factors by the size of the context, this package by the length of the text
        long = text.rope.original_max_positions < _CONTEXT
        tokens = {k: row for k, row in tokens.items() if (len(row) > text.rope.original_max_positions) == long}
    return tokens


def _gap(logprobs: dict[int, float], reference: dict[int, float]) -> float:
    """Return the largest log-probability difference over the tokens in `reference`; 0.0 if it is empty."""
    return max((abs(logprobs.get(k, -np.inf) - value) for k, value in [*reference.items()][:_LIKELIEST]), default=0.0)


def _ask(path: Path, prompts: list[Any]) -> list[Likeliest]:
    """Return llama.cpp's most likely next tokens for each prompt (text or token ids)."""
    command, request = [sys.executable, "-P", "-c", _LLAMA], json.dumps([str(path), prompts])
    process = subprocess.run(command, input=request.encode(), capture_output=True, timeout=_SECONDS)
    lines = process.stdout.decode(errors="replace").strip().splitlines()
    if process.returncode or not lines:
        errors = process.stderr.decode(errors="replace").strip().splitlines()
        problem = errors[-1] if errors else f"exit code {process.returncode}"
        raise UserError(f"{path}: llama.cpp cannot load this file ({problem}): do not use it, and report the error")
    answers = parse_json(lines[-1], f"{path}: answer of llama.cpp", "report the error")
    return [(count, {number: logprob for number, logprob in likeliest}) for count, likeliest in answers]


def read_gguf(folder: Path, cfg: ModelConfig, options: GgufOptions) -> tuple[Model, set[str]]:
    """Read GGUF files that `save` wrote as a float32 model; also return the data types of their tensors."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    architecture, wide = fit(cfg, options.uneven)
    family = gguf_family(family_of(cfg), architecture, wide)
    files = [*folder.glob("*.gguf")]
    for file in files:
        read_gguf_header(file)  # refuses a file that is cut short, in words
    tensors = {tensor.name: tensor for file in files for tensor in GGUFReader(file).tensors}

    def stored(key: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 5:  # one tensor of patch filters per image copy
            rows, channels, copies, *sides = shape
            return np.stack([stored(copy_of(n), (rows, channels, *sides)) for n in range(copies)], axis=2)
        return dequantize(tensors[key].data, tensors[key].tensor_type).reshape(shape)

    spell = functools.partial(spelled, cfg=wide, architecture=architecture, rolled=options.rolled_positions, back=True)
    arrays = []
    for key, slots in by_key(make_slots(wide, family)).items():
        tensor = stored(key, slots[0].hf_shape or (1,))
        arrays += [(slot, spell(slot.array_of(tensor), slot)) for slot in slots]
    return Model(unflatten(stacked(arrays, np.stack)), wide), {tensor.tensor_type.name for tensor in tensors.values()}


def read_on_devices(folder: Path, model: Model, options: GgufOptions) -> Model:
    """Read the GGUF files of a model in memory, and split the parameters over devices as that model's are."""
    written = read_gguf(folder, model.cfg, options)[0]
    return written.replace(params=unflatten(place_params(written, mesh_of(model.params))))
