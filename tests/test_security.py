"""The rules of SECURITY.md that a parser can check, each with the places that were looked at."""

import ast
import functools
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT

from vlmprune_jax.base import markup

PACKAGE = ROOT / "vlmprune_jax"
CHILDREN = {"subprocess.run", "subprocess.Popen", "multiprocessing.get_context"}
STARTERS = ("subprocess.", "multiprocessing.", "os.system", "os.popen", "os.exec", "os.spawn", "os.posix_spawn",
            "os.fork", "pty.", "ProcessPoolExecutor", "webbrowser.")  # fmt: skip
# (file, function) -> how the child is kept from importing or running what lies in the current folder.
SAFE = {
    ("run/speed/bench.py", "start"): "-P",
    ("io/exports/gguf_file.py", "_ask"): "-P",
    ("io/data/tokenizer_files.py", "try_script"): "-P",
    ("io/data/video/process.py", "__init__"): "-P",
    ("run/workdir/content.py", "commit"): "git, in the folder of this package",
    ("run/sweep/workers.py", "in_processes"): "PYTHONSAFEPATH",
}
_NEW = "a new folder, which appears when it is complete"
_REPLACED = "a file that was removed or replaced a moment ago"
# (file, function) -> why no link is written through.
WRITERS = {
    ("base/files.py", "replacing"): "a new file, opened by x",
    ("base/files.py", "copy_file"): _NEW,
    ("run/workdir/store.py", "_link"): _NEW,
    ("io/data/tfds.py", "_on_this_machine"): _NEW,
    ("run/demo/easyvqa.py", "_build"): _NEW,
    ("io/exports/target.py", "write_processor"): _NEW,
    ("io/exports/target.py", "write_files"): _NEW,
    ("io/exports/vocabulary.py", "_trim_tokenizer_files"): _NEW,
    ("io/exports/vocabulary.py", "_write"): _NEW,
    ("io/checkpoints/disk/tensors.py", "write_shard"): _NEW,
    ("io/checkpoints/disk/tensors.py", "write_weights"): _NEW,
    ("io/exports/peft.py", "write_adapter"): _NEW,
    ("run/speed/engines.py", "serve"): "standard output",
    ("base/console.py", "without_output"): "the null device",
    ("base/journal.py", "add"): _REPLACED,
    ("core/recovery/metrics.py", "__init__"): _REPLACED,
    ("core/recovery/metrics.py", "step"): _REPLACED,
}


_USERS, _SYSTEM = "a file that the command line or the config names", "a file of the system"
UNBOUNDED = {
    ("io/data/records.py", "read_entries"): _USERS,
    ("io/exports/token_sources.py", "read_texts"): _USERS,
    ("run/stages/evaluate.py", "_read_text"): _USERS,
    ("run/evaluation/lmms/backend.py", "read"): "an image that a task of lmms-eval names",
    ("core/mesh/machine.py", "_lines"): _SYSTEM,
    ("run/sweep/sweep.py", "attempt"): _SYSTEM,
}


class Uses(ast.NodeVisitor):
    """(function, node) of every expression in a module."""

    def __init__(self, path: Path):
        self.found: list[tuple[str, ast.AST]] = []
        self.inside = "module"
        self.visit(ast.parse(path.read_text(encoding="utf-8")))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self.inside = self.inside, node.name
        super().generic_visit(node)
        self.inside = outer

    def generic_visit(self, node: ast.AST) -> None:
        self.found.append((self.inside, node))
        super().generic_visit(node)


@functools.cache
def uses_in(path: Path) -> list[tuple[str, ast.AST]]:
    return Uses(path).found


def uses(*folders: Path) -> Iterator[tuple[str, str, ast.AST]]:
    """(file, function, node) of the package, or of other folders."""
    for folder in folders or (PACKAGE,):
        for path in sorted(folder.rglob("*.py")):
            for function, node in uses_in(path):
                yield path.relative_to(folder).as_posix(), function, node


def test_children_start_with_a_safe_path():
    found = {}
    for file, function, node in uses():
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if name.startswith(STARTERS):
            found.setdefault((file, function), set()).add(name)
    assert found.keys() == SAFE.keys(), "say how these start their processes"
    assert all(names <= CHILDREN for names in found.values())
    for file, function, node in uses():
        if SAFE.get((file, function)) == "-P" and isinstance(node, ast.List):
            text = ast.unparse(node)
            assert "sys.executable" not in text or text.startswith("[sys.executable, '-P'"), f"{file}: {text}"


def is_writer(node: ast.AST) -> bool:
    """Whether it writes a file: `write_text`, `write_bytes`, or `open` with a mode that writes."""
    if not isinstance(node, ast.Call):
        return False
    name = ast.unparse(node.func).rpartition(".")[2]
    modes = [one.value for one in node.args[:2] if isinstance(one, ast.Constant) and isinstance(one.value, str)]
    modes += [of.value.value for of in node.keywords if of.arg == "mode" and isinstance(of.value, ast.Constant)]
    if name in ("write_text", "write_bytes"):
        return isinstance(node.func, ast.Attribute)  # a method of a path, not the ledger's function
    return name in ("open", "fdopen") and any(mode[:1] in {*"wax"} and len(mode) < 4 for mode in modes)


def test_files_are_written_where_no_link_is_followed():
    found = {(file, function) for file, function, node in uses() if is_writer(node)}
    assert found == WRITERS.keys(), "write these by core.files.replacing, or say why no link is followed"


@pytest.mark.parametrize(
    ("source", "writes"),
    [("open(p, 'w')", True), ("p.open('ab')", True), ("p.write_text(t)", True), ("os.fdopen(f, 'w')", True),
     ("write_text(p, t)", False), ("open(p)", False), ("p.open('rb')", False)],
)  # fmt: skip
def test_writers_are_noticed(source, writes):
    assert is_writer(ast.parse(source).body[0].value) == writes


def test_files_are_read_within_a_bound():
    found = {
        (file, function)
        for file, function, node in uses()
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("read_text", "read_bytes")
        if len(node.args) + sum(word.arg == "most" for word in node.keywords) < 2
    }
    assert found == UNBOUNDED.keys(), "give these a maximum size"


def test_every_workdir_is_checked_for_links():
    """`to_workdir` is what a flag --workdir goes through."""
    used, checked = [], []
    for file, _, node in uses(PACKAGE / "run/cli", ROOT / "tools"):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "flags.workdir":
            used.append(f"{file}:{node.lineno}")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "to_workdir":
            checked += [f"{file}:{arg.lineno}" for arg in node.args if ast.unparse(arg) == "flags.workdir"]
        tests = [node.test] if isinstance(node, ast.If | ast.IfExp) else []
        checked += [f"{file}:{test.lineno}" for test in tests if "flags.workdir" in ast.unparse(test)]
    assert len(checked) > 5
    assert set(used) == set(checked)


def test_markup_is_made_where_it_is_escaped():
    """HTML by one environment that escapes, Markdown by modules that use `core.markup`, CSV by its cells."""
    places = {"csv.writer": set(), "Environment": set(), "Markup": set(), ".md": set()}
    for file, _, node in uses(PACKAGE, ROOT / "tools"):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name == "csv.writer":
                places["csv.writer"].add(file)
            if name == "jinja2.Environment":
                places["Environment"].add(file)
                # Markdown is escaped by the filters of card.py
                assert "autoescape=True" in ast.unparse(node) or file == "io/exports/card.py"
            if name == "Markup":
                places["Markup"].add(ast.unparse(node))
            if name.endswith(".writerow"):
                assert ast.unparse(node.args[0]).startswith("map(cell, ")
        if isinstance(node, ast.JoinedStr):
            text = "".join(part.value for part in node.values if isinstance(part, ast.Constant))
            if any(mark in text for mark in ("\n## ", "\n# ", "**", "|---")):
                places[".md"].add(file)
    assert places == {
        "csv.writer": {"run/workdir/sweep.py"},
        "Environment": {"io/exports/card.py", "run/report/page.py"},
        "Markup": {
            "Markup(script)",
            "Markup(svg)",
        },
        ".md": set(),
    }
    for file in (PACKAGE / "io/exports/card.py", ROOT / "tools/study_page.py"):
        assert "from vlmprune_jax.base.markup import" in file.read_text(encoding="utf-8")


def test_matplotlib_starts_from_its_own_defaults():
    """Its style is set in one place, and its `matplotlibrc` is not looked for in the current folder."""
    styled = [(file, name) for file, name, node in uses() if "rc_context" in getattr(node, "attr", "")]
    assert styled == [("run/report/plots.py", "styled")]
    importing = {file for file, _, node in uses() if isinstance(node, ast.Import | ast.ImportFrom)
                 for text in [ast.unparse(node)] if "matplotlib" in text}  # fmt: skip
    assert {Path(file).parent.as_posix() for file in importing} == {"run/report"}
    assert "chdir" in inspect.getsource(__import__("vlmprune_jax.run.report", fromlist=[""]))
    assert markup.__doc__
