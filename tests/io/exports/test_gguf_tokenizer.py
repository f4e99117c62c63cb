"""Tokenizers in GGUF files: llama.cpp splits texts into the same tokens under every name that is given."""

import json
import shutil
from pathlib import Path

import pytest
from gguf_cases import SPECIALS, byte_tokenizer
from hf_cases import LLAMA, edit_config, make_folder
from llama_cpp import llama_cpp
from refusal import refused
from smollm2 import english_text
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import vlmprune_jax as vp
from vlmprune_jax.io.checkpoints.read import open_model
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.exports.gguf_tokenizer import make_vocabulary
from vlmprune_jax.io.families import detect
from vlmprune_jax.io.families.gguf import PRE, WHOLE_WORDS

pytest.importorskip("xllamacpp")
TEXTS = (
    "It's the 1st of 12345 don'ts, SHE'LL say: we've 3.14159 (or 2**10) camelCaseWords HTTPServer2go!",
    "def f(x):\n    return  x\n\n\n\tif a != b:\r\n  # ... \n",
    "naïve café — 你好，世界! Größe: 3½ kg ☕️ Ελληνικά русский язык हिन्दी עברית",
    "a  b   c \n \n d",
    "  leading and trailing  ",
    "",
)
GOLDENS = {"llava": "llava_orig", "llava_legacy": "llava_orig", "bunny": "bunny", "internvl": "internvl"}
TEACHER = Path(__file__).parents[3] / "vlmprune_jax/demo/teacher"


def step_of(rule):
    """A step of a pre_tokenizer from the way in which PRE spells it."""
    if rule.startswith("ByteLevel"):
        words = rule == "ByteLevel words"
        return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": words}
    if rule == "Digits":
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}


def trained(folder, rules, pre):
    """A folder of a tiny model whose tokenizer splits texts by these rules, with merges learnt from English."""
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    content = json.loads(tokenizer.to_str())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [step_of(rule) for rule in rules]}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    letters = trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIALS], show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    tokenizer.train_from_iterator([english_text(60_000), *TEXTS * 20], letters)
    content = json.loads(tokenizer.to_str())
    if "12" not in content["model"]["vocab"]:  # which some rules never let come together
        content["model"]["vocab"]["12"] = len(content["model"]["vocab"])
        content["model"]["merges"].append(["1", "2"])
    content["model"]["ignore_merges"] = pre in WHOLE_WORDS
    content["decoder"] = step_of("ByteLevel")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return make_folder(folder, {**LLAMA, "vocab_size": 704, "hidden_act": "silu"})


def compare(source, out, texts, tower=None):
    vp.save(open_model(source, tower), out, source_dir=source, format="gguf", dtype="float32")
    found, tokenizer = llama_cpp(out, texts=texts)["ids"], load_tokenizer(source)
    for text, ids in zip(texts, found, strict=True):
        assert ids.tolist() == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize(
    ("rules", "pre"),
    [pytest.param(*one, id=one[1], marks=() if one[1] == "qwen2" else pytest.mark.slow) for one in PRE.items()],
)
def test_every_name_splits_texts_by_its_rules(tmp_path, rules, pre):
    source = trained(tmp_path / "source", rules, pre)
    family = detect(LLAMA, "")
    fields = make_vocabulary(source, open_model(source).cfg, family).fields
    assert fields["tokenizer_pre"] == pre
    compare(source, tmp_path / "out", [*TEXTS, english_text(5_000)])


@pytest.mark.parametrize("name", [*(pytest.param(name, marks=pytest.mark.slow) for name in GOLDENS), "teacher"])
def test_tokenizers_of_the_families(goldens, tmp_path, name):
    """SentencePiece's, CodeGen's, and one of whole words; where a text begins with a letter and marks stand alone."""
    source, tower = tmp_path / "source", None
    if name == "teacher":
        source = TEACHER
    else:
        shutil.copytree(goldens / "ckpt" / GOLDENS[name], source)
        shutil.copytree(goldens / "tokenizers" / name, source, dirs_exist_ok=True)
        tower = {"bunny": goldens / "ckpt/siglip_tower", "internvl": None}.get(name, goldens / "ckpt/clip_tower")
    texts = [text for text in TEXTS if not text.startswith(" ")]
    compare(source, tmp_path / "out", [*texts, "USER: What's this? ASSISTANT: blue</s>", english_text(5_000)], tower)


def test_phi_3_marks_are_followed_by_no_white_space(goldens, tmp_path):
    """Its tokenizer drops it there and llama.cpp does not: the chat template has none."""
    source = tmp_path / "source"
    shutil.copytree(goldens / "ckpt/internvl", source)
    shutil.copytree(goldens / "tokenizers/internvl", source, dirs_exist_ok=True)
    cfg = open_model(source).cfg
    vocabulary = make_vocabulary(source, cfg, detect(json.loads((source / "config.json").read_text()), ""))
    template = vocabulary.fields["chat_template"]
    assert '"<|user|>"' in template
    assert "<|user|>\\n" not in template
    assert "<|assistant|>\\n" not in template
    assert vocabulary.drops


def test_folders_without_a_fitting_tokenizer(tmp_path):
    source, none = (make_folder(tmp_path / name, {**LLAMA, "hidden_act": "silu"}) for name in ("source", "none"))
    content = json.loads((byte_tokenizer(source) / "tokenizer.json").read_text())

    def refused_with(fact, folder=source, **changes):
        if changes:
            (folder / "tokenizer.json").write_text(json.dumps({**content, **changes}))
        refused(fact, vp.save, open_model(folder), tmp_path / "out", source_dir=folder, format="gguf")
        assert not (tmp_path / "out").exists()

    refused_with(r"has no tokenizer files, which llama\.cpp needs", none)
    refused_with("has token id 259, but the vocabulary has 97 rows")
    words = {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}
    refused_with("tokenizer type 'WordLevel' cannot be exported to GGUF", model=words, added_tokens=[])
    edit_config(source, vocab_size=260)
    source = make_folder(source, json.loads((source / "config.json").read_text()))
    unknown = r"llama\.cpp has no tokenizer that splits texts by the rules of this tokenizer\.json"
    split = {"type": "Split", "pattern": {"Regex": "\\w+"}, "behavior": "Isolated", "invert": False}
    refused_with(unknown, pre_tokenizer=split)  # named, and not guessed
    refused_with(unknown, normalizer={"type": "Lowercase"})
    # Qwen's rules with whole words taken first are nobody's in llama.cpp
    whole = trained(tmp_path / "whole", next(rules for rules, name in PRE.items() if name == "qwen2"), "llama-bpe")
    refused_with("ignore_merges is True in this tokenizer.json, and the opposite in llama.cpp's qwen2", whole)
