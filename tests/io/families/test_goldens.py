"""Vision-language families against what stock transformers computes: weights, forward, answers, prompts, images."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import packed, tower_values
from golden_cases import CLOSE, DENSE, FAMILIES, MIXTURES, Golden, cut_layers, cuts_of
from hf_cases import assert_same_tensors, edit_weights, mean_loss, prune
from rounding import assert_same_sums
from torch_compat import VERSIONS

import vlmprune_jax as vp
from vlmprune_jax.core.config import IGNORED
from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.core.models.inputs import in_cells
from vlmprune_jax.core.models.params import flatten, unstack_layers
from vlmprune_jax.core.models.vlm import Model, features_of, to_nnx
from vlmprune_jax.core.prune.criteria.groups import reduce_groups, summed_axes
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.io.checkpoints.read import FileArray, open_model
from vlmprune_jax.io.data.chat_template import choose_template
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.images import load_image_processor
from vlmprune_jax.io.data.prompts import load_tokenizer, tokenize_prompt, tokenize_training
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.io.exports.reload import check_export
from vlmprune_jax.io.families import detect

STOCK = {"class_name": "AutoModelForImageTextToText"}
EACH = ("qwen3_5", "qwen3_vl_moe")


@pytest.fixture(scope="module", params=DENSE)
def golden(goldens, request):
    return Golden(goldens / "families" / request.param)


def of_families(quick=(), among=FAMILIES):
    """A row per family, slow but for some: the stored outputs of a new family make its row."""
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in among if name not in quick]
    return pytest.mark.parametrize("golden", [*quick, *slow], indirect=True)


@of_families(quick=FAMILIES)
def test_forward(golden):
    """All cases as rows of one padded batch, which compiles once, with their hidden states and images' features."""
    stored, rows = golden.arrays, [golden.arrays[f"{case}_input_ids"] for case in golden.cases]
    inputs = golden.padded(golden.cases, rows)
    logits, aux = vp.forward(golden.model, **inputs, capture=("hidden", "image_features"))
    features = np.concatenate([stored[f"{case}_features"] for case in golden.cases if golden.images(case)])
    np.testing.assert_allclose(np.reshape(aux["image_features"], features.shape), features, **CLOSE)
    for number, (case, row) in enumerate(zip(golden.cases, rows, strict=True)):
        expected, labels, found = stored[f"{case}_logits"], stored[f"{case}_labels"], logits[number, -len(row) :]
        np.testing.assert_allclose(found[-len(expected) :], expected, **CLOSE, err_msg=case)
        loss = mean_loss(found[None], labels[None])
        np.testing.assert_allclose(loss, stored[f"{case}_loss"], rtol=1e-5, err_msg=case)
        if f"{case}_hidden" in stored:
            states = np.stack(aux["hidden"])[:, number, -len(row) :]
            np.testing.assert_allclose(states, stored[f"{case}_hidden"], **CLOSE, err_msg=case)
    if "length130_input_ids" in stored:  # two chunks and a bit, without a mask
        expected = stored["length130_last_logits"]
        logits, _ = vp.forward(golden.model, stored["length130_input_ids"][None])
        np.testing.assert_allclose(logits[0, -len(expected) :], expected, **CLOSE)


@of_families(quick=["qwen3_5"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_of_padded_batches(golden, side):
    scores = vp.score(golden.model, [golden.batch(side)], criterion="block_influence")
    np.testing.assert_allclose(scores.layers, golden.arrays[f"batch_{side}_block_influence"], rtol=1e-4)


def test_tower(golden):
    states = golden.arrays["single_vision_states"]
    model, pixels = golden.model, golden.arrays["image0_pixel_values"]
    if golden.positioned:
        pixels, grid = in_cells(golden.model.cfg, pixels, golden.arrays["image0_position_ids"][None])
        images = packed(pixels[None], jnp.asarray(grid)[None])
        found = tower_values(model.params, model.cfg, images)
        rows, columns = grid[0, 1:]
        merge = golden.model.cfg.vision.merge
        order = np.arange(rows * columns).reshape(rows // merge, columns // merge, merge, merge)
        order = order.transpose(0, 2, 1, 3).reshape(-1)  # stored row by row of patches
        found = [(block.before[:, order], block.after[:, order]) for block in found]
    elif golden.patched:  # with padding behind the image
        grid, order = jnp.asarray(golden.arrays["image0_grid_thw"])[None, None], slice(len(pixels))
        images = packed(np.concatenate([pixels, np.ones((4, pixels.shape[1]), np.float32)])[None], grid)
        found, tower = tower_values(model.params, model.cfg, images), to_nnx(model).vision
        if any(shape.mixer.window for shape in tower.cfg.layers):  # stored window by window
            patterns = tower.context_of(images.values, images._asdict()).patterns
            windows = patterns[tower.cfg.layers[0].mixer.pattern].segments
            order = np.argsort(windows[0, :-4], kind="stable")
        found = [(block.before[:, order], block.after[:, order]) for block in found]
    else:
        found = tower_values(model.params, model.cfg, packed(pixels[:1]))
    np.testing.assert_allclose(np.concatenate([found[0][0], *(block[1] for block in found)]), states, **CLOSE)


@of_families(quick=["qwen3_5"])
def test_answers_of_a_padded_batch(golden):
    prompts = [golden.arrays[f"{c}_input_ids"][: golden.facts["cases"][c]["prompt_len"]] for c in golden.cases]
    inputs = golden.padded(golden.cases, prompts)
    found = vp.generate(golden.model, **inputs, max_new_tokens=8, eos_token_ids=())
    np.testing.assert_array_equal(found, [golden.arrays[f"{case}_generated"] for case in golden.cases])


@of_families(among=[*DENSE, *MIXTURES])
def test_a_mesh_computes_the_same(golden):
    batch = golden.batch("left")
    batch.pop("labels")
    expected, _ = vp.forward(golden.model, **batch)
    spread = vp.load(golden.ckpt, mesh=make_mesh(2, 4, 1))
    found, _ = vp.forward(spread, **batch)
    np.testing.assert_allclose(np.asarray(found)[:, -8:], np.asarray(expected)[:, -8:], atol=1e-5, rtol=1e-5)


QUICK = [*((family, "all") for family in (*EACH, "internvl_moe")), ("gemma3", "without_1_3")]
CUTS = [
    # where all cuts are in one, each alone is slow; so are those of which a quick test of exports knows the logits
    pytest.param(
        family, cut, marks=pytest.mark.slow if ("all" in cuts and cut != "all") or (family, cut) in QUICK else ()
    )
    for family, cuts in ((family, cuts_of(family)) for family in FAMILIES)
    for cut in cuts
]


@pytest.mark.parametrize(("golden", "cut"), CUTS, indirect=["golden"])
def test_cuts(golden, cut):
    """What stock transformers computes without layers, experts, neurons or heads; consumers of a layer's keys too."""
    smaller, plan = prune(golden.model, cut_layers(golden, cut))
    assert vp.PrunePlan.from_json(plan.to_json()) == plan
    for case, logits in golden.logits(("single", "text"), smaller).items():
        expected = golden.arrays[f"{case}_logits_{cut}"]
        np.testing.assert_allclose(logits[-len(expected) :], expected, **CLOSE, err_msg=case)


@of_families(
    quick=EACH,
    among=["gemma3", "gemma4", "gemma4_dense", "gemma4_moe", "internvl_moe", "qwen3_5_moe"],
)
def test_gradients_are_those_of_autograd(golden, torch_outputs, tmp_path):
    """The gradient of the loss in every weight, and Taylor scores of it, against stock transformers."""
    model, stored = golden.model, golden.arrays
    batch = {**golden.batch("right"), **golden.types("batch_right")}
    if golden.folder.name == "qwen3_5":  # two chunks and a bit
        ids = stored["length130_input_ids"][None]
        batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids}
    theirs = torch_outputs(golden.ckpt, batch, **STOCK, version="5", want=("gradients",))
    shutil.copytree(golden.ckpt, tmp_path / "model")
    stored = golden.as_stored(theirs)
    edit_weights(tmp_path / "model", lambda held: {key: stored.get(key, np.zeros_like(x)) for key, x in held.items()})
    gradient = vp.load(tmp_path / "model")
    expected, inputs = flatten(gradient.params), {name: array for name, array in batch.items() if name != "labels"}

    def loss(params):
        logits = jax.nn.log_softmax(vp.forward(Model(params, model.cfg), **inputs)[0][:, :-1])
        labels = batch["labels"][:, 1:]
        picked = jnp.take_along_axis(logits, np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return -jnp.mean(picked[labels != IGNORED])

    for path, found in flatten(jax.grad(loss)(model.params)).items():
        if path.startswith("text/") and not path.endswith("layer_scalar/weight"):  # which is a buffer in the class
            if path == "text/extra_inputs/table/weight":
                found = found.at[model.cfg.pad_token_id].set(0)  # torch's padding_idx has no gradient
            scale = float(np.abs(expected[path]).max())
            assert scale > 1e-5, path
            np.testing.assert_allclose(found, expected[path], atol=1e-4 * scale, rtol=1e-4, err_msg=path)
    if golden.folder.name in DENSE:
        for stack in ("text", "vision"):
            check_taylor(model, gradient, batch, stack)


def check_taylor(model, gradient, batch, stack):
    """Sums of |weight x gradient|, and of weight x gradient by matrix, over what a head or neuron has."""
    batch = {name: array for name, array in batch.items() if "type" not in name}
    axes, sizes = summed_axes(model.cfg, stack), None
    layers = [unstack_layers(one.params, model.cfg, stack)[0] for one in (model, gradient)]
    for variant in ("param_first", "vectorize"):
        scores = vp.score(model, [batch], criterion="taylor", variant=variant, gqa="groups", stack=stack)
        products = [
            {name: np.asarray(w[name] * g[name], np.float64) for name in axes if name in w}
            for w, g in zip(*layers, strict=True)
        ]
        channels = [
            {
                name: np.abs(x.sum(axes[name])) if variant == "vectorize" else np.abs(x).sum(axes[name])
                for name, x in layer.items()
            }
            for layer in products
        ]
        expected = reduce_groups(channels, model.cfg, reduction="sum", gqa="groups", stack=stack).values()
        sizes = sizes or expected
        for mine, sums, size in zip(scores.values.values(), expected, sizes, strict=True):
            assert_same_sums(mine, sums, size, f"{stack} {variant}")


@of_families(quick=FAMILIES)
def test_there_and_back(golden, tmp_path):
    has_mtp = any(key.startswith("mtp.") for key in Checkpoint(golden.ckpt))
    options = {"mtp": "cut"} if has_mtp else {}
    vp.save(golden.model, tmp_path / "out", source_dir=golden.ckpt, dtype="source", **options)
    assert vp.load(tmp_path / "out").cfg == golden.model.cfg
    shutil.copytree(golden.ckpt, tmp_path / "hub")
    if golden.respelled:
        saved = {names["saved_by_5.24"]: names["hub"] for names in golden.keys.values()}
        edit_weights(tmp_path / "hub", lambda tensors: {saved[key]: value for key, value in tensors.items()})
    assert_same_tensors(tmp_path / "hub", tmp_path / "out")


@pytest.mark.parametrize("spelling", ["memory", "hub"])
def test_every_spelling(golden, tmp_path, spelling):
    shutil.copytree(golden.ckpt, tmp_path / "model")
    hub = "hub" if golden.respelled else "hub_4.x"
    saved = {
        names["saved_by_5.24"]: name if spelling == "memory" else names[hub] for name, names in golden.keys.items()
    }
    edit_weights(tmp_path / "model", lambda tensors: {saved[key]: value for key, value in tensors.items()})
    if spelling != "memory":
        shutil.copy(golden.folder / "config_hub_style.json", tmp_path / "model/config.json")
    model = vp.load(tmp_path / "model")
    ends = {"eos_token_ids": golden.model.cfg.eos_token_ids}
    assert dataclasses.replace(model.cfg, **ends) == golden.model.cfg
    for path, leaf in flatten(model.params).items():
        assert np.array_equal(leaf, flatten(golden.model.params)[path]), path


def as_record(golden, case):
    """The golden chat with LLaVA's placeholders; a system message leads the first turn, as in Gemma 3's template."""
    facts, turns, system = golden.facts["cases"][case], [], ""
    for message in facts["messages"]:
        text = "".join(part.get("text", "<image>\n") for part in message["content"])
        if message["role"] == "system":
            system = f"{text}\n\n"
        else:
            turns.append(("human" if message["role"] == "user" else "gpt", system + text))
            system = ""
    paths = tuple(golden.folder / golden.facts["images"][k]["file"] for k in facts["images"])
    return Record(case, (*turns, ("gpt", facts["answer"])), paths)


def test_budgets_of_tokens(goldens, tmp_path):
    """Grids of images for each, their pixels for two, and features of a budget that is not the folder's."""
    golden = Golden(goldens / "families/gemma4")
    config = json.loads((golden.ckpt / "processor_config.json").read_text())
    for budget in (70, 140, 280, 560, 1120):
        config["image_processor"]["max_soft_tokens"] = budget
        (tmp_path / "processor_config.json").write_text(json.dumps(config))
        images = load_image_processor(tmp_path, DataSpec(aspect_ratio="pad", cache_megabytes=0), patches=(12, 3))
        for facts in golden.facts["images"]:
            (shape,), expected = images.shapes([golden.folder / facts["file"]], "record"), facts["budgets"][str(budget)]
            assert ([shape.rows, shape.columns], shape.tokens) == (expected["grid"], expected["image_tokens"])
        if budget in (140, 280):
            pixels = images.load(golden.folder / "images/0.png", "record")
            levels, places = (golden.arrays[f"image0_budget{budget}_{name}"] for name in ("levels", "position_ids"))
            levels, grid = in_cells(golden.model.cfg, levels[None] / 255, places[None])
            np.testing.assert_allclose(pixels, levels, atol=1 / 255 + 1e-6, rtol=0)  # torchvision's levels
    module, grid = to_nnx(golden.model), jnp.asarray(grid)[None]
    features = module.projector(features_of(module.vision, module.cfg, packed(levels[None], grid)))
    np.testing.assert_allclose(features[0], golden.arrays["image0_budget280_features"], **CLOSE)


@pytest.mark.parametrize("golden", [name for name in DENSE if "qwen" not in name], indirect=True)
@pytest.mark.parametrize("processor", ["", "_hub_style"])
def test_prompts_labels_and_images(golden, tmp_path, processor):
    for path in golden.ckpt.iterdir():
        shutil.copy(path, tmp_path)
    if processor and golden.positioned:
        shutil.copy(golden.folder / "processor_config_hub_style.json", tmp_path / "processor_config.json")
    elif processor:
        (tmp_path / "processor_config.json").unlink()
        shutil.copy(golden.folder / "preprocessor_config_hub_style.json", tmp_path / "preprocessor_config.json")
    config, tokenizer = json.loads((tmp_path / "config.json").read_text()), load_tokenizer(tmp_path)
    family, cfg = detect(config, "config.json"), golden.model.cfg
    template = choose_template("auto", family, tokenizer, config=config, has_vision=True)
    load = functools.partial(load_image_processor, data=DataSpec(aspect_ratio="pad"))
    if golden.positioned:
        images = load(tmp_path, patches=(cfg.vision.patch_values, cfg.vision.merge))
    else:
        images = load(tmp_path, image_size=cfg.vision.image_size)
    mean, std = np.float32(0), np.float32(1)
    if not golden.positioned:
        mean, std = (np.float32(p).reshape(3, 1, 1) for p in (images.preparation.mean, images.preparation.std))
    for case in golden.cases:
        record, one_level = as_record(golden, case), 0
        messages = golden.facts["cases"][case]["messages"]
        system = next((m["content"][0]["text"] for m in messages if m["role"] == "system"), "")
        used = template
        if golden.positioned and system:  # a turn of its own
            turns = [(speaker, text.removeprefix(f"{system}\n\n")) for speaker, text in record.turns]
            record, used = dataclasses.replace(record, turns=turns), dataclasses.replace(template, system=system)
        if case == "crops":  # their stored pixels are torchvision's, which differ by a level
            write_crops(golden, tmp_path)
            images, one_level = load(tmp_path, image_size=cfg.vision.image_size), 1 / 255
        shapes = images.shapes(record.images, case)
        options = {"image_token_id": cfg.image_token_id, "tokens_per_image": cfg.tokens_per_image, "images": shapes}
        ids, labels = tokenize_training(record, tokenizer, used, **options, cut_text_at=None)
        stored, answer = golden.arrays[f"{case}_input_ids"], golden.arrays[f"{case}_labels"]
        assert ids.tolist() == stored.tolist(), case
        prompt = tokenize_prompt(record, tokenizer, used, **options)
        assert prompt.tolist() == stored[: golden.facts["cases"][case]["prompt_len"]].tolist()
        first = np.flatnonzero(answer != IGNORED)[0] - 1  # stored is the last answer's alone
        assert labels[first:].tolist() == answer[first:].tolist()
        for path, k, shape in zip(record.images, golden.images(case), shapes, strict=True):
            pixels = images.load(path, case, len(record.images))
            assert len(pixels) == (shape.rows * shape.columns if golden.positioned else shape.slots)
            levels = golden.arrays[f"image{k}_levels_pil"].astype(np.float32)
            if golden.positioned:
                places = golden.arrays[f"image{k}_position_ids"][None]
                levels = in_cells(cfg, levels, places)[0]
            expected = golden.arrays[f"image{k}_crops_pixel_values"] if one_level else (levels / 255 - mean) / std
            atol = one_level / std.min() + 1e-5
            np.testing.assert_allclose(pixels, expected, atol=atol, rtol=0, err_msg=str(path))


def write_crops(golden, folder):
    """Switch pan and scan on in a folder's file, as the golden's processor was called."""
    name = "processor_config.json" if (folder / "processor_config.json").exists() else "preprocessor_config.json"
    config = json.loads((folder / name).read_text())
    (config.get("image_processor") or config).update(golden.facts["cases"]["crops"]["processor_arguments"])
    (folder / name).write_text(json.dumps(config))


EXPORTS = [
    pytest.param(family, cut, marks=() if (family, cut) in QUICK else pytest.mark.slow)
    for family in FAMILIES
    for cut in ("experts", "all", "without_1_3")
    if cut in cuts_of(family)
]


@pytest.mark.parametrize(("golden", "cut"), EXPORTS, indirect=["golden"])
def test_stock_transformers_loads_cut_exports(golden, torch_outputs, tmp_path, monkeypatch, cut):
    """From file to file and from memory, in both versions where both have the class.

    Version 4 reads no rope that 5 wrote, and the inner flag of tied embeddings alone.
    """
    smaller, plan = prune(golden.model, cut_layers(golden, cut))
    options = {"source_dir": golden.ckpt, "dtype": "float32"}
    vp.save(smaller, tmp_path / "out", plan=plan, **options)
    if not golden.respelled:
        assert vp.load(tmp_path / "out").cfg == smaller.cfg
    read, keys = FileArray.read, list[str]()
    monkeypatch.setattr(FileArray, "read", lambda array: keys.append(array.source.key) or read(array))
    vp.save(prune(open_model(golden.ckpt), cut_layers(golden, cut))[0], tmp_path / "files", **options)
    assert cut != "experts" or not any("experts" in key for key in keys)  # whole experts are copied in blocks
    assert_same_tensors(tmp_path / "out", tmp_path / "files")
    assert check_export(smaller, tmp_path / "out")["backend"] == "torch"
    name = golden.folder.name
    for version in VERSIONS if name in DENSE and not golden.positioned else ("5",):
        # version 4 gets SmolVLM's images wrong, and Gemma 3's windows that are smaller than an image
        wrong = version == "4.57" and name in ("smolvlm", "gemma3")
        for case in ("text",) if wrong else ("text", "single"):
            found = torch_outputs(tmp_path / "out", golden.inputs(case), **STOCK, version=version)["logits"]
            expected = golden.arrays[f"{case}_logits_{cut}"]
            np.testing.assert_allclose(found[0, -len(expected) :], expected, **CLOSE, err_msg=f"{case} {version}")


def test_the_pipeline_answers(goldens, torch_outputs, tmp_path):
    """What transformers' processor makes of a chat about two images, and the model's answer, in text."""
    golden = Golden(goldens / "families/internvl3")  # SmolVLM's processor wants num2words, which nothing else does
    vp.save(golden.model, tmp_path / "out", source_dir=golden.ckpt, dtype="float32")
    files = [str(golden.folder / golden.facts["images"][k]["file"]) for k in golden.images("two")]
    content = [{"type": "image", "path": file} for file in files] + [
        {"type": "text", "text": "Compare the two pictures."}
    ]
    made, text = torch_outputs.chat(
        tmp_path / "out", [{"role": "user", "content": content}], version="5", max_new_tokens=8
    )
    stored = golden.arrays["two_input_ids"][: golden.facts["cases"]["two"]["prompt_len"]]
    assert made["input_ids"][0].tolist() == stored.tolist()
    tokenizer = load_tokenizer(golden.ckpt)
    answer = vp.generate(golden.model, made["input_ids"], pixel_values=made["pixel_values"], max_new_tokens=8)
    assert text == tokenizer.decode(answer[0], skip_special_tokens=True)


def test_no_check_in_versions_that_compute_something_else(goldens, tmp_path, monkeypatch):
    golden = Golden(goldens / "families/smolvlm")
    vp.save(golden.model, tmp_path / "out", source_dir=golden.ckpt, dtype="float32")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.57.6")
    assert check_export(golden.model, tmp_path / "out")["backend"] == "jax"
