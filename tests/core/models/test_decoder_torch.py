"""Every decoder option of the Llama family against stock transformers on torch: logits of tiny models within 1e-4."""

import json

import numpy as np
import pytest
from hf_cases import LLAMA, make_folder
from torch_compat import VERSIONS

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.models.vlm import forward
from vlmprune_jax.io.checkpoints.read import load

LINEAR = {"rope_type": "linear", "factor": 2.5}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
OPTIONS = {
    "linear": {"rope_scaling": LINEAR},
    "linear_old_name": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama3": {"rope_scaling": LLAMA3},
    "yarn": {"rope_scaling": YARN},
    "yarn_options": {"rope_scaling": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3}},
    "head_dim_from_hidden_size": {"head_dim": 8},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None},
    "mistral_window": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 7},
}
# transformers 5 writes theta and scaling into one field.
ONLY_5 = {
    "v5_default": {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 700.0}},
    "v5_llama3": {"rope_theta": None, "rope_parameters": {**LLAMA3, "rope_theta": 700.0}},
}
CASES = [(name, version) for name in OPTIONS for version in VERSIONS] + [(name, "5") for name in ONLY_5]


@pytest.mark.parametrize(("name", "version"), CASES)
def test_logits(tmp_path, torch_outputs, name, version):
    changes = (OPTIONS | ONLY_5)[name]
    config = {key: value for key, value in {**LLAMA, **changes}.items() if value is not None or key == "sliding_window"}
    folder = make_folder(tmp_path / name, config)
    ids = np.random.default_rng(0).integers(6, 97, (2, 45))
    mask = np.ones_like(ids)
    mask[1, 30:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    found = torch_outputs(folder, inputs, class_name="AutoModelForCausalLM", version=version)
    logits, _ = forward(load(folder), **inputs)
    real = mask == 1
    np.testing.assert_allclose(logits[real], found["logits"][real], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"hidden_act": "mish"}, "'mish' is not one of"),
        ({"head_dim": 7}, "must be even"),
        ({"num_key_value_heads": 4}, "6 query heads are not divisible by 4 key/value heads"),
        ({"per_layer_shapes": [[6, 3, 56]]}, "lists 1 layers"),
    ],
)
def test_unsupported_options_are_refused(tmp_path, changes, part):
    folder = make_folder(tmp_path / "model", LLAMA)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    with pytest.raises(UserError, match=part):
        forward(load(folder), np.array([[1, 2]]))
