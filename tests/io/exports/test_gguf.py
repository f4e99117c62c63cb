"""GGUF files in llama.cpp: every decoder computes there what it computes here; types, files and what is refused."""

import shutil

import ml_dtypes
import numpy as np
import pytest
from decoder_cases import MISTRAL, PHI, PHI3, QWEN2, QWEN3
from gguf import GGUFReader
from gguf.quants import dequantize
from gguf.quants import quantize as quantize_rows
from gguf_cases import byte_tokenizer, differences
from hf_cases import LLAMA, LLAVA, edit_weights, keep_layers, keep_width, make_folder
from llama_cpp import llama_cpp
from refusal import refused

import vlmprune_jax as vp
from vlmprune_jax.core.models.params import flatten, unflatten
from vlmprune_jax.io.exports.write import check_saved

pytest.importorskip("xllamacpp")
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
CASES = {
    "llama": LLAMA,
    "llama-biased": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama3": {**LLAMA, "rope_scaling": LLAMA3},
    "yarn": {**LLAMA, "rope_scaling": YARN},
    "linear": {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "mistral": MISTRAL,
    "qwen2": {**{k: v for k, v in QWEN2.items() if k != "head_dim"}, "num_attention_heads": 4,
              "num_key_value_heads": 2},
    "qwen3": {**QWEN3, "attention_bias": False},
    "phi2": {**{k: v for k, v in PHI.items() if k != "head_dim"}, "num_attention_heads": 4,
             "num_key_value_heads": 4, "hidden_act": "gelu_new"},
    "phi3": {**PHI3, "original_max_position_embeddings": 256, "max_position_embeddings": 512},
    "phi3-long": {**PHI3, "sliding_window": None},
}  # fmt: skip
DEPTH, WIDTH, UNEVEN = "depth", "width", "uneven"
# What becomes of a pruned decoder: the architecture of the file, None where none has such widths.
HELD = {
    "llama": {DEPTH: "llama", WIDTH: "llama", UNEVEN: "deci"},
    "llama-biased": {UNEVEN: "deci"},
    "llama3": {UNEVEN: "deci"},
    "yarn": {UNEVEN: "deci"},
    "linear": {WIDTH: "llama"},
    "tied": {DEPTH: "llama"},
    "mistral": {UNEVEN: "deci"},
    "qwen2": {DEPTH: "qwen2", WIDTH: "llama", UNEVEN: "deci"},
    "qwen3": {WIDTH: "qwen3", UNEVEN: None},
    "phi2": {DEPTH: "phi2", UNEVEN: None},
    "phi3": {DEPTH: "phi3", WIDTH: "llama", UNEVEN: "deci"},
    "phi3-long": {UNEVEN: "deci"},
}
CELLS = [(name, how) for name, held in HELD.items() for how in held]
QUICK = [("llama", UNEVEN), ("phi2", UNEVEN), ("qwen2", DEPTH)]


def prune(model, how):
    """Two layers, or the same heads and neurons of all, or other ones in each."""
    kv_heads = model.cfg.text.layers[0].mixer.kv_heads
    if how == DEPTH:
        return keep_layers(model, [0, 2])[0]
    if how == WIDTH:
        return keep_width(model, range(1, kv_heads), range(3, 51))[0]
    for i in range(len(model.cfg.text.layers)):
        model, _ = keep_width(model, range(max(1, kv_heads - 1 - i % 2)), range(i, 38 + 6 * (i % 2)), only=[i])
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Callable name -> (folder, model), made once."""
    made = {}

    def make(name):
        if name not in made:
            config = {"max_position_embeddings": 96, **CASES[name], "vocab_size": 260}
            config |= {"hidden_act": "gelu_new" if name == "phi2" else "silu"}
            folder = make_folder(tmp_path_factory.mktemp("gguf") / name, config)
            edit_weights(folder, lambda held: {k: v if "norm" in k else v * np.float32(0.5) for k, v in held.items()})
            made[name] = byte_tokenizer(folder), vp.load(folder)
        return made[name]

    return make


def opened(folder):
    return GGUFReader(next(folder.glob("*.gguf")))


def architecture(folder):
    return opened(folder).fields["general.architecture"].contents()


def compare(out, model, tolerance=0.1):
    """Log-probabilities in llama.cpp, in rows that fit every window; LongRoPE's factors go by the context there."""
    tokens = min([50, *(one.mixer.window for one in model.cfg.text.layers if one.mixer.window is not None)])
    ids = np.random.default_rng(0).integers(4, 260, (1, tokens))
    found = llama_cpp(out, rows=ids, context=256)["logits"][0]
    largest, mean, _ = differences(vp.forward(model, ids)[0][0], found)
    assert largest <= tolerance, (largest, mean)
    return largest


@pytest.mark.parametrize(
    ("name", "how"), [pytest.param(*c, marks=() if c in QUICK else pytest.mark.slow, id="-".join(c)) for c in CELLS]
)
def test_decoders_compute_the_same(models, tmp_path, name, how):
    source, whole = models(name)
    model, held = prune(whole, how), HELD[name][how]
    options = {"source_dir": source, "format": "gguf", "dtype": "float32"}
    if held is None:
        refused(r'llama\.cpp.s .* has no .*export with uneven="pad"', vp.save, model, tmp_path / "out", **options)
        held, options = HELD[name].get(DEPTH, HELD[name].get(WIDTH)), options | {"uneven": "pad"}
    vp.save(model, tmp_path / "out", **options)
    assert ("padded with zero heads" in (tmp_path / "out/README.md").read_text()) == ("uneven" in options)
    assert architecture(tmp_path / "out") == held
    compare(tmp_path / "out", model)


# Types and files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "quantize", "name", "kinds"),
    [
        ("float32", "none", "llama-F32", {"F32"}),
        ("float16", "none", "llama-F16", {"F32", "F16"}),
        ("bfloat16", "none", "llama-BF16", {"F32", "BF16"}),
        ("bfloat16", "q8_0", "llama-Q8_0", {"F32", "F16", "Q8_0"}),
        ("bfloat16", "q5_1", "llama-Q5_1", {"F32", "F16", "Q8_0", "Q5_1"}),
        ("float32", "q4_0", "llama-Q4_0", {"F32", "F16", "Q8_0", "Q4_0"}),
    ],
)
def test_types(tmp_path, dtype, quantize, name, kinds):
    """Rows that are not whole blocks stay in F16 and are named; what is read back is what gguf's quantiser made."""
    config = {**LLAMA, "vocab_size": 260, "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 96}
    source = byte_tokenizer(make_folder(tmp_path / "llama", config))  # o_proj has rows of 6 heads of 12
    model = vp.load(source)
    vp.save(model, tmp_path / "out", source_dir=source, format="gguf", dtype=dtype, quantize=quantize)
    assert [path.name for path in sorted(tmp_path.glob("out/*"))] == ["README.md", f"{name}.gguf"]
    tensors = {one.name: one for one in opened(tmp_path / "out").tensors}
    assert {one.tensor_type.name for one in tensors.values()} == kinds
    card = (tmp_path / "out/README.md").read_text()
    assert ("Kept in F16" in card and "`blk.0.attn_output.weight`" in card) == (quantize != "none")
    for key, path in {"token_embd": "embed_tokens", "blk.1.ffn_down": "layers/0/mlp/down_proj"}.items():
        tensor, weight = tensors[f"{key}.weight"], np.asarray(flatten(model.params)[f"text/{path}/weight"])
        weight = weight[1] if "layers" in path else weight
        if tensor.tensor_type.name == "BF16":
            expected = weight.astype(ml_dtypes.bfloat16).astype(np.float32)
        else:
            expected = dequantize(quantize_rows(weight, tensor.tensor_type), tensor.tensor_type)
        np.testing.assert_array_equal(dequantize(tensor.data, tensor.tensor_type), expected)
    if quantize == "q4_0":
        assert check_saved(model, tmp_path / "out", source_dir=source, format="gguf")["backend"] == "llama.cpp"


def test_from_files_one_tensor_at_a_time(tmp_path, monkeypatch):
    """The same bytes as from memory, whatever the pieces in which rows are quantised."""
    source = byte_tokenizer(make_folder(tmp_path / "llama", {**LLAMA, "vocab_size": 260, "hidden_act": "silu"}))
    plan = keep_width(vp.load(source), [0, 2], range(32))[1]
    options = {"source_dir": source, "format": "gguf", "quantize": "q8_0"}
    vp.save(vp.apply_plan(vp.load(source), plan), tmp_path / "memory", **options)
    monkeypatch.setattr("vlmprune_jax.io.exports.gguf_model._CHUNK", 100)
    vp.prune_folder(source, plan, tmp_path / "files", format="gguf", dtype="bfloat16", quantize="q8_0")
    assert (tmp_path / "files/llama-pruned-Q8_0.gguf").is_file()
    said = {name: field.contents() for name, field in opened(tmp_path / "files").fields.items()}
    assert (said["general.basename"], said["general.finetune"]) == ("llama", "pruned")
    assert said["general.tags"] == ["vlmprune-jax", "pruned"]
    memory, files = ({t.name: t.data.tobytes() for t in opened(tmp_path / n).tensors} for n in ("memory", "files"))
    assert memory == files


NAMED = {
    "name": "org/My-Phi 3 7B",  # by the other spelling llama.cpp takes it for a Phi-3
    "basename": "My-Phi-3 7B", "finetune": None, "license": "apache-2.0", "license.link": "https://x.org/L",
    "languages": ["en", "pt-BR"], "tags": ["vlmprune-jax"], "file_type": 32,
}  # fmt: skip


def test_what_the_file_says(tmp_path):
    """Name, licence, marks, context up to the window, and the chat template."""
    config = {**MISTRAL, "vocab_size": 260, "hidden_act": "silu", "eos_token_id": [2, 5]}
    source = byte_tokenizer(make_folder(tmp_path / "mistral", config))
    (source / "README.md").write_text(
        "---\nlicense: apache-2.0\nlicense_link: 'https://x.org/L'\nlanguage:\n- en\n- pt-BR\n---\n# license: no\n"
    )
    (source / "LICENSE").write_text("text")
    vp.save(vp.load(source), tmp_path / "out", source_dir=source, format="gguf", name="org/My-Phi-3 7B")
    assert {path.name for path in tmp_path.glob("out/*")} == {"README.md", "LICENSE", "My-Phi-3-7B-BF16.gguf"}
    fields = {name: field.contents() for name, field in opened(tmp_path / "out").fields.items()}
    assert {name: fields.get(f"general.{name}") for name in NAMED} == NAMED
    assert fields["general.size_label"].endswith("K")
    assert fields["llama.context_length"] == 11
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.eot_token_id"]) == (2, 5)
    assert "USER:" in fields["tokenizer.chat_template"]
    card = (tmp_path / "out/README.md").read_text()
    assert "prune plan" not in card
    assert "Rows of 56 neurons are no whole blocks of 32" in card
    assert "no sliding window" in card


# What is refused ------------------------------------------------------------------------------------------------------


NOT_COMPUTED = {
    "activation": (LLAMA, "llama has no activation gelu_pytorch_tanh"),
    "biases": ({**QWEN3, "hidden_act": "silu"}, "qwen3 has no biases .qkv_bias, out_bias."),
    # 6 heads of 12 channels in 48
    "heads": ({**PHI, "hidden_act": "gelu_new"}, "needs 4 heads in equal groups .*, which zero heads cannot make"),
    "projector": (
        {**LLAVA, "text_config": {**LLAVA["text_config"], "hidden_act": "silu"}}, "projector with activation relu",
    ),
    "biases of Qwen3-VL": ("qwen3_vl", "qwen3vl has no biases .qkv_bias, out_bias."),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_COMPUTED)
def test_what_llama_cpp_does_not_compute(goldens, tmp_path, case):
    config, fact = NOT_COMPUTED[case]
    if isinstance(config, str):
        source = goldens / "families" / config / "ckpt"
    else:
        source = make_folder(tmp_path / "source", config if "text_config" in config else {**config, "vocab_size": 260})
        byte_tokenizer(source)
    options = {"source_dir": source, "format": "gguf", "uneven": "pad"}
    refused(fact, vp.save, vp.load(source), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"quantize": "q4_k"}, "quantize 'q4_k' is not one of none, .*q8_0"),
        ({"uneven": "refuse"}, 'no layers of unequal width.*uneven="pad"'),
        ({"format": "onnx"}, "format 'onnx' is not one of huggingface, gguf"),
    ],
)
def test_options_that_do_not_fit(models, tmp_path, options, fact):
    source, model = models("llama")
    model = prune(model, UNEVEN) if "uneven" in options else model
    refused(fact, vp.save, model, tmp_path / "out", **{"source_dir": source, "format": "gguf", **options})


def test_a_full_disk_and_weights_too_large_for_f16(tmp_path, models, monkeypatch):
    source, model = models("llama")
    options = {"source_dir": source, "format": "gguf", "dtype": "float16"}
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    refused("MiB are free", vp.save, model, tmp_path / "out", **options)
    monkeypatch.undo()
    flat = flatten(model.params)
    flat["text/lm_head/weight"] = flat["text/lm_head/weight"].at[3, 3].set(1e6)
    large = model.replace(params=unflatten(flat))
    refused("output.weight, to be written as F16", vp.save, large, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_an_export(tmp_path, models):
    """Neither overwritten nor loaded, and checked against the model."""
    source, model = models("llama")
    out, options = tmp_path / "out", {"source_dir": source, "format": "gguf"}
    vp.save(model, out, **options, dtype="float16")
    refused("exists already", vp.save, model, out, **options)
    vp.save(model, out, **options, overwrite=True, dtype="float32")
    for place in (out, next(out.glob("*.gguf"))):
        refused(r"is a GGUF file for llama\.cpp: name the Hugging Face folder", vp.load, place)
    other = model.replace(params=unflatten({k: v[..., ::-1] for k, v in flatten(model.params).items()}))
    refused("logits of the GGUF file differ", check_saved, other, out, **options)
