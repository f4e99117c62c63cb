"""The prompt follows the model's folder, other choices are told; ChatML against chat templates and reference rules."""

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
from repository import ROOT
from vlm_cases import internvl_chat_config

from vlmprune_jax.core.config import IGNORED
from vlmprune_jax.core.sections import ModelSpec
from vlmprune_jax.io.checkpoints.read import load, read_config
from vlmprune_jax.io.data import chat_template
from vlmprune_jax.io.data.chat_template import chat_prompt, choose_template, follow
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.inputs import load_inputs
from vlmprune_jax.io.data.prompts import load_tokenizer, render, tokenize_prompt, tokenize_training
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.io.exports import target
from vlmprune_jax.io.exports.write import save
from vlmprune_jax.io.families import FAMILIES, templates
from vlmprune_jax.io.families.tiles import ImageShape

TEACHER = ROOT / "vlmprune_jax/demo/teacher"
# That of llava-hf/llava-1.5-7b-hf, whose `generation` tags only transformers knows.
LLAVA_HF = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
NAMES = ("Hermes-2", "internvl2_5")
ADDED = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
# As Qwen2's own and InternVL's in transformers have it; Hermes-2 has no line break behind an end mark.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "LINE{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
IMAGE = (Path("a.png"),)


def inputs_of(folder, **settings):
    return load_inputs(ModelSpec(str(folder)), DataSpec(**settings), read_config(folder)[1])


def chosen(tokenizer, **config):
    return choose_template("auto", FAMILIES["internvl"], tokenizer, config=config, has_vision=True).name


@pytest.fixture
def teacher(tmp_path):
    """A copy of the demo's teacher, a LLaVA whose chat template has no system text."""
    return shutil.copytree(TEACHER, tmp_path / "teacher")


def test_the_demo_model_gets_the_prompt_it_was_trained_with():
    found = inputs_of(TEACHER)
    assert (found.template.name, found.template.system) == ("llava_v1", "")
    assert found.image_loader.preparation.settings["aspect_ratio"] == "square"
    assert found.notes == ()
    told = inputs_of(TEACHER, template="llava_v1", aspect_ratio="pad").notes
    assert len(told) == 2
    assert told[0].startswith('prompts are "A chat between a curious user')
    assert "of the folder's chat template 'USER: <image>\\nHow many? ASSISTANT:'; a recipe or config sets" in told[0]
    assert told[1] == 'data.aspect_ratio="pad", but the model folder says "square"'
    assert inputs_of(TEACHER, template="llava_v1", system="", aspect_ratio="square").notes == ()
    for name, template in (("llava", "llava_v1"), ("llava-original", "llava_v1"), ("bunny", "bunny")):  # of the paper
        data = FAMILIES[name].recipe["data"]
        assert (data["template"], data["aspect_ratio"]) == (template, "pad")


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl", "smolvlm", "internvl3", "gemma3", "gemma4"])
def test_families_follow_their_own_chat_templates(goldens, name):
    folder = goldens / f"families/{name}/ckpt"
    found = inputs_of(folder)
    assert dataclasses.replace(found.template, start=templates()[name].start) == templates()[name]
    assert chat_prompt(folder, found.tokenizer, has_image=True) is not None
    assert found.notes == ()


@pytest.mark.parametrize(
    ("text", "system"), [(LLAVA_HF, ""), (f"Answer in one word. {LLAVA_HF}", "Answer in one word."), (None, "A chat")]
)
def test_where_a_folder_holds_its_chat_template(teacher, text, system):
    (teacher / "chat_template.jinja").unlink()
    if text is not None:
        (teacher / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    found = inputs_of(teacher)
    assert found.template.name == "llava_v1"
    assert found.template.system.startswith(system)
    assert bool(found.template.system) == bool(system)
    assert found.notes == ()


def test_other_chat_templates_of_a_folder(teacher, monkeypatch):
    """A prompt that no template makes is told; code that does not end is ignored; a begin token is its own."""
    monkeypatch.setattr(chat_template, "_SECONDS", 1)
    tokenizer, path = load_tokenizer(teacher), teacher / "chat_template.jinja"
    path.write_text("<q>{{ messages[0].content[1].text }}</q>")
    found = inputs_of(teacher)
    assert found.template == templates()["llava_v1"]
    (note,) = found.notes
    assert note.endswith("but those of the folder's chat template '<q>How many?</q>'")
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    for text in (endless, "{{ raise_exception('no') }}"):
        path.write_text(text)
        assert chat_prompt(teacher, tokenizer, has_image=True) is None
    path.write_text("{{ bos_token }}USER: {{ messages[0].content }} ASSISTANT:")
    assert chat_prompt(teacher, tokenizer, has_image=False) == "USER: How many? ASSISTANT:"
    assert follow("USER: How many? ASSISTANT:", [templates()["llava_v1"]], has_image=False).system == ""


def test_the_code_of_a_hub_layout_has_priority(goldens, tmp_path):
    """A tokenizer of a language model has that model's chat template."""
    folder = shutil.copytree(goldens / "ckpt/internvl", tmp_path / "internvl")
    shutil.copytree(goldens / "tokenizers/internvl", folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text("other")
    found = inputs_of(folder)
    assert (found.template.name, found.notes) == ("phi3-chat", ())


# --- InternVL with Qwen2 or Llama -------------------------------------------------------------------------------------


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
    jinja = target.chat_template(templates()[name], "<IMG_CONTEXT>\n")
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


WORDS = (
    "dog", "The", " ", "12", "\n", "naïve", "☕", "<|im_end|>", "<|im_start|>", "assistant\n", "<|endoftext|>", "?",
)  # fmt: skip
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
        assert chosen(tokenizer, template=name) == name
    told = r"template 'internlm2-chat' is not supported \(supported: llava_v1, .*2_5, "
    refused(told, chosen, tokenizer, template="internlm2-chat")


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
