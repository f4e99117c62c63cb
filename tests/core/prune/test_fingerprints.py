"""Plans and scores that users have stay valid: the fingerprints of models do not change between versions."""

import pytest
from prune_cases import UNEQUAL, config, llava_7b, model

import vlmprune_jax as vp
from vlmprune_jax.core.prune import fingerprint
from vlmprune_jax.core.prune.fingerprints import content_digest, shape_digest
from vlmprune_jax.io.checkpoints.read import open_model

# Folder, its tower's -> fingerprint, and digest of the tower alone (in feature caches), as version 0.1 had them.
RECORDED = {
    ("llava_hf", None): ("902ec3b7b450-2a789f82436b315f", "0685091b6ee933bd"),
    ("llava_orig", "clip_tower"): ("df4a8ed235a6-eb6da374909e978d", "0685091b6ee933bd"),
    ("bunny", "siglip_tower"): ("7f78d53b9f52-a3eb288d3ff95d00", "0c97bb3f1a591618"),
    ("internvl", None): ("2810277b6788-642eeb491504e34a", "51796fc2d809e09f"),
    ("llama_gqa", None): ("cff8283a927b-69f816189e457871", None),
}


@pytest.mark.parametrize("name", RECORDED, ids=lambda name: name[0])
def test_golden_models(goldens, name):
    folder, tower = goldens / "ckpt" / name[0], name[1] and goldens / "ckpt" / name[1]
    expected, of_tower = RECORDED[name]
    for one in (vp.load(folder, vision_dir=tower), open_model(folder, tower)):
        assert fingerprint(one) == expected
        assert of_tower is None or content_digest(one, "vision") == of_tower


def test_models_without_files():
    assert shape_digest(llava_7b()) == "d8b6a9ed2ff2"
    assert fingerprint(model(config(UNEQUAL, vision=True))) == "368d270bd755-10c272a11cc197fa"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gemma3", "3c4e3edce981-93272974e9356bcc"),
        ("qwen2_5_vl", "1871027a9195-f729ef883da4cde5"),
        ("qwen3_5", "ebecdf488f55-dd998ca9e02f683a"),
    ],
)
def test_repeated_patterns_of_layers(goldens, name, expected):
    """As when every group of equal neighbours was a scan of its own."""
    assert fingerprint(vp.load(goldens / "families" / name / "ckpt")) == expected
