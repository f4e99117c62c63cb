"""`data.template="auto"` and `data.aspect_ratio="auto"` follow the model's folder; other choices are told."""

import dataclasses
import json
import shutil

import pytest
from repository import ROOT

from vlmprune_jax.core.sections import ModelSpec
from vlmprune_jax.io.checkpoints.read import read_config
from vlmprune_jax.io.data import chat_template
from vlmprune_jax.io.data.chat_template import chat_prompt, follow
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.inputs import load_inputs
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.families import FAMILIES, templates

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


def inputs_of(folder, **settings):
    return load_inputs(ModelSpec(str(folder)), DataSpec(**settings), read_config(folder)[1])


@pytest.fixture
def teacher(tmp_path):
    """A copy of the demo's teacher, a LLaVA whose chat template has no system text."""
    return shutil.copytree(TEACHER, tmp_path / "teacher")


def test_the_demo_model_gets_the_prompt_it_was_trained_with():
    found = inputs_of(TEACHER)
    assert (found.template.name, found.template.system) == ("llava_v1", "")
    assert found.image_loader.preparation.settings["aspect_ratio"] == "square"
    assert found.notes == ()


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl", "smolvlm", "internvl3", "gemma3", "gemma4"])
def test_families_follow_their_own_chat_templates(goldens, name):
    folder = goldens / f"families/{name}/ckpt"
    found = inputs_of(folder)
    assert dataclasses.replace(found.template, start=templates()[name].start) == templates()[name]
    assert chat_prompt(folder, found.tokenizer, has_image=True) is not None
    assert found.notes == ()


def test_other_choices_are_told():
    told = inputs_of(TEACHER, template="llava_v1", aspect_ratio="pad").notes
    assert len(told) == 2
    assert told[0].startswith('prompts are "A chat between a curious user')
    assert "of the folder's chat template 'USER: <image>\\nHow many? ASSISTANT:'; a recipe or config sets" in told[0]
    assert told[1] == 'data.aspect_ratio="pad", but the model folder says "square"'
    assert inputs_of(TEACHER, template="llava_v1", system="", aspect_ratio="square").notes == ()


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


def test_a_prompt_that_no_template_makes_is_told(teacher):
    (teacher / "chat_template.jinja").write_text("<q>{{ messages[0].content[1].text }}</q>")
    found = inputs_of(teacher)
    assert found.template == templates()["llava_v1"]
    (note,) = found.notes
    assert note.endswith("but those of the folder's chat template '<q>How many?</q>'")


@pytest.mark.parametrize(
    "text",
    ["{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ raise_exception('no') }}"],
)
def test_a_chat_template_that_does_not_end_is_ignored(teacher, monkeypatch, text):
    monkeypatch.setattr(chat_template, "_SECONDS", 1)
    (teacher / "chat_template.jinja").write_text(text)
    assert chat_prompt(teacher, load_tokenizer(teacher), has_image=True) is None


def test_text_alone_and_a_begin_token_of_its_own(teacher):
    tokenizer = load_tokenizer(teacher)
    (teacher / "chat_template.jinja").write_text("{{ bos_token }}USER: {{ messages[0].content }} ASSISTANT:")
    assert chat_prompt(teacher, tokenizer, has_image=False) == "USER: How many? ASSISTANT:"
    assert follow("USER: How many? ASSISTANT:", [templates()["llava_v1"]], has_image=False).system == ""


def test_recipes_of_the_paper_name_theirs():
    for name, template in (("llava", "llava_v1"), ("llava-original", "llava_v1"), ("bunny", "bunny")):
        data = FAMILIES[name].recipe["data"]
        assert (data["template"], data["aspect_ratio"]) == (template, "pad")


def test_the_code_of_a_hub_layout_has_priority(goldens, tmp_path):
    """A tokenizer of a language model has that model's chat template."""
    folder = shutil.copytree(goldens / "ckpt/internvl", tmp_path / "internvl")
    shutil.copytree(goldens / "tokenizers/internvl", folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text("other")
    found = inputs_of(folder)
    assert (found.template.name, found.notes) == ("phi3-chat", ())
