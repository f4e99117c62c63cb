"""Folders with a trimmed vocabulary: tokenizer files, and the ids in every config file."""

import json
import shutil

import numpy as np
import pytest
from gguf import GGUFReader
from hf_cases import copy_llava, edit_config
from refusal import refused
from rounding import assert_same_function, double_logits
from tokenizers import Tokenizer
from vocabulary_cases import FAMILIES, SPECIAL, TOPICS, texts_file, tokenized_folder, vocabulary_plan

import vlmprune_jax as vp
from vlmprune_jax.core.plans.kept import KeptVocabulary
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.exports.vocabulary import ids_in, read_tokenizer, trim_config
from vlmprune_jax.io.exports.write import check_saved

KEPT = KeptVocabulary(10, (0, 2, 3, 7), "x")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return texts_file(tmp_path_factory.mktemp("sources") / "sources.json", [TOPICS[0][:3000]])


@pytest.mark.parametrize("name", FAMILIES)
def test_families_speak_the_new_ids(tmp_path, sources, name):
    source = tokenized_folder(tmp_path / "source", name)
    plan = vocabulary_plan(source, sources, 440)
    model = vp.load(source)
    kept = np.array(plan.vocabulary.kept)
    assert len(kept) == 440
    vp.prune_folder(source, plan, tmp_path / "out", dtype="float32")
    small = vp.load(tmp_path / "out")
    assert small.cfg == plan.apply_to(model.cfg)
    full, new = load_tokenizer(source), load_tokenizer(tmp_path / "out")
    assert [new.convert_tokens_to_ids(token) for token in SPECIAL[name]] == [
        plan.vocabulary.new_ids[full.convert_tokens_to_ids(token)] for token in SPECIAL[name]
    ]
    text = "".join(SPECIAL[name][:3]) + TOPICS[0][:200]
    before, after = full(text)["input_ids"], new(text)["input_ids"]
    assert kept[after].tolist() == before
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    special = [new.convert_tokens_to_ids(token) for token in SPECIAL[name]]
    assert generation == {"eos_token_id": special[:2], "pad_token_id": special[2], "suppress_tokens": [special[0]]}
    words = [i for i in before if i not in (model.cfg.image_token_id, model.cfg.video_token_id)]
    rows = [plan.vocabulary.new_ids[i] for i in words]
    expected = double_logits(model, input_ids=np.array([words]))[..., kept]
    assert_same_function(double_logits(small, input_ids=np.array([rows])), expected)


def test_file_surgery_is_surgery_in_memory(goldens, tmp_path, sources):
    """Without older lists of tokens beside a tokenizer.json."""
    source = tokenized_folder(tmp_path / "source", "phi")
    shutil.copy(goldens / "tokenizers/bunny/merges.txt", source)
    plan, model = vocabulary_plan(source, sources, 440), vp.load(source)
    vp.prune_folder(source, plan, tmp_path / "files", dtype="float32")
    assert not (tmp_path / "files/merges.txt").exists()
    pruned = vp.apply_plan(model, plan)
    vp.save(pruned, tmp_path / "memory", dtype="float32")  # folder and plan are the model's
    for file in sorted((tmp_path / "files").iterdir()):
        assert file.read_bytes() == (tmp_path / "memory" / file.name).read_bytes(), file.name
    fact = "has a vocabulary of 640 rows, but the model has 440: pass the plan"
    refused(fact, vp.save, pruned.replace(plan=None), tmp_path / "again", source_dir=source)


def test_conversion_takes_the_new_ids(tmp_path, sources):
    """A hub layout becomes that of transformers, whose image token has a new id."""
    source = tokenized_folder(tmp_path / "source", "internvl_chat")
    edit_config(source, ps_version="v2", force_image_size=24)
    plan, model = vocabulary_plan(source, sources, 440), vp.load(source)
    pruned = vp.apply_plan(model, plan)
    vp.save(pruned, tmp_path / "stock", source_dir=source, plan=plan, layout="transformers", dtype="float32")
    stock, tokenizer = vp.load(tmp_path / "stock"), load_tokenizer(tmp_path / "stock")
    assert stock.cfg.image_token_id == tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert stock.cfg.text.vocab_size >= 440
    words = load_tokenizer(source)(TOPICS[0][:60])["input_ids"]
    rows = np.array([[plan.vocabulary.new_ids[i] for i in words]])
    assert rows[0].tolist() == tokenizer(TOPICS[0][:60])["input_ids"]
    assert_same_function(double_logits(stock, input_ids=rows)[..., :440], double_logits(pruned, input_ids=rows))


def test_gguf_has_the_kept_tokens(tmp_path, sources):
    """With the pre-tokenizer of the source, which the ids do not decide."""
    source = tokenized_folder(tmp_path / "source", "llama")
    edit_config(source, hidden_act="silu")
    plan = vocabulary_plan(source, sources, 440)
    pruned = vp.apply_plan(vp.load(source), plan)
    vp.save(pruned, tmp_path / "out", source_dir=source, plan=plan, format="gguf", dtype="float32")
    fields = GGUFReader(next((tmp_path / "out").glob("*.gguf"))).fields
    content = json.loads((source / "tokenizer.json").read_text())
    texts = {i: text for text, i in content["model"]["vocab"].items()}
    texts |= {token["id"]: token["content"] for token in content["added_tokens"]}
    assert fields["tokenizer.ggml.tokens"].contents() == [texts[i] for i in plan.vocabulary.kept]
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == pruned.cfg.eos_token_ids[0]
    check_saved(pruned, tmp_path / "out", source_dir=source, plan=plan, format="gguf", dtype="float32")


def test_sentencepiece_files_agree(tmp_path, goldens):
    """tokenizer.model, tokenizer.json and the older lists of a Llama tokenizer stay one tokenizer, or load alone."""
    sentencepiece = pytest.importorskip("sentencepiece")
    source = copy_llava(goldens, tmp_path / "source")
    plan = vocabulary_plan(source, texts_file(tmp_path / "s.json", ["The cat sat on the mat."]), 356, multiple=4)
    vp.prune_folder(source, plan, tmp_path / "out")
    new, full = load_tokenizer(tmp_path / "out"), load_tokenizer(source)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out/tokenizer.model"))
    for text in ("The cat sat on the mat.", "déjà vu", "A quite other text, 12 words?"):
        ids = new(text, add_special_tokens=False)["input_ids"]
        assert ids == pieces.encode(text)
        assert new.decode(ids) == full.decode(full(text, add_special_tokens=False)["input_ids"])
    assert pieces.unk_id() == new.unk_token_id
    assert pieces.eos_id() == new.eos_token_id
    assert pieces.get_piece_size() == sum(i < 400 for i in plan.vocabulary.kept)
    listed = json.loads((tmp_path / "out/tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {int(i): token["content"] for i, token in listed.items()} == {
        new.convert_tokens_to_ids(token["content"]): token["content"] for token in listed.values()
    }

    (source / "tokenizer.json").unlink()
    vp.prune_folder(source, plan, tmp_path / "older")
    ids = load_tokenizer(tmp_path / "older")("The cat sat on the mat.")["input_ids"]
    assert [plan.vocabulary.kept[i] for i in ids] == load_tokenizer(source)("The cat sat on the mat.")["input_ids"]


@pytest.mark.parametrize(
    ("file", "edit", "fact"),
    [
        ("tokenizer.json", None, "has no tokenizer, so its vocabulary cannot be trimmed"),
        ("tokenizer.json", ('"<pad>"', '"<else>"'), "its tokenizer differs from the one that the plan was made with"),
        (
            "generation_config.json",
            ("[", "[599, "),
            r"token 599 \('.may': generation_config.json has it as eos_token_id",
        ),
    ],
)
def test_refusals(tmp_path, sources, file, edit, fact):
    source = tokenized_folder(tmp_path / "source", "llama")
    plan, path = vocabulary_plan(source, sources, 440), source / file
    if edit is None:
        path.unlink()
    else:
        path.write_text(path.read_text().replace(*edit, 1))
    refused(fact, vp.prune_folder, source, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ids_in_configs():
    config = {
        "vocab_size": 10,
        "text_config": {"vocab_size": 10, "eos_token_id": [2, 7], "hidden_size": 10},
        "image_token_index": 7,
        "bos_token_id": None,
        "pad_token_id": -1,
        "tie_word_embeddings": True,
        "suppress_tokens": [1, 2],
        "bad_words_ids": [[1, 2], [3]],
        "token_count": 3,
    }
    assert trim_config(config, KEPT, "config.json") == {
        "vocab_size": 4,
        "text_config": {"vocab_size": 4, "eos_token_id": [1, 3], "hidden_size": 10},
        "image_token_index": 3,
        "bos_token_id": None,
        "pad_token_id": -1,
        "tie_word_embeddings": True,
        "suppress_tokens": [1],
        "bad_words_ids": [[2]],
        "token_count": 3,
    }
    assert ids_in(config) == {2: "eos_token_id", 7: "eos_token_id", -1: "pad_token_id"}
    fact = r"config\.json: bos_token_id is token 1, which the plan removes"
    refused(fact, trim_config, {"bos_token_id": 1}, KEPT, "config.json")


MODELS = {"bunny": "bunny", "llava": "llava_orig", "llava_legacy": "llava_orig", "internvl": "internvl"}
# Space marks: at the start, behind special tokens, and where a piece begins with a space itself.
TEXTS = ["a  b", " leading", "  two", " ", "x</s> y", "<img> z", "</img>\nand", "<|end|> x", "naïve ☕\n\n1", "12.", ""]


@pytest.mark.parametrize("name", MODELS)
def test_the_ids_of_the_missing_file(goldens, tmp_path, name):
    """The folder names remote code, as the hub's do: it is neither run nor asked about."""
    for path in (goldens / "tokenizers" / name).iterdir():
        if path.name != "tokenizer.json":
            shutil.copy(path, tmp_path)
    config = json.loads((goldens / "ckpt" / MODELS[name] / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_hub.Config", "AutoModel": "modeling_hub.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    expected = Tokenizer.from_file(str(goldens / "tokenizers" / name / "tokenizer.json"))
    written = Tokenizer.from_str(json.dumps(read_tokenizer(tmp_path)))
    loaded = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert written.encode(text).ids == expected.encode(text).ids, text
        assert loaded(text)["input_ids"] == expected.encode(text).ids, text


def test_a_folder_with_neither(tmp_path):
    assert read_tokenizer(tmp_path) is None
    (tmp_path / "vocab.json").write_text("{}")
    refused(r"its tokenizer: cannot be read .*use a folder with tokenizer.json", read_tokenizer, tmp_path)
