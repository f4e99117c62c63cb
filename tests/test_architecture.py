"""The rules of the design that a parser can check: who imports whom, what is never imported, and sizes."""

import ast
import graphlib
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from vlmprune_jax.io.families import FAMILIES, shapes, templates, towers

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vlmprune_jax"
# One way: a room imports from itself and the rooms before it. Lines only fall: what needs more moves or removes
# something first.
BUDGETS = {"base": 2_170, "core": 15_500, "io": 16_880, "run": 12_982}
ROOMS = (*BUDGETS, "__main__")
# What a room knows nothing of, by word, in code, docstrings and messages.
WORDS = {
    "core": ("vllm", "mlx", "openvino", "gguf", "llama", "safetensors", "config.json", "workdir", "report"),
    "io": ("workdir", "sweep", "stage"),
}
# (File, word it may contain): the reason. At most ten.
EXCEPTIONS = {
    ("core/mixers.py", "llama"): "the name of a rotary type",
    ("core/models/layers.py", "llama"): "the name of a rotary type",
    ("core/prune/config.py", "gguf"): "names of block sizes in `prune.align_to`",
    ("core/recovery/loop.py", "workdir"): "an argument of vp.recover",
}
WITHOUT_JAX = ("base", "core/*.py", "core/plans", "io/families")
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
SHIPPED_TORCH = PACKAGE / "io/exports/remote"  # PyTorch files that exports carry; only the check of one imports them


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py") if "goldens" not in path.parts)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def nodes(path: Path, *kinds: type[ast.AST]) -> list[ast.AST]:
    """All nodes of a file, or those of these kinds."""
    return [node for node in nodes(path) if isinstance(node, kinds)] if kinds else [*ast.walk(parsed(path))]


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


@cache
def imports(path: Path) -> list[tuple[str, ast.AST]]:
    """(dotted name, node) of everything that the file imports; `from a import b` gives both a and a.b."""
    package, found = path.relative_to(ROOT).with_suffix("").parts[:-1], []
    for node in nodes(path, ast.Import, ast.ImportFrom):
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            names = [module, *(f"{module}.{name}" for name in names)]
        found += [(name, node) for name in names]
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def lies_in(path: Path, *places: str) -> bool:
    """True if a file of the package matches a pattern, or lies in a folder, of `places`."""
    inside = path.relative_to(PACKAGE)
    return any(inside.match(place) if "*" in place else inside.is_relative_to(place) for place in places)


def modules() -> dict[str, Path]:
    """Dotted name of every module of the package -> its file."""
    found = {}
    for path in python_files("vlmprune_jax"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def local_functions(path: Path) -> list[ast.AST]:
    return nodes(path, ast.FunctionDef, ast.AsyncFunctionDef)


def test_imports_run_one_way():
    wrong = []
    for path in python_files("vlmprune_jax"):
        room = room_of(path)
        if room == "__init__":
            continue
        assert room in ROOMS, f"{path.relative_to(ROOT)} lies in no room"
        for name, node in imports(path):
            parts = name.split(".")
            if parts[0] != "vlmprune_jax":
                continue
            if len(parts) == 1:
                whole_api = isinstance(node, ast.Import) and not lies_in(path, "run/cli", "__main__.py")
                wrong += [f"{where(path, node)} imports the public API from below it"] * whole_api
            elif parts[1] not in ROOMS or ROOMS.index(parts[1]) > ROOMS.index(room):
                wrong.append(f"{where(path, node)}: {room} imports {name}")
    assert not wrong, "\n".join(wrong)


def forbidden_words(room: str, name: str, text: str) -> Iterator[str]:
    """Yield "FILE:LINE: WORD" of every word in a file that its room knows nothing of, exceptions left out."""
    for word in WORDS.get(room, ()):
        pattern = re.compile(rf"(?<![A-Za-z]){re.escape(word)}s?(?![A-Za-z])", re.IGNORECASE)
        for number, line in enumerate(text.splitlines(), start=1):
            if (name, word) not in EXCEPTIONS and pattern.search(line):
                yield f"{name}:{number}: {word}"


def test_rooms_know_nothing_of_the_rooms_after_them():
    wrong = []
    for path in python_files("vlmprune_jax"):
        name = str(path.relative_to(PACKAGE))
        wrong += forbidden_words(room_of(path), name, path.read_text(encoding="utf-8"))
    assert not wrong, "\n".join(wrong)
    unused = [
        (name, word) for name, word in EXCEPTIONS if word not in (PACKAGE / name).read_text(encoding="utf-8").casefold()
    ]
    assert len(EXCEPTIONS) <= 10
    assert not unused


def test_words_are_noticed():
    text = "def llama(x): ...  # vLLM's report\n'config.json of a workdir'\n"
    assert len([*forbidden_words("core", "x.py", text)]) == 5
    assert [*forbidden_words("io", "x.py", "no stages, prestaged")] == ["x.py:1: stage"]


def test_rooms_keep_to_their_budgets():
    lines = dict.fromkeys(BUDGETS, 0)
    for path in python_files("vlmprune_jax"):
        if room_of(path) in lines:
            lines[room_of(path)] += path.read_text(encoding="utf-8").count("\n")
    over = {
        room: f"{count:,} lines, budget {BUDGETS[room]:,}" for room, count in lines.items() if count > BUDGETS[room]
    }
    assert not over, f"{over}: remove or move something first; budgets only fall"
    slack = {room: count for room, count in lines.items() if count < BUDGETS[room] - 150}
    assert not slack, f"{slack}: lower the budgets to these lines"


def executed(name: str, files: dict[str, Path]) -> set[str]:
    """Modules of the package that run when this one is imported, or one of its functions imports them.

    Importing a.b.c first runs a/__init__ and a/b/__init__. Those of the module's own packages run already, so that they
    count only if it takes a name from one. The public API is lazy.
    """
    found, own = set(), {name.rsplit(".", n)[0] for n in range(name.count(".") + 1)}
    for node in nodes(files[name], ast.Import, ast.ImportFrom):
        targets = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            targets = [inside if (inside := f"{node.module}.{target}") in files else node.module for target in targets]
        for target in targets:
            parents = {target.rsplit(".", n)[0] for n in range(1, target.count(".") + 1)}
            found |= {target, *parents - own} & files.keys()
    return found - {name, "vlmprune_jax"}


def test_no_import_cycles():
    """Not even through an `__init__`, or an import inside a function: any module can be the first to be imported."""
    files = modules()
    graph = {name: executed(name, files) for name in files if name != "vlmprune_jax"}
    assert {"vlmprune_jax.core.prune", "vlmprune_jax.core.prune.criteria"} <= graph["vlmprune_jax.core.recovery.terms"]
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle
    units: dict[str, set[str]] = {}
    for name, targets in graph.items():
        unit = ".".join(name.split(".")[1:3])
        units.setdefault(unit, set()).update({".".join(target.split(".")[1:3]) for target in targets} - {unit})
    list(graphlib.TopologicalSorter(units).static_order())


def test_foundations_do_without_jax():
    files = [path for path in python_files("vlmprune_jax") if lies_in(path, *WITHOUT_JAX)]
    banned = {"jax", "jaxlib", "flax", "optax", "orbax", "torch", "transformers"}
    wrong = [where(path, node) for path in files for name, node in imports(path) if name.split(".")[0] in banned]
    assert files
    assert not wrong, wrong


def test_running_an_experiment_computes_nothing_with_arrays():
    banned = {"jax.numpy", "flax", "optax"}
    files = [path for path in python_files("vlmprune_jax") if lies_in(path, "run")]
    wrong = [where(path, node) for path in files for name, node in imports(path) if {name, name.split(".")[0]} & banned]
    assert files
    assert not wrong, wrong


def plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def names_of_families() -> set[str]:
    """Families, model types, decoders, towers, prompt formats, classes and image processors, in small letters."""
    found = {*templates(), *towers.TOWERS, *(tower.kind for tower in towers.TOWERS.values())}
    for family in FAMILIES.values():
        found |= {family.name, *family.model_types, *family.image_processors}
        found |= {family.stock.name} if family.stock is not None else set()
    return {plain(name) for name in found}


def documentation(tree: ast.Module) -> set[int]:
    """Strings that are statements: docstrings."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def family_facts(path: Path, tree: ast.Module, names: set[str]) -> Iterator[str]:
    """Every literal that is a family's name, or a longer word with one of five letters or more in it."""
    inside, docs = re.compile("|".join(sorted(name for name in names if len(name) > 4))), documentation(tree)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        docs |= {id(keyword.value) for keyword in call.keywords if keyword.arg == "mode"}  # jnp.take(mode="clip")
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            word = plain(node.value)
            if (
                not re.search(r"\s", node.value)
                and node.value not in shapes.ROPE_KINDS
                and (word in names or inside.search(word))
            ):
                yield f"{where(path, node)}: {node.value!r}"


def test_family_facts_live_in_families():
    """Whatever is said of a family by name is said in its file; the demo makes a folder of one family."""
    names, wrong = names_of_families(), []
    assert {"llava", "internvlchat", "phi3", "mistralforcausallm", "hermes2", "siglip", "gotocr2"} <= names
    for path in python_files("vlmprune_jax"):
        if not lies_in(path, "io/families", "run/demo"):
            wrong += family_facts(path, parsed(path), names)
    assert not wrong, "\n".join(wrong)


def test_family_facts_are_noticed():
    source = """if cfg.family == "llava" or kind == 'clip': x = {"phi": 1, "LlavaProcessor": 2}[f"{a}internvl_chat"]"""
    assert len(list(family_facts(ROOT / "x.py", ast.parse(source), names_of_families()))) == 5


def test_torch_is_imported_only_inside_functions_that_check_or_time_it():
    allowed, wrong = set(), []
    for path in python_files("vlmprune_jax"):
        if SHIPPED_TORCH in path.parents:
            continue
        if lies_in(path, "io/exports") or path.parent.name == "speed":
            allowed |= {id(node) for function in local_functions(path) for node in ast.walk(function)}
        for name, node in imports(path):
            if name.split(".")[0] in {"torch", "torchvision", "accelerate"} and id(node) not in allowed:
                wrong.append(where(path, node))
    assert not wrong, wrong


def test_importing_the_package_leaves_torch_alone():
    """Torch takes seconds to import and its threads fight with XLA's."""
    code = "import sys, vlmprune_jax, vlmprune_jax.run.cli.main; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:] or "torch was imported"


def test_scripts_use_names_that_exist():
    """Most of them take too long to run here, so a name that is gone would only show when somebody repeats a number."""
    gone = []
    for path in python_files("benchmarks", "configs", "launch", "tools"):
        modules = {}
        for node in nodes(path, ast.ImportFrom):
            if (node.module or "").startswith("vlmprune_jax"):
                found = {name.name: _found(node.module, name.name) for name in node.names}
                gone += [f"{where(path, node)} {name}" for name, thing in found.items() if thing is None]
                modules |= {name.asname or name.name: found[name.name] for name in node.names}
        for node in nodes(path, ast.Attribute):
            module = modules.get(node.value.id) if isinstance(node.value, ast.Name) else None
            if inspect.ismodule(module) and not hasattr(module, node.attr):
                gone.append(f"{where(path, node)} {node.value.id}.{node.attr}")
    assert gone == []


def _found(module: str, name: str) -> object:
    """What `from module import name` gives, a module perhaps; None if there is no such thing."""
    try:
        return getattr(importlib.import_module(module), name, None) or importlib.import_module(f"{module}.{name}")
    except ImportError:
        return None


def test_no_private_jax():
    wrong = []
    for path in python_files("vlmprune_jax", "tests", "configs", "tools"):
        wrong += [where(path, node) for name, node in imports(path) if f"{name}.".startswith("jax._src.")]
        wrong += [where(path, node) for node in nodes(path, ast.Attribute) if node.attr == "_src"]
    assert not wrong, wrong


def test_no_pickle():
    """A checkpoint must not be able to run code: no pickle, no numpy object arrays, torch files by weights only."""
    wrong = []
    for path in python_files("vlmprune_jax", "tests", "configs", "tools"):
        wrong += [where(path, node) for name, node in imports(path) if name.split(".")[0] in PICKLES]
        for call in nodes(path, ast.Call):
            keywords = {keyword.arg: getattr(keyword.value, "value", None) for keyword in call.keywords}
            if "allow_pickle" in keywords and keywords["allow_pickle"] is not False:
                wrong.append(where(path, call))
            if (
                getattr(call.func, "attr", "") == "load"
                and ast.unparse(call.func) == "torch.load"
                and keywords.get("weights_only") is not True
            ):
                wrong.append(where(path, call))
    assert not wrong, wrong


def test_sizes_are_listed_for_review():
    """Files over 400 lines and functions over 60 appear in the warnings summary: no cut for the count's sake."""
    long = []
    for path in python_files("vlmprune_jax", "tests", "tools"):
        lines = path.read_text(encoding="utf-8").count("\n")
        long += [f"{path.relative_to(ROOT)}: {lines} lines"] * (lines > 400)
        functions = ((f, f.end_lineno - f.lineno + 1) for f in local_functions(path))
        long += [f"{where(path, f)} {f.name}: {length} lines" for f, length in functions if length > 60]
    if long:
        warnings.warn("long, for review: " + "; ".join(long), stacklevel=1)


def test_names_say_what_a_file_is_for():
    vague = {"utils", "util", "helpers", "misc", "common"}
    assert not [path for path in python_files("vlmprune_jax", "tests", "configs", "tools") if path.stem in vague]


def test_a_command_is_flags_and_wiring():
    files = [PACKAGE / "run/cli/tools.py", PACKAGE / "run/cli/stages.py"]
    sizes = {f.name: f.end_lineno - f.lineno + 1 for file in files for f in local_functions(file)}
    assert len(sizes) > 10
    assert not {name: lines for name, lines in sizes.items() if lines > 45}
