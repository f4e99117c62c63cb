"""Model cards whose names and plans come from anywhere."""

import json
import re
import shutil
from importlib import resources

import pytest
from hf_cases import LLAMA, LLAVA, keep_layers, make_folder, prune
from prune_cases import hand_plan

import vlmprune_jax as vp
from vlmprune_jax.core.prune import keep_everything
from vlmprune_jax.io.checkpoints.read import open_model
from vlmprune_jax.io.exports.card import CardFacts, model_name, write_card

EVIL = 'a|b\n# c\n---\nlicense: mit <img src="x"> [d](http://e) `f` **g**'


@pytest.fixture
def folder(tmp_path):
    source = make_folder(tmp_path / "source", LLAMA)
    model, plan = keep_layers(vp.load(source), [0, 3])
    vp.save(model, tmp_path / "out", source_dir=source, plan=plan)
    path = tmp_path / "out/plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"method": EVIL, "criterion": EVIL, "fingerprint": EVIL}))
    return tmp_path / "out", model.cfg


def test_names_are_text(folder):
    out, cfg = folder
    (out.parent / "from").mkdir()
    (out.parent / "from/README.md").write_text("---\nlicense: a]: [b\nlicense_link: # c\n---\n")
    facts = CardFacts(f"org/{EVIL}", datasets=[f"org/{EVIL}"], recovered=True, benchmarks=[[EVIL] * 5])
    write_card(out, cfg, facts, out.parent / "from", loading="here", library="transformers")
    card = (out / "README.md").read_text()
    _, front, text = re.split(r"^---$", card, maxsplit=2, flags=re.M)
    assert [line.partition(":")[0] for line in front.strip().splitlines()] == [
        "library_name", "pipeline_tag", "base_model", "license", "license_link", "datasets", "tags"
    ]  # fmt: skip
    assert 'license: "a]: [b"' in front.splitlines()
    assert [line.partition(" ")[0] for line in text.splitlines() if line.startswith("#")] == ["#", "##", "##"]
    plain = re.sub(r"`[^`\n]*`", "", text.replace("\\`", ""))
    assert not re.search(r"(?<!\\)[<\[]|(?<!\\)\*\*|^---$", plain, re.M)
    (row,) = [line for line in text.splitlines() if line.startswith("| a")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 6


def test_a_hub_id_is_the_name_and_stays_one_line(tmp_path):
    folder = tmp_path / "models--org--a\nb/snapshots/1"
    folder.mkdir(parents=True)
    assert model_name(folder) == "org/a\nb"


def test_removed_layers_are_counted_with_their_types(goldens, tmp_path):
    """Widths alone do not tell that a layer shares its keys and values, or has heads of another size."""
    model = open_model(goldens / "families/gemma4/ckpt")
    whole = keep_everything(model.cfg, "0" * 64, vp.count_params(model.cfg))
    plan = hand_plan(model.cfg, "0" * 64, "depth", text=whole.layers[:1] + whole.layers[2:])
    plan.to_json(tmp_path / "plan.json")
    source, library = goldens / "families/gemma4/ckpt", "transformers"
    write_card(tmp_path, plan.apply_to(model.cfg), CardFacts("base"), source, loading="here", library=library)
    rows = re.findall(
        r"\| (?:language model|projector|vision.*?|total) \| ([\d,]+) \|", (tmp_path / "README.md").read_text()
    )
    counts = [int(row.replace(",", "")) for row in rows]
    assert counts[-1] == whole.parameters_before == sum(counts[:-1])


@pytest.mark.parametrize("template", [True, False])
def test_the_code_on_a_card_runs_inside_the_folder(tmp_path, monkeypatch, capsys, template):
    """Nothing is replaced: it loads ".", asks about an image of its own, and prints the answer."""
    source = shutil.copytree(str(resources.files("vlmprune_jax") / "demo" / "teacher"), tmp_path / "teacher")
    vp.save(vp.load(source), tmp_path / "out", source_dir=source, dtype="float32")
    if not template:
        (source / "chat_template.jinja").unlink()
        vp.save(vp.load(source), tmp_path / "out", source_dir=source, dtype="float32", overwrite=True)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.S)
    assert ("apply_chat_template" in code) == template
    monkeypatch.chdir(tmp_path / "out")
    exec(code, {})
    assert len(capsys.readouterr().out.split()) == template  # the demo answers in a word, if its template asks


def test_a_card_shows_no_command_that_cannot_work(tmp_path):
    """A tower without some of its heads loads in no PyTorch class, padded it does."""
    source = make_folder(tmp_path / "source", LLAVA)
    model = vp.load(source)
    layers = [
        vp.KeptLayer(i, {**vp.KeptLayer.whole(i, shape).kept, "q_heads": (0,), "kv_heads": (0,)})
        for i, shape in enumerate(model.cfg.vision.layers)
    ]
    pruned, plan = prune(model, layers, "vision")
    for uneven in ("per_layer", "pad"):
        vp.save(pruned, tmp_path / uneven, source_dir=source, plan=plan, uneven=uneven)
        card = (tmp_path / uneven / "README.md").read_text()
        assert ("from_pretrained" in card) == (uneven == "pad")


def test_a_model_that_was_only_trained_is_not_called_pruned(folder):
    out, cfg = folder
    (out / "plan.json").unlink(missing_ok=True)
    facts = CardFacts("org/base", recovered=True)
    write_card(out, cfg, facts, out.parent, loading="here", library="transformers")
    card = (out / "README.md").read_text()
    assert "# org/base, trained\n" in card
    assert "pruned" not in card.replace("trained and not pruned", "")
    assert "tags: [vlmprune-jax]\n" in card
