"""Tokens that a vocabulary keeps, and plans that trim it beside layers, heads and neurons."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hf_cases import edit_config
from prune_cases import layer_scores, unit_scores
from refusal import refused
from vocabulary_cases import TOPICS, texts_file, tokenized_folder, vocabulary_plan

import vlmprune_jax as vp
from vlmprune_jax.base.budget import Budget
from vlmprune_jax.core.prune import keep_everything
from vlmprune_jax.core.prune.cost import make_measure
from vlmprune_jax.io.checkpoints.read import open_model
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.exports.token_sources import Source, choose_vocabulary, read_sample, read_texts, tokens_of
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
    assert sample.used.total() == sum(
        len(ids) for ids in tokens_of(source.tokenizer, [t for t in texts if not t.endswith("9")])
    )
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


TURN = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"


def written(path, value):
    path.write_text(json.dumps(value))
    return str(path)


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
    found = read_texts(written(tmp_path / "r.json", [{**record, "labels": ["dog", 3]}]), QWEN3_VL)
    assert ("".join(found[:-1]), found[-1]) == (TURN, "dog")


def test_lists_and_text_files(tmp_path):
    assert read_texts(written(tmp_path / "l.json", ["a", "b", 7]), QWEN3_VL) == ["a", "b", 7]
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "t.txt").write_text(text)
    parts = read_texts(str(tmp_path / "t.txt"), QWEN3_VL)
    assert "".join(parts) == text
    assert 3 < len(parts) < 6
    fact = r"l.json, record 0: is a list, expected an object with 'conversations'"
    refused(fact, read_texts, written(tmp_path / "l.json", [[]]), QWEN3_VL)
    fact = r"l.json: a text contains a lone surrogate \(.*\): remove it"
    refused(fact, read_texts, written(tmp_path / "l.json", ["\ud800"]), QWEN3_VL)
    refused(r"none.txt: no such file .*prune.vocabulary", read_texts, str(tmp_path / "none.txt"), QWEN3_VL)
