"""Upload to the hub: the metadata of the card, a dry run, and what the hub's client is asked for."""

import huggingface_hub
import pytest
from hf_cases import copy_llava, keep_layers
from refusal import refused

import vlmprune_jax as vp


@pytest.fixture(scope="module")
def exported(goldens, tmp_path_factory):
    """Callable (name, license, **options) -> an exported folder."""
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


def test_the_license_of_the_source_comes_along(exported, tmp_path):
    first = exported(name="org/base", license="mit")
    vp.save(vp.load(first), tmp_path / "again", source_dir=first, name="org/base")
    assert huggingface_hub.ModelCard.load(tmp_path / "again/README.md").data.license == "mit"


NAMED = {"name": "org/base", "license": "mit"}


@pytest.mark.parametrize(
    ("options", "repository", "fact"),
    [
        ({"license": "mit"}, "me/x", r"lacks base_model: set export\.base_model=ORG/NAME"),
        ({"name": "org/base"}, "me/x", r"lacks license: set export\.license=NAME"),
        (NAMED, "x", r"x: cannot upload to the hub \(it has no organisation or user\): give ORG/NAME"),
        (NAMED, "me/a b", "me/a b: cannot upload to the hub .Repo id must use alphanumeric"),
    ],
)
def test_what_cannot_be_uploaded(exported, options, repository, fact):
    refused(fact, vp.push, exported(**options), repository, dry_run=True)


def test_without_a_network_it_is_one_line(exported):
    """The tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(vp.UserError, match=r"me/x: cannot upload to the hub .*offline.*: give ORG/NAME, log in by"):
        vp.push(exported(name="org/base", license="mit"), "me/x")


def test_a_malformed_card_is_not_uploaded(exported):
    out = exported(name="org/base", license=": [")  # in quotes in the card
    assert vp.push(out, "me/x", dry_run=True).files
    (out / "README.md").write_text("---\nbase_model: org/base\nlicense: : [\n---\n")
    refused(r"README\.md: the metadata of the model card is malformed", vp.push, out, "me/x", dry_run=True)


def test_nothing_outside_is_uploaded(exported, tmp_path):
    out = exported(name="org/base", license="mit")
    (tmp_path / "key").write_text("secret")
    (out / "key").symlink_to(tmp_path / "key")
    refused(r"key: is a symbolic link to .*, and vlmprune", vp.push, out, "me/pruned", dry_run=True)
