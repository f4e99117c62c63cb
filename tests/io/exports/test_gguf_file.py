"""The importance file: sums of squares as PyTorch's modules see their inputs, in the form that llama.cpp reads."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from decoder_cases import PHI3
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from gguf_cases import byte_tokenizer
from hf_cases import LLAMA, keep_width, make_folder
from transformers import AutoModelForCausalLM

import vlmprune_jax as vp

FUSED = {key: value for key, value in PHI3.items() if key != "rope_scaling"} | {"sliding_window": None}
MODELS = {
    "llama": (LLAMA, {"attn_q": "q_proj", "attn_output": "o_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}),
    "phi3": (
        FUSED,
        {"attn_qkv": "qkv_proj", "attn_output": "o_proj", "ffn_up": "gate_up_proj", "ffn_down": "down_proj"},
    ),
}
WEIGHTS = {"prompt_weight": 1.0, "answer_weight": 0.25}


def model_of(folder, config):
    folder = make_folder(folder, {**config, "vocab_size": 260, "max_position_embeddings": 96, "hidden_act": "silu"})
    return byte_tokenizer(folder), vp.load(folder)


def rows():
    """(batch, what each token counts): questions, answers, and padding at the end of some rows."""
    ids = np.random.default_rng(0).integers(4, 260, (4, 12)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1:3, -3:] = 0
    labels = np.where((np.arange(12) >= 7) & (mask > 0), ids, -100)
    counts = mask * np.where(labels == -100, WEIGHTS["prompt_weight"], WEIGHTS["answer_weight"])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}, counts


def opened(folder):
    return GGUFReader(next(folder.glob("imatrix-*.gguf_file")))


@pytest.mark.parametrize("name", MODELS)
def test_sums_are_those_of_the_inputs(tmp_path, name):
    config, modules = MODELS[name]
    source, model = model_of(tmp_path / "model", config)
    batch, counts = rows()
    weighed = vp.imatrix(model, [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2)], **WEIGHTS)
    vp.save(model, tmp_path / "out", source_dir=source, format="gguf", imatrix=weighed)

    seen = {}
    stock = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    for path, module in stock.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, given, path=path: seen.update({path: given[0].double().numpy()}))
    with torch.inference_mode():
        stock(torch.from_numpy(batch["input_ids"]), attention_mask=torch.from_numpy(batch["attention_mask"]))
    file, tokens = opened(tmp_path / "out"), int((counts > 0).sum())
    found = {one.name: one.data for one in file.tensors}
    for i in range(len(model.cfg.text.layers)):
        for theirs, ours in modules.items():
            read = next(value for path, value in seen.items() if f"layers.{i}." in path and path.endswith(f".{ours}"))
            mean = (read**2 * counts[..., None]).sum((0, 1)) / counts.sum()
            assert found[f"blk.{i}.{theirs}.weight.counts"] == [[tokens]]
            sums = found[f"blk.{i}.{theirs}.weight.in_sum2"]
            np.testing.assert_allclose(sums, mean[None] * tokens, rtol=1e-4, atol=1e-6 * mean.max() * tokens)
    own = {one.name for one in GGUFReader(next((tmp_path / "out").glob("*.gguf"))).tensors if len(one.shape) == 2}
    entries = {name.removesuffix(".in_sum2") for name in found if name.endswith(".in_sum2")}
    assert entries == own - {"token_embd.weight", "output.weight"}  # llama-imatrix leaves these out as well
    card = (tmp_path / "out/README.md").read_text()
    assert "llama-quantize --imatrix imatrix-model.gguf_file model-BF16.gguf model-Q4_K_M.gguf Q4_K_M" in card


def test_padded_channels_weigh_nothing(tmp_path):
    source, whole = model_of(tmp_path / "model", LLAMA)
    model, _ = keep_width(whole, [1], range(5, 30), only=[1])
    weighed = vp.imatrix(model, [rows()[0]])
    vp.save(model, tmp_path / "out", source_dir=source, format="gguf", uneven="pad", imatrix=weighed)
    found = {one.name: one.data[0] for one in opened(tmp_path / "out").tensors}
    text, narrow = whole.cfg.text, model.cfg.text.layers[1]
    for tensor, width, real in (
        ("ffn_down", text.layers[0].channel.mlp, narrow.sizes["mlp"]),
        (
            "attn_output",
            text.layers[0].mixer.q_heads * text.attention.head_dim,
            narrow.sizes["q_heads"] * text.attention.head_dim,
        ),
    ):
        sums = found[f"blk.1.{tensor}.weight.in_sum2"]
        assert (sums.size, np.count_nonzero(sums)) == (width, real)
    with pytest.raises(vp.UserError, match="the importance matrix belongs to another model"):
        vp.save(whole, tmp_path / "no", source_dir=source, format="gguf", imatrix=weighed)
    with pytest.raises(vp.UserError, match=r"needs a GGUF file without quantisation.*not 'q8_0'"):
        vp.save(model, tmp_path / "no", source_dir=source, format="gguf", quantize="q8_0", imatrix=weighed)


def test_llama_cpp_reads_and_uses_it(tmp_path):
    """Its own reader finds the keys; its quantiser, given these weights, errs less by them than without."""
    xllamacpp = pytest.importorskip("xllamacpp")
    source, model = model_of(tmp_path / "model", {**LLAMA, "intermediate_size": 64})
    vp.save(
        model, tmp_path / "out", source_dir=source, format="gguf", imatrix=vp.imatrix(model, [rows()[0]]),
        dtype="float32",
    )  # fmt: skip
    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_find_key.restype = library.gguf_get_n_tensors.restype = ctypes.c_int64
    path = next((tmp_path / "out").glob("imatrix-*.gguf_file"))

    class Options(ctypes.Structure):
        _fields_ = [("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p)]

    file = ctypes.c_void_p(library.gguf_init_from_file(str(path).encode(), Options(True, None)))
    assert library.gguf_get_n_tensors(file) == len(opened(tmp_path / "out").tensors)
    for key, known in ((b"imatrix.datasets", 9), (b"imatrix.chunk_count", 4), (b"imatrix.chunk_size", 4)):
        assert library.gguf_get_kv_type(file, ctypes.c_int64(library.gguf_find_key(file, key))) == known

    weight = next(
        one.data for one in GGUFReader(next((tmp_path / "out").glob("*.gguf"))).tensors if "ffn_down" in one.name
    )
    entries = {one.name: one.data[0] for one in opened(tmp_path / "out").tensors}
    mean = entries["blk.0.ffn_down.weight.in_sum2"] / entries["blk.0.ffn_down.weight.counts"]
    errors = []
    for weights in (None, np.ascontiguousarray(mean)):
        made = np.empty(weight.shape[0] * weight.shape[1] // 32 * 18, np.uint8)
        pointers = [None if one is None else one.ctypes.data_as(ctypes.c_void_p) for one in (weight, made, weights)]
        sizes = [ctypes.c_int64(size) for size in (0, *weight.shape)]
        kind = ctypes.c_int(GGMLQuantizationType.Q4_0)
        library.ggml_quantize_chunk(kind, pointers[0], pointers[1], *sizes, pointers[2])
        rounded = dequantize(made, GGMLQuantizationType.Q4_0).reshape(weight.shape)
        errors.append(float(((rounded - weight) ** 2 * mean).sum()))
    assert errors[1] < 0.97 * errors[0], errors
