"""Flags of the commands: absl flags, and one ml_collections config whose fields are flags as well."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from vlmprune_jax.base.checks import one_of, suggest
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.run.experiment.recipes import locate

Flags = flags.FlagValues
# Help text of a flag, or (default, help). The default says the type: a text (also if there is none), True or False, a
# number from 1, `int` for a number from 0 without default, a list of texts, or a tuple of choices (the first if unset).
Spec = str | tuple[Any, str]
Specs = Mapping[str, Spec]
_SETTING = re.compile(r"--?(?:no)?config\.([^=[]+)")  # --config.x.y=value or --noconfig.x.y
UNITS = {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
# Positional arguments, settings given as --config.x.y, and the path of the config file.
_HIDDEN = ("args", "explicit", "config_file")


CONFIG = "FILE.yaml, FILE.py or FILE.py:VARIANT, or the name of a shipped config such as llava15_7b:depth,0.3"
ONLY = ("", "run only variants whose names match patterns such as 'width*,depth*'; in a sweep: runs, by one pattern")
# Flags that all commands with an experiment share.
COMMON: Specs = {
    "config": CONFIG,
    "workdir": "folder for all files of this run",
    "only": ONLY,
    "overwrite": (False, "replace outputs whose inputs or settings have changed"),
    "dry_run": (False, "check everything and print the steps without running them"),
    "coordinator": "HOST:PORT of process 0 (TPU slices detect it)",
    "num_processes": (int, "number of processes that run this command"),
    "process_id": (int, "number of this process, from 0"),
}


@dataclass(frozen=True)
class Command:
    """One command: its help text (USAGE: SUMMARY. DETAILS), the function that runs it, and its flags by name.

    `arguments`: True if it takes words without "--". `config`: default of `--config`.
    """

    text: str
    run: Callable[[Flags], None]
    flags: Callable[[], Specs] = dict
    arguments: bool = False
    config: str | None = None

    @property
    def summary(self) -> str:
        """The command in one line, for the overview of all commands."""
        return self.text.partition("\n")[0].partition(": ")[2].removesuffix(".")


def parse(name: str, command: Command, argv: Sequence[str]) -> Flags:
    """Parse a command line into flags; `values.config` is a locked ConfigDict, `values.args` the other arguments.

    Raises UserError for an unknown flag or config field (with the nearest known one), a bad value, a missing --config.
    """
    values, loaded, unset = define(command), None, dict[str, None]()
    explicit = [match[1] for arg in argv if (match := _SETTING.match(arg))]
    config, others = split_flag(argv, "config")
    config = command.config if config is None else config
    if "config" in values and config is not None:
        from vlmprune_jax.run.cli.config_files import load_config

        config = locate(config)
        loaded = load_config(config)
        for setting in explicit:
            _check_path(setting.split("."), loaded)
            value, without = split_flag(others, f"config.{setting}")
            if value == "None":  # ml_collections reads None as a text
                unset[setting], others = None, without
        argv = others
    elif "config" in values and explicit:
        raise UserError("--config.x=value changes a setting of a config file: name the file as well (--config=FILE.py)")
    try:
        values = define(command, loaded, argv)
        rest = values([name, *argv])[1:]
        if unset:
            values.config.update_from_flattened_dict(unset)
    except flags.UnrecognizedFlagError as error:
        raise UserError(
            f"vlmprune {name} has no flag --{error.flagname}{suggest(error.flagname, _names(values))}"
        ) from None
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"vlmprune {name}: {error}") from None
    values["args"].value, values["explicit"].value, values["config_file"].value = rest, explicit, config
    if rest and not command.arguments:
        raise UserError(f"vlmprune {name} takes no argument {rest[0]!r}: write settings with --, as --config.{rest[0]}")
    return values


def define(command: Command, config: ConfigDict | None = None, argv: Sequence[str] = ()) -> Flags:
    """Define the command's flags and, if a config is passed, one flag per config field that the arguments set."""
    values = Flags()
    if config is not None:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=list(argv))
    hidden: dict[str, Spec] = {name: ([], "") for name in _HIDDEN}
    for name, spec in {"debug": (False, "show the traceback of an error"), **hidden, **command.flags()}.items():
        default, about = (None, spec) if isinstance(spec, str) else spec
        given: Any = {"flag_values": values, "help": about}
        if name in values:  # the config
            continue
        if isinstance(default, bool):
            flags.DEFINE_bool(name, default, **given)
        elif isinstance(default, int):
            flags.DEFINE_integer(name, default, lower_bound=min(default, 1), **given)
        elif default is int:
            flags.DEFINE_integer(name, None, lower_bound=0, **given)
        elif isinstance(default, list):
            flags.DEFINE_list(name, default, **given)
        elif isinstance(default, tuple):
            flags.DEFINE_enum(name, default[0], default, **given)
        else:
            flags.DEFINE_string(name, default, **given)
    return values


def _check_path(names: Sequence[str], config: Any) -> None:
    at, section = config, "config"
    for part in names:
        if not isinstance(at, Mapping) and not hasattr(at, "keys"):
            raise UserError(f"--{section}.{part}: {section} is a setting, not a section of settings")
        bare = part.split("[")[0]
        if bare not in at:
            raise UserError(f"--{section}.{part}: {section} has no setting {bare!r}{suggest(bare, list(at.keys()))}")
        at, section = at[bare], f"{section}.{part}"


def split_flag(argv: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Split the flag `--name=value` off the arguments; return (its last value or None, the other arguments)."""
    value, others, left = None, list[str](), iter(argv)
    for arg in left:
        flag, equals, text = arg.partition("=")
        if flag not in (f"--{name}", f"-{name}"):
            others.append(arg)
        elif equals:
            value = text
        elif (following := next(left, None)) is not None:
            value = following
        else:  # the parser says that its value is missing
            others.append(arg)
    return value, others


def _names(values: Flags) -> list[str]:
    return sorted(name for name in values if name not in (*_HIDDEN, "help"))


def help_of(command: Command) -> str:
    """Return the help text of a command and its flags."""
    values = define(command)
    lines = [command.text, "", "flags:"]
    for flag in _names(values):
        shown = f"--{flag}" if values[flag].boolean else f"--{flag}=..."
        lines.append(f"  {shown:<18} {values[flag].help}")
    if "config" in values:
        lines.append(f"  {'--config.x.y=...':<18} value of the setting x.y of the config (None = unset)")
    return "\n".join(lines)


def parse_bytes(text: str) -> float:
    """Convert a size such as 2e9, "2GB" (10**9) or "2GiB" (2**30) to a number of bytes.

    Raises UserError for text of another form, or a number that is not above 0.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*(?:[eE]\+?\d+)?)\s*([a-zA-Z]*)\s*", text)
    number = float(match[1]) if match else math.nan
    if match is None or not 0 < number < math.inf:
        raise UserError(f"--bytes={text}: must be a size above 0, such as 2e9, 2GB or 2GiB")
    return number * UNITS[one_of("--bytes: unit", match[2].upper(), tuple(UNITS))]


def parse_share(name: str, text: str) -> float:
    """Convert a share such as 5%, 0.05 or "none" (0) to a fraction.

    Raises UserError for text of another form.
    """
    number = text.strip().removesuffix("%")
    try:
        return 0.0 if number == "none" else float(number) / (100 if "%" in text else 1)
    except ValueError:
        raise UserError(f"--{name}={text}: must be a share, such as 5% or 0.05") from None
