"""python tools/make_reference.py: write docs/reference/ from the declarations in the package.

A test fails if a committed page differs from what this script writes.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import pkgutil
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import msgspec

import vlmprune_jax as vp
from vlmprune_jax.run import workdir
from vlmprune_jax.run.cli.main import COMMANDS, main
from vlmprune_jax.run.experiment.spec import Option, options, sections
from vlmprune_jax.run.workdir.artefact import Artefact, Part

PAGES = Path(__file__).parents[1] / "docs" / "reference"
COUNTED = ("fraction", "images", "rows", "weight")  # units that a setting's sentence implies
SETTINGS = """\
# Settings

This page lists every setting of a config. It is generated: `make docs` writes it.

Set a setting in a config file (`config.recover.losses.kl = 0.5`) or as a flag (`--config.recover.losses.kl=0.5`).
`None` unsets a setting. `vlmprune help kl` also prints a setting's type, its bounds, and the stages that depend on it.
`config.prune_variants` and `config.recover_variants` hold partial configs by name, and one run tries all combinations.
"""
COMMAND_PAGE = """\
# Commands

This page shows `vlmprune COMMAND --help` for every command. It is generated: `make docs` writes it.

The flag `--debug` of all commands prints the traceback of an error. Commands that run a stage also have these flags:
"""
FILES = """\
# Files of a workdir

This page lists the files that a run writes. It is generated: `make docs` writes it.

|file|written by|content|
|---|---|---|
|`scores.npz`, `scores_vision.npz`|`score`|importance of layers, heads and neurons|
|`routing.npz`|`score`|routers' choices of experts, by token type|
|`plan.json`|`prune`|original indices of kept layers, heads and neurons; the model's fingerprint|
|`pruned/`, `reconstructed/`, `recovered/`|`prune`, `reconstruct`, `recover`|Hugging Face checkpoints|
|`training/`|`recover`|checkpoints, `metrics.jsonl`, TensorBoard events|
|`eval/`|`evaluate`|answers, scores of every question, samples for the report|
|`export/`|`export`|the exported model with its card|
|`result.json`, `speed.json`|`run`|accuracy, retention, costs and speed of all models|
|`report.html`, `report.png`|`report`|the report as one page; its main figure|
|`tpu_plan.json`|`plan`|memory and step time on a TPU slice|
|`.stages/`|every stage|hashes of inputs and settings, to skip unchanged stages|

A config with variants has a folder per variant: `width/sft/recovered/` is the model of `width` recovered with `sft`.
Every JSON file has a format number in the field `format`. Each vlmprune version reads one format number per file.
The tables below list the fields of the JSON files. A field marked `=` is optional.
"""
API = """\
# Python API

This page lists the public names of `import vlmprune_jax as vp`. It is generated: `make docs` writes it.
`help(vp.NAME)` prints arguments, shapes and errors. Names that are not listed may change in any release.
"""


def settings_page() -> str:
    """Return one table per section of a config: setting, default, meaning."""
    lines, known, listed = [SETTINGS], options(), dict[tuple[str, ...], str]()
    for place, section in sections().items():
        rows = [_row(option, listed) for option in known if option.section == place]
        if rows:
            lines += [
                f"## {place}",
                "",
                _paragraph(section.__doc__),
                "",
                "|setting|default||",
                "|---|---|---|",
                *rows,
                "",
            ]
    return "\n".join(lines).rstrip() + "\n"


def _row(option: Option, listed: dict[tuple[str, ...], str]) -> str:
    """Return a setting's row; choices that another setting has listed are not repeated."""
    choices, unit, sentence = option.about.names(), option.about.unit, option.about.sentence
    if unit and unit not in COUNTED and not re.search(rf"(?<!\w){re.escape(unit)}(?!\w)", sentence, re.IGNORECASE):
        sentence += f" Unit: {unit}."
    if not all(f'"{name}"' in sentence for name in choices):
        same = listed.setdefault(choices, option.name) if len(choices) > 5 else option.name
        names = ", ".join(f"`{name}`" for name in choices)
        sentence += f" One of {names}." if same == option.name else f" As `{same}`."
    cells = (f"`{option.name.rpartition('.')[2]}`", f"`{option.default!r}`", sentence)
    return "|" + "|".join(cell.replace("|", "\\|") for cell in cells) + "|"


def commands_page() -> str:
    """Return the help of every command, with the flags that all stage commands share named once."""
    helps = {name: _help(name) for name in COMMANDS}
    shared = [line for line in helps["score"] if line in helps["export"] and line.startswith("  --")]
    lines = [COMMAND_PAGE, "```text", *shared, "```", ""]
    for name, text in helps.items():
        help_lines = [line for line in text if line not in shared and not line.startswith("  --debug")]
        while help_lines and help_lines[-1] in ("", "flags:"):
            help_lines.pop()
        lines += [f"## {name}", "", "```text", *help_lines, "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def _help(name: str) -> list[str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main([name, "--help"])
    return out.getvalue().rstrip().splitlines()


def files_page() -> str:
    """Return the fields of all JSON files of a workdir, from the Structs that write and read them."""
    lines = [FILES]
    for info in sorted(pkgutil.iter_modules(workdir.__path__), key=lambda module: module.name):
        module = importlib.import_module(f"{workdir.__name__}.{info.name}")
        kinds = [kind for kind in vars(module).values() if _is_part(kind) and kind.__module__ == module.__name__]
        if any(issubclass(kind, Artefact) for kind in kinds):
            rows = [f"|`{kind.__name__}`|{_words(kind.__doc__)}|{_fields(kind)}|" for kind in kinds]
            title = _words(module.__doc__).partition(". ")[0].rstrip(".")
            lines += [f"## {title}", "", "|object||fields|", "|---|---|---|", *rows, ""]
    return "\n".join(lines).rstrip() + "\n"


def _is_part(kind: object) -> bool:
    return inspect.isclass(kind) and issubclass(kind, Part) and kind not in (Part, Artefact)


def _fields(kind: type[Part]) -> str:
    fields = msgspec.structs.fields(kind)
    return ", ".join(f"`{field.encode_name}{'' if field.required else '='}`" for field in fields)


def api_page() -> str:
    """Return one row per public name: its parameters and the first sentence of its docstring."""
    classes, functions, other = [], [], []
    for name in sorted(vp.__all__):
        value = getattr(vp, name)
        about = _words((inspect.getdoc(value) or "").split("\n\n")[0]).replace("|", "\\|")
        if inspect.isclass(value):
            classes.append(f"|`{name}`|{about}|")
        elif inspect.isfunction(value):
            functions.append(f"|`{name}({_parameters(value)})`|{about}|")
        else:
            keys = sorted(getattr(key, "__name__", key) for key in value)
            other.append(f"|`{name}`|{', '.join(f'`{key}`' for key in keys)}|")
    tables = (("Functions", functions), ("Classes", classes), ("Mappings that your files can extend", other))
    text = "\n".join(
        [API, *("\n".join([f"## {title}", "", "|name||", "|---|---|", *lines, ""]) for title, lines in tables)]
    )
    return text.rstrip() + "\n"


def _parameters(function: Callable[..., object]) -> str:
    """Return the names of the parameters; those after `*` are keywords, those with `=` optional."""
    words, starred = [], False
    for parameter in inspect.signature(inspect.unwrap(function)).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            words.append("*")
        starred |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        marks: dict[object, str] = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
        optional = "" if parameter.default is parameter.empty else "="
        words.append(f"{marks.get(parameter.kind, '')}{parameter.name}{optional}")
    return ", ".join(words)


def _paragraph(text: str | None) -> str:
    """Return a docstring with one sentence per line."""
    return "\n".join(
        textwrap.fill(sentence, 118, break_on_hyphens=False)
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z`])", _words(text))
    )


def _words(text: str | None) -> str:
    return " ".join((text or "").split())


PAGE_OF = {"settings.md": settings_page, "commands.md": commands_page, "files.md": files_page, "api.md": api_page}

if __name__ == "__main__":
    for file, page in PAGE_OF.items():
        (PAGES / file).write_text(page(), encoding="utf-8")
        sys.stdout.write(f"docs/reference/{file}\n")
