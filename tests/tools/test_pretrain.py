"""Pretraining: tokenizer, records and stages of the demo's teacher, and the folder that joins a model and a tower."""

import dataclasses
import json
import re
import runpy
from pathlib import Path

import easy_vqa
import numpy as np
import PIL.Image
import pretrain
import pytest
from block_cases import packed
from hf_cases import LLAMA, make_folder
from initial import write_joined, write_random
from pretrain import Stage, describe, make_encoder, mixed_in, split_conversations, stage_records
from pretrain_tokens import get_config as tokens_config
from refusal import refused
from repository import ROOT
from rounding import assert_same_function, double_logits
from vlm_cases import images_of
from vocabulary import make_tokenizer

from vlmprune_jax.core.models.params import flatten
from vlmprune_jax.core.models.vlm import tower_features
from vlmprune_jax.core.recovery.config import RecoverConfig
from vlmprune_jax.core.recovery.metrics import read_metrics
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.data.chat_template import chat_prompt, prompt_of
from vlmprune_jax.io.data.prompts import load_tokenizer, tokenize_training
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.io.families import templates
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.demo.topics import topic_records, topics

TEACHER = ROOT / "vlmprune_jax/demo/teacher"
CONFIG = ROOT / "tools/pretrain_easyvqa.py"
TURNS = (("human", "<image>\nis it red?"), ("gpt", "yes"), ("human", "is it blue?"), ("gpt", "no"))
RECORD = Record(id="r", images=(Path("0.png"),), turns=TURNS)


def entry(*turns):
    speakers = ("human", "gpt") * len(turns)
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in zip(speakers, turns, strict=False)]}


def test_conversations_are_split_and_described():
    first, second = split_conversations([RECORD], 1)
    assert (first.id, second.id) == ("r-0", "r-1")
    assert second.turns == (("human", "<image>\nis it blue?"), ("gpt", "no"))
    assert describe(second, "red circle", 5) == Record(
        id="r-1", images=(), turns=(("human", "red circle red circle red\nis it blue?"), ("gpt", "no"))
    )


@pytest.mark.parametrize(("words", "also_images", "expected"), [(0, False, "i"), (2, False, "w"), (2, True, "wi")])
def test_a_stage_sees_images_words_or_both(tmp_path, words, also_images, expected):
    files = {"images": tmp_path, "train": tmp_path / "train.json", "train_captions": tmp_path / "captions.json"}
    for name, turns in (("train", [text for _, text in TURNS]), ("train_captions", ("<image>\n?", "red box"))):
        files[name].write_text(json.dumps([{"id": "r", "image": "0.png", **entry(*turns)}]))
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    stage = Stage("s", "train", 1, words, 1, "none", ".*", RecoverConfig(steps=1), also_images)
    found = stage_records(stage, files)
    assert "".join("i" if record.images else "w" for record in found) == "".join(2 * kind for kind in expected)
    assert all(record.images or record.turns[0][1].startswith("red box\n") for record in found)


def test_text_is_mixed_in():
    """As large a share as asked for, every piece of its half before any comes again."""
    records = topic_records(0, 500)
    rows, pieces = mixed_in(records, 0.75, 700), len(records)
    assert len({row.id for row in rows}) == len(rows) == 2100
    assert rows[0].turns == rows[pieces].turns != rows[1].turns
    assert len({row.turns for row in rows}) == pieces
    assert not any(row.images for row in rows)
    assert rows[0].turns[1][1] in topics(0)
    assert rows[0].turns[1][1] not in topics(1)


def test_a_stage_of_text_alone_or_of_no_run_is_refused():
    stage = ("s", "train", 1, 0, 1, "none", ".*", RecoverConfig(steps=1))
    refused("stage s: text_share=1.0 must be at least 0 and below 1", Stage, *stage, text_share=1.0)
    refused("stage s: runs=0 must be at least 1", Stage, *stage, runs=0)


@pytest.mark.slow
def test_pretraining_changes_what_a_stage_keeps_resumes_and_goes_on_until_it_is_learnt(tmp_path, capsys):
    config = tmp_path / "short.py"
    config.write_text(f'''
import importlib.util

spec = importlib.util.spec_from_file_location("pretrain", "{CONFIG}")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)


def get_config():
    config = module.get_config()
    config.architecture.text_config.num_hidden_layers = 2
    config.stages = config.stages[:2]
    for stage in config.stages:
        stage.update(steps=2, warmup_ratio=0.0, batch_size=4, decoder_layers=min(stage.decoder_layers, 2))
    config.stages[1].text_share = 0.5
    return config
''')
    command = [f"--config={config}", f"--workdir={tmp_path / 'w'}"]
    assert main(command, pretrain) == 0, capsys.readouterr().err
    before, after = (flatten(load(tmp_path / "w" / name).params) for name in ("initial", "teacher"))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    # "tower" keeps the tower, "words" trains the decoder; nothing else may move.
    assert {path.split("/")[0] for path in changed} == {"vision", "text"}
    assert main([*command, "--overwrite"], pretrain) == 0, capsys.readouterr().err
    again = flatten(load(tmp_path / "w/teacher").params)
    for path, leaf in after.items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)
    weights = (tmp_path / "w/teacher/model.safetensors").read_bytes()
    stubborn = "text_share = 0.5\n    config.stages[1].update(until_loss=0, runs=2)"
    config.write_text(config.read_text(encoding="utf-8").replace("text_share = 0.5", stubborn), encoding="utf-8")
    capsys.readouterr()
    assert main([*command, "--overwrite"], pretrain) == 2
    message = r"stage words: its loss is \d\.\d+ after 2 runs, and the next stage needs 0: give it more `steps`"
    assert re.search(message, capsys.readouterr().err)
    first, second = (read_metrics(tmp_path / "w" / name / "metrics.jsonl")[-1] for name in ("words", "words-2"))
    assert second["loss"] < first["loss"]
    assert (tmp_path / "w/teacher/model.safetensors").read_bytes() == weights


def test_scripts_run_as_files(tmp_path, monkeypatch, capsys):
    """Every script of the folder shows its own command in --help, from any folder."""
    scripts = [file for file in (ROOT / "tools").glob("*.py") if "main(script=" in file.read_text(encoding="utf-8")]
    assert {file.name for file in scripts} == {"moving_shapes.py", "pretrain.py", "study.py"}
    monkeypatch.chdir(tmp_path)
    for file in scripts:
        monkeypatch.setattr("sys.argv", [str(file), "--help"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(file), run_name="__main__")
        assert capsys.readouterr().out.startswith(f"python tools/{file.name} ")


def test_the_processor_gives_our_ids(tmp_path):
    from transformers import AutoProcessor

    turns = ("<image>\nis it a red box?", "no", "what is it?", "triangle")
    make_tokenizer([entry(*turns)], tmp_path / "t", image_size=64, patch_size=8)
    make_tokenizer([entry(*turns[2:]), entry(*turns[:2])], tmp_path / "again", image_size=64, patch_size=8)
    for file in (tmp_path / "t").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<pad>", "<image>"]) == [0, 1, 2, 3, 4]
    text = "naïve ☕ 你好\t42"
    assert tokenizer.decode(tokenizer(text)["input_ids"][1:]) == text
    PIL.Image.new("RGB", (64, 64), "red").save(tmp_path / "0.png")
    record = Record("r", tuple(zip(("human", "gpt") * 2, turns, strict=True)), (tmp_path / "0.png",))

    bare = dataclasses.replace(templates()["llava_v1"], system="")
    ids, labels = tokenize_training(record, tokenizer, bare, image_token_id=4, tokens_per_image=64, cut_text_at=None)
    assert tokenizer.decode(labels[labels >= 0]) == " no</s> triangle</s>"
    messages = [{"role": role, "content": [{"type": "text", "text": text.removeprefix("<image>\n")}]}
                for role, text in zip(("user", "assistant") * 2, turns, strict=True)]  # fmt: skip
    messages[0]["content"].insert(0, {"type": "image", "image": PIL.Image.open(tmp_path / "0.png")})
    processor = AutoProcessor.from_pretrained(tmp_path / "t", local_files_only=True)
    whole = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert whole["input_ids"][0] == ids.tolist()


# --- the folder that training starts from -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("qwen3_vl", ((64, 16), (48, 9), (32, 4), (20, 4), (100, 16))), ("qwen3_5", ((64, 9), (20, 9)))],
)
def test_a_qwen_vl_of_random_weights(tmp_path, family, sizes):
    """Every word of the data set is one token, images have the tokens of their size, the tower is LLaVA's."""
    (tmp_path / "records.json").write_text(json.dumps([{"id": "r", **entry("<image>\nis it red?", "no")}]))
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
        PIL.Image.new("RGB", (side, side)).save(tmp_path / f"{side}.png")
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
    refused("has a vision tower of its own", write_joined, tmp_path / "again", TEACHER, TEACHER, seed=1)
    refused("has no CLIP tower", write_joined, tmp_path / "again", decoder, decoder, seed=1)
