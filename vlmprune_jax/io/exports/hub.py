"""Upload of an exported folder to the Hugging Face hub, after a check of its model card."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vlmprune_jax.base.errors import UserError, reason
from vlmprune_jax.base.files import MAX_JSON_BYTES, read_text
from vlmprune_jax.base.links import check_links

_NEEDED = {
    "base_model": "export.base_model=ORG/NAME (vp.save: name=)",
    "license": "export.license=NAME (vp.save: license=)",
}


@dataclass(frozen=True)
class Upload:
    """Upload to the hub: address, file names and sizes; `done` is False if nothing was sent (dry run)."""

    url: str
    files: tuple[str, ...]
    n_bytes: int
    done: bool


def push(folder: str | Path, repo_id: str, *, private: bool = False, dry_run: bool = False) -> Upload:
    """Upload an exported folder to the hub, after checking its model card.

    Args:
      folder: a folder that `vp.save` or `vlmprune export` wrote.
      repo_id: repository ORG/NAME, created if it does not exist.
      private: make a new repository private.
      dry_run: check everything that needs no network, and upload nothing.

    Raises UserError if the card names no base model or license, the repository name is malformed, or the hub refuses.
    """
    from huggingface_hub import HfApi, ModelCard, constants
    from huggingface_hub.utils import validate_repo_id

    check_links(Path(folder))
    card = check_card(Path(folder))
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    names = tuple(path.relative_to(folder).as_posix() for path in paths)
    upload = Upload(f"{constants.ENDPOINT}/{repo_id}", names, sum(path.stat().st_size for path in paths), not dry_run)
    try:
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            raise ValueError("it has no organisation or user")
        if not dry_run:
            ModelCard(card).validate()
            api = HfApi()
            api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload by vlmprune-jax")
    except Exception as error:  # the hub client raises its own, its transport's and OS errors
        todo = "give ORG/NAME, log in by `hf auth login`, and check the connection"
        raise UserError(f"{repo_id}: cannot upload to the hub ({reason(error)}): {todo}") from error
    return upload


def check_upload(repo_id: str, base_model: str | None, license: str | None) -> None:
    """Raise UserError if an upload cannot succeed: no token, base model or license, or the hub is switched off."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE or get_token() is None:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no token"
        raise UserError(f"export.push_to_hub={repo_id}: {why}: log in by `hf auth login`, or leave push_to_hub out")
    for name, value in (("base_model", base_model), ("license", license)):
        if value is None:
            raise UserError(f"export.push_to_hub={repo_id}: the model card has no {name}: set {_NEEDED[name]}")


def check_card(folder: Path) -> str:
    """Return a folder's model card; raise UserError if the hub could not parse its metadata."""
    from huggingface_hub import ModelCard

    path = folder / "README.md"
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file: push a folder that vp.save or `vlmprune export` wrote")
    try:
        card = ModelCard(read_text(path, MAX_JSON_BYTES))
    except Exception as error:  # yaml's own, ValueError of malformed results
        raise UserError(f"{path}: the metadata of the model card is malformed ({reason(error)}): correct it") from error
    missing = [f"{name}: set {todo}" for name, todo in _NEEDED.items() if not getattr(card.data, name, None)]
    if missing:
        raise UserError(f"{path}: the metadata of the model card lacks {'; '.join(missing)}")
    return card.content
