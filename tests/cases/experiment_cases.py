"""Folders in which commands run, and the complete files that docs/how-to/extend.md prints, as the tests run them."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_cases import copy_llava, make_folder
from repository import ROOT

import vlmprune_jax as vp

PAGE = ROOT / "docs" / "how-to" / "extend.md"


def printed_file(heading: str, folder: Path) -> Path:
    """Write the example below a heading of docs/how-to/extend.md into `folder` and return its path.

    The example is the first Python block, or else the linked file. Its first line is a comment with the file name,
    `# my_criterion.py`.
    """
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    linked = re.search(r"\[(\w+\.py)\]\(\1\)", section)
    section = section if linked is None else f"```python\n{(PAGE.parent / linked[1]).read_text(encoding='utf-8')}```"
    found = re.search(r"```python\n# (\w+\.py)\n(.*?)```", section, re.DOTALL)
    assert found, f"{PAGE}: no complete file below {heading!r}"
    name, source = found.groups()
    assert source.count("\n") + 1 <= 40, f"{heading}: more than 40 lines"
    path = folder / name
    path.write_text(f"# {name}\n{source}", encoding="utf-8")
    return path


@contextlib.contextmanager
def registered(heading: str, folder: Path, registry: Any) -> Iterator[Path]:
    """Yield the printed file in `folder`; afterwards, forget what importing it added to a registry."""
    search, path = list(sys.path), printed_file(heading, folder)
    with _forgotten(path.stem, registry):
        yield path
    assert sys.path == search


@contextlib.contextmanager
def documented_family(file: Path, folder: Path, config: dict[str, Any], *registries: Any) -> Iterator[Path]:
    """Yield a model folder of the family in this file of at most 80 lines; afterwards, forget the family."""
    assert file.read_text(encoding="utf-8").count("\n") <= 80
    with _forgotten(file.stem, vp.families, *registries):
        sys.path.insert(0, str(file.parent))
        importlib.import_module(file.stem)
        sys.path.remove(str(file.parent))
        yield make_folder(folder, config)


def returning(kind: type, name: str, value: Any) -> Any:
    """Return a method of a class's file, with its name, that returns this value."""
    method = getattr(kind, name)
    code = compile(f"def {name}(*args, **kwargs): return value", method.__code__.co_filename, "exec")
    exec(code, scope := {"value": value})
    scope[name].__qualname__ = method.__qualname__
    return scope[name]


@contextlib.contextmanager
def _forgotten(module: str, *registries: Any) -> Iterator[None]:
    before = [(registry, dict(registry)) for registry in registries]
    yield
    sys.modules.pop(module, None)
    for registry, known in before:
        registry.clear()
        registry.update(known)


def flags_of(config: str, folder: Path, goldens: Path) -> list[str]:
    """Return the flags of a config beside the printed file, with the golden LLaVA and four records of images."""
    records = [record(f"r{i}", f"img{i}.png", "Is it one?", "yes") for i in range(4)]
    write_experiment(folder, goldens, records)
    (folder / "experiment.py").write_text(config.format(goldens=goldens, folder=folder))
    return [f"--config={folder / 'experiment.py'}", f"--workdir={folder / 'w'}"]


def record(name: str, image: str | None, question: str, answer: str) -> dict[str, Any]:
    """Return a record of one question, with an image or without."""
    question = question if image is None else f"<image>\n{question}"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns} | ({} if image is None else {"image": image})


def write_experiment(
    root: Path, goldens: Path, records: list[dict[str, Any]], model: Path | None = None, **sections: Any
) -> str:
    """Write records.json and a config with these sections of settings; return the flag of the config.

    The model is the golden LLaVA, copied to teacher/, unless it is given.
    """
    model = model or copy_llava(goldens, root / "teacher")
    (root / "records.json").write_text(json.dumps(records))
    data = {"train": f"{root}/records.json", "images": str(goldens / "data/images"), "system": ""}
    data |= sections.pop("data", {})
    settings = {**sections, "model": {"hf_dir": str(model)}, "data": data}
    (root / "experiment.yaml").write_text(json.dumps(settings))
    return f"--config={root / 'experiment.yaml'}"
