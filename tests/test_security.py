"""The rules of SECURITY.md that a parser can check, each with the places that were looked at."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT

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
    """Notes the (file, function, node) of every call, attribute, list, import, f-string and condition of a module."""

    KINDS = (ast.Call, ast.Attribute, ast.List, ast.Import, ast.ImportFrom, ast.JoinedStr, ast.If, ast.IfExp)

    def __init__(self, file: str, source: str):
        self.file, self.inside = file, "module"
        self.found: list[tuple[str, str, ast.AST]] = []
        self.visit(ast.parse(source))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self.inside = self.inside, node.name
        super().generic_visit(node)
        self.inside = outer

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, self.KINDS):
            self.found.append((self.file, self.inside, node))
        super().generic_visit(node)


@functools.cache
def uses_in(folder: Path) -> list[tuple[str, str, ast.AST]]:
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.py"))}
    return [use for file, path in files.items() for use in Uses(file, path.read_text(encoding="utf-8")).found]


def uses(kind: type | tuple[type, ...], *folders: Path) -> Iterator[tuple[str, str, ast.AST]]:
    """(file, function, node) of this kind, of the package or of other folders."""
    for folder in folders or (PACKAGE,):
        yield from (use for use in uses_in(folder) if isinstance(use[2], kind))


def test_children_start_with_a_safe_path():
    found = {}
    for file, function, node in uses(ast.Call):
        name = ast.unparse(node.func)
        if name.startswith(STARTERS):
            found.setdefault((file, function), set()).add(name)
    assert found.keys() == SAFE.keys(), "say how these start their processes"
    assert all(names <= CHILDREN for names in found.values())
    for file, function, node in uses(ast.List):
        if SAFE.get((file, function)) == "-P":
            text = ast.unparse(node)
            assert "sys.executable" not in text or text.startswith("[sys.executable, '-P'"), f"{file}: {text}"


def is_writer(node: ast.Call) -> bool:
    """Whether a call writes a file: `write_text`, `write_bytes`, or `open` with a mode that writes."""
    name = ast.unparse(node.func).rpartition(".")[2]
    modes = [one.value for one in node.args[:2] if isinstance(one, ast.Constant) and isinstance(one.value, str)]
    modes += [of.value.value for of in node.keywords if of.arg == "mode" and isinstance(of.value, ast.Constant)]
    if name in ("write_text", "write_bytes"):
        return isinstance(node.func, ast.Attribute)  # a method of a path, not the ledger's function
    return name in ("open", "fdopen") and any(mode[:1] in {*"wax"} and len(mode) < 4 for mode in modes)


def test_files_are_written_where_no_link_is_followed():
    found = {(file, function) for file, function, node in uses(ast.Call) if is_writer(node)}
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
        for file, function, node in uses(ast.Call)
        if isinstance(node.func, ast.Name) and node.func.id in ("read_text", "read_bytes")
        if len(node.args) + sum(word.arg == "most" for word in node.keywords) < 2
    }
    assert found == UNBOUNDED.keys(), "give these a maximum size"


def is_workdir(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node) == "flags.workdir"


def test_every_workdir_is_checked_for_links():
    """`to_workdir` is what a flag --workdir goes through."""
    places = (PACKAGE / "run/cli", ROOT / "tools")
    used = {f"{file}:{node.lineno}" for file, _, node in uses(ast.Attribute, *places) if is_workdir(node)}
    checked = {
        f"{file}:{arg.lineno}"
        for file, _, node in uses(ast.Call, *places)
        if ast.unparse(node.func) == "to_workdir"
        for arg in node.args
        if is_workdir(arg)
    }
    checked |= {
        f"{file}:{node.test.lineno}"
        for file, _, node in uses((ast.If, ast.IfExp), *places)
        if any(is_workdir(part) for part in ast.walk(node.test))
    }
    assert len(checked) > 5
    assert used == checked


def test_markup_is_made_where_it_is_escaped():
    """HTML by one environment that escapes, Markdown by modules that use `core.markup`, CSV by its cells."""
    places = {"csv.writer": set(), "Environment": set(), "Markup": set(), ".md": set()}
    for file, _, node in uses(ast.Call, PACKAGE, ROOT / "tools"):
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
    for file, _, node in uses(ast.JoinedStr, PACKAGE, ROOT / "tools"):
        text = "".join(part.value for part in node.values if isinstance(part, ast.Constant))
        if any(mark in text for mark in ("\n## ", "\n# ", "**", "|---")):
            places[".md"].add(file)
    assert places == {
        "csv.writer": {"run/workdir/sweep.py"},
        "Environment": {"io/exports/card.py", "run/report/page.py"},
        "Markup": {"Markup(script)", "Markup(svg)"},
        ".md": set(),
    }
    for file in (PACKAGE / "io/exports/card.py", ROOT / "tools/study_page.py"):
        assert "from vlmprune_jax.base.markup import" in file.read_text(encoding="utf-8")


def test_matplotlib_starts_from_its_own_defaults():
    """Its style is set in one place, and its `matplotlibrc` is not looked for in the current folder."""
    styled = [(file, name) for file, name, node in uses(ast.Attribute) if "rc_context" in node.attr]
    assert styled == [("run/report/plots.py", "styled")]
    imports = uses((ast.Import, ast.ImportFrom))
    importing = {Path(file).parent.as_posix() for file, _, node in imports if "matplotlib" in ast.unparse(node)}
    assert importing == {"run/report"}
    assert "chdir" in (PACKAGE / "run/report/__init__.py").read_text(encoding="utf-8")
