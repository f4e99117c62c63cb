"""Prompts, ids and labels equal the reference's and chat templates', on stored outputs and on random conversations."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hf_cases import make_vlm_folder
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from refusal import refused
from vlm_cases import internvl_chat_config

from vlmprune_jax.core.config import IGNORED
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.data.chat_template import choose_template
from vlmprune_jax.io.data.prompts import (
    load_tokenizer,
    move_images_first,
    render,
    tokenize_prompt,
    tokenize_training,
)
from vlmprune_jax.io.data.records import Record, read_records
from vlmprune_jax.io.exports import target
from vlmprune_jax.io.exports.write import save
from vlmprune_jax.io.families import FAMILIES, templates
from vlmprune_jax.io.families.tiles import ImageShape

LLAVA = templates()["llava_v1"]
PHI3 = {"template": templates()["phi3-chat"], "image_token_id": 393, "tokens_per_image": 2}
IMAGE = (Path("a.png"),)
RANDOM = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@pytest.fixture(scope="module")
def samples(goldens):
    return read_records(goldens / "data/samples.json", goldens / "data/images")


@pytest.fixture(scope="module")
def tokenizer(goldens):
    return load_tokenizer(goldens / "tokenizers/llava")


@pytest.fixture(scope="module")
def phi3(goldens):
    return load_tokenizer(goldens / "tokenizers/internvl")


def shapes(tiles):
    return [ImageShape(1, count, count) for count in tiles]


def conversation(rounds, image):
    turns = tuple(turn for question, answer in rounds for turn in (("human", question), ("gpt", answer)))
    return Record("r", turns, IMAGE if image else ())


def rounds_of(*words):
    """Up to three rounds of random texts: words, and marks that the template has itself."""
    words = ("dog", "The", " ", "12", "\n", "naïve", "☕", *words, "?")
    texts = st.lists(st.sampled_from(words), max_size=5).map(" ".join)
    return st.lists(st.tuples(texts, texts), min_size=1, max_size=3)


def test_prompt_text_equals_the_reference(goldens, samples):
    stored = json.loads((goldens / "data/prompts.json").read_text())
    keys = {"phi3-chat": "internvl_phi3_chat_before_image_expansion", "llava_v1": "llava_v1", "bunny": "bunny"}
    for name, key in keys.items():
        for record in samples:
            text = render(record.turns, templates()[name], has_image=bool(record.images)).text
            assert text == stored[record.id][key], (name, record.id)


@pytest.mark.parametrize(
    ("file", "key", "folder", "template"),
    [
        ("llava", "llava", "llava", "llava_v1"),
        ("llava", "llava_legacy_tokenizer", "llava_legacy", "llava_v1"),
        ("llava", "llava_maxlen160", "llava", "llava_v1"),
        ("bunny", "bunny", "bunny", "bunny"),
        ("bunny", "bunny_maxlen160", "bunny", "bunny"),
        ("internvl", "internvl", "internvl", "phi3-chat"),
    ],
)
def test_ids_and_labels_equal_the_reference(goldens, samples, file, key, folder, template):
    stored = json.loads((goldens / f"data/{file}_tokenized.json").read_text())[key]
    options = {
        "tokenizer": load_tokenizer(goldens / "tokenizers" / folder),
        "template": templates()[template],
        "image_token_id": 393 if file == "internvl" else -200,
        "tokens_per_image": stored.get("num_image_token_per_tile", 1),
        "cut_text_at": stored["model_max_length"],
    }
    assert len(stored["samples"]) == len(samples)
    for record, expected in zip(samples, stored["samples"], strict=True):
        images = {"images": shapes([expected["num_tiles"]] if record.images else [])} if file == "internvl" else {}
        ids, labels = tokenize_training(record, **options, **images)
        assert ids.tolist() == expected["input_ids"], record.id
        assert labels.tolist() == expected["labels"], record.id
        assert bool((labels == IGNORED).all()) == expected["all_ignored"], record.id
        assert ids.dtype == labels.dtype == np.int32


def test_a_prompt_is_the_training_row_up_to_its_answer(samples, tokenizer, phi3):
    llava = {"tokenizer": tokenizer, "template": LLAVA, "image_token_id": -200, "tokens_per_image": 2}
    for number, options in ((0, llava), (4, llava), (1, PHI3), (4, PHI3), (11, PHI3)):
        record, given = samples[number], {"tokenizer": phi3, **options}
        images = shapes([1] * len(record.images))
        ids, labels = tokenize_training(record, **given, images=images, cut_text_at=None)
        prompt = tokenize_prompt(record, **given, images=images)
        assert prompt.tolist() == ids[: len(prompt)].tolist()
        assert (labels[: len(prompt)] == IGNORED).all() or len(record.turns) > 2
        assert (labels[len(prompt) :] != IGNORED).all()
        assert (prompt == given["image_token_id"]).sum() == 2 * len(record.images)
        if len(record.turns) == 2:
            question = dataclasses.replace(record, turns=record.turns[:1])
            assert np.array_equal(tokenize_prompt(question, **given, images=images), prompt)


def test_several_images_are_expanded_in_order(phi3):
    turns = (("human", "Is <image> like <image>?"), ("gpt", "No."), ("human", "And <image>?"), ("gpt", "Yes."))
    record = Record("r", turns, (Path("a"), Path("b"), Path("c")))
    ids, _ = tokenize_training(record, phi3, **PHI3, images=shapes([3, 1, 2]), cut_text_at=None)
    runs = "".join("i" if token == 393 else "." for token in ids).split(".")
    assert [len(run) for run in runs if run] == [6, 2, 4]
    assert ids.tolist().count(391) == ids.tolist().count(392) == 3  # <img>, </img>


def test_lone_image_without_a_mark_leads(phi3):
    bare = Record("r", (("human", "What is it?"), ("gpt", "A dog.")), IMAGE)
    marked = dataclasses.replace(bare, turns=(("human", "<image>\nWhat is it?"), bare.turns[1]))
    for one, other in zip(*(tokenize_training(r, phi3, **PHI3, cut_text_at=None) for r in (bare, marked)), strict=True):
        assert np.array_equal(one, other)
    assert np.array_equal(tokenize_prompt(bare, phi3, **PHI3), tokenize_prompt(marked, phi3, **PHI3))
    text = dataclasses.replace(bare, images=())
    assert 393 not in tokenize_prompt(text, phi3, **PHI3)


def test_text_cannot_pose_as_an_image(phi3):
    for images in ((), IMAGE):
        record = Record("r9", (("human", "<IMG_CONTEXT> hi"), ("gpt", "x")), images)
        for tokenize, options in ((tokenize_training, {"cut_text_at": None}), (tokenize_prompt, {})):
            refused("record r9: its text contains <IMG_CONTEXT>", tokenize, record, phi3, **PHI3, **options)


@pytest.mark.parametrize(
    ("name", "family", "folder", "expected"),
    [
        ("auto", "llava", "llava", "llava_v1"),
        ("auto", "llava", "bunny", "bunny"),  # a Bunny exported as LlavaForConditionalGeneration
        ("auto", "bunny", "bunny", "bunny"),
        ("auto", "internvl-original", "internvl", "phi3-chat"),
        ("auto", "llama", "bunny", "llava_v1"),
        ("phi3-chat", "phi3", "internvl", "phi3-chat"),
        ("bunny", "internvl", "internvl", "bunny"),
    ],
)
def test_template_of_a_family(goldens, name, family, folder, expected):
    tokenizer = load_tokenizer(goldens / "tokenizers" / folder)
    assert choose_template(name, FAMILIES[family], tokenizer, config={}, has_vision=True).name == expected


def test_template_that_the_tokenizer_cannot_write(tokenizer):
    for name, advice in ("auto", "one of llava_v1, bunny"), ("internvl3", "auto or one of llava_v1, bunny"):
        message = rf"lacks <\|im_start\|>, .*<img>, .*: set data.template to {advice}"
        refused(message, choose_template, name, FAMILIES["internvl"], tokenizer, config={}, has_vision=True)


def test_system_texts_and_images_that_move_to_the_front_of_their_turn():
    bare = dataclasses.replace(LLAVA, system="")
    turns = (("human", "a"), ("gpt", "b"), ("human", "c"))
    assert render(turns[:1], bare, has_image=False, generation=True).text == "USER: a ASSISTANT:"
    assert render(turns, bare, has_image=False, generation=True).text == "USER: a ASSISTANT: b</s>USER: c ASSISTANT:"
    assert move_images_first("Look at <image> now. ") == "<image>\nLook at  now."
    assert move_images_first("a <image> b <image>") == "<image>\n<image>\na  b"
    assert move_images_first("  none ") == "  none "


# --- labels by the references' rules, written anew from their description ---------------------------------------------


def counted_labels(prompt, tokenizer, end, role, *, begin=0, limit=None):
    """InternVL's `preprocess_mpt` and, with a token to `begin` with, `preprocess_phi3`: labels by counts of tokens.

    All are ignored if the counts of the rounds do not add up, and the text is not cut at the limit.
    """
    labels = np.array(tokenizer(prompt)["input_ids"])[:limit]
    total = int((labels != tokenizer.pad_token_id).sum())
    if begin:
        labels[labels == tokenizer.convert_tokens_to_ids("<|endoftext|>")] = IGNORED
    labels[:begin] = IGNORED
    turns, done, role = prompt.split(end), begin, f"{end}{role}"
    rounds = [end.join(turns[:3])] + [end.join(turns[i : i + 2]) for i in range(3, len(turns), 2)]
    for text in rounds:
        parts = text.split(role)
        if not text or len(parts) != 2:
            break
        labels[done : done + len(tokenizer(parts[0] + role)["input_ids"]) - begin] = IGNORED
        done += len(tokenizer(text)["input_ids"]) - begin + 1  # and the end mark that the split took away
    labels[done:] = IGNORED
    whole = done == total or (limit is not None and done >= limit)
    return labels.tolist() if whole else [IGNORED] * len(labels)


@RANDOM
@given(
    rounds=rounds_of("<|end|>", "<|user|>", "<|assistant|>\n", "<|endoftext|>"),
    image=st.booleans(),
    limit=st.integers(165, 260),
)
@example(rounds=[("The", "dog")], image=False, limit=165)
@example(rounds=[("A?", "Yes."), ("B?", "")], image=True, limit=260)
def test_labels_of_phi3_equal_the_counting_rule(phi3, rounds, image, limit):
    """A text that is cut loses what is behind the limit, positions of its image included."""
    record, tiles = conversation(rounds, image), [3] if image else []
    prompt = render(record.turns, PHI3["template"], has_image=image).text
    prompt = prompt.replace("<image>", "<img>" + "<IMG_CONTEXT>" * 6 + "</img>", int(image))
    whole, _ = tokenize_training(record, phi3, **PHI3, images=shapes(tiles), cut_text_at=None)
    ids, labels = tokenize_training(record, phi3, **PHI3, images=shapes(tiles), cut_text_at=limit)
    assert image or ids.tolist() == whole[:limit].tolist()
    expected = counted_labels(prompt, phi3, "<|end|>", "<|assistant|>\n", begin=1, limit=limit)
    assert labels[:limit].tolist() == expected


@RANDOM
@given(rounds=rounds_of(".", "USER:", " ASSISTANT: ", "is", "</s>", ""), image=st.booleans())
def test_labels_of_llava_equal_the_counting_rule(tokenizer, rounds, image):
    """LLaVA's `preprocess_v1`: lengths of rounds, instruction minus 2, later rounds minus 1."""
    rounds = [(f"<image>\n{rounds[0][0]}", rounds[0][1]), *rounds[1:]] if image else rounds
    record = conversation(rounds, image)
    ids, found = tokenize_training(record, tokenizer, LLAVA, image_token_id=-200, tokens_per_image=1, cut_text_at=None)

    def count(text):
        return sum(len(tokenizer(piece)["input_ids"]) for piece in (text.split("<image>") if image else [text]))

    labels, separator, done = ids.copy(), " ASSISTANT: ", 1
    labels[:done] = IGNORED
    for number, text in enumerate(render(record.turns, LLAVA, has_image=image).text.split("</s>")):
        parts = text.split(separator)
        if len(parts) != 2:
            break
        later = 1 if number else 0
        labels[done : done + count(parts[0] + separator) - 2 - later] = IGNORED
        done += count(text) - later
    labels[done:] = IGNORED
    assert found.tolist() == (labels.tolist() if done == len(ids) else [IGNORED] * len(ids))


# --- InternVL with Qwen2 or Llama -------------------------------------------------------------------------------------

NAMES = ("Hermes-2", "internvl2_5")
ADDED = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
# As Qwen2's own and InternVL's in transformers have it; Hermes-2 has no line break behind an end mark.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "LINE{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(goldens, tmp_path_factory):
    """A byte-level tokenizer like Qwen2's: no BOS, texts end with <|endoftext|>, which pads as well."""
    folder = tmp_path_factory.mktemp("chatml")
    content = json.loads((goldens / "tokenizers/bunny/tokenizer.json").read_text())
    for token in ADDED:
        number = max(entry["id"] for entry in content["added_tokens"]) + 1
        content["added_tokens"].append({**content["added_tokens"][0], "id": number, "content": token})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    shutil.copy(goldens / "tokenizers/bunny/tokenizer_config.json", folder)
    return folder


@pytest.fixture(scope="module")
def chatml(folder):
    return load_tokenizer(folder)


def chosen(tokenizer, **config):
    return choose_template("auto", FAMILIES["internvl"], tokenizer, config=config, has_vision=True).name


def options(tokenizer, name):
    image = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    return {"tokenizer": tokenizer, "template": templates()[name], "image_token_id": image, "tokens_per_image": 3}


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_ids_equal_the_chat_template(chatml, name, image):
    turns = (("human", "<image>\nWhat is it?" if image else "What?"), ("gpt", "A dog."), ("human", "Sure?"))
    record = Record("r", (*turns, ("gpt", "Yes.\n\nVery.")), IMAGE if image else ())
    roles = {"human": "user", "gpt": "assistant"}
    chat = [{"role": "system", "content": templates()[name].system}]
    for speaker, text in record.turns:
        text = text.replace("<image>", "<img>" + "<IMG_CONTEXT>" * 6 + "</img>")  # two tiles of three positions
        chat.append({"role": roles[speaker], "content": text})
    template = CHATML.replace("LINE", "{{ '\\n' }}" if name == "internvl2_5" else "")
    given = {"chat_template": template, "tokenize": True, "return_dict": False}
    whole = chatml.apply_chat_template(chat, **given)
    asked = chatml.apply_chat_template(chat[:-1], **given, add_generation_prompt=True)
    arguments = {**options(chatml, name), "images": [ImageShape(1, 2, 2)] if image else []}
    ids, labels = tokenize_training(record, **arguments, cut_text_at=None)
    assert ids.tolist() == whole
    assert tokenize_prompt(record, **arguments).tolist() == asked
    assert labels[labels != IGNORED].tolist() == chatml("A dog.<|im_end|>Yes.\n\nVery.<|im_end|>")["input_ids"]


@pytest.mark.parametrize("name", [*NAMES, "internvl3"])
def test_the_template_that_an_export_ships(chatml, name):
    turns = (("human", "<image>\nWhat?"), ("gpt", "A dog."), ("human", "Sure?"))
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "A dog."}]
    chat.append({"role": "user", "content": "Sure?"})
    jinja = target.chat_template(templates()[name], "<IMG_CONTEXT>\n")
    made = chatml.apply_chat_template(chat, chat_template=jinja, tokenize=False, add_generation_prompt=True)
    text = render(turns, templates()[name], has_image=True, generation=True).text
    assert made == text.replace("<image>", "<IMG_CONTEXT>")


def internvl2_5_labels(record, tokenizer):
    """InternVL's `preprocess_internvl2_5`: turn by turn, all of an answer but its role and the last line break."""
    template, image = templates()["internvl2_5"], "<img>" + "<IMG_CONTEXT>" * 3 + "</img>"
    labels = [IGNORED] * len(tokenizer(f"<|im_start|>system\n{template.system}<|im_end|>\n")["input_ids"])
    for number, (speaker, text) in enumerate(record.turns):
        if record.images and number == 0:
            text = text.replace("<image>", image, 1) if "<image>" in text else f"{image}\n{text}"
        role = f"<|im_start|>{'user' if speaker == 'human' else 'assistant'}\n"
        ids = tokenizer(f"{role}{text}<|im_end|>\n")["input_ids"]
        skip = len(ids) if speaker == "human" else len(tokenizer(role)["input_ids"])
        labels += [IGNORED] * skip + ids[skip:-1] + [IGNORED] * (speaker == "gpt")
    return labels


@RANDOM
@given(
    rounds=rounds_of("<|im_end|>", "<|im_start|>", "assistant\n", "<|endoftext|>"),
    image=st.booleans(),
)
@example(rounds=[("a", "one <|im_end|> two")], image=False)
@example(rounds=[("a", "\nb"), ("c", "\n\nd")], image=True)
@example(rounds=[("a", "b"), ("c", "")], image=False)
def test_labels_of_chatml_equal_the_references_rules(chatml, rounds, image):
    record = conversation(rounds, image)
    lead = conversation([(f"<image>\n{rounds[0][0]}", rounds[0][1]), *rounds[1:]], image) if image else record
    prompt = render(lead.turns, templates()["Hermes-2"], has_image=image).text
    prompt = prompt.replace("<image>", "<img>" + "<IMG_CONTEXT>" * 3 + "</img>", int(image))
    expected = {
        "Hermes-2": counted_labels(prompt, chatml, "<|im_end|>", "<|im_start|>assistant\n"),
        "internvl2_5": internvl2_5_labels(record, chatml),
    }
    for name, labels in expected.items():
        images = [ImageShape()] * image
        _, found = tokenize_training(record, **options(chatml, name), images=images, cut_text_at=None)
        assert found.tolist() == labels, name


def test_the_template_that_config_json_names(chatml):
    for name in NAMES:
        assert chosen(chatml, template=name) == name
    told = r"template 'internlm2-chat' is not supported \(supported: llava_v1, .*2_5, "
    refused(told, chosen, chatml, template="internlm2-chat")


def test_export_of_a_qwen2_chat(folder, tmp_path):
    """The stock folder asks in the family's own words, ends where they end, and names the template for training."""
    config = internvl_chat_config("qwen2") | {"template": "internvl2_5", "ps_version": "v2"}
    config["force_image_size"] = config["vision_config"]["image_size"]
    config["llm_config"] = {**config["llm_config"], "vocab_size": 368}
    source = make_vlm_folder(tmp_path / "source", config)
    for path in folder.iterdir():
        shutil.copy(path, source)
    model = load(source)
    end = load_tokenizer(source).convert_tokens_to_ids("<|im_end|>")
    assert end in model.cfg.eos_token_ids
    save(model, tmp_path / "out", source_dir=source, layout="transformers")
    assert "<|im_start|>user" in (tmp_path / "out/chat_template.jinja").read_text()
    assert end in json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"]
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert chosen(load_tokenizer(tmp_path / "out"), **written) == "internvl2_5"
