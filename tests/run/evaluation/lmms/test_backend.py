"""lmms-eval's model `vlmprune_jax`: its answers are those of single forwards, and what it cannot do it refuses."""

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refusal import refused
from vlm_cases import images_of

from vlmprune_jax.core.models.generate import generate
from vlmprune_jax.io.data.encoding import Shape

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install -e '.[eval]'")
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]
GREEDY = {"max_new_tokens": 3, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}


@pytest.fixture(scope="module")
def made(goldens, tmp_path_factory):
    """Callable (**model_args) -> the model as lmms-eval makes it from `--model_args`."""
    from hf_cases import copy_llava
    from lmms_eval import models

    folder = copy_llava(goldens, tmp_path_factory.mktemp("backend") / "llava")

    def make(arguments="system=", **additional):
        text = f"pretrained={folder},{arguments}".rstrip(",")
        return models.get_model("vlmprune_jax").create_from_arg_string(text, {"batch_size": 4, **additional})

    return make


def picture(goldens, number):
    with Image.open(goldens / f"data/images/img{number}.png") as image:
        return image.convert("RGB")


def asked(backend, contents, **kwargs):
    """Requests of a task whose documents are lists of texts and pictures."""

    def messages(doc):
        parts = [part if isinstance(part, dict) else text_or_image(part) for part in doc]
        return [{"role": "user", "content": parts}]

    def text_or_image(part):
        return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "url": part}

    backend.task_dict["t"] = {"test": contents}
    given = {**GREEDY, **kwargs}
    return [types.SimpleNamespace(args=("", messages, given, i, "t", "test")) for i in range(len(contents))]


def records_of(backend, requests):
    from vlmprune_jax.run.evaluation.lmms.backend import _Pictures

    pictures = _Pictures(backend.task_dict)
    return [pictures.record(request) for request in requests]


def alone(backend, record, **changes):
    """(encoder, ids of the prompt, pixels, answer) of a record that shares no batch."""
    encoder = dataclasses.replace(backend._inputs.encoder(backend._model.cfg, 0), max_images=2, **changes)
    ids = encoder.prompt_ids(record)
    pixels = images_of(encoder, record, Shape(0, len(record.images)))["pixel_values"] if record.images else None
    tokens = generate(backend._model, ids[None], pixel_values=pixels, max_new_tokens=3)
    return encoder, ids, pixels, encoder.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()


def test_answers_are_those_of_single_rows(made, goldens):
    """Mixed lengths and numbers of images; two questions share an image; each is asked alone as well."""
    backend = made()
    first, second = picture(goldens, 0), picture(goldens, 1)
    contents = [
        [first, "Is it red?"],
        ["Hello there, " * 20 + "is it?"],
        [first, "A dog? " * 12],
        ["Compare", first, "with", second, "now."],
        [second, "Is it red?"],
        [first, "What?"],
    ]
    requests = asked(backend, contents)
    answers = backend.generate_until(requests)
    for place, (answer, record) in enumerate(zip(answers, records_of(backend, requests), strict=True)):
        encoder, _, pixels, text = alone(backend, record)
        if record.images:
            paths = [
                goldens / f"data/images/img{int(part is second)}.png"
                for part in contents[place]
                if part is first or part is second
            ]
            for ours, path in zip(pixels, paths, strict=True):
                np.testing.assert_array_equal(ours, encoder.image_loader.load(path, "r", len(paths))[0])
        assert answer.text == text, place
        assert 0 < answer.token_counts.output_tokens <= 3


def test_images_come_first_where_the_family_has_them_there(made, goldens):
    backend = made()
    contents = [["Compare", picture(goldens, 0), "with", picture(goldens, 1)]]
    (record,) = records_of(backend, asked(backend, contents))
    assert record.turns == (("human", "Compare\n<image>\nwith\n<image>"),)
    encoder, ids, *_ = alone(backend, record)
    marks = np.flatnonzero(ids == encoder.image_token_id)
    assert marks[-1] - marks[0] < 2 * encoder.tokens_per_image + 3  # nothing but a line break between them


def test_images_stay_in_the_text_where_the_family_has_them_there(goldens, tmp_path):
    """InternVL: an image is cut into tiles, here one each, between the words around it; answers are those of rows."""
    from hf_cases import copy_golden

    from vlmprune_jax.run.evaluation.lmms.backend import VlmpruneJax

    folder = copy_golden(goldens, "internvl", tmp_path / "internvl")
    shutil.copytree(goldens / "tokenizers/internvl", folder, dirs_exist_ok=True)
    backend = VlmpruneJax(str(folder), batch_size=2, max_tiles=1)
    first, second = picture(goldens, 0), picture(goldens, 1)
    requests = asked(backend, [["Compare", first, "with", second, "now"], [first, "?"], ["Hi"]])
    answers, records = backend.generate_until(requests), records_of(backend, requests)
    for record, answer in zip(records, answers, strict=True):
        encoder, ids, _, text = alone(backend, record, tile_buckets=None)
        assert answer.text == text
        if record is records[0]:
            marks = np.flatnonzero(ids == encoder.image_token_id)
            between = encoder.tokenizer.decode(ids[marks[0] : marks[-1]])
            assert "with" in between
            assert "now" not in between


def test_answers_about_videos_are_those_of_questions(goldens):
    """Tasks name files; rows of a video, of an image and of a text are mixed."""
    import vlmprune_jax as vp
    from vlmprune_jax.run.evaluation.lmms.backend import VlmpruneJax

    folder, clips = goldens / "video/qwen3_vl/ckpt", goldens / "video/clips"
    backend = VlmpruneJax(str(folder), batch_size=2, video_frames=4)
    clip = {"type": "video", "url": str(clips / "main.mp4")}
    contents = [[clip, "What moves?"], [picture(goldens, 0), "What?"], ["Hi"]]
    answers = [answer.text for answer in backend.generate_until(asked(backend, contents))]
    record = {"video": "main.mp4", "question": "What moves?", "answers": ["x"]}
    questions = vp.questions(folder, [record], images=clips, video_frames=4)
    (expected,) = vp.evaluate(vp.load(folder), questions, max_new_tokens=3).answers
    assert answers[0] == expected.prediction
    assert len(answers) == 3


def test_pictures_are_read_without_loss(made, goldens):
    backend = made()
    for mode in ("RGB", "L", "P", "CMYK"):
        image = picture(goldens, 0).convert(mode)
        (record,) = records_of(backend, asked(backend, [[image, "?"]]))
        (stored,) = record.images
        with Image.open(io.BytesIO(stored.read_bytes())) as read:
            np.testing.assert_array_equal(np.asarray(read.convert("RGB")), np.asarray(image.convert("RGB")))


def test_answers_end_at_the_models_positions(made, goldens):
    backend = made()
    cfg = backend._model.cfg
    (answer,) = backend.generate_until(asked(backend, [["Hi"]], max_new_tokens=16_384))
    assert answer.token_counts.output_tokens <= max(cfg.text.max_positions, 128)


@pytest.mark.parametrize(
    ("contents", "kwargs", "message"),
    [
        (["a"], {"temperature": 0.7}, "task t: generation_kwargs temperature=0.7, but vlmprune_jax decodes greedily"),
        (["a"], {"temperature": None, "do_sample": True}, "generation_kwargs do_sample=True"),
        (["a"], {"num_beams": 4}, "generation_kwargs num_beams=4"),
        (["a <image> b"], {}, "t/0: its text contains the token <image>"),
        ([{"type": "audio", "url": "x.wav"}], {}, "t/0: contains audio, which this model does not take"),
        ([{"type": "video", "url": "http://x.mp4"}], {}, "t/0: its video is 'http://x.mp4', expected the path"),
        ([{"type": "video", "url": "x.mp4", "start_time": 1.0, "end_time": 0.5}], {}, "t/0: 'start' and 'end' must be"),
        ([{"type": "image", "url": 3}], {}, "t/0: its image is a int, expected a Pillow image"),
    ],
)
def test_what_is_refused(made, contents, kwargs, message):
    backend = made()
    refused(re.escape(message), backend.generate_until, asked(backend, [contents], **kwargs))


def test_wrong_model_args(made):
    from vlmprune_jax.run.evaluation.lmms.backend import VlmpruneJax

    for arguments, fact in {
        "sistem=x": "has no argument 'sistem'; did you mean 'system'",
        "template=lava": "data.template 'lava' is not one of",
        "dtype=float8": "dtype",
        "data=3": "needs 3 devices",
        "data=x": "--model_args.data='x' must be a whole number",
        "max_image_pixels=0": "max_image_pixels=0 must be at least 1",
    }.items():
        refused(fact, made, arguments)
    refused("needs pretrained=DIR", VlmpruneJax)
    refused("jax chooses the devices", VlmpruneJax, "x", device="cuda")
    refused("no such folder", VlmpruneJax, "/no/such/folder")
    refused("batch_size", VlmpruneJax, "x", batch_size="auto:4")


def test_on_a_mesh(made, goldens):
    contents = [[picture(goldens, i % 2), f"Is it red? {i}"] for i in range(5)]
    alone, split = made(), made("system=,data=2,fsdp=2,tensor=2")
    texts = [[a.text for a in backend.generate_until(asked(backend, contents))] for backend in (alone, split)]
    assert texts[0] == texts[1]


# --- the command of lmms-eval -----------------------------------------------------------------------------------------

QUESTIONS = 160
TASK = """
task: easyvqa
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}/test.json"}}}}
test_split: test
output_type: generate_until
doc_to_text: !function easyvqa_task.text
doc_to_target: !function easyvqa_task.target
doc_to_messages: !function easyvqa_task.messages
generation_kwargs: {{max_new_tokens: 4, temperature: 0, do_sample: false}}
lmms_eval_specific_kwargs: {{default: {{images: "{data}/images"}}}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
FUNCTIONS = """
from PIL import Image

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["conversations"][0]["value"].replace("<image>", "").strip()

def target(doc):
    return doc["conversations"][1]["value"]

def messages(doc, lmms_eval_specific_kwargs):
    image = Image.open(lmms_eval_specific_kwargs["images"] + "/" + doc["image"]).convert("RGB")
    return [{"role": "user", "content": [{"type": "image", "url": image}, {"type": "text", "text": text(doc)}]}]
"""


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_the_same_answers_in_three_ways(tmp_path):
    """easy-VQA, an export that lost four layers: vlmprune, lmms-eval with our model, and with its own in PyTorch."""
    pytest.importorskip("decord", reason="lmms-eval's llava_hf imports decord: pip install decord")
    from hf_cases import keep_layers

    import vlmprune_jax as vp
    from vlmprune_jax.run.demo.easyvqa import write_dataset

    teacher, export, data = Path(vp.__file__).parent / "demo/teacher", tmp_path / "export", tmp_path / "data"
    pruned, plan = keep_layers(vp.load(teacher), [0, 1, 3, 5, 8, 9])
    vp.save(pruned, export, source_dir=teacher, dtype="float32", plan=plan)
    write_dataset(data)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/easyvqa.yaml").write_text(TASK.format(data=data))
    (tmp_path / "tasks/easyvqa_task.py").write_text(FUNCTIONS)
    records = json.loads((data / "test.json").read_text())[:QUESTIONS]
    questions = vp.questions(export, records, images=data / "images", system="", aspect_ratio="square")
    ours = vp.evaluate(vp.load(export), questions, max_new_tokens=4)
    assert 0.5 < ours.accuracy < 0.98  # wrong answers among them
    options = {"vlmprune_jax": ("system=,aspect_ratio=square", "--batch_size=32"),
               "llava_hf": ("device_map=cpu", "--batch_size=1", "--device=cpu")}  # fmt: skip
    for model, (arguments, *flags) in options.items():
        out = tmp_path / model
        command = [sys.executable, "-m", "lmms_eval", "--model", model]
        command += ["--model_args", f"pretrained={export},{arguments}"]
        command += ["--tasks", "easyvqa", "--include_path", str(tmp_path / "tasks"), "--output_path", str(out)]
        command += ["--log_samples", f"--limit={QUESTIONS}", *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(out / "hf")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
        files = [*out.rglob("*_samples_easyvqa.jsonl")]
        assert files, done.stdout[-3000:] + done.stderr[-3000:]
        samples = sorted(map(json.loads, files[0].read_text().splitlines()), key=lambda sample: sample["doc_id"])
        texts = [np.ravel(sample["filtered_resps"])[0] for sample in samples]
        assert texts == [answer.prediction for answer in ours.answers], model
