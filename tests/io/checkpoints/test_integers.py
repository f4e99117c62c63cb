"""vLLM on TPUs: which models and integers load."""

import dataclasses

import pytest
from decoder_cases import QWEN2
from hf_cases import LLAMA, keep_layers, make_folder

import vlmprune_jax as vp
from vlmprune_jax.core.limits import why_not
from vlmprune_jax.io.checkpoints.disk.compressed_tensors import SCHEMES, CompressedTensors
from vlmprune_jax.io.checkpoints.read import read_config
from vlmprune_jax.io.exports.gptq import check_on_tpus

WIDE = {**LLAMA, "hidden_size": 256, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDE |= {"intermediate_size": 256, "num_hidden_layers": 2}
CONFIGS = {
    "llama": WIDE,
    "mistral": {**WIDE, "model_type": "mistral", "architectures": ["MistralForCausalLM"]},
    "qwen2": {**QWEN2, **{name: WIDE[name] for name in ("hidden_size", "head_dim", "intermediate_size")}},
}
LOADS = {"llama": {"w4a16"}, "mistral": {"w8a8"}, "qwen2": set()}
GOLDENS = {"qwen3_vl": {"w8a8"}, "qwen2_5_vl": set(), "gemma4": set(), "smolvlm": None}
STORED = {
    "w8a8": CompressedTensors(8, activations=True),
    "w8a16": CompressedTensors(8),
    "w4a16": CompressedTensors(4, 64),
}


def config_of(name):
    family = vp.families[name]
    return family.from_hf(CONFIGS[name], None)


def loading(cfg):
    def loads(name):
        try:
            check_on_tpus(cfg, STORED[name], 1)
        except vp.UserError:
            return False
        return True

    return {name for name in SCHEMES if loads(name)}


@pytest.mark.parametrize("name", CONFIGS)
def test_integers_that_load(name):
    cfg = config_of(name)
    assert loading(cfg) == LOADS[name]


@pytest.mark.parametrize("name", GOLDENS)
def test_families(goldens, name):
    _, cfg = read_config(goldens / "families" / name / "ckpt")
    if GOLDENS[name] is None:
        assert why_not(cfg, "vllm_tpu") == f"tpu-inference 0.32 has no class for {name}: serve it with another engine"
    else:
        assert why_not(cfg, "vllm_tpu") is None
        assert loading(cfg) == GOLDENS[name]


def test_fewer_heads_of_llama_are_written_as_mistral():
    cfg = config_of("llama")
    cfg = cfg.with_layers([shape.resized({"q_heads": 3, "kv_heads": 1}) for shape in cfg.text.layers])
    assert loading(cfg) == {"w8a8"}


@pytest.mark.parametrize(
    ("storage", "tensor", "said"),
    [
        (CompressedTensors(8), 1, "w8a16 loads in no class: use symmetric w4a16"),
        (CompressedTensors(4, 64, symmetric=False), 1, "zero points do not load: use symmetric w4a16"),
        (CompressedTensors(4, 128), 4, "each of 4 chips needs whole key/value heads and groups of 128: use a smaller"),
        (
            CompressedTensors(8, activations=True),
            1,
            "w8a8 does not load in the JAX class of llama: use symmetric w4a16",
        ),
    ],
)
def test_refused_integers(storage, tensor, said):
    with pytest.raises(vp.UserError, match="loads_in='vllm_tpu'") as error:
        check_on_tpus(config_of("llama"), storage, tensor)
    assert said in str(error.value)


def test_export(tmp_path):
    source = make_folder(tmp_path / "source", WIDE)
    model, plan = keep_layers(vp.load(source), [0])
    asked = dataclasses.replace(plan, options={"loads_in": ["vllm_tpu"], "tensor_parallel": 2})
    vp.save(model, tmp_path / "out", source_dir=source, plan=asked, quantize="w4a16", group_size=64)
    with pytest.raises(vp.UserError, match="w8a16 loads in no class"):
        vp.save(model, tmp_path / "no", source_dir=source, plan=asked, quantize="w8a16")
