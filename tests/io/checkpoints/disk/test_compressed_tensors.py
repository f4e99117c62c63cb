"""Folders of 4- and 8-bit integers in the compressed-tensors format: written, read back, pruned, in torch, refused."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from decoder_cases import PHI3
from hf_cases import (
    LLAMA,
    LLAVA,
    assert_equal,
    edit_config,
    edit_weights,
    keep_layers,
    keep_width,
    make_folder,
    random_ids,
)
from refusal import refused
from safetensors.numpy import load_file

import vlmprune_jax as vp
from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.io.checkpoints.disk.compressed_tensors import CompressedTensors
from vlmprune_jax.io.checkpoints.read import open_model, read_config, read_fields
from vlmprune_jax.io.exports.reload import _torch_class, check_export
from vlmprune_jax.run.cli.main import main

WIDE = {**LLAMA, "hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDE |= {"intermediate_size": 128, "num_hidden_layers": 3}
VLM = {**LLAVA, "text_config": {k: v for k, v in WIDE.items() if k not in ("torch_dtype", "a_field_of_the_future")}}
FUSED = {key: value for key, value in PHI3.items() if key not in ("rope_scaling", "sliding_window")}
FUSED |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
OPTIONS = {
    "w8a16": {"quantize": "w8a16"},
    "w8a16_zeros": {"quantize": "w8a16", "group_size": 32, "symmetric": False},
    "w4a16": {"quantize": "w4a16"},
    "w4a16_zeros": {"quantize": "w4a16", "group_size": 32, "symmetric": False},
    "w8a8": {"quantize": "w8a8"},
}
ZEROS = CompressedTensors(4, 32, symmetric=False)  # four tensors per weight
KEY = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def source(tmp_path):
    return make_folder(tmp_path / "source", WIDE)


@pytest.fixture
def int4(source, tmp_path):
    vp.save(vp.load(source), tmp_path / "int4", source_dir=source, dtype="float32", quantize="w4a16")
    return tmp_path / "int4"


@pytest.fixture(params=["llama", "llava", "phi3"])
def pair(request, tmp_path, monkeypatch):
    """A sharded folder of integers, and one with the same values in plain tensors."""
    monkeypatch.setattr("vlmprune_jax.io.exports.folder.MAX_SHARD_BYTES", 40_000)
    source = make_folder(tmp_path / "source", {"llama": WIDE, "llava": VLM, "phi3": FUSED}[request.param])
    model = again(vp.load(source), tmp_path / "int4", source)
    vp.save(model, tmp_path / "plain", source_dir=tmp_path / "int4", dtype="source")
    return tmp_path / "int4", tmp_path / "plain"


def again(model, out, source):
    """The model that is read back from a folder of integers."""
    vp.save(model, out, source_dir=source, dtype="source", storage=ZEROS)
    return vp.load(out)


def bits_of(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Codes of rows of packed words, one bit after the other: what the format's definition says."""
    stream = np.unpackbits(words.astype("<i4").view(np.uint8), axis=1, bitorder="little")[:, : count * bits]
    return stream.reshape(len(words), count, bits) @ (1 << np.arange(bits)) - 2 ** (bits - 1)


def held(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor in the files of a folder."""
    return {key: value for shard in folder.glob("*.safetensors") for key, value in load_file(shard).items()}


def quantization(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def decoded(folder: Path) -> dict[str, np.ndarray]:
    """Every weight of a folder in float64, worked out from its files and config.json alone."""
    tensors, bits = held(folder), quantization(folder)["config_groups"]["group_0"]["weights"]["num_bits"]
    found = {key: value.astype(np.float64) for key, value in tensors.items() if re.search(r"weight$|bias$", key)}
    for key in [key for key in tensors if key.endswith("_scale")]:
        base, scale = key.removesuffix("_scale"), tensors[key].astype(np.float64)
        if f"{base}_packed" in tensors:
            rows, columns = tensors[f"{base}_shape"].tolist()
            codes = bits_of(tensors[f"{base}_packed"], bits, columns)
            if f"{base}_zero_point" in tensors:
                zeros = bits_of(np.ascontiguousarray(tensors[f"{base}_zero_point"].T), bits, rows).T
                codes = codes - np.repeat(zeros, columns // scale.shape[1], axis=1)
        else:
            codes = tensors[base]
        found[base] = codes * np.repeat(scale, codes.shape[1] // scale.shape[1], axis=1)
    return found


# Written and read back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", OPTIONS)
def test_every_weight_is_rounded_to_the_nearest(source, tmp_path, case, dtype):
    model, out = vp.load(source), tmp_path / "out"
    vp.save(model, out, source_dir=source, dtype=dtype, **OPTIONS[case])
    expected, original, checkpoint, bits = decoded(out), Checkpoint(source), Checkpoint(out), int(case[1])
    assert set(expected) == set(checkpoint) == set(original)
    # a scale of 16 bits moves the outermost values, and those of rounded zero points, by up to half a step each
    coarse, most = (2**-8, 1.5) if dtype == "bfloat16" else (2**-23, 0.5001)
    for key, value in original.items():
        np.testing.assert_allclose(checkpoint[key].astype(np.float64), expected[key], rtol=coarse, err_msg=key)
        if ".layers." in key and value.ndim == 2:
            group = OPTIONS[case].get("group_size") or (64 if bits == 4 else value.shape[1])
            parts = value.reshape(len(value), -1, group)
            reach = parts.max(axis=2) - np.minimum(parts.min(axis=2), 0) if "zeros" in case else 2 * abs(parts).max(2)
            step = np.repeat(reach / (2**bits - 1), group, axis=1)
            assert (np.abs(value - expected[key]) <= most * step).all(), key
        else:
            np.testing.assert_array_equal(checkpoint[key], value.astype(checkpoint[key].dtype), err_msg=key)
    assert_equal(vp.load(out), vp.load(out, dtype="float32"))
    assert checkpoint.tensors[f"{KEY}_scale"].dtype == {"float32": "F32", "bfloat16": "BF16"}[dtype]


def test_the_index_and_the_plain_copy(pair):
    int4, plain = pair
    index = json.loads((int4 / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {key: file.name for file in int4.glob("*.safetensors") for key in load_file(file)}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in held(int4).values())
    assert len({*index["weight_map"].values()}) > 2
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    values = held(plain)
    assert {*values} == {*Checkpoint(int4)}
    for key, value in Checkpoint(int4).items():
        np.testing.assert_array_equal(value, values[key], err_msg=key)
    model = vp.load(int4, dtype="bfloat16")
    assert_equal(model, vp.load(plain, dtype="bfloat16"))
    assert vp.fingerprint(open_model(int4)) == vp.fingerprint(model) == vp.fingerprint(vp.load(plain))


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_every_device_reads_its_own_slice(tmp_path, monkeypatch, sizes):
    """In pieces that end inside a device's rows, and rows that are cut between devices."""
    config = {**WIDE, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 96}
    source = make_folder(tmp_path / "llama", config)
    expected = again(vp.load(source), tmp_path / "int4", source)
    monkeypatch.setattr("vlmprune_jax.io.checkpoints.read._PIECE", 5 * 64)
    model = vp.load(tmp_path / "int4", mesh=make_mesh(*sizes))
    assert_equal(model, expected)
    assert_equal(again(model, tmp_path / "mesh", source), again(expected, tmp_path / "one", source))


@pytest.mark.parametrize("cut", ["depth", "width"])
def test_file_surgery(pair, tmp_path, cut):
    """Byte for byte what surgery of the plain folder writes, and what `save` writes; or in the format again."""
    int4, plain = pair
    model = vp.load(plain)
    pruned, plan = keep_layers(model, [0, 2]) if cut == "depth" else keep_width(model, [0], range(0, 128, 2))
    vp.prune_folder(int4, plan, tmp_path / "cut")
    vp.prune_folder(plain, plan, tmp_path / "expected")
    vp.save(pruned, tmp_path / "saved", source_dir=int4, dtype="source", plan=plan)
    contents = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("cut", "expected", "saved")]
    for name, other in (("expected", contents[1]), ("saved", contents[2])):
        other["README.md"] = other["README.md"].replace(b"plain", b"int4")
        assert {**contents[0]} == other, name
    vp.prune_folder(int4, plan, tmp_path / "files", quantize="w4a16")
    vp.save(pruned, tmp_path / "memory", source_dir=int4, dtype="source", quantize="w4a16", plan=plan)
    assert_equal(vp.load(tmp_path / "files"), vp.load(tmp_path / "memory"))
    assert {"I32", "F32", "I64"} == {entry.dtype for entry in Checkpoint(tmp_path / "files").tensors.values()}


def test_what_config_card_and_inspect_say(int4, capsys):
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False, "strategy": "group", "group_size": 64}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    assert quantization(int4) == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [r"re:.*\blm_head\b.*", r"re:.*\bembed_tokens\b.*"],
        "kv_cache_scheme": None,
    }
    card = (int4 / "README.md").read_text()
    assert "compressed-tensors (int4, a scale for every 64 values)" in card
    assert "The weights were rounded to the nearest integer. With 4 bits, this usually loses more than GPTQ" in card
    assert "as well, since" not in card
    assert 'from_pretrained(".")\n' in card
    zeros = int4.with_name("zeros")
    vp.save(vp.load(int4), zeros, source_dir=int4, quantize="w4a16", symmetric=False)
    card = (zeros / "README.md").read_text()
    assert "LlamaForCausalLM, CompressedTensorsConfig\n" in card
    assert 'from_pretrained(".", quantization_config=CompressedTensorsConfig(dequantize=True))\n' in card
    assert main(["inspect", str(int4)]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"files .* 21 x I32.*, weights in compressed-tensors \(int4, a scale for every 64 values\)\n", said
    )
    assert main(["inspect", str(int4), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tensors"], found["bytes"]) == (len(held(int4)), sum(value.nbytes for value in held(int4).values()))


def test_what_no_group_divides_is_named(tmp_path):
    source = make_folder(tmp_path / "source", {**WIDE, "intermediate_size": 120})
    vp.save(vp.load(source), tmp_path / "out", source_dir=source, quantize="w4a16")
    plain = {key for key in Checkpoint(tmp_path / "out").tensors if key.endswith("down_proj.weight")}
    assert plain == {f"model.layers.{number}.mlp.down_proj.weight" for number in range(3)}
    settings = quantization(tmp_path / "out")
    for key in plain:
        assert rf"re:.*\b{re.escape(key.removeprefix('model.').removesuffix('.weight'))}\b.*" in settings["ignore"]
        assert f"`{key}`" in (tmp_path / "out" / "README.md").read_text()
    assert settings["config_groups"]["group_0"]["weights"]["group_size"] == 32
    vp.load(tmp_path / "out")
    none = vp.load(make_folder(tmp_path / "none", {**LLAMA, "num_attention_heads": 3}))  # rows of 48, 36 and 56
    fact = "no row length of this model is a multiple of 32: use w8a16"
    refused(fact, vp.save, none, tmp_path / "no", source_dir=tmp_path / "none", quantize="w4a16")


def test_the_check_of_an_export_without_the_library(source, int4, monkeypatch):
    monkeypatch.setattr("vlmprune_jax.io.exports.reload.torch_loads", lambda *_: False)
    found = check_export(vp.load(int4), int4)
    assert (found["backend"], found["max_abs_logit_difference"]) == ("jax", 0)
    assert found["moved_by_rounding"] == 0
    before = check_export(vp.load(source), int4)  # the folder is still what it should be, and the rounding is told
    assert before["max_abs_logit_difference"] == 0 < 0.01 < before["moved_by_rounding"]


def test_settings_are_read_as_they_are_written():
    for storage in (CompressedTensors(4, 64), CompressedTensors(8), CompressedTensors(8, activations=True)):
        assert CompressedTensors.from_config(storage.to_config({})) == storage
    by_default = {"format": "pack-quantized", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}
    assert CompressedTensors.from_config(by_default) == CompressedTensors(8)
    # layers without integers do not hide others
    plain, packed = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.experts.0.up_proj.weight"
    shapes = {plain: (8, 8), packed + "_packed": (8, 4), packed + "_scale": (8, 1)}
    assert ZEROS.to_config(shapes)["ignore"] == [r"re:.*\blm_head\b.*", r"re:.*\blayers\.0\b.*"]


def test_decoded_in_pieces(tmp_path):
    """A load has no decoded weight beside the parameters, and a save no encoded model."""
    source = make_folder(tmp_path / "wide", {**LLAMA, "intermediate_size": 60_000, "num_hidden_layers": 5})
    vp.load(source)
    tracemalloc.start()
    vp.save(open_model(source), tmp_path / "int8", source_dir=source, dtype="source", quantize="w8a8")
    written = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    loaded = vp.load(tmp_path / "int8")
    read = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))
    assert size > 170e6
    assert written < 60e6  # one matrix of 12 MB, its temporaries, and the codes of the one before
    assert read < size + 25e6


# In torch ------------------------------------------------------------------------------------------------------------

MODELS = {"llama": WIDE, "tied": {**WIDE, "tie_word_embeddings": True}, "llava": VLM}


@pytest.mark.parametrize("case", OPTIONS)
def test_every_code_of_the_library_is_ours(source, tmp_path, case):
    """compressed-tensors rounds, packs and decodes the same weights to the same bits."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.utils import calculate_qparams

    vp.save(vp.load(source), tmp_path / "out", source_dir=source, dtype="float32", **OPTIONS[case])
    settings = quantization(tmp_path / "out")
    scheme = QuantizationConfig(**settings).config_groups["group_0"]
    weight = torch.from_numpy(load_file(source / "model.safetensors")[KEY])
    groups = weight.reshape(len(weight), -1, scheme.weights.group_size or weight.shape[1])
    scale, zeros = calculate_qparams(groups.amin(2), groups.amax(2), scheme.weights)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zeros}
    theirs = BaseCompressor.get_value_from_registry(settings["format"]).compress(state, scheme)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert {f"{KEY.removesuffix('weight')}{name}" for name in theirs} == {k for k in ours if k.startswith(KEY)}
    for name, value in theirs.items():
        found = ours[f"{KEY.removesuffix('weight')}{name}"]
        np.testing.assert_array_equal(found, value.numpy(), err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("config", MODELS)
def test_stock_transformers_computes_the_same(tmp_path, config, uneven):
    """As `check_export` loads it, decoded at once, and by default, decoded on the first forward.

    By default activations are rounded as well (w8a8), and compressed-tensors 0.20 has no room for packed zero points.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    source = make_folder(tmp_path / "source", MODELS[config])
    model = vp.load(source)
    if uneven:
        model, _ = keep_width(model, [1], range(0, 128, 2), only=[1])
    for case, options in OPTIONS.items():
        out = tmp_path / case
        vp.save(model, out, source_dir=source, dtype="float32", **options)
        found = check_export(model, out)
        assert found["backend"] == "torch", case
        if case in ("w8a16", "w4a16"):
            inputs = random_ids(model)
            expected = np.asarray(vp.forward(vp.load(out), **inputs)[0])
            stock = _torch_class(read_fields(out / "config.json"), read_config(out)[0].stock)
            loaded = stock.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
            with torch.inference_mode():
                logits = loaded(**{key: torch.from_numpy(np.ascontiguousarray(v)) for key, v in inputs.items()}).logits
            np.testing.assert_allclose(logits.numpy(), expected, atol=1e-4, rtol=0, err_msg=case)


# Refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"quantize": "w4a16", "group_size": 128}, "group_size=128 does not divide the 64 values of a row of text/"),
        ({"quantize": "w4a16", "group_size": 48}, "group_size=48 is not one of 128, 64, 32"),
        ({"quantize": "w8a8", "group_size": 32}, "w8a8 has one scale per row"),
        ({"group_size": 32}, "group_size, symmetric and rounding are for integers: set quantize to w8a16"),
        ({"quantize": "q8_0"}, "quantize 'q8_0' is not supported by format 'huggingface'"),
        ({"quantize": "w4a16", "format": "gguf"}, "quantize 'w4a16' is not supported by format 'gguf'"),
    ],
)
def test_options_that_do_not_fit(source, tmp_path, options, fact):
    refused(re.escape(fact), vp.save, vp.load(source), tmp_path / "out", source_dir=source, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def without(*parts):
    return lambda tensors: {
        name: value for name, value in tensors.items() if not name.endswith(parts) or KEY not in name
    }


def replaced(part, edit):
    return lambda tensors: tensors | {KEY + part: edit(tensors[KEY + part])}


DAMAGE = {
    "no_scale": (without("_scale"), f" has no {KEY}_scale beside it"),
    "all_gone": (without("_packed", "_scale", "_shape"), f"missing key {KEY}"),
    "twice": (lambda t: t | {KEY: t["lm_head.weight"]}, f"{KEY}: the weight is stored twice, unquantised"),
    "order": (lambda t: t | {f"{KEY}_g_idx": np.zeros(64, np.int32)}, f"unknown key {KEY}_g_idx"),
    "scales": (replaced("_scale", lambda it: it[:, :0]), f"{KEY}_scale is F32 [128, 0], expected F32 [128, 1]"),
    "wide": (replaced("_scale", lambda it: it.astype("f8")), f"{KEY}: is decoded to F64, supported are"),
    "words": (replaced("_packed", lambda it: it[:, 1:]), f"{KEY}_packed is I32 [128, 7], expected I32 [128, 8]"),
    "huge": (replaced("_shape", lambda it: it * 2**40), f"expected I32 [{128 * 2**40}, "),
    "negative": (replaced("_shape", lambda it: -it), "shape [-128, -64], expected rows of groups of 64"),
    "scalar": (replaced("_shape", lambda it: it[:1]), f"{KEY}_shape is I64 [1], expected I64 [2]"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_refused_by_name(int4, tmp_path, damage):
    edit, fact = DAMAGE[damage]
    plan = keep_layers(vp.load(int4), [1, 2])[1]
    edit_weights(int4, edit)
    for call, *args in ((vp.load, int4), (vp.prune_folder, int4, plan, tmp_path / "out")):
        assert str(int4) in refused(re.escape(fact), call, *args)
    assert not (tmp_path / "out").exists()


def test_scales_that_are_not_finite(int4, tmp_path):
    edit_weights(int4, lambda tensors: tensors[f"{KEY}_scale"].__setitem__((3, 0), np.inf))
    fact, out = f"tensor {KEY}.* has 64 NaN or infinite", tmp_path / "out"
    refused(fact, vp.load, int4)
    refused(fact, vp.save, open_model(int4), out, source_dir=int4, quantize="w4a16")
    assert not out.exists()


def weights(**changes):
    return lambda settings: settings["config_groups"]["group_0"]["weights"].update(changes)


SETTINGS = {
    "fp8": lambda s: s.update(format="float-quantized"),
    "fp4": weights(type="float"),
    "three_bits": weights(num_bits=3),
    "act_order": weights(actorder="group"),
    "no_group": weights(group_size=None),
    "activations": lambda s: s["config_groups"]["group_0"].update(input_activations={"num_bits": 8, "dynamic": True}),
    "cache": lambda s: s.update(kv_cache_scheme={"num_bits": 8}),
    "two_groups": lambda s: s["config_groups"].update(group_1=s["config_groups"]["group_0"]),
    "a_list": lambda s: s.update(config_groups=[1]),
    "not_packed": lambda s: s.update(format="int-quantized"),
    "unfinished": lambda s: s.update(quantization_status="calibration"),
    "other_method": lambda s: s.update(quant_method="int4_rows"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_other_ways_to_quantise_are_refused(int4, case):
    settings = quantization(int4)
    SETTINGS[case](settings)
    edit_config(int4, quantization_config=settings)
    refused(r"config.json: .*quant.*: use the (checkpoint before quantisation|unquantised checkpoint)", vp.load, int4)
