"""Files that anybody may have written are read in one place: base/files.py, for weights in checkpoints/disk as well."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT

PACKAGE = ROOT / "vlmprune_jax"
CHECKED = ("base/files.py", "base/links.py", "base/weight_files.py", "base/atomic.py", "io/checkpoints/disk/")
# Functions that open, read, copy or decode what a path, a file or a text holds. `copymode` reads no content.
READERS = {
    "json.load", "json.loads", "msgspec.json.decode", "mmap.mmap", "zipfile.ZipFile", "zipfile.Path", "tarfile.open",
    "gzip.open", "bz2.open", "lzma.open", "PIL.Image.open", "torch.load", "torch.jit.load", "safetensors.safe_open",
    "safetensors.torch.load_file", "safetensors.numpy.load_file", "safetensors.numpy.load", "safetensors.deserialize",
    "numpy.load", "numpy.fromfile", "numpy.memmap", "numpy.loadtxt", "numpy.genfromtxt", "numpy.lib.format.open_memmap",
    "shutil.copy", "shutil.copy2", "shutil.copyfile", "shutil.copyfileobj", "shutil.copytree", "fileinput.input",
    "linecache.getlines", "runpy.run_path", "imageio.imread", "matplotlib.pyplot.imread", "yaml.load", "tomllib.load",
}  # fmt: skip
# Links are resolved by base/links.py: `Path.resolve` fails for a link to itself, `realpath` for a NUL character.
READERS |= {"os.path.realpath", "pathlib.Path.resolve"}
METHODS = {"read_text", "read_bytes", "resolve"}  # of paths, of either library
OPENERS = {"open", "io.open", "os.open", "os.fdopen", "builtins.open", "codecs.open"}
WRITES = {"w", "a", "x"}
_OWN = "what this process made a moment ago, as JSON would return it"
_RUN = "what the processes of one run tell each other, never in a file"
_STORED = "an image inside a data set, which io/data/tfds.py reads"
_BUCKET = "of a bucket, where no link, device or FIFO lies"
# (file, function, what it uses) -> why that is no way in for a file that somebody else wrote.
EXCEPTIONS = {
    ("base/cache.py", "__init__", "json.loads"): _OWN,
    ("io/data/datasets.py", "_rows", "json.loads"): _OWN,
    ("base/journal.py", "__init__", "json.loads"): _OWN,
    ("core/recovery/checkpoint.py", "__init__", "json.loads"): _OWN,
    ("run/workdir/content.py", "plain", "json.loads"): _OWN,
    ("base/processes.py", "_value", "json.loads"): _RUN,
    ("core/mesh/stop.py", "_watch", "json.loads"): _RUN,
    ("core/mesh/mesh.py", "_slice_has_workers", ".open"): "the metadata server of a TPU VM: an address, not a file",
    ("run/speed/engines.py", "serve", "msgspec.json.decode"): "a line of the process that started this one",
    ("run/speed/engines.py", "_peak_bytes", ".read_text"): "this process's memory, by the kernel",
    (
        "io/exports/vocabulary.py",
        "read_tokenizer",
        "json.loads",
    ): "the text of a tokenizer that load_tokenizer has read",
    ("io/exports/target.py", "write_files", "shutil.copyfile"): "the PyTorch file of this package",
    ("run/workdir/store.py", "exclusive", "os.open"): "a lock, whose content nobody reads",
    ("run/workdir/store.py", "exclusive", "os.fdopen"): "a lock, whose content nobody reads",
    ("core/recovery/checkpoint.py", "restore", "json.loads"): "a checked text of a checkpoint, within `reading`",
    ("io/data/video/reader.py", "_opened", ".read_bytes"): "a video inside a record or data set",
    ("io/data/video/worker.py", "main", "json.loads"): "a line of the process that started this one",
    ("io/data/video/worker.py", "main", "os.fdopen"): "a file that the process which started this one has opened",
    ("io/data/media.py", "find", "os.path.realpath"): "a file that is there; its root is resolved once for all images",
    ("io/data/records.py", "_parse", "json.loads"): "a text that read_text has read; the message counts the lines",
    ("io/data/media.py", "opened_image", ".read_bytes"): _STORED,
    ("io/data/tfds.py", "_picture", ".read_bytes"): _STORED,
    ("io/data/tfds.py", "_text", ".read_text"): _BUCKET,
    ("io/data/tfds.py", "_on_this_machine", ".open"): _BUCKET,
    ("io/data/tfds.py", "_on_this_machine", "shutil.copyfileobj"): _BUCKET,
}


def python_files() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), path


class Readers(ast.NodeVisitor):
    """(line, function, what is used) of every use of a reader in a module, called or handed on."""

    def __init__(self, source: str):
        tree = ast.parse(source)
        self.names: dict[str, str] = {}  # local name -> dotted name
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                self.names |= {
                    (alias.asname or alias.name.split(".")[0]): alias.name if alias.asname else alias.name.split(".")[0]
                    for alias in node.names
                }
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                self.names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        self.found: list[tuple[int, str, str]] = []
        self.inside = ["module"]
        self.written: set[int] = set()
        self.visit(tree)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.inside.append(node.name)
        self.generic_visit(node)
        self.inside.pop()

    def visit_Call(self, node: ast.Call) -> None:
        name = self.dotted(node.func)
        if (name in OPENERS or self.is_method(node.func, {"open"})) and self.is_written(node, name):
            self.written.add(id(node.func))
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self.note(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.note(node)
        self.generic_visit(node)

    def note(self, node: ast.Name | ast.Attribute) -> None:
        """Note a reader, unless it is called to write."""
        name = self.dotted(node)
        if id(node) in self.written:
            return
        if name in READERS or name in OPENERS:
            self.found.append((node.lineno, self.inside[-1], name))
        elif self.is_method(node, METHODS | {"open"}):
            self.found.append((node.lineno, self.inside[-1], f".{node.attr}"))

    def dotted(self, node: ast.expr) -> str:
        """The whole name of a function of a module; "" of anything else."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, node.id if node.id == "open" else "")
        if isinstance(node, ast.Attribute):
            before = self.dotted(node.value)
            return f"{before}.{node.attr}" if before else ""
        return ""

    def is_method(self, node: ast.expr, names: set[str]) -> bool:
        """Whether it is one of these of an object, not of an imported module or class."""
        return isinstance(node, ast.Attribute) and node.attr in names and not self.dotted(node)

    @staticmethod
    def is_written(call: ast.Call, name: str) -> bool:
        """Whether a file is opened to write: a mode that is written out, or flags with O_WRONLY."""
        place = 1 if name else 0  # of the mode: open(path, mode), path.open(mode)
        given = [keyword.value for keyword in call.keywords if keyword.arg in ("mode", "flags")]
        given += call.args[place : place + 1]
        if not given:
            return False
        if isinstance(given[0], ast.Constant) and isinstance(given[0].value, str):
            return given[0].value[:1] in WRITES and "+" not in given[0].value
        return name == "os.open" and "O_WRONLY" in ast.unparse(given[0])


@functools.cache
def uses() -> dict[tuple[str, str, str], list[str]]:
    """(file, function, what it uses) -> places, outside the checked readers."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for name, path in python_files():
        if not name.startswith(CHECKED):
            for line, function, what in Readers(path.read_text(encoding="utf-8")).found:
                found.setdefault((name, function, what), []).append(f"vlmprune_jax/{name}:{line} {what} in {function}")
    return found


def test_files_are_read_by_the_checked_readers():
    unchecked = [place for use, places in uses().items() if use not in EXCEPTIONS for place in places]
    assert not unchecked, "read these through base/files.py or io/checkpoints/disk/:\n" + "\n".join(unchecked)


def test_no_exception_is_left_over():
    assert not [use for use in EXCEPTIONS if use not in uses()]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("open(path)", ["open"]),
        ("open(path, 'rb')", ["open"]),
        ("open(path, mode)", ["open"]),
        ("open(path, 'r+b')", ["open"]),
        ("open(path, 'w+b')", ["open"]),
        ("open(path, 'wb')", []),
        ("open(path, mode='a')", []),
        ("path.open()", [".open"]),
        ("path.open('rb')", [".open"]),
        ("path.open('x', encoding='utf-8')", []),
        ("import os\nos.open(path, os.O_RDONLY)", ["os.open"]),
        ("import os\nos.open(path, os.O_WRONLY | os.O_CREAT)", []),
        ("(folder / name).read_text()", [".read_text"]),
        ("texts = map(Path.read_text, paths)", [".read_text"]),
        ("from checked_files import read_text\nread_text(path)", []),
        ("import numpy as np\nnp.load(path)", ["numpy.load"]),
        ("from json import loads as parse\nparse(text)", ["json.loads"]),
        ("import json\nvalues = map(json.loads, lines)", ["json.loads"]),
        ("import json\njson.dumps(value)", []),
        ("from PIL import Image\nImage.open(path)", ["PIL.Image.open"]),
        ("def f():\n    import torch\n    torch.load(path)", ["torch.load"]),
        ("import shutil\nshutil.copytree(a, b)\nshutil.rmtree(a)", ["shutil.copytree"]),
    ],
)
def test_readers_are_noticed(source, found):
    assert [what for _, _, what in Readers(source).found] == found
