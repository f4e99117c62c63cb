"""python tools/make_reference.py: write docs/reference/ from the declarations in the package.

A test fails if a committed page differs from what this script writes.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import vlmprune_jax as vp
from vlmprune_jax.cli.main import COMMANDS, main
from vlmprune_jax.experiment.options import Option, options, sections

PAGES = Path(__file__).parents[1] / "docs" / "reference"
SETTINGS = """\
# Settings

This page lists every setting of a config. It is generated: `make docs` writes it.

Set them in a config file (`config.recover.losses.kl = 0.5`) or on the command line (`--config.recover.losses.kl=0.5`).
`None` unsets a setting. `vlmprune help kl` also prints the type, the bounds and the stages that run again.
`config.prune_variants` and `config.recover_variants` hold partial configs by name, combined in one workdir.
"""
COMMAND_PAGE = """\
# Commands

This page shows `vlmprune COMMAND --help` for every command. It is generated: `make docs` writes it.

The flag `--debug` of all commands shows the traceback of an error. Stage commands also take:
"""
API = """\
# Python API

This page lists the public names of `import vlmprune_jax as vp`. It is generated: `make docs` writes it.
`help(vp.NAME)` prints arguments, shapes and errors. Names that are not listed may change in any release.
"""


def settings_page() -> str:
    """Return one table per section of a config: setting, default, meaning."""
    lines, known = [SETTINGS], options()
    for place, section in sections().items():
        rows = [_row(option) for option in known if option.section == place]
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


def _row(option: Option) -> str:
    choices, unit, sentence = option.about.names(), option.about.unit, option.about.sentence
    if unit and unit.lower() not in sentence.lower():
        sentence += f" Unit: {unit}."
    if choices:
        sentence += f" One of {', '.join(f'`{name}`' for name in choices)}."
    cells = (f"`{option.name.rpartition('.')[2]}`", f"`{option.about.default!r}`", sentence)
    return "|" + "|".join(cell.replace("|", "\\|") for cell in cells) + "|"


def commands_page() -> str:
    """Return the help of every command, with the flags that all stage commands share named once."""
    helps = {name: _help(name) for name in COMMANDS}
    shared = [line for line in helps["score"] if line in helps["export"] and line.startswith("  --")]
    lines = [COMMAND_PAGE, "```text", *shared, "```", ""]
    for name, text in helps.items():
        own = [line for line in text if line not in shared and not line.startswith("  --debug")]
        while own and own[-1] in ("", "flags:"):
            own.pop()
        lines += [f"## {name}", "", "```text", *own, "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def _help(name: str) -> list[str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main([name, "--help"])
    return out.getvalue().rstrip().splitlines()


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
            other.append(f"|`{name}`|{', '.join(f'`{key}`' for key in sorted(value))}|")
    parts = (("Functions", functions), ("Classes", classes), ("Mappings that your files can extend", other))
    text = "\n".join(
        [API, *("\n".join([f"## {title}", "", "|name||", "|---|---|", *lines, ""]) for title, lines in parts)]
    )
    return text.rstrip() + "\n"


def _parameters(function: Callable[..., object]) -> str:
    """Return the names of the parameters; those after `*` are keywords, those with `=` optional."""
    words, starred = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            words.append("*")
        starred |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        marks = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
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


PAGE_OF = {"settings.md": settings_page, "commands.md": commands_page, "api.md": api_page}

if __name__ == "__main__":
    for file, page in PAGE_OF.items():
        (PAGES / file).write_text(page(), encoding="utf-8")
        sys.stdout.write(f"docs/reference/{file}\n")
