"""Every cell of the support matrix: (family, source layout) x target layout x (depth, width, uneven kept | padded).

A folder that transformers can load, by a stock class or by the shipped file, is loaded in torch with both versions and
its logits are compared. A hub layout written back (target "source") needs the hub's own code, which is not ours to run:
it is reloaded in JAX.
"""

import json

import numpy as np
import pytest
from decoder_cases import MISTRAL, PHI, PHI3, QWEN2, QWEN3
from hf_cases import LFM2_VL, LLAMA, keep_layers, keep_width, make_folder, make_vlm_folder, random_ids
from rounding import assert_same_function, double_logits
from torch_compat import VERSIONS
from vlm_cases import (
    TEXTS,
    TOWERS,
    gemma3_config,
    internvl_chat_config,
    internvl_config,
    llava_config,
    qwen_vl_config,
    smolvlm_config,
)

import vlmprune_jax as vp
from vlmprune_jax.io.families import detect

CAUSAL, IMAGES = "AutoModelForCausalLM", "AutoModelForImageTextToText"
GOLDEN = {"llava_orig": "clip_tower", "bunny": "siglip_tower", "internvl": None}
NATIVE = {
    **{"llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3, "phi": PHI, "phi3": PHI3},
    **{f"llava-{tower}-{text}": llava_config(text, tower) for tower in TOWERS for text in TEXTS},
    **{f"internvl-{text}": internvl_config(text) for text in ("llama", "qwen2", "qwen3", "phi3")},
    "smolvlm-llama": smolvlm_config("llama"),
    "gemma3": gemma3_config(),
    **{name: qwen_vl_config(name) for name in ("qwen3_vl", "qwen2_5_vl")},
}
# The chat layout with pixel shuffle v2, the only one that transformers has, and a decoder that is not Phi-3.
CHAT = {f"internvl_chat-{t}": internvl_chat_config(t) | {"ps_version": "v2"} for t in ("llama", "qwen2")}
for _config in CHAT.values():
    _config["force_image_size"] = _config["vision_config"]["image_size"]
CELLS = [
    *((name, "transformers") for name in NATIVE),
    *((name, target) for name in (*GOLDEN, *CHAT) for target in ("transformers", "source")),
]
QUICK = {("phi3", "transformers"), ("internvl", "source")}


def uneven(model):
    """No layer is whole, and no two neighbours are alike."""
    layers = model.cfg.text.layers
    heads = layers[0].mixer.kv_heads
    pieces = [(range(max(1, heads - 1 - i % 2)), range(i, 38 + 6 * (i % 2))) for i in range(len(layers))]
    pruned = model
    for i, (kv_heads, neurons) in enumerate(pieces):
        pruned, _ = keep_width(pruned, kv_heads, neurons, only=[i])
    return pruned


def fewer_heads(model):
    """All layers lose the same heads and neurons; neurons alone where the class has no other size of a head."""
    heads = model.cfg.text.layers[0].mixer.kv_heads
    return keep_width(model, range(0 if model.cfg.text.whole_heads else 1, heads), range(3, 51))[0]


MODES = {
    "depth": (lambda model: keep_layers(model, [0, 2])[0], "refuse"),
    "width": (fewer_heads, "refuse"),
    "per_layer": (uneven, "per_layer"),
    "pad": (uneven, "pad"),
}


@pytest.fixture(scope="module")
def sources(goldens, tmp_path_factory):
    """Callable name -> (folder, model), made once."""
    made = {}

    def source(name):
        if name not in made:
            if name in GOLDEN:
                folder, tower = goldens / "ckpt" / name, GOLDEN[name] and goldens / "ckpt" / GOLDEN[name]
            else:
                config, tower = {**NATIVE, **CHAT}[name], None
                make = make_vlm_folder if "vision_config" in config else make_folder
                folder = make(tmp_path_factory.mktemp("source") / name, config)
            made[name] = folder, tower, vp.load(folder, vision_dir=tower)
        return made[name]

    return source


@pytest.mark.parametrize(
    ("name", "target"),
    [pytest.param(*c, marks=() if c in QUICK else pytest.mark.slow, id="-to-".join(c)) for c in CELLS],
)
def test_cell(sources, torch_outputs, tmp_path, name, target):
    source, tower, model = sources(name)
    expected = {}
    for mode, (prune, policy) in MODES.items():
        pruned, out = prune(model), tmp_path / mode
        vp.save(pruned, out, source_dir=source, layout=target, uneven=policy, dtype="float32")
        inputs = random_ids(pruned)
        if prune not in expected:
            expected[prune] = np.asarray(vp.forward(pruned, **inputs)[0])
        compare(out, pruned, inputs, expected[prune], target, tower, torch_outputs)


def compare(out, pruned, inputs, expected, target, tower, torch_outputs):
    """The folder's logits in both versions of torch, or in JAX where only the hub's code loads it."""
    config = json.loads((out / "config.json").read_text())
    if target == "source":
        again = vp.load(out, vision_dir=tower)
        assert_same_function(double_logits(again, **inputs), double_logits(pruned, **inputs), str(out))
        return
    ships = (out / "modeling_per_layer.py").is_file()
    assert ships == (out.name == "per_layer")
    image = config.get("image_token_id", config.get("image_token_index"))
    if image is not None:
        ids = inputs["input_ids"]
        inputs = inputs | {"input_ids": np.where(ids == pruned.cfg.image_token_id, image, ids)}
    auto = CAUSAL if image is None else IMAGES
    by_row = detect(config, "matrix").stock.by_row
    inputs = {name: array for name, array in inputs.items() if array is not None}
    if pruned.cfg.text.sees_images:
        inputs = inputs | {"token_type_ids": (inputs["input_ids"] == image).astype(int)}
    if by_row:
        inputs = inputs | {"pixel_values": inputs["pixel_values"][:, None]}
    for version in VERSIONS:
        if by_row and version == "4.57":  # takes the wrong positions for an image in float32: texts alone
            inputs = {"input_ids": inputs["input_ids"][:, -17:]}
            expected = np.asarray(vp.forward(pruned, **inputs)[0])
        found = torch_outputs(out, inputs, class_name=auto, version=version, trust_remote_code=ships)["logits"]
        found = found[..., : expected.shape[-1]]
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0, err_msg=f"{out} in {version}")


def test_every_family_is_in_the_matrix(goldens):
    configs = [*NATIVE.values(), *CHAT.values()]
    configs += [json.loads((goldens / "ckpt" / name / "config.json").read_text()) for name in GOLDEN]
    # classes that hold no unequal layers: tests/families
    for name in ("gemma4", "qwen3_5", "qwen3_5_moe", "qwen3_vl_moe", "internvl_moe"):
        configs.append(json.loads((goldens / "families" / name / "ckpt/config.json").read_text()))
    configs.append(configs[-1]["text_config"])  # Qwen3-MoE alone
    configs += [LFM2_VL, LFM2_VL["text_config"]]
    assert {detect(config, "matrix") for config in configs} == set(vp.families.values())
