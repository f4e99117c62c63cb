"""GGUF files in llama.cpp: every decoder and tower computes there what it computes here."""

import numpy as np
import pytest
from decoder_cases import MISTRAL, PHI, PHI3, QWEN2, QWEN3
from gguf_cases import byte_tokenizer, differences
from hf_cases import LLAMA, edit_weights, keep_layers, keep_width, make_folder
from llama_cpp import llama_cpp

from vlmprune_jax.errors import UserError
from vlmprune_jax.hf.export.write import save
from vlmprune_jax.hf.read import load
from vlmprune_jax.models.vlm import forward

pytest.importorskip("xllamacpp")
SMALL = {"vocab_size": 260, "hidden_act": "silu", "max_position_embeddings": 96}
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
    "phi3": PHI3,
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
}
CELLS = [(name, how) for name, held in HELD.items() for how in held]
QUICK = [("llama", UNEVEN), ("phi2", UNEVEN), ("qwen2", DEPTH)]


def prune(model, how):
    """Two layers, or the same heads and neurons of all, or other ones in each."""
    kv_heads = model.cfg.text.layers[0].kv_heads
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
            folder = make_folder(tmp_path_factory.mktemp("gguf") / name, {**CASES[name], **SMALL,
                                 "hidden_act": CASES[name]["hidden_act"] if name == "phi2" else "silu"})  # fmt: skip
            edit_weights(
                folder, lambda tensors: {k: v if "norm" in k else v * np.float32(0.5) for k, v in tensors.items()}
            )
            made[name] = byte_tokenizer(folder), load(folder)
        return made[name]

    return make


def architecture(folder):
    from gguf import GGUFReader

    path = next(path for path in folder.glob("*.gguf") if not path.name.startswith("mmproj"))
    return GGUFReader(path).fields["general.architecture"].contents()


def compare(out, model, tolerance=0.1):
    """Log-probabilities in llama.cpp; short enough for every window and for LongRoPE's short factors."""
    window = min([30, *(one.window for one in model.cfg.text.layers if one.window is not None)])
    ids = np.random.default_rng(0).integers(4, 260, (1, window))
    found = llama_cpp(out, rows=ids)["logits"][0]
    largest, mean, _ = differences(forward(model, ids)[0][0], found)
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
        with pytest.raises(UserError, match=r'llama\.cpp.s .* has no .*export with uneven="pad"'):
            save(model, tmp_path / "out", **options)
        held, options = HELD[name].get(DEPTH, HELD[name].get(WIDTH)), options | {"uneven": "pad"}
    save(model, tmp_path / "out", **options)
    assert ("padded with zero heads" in (tmp_path / "out/README.md").read_text()) == ("uneven" in options)
    assert architecture(tmp_path / "out") == held
    compare(tmp_path / "out", model)
