"""The folder that joins a language model and a tower."""

import dataclasses
import json
from pathlib import Path

import easy_vqa
import numpy as np
import pytest
from block_cases import packed
from hf_cases import LLAMA, make_folder
from initial import write_joined, write_random
from PIL import Image
from pretrain import make_encoder
from pretrain_tokens import get_config as tokens_config
from repository import ROOT
from rounding import assert_same_function, double_logits
from vlm_cases import images_of

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.models.params import flatten
from vlmprune_jax.core.models.vlm import tower_features
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.data.chat_template import chat_prompt, prompt_of
from vlmprune_jax.io.data.records import Record

TEACHER = ROOT / "vlmprune_jax/demo/teacher"


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("qwen3_vl", ((64, 16), (48, 9), (32, 4), (20, 4), (100, 16))), ("qwen3_5", ((64, 9), (48, 9), (20, 9)))],
)
def test_a_qwen_vl_of_random_weights(tmp_path, family, sizes):
    """Every word of the data set is one token, images have the tokens of their size, the tower is LLaVA's."""
    records = [
        {
            "id": "r",
            "conversations": [{"from": "human", "value": "<image>\nis it red?"}, {"from": "gpt", "value": "no"}],
        }
    ]
    (tmp_path / "records.json").write_text(json.dumps(records), encoding="utf-8")
    write_random(tmp_path / "qwen", tokens_config(family).architecture.to_dict(), [tmp_path / "records.json"], seed=1)
    model = load(tmp_path / "qwen")
    tower = {path: np.asarray(leaf) for path, leaf in flatten(model.params).items() if path.startswith("vision/")}
    (fc1,) = (leaf for path, leaf in tower.items() if path.endswith("mlp/fc1/weight"))
    (teachers,) = (
        leaf
        for path, leaf in flatten(load(TEACHER).params).items()
        if path.endswith("mlp/fc1/weight") and "vision" in path
    )
    np.testing.assert_array_equal(fc1, teachers)
    encoder = make_encoder(model.cfg, tmp_path / "qwen")
    chat = chat_prompt(tmp_path / "qwen", encoder.tokenizer, has_image=True)
    assert chat == prompt_of(encoder.template, has_image=True).replace(
        "<image>", "<|vision_start|><|image_pad|><|vision_end|>"
    )
    for side, tokens in sizes:
        Image.new("RGB", (side, side)).save(tmp_path / f"{side}.png")
        record = Record("r", (("human", "<image>\nis it red?"), ("gpt", "no")), (tmp_path / f"{side}.png",))
        ids = encoder.training_tokens(record)[0]
        assert (ids == model.cfg.image_token_id).sum() == tokens
        assert len(ids) == tokens + 17  # a token per word, newline and special token
    assert encoder.tokenizer.decode(ids[-3:]) == "no<|im_end|>\n"


def test_a_language_model_is_joined_with_a_tower(tmp_path):
    """What the language model computes of text stays, features are nearly the teacher's, the prompt is SmolVLM's."""
    decoder = make_folder(
        tmp_path / "decoder", {**LLAMA, "vocab_size": 310, "tie_word_embeddings": True, "max_position_embeddings": 128}
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (TEACHER / name).read_text(encoding="utf-8").replace("<image>", "<picture>")
        (decoder / name).write_text(text, encoding="utf-8")
    write_joined(tmp_path / "joined", decoder, TEACHER, seed=1)
    joined, language, teacher = load(tmp_path / "joined"), load(decoder), load(TEACHER)
    assert joined.cfg.text.vocab_size == 320  # the tokenizer has more words than the embeddings
    assert joined.cfg.image_token_id == 316
    assert joined.cfg.eos_token_ids == (317,)
    settings = json.loads((tmp_path / "joined/tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    ids = np.array([[7, 11, 300, 9]], np.int32)
    assert_same_function(double_logits(joined, input_ids=ids)[..., :310], double_logits(language, input_ids=ids))
    image = Path(easy_vqa.__file__).parent / "data/test/images/0.png"
    seen = Record("r", (("human", "<image>\nis it red?"), ("gpt", "yes")), (image,))
    encoder = make_encoder(joined.cfg, tmp_path / "joined")
    assert encoder.template.name == "smolvlm"
    assert (encoder.training_tokens(seen)[0] == 316).sum() == 16
    features = []
    for model, folder in ((teacher, TEACHER), (joined, tmp_path / "joined")):
        bare = dataclasses.replace(
            model.cfg, vision=dataclasses.replace(model.cfg.vision, post_norm=False), projector=joined.cfg.projector
        )
        encoder = make_encoder(model.cfg, folder)
        pixels = images_of(encoder, seen)["pixel_values"]
        tower = {name: leaf for name, leaf in model.params["vision"].items() if name != "post_layernorm"}
        features.append(np.asarray(tower_features(tower, bare, packed(pixels))))
    theirs, ours = features
    assert 0.9 < 1 - np.square(ours - theirs).sum() / np.square(theirs - theirs.mean((0, 1))).sum() < 1
    # A language model that knows the tokens already, and has more words than they need, keeps its rows.
    knowing = make_folder(tmp_path / "knowing", {**LLAMA, "vocab_size": 400, "tie_word_embeddings": True})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (knowing / name).write_bytes((tmp_path / "joined" / name).read_bytes())
    write_joined(tmp_path / "known", knowing, TEACHER, seed=1)
    assert (load(tmp_path / "known").cfg.text.vocab_size, load(tmp_path / "known").cfg.image_token_id) == (448, 316)
    with pytest.raises(UserError, match="has a vision tower of its own"):
        write_joined(tmp_path / "again", TEACHER, TEACHER, seed=1)
    with pytest.raises(UserError, match="has no CLIP tower"):
        write_joined(tmp_path / "again", decoder, decoder, seed=1)
