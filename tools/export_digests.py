"""Print the SHA-256 of every file of the exports of tiny models: all families, layouts, formats and options.

Run it before and after a change of the writer, and compare: `python tools/export_digests.py > after.txt`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
ROOT = Path(__file__).parents[1]
GOLDENS = ROOT / "tests/goldens"
sys.path.insert(0, str(ROOT / "tests/cases"))

import jax  # noqa: E402
import numpy as np  # noqa: E402
from decoder_cases import MISTRAL, PHI, PHI3, QWEN2, QWEN3  # noqa: E402
from gguf_cases import make_qwen  # noqa: E402
from hf_cases import LFM2_VL, LLAMA, LLAVA, keep_layers, make_folder, prune  # noqa: E402
from vlm_cases import internvl_chat_config, make_vlm_folder, smolvlm_config  # noqa: E402
from vocabulary_cases import FAMILIES, TOPICS, texts_file, tokenized_folder, vocabulary_plan  # noqa: E402

import vlmprune_jax as vp  # noqa: E402
from vlmprune_jax.base.errors import UserError  # noqa: E402
from vlmprune_jax.core.models.params import flatten, unflatten  # noqa: E402
from vlmprune_jax.core.models.vlm import Model  # noqa: E402
from vlmprune_jax.core.plans.kept import KeptLayer  # noqa: E402
from vlmprune_jax.core.recovery.trainable import add_lora, assign_groups  # noqa: E402
from vlmprune_jax.core.sections import LoraConfig  # noqa: E402
from vlmprune_jax.io.checkpoints.layout import make_slots  # noqa: E402
from vlmprune_jax.io.checkpoints.read import open_model  # noqa: E402
from vlmprune_jax.io.exports.describe import as_lines, describe  # noqa: E402
from vlmprune_jax.io.exports.formats import Importance  # noqa: E402
from vlmprune_jax.io.exports.peft import write_adapter  # noqa: E402
from vlmprune_jax.io.families import family_of  # noqa: E402

# Rows of whole groups and blocks, for integers and llama.cpp.
PLAIN = LLAMA | {
    "hidden_size": 64,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 640,
}
PLAIN |= {"intermediate_size": 128, "hidden_act": "silu"}
TOWERS = {"llava_orig": "clip_tower", "llava_orig_bin": "clip_tower", "bunny": "siglip_tower"}
TOKENIZERS = {"llava_hf": "llava", "llava_orig": "llava", "bunny": "bunny", "internvl": "internvl"}
OPTIONS: dict[str, dict[str, Any]] = {
    **{
        f"{layout}-{uneven}-{dtype}": {"layout": layout, "uneven": uneven, "dtype": dtype}
        for layout in ("source", "transformers")
        for uneven, dtype in (("per_layer", "source"), ("pad", "bfloat16"), ("refuse", "float16"))
    },
    "head_dim": {"head_dim": 48},
    "mtp": {"mtp": "cut", "dtype": "float32"},
    "images": {"max_image_tokens": 64, "license": "mit", "name": "org/name", "datasets": ["a/b", "c"]},
    "w8a16": {"quantize": "w8a16"},
    "w8a16-zeros": {"quantize": "w8a16", "symmetric": False, "layout": "transformers"},
    "w4a16": {"quantize": "w4a16", "reconstructed": True, "recovered": True},
    "w4a16-pad": {"quantize": "w4a16", "uneven": "pad", "layout": "transformers", "symmetric": False},
    "w8a8": {"quantize": "w8a8", "dtype": "float32"},
    "gguf": {"format": "gguf", "dtype": "float32", "imatrix": True},
    "gguf-pad": {"format": "gguf", "uneven": "pad", "rolled_positions": True, "imatrix": True},
    **{f"gguf-{kind}": {"format": "gguf", "quantize": kind} for kind in ("q8_0", "q5_1", "q4_0")},
}


def sources(work: Path) -> Iterator[tuple[str, Path, Path | None]]:
    """Yield (name, folder, folder of a separate tower) of every golden and of tiny random models."""
    for folder in sorted((GOLDENS / "ckpt").iterdir()):
        if "tower" not in folder.name:
            copy = shutil.copytree(folder, work / folder.name)
            if folder.name in TOKENIZERS:
                shutil.copytree(GOLDENS / "tokenizers" / TOKENIZERS[folder.name], copy, dirs_exist_ok=True)
            (copy / "LICENSE").write_text("licence")
            yield folder.name, copy, GOLDENS / "ckpt" / TOWERS[folder.name] if folder.name in TOWERS else None
    for folder in sorted((GOLDENS / "families").glob("*/ckpt")):
        yield folder.parent.name, shutil.copytree(folder, work / folder.parent.name), None
    for name in FAMILIES:
        yield f"words-{name}", tokenized_folder(work / f"words-{name}", name), None
    plain = make_folder(work / "plain", PLAIN)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(work / "words-llama" / file, plain)
    yield "plain", plain, None
    decoders = {"llama": LLAMA, "mistral": MISTRAL, "phi": PHI, "phi3": PHI3, "qwen2": QWEN2, "qwen3": QWEN3}
    for name, config in {**decoders, "llava": LLAVA, "lfm2_vl": LFM2_VL}.items():
        yield name, make_folder(work / name, config), None
    for name, config in {"chat": internvl_chat_config("llama"), "smol": smolvlm_config("llama")}.items():
        yield name, make_vlm_folder(work / name, config), None
    for name in ("qwen3_vl", "qwen2_5_vl"):
        yield f"made-{name}", make_qwen(work / f"made-{name}", name)[0], None


def uneven(model: Model) -> list[KeptLayer]:
    """Remove one head group, expert or delta head from every second layer, and some neurons from all."""
    layers = []
    for number, layer in enumerate(model.cfg.text.layers):
        kept = dict(KeptLayer.whole(number, layer).kept)
        for part in layer.parts:
            for axis in part.axes:
                owners = part.sizes[axis.parent] if axis.parent else 1
                each = part.sizes[axis.name] // owners
                if axis.parent:
                    owners -= number % 2
                else:
                    each -= number % 2 if len(part.axes) > 1 else 8 + number
                if axis.name in kept:
                    whole = part.sizes[axis.name] // (part.sizes[axis.parent] if axis.parent else 1)
                    kept[axis.name] = tuple(o * whole + i for o in range(owners) for i in range(each))
        layers.append(KeptLayer(number, kept))
    return layers


def report(name: str, folder: Path) -> None:
    """Print a line with the digest of every file below `folder`."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()[:24]}  {name}/{path.relative_to(folder)}")


def export(name: str, write: Any, out: Path, work: Path) -> None:
    """Write an export and print its digests, or the message with which it is refused."""
    try:
        write(out)
        report(name, out)
    except UserError as error:
        print(f"{name}: {str(error).replace(str(work), '')}")
    except Exception as error:  # a defect of the commit on which this runs: to be equal as well
        print(f"{name}: {type(error).__name__} {error}")
    shutil.rmtree(out, ignore_errors=True)


def exports(name: str, folder: Path, tower: Path | None, work: Path) -> None:
    """Print the digests of all exports of one model."""
    model, lazy, out = vp.load(folder, vision_dir=tower), open_model(folder, tower), work / "out"
    print(
        hashlib.sha256("\n".join(as_lines(describe(folder, tower))).replace(str(work), "").encode()).hexdigest(), name
    )
    print(hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in flatten(model.params).values())).hexdigest(), name)
    cuts: dict[str, Any] = {"whole": lambda model: (model, None)}
    cuts["depth"] = lambda model: keep_layers(model, [0, *range(2, len(model.cfg.text.layers))])
    cuts["uneven"] = lambda model: prune(model, uneven(model))
    for cut, make in cuts.items():
        try:
            models, plan = {"": make(model)[0], "-lazy": make(lazy)[0]}, make(model)[1]
        except Exception as error:
            print(f"{name} {cut}: {error}")
            continue
        slots = make_slots(models[""].cfg, family_of(model.cfg))
        means = {s.name: 1.0 + np.arange(s.hf_shape[1]) for s in slots if len(s.hf_shape) == 2 and "layers/" in s.name}
        for option, (way, pruned) in itertools.product(OPTIONS, models.items()):
            options = {"source_dir": folder, "plan": plan, **OPTIONS[option]}
            if "imatrix" in options:
                options["imatrix"] = Importance(means, 3, 70)
            if option == "head_dim":
                options["head_dim"] = 4 * model.cfg.text.attention.head_dim
            export(f"{name}/{cut}{way}/{option}", lambda out, m=pruned, o=options: vp.save(m, out, **o), out, work)
        if plan is not None:
            options = {"vision_dir": tower, "layout": "transformers"}
            export(
                f"{name}/{cut}/folder", lambda out, p=plan, o=options: vp.prune_folder(folder, p, out, **o), out, work
            )
    adapted = add_lora(model, LoraConfig(rank=2), jax.random.key(1))
    flat = flatten(adapted.params)
    trained = [*assign_groups(list(flat), "lora"), *(path for path in flat if path.startswith("projector/"))]
    draw = np.random.default_rng(0)
    moved = {path: draw.standard_normal(flat[path].shape, np.float32) for path in trained}
    adapted = Model(unflatten(flat | moved), adapted.cfg)
    export(f"{name}/peft", lambda out: write_adapter(adapted, out, base_dir=folder, trained=trained), out, work)
    if name.startswith("words-"):
        plan = vocabulary_plan(folder, texts_file(work / "texts.json", TOPICS[:3]), 400)
        for option, layout in itertools.product(
            ({}, {"format": "gguf"}, {"quantize": "w8a16"}), ("source", "transformers")
        ):
            options = {**option, "layout": layout} if not option.get("format") else option
            label = f"{name}/vocabulary/{json.dumps(options)}"
            export(label, lambda out, o=options: vp.prune_folder(folder, plan, out, **o), out, work)


def main() -> None:
    """Print the digests of the exports of all models, or of those whose names are arguments."""
    with tempfile.TemporaryDirectory() as work:
        for name, folder, tower in sources(Path(work)):
            if not sys.argv[1:] or name in sys.argv[1:]:
                exports(name, folder, tower, Path(work))


if __name__ == "__main__":
    main()
