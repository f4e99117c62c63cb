"""A folder in which commands run: the golden LLaVA, records about its images, and a config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_cases import copy_llava


def record(name: str, image: str | None, question: str, answer: str) -> dict[str, Any]:
    """Return a record of one question, with an image or without."""
    question = question if image is None else f"<image>\n{question}"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns} | ({} if image is None else {"image": image})


def write_experiment(root: Path, goldens: Path, records: list[dict[str, Any]], **sections: Any) -> str:
    """Write teacher/, records.json and a config with these sections of settings; return the flag of the config."""
    copy_llava(goldens, root / "teacher")
    (root / "records.json").write_text(json.dumps(records))
    data = {"train": f"{root}/records.json", "images": str(goldens / "data/images"), "system": ""}
    data |= sections.pop("data", {})
    settings = {**sections, "model": {"hf_dir": f"{root}/teacher"}, "data": data}
    (root / "experiment.yaml").write_text(json.dumps(settings))
    return f"--config={root / 'experiment.yaml'}"
