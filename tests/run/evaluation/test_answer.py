"""`vp.answer`, `vp.questions` and `vlmprune chat`: a question to a model, without an experiment."""

from types import SimpleNamespace

import pytest
from hf_cases import copy_llava
from PIL import Image
from refusal import refused

import vlmprune_jax as vp
from vlmprune_jax.run.cli.main import main

QUESTION = "Is a dog here?"
MISSING = [f"missing.{kind}" for kind in ("png", "jpg", "mp4", "mkv", "webm")]


@pytest.fixture(scope="module")
def folder(goldens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llava"
    copy_llava(goldens, folder)
    return folder


def test_an_answer_is_that_of_an_evaluation(goldens, folder, capsys):
    image = goldens / "data/images/img1.png"
    entry = {"image": image.name, "question": QUESTION, "answers": ["x"]}
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
        *(
            (argv, "chat takes models, images or videos and a question: vlmprune")
            for argv in ([], ["{image}", QUESTION])
        ),
        (["{folder}", "{folder}/config.json", QUESTION], "config.json (record question): not a readable image"),
        *((["{folder}", name, QUESTION], f"{name}: no such file: name an image or a video") for name in MISSING),
        (["{folder}", "{folder}-missing", "{image}", QUESTION], "llava-missing: no such folder"),
        (["{folder}", "{image}"], 'img1.png, not a question: add one (vlmprune chat MODEL image.png "What is'),
        (["{folder}", "{folder}"], "llava, not a question: add one"),
    ],
)
def test_wrong_arguments(goldens, folder, capsys, argv, message):
    image = goldens / "data/images/img1.png"
    assert main(["chat", *[arg.format(folder=folder, image=image) for arg in argv]]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)


def test_what_has_no_tokenizer_or_no_such_setting(folder):
    """A model that no folder made has no tokenizer, and one with a trimmed vocabulary another."""
    model, trimmed = vp.load(folder), SimpleNamespace(vocabulary=())
    for changes in ({"source": None}, {"plan": trimmed}):
        refused("in memory has no tokenizer: pass source_dir=", vp.answer, model.replace(**changes), None, QUESTION)
    refused(f"source_dir=other .* {folder} has its own", vp.answer, folder, None, QUESTION, source_dir="other")
    refused("setting 'max_length' is not accepted here", vp.questions, folder, [], max_length=9)
