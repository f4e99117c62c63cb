"""Hub layouts -> stock classes of transformers: the same prompts and pixels, no remote code; logits: test_reload.py."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hf_cases import edit_config, keep_layers, keep_width
from refusal import refused
from torch_compat import VERSIONS

import vlmprune_jax as vp
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.io.data.chat_template import QUESTION, chat_prompt
from vlmprune_jax.io.data.prompts import load_tokenizer, render
from vlmprune_jax.io.exports.reload import check_export
from vlmprune_jax.io.exports.vocabulary import read_tokenizer, token_ids
from vlmprune_jax.io.families import family_of

TOWERS = {"llava_orig": "clip_tower", "bunny": "siglip_tower", "internvl": None}
TOKENIZERS = {"llava_orig": "llava", "bunny": "bunny", "internvl": "internvl"}
PRUNED = {
    "depth": lambda model: keep_layers(model, [0, 2, 4]),
    "width": lambda model: keep_width(model, [0, 2, 3, 5, 6], range(4, 44)),  # 5 heads divide no hidden size here
    "uneven": lambda model: keep_width(model, [1, 3, 4], range(7, 47), only=[1, 2]),
}


@pytest.fixture(scope="module")
def hub(goldens, tmp_path_factory):
    """A golden checkpoint with its tokenizer and a generation config, as a hub folder has them; and its tower."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("hub") / name
            shutil.copytree(goldens / "ckpt" / name, folder)
            for path in (goldens / "tokenizers" / TOKENIZERS[name]).iterdir():
                shutil.copy(path, folder)
            config = json.loads((folder / "config.json").read_text())
            config |= {"max_dynamic_patch": 6} if name == "internvl" else {}  # as in the golden token ids
            (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_hub.Hub"}}))
            (folder / "LICENSE").write_text("as it is")
            (folder / "generation_config.json").write_text(json.dumps({"from_the_source": 7, "eos_token_id": 11}))
            (folder / "modeling_hub.py").write_text("the hub's own code")
            made[name] = folder, TOWERS[name] and goldens / "ckpt" / TOWERS[name]
        return made[name]

    return make


@pytest.fixture(scope="module")
def converted(hub, tmp_path_factory):
    """Prunes and converts one, once; gives the model and its folder."""
    done = {}

    def convert(name, pruning, **options):
        key = (name, pruning, *sorted(options.items()))
        if key not in done:
            source, tower = hub(name)
            model, plan = PRUNED[pruning](vp.load(source, vision_dir=tower))
            out = tmp_path_factory.mktemp("converted") / "out"
            vp.save(
                model, out, source_dir=source, plan=plan, **{"dtype": "float32", "layout": "transformers"} | options
            )
            done[key] = model, out
        return done[key]

    return convert


@pytest.mark.slow
@pytest.mark.parametrize("uneven", ["per_layer", "pad"])
@pytest.mark.parametrize("name", TOWERS)
def test_converted_folders_are_read_and_checked(converted, name, uneven):
    model, out = converted(name, "uneven", uneven=uneven, dtype="bfloat16")
    report = check_export(model, out)
    assert report["backend"] == "torch"
    again = vp.load(out)
    assert again.cfg.layout == "transformers"
    assert again.cfg.text.vocab_size % 64 == 0
    if uneven == "per_layer":
        assert again.cfg.text.layers == model.cfg.text.layers


def chat_of(goldens, number):
    """The first question of a golden sample as a chat, its image a file."""
    sample = json.loads((goldens / "data/samples.json").read_text())[number]
    question = sample["conversations"][0]["value"].replace("<image>", "").strip()
    image = str(goldens / "data/images" / Path(sample["image"]).name)
    return [{"role": "user", "content": [{"type": "image", "path": image}, {"type": "text", "text": question}]}]


def golden_prompt(goldens, name, number, tokens_per_image):
    """The reference's token ids of a sample up to its first answer; -200 stands for an image."""
    family = name.split("_")[0]
    golden = json.loads((goldens / f"data/{family}_tokenized.json").read_text())[family]["samples"][number]
    ids, labels = golden["input_ids"], golden["labels"]
    ids = ids[: next(i for i, label in enumerate(labels) if label != -100)]
    return [one for token in ids for one in ([token] * (tokens_per_image if token == -200 else 1))]


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", TOWERS)
def test_chat_template_and_processor_make_the_familys_prompt(goldens, converted, torch_outputs, name, version):
    """apply_chat_template: the reference's token ids and pixels; and a pipeline answers."""
    model, out = converted(name, "depth")
    images = np.load(goldens / "data/images.npz")
    kind = {"llava_orig": "clip_pad", "bunny": "siglip_pad"}.get(name)
    for number in range(2):
        chat = chat_of(goldens, number)
        made, text = torch_outputs.chat(out, chat, version=version, max_new_tokens=4 if number == 0 else None)
        assert (number == 0) == bool(text)
        expected = golden_prompt(goldens, name, number, model.cfg.tokens_per_image)
        image = json.loads((out / "config.json").read_text()).get("image_token_index", model.cfg.image_token_id)
        expected = [image if token == -200 else token for token in expected]
        assert made["input_ids"][0].tolist() == expected
        assert set(made) == {"input_ids", "attention_mask", "pixel_values"}
        if kind is not None:
            # torchvision (version 5) rounds after a resize otherwise than PIL: one level or two of 255, normalised
            limit = 1e-5 if version == "4.57" else 2 / 255 / 0.26
            np.testing.assert_allclose(made["pixel_values"][0], images[kind][number], atol=limit, rtol=0)


@pytest.mark.parametrize("name", TOWERS)
def test_files_of_a_converted_folder(converted, name):
    model, out = converted(name, "depth")
    names = {path.name for path in out.iterdir()}
    assert {"LICENSE", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "plan.json"} <= names
    assert {"preprocessor_config.json", "README.md"} <= names
    files = (out / f"{part}config.json" for part in ("processor_", "generation_", ""))
    processor, generation, config = (json.loads(file.read_text()) for file in files)
    assert processor.get("image_seq_length", model.cfg.tokens_per_image) == model.cfg.tokens_per_image
    ends = {"llava_orig": "</s>", "bunny": "<|endoftext|>", "internvl": "<|end|>"}
    assert generation["eos_token_id"] == [token_ids(read_tokenizer(out))[ends[name]], 11]
    template = family_of(model.cfg).templates[0]
    if template.video is not None:
        question = [("human", f"<video>\n{QUESTION}")]
        prompt = render(question, template, has_image=False, has_video=True, generation=True).text
        assert chat_prompt(out, load_tokenizer(out), has_image=True, part="video") == prompt
    assert generation["from_the_source"] == 7
    assert generation.get("pad_token_id") == model.cfg.pad_token_id
    assert "modeling_hub.py" not in names
    assert "auto_map" not in config
    assert len(model.cfg.text.layers) == config["text_config"]["num_hidden_layers"] == 3
    assert config["image_seq_length"] == model.cfg.tokens_per_image
    card = (out / "README.md").read_text()
    assert config["architectures"][0] in card
    assert "trust_remote_code" not in card
    assert "Plan fingerprint" in card
    words = config["text_config"]["vocab_size"] - model.cfg.text.vocab_size
    assert (f"The vocabulary has {words} more rows" in card) == (words > 0)
    for key in ("model.embed_tokens", "lm_head"):
        rows = Checkpoint(out)[f"language_model.{key}.weight"]
        mean = np.mean(rows[: model.cfg.text.vocab_size], axis=0, keepdims=True)
        np.testing.assert_allclose(rows[model.cfg.text.vocab_size :], np.repeat(mean, words, axis=0), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_thumbnail": False}, r"use_thumbnail false is not supported .* layout=\"source\""),
        ({"use_thumbnail": None}, "use_thumbnail null"),
        ({"ps_version": "v1"}, r"pixel shuffle v1.*layout \"source\""),
        ({"dynamic_image_size": False, "pad2square": True}, "pad2square true"),
        ({"dynamic_image_size": False}, None),
        ({"max_dynamic_patch": 1, "use_thumbnail": False}, None),
    ],
)
def test_tiles_that_transformers_cannot_cut_are_refused(hub, tmp_path, changes, message):
    source = Path(shutil.copytree(hub("internvl")[0], tmp_path / "source"))
    edit_config(source, **changes)
    out, model = tmp_path / "out", vp.load(source)
    options = {"source_dir": source, "layout": "transformers"}
    if message is not None:
        refused(message, vp.save, model, out, **options)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
    else:
        vp.save(model, out, **options)
        assert json.loads((out / "preprocessor_config.json").read_text())["max_patches"] == 1


def test_the_hubs_layout_keeps_the_hubs_code(converted):
    _, out = converted("bunny", "depth", layout="source")
    assert (out / "modeling_hub.py").read_text() == "the hub's own code"
    assert json.loads((out / "config.json").read_text())["auto_map"] == {"AutoModel": "modeling_hub.Hub"}
    assert 'layout="transformers"' in (out / "README.md").read_text()
    _, out = converted("bunny", "width", layout="source")
    card = (out / "README.md").read_text()
    assert "cannot load: it computes the head size as hidden_size / heads" in card
    assert "loads it" not in card
