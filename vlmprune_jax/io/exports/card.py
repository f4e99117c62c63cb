"""Model card (README.md) of an exported folder, and the upload of both to the Hugging Face hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from vlmprune_jax.base.errors import UserError, printable, reason
from vlmprune_jax.base.files import MAX_JSON_BYTES, read_json, read_text, replacing
from vlmprune_jax.base.links import check_links, real_path
from vlmprune_jax.base.markup import code, markdown, yaml
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.layer import Layer
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.part import AXES
from vlmprune_jax.core.plans.plan import PrunePlan
from vlmprune_jax.io.checkpoints.disk.checkpoint import Storage
from vlmprune_jax.io.checkpoints.disk.compressed_tensors import CompressedTensors
from vlmprune_jax.io.families import family_of
from vlmprune_jax.io.families.decoders import decoder_of
from vlmprune_jax.io.families.experts import has_experts
from vlmprune_jax.io.families.limits import why_not_in_transformers

LOADER_FILE = "modeling_per_layer.py"  # PyTorch file that loads layers of unequal width
LOADER_MODULE, LOADER_PREFIX = "modeling_per_layer.", "PerLayer"  # of names of its classes
_MAX_LANGUAGES = 100
_LOADING = "\n## Loading\n\n"
_PARTS = (("language model", "text"), ("projector", "projector"), ("vision tower (computed part)", "vision"))


def shapes(layers: Sequence[Layer]) -> str:
    """Return the widths of layers as text: one if all are equal, otherwise every different one."""
    texts = sorted({", ".join(f"{n:,} {AXES[axis].title}" for axis, n in layer.sizes.items()) for layer in layers})
    return f"each with {texts[0]}" if len(texts) == 1 else f"of unequal width: {'; '.join(texts)}"


TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("vlmprune_jax.io.exports", "cards"),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
TEMPLATES.filters |= {"markdown": markdown, "code": code, "yaml": yaml, "shapes": shapes}
TEMPLATES.filters |= {"printable": printable, "number": "{:,}".format, "percent": "{:.1%}".format}
TEMPLATES.filters["quoted"] = lambda text: json.dumps(printable(text))


def render(template: str, **values: Any) -> str:
    """Return the text of a template in `cards/`; runs of empty lines, which missing paragraphs leave, become one."""
    return re.sub(r"\n{3,}", "\n\n", TEMPLATES.get_template(f"{template}.md.jinja").render(values)).strip("\n")


def model_name(folder: Path) -> str:
    """Return a folder's model name: its hub id if it lies in the hub cache, otherwise the folder's name."""
    cached = folder.parent.parent.name
    if folder.parent.name == "snapshots" and cached.startswith("models--"):
        return cached.removeprefix("models--").replace("--", "/", 1)
    return real_path(folder).name


def license_of(source: Path) -> dict[str, str]:
    """Return the license fields in the metadata of a folder's model card; {} if there are none."""
    pairs = re.findall(r"^(license|license_name|license_link): *['\"]?([^'\"\n]+?)['\"]? *$", _metadata(source), re.M)
    return {name: value for name, value in pairs if value.isprintable()}


def languages_of(source: Path) -> list[str]:
    """Return the language codes listed in a folder's model card."""
    match = re.search(r"^languages?:((?: [^\n]*)?(?:\n *- [^\n]*)*)", _metadata(source), re.M)
    return [] if match is None else re.findall(r"\b[a-z]{2,3}(?:-[A-Za-z]{2,8})?\b", match[1])[:_MAX_LANGUAGES]


def _metadata(source: Path) -> str:
    """Return the YAML metadata at the start of a folder's model card; "" if it has none."""
    path = source / "README.md"
    text = read_text(path, MAX_JSON_BYTES) if os.path.lexists(path) else ""
    return text.split("\n---", 1)[0] if text.startswith("---\n") else ""


@dataclass(frozen=True)
class CardFacts:
    """Facts for the model card that the weights do not tell: arguments of `save`."""

    name: str | None = None
    """Name of the unpruned model, if possible a hub id (None = the name of `source_dir`)."""

    license: str | None = None
    """License as the hub names it (None = that of `source_dir`'s card)."""

    datasets: Sequence[str] = ()
    """Names of the training data, if possible hub ids."""

    reconstructed: bool = False
    recovered: bool = False
    """True if the card names these steps after pruning."""

    benchmarks: Sequence[Sequence[str]] = ()
    """Rows of the table: set, scores of unpruned and this model, retained % and its interval."""


def write_card(folder: Path, cfg: ModelConfig, facts: CardFacts, source: Path, *, loading: str, library: str) -> None:
    """Write the model card (README.md) of an exported folder that already has all other files.

    `loading` is the text of the section "Loading", `library` the name of the library that loads the folder.
    """
    plan_file = folder / "plan.json"
    plan = PrunePlan.from_json(plan_file) if os.path.lexists(plan_file) else None
    after, name = "recovered" if plan or facts.reconstructed else "trained", facts.name or model_name(source)
    steps = {"pruned": plan is not None, "reconstructed": facts.reconstructed, after: facts.recovered}
    task = "text-generation" if cfg.vision is None else "image-text-to-text"
    fields = {"library_name": library, "pipeline_tag": task, **({"base_model": name} if "/" in name else {})}
    license = license_of(source) if facts.license is None else {"license": facts.license}
    card = render(
        "model",
        fields=fields | license,
        listed=[dataset for dataset in facts.datasets if "/" in dataset],
        tags=["vlmprune-jax", *(["pruned"] if plan is not None else [])],
        name=name,
        steps=[step for step, done in steps.items() if done],
        plan=plan,
        datasets=facts.datasets,
        table=_table(cfg, plan),
        layers=cfg.text.layers,
        tower=cfg.stack("vision").layers if plan is not None and "vision" in plan.stacks else (),
        evaluation=render("evaluation", rows=facts.benchmarks, remark="") if facts.benchmarks else "",
        loading=loading,
    )
    _write(folder, f"{card}\n")


def add_evaluation(folder: Path, rows: Sequence[Sequence[str]], remark: str) -> None:
    """Add the section "Evaluation" to the model card of an export that was evaluated after it was written.

    `rows`: see `save`; () for the `remark` alone.
    """
    card = read_text(folder / "README.md", MAX_JSON_BYTES)
    section = f"\n{render('evaluation', rows=rows, remark=remark)}\n" if rows or remark else ""
    _write(folder, card.replace(_LOADING, section + _LOADING, 1))


def _write(folder: Path, card: str) -> None:
    with replacing(folder / "README.md") as file:
        file.write(card.encode(errors="backslashreplace"))


def _table(cfg: ModelConfig, plan: PrunePlan | None) -> dict[str, list[int]]:
    """Return {part of the model: parameters, before pruning (with a plan) and now}."""
    named = (*_PARTS, *((f"encoder {name}", name) for name, _ in cfg.encoders))
    parts = {name: part for name, part in named if count_params(cfg, part)} | {"total": ""}
    table = {name: [count_params(cfg, part)] for name, part in parts.items()}
    if plan is None:
        return table
    original = cfg
    for name, component in plan.stacks.items():
        if name != "text":  # sizes do not show which types of decoder layers were removed (Gemma 4)
            sizes = component.sizes_before
            original = original.with_layers([cfg.stack(name).layers[0].resized(axes) for axes in sizes], name)
    before = {part: count_params(original, part) for part in parts.values()} | {"": plan.parameters_before}
    before["text"] = before[""] - before.get("vision", 0) - before.get("projector", 0)
    return {name: [before[parts[name]], *now] for name, now in table.items()}


def loading_lines(folder: Path) -> list[str]:
    """Return the lines on how to load an exported folder, from its model card: code with paths, or a sentence."""
    path = folder / "README.md"
    card = read_text(path, MAX_JSON_BYTES) if os.path.lexists(path) else ""
    section = card.partition(_LOADING)[2]
    if not section.startswith("```"):
        return section.split("\n\n")[0].split("\n")
    code = section.split("\n```")[0].split("\n")[1:]
    code = [line.replace('from_pretrained("."', f"from_pretrained({json.dumps(str(folder))}") for line in code if line]
    return [
        " ".join(str(folder / word) if (folder / word).is_file() else word for word in line.split()) for line in code
    ]


def loader_class(config: dict[str, Any]) -> str | None:
    """Return the loader file's class name for a folder with this config.json; None if a stock class loads it."""
    classes = [str(value) for value in (config.get("auto_map") or {}).values() if str(value).startswith(LOADER_MODULE)]
    return classes[0].removeprefix(LOADER_MODULE) if classes else None


def loading_of(
    folder: Path,
    cfg: ModelConfig,
    written: ModelConfig,
    config: dict[str, Any],
    storage: Storage | None = None,
    dtype: str = "",
    plain: Sequence[str] = (),
) -> str:
    """Return the model card's section "Loading" for a Hugging Face folder with this config.json.

    `written`: the config of the model in the folder. `plain`: keys of matrices that `storage` cannot hold, in `dtype`.
    """
    loader, text, tower = loader_class(config), written.text, written.vision
    experts, integers = has_experts(text), storage if isinstance(storage, CompressedTensors) else None
    unreadable = None
    if experts and integers and (not decoder_of(text.decoder).reads_quantised_experts or integers.activations):
        unreadable = "transformers 5.24 does not read quantised experts, and leaves them random without an error"
    in_hub_layout = written.layout == cfg.layout != "transformers"
    class_name = (config.get("architectures") or ["the hub's class" if in_hub_layout else "AutoModelForCausalLM"])[0]
    class_name = next(iter(config["auto_map"])) if loader is not None and not in_hub_layout else class_name
    processor = any((folder / f"{kind}_config.json").is_file() for kind in ("processor", "preprocessor"))
    described = (folder / f"{kind}_config.json" for kind in ("tokenizer", "processor"))
    known = (read_json(path, dict[str, Any], todo="move it away") for path in described if path.is_file())
    has_template = any(folder.glob("chat_template*")) or any("chat_template" in file for file in known)
    padded = cfg
    for name in cfg.stacks:
        padded = padded.with_layers(written.stack(name).layers, name)
    fewer = any(mixer.q_heads * mixer.head_dim != text.hidden_size for mixer in text.attentions)
    return render(
        "folder",
        cfg=cfg,
        written=written,
        in_hub_layout=in_hub_layout,
        fewer_heads=fewer or (tower is not None and not tower.whole_heads),
        class_name=class_name,
        remote=config.get("auto_map"),
        loader=loader,
        loader_file=LOADER_FILE,
        problem=unreadable or why_not_in_transformers(written, loader=loader is not None),
        reader="AutoProcessor" if processor else "AutoTokenizer" if tower is None else "",
        decoded="CompressedTensorsConfig" if integers and not integers.symmetric else "",  # zero points
        has_template=processor and has_template,
        words=text.vocab_size - cfg.text.vocab_size,
        before=count_params(cfg),
        after=count_params(padded),
        holds_tower=family_of(written).holds_tower,
        storage=integers,
        nearest=CompressedTensors.rounding,
        dtype=dtype,
        stock=why_not_in_transformers(written, loader=not text.uniform) is None,
        experts=experts,
        unreadable=unreadable,
        plain=plain,
    )


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
    path = Path(folder) / "README.md"
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file: push a folder that vp.save or `vlmprune export` wrote")
    try:
        card = ModelCard(read_text(path, MAX_JSON_BYTES))
    except Exception as error:  # yaml's own, ValueError of malformed results
        raise UserError(f"{path}: the metadata of the model card is malformed ({reason(error)}): correct it") from error
    missing = [f"{name}: set {todo}" for name, todo in _NEEDED.items() if not getattr(card.data, name, None)]
    if missing:
        raise UserError(f"{path}: the metadata of the model card lacks {'; '.join(missing)}")
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    names = tuple(path.relative_to(folder).as_posix() for path in paths)
    upload = Upload(f"{constants.ENDPOINT}/{repo_id}", names, sum(path.stat().st_size for path in paths), not dry_run)
    try:
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            raise ValueError("it has no organisation or user")
        if not dry_run:
            card.validate()
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
