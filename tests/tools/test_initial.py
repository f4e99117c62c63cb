"""The folder that joins a language model and a tower."""

import dataclasses
import json
from pathlib import Path

import easy_vqa
import numpy as np
import pytest
from hf_cases import LLAMA, make_folder
from initial import write_joined
from pretrain import make_encoder
from repository import ROOT

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.data.records import Record
from vlmprune_jax.hf.read import load
from vlmprune_jax.models.features import tower_features
from vlmprune_jax.models.vlm import forward

TEACHER = ROOT / "vlmprune_jax/demo/teacher"


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
    np.testing.assert_array_equal(forward(joined, ids)[0][..., :310], forward(language, ids)[0])
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
        pixels = encoder.images(seen, encoder.shape_of([seen]))["pixel_values"]
        tower = {name: leaf for name, leaf in model.params["vision"].items() if name != "post_layernorm"}
        features.append(np.asarray(tower_features(tower, bare, pixels)))
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
