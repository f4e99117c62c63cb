"""Model card (README.md) of an exported folder: what was removed, the remaining parameters, and how to load it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmprune_jax.base.files import MAX_JSON_BYTES, read_json, read_text, replacing
from vlmprune_jax.base.links import real_path
from vlmprune_jax.base.markup import code, markdown, yaml
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.layer import Layer
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.part import AXES
from vlmprune_jax.core.plans.plan_json import WHOLE, PlanJson, as_plan
from vlmprune_jax.io.exports.uneven import LOADER_FILE, loader_class
from vlmprune_jax.io.families import family_of
from vlmprune_jax.io.families.limits import why_not_in_transformers

_PRUNED = " (structural pruning of the language model; arXiv 2604.24380)"
_STEPS = {
    "reconstructed": "The remaining weights were reconstructed by least squares, without training.",
    "recovered": "It was trained after pruning.",
    "trained": "It was trained and not pruned.",
}
_MAX_LANGUAGES = 100
_LOADING = "\n## Loading\n\n"
_DECODED = "CompressedTensorsConfig"
_PARTS = (("language model", "text"), ("projector", "projector"), ("vision tower (computed part)", "vision"))


def model_name(folder: Path) -> str:
    """Return a folder's model name: its hub id if it lies in the hub cache, otherwise the folder's name."""
    cached = folder.parent.parent.name
    if folder.parent.name == "snapshots" and cached.startswith("models--"):
        return cached.removeprefix("models--").replace("--", "/", 1)
    return real_path(folder).name


def tags_of(pruned: bool) -> list[str]:
    """Return the tags in the metadata of an exported model."""
    return ["vlmprune-jax", *(["pruned"] if pruned else [])]


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


def write_card(
    folder: Path,
    cfg: ModelConfig,
    name: str,
    source: Path,
    *,
    loading: str,
    library: str,
    reconstructed: bool = False,
    recovered: bool = False,
    license: str | None = None,
    datasets: Sequence[str] = (),
    benchmarks: Sequence[Sequence[str]] = (),
) -> None:
    """Write the model card (README.md) of an exported folder that already has all other files.

    `loading` is the text of the section "Loading", `library` the name of the library that loads the folder. For the
    other arguments, see `save`.
    """
    plan_file = folder / "plan.json"
    plan = as_plan(read_json(plan_file, Any, todo="move it away"), "plan.json") if os.path.lexists(plan_file) else None
    after = "recovered" if plan or reconstructed else "trained"
    steps = [step for step, done in (("reconstructed", reconstructed), (after, recovered)) if done]
    all_steps = [*(["pruned"] if plan else []), *steps]
    task = "text-generation" if cfg.vision is None else "image-text-to-text"
    fields = {"library_name": library, "pipeline_tag": task, **({"base_model": name} if "/" in name else {})}
    listed = [yaml(dataset) for dataset in datasets if "/" in dataset]
    data = f" Data: {', '.join(map(code, datasets))}." if datasets else ""
    fields |= license_of(source) if license is None else {"license": license}
    metadata = [f"{field}: {yaml(value)}" for field, value in fields.items()]
    metadata += [f"datasets: [{', '.join(listed)}]"] if listed else []
    removed, table = _removed(plan), _table(cfg, plan)
    tower = cfg.vision if plan is not None and "vision" in plan["components"] else None
    layers = f"Decoder layers: {len(cfg.text.layers)}, {_shapes(cfg.text.layers)}."
    layers += "" if tower is None else f"\nVision layers: {len(tower.layers)}, {_shapes(tower.layers)}."
    card = f"""---
{chr(10).join(metadata)}
tags: [{", ".join(tags_of(plan is not None))}]
---

# {", ".join([markdown(name), *all_steps])}

Made from {code(name)} by vlmprune-jax{_PRUNED if plan else ""}.\
{"".join(f" {_STEPS[step]}" for step in steps)}{data}

{removed}{table}

{layers}
{_evaluation(benchmarks)}{_LOADING}{loading}
"""
    _write(folder, card)


def add_evaluation(folder: Path, rows: Sequence[Sequence[str]], remark: str) -> None:
    """Add the section "Evaluation" to the model card of an export that was evaluated after it was written.

    `rows`: see `save`; () for the `remark` alone.
    """
    card = read_text(folder / "README.md", MAX_JSON_BYTES)
    _write(folder, card.replace(_LOADING, _evaluation(rows, remark) + _LOADING, 1))


def _write(folder: Path, card: str) -> None:
    with replacing(folder / "README.md") as file:
        file.write(card.encode(errors="backslashreplace"))


def _removed(plan: PlanJson | None) -> str:
    if plan is None:
        return ""
    text = plan["components"]["text"]
    before = text["sizes_before"].keys() - {WHOLE}
    removed = sorted(int(layer) for layer in before - text["kept"].keys())
    request = "" if plan["asked"] is None else f" (requested: {plan['asked']:.1%})"
    method, criterion = markdown(plan["method"]), markdown(plan["criterion"])
    reached = (plan["parameters_before"] - plan["parameters_after"]) / plan["parameters_total"]
    return (
        f"Method: {method}, criterion: {criterion}. Removed: {reached:.1%} of "
        f"{plan['parameters_total']:,} parameters{request}; {len(removed)} of {len(before)} layers"
        f"{' (numbers ' + ', '.join(map(str, removed)) + ')' if removed else ''}. "
        f"`plan.json` lists the kept heads and neurons. Plan fingerprint: {code(plan['fingerprint'])}.\n\n"
    )


def _table(cfg: ModelConfig, plan: PlanJson | None) -> str:
    named = (*_PARTS, *((f"encoder {name}", name) for name, _ in cfg.encoders))
    parts = [(name, part) for name, part in named if count_params(cfg, part)] + [("total", "")]
    if plan is None:
        rows = [f"| {name} | {count_params(cfg, part):,} |" for name, part in parts]
        return "\n".join(["| part | parameters |", "|---|---|", *rows])
    original = cfg
    for name, component in plan["components"].items():
        if name != "text":  # sizes do not show which types of decoder layers were removed (Gemma 4)
            sizes = component["sizes_before"].values()
            original = original.with_layers([cfg.stack(name).layers[0].resized(axes) for axes in sizes], name)
    before = {part: count_params(original, part) for _, part in parts} | {"": plan["parameters_before"]}
    before["text"] = before[""] - before.get("vision", 0) - before.get("projector", 0)
    rows = [f"| {name} | {before[part]:,} | {count_params(cfg, part):,} |" for name, part in parts]
    return "\n".join(["| parameters | before | after |", "|---|---|---|", *rows])


def _evaluation(rows: Sequence[Sequence[str]], remark: str = "") -> str:
    """Return the model card's section "Evaluation"; "" without benchmark results and remark."""
    if not (rows or remark):
        return ""
    notes = [remark] if remark else []
    if rows:
        lines = ["| " + " | ".join(map(markdown, row)) + " |" for row in rows]
        title = "| evaluation set | unpruned | this model | retained, % | 95 % interval of retained |"
        retained = (
            "Retained: share of the unpruned model's score on the same questions. Intervals cover other questions of "
            "the same type; they do not cover other data or training runs."
        )
        notes = ["\n".join([title, "|---|---|---|---|---|", *lines]), *notes, retained]
    return "\n\n".join(["\n## Evaluation", *notes]) + "\n"


def _shapes(layers: tuple[Layer, ...]) -> str:
    shapes = sorted(
        {", ".join(f"{size:,} {AXES[axis].title}" for axis, size in layer.sizes.items()) for layer in layers}
    )
    return f"each with {shapes[0]}" if len(shapes) == 1 else f"of unequal width: {'; '.join(shapes)}"


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


def loading_of(
    folder: Path, cfg: ModelConfig, written: ModelConfig, config: dict[str, Any], unreadable: str | None = None
) -> str:
    """Return the model card's section "Loading" for a Hugging Face folder.

    `unreadable`: why transformers cannot read how the weights are stored; None if it can.
    """
    paragraphs = []
    if written.layout == cfg.layout != "transformers":
        paragraphs.append(_hub_loading(written, config))
    elif unreadable is not None:
        paragraphs.append(f"PyTorch cannot load this folder: {unreadable}.")
    else:
        paragraphs.append(_transformers_loading(folder, written, config))
    if written.layout != cfg.layout:
        words = written.text.vocab_size - cfg.text.vocab_size
        more = f" The vocabulary has {words} more rows, for an image token and padding." if words else ""
        paragraphs.append(
            f"Converted from the {cfg.family} hub layout to a transformers class: no remote code is needed.{more}"
        )
    padded = cfg
    for name in cfg.stacks:
        padded = padded.with_layers(written.stack(name).layers, name)
    before, after = count_params(cfg), count_params(padded)
    if after != before:
        channels = written.text.attention.head_dim
        paragraphs.append(
            f"The layers were padded with zeros: {_shapes(written.text.layers)}, heads of {channels} "
            "channels. That is the same function as the pruned model, in a stock class, but with "
            f"{after:,} parameters in files, memory and computation instead of {before:,}."
        )
    tower = "" if family_of(written).holds_tower else ", `vision_dir=...` for the tower"
    paragraphs.append(f"In JAX: `vlmprune_jax.load(folder)`{tower}.")
    return "\n\n".join(paragraphs)


def _transformers_loading(folder: Path, written: ModelConfig, config: dict[str, Any]) -> str:
    """Return the Python code that loads a folder in transformers, or why no class does."""
    loader = loader_class(config)
    problem = why_not_in_transformers(written, loader=loader is not None)
    if problem is not None:
        return f"PyTorch cannot load this folder: {problem}."
    name, trust = (config.get("architectures") or ["AutoModelForCausalLM"])[0], ""
    if loader is not None:
        name, trust = next(iter(config["auto_map"])), ", trust_remote_code=True"
    processor = any((folder / f"{kind}_config.json").is_file() for kind in ("processor", "preprocessor"))
    reader = "AutoProcessor" if processor else "AutoTokenizer" if written.vision is None else ""
    groups = config.get("quantization_config", {}).get("config_groups", {}).values()
    decoded = any(not group["weights"]["symmetric"] for group in groups)  # transformers must dequantise zero points
    names = ", ".join(filter(None, [reader, name, _DECODED if decoded else ""]))
    trust += f", quantization_config={_DECODED}(dequantize=True)" if decoded else ""
    lines = ["from PIL import Image"] if processor else []
    lines += [f"from transformers import {names}", "", f'model = {name}.from_pretrained("."{trust})']
    lines += _generation(folder, processor) if reader else []
    snippet = "\n".join(["```python", *lines, "```"])
    if loader is None:
        return snippet
    return (
        f"{snippet}\n\n"
        "The layers have unequal widths and are stored at their true size (`per_layer_shapes` in config.json). "
        f"`trust_remote_code=True` runs `{LOADER_FILE}` from this folder, which cuts the layers of the stock "
        'class to their widths. Stock transformers and serving engines need an export with `uneven="pad"`.'
    )


def _generation(folder: Path, processor: bool) -> list[str]:
    """Return the lines of Python code that answer a question with the loaded `model`, or continue a text."""
    if not processor:
        return [
            'tokenizer = AutoTokenizer.from_pretrained(".")',
            'inputs = tokenizer("The capital of France is", return_tensors="pt").to(model.device)',
            "output = model.generate(**inputs, max_new_tokens=20)",
            "print(tokenizer.decode(output[0], skip_special_tokens=True))",
        ]
    question, chat = (
        "What is in the image?",
        [
            'content = [{"type": "image"}, {"type": "text", "text": "What is in the image?"}]',
            'chat = [{"role": "user", "content": content}]',
            "prompt = processor.apply_chat_template(chat, add_generation_prompt=True)",
        ],
    )
    if not _has_template(folder):
        chat = [f'prompt = f"{{processor.image_token}}\\n{question}"']
    return [
        'processor = AutoProcessor.from_pretrained(".")',
        'image = Image.new("RGB", (336, 336), "blue")  # or Image.open("image.png")',
        *chat,
        'inputs = processor(images=image, text=prompt, return_tensors="pt").to(model.device, model.dtype)',
        "output = model.generate(**inputs, max_new_tokens=20)",
        'print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]


def _has_template(folder: Path) -> bool:
    configs = [folder / f"{name}_config.json" for name in ("tokenizer", "processor")]
    known = (read_json(path, dict[str, Any], todo="move it away") for path in configs if path.is_file())
    return any(folder.glob("chat_template*")) or any("chat_template" in config for config in known)


def _hub_loading(written: ModelConfig, config: dict[str, Any]) -> str:
    name = (config.get("architectures") or ["the hub's class"])[0]
    if not written.text.uniform:
        return (
            "The layers have unequal widths and are stored at their true size in the hub's layout "
            f"(`per_layer_shapes` in config.json), which `{name}` cannot load. For PyTorch, export with "
            '`layout="transformers"` (includes a loader file) or `uneven="pad"`.'
        )
    text, tower = written.text, written.vision
    fewer = any(mixer.q_heads * mixer.head_dim != text.hidden_size for mixer in text.attentions)
    if fewer or (tower is not None and not tower.whole_heads):
        return (
            f"In the hub's layout with fewer heads, which `{name}` cannot load: it computes the head size as "
            'hidden_size / heads. For PyTorch, export with `layout="transformers"`.'
        )
    origin = "the code in this folder (`trust_remote_code=True`)" if config.get("auto_map") else "the model's own code"
    return (
        f"In the hub's layout: `{name}` of {origin} loads it. For stock transformers, export with "
        '`layout="transformers"`.'
    )
