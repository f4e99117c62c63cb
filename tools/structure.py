"""Print the measures of the package's structure that docs/explanation/architecture.md shows.

python tools/structure.py
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE, TESTS = ROOT / "vlmprune_jax", ROOT / "tests"
RIDDLES = ("What", "Whether", "Of", "How", "Where")  # openings of docstrings that english.md replaces
LONG = 60  # lines of a function
ROOMS = ("base", "core", "io", "run")
EMPTY = ("found", "one", "of", "own", "told", "said", "made", "parts", "where")  # variables that name nothing


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function and method of a module."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def annotated_types(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Yield the source of every annotation of a function's parameters and result."""
    arguments = function.args
    parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    for annotation in [*(parameter.annotation for parameter in parameters if parameter), function.returns]:
        if annotation is not None:
            yield ast.unparse(annotation)


def docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield (name, docstring) of every class and function that has one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
            yield node.name, text


def tests_by_name(paths: list[Path]) -> tuple[int, int]:
    """Return (modules with a test file of their name, modules)."""
    modules = [path.relative_to(PACKAGE) for path in paths if not path.name.startswith("__")]
    named = [path for path in modules if (TESTS / path.parent / f"test_{path.name}").is_file()]
    return len(named), len(modules)


def bindings(tree: ast.Module) -> Iterator[str]:
    """Yield the name of every variable and parameter that a module binds, once per binding."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


def print_rooms() -> None:
    """Print lines, files and functions of every room; tests/test_architecture.py has the budgets of lines."""
    for room in ROOMS:
        texts = [path.read_text(encoding="utf-8") for path in sorted((PACKAGE / room).rglob("*.py"))]
        trees = [ast.parse(text) for text in texts]
        lines, every = sum(text.count("\n") for text in texts), sum(len(list(functions(tree))) for tree in trees)
        print(f"{room:<5} {lines:>7,} lines {len(texts):>4} files {every:>6,} functions")


def main() -> None:
    """Compute and print all measures of the package's structure, one per line."""
    paths = sorted(PACKAGE.rglob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in paths]
    trees = [ast.parse(text) for text in texts]
    every = [(path, function) for path, tree in zip(paths, trees, strict=True) for function in functions(tree)]
    experiments = [function for _, function in every if "Experiment" in annotated_types(function)]
    json = sum(bool(re.search(r"\bJson\b", text)) for _, function in every for text in annotated_types(function))
    long = [
        f"{path.relative_to(ROOT)}:{function.name}"
        for path, function in every
        if (function.end_lineno or 0) - function.lineno + 1 > LONG
    ]
    openings = [
        name for tree in trees for name, text in docstrings(tree) if text.split(maxsplit=1)[0].strip(",") in RIDDLES
    ]
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    words = sum(len(page.read_text(encoding="utf-8").split()) for page in pages)
    named, modules = tests_by_name(paths)
    print_rooms()
    print(f"lines of the package                         {sum(text.count(chr(10)) for text in texts):,}")
    tests = sum(path.read_text(encoding="utf-8").count("\n") for path in TESTS.rglob("*.py"))
    classes = sum(isinstance(node, ast.ClassDef) for tree in trees for node in ast.walk(tree))
    print(f"lines of the tests                           {tests:,}")
    print(f"classes                                      {classes}")
    print(f"bindings that name nothing                   {sum(n in EMPTY for tree in trees for n in bindings(tree))}")
    print(f"functions that take the whole Experiment     {len(experiments)}")
    print(f"Json as the type of a parameter or result    {json}")
    print(f"functions over {LONG} lines                      {len(long)}  {', '.join(long)}")
    print(f"docstrings that begin with {'/'.join(RIDDLES)}  {len(openings)}")
    print(f"words of README and docs                     {words:,}")
    print(f"modules whose test bears their name          {named} of {modules}")


if __name__ == "__main__":
    main()
