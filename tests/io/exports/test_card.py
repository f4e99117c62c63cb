"""Model cards, whose names and plans come from anywhere, and their upload to the hub."""

import json
import re
import shutil
from importlib import resources

import huggingface_hub
import pytest
from hf_cases import LLAMA, LLAVA, copy_llava, keep_layers, make_folder, prune
from prune_cases import hand_plan
from refusal import refused

import vlmprune_jax as vp
from vlmprune_jax.core.prune import keep_everything
from vlmprune_jax.io.checkpoints.read import open_model
from vlmprune_jax.io.exports.card import CardFacts, model_name, write_card

EVIL = 'a|b\n# c\n---\nlicense: mit <img src="x"> [d](http://e) `f` **g**'


@pytest.fixture
def llama(tmp_path):
    return make_folder(tmp_path / "llama", LLAMA)


def test_what_a_card_says(llama, tmp_path):
    model, plan = keep_layers(vp.load(llama), [0, 2])
    vp.save(model, tmp_path / "out", source_dir=llama, plan=plan)
    text = (tmp_path / "out/README.md").read_text()
    total = f"| total | {plan.parameters_before:,} | {plan.parameters_after:,} |"
    for fact in (
        "2 of 4 layers (numbers 1, 3)",
        f"Removed: {plan.actual_ratio:.1%} of {plan.parameters_total:,} parameters;",
        plan.fingerprint,
        total,
        "LlamaForCausalLM.from_pretrained",
        f"\n# {llama.name}, pruned\n\nMade from `{llama.name}` by",
        "\npipeline_tag: text-generation\n",
    ):
        assert fact in text
    assert str(tmp_path) not in text
    assert "base_model" not in text
    # A later stage that writes from this folder hands plan and table on.
    vp.load(tmp_path / "out").save(tmp_path / "again")
    assert vp.PrunePlan.from_json(tmp_path / "again/plan.json") == plan
    assert total in (tmp_path / "again/README.md").read_text()
    # A model that was only trained is not called pruned.
    (tmp_path / "out/plan.json").unlink()
    facts = CardFacts("org/base", recovered=True)
    write_card(tmp_path / "out", model.cfg, facts, tmp_path, loading="here", library="transformers")
    card = (tmp_path / "out/README.md").read_text()
    assert "# org/base, trained\n" in card
    assert "pruned" not in card.replace("trained and not pruned", "")
    assert "tags: [vlmprune-jax]\n" in card


def test_a_card_names_the_hub_model(llama, tmp_path):
    """Neither the snapshot's hash nor the intermediate folder of a run."""
    snapshot = tmp_path / "models--some-org--some--model/snapshots/1a2b"
    snapshot.parent.mkdir(parents=True)
    llama.rename(snapshot)
    vp.save(vp.load(snapshot), tmp_path / "out", source_dir=snapshot)
    text = (tmp_path / "out/README.md").read_text()
    assert "\nbase_model: some-org/some--model\n" in text
    assert "\n# some-org/some--model\n\nMade from `some-org/some--model` by" in text
    assert "trained after pruning" not in text
    assert "## Evaluation" not in text
    row = ("a|b: accuracy in %, 40 questions", "80.00", "76.00", "95.00", "92.1 to 97.0")
    done = {"reconstructed": True, "recovered": True, "benchmarks": [row, ("text", "10.50", "12.00", "87.50", "")]}
    vp.save(vp.load(snapshot), tmp_path / "again", source_dir=tmp_path / "out", name="llama", **done)
    text = (tmp_path / "again/README.md").read_text()
    for fact in (
        "\n# llama, reconstructed, recovered\n",
        "reconstructed by least squares, without training.",
        "It was trained after pruning.",
        "\n## Evaluation\n\n| evaluation set | unpruned | this model | retained, % | 95 % interval of retained |\n|--",
        "\n| a\\|b: accuracy in %, 40 questions | 80.00 | 76.00 | 95.00 | 92.1 to 97.0 |\n| text |",
        "\n\n## Loading\n",
    ):
        assert fact in text


def test_names_are_text(llama, tmp_path):
    out, source = tmp_path / "out", tmp_path / "from"
    model, plan = keep_layers(vp.load(llama), [0, 3])
    out.mkdir()
    source.mkdir()
    plan = json.loads(plan.to_json()) | {"method": EVIL, "criterion": EVIL, "fingerprint": EVIL}
    (out / "plan.json").write_text(json.dumps(plan))
    (source / "README.md").write_text("---\nlicense: a]: [b\nlicense_link: # c\n---\n")
    facts = CardFacts(f"org/{EVIL}", datasets=[f"org/{EVIL}"], recovered=True, benchmarks=[[EVIL] * 5])
    write_card(out, model.cfg, facts, source, loading="here", library="transformers")
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


# The hub --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(goldens, tmp_path_factory):
    """Callable **options -> an exported folder."""
    source = tmp_path_factory.mktemp("source") / "llava"
    copy_llava(goldens, source)
    model, plan = keep_layers(vp.load(source), [0, 2])

    def export(**options):
        out = tmp_path_factory.mktemp("out") / "export"
        vp.save(model, out, source_dir=source, plan=plan, **options)
        return out

    return export


def test_a_dry_run_checks_the_card_and_sends_nothing(exported, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", None)
    data = ["HuggingFaceM4/the_cauldron", "mix665k.json"]
    out = exported(name="llava-hf/llava-1.5-7b-hf", license="llama2", datasets=data)
    upload = vp.push(out, "me/llava-pruned", dry_run=True)
    assert upload.url == "https://huggingface.co/me/llava-pruned"
    assert {"README.md", "config.json", "model.safetensors", "plan.json"} <= {*upload.files}
    assert upload.n_bytes > 100_000
    assert not upload.done
    card = huggingface_hub.ModelCard.load(out / "README.md")  # the client's own parser
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "base_model": "llava-hf/llava-1.5-7b-hf",
        "license": "llama2",
        "datasets": ["HuggingFaceM4/the_cauldron"],
        "tags": ["vlmprune-jax", "pruned"],
    }
    assert " Data: `HuggingFaceM4/the_cauldron`, `mix665k.json`." in card.text


def test_the_hub_is_asked_for_a_repository_and_the_folder(exported, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub.ModelCard, "validate", lambda card: asked.append(card.data.license))
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda api, *args, **options: asked.append((args, options))
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda api, **options: asked.append(options))
    out = exported(name="org/base", license="mit")
    assert vp.push(out, "me/pruned", private=True).done
    assert asked[0] == "mit"
    assert asked[1] == (("me/pruned",), {"private": True, "exist_ok": True})
    assert (asked[2]["repo_id"], asked[2]["folder_path"]) == ("me/pruned", out)


NAMED = {"name": "org/base", "license": "mit"}


@pytest.mark.parametrize(
    ("options", "repository", "dry_run", "fact"),
    [
        ({"license": "mit"}, "me/x", True, r"lacks base_model: set export\.base_model=ORG/NAME"),
        ({"name": "org/base"}, "me/x", True, r"lacks license: set export\.license=NAME"),
        (NAMED, "x", True, r"x: cannot upload to the hub \(it has no organisation or user\): give ORG/NAME"),
        (NAMED, "me/a b", True, "me/a b: cannot upload to the hub .Repo id must use alphanumeric"),
        (NAMED, "me/x", False, "me/x: cannot upload to the hub .*offline.*: give ORG/NAME, log in by"),
    ],
)
def test_what_cannot_be_uploaded(exported, options, repository, dry_run, fact):
    """The tests run with HF_HUB_OFFLINE=1."""
    refused(fact, vp.push, exported(**options), repository, dry_run=dry_run)


def test_cards_and_links_that_are_not_uploaded(exported, tmp_path):
    out = exported(name="org/base", license=": [")  # in quotes in the card
    vp.save(vp.load(out), tmp_path / "again", source_dir=out, name="org/base")
    card = huggingface_hub.ModelCard.load(tmp_path / "again/README.md")
    assert card.data.license == ": ["  # of the source
    assert vp.push(out, "me/x", dry_run=True).files
    (out / "README.md").write_text("---\nbase_model: org/base\nlicense: : [\n---\n")
    refused(r"README\.md: the metadata of the model card is malformed", vp.push, out, "me/x", dry_run=True)
    (tmp_path / "key").write_text("secret")
    (out / "key").symlink_to(tmp_path / "key")
    refused(r"key: is a symbolic link to .*, and vlmprune", vp.push, out, "me/pruned", dry_run=True)
