"""Trimmed vocabularies: tokens that one keeps, plans, and folders with their tokenizer files and ids in configs."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from hf_cases import copy_llava, edit_config
from prune_cases import layer_scores, unit_scores
from refusal import refused
from rounding import assert_same_function, double_logits
from tokenizers import Tokenizer
from vocabulary_cases import FAMILIES, SPECIAL, TOPICS, texts_file, tokenized_folder, vocabulary_plan

import vlmprune_jax as vp
from vlmprune_jax.base.budget import Budget
from vlmprune_jax.core.plans.kept import KeptVocabulary
from vlmprune_jax.core.prune import keep_everything
from vlmprune_jax.core.prune.cost import make_measure
from vlmprune_jax.io.checkpoints.read import open_model
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.exports.token_sources import Source, choose_vocabulary, read_sample, read_texts, tokens_of
from vlmprune_jax.io.exports.vocabulary import ids_in, read_tokenizer, trim_config
from vlmprune_jax.io.exports.write import check_saved
from vlmprune_jax.io.families.templates import QWEN3_VL


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tokenized_folder(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return texts_file(tmp_path_factory.mktemp("sources") / "sources.json", [TOPICS[0][:3000]])


@pytest.fixture(scope="module")
def model(folder):
    return vp.load(folder)


def settings(folder, sources, size=440, **changes):
    return vp.VocabularyConfig(size=size, sources=(str(sources),), multiple=8, source_dir=str(folder), **changes)


def scores_of(model, width=False):
    draw = np.random.default_rng(0)
    shapes = model.cfg.text.layers
    if width:
        heads, neurons = ([draw.random(layer.sizes[axis]) for layer in shapes] for axis in ("kv_heads", "mlp"))
        values = unit_scores(heads, neurons)
    else:
        values = layer_scores(draw.random(len(shapes)))
    return vp.Scores(criterion="random", fingerprint=vp.fingerprint(model), options={"gqa": "groups"}, values=values)


def test_frequent_tokens_come_first(folder, model):
    """A size below what the sources use keeps the most frequent tokens."""
    source = Source.of(folder, model.cfg)
    often, rare = (next(iter(tokens_of(source.tokenizer, [text])))[0] for text in (" statement", " exception"))
    least = len(source.keep({}, (), 320, 1).kept)
    room = len({*source.subwords.needs(often), often} - {*source.subwords.closure(source.needed)})
    forced = len(source.subwords.closure(source.needed))
    assert least == 320 > forced
    kept = source.keep({rare: 1, often: 9}, (), forced + room, 1).kept
    assert (often in kept, rare in kept) == (True, False)


def test_listed_ids_and_records_are_kept(folder, model, tmp_path):
    files = tuple(str(tmp_path / name) for name in ("ids.json", "r.jsonl", "t.txt"))
    entry = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " statement"}]}
    texts = ("[599, 598]", json.dumps({**entry, "choices": [" exception"]}), " module")
    for file, text in zip(files, texts, strict=True):
        Path(file).write_text(text)
    source = Source.of(folder, model.cfg)
    sample = read_sample(source, dataclasses.replace(settings(folder, "", size=None), sources=files))
    kept = source.keep(sample.used, sample.listed, None, 8).kept
    tokenizer = load_tokenizer(folder)
    words = {tokenizer(text)["input_ids"][0] for text in (" statement", " exception", " module")}
    assert words | {599, 598} <= {*kept}


def test_a_tenth_is_held_back(folder, model, tmp_path):
    texts = [f"text {i}" for i in range(40)]
    source = Source.of(folder, model.cfg)
    sample = read_sample(source, settings(folder, texts_file(tmp_path / "s.json", texts)))
    assert sample.held_out == ("text 9", "text 19", "text 29", "text 39")
    used = [text for text in texts if not text.endswith("9")]
    assert sample.used.total() == sum(len(ids) for ids in tokens_of(source.tokenizer, used))
    own = settings(folder, tmp_path / "s.json", held_out=(str(texts_file(tmp_path / "h.json", ["b"])),))
    assert read_sample(source, own).held_out == ("b",)


def test_one_plan_of_layers_and_tokens(folder, model, sources):
    plan = vp.make_plan(scores_of(model), model, layers_removed=1, vocabulary=settings(folder, sources))
    pruned = vp.apply_plan(model, plan)
    assert pruned.cfg == plan.apply_to(model.cfg)
    assert (len(pruned.cfg.text.layers), pruned.cfg.text.vocab_size) == (len(model.cfg.text.layers) - 1, 440)
    assert vp.count_params(pruned.cfg) == plan.parameters_after
    assert vp.PrunePlan.from_json(plan.to_json()) == plan
    layers = vp.make_plan(scores_of(model), model, layers_removed=1)
    fewer = vp.apply_plan(model, layers)
    tokens = keep_everything(fewer.cfg, vp.fingerprint(fewer), layers.parameters_after)
    tokens = tokens.trimming(vocabulary_plan(folder, sources, 440).vocabulary)
    both = vp.compose(layers, dataclasses.replace(tokens, parameters_after=plan.parameters_after))
    assert (both.stacks, both.vocabulary) == (plan.stacks, plan.vocabulary)
    alone = vp.make_plan(scores_of(model), model, vocabulary=settings(folder, sources))
    assert alone.removed_layers == ()
    assert alone.parameters_after == vp.count_params(alone.apply_to(model.cfg))
    options = {"vocabulary": {"size": 440, "sources": (str(sources),)}}
    refused("vocabulary.source_dir must name the model folder", vp.make_plan, scores_of(model), model, **options)


@pytest.mark.parametrize("limit", ["parameters", "disk_bytes", "memory_bytes", "flops", "step_ms"])
def test_budgets_count_the_rows(folder, model, sources, limit):
    """Costs are those of the model without the dropped rows, so less is removed from layers."""
    whole = vp.make_plan(scores_of(model, True), model, method="width", ratio=0, vocabulary=settings(folder, sources))
    budget = {limit: 1e30, "context": 64, "images": 0}
    cost = make_measure(whole.apply_to(model.cfg), Budget(**budget))(whole.apply_to(model.cfg))[limit]
    assert cost < make_measure(model.cfg, Budget(**budget))(model.cfg)[limit]
    options = {"method": "width", "vocabulary": settings(folder, sources)}
    plan = vp.make_plan(scores_of(model, True), model, budget={**budget, limit: 0.97 * cost}, **options)
    reached = make_measure(plan.apply_to(model.cfg), Budget(**budget))(plan.apply_to(model.cfg))[limit]
    assert 0.9 * cost < reached <= 0.97 * cost
    assert plan.options["budget_reached"][limit] == pytest.approx(reached)


def test_the_ratio_is_of_everything(folder, model, sources):
    """Also in rounds."""
    rows = vocabulary_plan(folder, sources, 440).actual_ratio
    for ratio, expected in ((rows + 0.1, pytest.approx(rows + 0.1, abs=0.02)), (rows / 2, pytest.approx(rows))):
        options = {"method": "width", "ratio": ratio, "vocabulary": settings(folder, sources)}
        assert vp.make_plan(scores_of(model, True), model, **options).actual_ratio == expected
    options = {"criterion": "l1", "ratio": 0.3, "vocabulary": settings(folder, sources)}
    pruned, plan, _ = vp.prune_iteratively(model, lambda step: [], steps=2, **options)
    assert pruned.cfg == plan.apply_to(model.cfg)
    assert plan.parameters_after == vp.count_params(pruned.cfg)
    assert plan.actual_ratio == pytest.approx(0.3, abs=0.03)


def without(vocabulary, *dropped):
    return dataclasses.replace(vocabulary, kept=tuple(i for i in vocabulary.kept if i not in dropped))


def test_kept_lists_made_by_hand_are_checked(folder, model, sources, tmp_path):
    plan, tokenizer = vocabulary_plan(folder, sources, 440), load_tokenizer(folder)
    text = next(tokenizer.convert_ids_to_tokens(i) for i in plan.vocabulary.kept if i in range(500, 600))
    parts = Source.of(folder, model.cfg).subwords.derivation(text)
    part = next(pair[0] + pair[1] for pair in parts)
    for dropped, fact in (
        ("Ã", r"1 token\(s\) that the model needs.*'Ã': texts would lose"),
        ("<pad>", r"token 602, the model's pad_token_id, is not kept"),
        (part, "from which kept tokens are merged"),
    ):
        wrong = plan.trimming(without(plan.vocabulary, tokenizer.convert_tokens_to_ids(dropped)))
        refused(fact, vp.prune_folder, folder, wrong, tmp_path / "out")
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ ' statement' }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(config))
    plan = vocabulary_plan(tmp_path / "model", sources, 440)
    wrong = plan.trimming(without(plan.vocabulary, tokenizer(" statement")["input_ids"][0]))
    fact = r"1 token\(s\) that the model needs.*'Ġstatement': the chat template uses"
    refused(fact, vp.prune_folder, tmp_path / "model", wrong, tmp_path / "out")


def test_sizes_and_ids_that_do_not_fit(folder, sources, tmp_path):
    cfg, listed = open_model(folder).cfg, tmp_path / "ids.json"
    listed.write_text("[640]")
    shutil.copytree(folder, tmp_path / "other")
    edit_config(tmp_path / "other", vocab_size=500)
    other = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, vocab_size=500))
    for fact, config, options in (
        ("has token id 602, but the model has 500 tokens", other, settings(tmp_path / "other", sources)),
        ("token id 640 is outside the model's vocabulary of 640 tokens", cfg, settings(folder, listed)),
        ("size=641 is more than the model's vocabulary of 640 tokens", cfg, settings(folder, listed, size=641)),
    ):
        refused(fact, choose_vocabulary, config, options)


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]},
        {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]},
        {"question": "What?", "answer": "A cat."},
        # images are not opened
        {"image": "none.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                                {"from": "gpt", "value": "A cat."}]},
    ],
)  # fmt: skip
def test_records(tmp_path, record):
    found = read_texts(str(texts_file(tmp_path / "r.json", [{**record, "labels": ["dog", 3]}])), QWEN3_VL)
    turn = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
    assert ("".join(found[:-1]), found[-1]) == (turn, "dog")


def test_lists_and_text_files(tmp_path):
    assert read_texts(str(texts_file(tmp_path / "l.json", ["a", "b", 7])), QWEN3_VL) == ["a", "b", 7]
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "t.txt").write_text(text)
    parts = read_texts(str(tmp_path / "t.txt"), QWEN3_VL)
    assert "".join(parts) == text
    assert 3 < len(parts) < 6
    for content, fact in (
        ([[]], r"l.json, record 0: is a list, expected an object with 'conversations'"),
        (["\ud800"], r"l.json: a text contains a lone surrogate \(.*\): remove it"),
    ):
        refused(fact, read_texts, str(texts_file(tmp_path / "l.json", content)), QWEN3_VL)
    refused(r"none.txt: no such file .*prune.vocabulary", read_texts, str(tmp_path / "none.txt"), QWEN3_VL)


# Folders --------------------------------------------------------------------------------------------------------------


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
    special = [new.convert_tokens_to_ids(token) for token in SPECIAL[name]]
    assert special == [plan.vocabulary.new_ids[full.convert_tokens_to_ids(token)] for token in SPECIAL[name]]
    text = "".join(SPECIAL[name][:3]) + TOPICS[0][:200]
    before, after = full(text)["input_ids"], new(text)["input_ids"]
    assert kept[after].tolist() == before
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
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
    kept = KeptVocabulary(10, (0, 2, 3, 7), "x")
    assert trim_config(config, kept, "config.json") == {
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
    refused(fact, trim_config, {"bos_token_id": 1}, kept, "config.json")


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
