"""`vp.answer`, `vp.questions` and `vlmprune chat`: a question to a model, without an experiment."""

from types import SimpleNamespace

import pytest
from hf_cases import copy_llava
from PIL import Image

import vlmprune_jax as vp
from vlmprune_jax.run.cli.main import main

QUESTION = "Is a dog here?"


@pytest.fixture(scope="module")
def folder(goldens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llava"
    copy_llava(goldens, folder)
    return folder


def test_an_answer_is_that_of_an_evaluation(goldens, folder, capsys):
    image = goldens / "data/images/img1.png"
    entry = {
        "image": image.name,
        "conversations": [{"from": "human", "value": f"<image>\n{QUESTION}"}],
        "answers": ["x"],
    }
    asked = vp.questions(folder, [entry], images=image.parent, batch_size=1)
    model = vp.load(folder)
    (expected,) = vp.evaluate(model, asked, max_new_tokens=3).answers
    assert expected.prediction
    with Image.open(image) as picture:
        for source in (image, str(image), [image], picture):
            assert vp.answer(model, source, QUESTION, max_new_tokens=3) == expected.prediction
    assert main(["chat", str(folder), str(folder), str(image), QUESTION, "--max_new_tokens=3"]) == 0
    size = f"{folder} ({vp.count_params(model):,} parameters)"
    assert capsys.readouterr().out.split("\n") == [*[size, f"  {expected.prediction}"] * 2, ""]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], 'chat takes models, images or videos and a question: vlmprune chat MODEL image.png "What is this?"'),
        (["{image}", QUESTION], "chat takes models, images or videos and a question: vlmprune chat MODEL image.png"),
        (["{folder}", "{folder}/config.json", QUESTION], "config.json (record question): not a readable image"),
        *[
            (["{folder}", f"missing.{kind}", QUESTION], f"missing.{kind}: no such file: name an image or a video")
            for kind in ("png", "jpg", "mp4", "mkv", "webm")
        ],
        (["{folder}", "{folder}-missing", "{image}", QUESTION], "llava-missing: no such folder"),
        (["{folder}", "{image}"], 'img1.png, not a question: add one (vlmprune chat MODEL image.png "What is'),
        (["{folder}", "missing.png"], "chat: the last argument is missing.png, not a question: add one"),
        (["{folder}", "{folder}"], "llava, not a question: add one"),
    ],
)
def test_wrong_arguments(goldens, folder, capsys, argv, message):
    image = goldens / "data/images/img1.png"
    assert main(["chat", *[arg.format(folder=folder, image=image) for arg in argv]]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)


def test_a_model_in_memory_needs_the_folder_of_its_tokenizer(folder):
    """As one that no folder made has none, and one with a trimmed vocabulary another."""
    model, trimmed = vp.load(folder), SimpleNamespace(vocabulary=())
    for changes in ({"source": None}, {"plan": trimmed}):
        with pytest.raises(vp.UserError, match="a model in memory has no tokenizer: pass source_dir="):
            vp.answer(model.replace(**changes), None, QUESTION)


def test_a_folder_has_its_own_tokenizer(folder):
    with pytest.raises(vp.UserError, match=f"source_dir=other has no effect, because {folder} has its own tokenizer"):
        vp.answer(folder, None, QUESTION, source_dir="other")


def test_settings_that_no_question_has(folder):
    with pytest.raises(vp.UserError, match="setting 'max_length' is not accepted here"):
        vp.questions(folder, [], max_length=9)
