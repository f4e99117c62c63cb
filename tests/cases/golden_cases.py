"""Folders of a family's stored outputs of stock transformers, and the model's inputs for each case."""

import json

import numpy as np
from repository import GOLDENS, load_arrays

import vlmprune_jax as vp
from vlmprune_jax.core.channels import Experts
from vlmprune_jax.core.mixers import DeltaNet
from vlmprune_jax.core.prune import KeptLayer

CLOSE = dict(atol=1e-4, rtol=0)
FAMILIES = sorted(path.parent.name for path in (GOLDENS / "families").glob("*/golden.npz"))
MIXTURES, HYBRIDS = ([name for name in FAMILIES if text in name] for text in ("_moe", "qwen3_5"))
DENSE = [name for name in FAMILIES if name not in MIXTURES + HYBRIDS]  # with more stored outputs than the others


def cuts_of(family):
    """The names of a family's stored cuts."""
    with np.load(GOLDENS / "families" / family / "golden.npz") as file:
        names = [name.removeprefix("text_logits_") for name in file.files]
    return [name for name, whole in zip(names, file.files, strict=True) if name != whole]


class Golden:
    """The folder of one family, its numbers and its model."""

    def __init__(self, folder):
        self.folder, self.ckpt = folder, folder / "ckpt"
        self.arrays = load_arrays(folder / "golden.npz")
        self.facts = json.loads((folder / "golden.json").read_text())
        self.keys = json.loads((folder / "keys.json").read_text())
        self.model = vp.load(self.ckpt)
        self.by_row = folder.name == "smolvlm"
        self.patched = "image0_grid_thw" in self.arrays  # images of any size, as patches with a grid
        self.positioned = "image0_position_ids" in self.arrays  # or with the position of each
        self.cases = [name for name in self.facts["cases"] if not name.startswith("batch")]
        self.respelled = folder.name in ("gemma3", "gemma4", "gemma4_dense")  # exports have the hub's keys

    def as_stored(self, tensors):
        """Tensors by their names in memory in transformers, as those of the checkpoint's files."""
        stored, layout = {}, "saved_by_5.24" if self.folder.name in DENSE else "hub"
        for name, array in tensors.items():
            place = self.keys.get(name, {}).get(layout)
            if isinstance(place, str):
                stored[place] = array
            elif place is not None and "transposed" in place:
                stored[place["transposed"]] = np.ascontiguousarray(array.swapaxes(1, 2))
            elif place is not None:
                keys = place["per_expert"]
                for expert, rows in enumerate(array):
                    for key, part in zip(keys, np.split(rows, len(keys)), strict=True):
                        stored[key.replace("{expert}", str(expert))] = np.ascontiguousarray(part)
        return stored

    def images(self, case):
        return self.facts["cases"][case]["images"]

    def pixels(self, cases):
        """Pixel values of rows as the processor gives them: a list (InternVL), or rows with zeros at their ends."""
        names = {case: "crops_" * (case == "crops") + "pixel_values" for case in cases}
        rows = [[self.arrays[f"image{k}_{names[case]}"] for k in self.images(case)] for case in cases]
        joined = [np.concatenate(row) for row in rows if row]
        if not self.by_row or not joined:
            return np.concatenate(joined) if joined else None
        found = np.zeros((len(rows), max(map(len, joined)), *joined[0].shape[1:]), np.float32)
        for row, images in zip(found, rows, strict=True):
            pixels = np.concatenate(images) if images else row[:0]
            row[: len(pixels)] = pixels
        return found

    def shown(self, cases):
        """The images of these cases, with their grids where they have some."""
        pixels = {"pixel_values": self.pixels(cases)}
        grids = [self.arrays[f"image{k}_grid_thw"] for case in cases for k in self.images(case) if self.patched]
        places = [self.arrays[f"image{k}_position_ids"] for case in cases for k in self.images(case) if self.positioned]
        places = {"image_position_ids": np.stack(places)} if places else {}
        return pixels | places | ({"image_grid_thw": np.stack(grids)} if grids else {})

    def inputs(self, case):
        inputs = {"input_ids": self.arrays[f"{case}_input_ids"][None], **self.shown([case])}
        if "image_grid_thw" in inputs:
            # version 4.57 takes the repeated positions of an image for many short rows if there is no mask
            inputs["attention_mask"] = np.ones_like(inputs["input_ids"])
        inputs |= {name: array[None] for name, array in self.types(case).items()}
        return {name: array for name, array in inputs.items() if array is not None}

    def types(self, case):
        """The token types of a case or batch, for families that have some."""
        names = ("token_type_ids", "mm_token_type_ids")
        return {name: self.arrays[f"{case}_{name}"] for name in names if f"{case}_{name}" in self.arrays}

    def padded(self, cases, rows):
        """Left-padded token rows of these cases, with their types and images."""
        parts = {"input_ids": rows, "attention_mask": [np.ones_like(row) for row in rows]}
        for name in self.types(cases[0]):
            parts[name] = [self.types(case)[name][: len(row)] for case, row in zip(cases, rows, strict=True)]
        width = max(map(len, rows))
        padded = {name: [np.pad(row, (width - len(row), 0)) for row in own] for name, own in parts.items()}
        return {name: np.stack(own) for name, own in padded.items()} | self.shown(cases)

    def logits(self, cases, model=None):
        """{case: logits} of rows of one padded batch, which compiles once; `model`: instead of the golden's."""
        rows = [self.arrays[f"{case}_input_ids"] for case in cases]
        logits, _ = vp.forward(model or self.model, **self.padded(cases, rows))
        return {case: np.asarray(found)[-len(row) :] for case, row, found in zip(cases, rows, logits, strict=True)}

    def batch(self, side):
        names = ("input_ids", "attention_mask", "labels")
        arrays = {name: self.arrays[f"batch_{side}_{name}"] for name in names}
        return arrays | self.shown(self.facts["cases"][f"batch_{side}"]["rows"])


def cut_layers(golden, cut):
    """The entries of a stored cut, whose lists are in the numbers of the whole model; `without_1_3` removes layers."""
    removed = [int(number) for number in cut.removeprefix("without_").split("_")] if cut.startswith("without_") else ()
    lists, layers = {"layers_removed": removed} if removed else golden.facts["cuts"][cut], []
    for i, layer in enumerate(golden.model.cfg.text.layers):
        if i in lists.get("layers_removed", ()):
            continue
        units, mixer, part = dict(KeptLayer.whole(i, layer).kept), layer.mixer, layer.channel
        if isinstance(part, Experts):
            experts = lists["experts"][i] if "experts" in lists else range(part.experts)
            neurons = lists["expert_neurons"][i] if "expert_neurons" in lists else [range(part.neurons)] * part.experts
            units["experts"] = tuple(experts)
            units["expert_mlp"] = tuple(e * part.neurons + n for e in experts for n in neurons[e])
        groups = lists.get("key_groups" if isinstance(mixer, DeltaNet) else "kv_heads", {})
        if groups and groups[i] is not None:
            parent, child = (axis.name for axis in mixer.axes)
            units[parent] = tuple(groups[i])
            units[child] = tuple(group * mixer.group + j for group in units[parent] for j in range(mixer.group))
        if isinstance(mixer, DeltaNet) and lists.get("value_heads"):
            units[mixer.axes[1].name] = tuple(lists["value_heads"][i])
        if lists.get("neurons"):
            units["mlp"] = tuple(lists["neurons"][i])
        layers.append(KeptLayer(i, units))
    return layers
