"""The docs without a site builder: links, named files, settings and commands, line lengths and the word budget."""

import importlib
import json
import os
import re
import shlex
import subprocess
import tempfile
from functools import cache
from typing import Any

import pytest
from make_reference import PAGE_OF
from repository import ROOT

import vlmprune_jax as vp
from vlmprune_jax.run.cli.config_files import read_hyper
from vlmprune_jax.run.cli.flags import define, parse
from vlmprune_jax.run.cli.main import COMMANDS, find_command, script_command
from vlmprune_jax.run.cli.stages import stage_command
from vlmprune_jax.run.experiment.recipes import shipped_configs
from vlmprune_jax.run.experiment.spec import sections

NOTEBOOK = ROOT / "docs/tutorial.ipynb"
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
OTHERS = [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "launch/README.md")]
BUDGET = 25_000  # words of README and docs, generated pages included
DECISIONS = 5_000
LONGEST = 120
FOLDERS = ("benchmarks", "configs", "docs", "launch", "tests", "tools", "vlmprune_jax")
PACKAGES = tuple(sorted(path.name for path in (ROOT / "vlmprune_jax").iterdir() if (path / "__init__.py").is_file()))


def page_id(path):
    return path.relative_to(ROOT).as_posix()


def prose(path):
    """Lines of a page without code blocks."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL).splitlines()


@cache
def anchors(path):
    """The anchors of a page: those given by hand, and those that its headings get on GitHub and in mkdocs."""
    lines = prose(path)
    given = {name for line in lines for name in re.findall(r'<a id="([^"]+)">', line)}
    headings = [re.sub(r"[`*]", "", line.lstrip("#").strip()) for line in lines if re.match(r"#+ ", line)]
    return given | {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*PAGES, *OTHERS], ids=page_id)
def test_links_lead_somewhere(path):
    broken = []
    for line in prose(path):
        for target in re.findall(r"\]\(([^)\s]+)\)", line):
            if target.startswith(("https://", "mailto:")):
                continue
            file, _, anchor = target.partition("#")
            there = (path.parent / file).resolve() if file else path
            outside = ROOT / "docs" in path.parents and ROOT / "docs" not in there.parents  # the site lacks it
            if outside or not there.exists() or (anchor and anchor not in anchors(there)):
                broken.append(target)
    assert not broken


@pytest.mark.parametrize("path", [*PAGES, *OTHERS], ids=page_id)
def test_named_files_exist(path):
    """`tests/core/prune/test_width.py`, `benchmarks/plan.py --flags`, and `core/prune/select.py` of the package."""
    names = {
        name
        for line in prose(path)
        for code in re.findall(r"`([^`]+)`", line)
        for name in re.findall(r"(?<![\w/.=-])[\w-]+(?:/[\w.-]+)+", code)
        if name.partition("/")[0] in FOLDERS or (name.endswith(".py") and name.partition("/")[0] in PACKAGES)
    }
    assert not [one for one in names if not (ROOT / one).exists() and not (ROOT / "vlmprune_jax" / one).exists()]


def test_settings_that_pages_name_exist():
    known = {f"{place}.{name}" for place, section in sections().items() for name in section.__dataclass_fields__}
    roots = {place.partition(".")[0] for place in sections()}
    found = [
        (page_id(path), name)
        for path in PAGES
        if path.parent.name != "reference"  # made from the settings
        for line in prose(path)
        for name in re.findall(r"`(?:--config\.|config\.)?((?:\w+\.)+\w+)(?:=[^`]*)?`", line)
        if name.partition(".")[0] in roots and not re.search(r"\.(py|json|npz|html|md|png|csv|yaml|safetensors)$", name)
    ]
    wrong = [one for one in found if one[1] not in known and one[1] not in sections() and ".sets." not in one[1]]
    assert found
    assert not wrong


def test_decisions_that_are_cited_exist():
    numbers = re.findall(r'<a id="d(\d+)">', (ROOT / "docs/explanation/decisions.md").read_text(encoding="utf-8"))
    assert len(numbers) == len(set(numbers))
    files = [*PAGES, *OTHERS]
    for folder in ("benchmarks", "configs", "tests", "tools", "vlmprune_jax"):
        files += (ROOT / folder).rglob("*.py")
    cited = {
        (page_id(file), number)
        for file in files
        for number in re.findall(r"\bdecision (\d+)\b", file.read_text(encoding="utf-8"))
    }
    assert cited
    assert not sorted(one for one in cited if one[1] not in numbers)


@pytest.mark.parametrize("path", [*PAGES, *OTHERS], ids=page_id)
def test_prose_lines_are_short(path):
    longest = [line for line in prose(path) if len(line) > LONGEST and not line.startswith(("|", "!["))]
    assert not longest


def test_word_budget():
    words = {page_id(path): len(path.read_text(encoding="utf-8").split()) for path in PAGES}
    assert sum(words.values()) <= BUDGET, words
    assert words["docs/explanation/decisions.md"] <= DECISIONS


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(re.findall(r"[\w/-]+\.md", nav)) == sorted(pages)


@pytest.mark.parametrize("name", PAGE_OF)
def test_generated_pages_are_up_to_date(name):
    assert (ROOT / "docs/reference" / name).read_text(encoding="utf-8") == PAGE_OF[name](), (
        "run: python tools/make_reference.py"
    )


@pytest.mark.parametrize(
    ("page", "file", "methods"),
    [
        ("tutorial.md", "my_run.py", ("width", "least_squares")),
        ("how-to/fine-tune-then-prune.md", "mine.yaml", ("depth", "least_squares")),
    ],
)
def test_configs_of_pages_are_valid(tmp_path, page, file, methods):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (tmp_path / file).write_text(re.search(rf"```\w+\n(# {file}\n.*?)```", text, re.DOTALL)[1])
    config = parse("run", stage_command("run"), [f"--config={tmp_path / file}"]).config
    assert (config.prune.method, config.reconstruct.method) == methods


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """A complete example, from scores to a dry run of the upload; it leaves nothing where it is started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
    accuracy = names["accuracy"]
    assert accuracy["pruned"] < accuracy["reconstructed"] < accuracy["recovered"] < accuracy["unpruned"]
    assert vp.load(names["out"]).cfg == names["recovered"].cfg
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]


def test_install_lines_work_from_a_clone():
    """The package is on no index."""
    pages = [*PAGES, *OTHERS, NOTEBOOK]
    assert [page_id(path) for path in pages if re.search("pip install ['\"]?vlmprune", path.read_text())] == []


# --- commands: each exists, with these flags, settings and files; scripts print what they call -----------------------


VARIABLES = {
    "BUCKET": "bucket", "PROJECT": "p", "ZONE": "z", "TPU_NAME": "t", "ACCELERATOR": "v5litepod-64", "RUNTIME": "r",
    "CLUSTER": "c", "WORKLOAD": "w", "TPU_TYPE": "v5litepod-64", "IMAGE": "i", "TOPOLOGY": "2x2x2",
    "BLUEPRINT": "b.yaml",
}  # fmt: skip


def lines_of(path, language):
    """Return the lines of a Python file, or of the code blocks of a page; a backslash joins lines."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
        text = "\n".join(block for name, block in blocks if re.fullmatch(language, name))
    return re.sub(r"\\\n\s*", " ", text).splitlines()


def commands():
    """The words from the command's name on of every whole line of `vlmprune` or of a script in tools/."""
    for path in [*PAGES, ROOT / "launch/README.md", *sorted((ROOT / "configs").rglob("*.py"))]:
        for line in lines_of(path, "(bash)?"):
            line = re.sub(r"^(\s*)python tools/(\w+)\.py ", r"\1vlmprune \2 ", line.replace("$BUCKET", "bucket"))
            found = re.match(r"\s*vlmprune (\w[\w-]* .*)", line)
            if found and not re.search(r" \| |\.\.\.|\[", found[1].partition(" #")[0]):
                yield pytest.param(shlex.split(found[1], comments=True), id=f"{page_id(path)}: {found[1][:50]}")


@pytest.mark.parametrize("words", [*commands()])
def test_commands_are_as_documented(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, *rest = words
    assert name in COMMANDS or (ROOT / f"tools/{name}.py").is_file()
    command = find_command(name) if name in COMMANDS else script_command(importlib.import_module(name))
    config = next((word.removeprefix("--config=") for word in rest if word.startswith("--config=")), None)
    file = (config or "").partition(":")[0]
    if file in shipped_configs() or (file.endswith(".py") and (ROOT / file).is_file()):
        parse(name, command, rest)  # loads it, and refuses settings that do not exist
    else:
        known = set(define(command))
        flags = [word[2:].partition("=")[0].removeprefix("no") for word in rest if word.startswith("--")]
        assert [flag for flag in flags if flag not in known and not flag.startswith("config")] == []


@pytest.mark.parametrize("page", ["launch/README.md", "docs/how-to/run-on-a-pod.md"])
def test_scripts_are_as_documented(page):
    """Every line that calls a script, with its arguments, prints commands and does nothing."""
    text = (ROOT / page).read_text(encoding="utf-8")
    run = re.search(r"^run=\(.*?\)$", text, re.MULTILINE | re.DOTALL)[0]
    calls = re.findall(r"^(launch/\w+\.sh)(.*?)(?:\s+#.*)?$", text, re.MULTILINE)
    assert len(calls) >= 9
    lines = [f"{script} --dry-run {rest.strip()}" for script, rest in calls]
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join([run, *lines])],
        cwd=ROOT, env={**os.environ, **VARIABLES}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= len(lines)


@pytest.mark.parametrize("path", [*PAGES, *OTHERS], ids=page_id)
def test_commands_name_configs_and_files_that_exist(path):
    """Configs by name or path, and files of the repository; a page may define a config of its own, `# my_run.py`."""
    folders = "|".join(FOLDERS)
    own = set(re.findall(r"^# ([\w.]+\.(?:py|yaml))$", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
    missing = []
    inline = re.findall(r"`((?:vlmprune|python|make) [^`]+)`", path.read_text(encoding="utf-8"))
    for line in [*lines_of(path, r"(?!python)\w*"), *inline]:
        for config in re.findall(r"--config[= ]([\w./-]+)", line):
            name = config.removesuffix(".py")
            known = name in shipped_configs() or (ROOT / f"{name}.py").is_file() or config in own
            if not known and not config.isupper() and not config.startswith(("FILE", "DIR", "...")):
                missing.append(config)
        for name in re.findall(rf"(?<![\w/.=-])((?:{folders})/[\w./-]+)", line):
            if not (ROOT / name).exists():
                missing.append(name)
    assert not missing


@pytest.mark.parametrize(
    ("name", "variant"), [("demo_cut", ""), ("study_smollm2", ""), ("study_easyvqa", ":untrained")]
)
def test_sweeps_say_how_many_runs_they_have(name, variant):
    path = ROOT / f"configs/sweeps/{name}.py"
    said = re.findall(r"\b(\d+) runs", path.read_text(encoding="utf-8"))
    assert str(len(read_hyper(f"{path}{variant}"))) == said[0]
