"""Videos against what stock transformers computes: rows, pixels, positions, logits, answers, features, scores."""

import functools
import json
import re
import shutil

import jax
import numpy as np
import pytest
from block_cases import packed
from refusal import refused
from repository import load_arrays

import vlmprune_jax as vp
from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.core.models import generate
from vlmprune_jax.core.models.inputs import check_batch, in_cells, read_inputs
from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.core.models.vlm import features_of, to_nnx
from vlmprune_jax.core.recovery.flops import batch_flops
from vlmprune_jax.core.video import frame_indices
from vlmprune_jax.io.checkpoints.batches import open_inputs, to_records
from vlmprune_jax.io.checkpoints.read import read_config
from vlmprune_jax.io.data.cached_arrays import FeatureLoader
from vlmprune_jax.io.data.images import limited_files
from vlmprune_jax.io.data.inputs import TrainingRows
from vlmprune_jax.io.data.processor_files import load_video_config
from vlmprune_jax.io.data.record_cache import compute_records, feature_program
from vlmprune_jax.io.exports.token_sources import Source, tokens_of
from vlmprune_jax.io.families import find
from vlmprune_jax.io.families.templates import VideoText, in_words
from vlmprune_jax.io.families.tiles import VideoShape

FAMILIES = ("qwen3_vl", "qwen2_5_vl", "smolvlm", "internvl3", "gemma4", "gemma4_dense")
CLOSE = {"atol": 1e-4, "rtol": 0}
ANSWERED = [["single"], ["frames", "two", "mixed", "text"]]
NAMES = (
    *("video_grid_thw", "image_grid_thw", "second_per_grid_ts", "video_position_ids", "image_position_ids"),
    "num_frames_per_video",
)


class Golden:
    """One family's stored outputs and its checkpoint."""

    def __init__(self, folder):
        self.name, self.ckpt, self.clips = folder.name, folder / "ckpt", folder.parent / "clips"
        self.facts = json.loads((folder / "golden.json").read_text())
        self.arrays = load_arrays(folder / "golden.npz")
        self.rows = {name: case for name, case in self.facts["cases"].items() if "record" in case}
        self.images = json.loads((self.ckpt / "processor_config.json").read_text())["image_processor"]

    @functools.cached_property
    def model(self):
        return vp.load(self.ckpt)

    def batches(self, *cases, folder=None, rows=None, **settings):
        rows = rows or [self.rows[case]["record"] for case in cases]
        settings = {"max_images": 3, **self.rows[cases[0]]["setting"], **settings}
        return vp.batches(folder or self.ckpt, rows, images=self.clips, **settings)

    def pixels(self, levels, config):
        """Pixel values of stored levels, with the mean and deviation of a processor."""
        values = levels.astype(np.float32) / np.float32(255)
        if self.name.startswith("gemma"):
            return values
        shape = (len(values), 3, -1)
        mean, std = (np.array(config[f"image_{name}"], np.float32)[:, None] for name in ("mean", "std"))
        return ((values.reshape(shape) - mean) / std).reshape(values.shape)

    def inputs(self, case):
        """What the stock processor returns for a row."""
        stored, video = self.arrays, self.facts["video_processor"]
        inputs = {name: stored[f"{case}_{name}"] for name in NAMES if f"{case}_{name}" in stored}
        inputs["input_ids"] = stored[f"{case}_input_ids"][None]
        if f"{case}_mm_token_type_ids" in stored:
            inputs["mm_token_type_ids"] = stored[f"{case}_mm_token_type_ids"][None]
        if f"{case}_pixel_values_videos_levels" in stored:
            inputs["pixel_values_videos"] = self.pixels(stored[f"{case}_pixel_values_videos_levels"], video)
        if f"{case}_pixel_values_levels" in stored:
            levels = stored[f"{case}_pixel_values_levels"]
            inputs["pixel_values"] = self.pixels(levels, self.images)
            if f"{case}_is_frame" in stored:
                frames = stored[f"{case}_is_frame"].reshape(-1)[: len(levels)]
                inputs["pixel_values"][frames] = self.pixels(levels[frames], video)
        return inputs

    def batch(self, *cases):
        """Left-padded rows of these cases, with their arrays joined."""
        rows = [self.inputs(case) for case in cases]
        width = max(row["input_ids"].shape[1] for row in rows)
        for row in rows:
            row["attention_mask"] = np.ones_like(row["input_ids"])
            for name in row.keys() & {"input_ids", "attention_mask", "mm_token_type_ids"}:
                row[name] = np.pad(row[name], ((0, 0), (width - row[name].shape[1], 0)))
        names = {name for row in rows for name in row}
        return {name: np.concatenate([row[name] for row in rows if name in row]) for name in names}


@pytest.fixture(scope="module", params=FAMILIES)
def golden(goldens, request):
    return Golden(goldens / "video" / request.param)


def of_families(*names):
    return pytest.mark.parametrize("golden", names, indirect=True)


def test_rows_are_those_of_the_processor(golden):
    stored = golden.arrays
    for name, case in golden.rows.items():
        if golden.name == "smolvlm" and name == "uneven":  # stock states the padded number of frames for both videos
            continue
        expected = f"{name}_input_ids" if f"{name}_input_ids" in stored else f"{name}_every_frame_input_ids"
        if expected not in stored and case.get("error") and name == "one":
            refused("record 0: its video: a video of 1 frame", golden.batches, name)
            continue
        spoken = {"messages": [*case["messages"], {"role": "assistant", "content": case["answer"]}]}
        arrays = golden.batches(name, rows=[case["record"], spoken], batch_size=2)[0].arrays
        np.testing.assert_array_equal(*arrays["input_ids"], err_msg=name)
        if expected not in stored:  # stock refuses videos with unequal numbers of frames
            assert name == "uneven"
            continue
        np.testing.assert_array_equal(arrays["input_ids"][0], stored[expected], err_msg=name)
        for array in ("labels", "position_ids"):
            if f"{name}_{array}" in stored:
                np.testing.assert_array_equal(arrays[array][0], stored[f"{name}_{array}"], err_msg=name)
        names = [f"{name}_{kind}_grid_thw" for kind in ("video", "image")]
        grids = [stored[grid] for grid in names if grid in stored]
        if grids:  # those of videos and images in the order of their tokens
            found = arrays["media"]["vision"].grid[0]
            assert sorted(found[found.any(-1)].tolist()) == sorted(np.concatenate(grids).tolist()), name
        if f"{name}_second_per_grid_ts" in stored:
            times = arrays["media"]["vision"].times[0]
            np.testing.assert_array_equal(times[times > 0], stored[f"{name}_second_per_grid_ts"], err_msg=name)


def test_pixels_are_pillows(golden):
    arrays, stored = golden.batches("single")[0].arrays, golden.arrays
    expected = golden.pixels(stored["single_levels_pillow"], golden.facts["video_processor"])
    if "single_video_position_ids" in stored:
        expected, _ = in_cells(golden.model.cfg, expected, stored["single_video_position_ids"])
    pixels = arrays["media"]["vision"].values[0]
    np.testing.assert_allclose(pixels[: len(expected)], expected, rtol=2e-6, atol=1e-7)
    assert not pixels[len(expected) :].any()


def test_sizes_of_frames(golden):
    """The stock processor's size, grid and tokens of every number and size of frames."""
    preparation = open_inputs(golden.ckpt, None, None, {})[1].image_loader.videos.preparation
    for case in golden.facts["sizes"]:
        if case["values"] != "folder":
            continue
        frames, size = case["frames"], (case["width"], case["height"])
        if "error" in case:
            refused(r"too short|long side", preparation.plan, *size, frames=frames)
            continue
        shape = preparation.plan(*size, frames=frames)
        if "grid_thw" in case:
            assert [-(-frames // 2), shape.rows, shape.columns] == case["grid_thw"], case
            assert shape.tokens * case["grid_thw"][0] == case["tokens"], case
        elif "tokens_per_frame" in case:
            assert shape.tokens == case["tokens_per_frame"], case
        elif golden.name == "smolvlm":
            assert list(preparation._resized(*size)[::-1]) == case["resized"], case


def test_numbers_and_times_as_text(goldens):
    facts = Golden(goldens / "video/smolvlm").facts
    assert {number: in_words(int(number)) for number in facts["number_words"]} == facts["number_words"]
    text = VideoText("", "", start="{duration}")
    assert {n: text.write(VideoShape(duration=int(n))) for n in facts["durations"]} == facts["durations"]


@of_families("qwen3_vl", "qwen2_5_vl", "smolvlm", "internvl3", "gemma4")
def test_hub_files_describe_the_same(golden, tmp_path):
    shutil.copytree(golden.ckpt, tmp_path / "hub")
    (tmp_path / "hub/processor_config.json").unlink()
    for file in golden.ckpt.parent.glob("*_hub_style.json"):
        shutil.copy(file, tmp_path / "hub" / file.name.replace("_hub_style", ""))
    expected, found = (golden.batches("mixed", folder=folder)[0].arrays for folder in (None, tmp_path / "hub"))
    assert expected.keys() == found.keys()
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_forward_of_the_processors_arrays(golden):
    """A padded batch of videos and a text: what each row's last positions have alone, and the first row's features."""
    cases = ("single", "frames", "text", "two")
    logits, aux = vp.forward(golden.model, **golden.batch(*cases), capture=("image_features",))
    features = golden.arrays["single_features"]
    found = np.asarray(aux["image_features"]).reshape(-1, golden.model.cfg.text.hidden_size)[: len(features)]
    np.testing.assert_allclose(found, features, **CLOSE)
    for row, case in zip(np.asarray(logits), cases, strict=True):
        expected = golden.arrays[f"{case}_logits"]
        np.testing.assert_allclose(row[-len(expected) :], expected, **CLOSE, err_msg=case)


@pytest.mark.slow
def test_forward_and_answers_of_all_cases(golden):
    for case in golden.rows:
        if f"{case}_logits" not in golden.arrays:
            continue
        inputs, expected = golden.inputs(case), golden.arrays[f"{case}_logits"]
        logits = np.asarray(vp.forward(golden.model, **inputs)[0])
        np.testing.assert_allclose(logits[0, -len(expected) :], expected, **CLOSE, err_msg=case)
        if any(case in cases for cases in ANSWERED):
            continue  # below, in batches
        names = {"input_ids", "mm_token_type_ids"} & inputs.keys()
        prompt = {name: inputs[name][:, : golden.rows[case]["prompt_len"]] for name in names}
        tokens = vp.generate(golden.model, **inputs | prompt, max_new_tokens=8, eos_token_ids=())
        np.testing.assert_array_equal(tokens[0], golden.arrays[f"{case}_generated"], err_msg=case)


def test_batches_of_videos_images_and_texts(golden):
    """Rows of different visual inputs in one batch of `vp.batches` have the arrays of the rows alone."""
    cases = ("frames", "mixed", "two", "text")
    batch = golden.batches(*cases, batch_size=4)[0].arrays
    names = {"input_ids", "attention_mask", "media"}
    logits = np.asarray(vp.forward(golden.model, **{name: batch[name] for name in names})[0])
    for row, case in enumerate(cases):
        alone, expected = golden.batches(case)[0].arrays, golden.arrays[f"{case}_logits"]
        last = alone["input_ids"].shape[1]
        assert np.array_equal(batch["attention_mask"][row], np.arange(len(logits[row])) < last), case
        for array, own in zip(jax.tree.leaves(batch), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(array[row][tuple(map(slice, own[0].shape))], own[0], err_msg=case)
        # pixels are Pillow's, of which up to 0.6 % are a level from stock's: near stock, a text as near as alone
        close = CLOSE if case == "text" else {"atol": 0.05}
        np.testing.assert_allclose(logits[row, last - len(expected) : last], expected, **close, err_msg=case)


def check_answers(golden, cases, batch_size):
    rows = [golden.rows[case] for case in cases]
    settings = {"images": golden.clips, "max_images": 2, **rows[0]["setting"]}
    questions = vp.questions(golden.ckpt, [row["record"] for row in rows], batch_size=batch_size, **settings)
    answers = vp.evaluate(golden.model, questions, max_new_tokens=8).answers
    assert [answer.prediction for answer in answers] == [row["greedy_text"].strip() for row in rows]


@of_families("qwen2_5_vl")
def test_an_answer_after_a_video_longer_than_its_sides(golden):
    """Temporal positions exceed those of the question, which follows as after an image."""
    check_answers(golden, ["single"], 1)
    names = ("input_ids", "video_grid_thw", "second_per_grid_ts", "rope_delta")
    ids, grid, seconds, delta = (golden.arrays[f"slow_{name}"] for name in names)
    model, pixels = golden.model, np.zeros((grid.prod(), golden.model.cfg.vision.patch_values), np.float32)
    video = {"pixel_values_videos": pixels, "video_grid_thw": grid, "second_per_grid_ts": seconds}
    arrays = generate._host_inputs(ids[None], None, read_inputs(model.cfg, ids[None], None, video, 1), None)
    state = generate.prefill(model.params, model.cfg, arrays, 1, ())[1]
    assert state.position.item() == len(ids) + delta.item()  # the first generated token follows the last frame


@pytest.mark.slow
@pytest.mark.parametrize("cases", ANSWERED, ids=["by rate", "by number"])
def test_evaluation_answers_as_stock(golden, cases):
    """Each record twice, so that questions share a beginning where a batch has room for both."""
    check_answers(golden, cases * 2, 3)


@of_families("qwen3_vl", "qwen2_5_vl", "smolvlm", "gemma4")
def test_scores_by_token_type(golden):
    inputs = golden.inputs("single")
    inputs |= {"attention_mask": np.ones_like(inputs["input_ids"]), "labels": golden.arrays["single_labels"][None]}
    scores = vp.score(golden.model, [inputs], criterion="block_influence")
    np.testing.assert_allclose(scores.layers, golden.arrays["single_block_influence"], rtol=1e-4)
    visual = "image" if golden.model.cfg.video_token_id is None else "video"
    assert set(scores.by_token_type) == {visual, "prompt", "answer"}


@of_families("qwen3_vl", "qwen2_5_vl", "smolvlm", "internvl3", "gemma4")
def test_a_budget_of_tokens(golden):
    """Frames shrink to `data.video_tokens`; models whose frames have one size say what to lower."""
    tokens = golden.model.cfg.visual_token_ids
    whole = int(np.isin(golden.batches("slow")[0].arrays["input_ids"], tokens).sum())
    if golden.name.startswith("qwen"):
        budget = 2 * whole // 3 if golden.name == "qwen3_vl" else whole - 1
        (batch,) = golden.batches("slow", video_tokens=budget)
        assert 0 < np.isin(batch.arrays["input_ids"], tokens).sum() < whole
    else:
        fact = f"tokens, more than data.video_tokens={whole - 1}: raise it, or lower"
        refused(fact, golden.batches, "slow", video_tokens=whole - 1)


def test_white_space_around_videos_follows_the_folder(goldens, tmp_path):
    """Some chat templates of Gemma 4 write videos between blank lines, others bare."""
    golden = Golden(goldens / "video/gemma4")
    folder = shutil.copytree(golden.ckpt, tmp_path / "bare")
    text = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(re.sub(r"'\s*<\|video\|>\s*'", "'<|video|>'", text))
    inputs = [open_inputs(path, None, None, {})[1] for path in (golden.ckpt, folder)]
    assert [(i.template.video.start, i.template.video.end) for i in inputs] == [("\n\n", "\n\n"), ("", "")]


def test_models_of_images_refuse_videos(goldens):
    folder = goldens / "families/gemma3/ckpt"
    _, inputs = open_inputs(folder, None, goldens / "video/clips", {})
    record = {"video": "main.mp4", "conversations": [{"from": "human", "value": "<video>\nWhat?"}]}
    (record,), encoder = to_records([record], inputs), inputs.encoder(read_config(folder)[1], 0)
    refused("record 0: has a video, but this model takes images only: pass frames", encoder.prompt_ids, record)


@of_families("qwen3_vl", "smolvlm")
def test_features_are_cached_by_temporal_patch(golden, tmp_path):
    cfg, inputs = open_inputs(golden.ckpt, None, golden.clips, golden.rows["single"]["setting"])
    records, cfg = to_records([golden.rows["single"]["record"]], inputs), golden.model.cfg
    shape = cfg.feature_shape[1:] if cfg.dynamic_resolution else cfg.feature_shape
    loader = FeatureLoader(inputs.image_loader, ArrayCache(tmp_path, {"weights": "x"}), shape, np.dtype(np.float32))
    assert len(loader.keys(records[0])) == {"qwen3_vl": 4, "smolvlm": 6}[golden.name]  # pairs, and frames
    rows = TrainingRows(tuple(records), inputs.encoder(cfg, 500), None)
    program = feature_program(golden.model.params["vision"], cfg, loader, None)
    options = {"size": 1, "on_error": "stop", "threads": 1, "mesh": None, "progress": lambda done: None}
    compute_records(loader, rows, [0], program, **options)
    assert loader.has(loader.keys(records[0]))
    visual = records[0].visuals[0]
    pixels, grid = inputs.image_loader.load(visual, "r"), inputs.image_loader.shapes([visual], "r")[0].grid
    tower, of_a_row = to_nnx(golden.model), (pixels[None], np.array([[grid]], np.int32))
    expected = features_of(tower.vision, tower.cfg, packed(*(of_a_row if cfg.dynamic_resolution else (pixels,))))
    expected = expected[0] if cfg.dynamic_resolution else expected
    np.testing.assert_allclose(loader.load(visual, "r"), expected, atol=1e-5, rtol=0)


def test_flops_of_a_video_are_those_of_its_patches(goldens):
    cfg = Golden(goldens / "video/qwen3_vl").model.cfg
    count = batch_flops(cfg, None, vp.LossConfig(ce=1.0), [], rows=1)
    rows, pixels = {name: np.zeros((1, 60), np.int32) for name in ("input_ids", "labels")}, np.zeros((1, 192, 96))
    packs = (Packed(pixels, np.array([grid])) for grid in ([[4, 6, 8]], [[1, 6, 8]] * 4))
    video, images = (count({**rows, "media": {"vision": packed}}) for packed in packs)
    assert video == images > 0


@of_families("qwen3_vl", "smolvlm", "internvl3", "gemma4")
def test_exports_keep_what_videos_need(golden, tmp_path):
    """Processor files, and the tokens of times and numbers when the vocabulary is trimmed."""
    golden.model.save(tmp_path / "out")
    expected, found = (golden.batches("mixed", folder=folder)[0].arrays for folder in (None, tmp_path / "out"))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    source = Source.of(golden.ckpt, golden.model.cfg)
    for case in ("single", "minutes", "slow"):
        ids = golden.arrays[f"{case}_input_ids"]
        text = golden.rows[case]["record"]["conversations"][0]["value"].split("\n")[1]
        question = next(tokens_of(source.tokenizer, [text]))
        video = set(ids[: golden.rows[case]["prompt_len"]].tolist()) - set(question)
        assert video <= source.needed.keys(), case


@of_families("qwen2_5_vl")
def test_losses_and_recovery_take_batches_with_videos(golden):
    (batch,), losses = golden.batches("frames"), vp.LossConfig(ce=1.0)
    before = vp.losses(golden.model, batch, losses)["total"]
    assert before == pytest.approx(float(golden.arrays["frames_loss"]), rel=1e-2)  # Pillow's pixels
    config = vp.RecoverConfig(steps=1, batch_size=3, learning_rate=1e-3, losses=losses)
    student, _ = vp.recover(golden.model, golden.batches("frames", "mixed", "text", batch_size=3), config)
    assert vp.losses(student, batch, losses)["total"] < before


def test_a_limit_on_images_leaves_videos(goldens, tmp_path):
    """Without a file of its own the video processor reads that of images, whose limit the export changes."""
    golden = Golden(goldens / "video/qwen2_5_vl")
    folder = shutil.copytree(golden.ckpt, tmp_path / "hub")
    (folder / "processor_config.json").unlink()
    file = golden.ckpt.parent / "preprocessor_config_hub_style.json"
    shutil.copy(file, folder / "preprocessor_config.json")
    changed = limited_files(folder, 5, 0)
    assert changed["preprocessor_config.json"]["max_pixels"] == 5 * 10**2
    assert changed["video_preprocessor_config.json"] == json.loads(file.read_text())


@of_families("qwen2_5_vl", "gemma4")
def test_a_video_before_an_image_keeps_its_place(golden):
    """Arrays of images and of videos are joined in the order of their tokens, whatever their types."""
    turns = [{"from": "human", "value": "<video>\n<image>\n<video>\nWhich?"}, {"from": "gpt", "value": "Both."}]
    record = {"videos": ["main.mp4", "few.mp4"], "image": "still.png", "conversations": turns}
    settings = {"video_frames": 2, "max_images": 3, "max_length": 400}
    joined = golden.batches("frames", rows=[record], **settings)[0].arrays
    cfg, images = golden.model.cfg, joined["media"]["vision"]
    grids = images.grid[0, :3]
    first, image, last = np.split(images.values[0], np.cumsum(grids.prod(axis=1)))[:3]
    apart = {name: array for name, array in joined.items() if name != "media"}
    apart |= {"pixel_values": image, "image_grid_thw": grids[1:2]}
    apart |= {"pixel_values_videos": np.concatenate([first, last]), "video_grid_thw": grids[::2]}
    if images.times is not None:
        apart["second_per_grid_ts"] = images.times[0, :3:2]
    again = check_batch(cfg, apart)["media"]["vision"]
    for array, wanted in zip(again[:2], images[:2], strict=True):
        np.testing.assert_array_equal(array[0], wanted[0, : len(array[0])])
    apart |= {"pixel_values_videos": apart["pixel_values_videos"][None]}
    refused(r"videos has shape \[1, .*, expected \[.* and video_grid_thw \[2, 3\]", check_batch, cfg, apart)


@of_families("qwen2_5_vl", "internvl3")
def test_all_frames_if_a_processor_does_not_sample(golden, tmp_path):
    """With do_sample_frames false these classes take every frame, whatever rate or number the file has."""
    path = tmp_path / "processor_config.json"
    settings = json.loads((golden.ckpt / path.name).read_text())
    settings["video_processor"] |= {"num_frames": 4, "do_sample_frames": False}
    for sample, frames in ((False, 16), (True, 4)):
        settings["video_processor"]["do_sample_frames"] = sample
        path.write_text(json.dumps(settings))
        video = load_video_config(tmp_path, find(json.loads((golden.ckpt / "config.json").read_text())).video)
        assert len(frame_indices(video, 16, 8.0)) == frames
