"""Pretraining of the demo's teacher: its tokenizer, records of a stage, resuming, and stages that run again."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pretrain
import pytest
from pretrain import Stage, describe, mixed_in, split_conversations, stage_records
from repository import ROOT
from vocabulary import make_tokenizer

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.models.params import flatten
from vlmprune_jax.core.recovery.config import RecoverConfig
from vlmprune_jax.core.recovery.metrics import read_metrics
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.data.prompts import load_tokenizer, tokenize_training
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.io.families import templates
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.demo.topics import topic_records, topics

CONFIG = ROOT / "tools/pretrain_easyvqa.py"
TURNS = (("human", "<image>\nis it red?"), ("gpt", "yes"), ("human", "is it blue?"), ("gpt", "no"))
RECORD = Record(id="r", images=(Path("0.png"),), turns=TURNS)


def test_conversations_are_split_and_described():
    first, second = split_conversations([RECORD], 1)
    assert (first.id, second.id) == ("r-0", "r-1")
    assert second.turns == (("human", "<image>\nis it blue?"), ("gpt", "no"))
    assert describe(second, "red circle", 5) == Record(
        id="r-1", images=(), turns=(("human", "red circle red circle red\nis it blue?"), ("gpt", "no"))
    )


@pytest.mark.parametrize(("words", "also_images", "expected"), [(0, False, "i"), (2, False, "w"), (2, True, "wi")])
def test_a_stage_sees_images_words_or_both(tmp_path, words, also_images, expected):
    entry = {"id": "r", "image": "0.png", "conversations": [{"from": s, "value": text} for s, text in TURNS]}
    caption = {
        **entry,
        "conversations": [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "red box"}],
    }
    files = {"images": tmp_path, "train": tmp_path / "train.json", "train_captions": tmp_path / "captions.json"}
    files["train"].write_text(json.dumps([entry]), encoding="utf-8")
    files["train_captions"].write_text(json.dumps([caption]), encoding="utf-8")
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
    with pytest.raises(UserError, match=r"stage s: text_share=1.0 must be at least 0 and below 1"):
        Stage("s", "train", 1, 0, 1, "none", ".*", RecoverConfig(steps=1), text_share=1.0)
    with pytest.raises(UserError, match=r"stage s: runs=0 must be at least 1"):
        Stage("s", "train", 1, 0, 1, "none", ".*", RecoverConfig(steps=1), runs=0)


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


def test_scripts_run_as_files(tmp_path):
    """Every script of the folder shows its own command in --help, from any folder."""
    scripts = [file for file in (ROOT / "tools").glob("*.py") if "main(script=" in file.read_text(encoding="utf-8")]
    assert {file.name for file in scripts} == {"moving_shapes.py", "pretrain.py", "study.py"}
    for file in scripts:
        done = subprocess.run([sys.executable, file, "--help"], cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.startswith(f"python tools/{file.name} "), done.stderr


def entry(*turns):
    speakers = ("human", "gpt") * len(turns)
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in zip(speakers, turns, strict=False)]}


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
