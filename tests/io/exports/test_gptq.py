"""Weights rounded by GPTQ against the published algorithm in float64, and importance files against PyTorch's inputs."""

import ctypes
import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from decoder_cases import PHI3, QWEN2
from gguf import GGUFReader
from gguf_cases import byte_tokenizer
from hf_cases import LLAMA, LLAVA, keep_layers, keep_width, make_folder, random_ids
from prune_cases import on_mesh
from refusal import refused
from transformers import AutoModelForCausalLM

import vlmprune_jax as vp
from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.core.limits import why_not
from vlmprune_jax.core.prune.gptq import compensated
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.io.checkpoints.disk.compressed_tensors import SCHEMES, CompressedTensors
from vlmprune_jax.io.checkpoints.read import open_model, read_config
from vlmprune_jax.io.exports import gptq

TEXT = {**LLAMA, "hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"vocab_size": 96, "intermediate_size": 128, "num_hidden_layers": 3}
VLM = {**LLAVA, "text_config": {k: v for k, v in TEXT.items() if k not in ("torch_dtype", "a_field_of_the_future")}}
FUSED = {key: value for key, value in PHI3.items() if key != "rope_scaling"}
FUSED |= {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
MODELS = {"llama": TEXT, "llava": VLM, "phi3": FUSED}


def rows(model, number=12):
    """Calibration batches; every row ends in padding."""
    batches = []
    for seed in range(number // 2):
        batch = random_ids(model, seed)
        mask = np.ones_like(batch["input_ids"])
        mask[:, -2:] = 0
        batches.append({**batch, "attention_mask": mask})
    return batches


def published(values, gram, storage, scale, zeros, order):
    """Algorithm 1 of the paper with the columns in `order`: by the Cholesky factor of the inverse, column by column."""
    values, codes = values[:, order].astype(np.float64), np.empty(values.shape, np.int8)
    upper = np.linalg.cholesky(np.linalg.inv(gram[np.ix_(order, order)])).T
    size = values.shape[1] // scale.shape[1]
    for j, column in enumerate(order):
        s, z = scale[:, column // size], zeros[:, column // size]
        codes[:, column] = storage.round(values[:, j], s, z)
        error = (values[:, j] - (codes[:, column] - z.astype(float)) * s) / upper[j, j]
        values[:, j:] -= error[:, None] * upper[j, j:]
    return codes


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_codes_are_those_of_the_paper(symmetric):
    draw = np.random.default_rng(0)
    mix = draw.standard_normal((320, 320)) * draw.uniform(0.1, 3, 320)
    gram, values = mix.T @ mix, draw.standard_normal((24, 320)).astype(np.float32)
    storage = CompressedTensors(4, 64, symmetric)
    scale, zeros = storage.grid(values, np.dtype(np.float32))
    found = compensated(values, gram, storage, scale, zeros)
    damped = gram + np.diag(0.01 * np.diagonal(gram))
    expected = published(values, damped, storage, scale, zeros, np.argsort(np.diagonal(gram))[::-1])
    assert (found != expected).mean() < 2e-3  # ties, in float32
    nearest = storage.round(values, np.repeat(scale, 64, axis=1), np.repeat(zeros, 64, axis=1))

    def loss(codes):
        error = (codes - np.repeat(zeros, 64, 1).astype(float)) * np.repeat(scale, 64, 1) - values
        return float(np.einsum("ri,ij,rj->", error, gram, error))

    assert loss(found) < 0.5 * loss(nearest)


def divergence(model, other, batches):
    """Mean squared difference of the logits of real tokens."""
    found = []
    for batch in batches:
        logits = [np.asarray(vp.forward(one, **batch)[0])[:, :-2] for one in (model, other)]
        found.append(np.mean((logits[0] - logits[1]) ** 2))
    return float(np.mean(found))


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_is_nearer_to_the_model(tmp_path, name):
    source = make_folder(tmp_path / "source", MODELS[name])
    model = vp.load(source)
    storage = vp.gptq(model, rows(model), quantize="w4a16", dtype="float32", image_weight=1.0)
    vp.save(model, tmp_path / "gptq", source_dir=source, dtype="float32", storage=storage)
    vp.save(model, tmp_path / "nearest", source_dir=source, dtype="float32", quantize="w4a16")
    rounded, nearest = (Checkpoint(tmp_path / one).tensors for one in ("gptq", "nearest"))
    assert {k: (v.dtype, v.shape) for k, v in rounded.items()} == {k: (v.dtype, v.shape) for k, v in nearest.items()}
    errors = [divergence(model, vp.load(tmp_path / one), rows(model)) for one in ("gptq", "nearest")]
    assert errors[0] < 0.7 * errors[1]
    assert "compressed-tensors (int4" in (tmp_path / "gptq" / "README.md").read_text()


@pytest.mark.parametrize(
    ("function", "options"), [("gptq", {"quantize": "w4a16", "symmetric": False}), ("imatrix", {})]
)
def test_an_interrupted_pass_continues_to_the_byte(monkeypatch, tmp_path, function, options):
    """With the weights in their files as well."""
    model = vp.load(make_folder(tmp_path / "source", TEXT))
    run = functools.partial(getattr(gptq, function), batches=rows(model, 4), **options)
    expected, visited, finite_sums = run(model), [], gptq.finite_sums

    def seen(sums, layer, *rest):
        visited.append(layer.number)
        return finite_sums(sums, layer, *rest)

    monkeypatch.setattr(gptq, "finite_sums", seen)
    monkeypatch.setattr("vlmprune_jax.core.prune.gptq.finite_sums", seen)

    def stop(done):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, progress=stop, cache=ArrayCache(tmp_path / "parts", {}))
    found = run(open_model(tmp_path / "source"), cache=ArrayCache(tmp_path / "parts", {}))
    assert visited == [0, 1, 2]
    name = "codes" if function == "gptq" else "means"
    ours, theirs = (jax.tree.flatten(getattr(one, name)) for one in (found, expected))
    assert ours[1] == theirs[1]
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(ours[0], theirs[0], strict=True))


@pytest.mark.slow
def test_unequal_layers_and_a_mesh(tmp_path):
    source = make_folder(tmp_path / "source", TEXT)
    model, _ = keep_width(vp.load(source), [0, 1], range(0, 128, 2), only=[1])
    folders = {"one": model, "mesh": on_mesh(model, 2, 2, 2)}
    for name, one in folders.items():
        storage = vp.gptq(one, rows(model), quantize="w4a16", group_size=32, symmetric=False)
        vp.save(one, tmp_path / name, source_dir=source, storage=storage)
    one, mesh = (vp.load(tmp_path / name) for name in folders)
    same = jax.tree.map(lambda a, b: float(np.mean(np.asarray(a) == np.asarray(b))), one.params, mesh.params)
    assert min(jax.tree.leaves(same)) > 0.98  # sums in another order move a code here and there
    refused("rounded no weight", vp.save, model, tmp_path / "pad", source_dir=source, uneven="pad", storage=storage)
    assert not (tmp_path / "pad").exists()


def test_what_cannot_be_rounded(tmp_path):
    model = vp.load(make_folder(tmp_path / "source", TEXT))
    refused("quantize 'q8_0' is not one of w8a16, w4a16, w8a8", vp.gptq, model, rows(model), quantize="q8_0")
    fact = "gptq has no setting 'answer_wieght'; did you mean 'answer_weight'"
    refused(fact, vp.gptq, model, rows(model), quantize="w4a16", answer_wieght=2)
    refused("there are no calibration batches", vp.gptq, model, [], quantize="w4a16")
    padding = [batch | {"attention_mask": 0 * batch["attention_mask"]} for batch in rows(model)]
    refused("contain only padding", vp.gptq, model, padding, quantize="w4a16")
    broken = model.replace(params=jax.tree.map(lambda leaf: leaf * np.float32(np.nan), model.params))
    refused(r"gptq: activations in layer 0 are not finite in row \d", vp.gptq, broken, rows(model), quantize="w4a16")


# vLLM on TPUs: which models and integers load -------------------------------------------------------------------------

WIDE = {**LLAMA, "hidden_size": 256, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDE |= {"intermediate_size": 256, "num_hidden_layers": 2}
SIZES = {name: WIDE[name] for name in ("hidden_size", "head_dim", "intermediate_size")}


@pytest.fixture(scope="module")
def configs(goldens):
    families, llama = goldens / "families", vp.families["llama"].from_hf(WIDE, None)
    heads = [shape.resized({"q_heads": 3, "kv_heads": 1}) for shape in llama.text.layers]
    return {
        "llama": llama,
        "mistral": vp.families["mistral"].from_hf({**WIDE, "model_type": "mistral"}, None),
        "qwen2": vp.families["qwen2"].from_hf({**QWEN2, **SIZES}, None),
        "llama, written as mistral": llama.with_layers(heads),
        **{name: read_config(families / name / "ckpt")[1] for name in ("qwen3_vl", "qwen2_5_vl", "gemma4", "smolvlm")},
    }


STORED = {
    "w8a8": CompressedTensors(8, activations=True), "w8a16": CompressedTensors(8), "w4a16": CompressedTensors(4, 64),
    "zeros": CompressedTensors(4, 64, symmetric=False), "groups of 128": CompressedTensors(4, 128),
}  # fmt: skip
LOADS = {
    "llama": {"w4a16", "groups of 128"}, "mistral": {"w8a8"}, "qwen2": set(), "llama, written as mistral": {"w8a8"},
    "qwen3_vl": {"w8a8"}, "qwen2_5_vl": set(), "gemma4": set(),
}  # fmt: skip
FACTS = {
    ("w8a16", 1): "w8a16 loads in no class: use symmetric w4a16",
    ("zeros", 1): "zero points do not load",
    ("groups of 128", 4): "each of 4 chips needs whole key/value heads and groups of 128",
    ("w8a8", 1): "w8a8 does not load in the JAX class of llama",
}


def test_integers_that_load(configs):
    assert {*SCHEMES} < {*STORED}
    for name, loads in LOADS.items():
        assert why_not(configs[name], "vllm_tpu") is None
        for scheme, storage in STORED.items():
            if scheme in loads:
                gptq.check_on_tpus(configs[name], storage, 1)
            else:
                refused("loads_in='vllm_tpu'", gptq.check_on_tpus, configs[name], storage, 1)
    for (scheme, tensor), fact in FACTS.items():
        refused(f"loads_in='vllm_tpu'.*{fact}", gptq.check_on_tpus, configs["llama"], STORED[scheme], tensor)
    assert "has no class for smolvlm" in why_not(configs["smolvlm"], "vllm_tpu")


def test_exports_for_tpus(tmp_path):
    source = make_folder(tmp_path / "source", WIDE)
    model, plan = keep_layers(vp.load(source), [0])
    asked = dataclasses.replace(plan, options={"loads_in": ["vllm_tpu"], "tensor_parallel": 2})
    options = {"source_dir": source, "plan": asked}
    vp.save(model, tmp_path / "out", **options, quantize="w4a16", group_size=64)
    refused("w8a16 loads in no class", vp.save, model, tmp_path / "no", **options, quantize="w8a16")


# Importance files of llama.cpp: sums of squares as PyTorch's modules see their inputs ---------------------------------

LINEAR = {
    "llama": (LLAMA, {"attn_q": "q_proj", "attn_output": "o_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}),
    "phi3": (
        {key: value for key, value in PHI3.items() if key not in ("rope_scaling", "sliding_window")},
        {"attn_qkv": "qkv_proj", "attn_output": "o_proj", "ffn_up": "gate_up_proj", "ffn_down": "down_proj"},
    ),
}
WEIGHTS = {"prompt_weight": 1.0, "answer_weight": 0.25}


def model_of(folder, config):
    folder = make_folder(folder, {**config, "vocab_size": 260, "max_position_embeddings": 96, "hidden_act": "silu"})
    return byte_tokenizer(folder), vp.load(folder)


def questions():
    """(batch, what each token counts): questions, answers, and padding at the end of some rows."""
    ids = np.random.default_rng(0).integers(4, 260, (4, 12)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1:3, -3:] = 0
    labels = np.where((np.arange(12) >= 7) & (mask > 0), ids, -100)
    counts = mask * np.where(labels == -100, WEIGHTS["prompt_weight"], WEIGHTS["answer_weight"])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}, counts


def opened(folder):
    return GGUFReader(next(folder.glob("imatrix-*.gguf_file")))


@pytest.mark.parametrize("name", LINEAR)
def test_sums_are_those_of_the_inputs(tmp_path, name):
    config, modules = LINEAR[name]
    source, model = model_of(tmp_path / "model", config)
    batch, counts = questions()
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
    weighed = vp.imatrix(model, [questions()[0]])
    vp.save(model, tmp_path / "out", source_dir=source, format="gguf", uneven="pad", imatrix=weighed)
    found = {one.name: one.data[0] for one in opened(tmp_path / "out").tensors}
    for tensor, width, real in (("ffn_down", 56, 25), ("attn_output", 6 * 12, 2 * 12)):
        sums = found[f"blk.1.{tensor}.weight.in_sum2"]
        assert (sums.size, np.count_nonzero(sums)) == (width, real)
    options = {"source_dir": source, "format": "gguf", "imatrix": weighed}
    refused("the importance matrix belongs to another model", vp.save, whole, tmp_path / "no", **options)
    options |= {"quantize": "q8_0"}
    refused("needs a GGUF file without quantisation.*not 'q8_0'", vp.save, model, tmp_path / "no", **options)


def test_llama_cpp_reads_it(tmp_path):
    """Its own reader finds the keys."""
    xllamacpp = pytest.importorskip("xllamacpp")
    source, model = model_of(tmp_path / "model", LLAMA)
    importance = vp.imatrix(model, [questions()[0]])
    vp.save(model, tmp_path / "out", source_dir=source, format="gguf", imatrix=importance)
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
