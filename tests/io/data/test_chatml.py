"""InternVL with Qwen2 or Llama: ChatML prompts and labels, against chat templates and the reference's rules."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from vlm_cases import internvl_chat_config, make_vlm_folder

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import IGNORED
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.data.chat_template import choose_template
from vlmprune_jax.io.data.prompts import (
    load_tokenizer,
    render,
    tokenize_prompt,
    tokenize_training,
)
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.io.exports.target import chat_template
from vlmprune_jax.io.exports.write import save
from vlmprune_jax.io.families import FAMILIES, templates
from vlmprune_jax.io.families.tiles import ImageShape

NAMES = ("Hermes-2", "internvl2_5")
ADDED = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
# As Qwen2's own and InternVL's in transformers have it; Hermes-2 has no line break behind an end mark.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "LINE{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
IMAGE = (Path("a.png"),)


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
def tokenizer(folder):
    return load_tokenizer(folder)


def options(tokenizer, name):
    image = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    return {"tokenizer": tokenizer, "template": templates()[name], "image_token_id": image, "tokens_per_image": 3}


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_ids_equal_the_chat_template(tokenizer, name, image):
    turns = (("human", "<image>\nWhat is it?" if image else "What?"), ("gpt", "A dog."), ("human", "Sure?"))
    record = Record("r", (*turns, ("gpt", "Yes.\n\nVery.")), IMAGE if image else ())
    roles = {"human": "user", "gpt": "assistant"}
    chat = [{"role": "system", "content": templates()[name].system}]
    for speaker, text in record.turns:
        text = text.replace("<image>", "<img>" + "<IMG_CONTEXT>" * 6 + "</img>")  # two tiles of three positions
        chat.append({"role": roles[speaker], "content": text})
    template = CHATML.replace("LINE", "{{ '\\n' }}" if name == "internvl2_5" else "")
    given = {"chat_template": template, "tokenize": True, "return_dict": False}
    whole = tokenizer.apply_chat_template(chat, **given)
    asked = tokenizer.apply_chat_template(chat[:-1], **given, add_generation_prompt=True)
    arguments = {**options(tokenizer, name), "images": [ImageShape(1, 2, 2)] if image else []}
    ids, labels = tokenize_training(record, **arguments, cut_text_at=None)
    assert ids.tolist() == whole
    assert tokenize_prompt(record, **arguments).tolist() == asked
    assert labels[labels != IGNORED].tolist() == tokenizer("A dog.<|im_end|>Yes.\n\nVery.<|im_end|>")["input_ids"]


@pytest.mark.parametrize("name", [*NAMES, "internvl3"])
def test_the_template_that_an_export_ships(tokenizer, name):
    turns = (("human", "<image>\nWhat?"), ("gpt", "A dog."), ("human", "Sure?"))
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "A dog."}]
    chat.append({"role": "user", "content": "Sure?"})
    jinja = chat_template(templates()[name], "<IMG_CONTEXT>\n")
    made = tokenizer.apply_chat_template(chat, chat_template=jinja, tokenize=False, add_generation_prompt=True)
    text = render(turns, templates()[name], has_image=True, generation=True).text
    assert made == text.replace("<image>", "<IMG_CONTEXT>")


def hermes_labels(record, tokenizer):
    """InternVL's `preprocess_mpt` by its counting rule, written anew from its description."""
    prompt = render(record.turns, templates()["Hermes-2"], has_image=bool(record.images)).text
    prompt = prompt.replace("<image>", "<img>" + "<IMG_CONTEXT>" * 3 + "</img>", len(record.images))
    labels, end, role = np.array(tokenizer(prompt)["input_ids"]), "<|im_end|>", "<|im_end|><|im_start|>assistant\n"
    real = int((labels != tokenizer.pad_token_id).sum())
    pieces, done = prompt.split(end), 0
    rounds = [end.join(pieces[:3])] + [end.join(pieces[i : i + 2]) for i in range(3, len(pieces), 2)]
    for text in rounds:
        parts = text.split(role)
        if not text or len(parts) != 2:
            break
        labels[done : done + len(tokenizer(parts[0] + role)["input_ids"])] = IGNORED
        done += len(tokenizer(text)["input_ids"]) + 1
    labels[done:] = IGNORED
    return [IGNORED] * len(labels) if done != real else labels.tolist()


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


WORDS = [
    "dog",
    "The",
    " ",
    "12",
    "\n",
    "naïve",
    "☕",
    "<|im_end|>",
    "<|im_start|>",
    "assistant\n",
    "<|endoftext|>",
    "?",
]
texts = st.lists(st.sampled_from(WORDS), max_size=5).map(" ".join)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(rounds=st.lists(st.tuples(texts, texts), min_size=1, max_size=3), image=st.booleans())
@example(rounds=[("a", "one <|im_end|> two")], image=False)
@example(rounds=[("a", "\nb"), ("c", "\n\nd")], image=True)
@example(rounds=[("a", "b"), ("c", "")], image=False)
def test_labels_equal_the_references_rules(tokenizer, rounds, image):
    turns = tuple(turn for question, answer in rounds for turn in (("human", question), ("gpt", answer)))
    record = Record("r", turns, IMAGE if image else ())
    for name, rule in (("Hermes-2", hermes_labels), ("internvl2_5", internvl2_5_labels)):
        if name == "Hermes-2" and image and "<image>" not in turns[0][1]:
            lead = Record("r", (("human", f"<image>\n{turns[0][1]}"), *turns[1:]), IMAGE)
        else:
            lead = record
        _, labels = tokenize_training(
            record, **options(tokenizer, name), images=[ImageShape()] * image, cut_text_at=None
        )
        assert labels.tolist() == rule(lead, tokenizer), name


def test_the_template_that_config_json_names(tokenizer):
    for name in NAMES:
        assert (
            choose_template("auto", FAMILIES["internvl"], tokenizer, config={"template": name}, has_vision=True).name
            == name
        )
    with pytest.raises(UserError, match=r"template 'internlm2-chat' is not supported \(supported: llava_v1, .*2_5, "):
        choose_template("auto", FAMILIES["internvl"], tokenizer, config={"template": "internlm2-chat"}, has_vision=True)


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
    tokenizer = load_tokenizer(tmp_path / "out")
    assert (
        choose_template("auto", FAMILIES["internvl"], tokenizer, config=written, has_vision=True).name == "internvl2_5"
    )
