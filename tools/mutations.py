"""Break the package on purpose, one mutation at a time, and check that its tests fail.

python tools/mutations.py [--select='attention-*'] [--stale] [--unchanged]

`tools/mutations.toml` lists the mutations: a text that occurs once in a file, the text that replaces it, and the tests
that must fail then. The tracked files are copied to a temporary folder, where one mutation after the other is applied,
tested and undone. A row of the table is "red" if a test failed, "GREEN" if all passed, and "ERROR" if pytest could not
run them (a mutation must break behaviour, not syntax). The exit code is 1 unless all rows are red.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIST = ROOT / "tools" / "mutations.toml"
LIMIT = 900  # seconds of one mutation's tests; a program that hangs counts as red
OUTCOMES = {0: "GREEN", 1: "red"}  # by pytest's exit code


@dataclass(frozen=True)
class Mutation:
    """One defect to put into the package, and the tests that should see it."""

    name: str
    """Area and defect, such as "attention-no-scale"."""

    file: str
    """File to change, relative to the repository."""

    old: str
    """Text that occurs exactly once in the file."""

    new: str
    """Text that replaces it."""

    tests: tuple[str, ...]
    """Test files or node ids, relative to the repository; the fastest that fail."""

    breaks: str = ""
    """Consequence of the defect, if the name does not tell it."""


def read_mutations(pattern: str = "*") -> list[Mutation]:
    """Return the mutations of the list whose names match a shell pattern."""
    entries = tomllib.loads(LIST.read_text(encoding="utf-8"))["mutation"]
    mutations = [Mutation(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]
    return [mutation for mutation in mutations if fnmatch.fnmatchcase(mutation.name, pattern)]


def stale(mutations: Sequence[Mutation], root: Path = ROOT) -> list[str]:
    """Return one line for every mutation that no longer fits the files: its text, its tests or its name."""
    problems = []
    for number, mutation in enumerate(mutations):
        if any(other.name == mutation.name for other in mutations[:number]):
            problems.append(f"{mutation.name}: there are two mutations of this name: rename one")
        path = root / mutation.file
        count = path.read_text(encoding="utf-8").count(mutation.old) if path.is_file() else 0
        if count != 1 or mutation.old == mutation.new:
            problems.append(f"{mutation.name}: old occurs {count} times in {mutation.file}, expected once: update it")
        missing = [test for test in mutation.tests if not test_exists(test, root)]
        problems += [f"{mutation.name}: there is no test {test}: name another" for test in missing]
        if not mutation.tests:
            problems.append(f"{mutation.name}: has no tests: name those that should fail")
    return problems


def test_exists(test: str, root: Path) -> bool:
    """Return True if there is a test file, and in it the function of a node id."""
    file, _, function = test.partition("::")
    path, name = root / file, function.partition("[")[0]
    return path.is_file() and (not name or bool(re.search(rf"^def {name}\(", path.read_text("utf-8"), re.MULTILINE)))


def copy_repository(folder: Path) -> None:
    """Copy the tracked files to a folder, and link what tests need besides them."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():  # a removed file is listed until the next commit
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    if (ROOT / ".compat").exists():
        (folder / ".compat").symlink_to(ROOT / ".compat")


def run_tests(tests: Sequence[str], folder: Path) -> tuple[str, str]:
    """Run tests in a copy of the repository; return the outcome and the line of the first failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    try:
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return "red", f"no end within {LIMIT} s"
    lines = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return OUTCOMES.get(run.returncode, "ERROR"), (lines or run.stderr.splitlines()[-1:] or [""])[0]


def apply(mutation: Mutation, folder: Path) -> tuple[str, str]:
    """Run the tests of a mutation in the copy, and undo it; return the outcome and the first failure."""
    path = folder / mutation.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        return run_tests(mutation.tests, folder)
    finally:
        path.write_text(text, encoding="utf-8")


def print_table(mutations: Sequence[Mutation]) -> int:
    """Apply every mutation and print its row; return the number of rows that are not red."""
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="vlmprune-mutations-") as name:
        copy_repository(Path(name))
        for mutation in mutations:
            start = time.monotonic()
            outcome, failure = apply(mutation, Path(name))
            counts[outcome] = counts.get(outcome, 0) + 1
            print(f"{outcome:<6}{time.monotonic() - start:>5.0f} s  {mutation.name:<36} {failure[:100]}", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) or "no mutation selected")
    return len(mutations) - counts.get("red", 0)


def main() -> int:
    """Check or run the mutations of the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--select", default="*", help="shell pattern of the names to run, such as 'attention-*'")
    parser.add_argument("--stale", action="store_true", help="only check that texts and tests of the list exist")
    parser.add_argument("--unchanged", action="store_true", help="only check that all tests of the list pass now")
    options = parser.parse_args()
    mutations = read_mutations(options.select)
    problems = stale(mutations)
    print("\n".join(problems), end="\n" if problems else "")
    if options.stale or problems:
        return int(bool(problems))
    if options.unchanged:
        outcome, failure = run_tests(sorted({test for mutation in mutations for test in mutation.tests}), ROOT)
        print(f"unchanged: {outcome} {failure}")
        return int(outcome != "GREEN")
    return int(print_table(mutations) > 0)


if __name__ == "__main__":
    sys.exit(main())
