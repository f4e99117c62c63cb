"""Table of what serving engines compute with pruned exports, compared with stock transformers in float32.

`python tools/engines/table.py --work=DIR` writes the stand-ins to DIR, runs each installed engine in its environment
(`make engines-vllm`, `engines-mlx`, `engines-openvino`), and prints Markdown tables. DIR/ENGINE.jsonl keeps a line per
folder, which a second run does not repeat. With `--engines` alone nothing is run, and the tables have what DIR has.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from standins import CUTS, STANDINS, STORAGES, write_cells

from vlmprune_jax.base.errors import UserError

_HERE = Path(__file__).parent
ENGINES = ("vllm", "mlx", "openvino")
_SECONDS = 300  # limit of one folder
_NOT_RUN = "not run"
Line = dict[str, Any]


def interpreter(engine: str, root: Path = _HERE.parents[1]) -> Path:
    """Return the path of the Python interpreter in an engine's environment.

    Raises UserError if the environment does not exist, or holds another version than `ENGINE.txt` asks for.
    """
    python = root / f".venv-{engine}/bin/python"
    if not python.exists():
        raise UserError(f"{engine}: is not installed (no {python.parent.parent}): run make engines-{engine}")
    wanted = re.findall(r"^([\w-]+)(?:\[\w+\])?==([\d.]+)", (_HERE / f"{engine}.txt").read_text(), re.M)
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    shown = subprocess.run([python, "-c", code, *(name for name, _ in wanted)], capture_output=True, text=True)
    versions = shown.stdout.split() or ["none"] * len(wanted)
    for (name, expected), version in zip(wanted, versions, strict=True):
        if not version.startswith(expected):
            message = f"{engine}: {name} {version} is installed, expected {expected}"
            raise UserError(f"{message}: remove {python.parent.parent} and run make engines-{engine}")
    return python


def run_engine(engine: str, python: Path, folders: Sequence[Path], work: Path) -> list[Line]:
    """Run an engine's script on all folders, restarting it after crashes; return one result line per folder."""
    path, lines = work / f"{engine}.jsonl", read_lines(engine, work)
    waiting = [folder for folder in folders if str(folder) not in {line["folder"] for line in lines}]
    script = [_HERE / "run_transformers.py", "--causal"] if engine == "causal" else [_HERE / f"run_{engine}.py"]
    while waiting:
        with (work / f"{engine}.log").open("a") as log, path.open("a") as file:
            command = [python, *script, *waiting]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
                new = [*_read(process, str(waiting[0]), file)]
        lines += [{"engine": engine, **line} for line in new]
        done = {line["folder"] for line in new}
        waiting = [folder for folder in waiting if str(folder) not in done]
    wanted = {str(folder) for folder in folders}
    return [line for line in lines if line["folder"] in wanted]


def read_lines(engine: str, work: Path) -> list[Line]:
    """Return the result lines that earlier runs of an engine wrote."""
    path = work / f"{engine}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _read(process: subprocess.Popen[str], first: str, file: TextIO) -> Iterator[Line]:
    """Yield an engine script's result lines, and an error line for an unfinished folder; also write them to `file`.

    The script is killed if a folder takes more than `_SECONDS`.
    """
    assert process.stdout is not None
    begun: Line | None = {"folder": first}
    timer = threading.Timer(_SECONDS, process.kill)
    timer.start()
    for text in process.stdout:
        line = json.loads(text)
        timer.cancel()
        timer = threading.Timer(_SECONDS, process.kill)
        timer.start()
        begun = line if line.pop("begun", False) else None
        if begun is None:
            file.write(json.dumps(line) + "\n")
            file.flush()
            yield line
    timer.cancel()
    status = process.wait()
    if begun is not None:
        line = {**begun, "error": f"the process ended with status {status}"}
        file.write(json.dumps(line) + "\n")
        yield line


def difference(folder: Path, engine: str, reference_engine: str = "transformers") -> float | str:
    """Return the largest difference between an engine's and transformers' log-probabilities, or why it is unknown."""
    if not (folder / f"{reference_engine}.npz").exists():
        return "transformers did not load it"
    worst = 0.0
    reference, other = (dict(np.load(folder / f"{name}.npz")) for name in (reference_engine, engine))
    for i in range(len(reference) // 2):
        if not np.array_equal(reference[f"ids{i}"], other[f"ids{i}"]):
            return f"other token ids in prompt {i}"
        ours, theirs = reference[f"logprobs{i}"], other[f"logprobs{i}"]
        rows, words = min(len(ours), len(theirs)), min(ours.shape[-1], theirs.shape[-1])
        worst = max(worst, float(np.abs(ours[:rows, :words] - theirs[:rows, :words]).max()))
    return worst


def markdown(lines: Sequence[Line]) -> str:
    """Return the Markdown table of differences: a row per stand-in and cut, a column per engine and storage format."""
    cells = {(*_place(line), line["engine"]): line for line in lines}
    columns = [(engine, storage) for engine in ENGINES for storage in STORAGES]
    columns = [column for column in columns if any(key[2:] == column[::-1] for key in cells)]
    versions = {line["engine"]: line["version"] for line in lines if "version" in line}
    heads = [f"{engine} {versions.get(engine, '')} {storage}" for engine, storage in columns]
    notes: dict[str, int] = {}
    rows = []
    for name, cut in dict.fromkeys(key[:2] for key in cells):
        values = [_show(cells.get((name, cut, storage, engine)), notes) for engine, storage in columns]
        rows.append(f"| {name} | {cut} | {' | '.join(values)} |")
    footnotes = [f"{number}. {text}" for text, number in notes.items()]
    header = [f"| stand-in | cut | {' | '.join(heads)} |", "|---" * (len(columns) + 2) + "|"]
    return "\n".join([*header, *rows, "", *footnotes])


def summary(lines: Sequence[Line]) -> str:
    """Return the Markdown summary for float32: per stand-in and engine, "unpruned/worst cut" and failed cuts.

    "*" marks differences from transformers with causally masked images.
    """
    cells = {(*_place(line), line["engine"]): line for line in lines}
    engines = [engine for engine in ENGINES if any(key[3] == engine for key in cells)]
    rows = [f"| stand-in | {' | '.join(engines)} |", "|---" * (len(engines) + 1) + "|"]
    for name in dict.fromkeys(key[0] for key in cells):
        texts = []
        for engine in engines:
            cuts = {key[1]: line for key, line in cells.items() if (key[0], *key[2:]) == (name, "float32", engine)}
            texts.append(_worst(cuts))
        rows.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(rows)


def _worst(cuts: dict[str, Line]) -> str:
    numbers, others, mark = dict[str, float](), {"no": list[str](), _NOT_RUN: list[str]()}, ""
    for cut, line in cuts.items():
        folder = Path(line["folder"])
        value = line.get("error") or difference(folder, line["engine"])
        if isinstance(value, float) and (folder / "causal.npz").exists():
            masked = difference(folder, line["engine"], "causal")
            value, mark = (masked, "*") if isinstance(masked, float) and masked < value / 10 else (value, mark)
        if isinstance(value, float):
            numbers[cut] = value
        else:
            others[_NOT_RUN if value == _NOT_RUN else "no"].append(cut)
    if "unpruned" not in numbers:
        return next((word for word, names in others.items() if "unpruned" in names), "")
    worst = max((value for cut, value in numbers.items() if cut != "unpruned"), default=None)
    shown = _number(numbers["unpruned"]) + ("" if worst is None else f"/{_number(worst)}") + mark
    return "; ".join([shown, *(f"{word} {', '.join(names)}" for word, names in others.items() if names)])


def _place(line: Line) -> tuple[str, str, str]:
    """Return (stand-in, cut, storage format) from the folder name in a result line."""
    folder = Path(line["folder"])
    cut, _, storage = folder.name.rpartition(", ")
    return folder.parent.name, cut, storage


def _show(line: Line | None, notes: dict[str, int]) -> str:
    if line is None:
        return ""
    folder = Path(line["folder"])
    value = line.get("error") or difference(folder, line["engine"])
    if value == _NOT_RUN:
        return _NOT_RUN
    if not isinstance(value, float):
        return f"no ({notes.setdefault(value, len(notes) + 1)})"
    text = _number(value)
    if (folder / "causal.npz").exists() and isinstance(same := difference(folder, line["engine"], "causal"), float):
        text += f" ({_number(same)} from causal images)" if same < value else ""
    return text


def _number(value: float) -> str:
    return f"{value:.0e}" if value < 0.01 else f"{value:.2f}"


def _order(folder: Path) -> tuple[int, int]:
    """Return a sorting key: unpruned before cuts within a storage, float32 first."""
    cut, _, storage = folder.name.rpartition(", ")
    return STORAGES.index(storage), ["unpruned", *CUTS].index(cut)


def _sees_ahead(folder: Path) -> bool:
    """Return True if the tokens of an image see each other, which not every engine computes."""
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", {})
    return config["model_type"] == "gemma3" or text.get("use_bidirectional_attention") == "vision"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for stand-ins and results")
    for name, all_names in {"engines": ENGINES, "standins": STANDINS, "cuts": CUTS, "storages": STORAGES}.items():
        parser.add_argument(f"--{name}", nargs="*", default=[*all_names], choices=[*all_names])
    flags = parser.parse_args()
    work: Path = flags.work.absolute()
    folders = []
    for name in flags.standins:
        for cell in write_cells(name, work, flags.cuts, flags.storages):
            if isinstance(cell, Path):
                folders.append(cell)
            else:
                print(cell, file=sys.stderr)
    folders.sort(key=_order)
    if flags.engines:
        reference = run_engine("transformers", Path(sys.executable), folders, work)
        print(*(f"transformers: {line['folder']}: {line['error']}" for line in reference if "error" in line), sep="\n")
        run_engine("causal", Path(sys.executable), [folder for folder in folders if _sees_ahead(folder)], work)
    for engine in flags.engines:
        try:
            run_engine(engine, interpreter(engine), folders, work)
        except UserError as error:
            print(error, file=sys.stderr)
    known = {(engine, line["folder"]): line for engine in ENGINES for line in read_lines(engine, work)}
    lines = [
        known.get((engine, str(folder)), {"folder": str(folder), "engine": engine, "error": _NOT_RUN})
        for engine in ENGINES
        for folder in sorted(folders, key=lambda folder: (flags.standins.index(folder.parent.name), _order(folder)))
    ]
    print(markdown(lines), summary(lines), sep="\n\n")


if __name__ == "__main__":
    main()
