"""Flags of the commands: absl flags, and one ml_collections config whose fields are flags as well."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import inspect
import os
import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from vlmprune_jax.core.checks import suggest
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.files import open_file
from vlmprune_jax.core.links import real_path

Flags = flags.FlagValues
_SETTING, _UNSET = re.compile(r"--?(?:no)?config\.([^=[]+)"), re.compile(r"--?config\.(\S+)=None")
# Positional arguments, settings given as --config.x.y, and the path of the config file.
_HIDDEN = ("args", "explicit", "config_file")


def config_flag(values: Flags) -> None:
    """Define the flag `--config`, unless the command has already defined it."""
    if "config" not in values:
        text = "config file (FILE.py or FILE.py:VARIANT), or a shipped config such as demo or llava15_7b:depth,0.3"
        flags.DEFINE_string("config", None, text, flag_values=values)


def only_flag(values: Flags) -> None:
    """Define the flag --only, which selects variants or runs by name."""
    text = "run only variants whose names match a pattern such as 'width*' (several: with commas); in a sweep: runs"
    flags.DEFINE_string("only", "", text, flag_values=values)


def common(values: Flags) -> None:
    """Define the flags that all stage commands share, such as `--workdir`."""
    config_flag(values)
    flags.DEFINE_string("workdir", None, "folder for all files of this run", flag_values=values)
    only_flag(values)
    flags.DEFINE_bool("overwrite", False, "replace outputs whose inputs or settings have changed", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "check everything and print the steps without running them", flag_values=values)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0 (TPU slices know it)", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "number of processes that run this command", flag_values=values)
    flags.DEFINE_integer("process_id", None, "number of this process, from 0", flag_values=values)


def parse(name: str, command: Any, argv: Sequence[str]) -> Flags:
    """Parse a command line into flags; `values.config` is a locked ConfigDict, `values.args` the other arguments.

    Raises UserError for an unknown flag or config field (with the nearest known one), a bad value, a missing --config.
    """
    values, loaded, unset = _define(command), None, dict[str, None]()
    explicit = [setting for arg in argv if (setting := _setting_of(arg)) is not None]
    config, others = split_flag(argv, "config")
    config = getattr(command, "CONFIG", None) if config is None else config
    if "config" in values and config is not None:
        config = locate(config)
        loaded = _loaded(config)
        for setting in explicit:
            _check_path(setting.split("."), loaded)
        unset = {match[1]: None for arg in others if (match := _UNSET.fullmatch(arg))}
        argv = [arg for arg in others if not _UNSET.fullmatch(arg)]
    elif "config" in values and explicit:
        raise UserError("--config.x=value changes a setting of a config file: name the file as well (--config=FILE.py)")
    try:
        values = _define(command, loaded, argv)
        rest = values([name, *argv])[1:]
        if loaded is not None:  # ml_collections reads None as a text
            flag: Any = values["config"]
            texts = flag.override_values
            values.config.update_from_flattened_dict(unset | {name: None for name in texts if texts[name] == "None"})
    except flags.UnrecognizedFlagError as error:
        raise UserError(
            f"vlmprune {name} has no flag --{error.flagname}{suggest(error.flagname, _names(values))}"
        ) from None
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"vlmprune {name}: {error}") from None
    values["args"].value, values["explicit"].value, values["config_file"].value = rest, explicit, config
    if rest and not getattr(command, "TAKES_ARGUMENTS", False):
        raise UserError(f"vlmprune {name} takes no argument {rest[0]!r}: write settings with --, as --config.{rest[0]}")
    return values


@contextlib.contextmanager
def _importing_beside(config: str) -> Iterator[None]:
    """Context in which a config file can import Python files from its own folder, for example the user's criteria."""
    folder = str(real_path(file_of(config)).parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def shipped_configs() -> dict[str, Path]:
    """Return {name: file} of the config files bundled with vlmprune, such as `demo` and `sweeps/demo_cut`.

    They lie in the installed package, and in a checkout beside it.
    """
    package = Path(__file__).parents[1]
    folder = package / "configs"
    folder = folder if folder.is_dir() else package.parent / "configs"
    files = [*sorted(folder.glob("*.py")), *sorted(folder.glob("sweeps/*.py"))]
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def locate(config: str) -> str:
    """Return FILE.py:VARIANT for a config given by path or by the name of a bundled config (NAME or NAME:VARIANT)."""
    if config.endswith(".py") or ".py:" in config or (os.path.lexists(config) and not os.path.isdir(config)):
        return config
    name, colon, variant = config.partition(":")
    known = shipped_configs()
    if name not in known:
        raise UserError(f"--config={config}: no such file, and no shipped config of this name{suggest(name, known)}")
    return f"{known[name]}{colon}{variant}"


def file_of(config: str) -> Path:
    """Return the path of the Python file in a config argument FILE.py:VARIANT."""
    file, mark, _ = config.partition(".py:")
    return Path(f"{file}.py" if mark else config)


def load_file(config: str) -> tuple[types.ModuleType, Any]:
    """Import a config file FILE.py:VARIANT; return the module and the result of its function `get_config`.

    Criteria, metrics etc. in it are then registered.
    """
    file, (_, mark, variant) = file_of(config), config.partition(".py:")
    loader = importlib.machinery.SourceFileLoader(f"{file.stem}_config", str(file))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = sys.modules[loader.name] = importlib.util.module_from_spec(spec)
    with _importing_beside(config):
        loader.exec_module(module)
        return module, module.get_config(*([variant] if mark else []))


def _loaded(config: str) -> ConfigDict:
    """Return the config in a config file; raise a one-line UserError if the file cannot be loaded."""
    file = file_of(config)
    if os.path.lexists(file):  # a FIFO would be waited for
        open_file(file).close()
    try:
        loaded = load_file(config)[1]
        if not isinstance(loaded, ConfigDict):
            raise TypeError(f"get_config() gives a {type(loaded).__name__}, not what experiment_config() gives")
        return loaded
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever a config file may raise
        lines = str(error).strip().splitlines()
        problem = lines[-1].strip() if lines and isinstance(error, Exception) else repr(error)
        raise UserError(f"--config={config}: cannot be loaded ({problem}); --debug shows more") from error


def _define(command: Any, config: ConfigDict | None = None, argv: Sequence[str] = ()) -> Flags:
    """Define the command's flags and, if a config is passed, one flag per config field that the arguments set."""
    values = Flags()
    if config is not None:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=list(argv))
    flags.DEFINE_bool("debug", False, "show the traceback of an error", flag_values=values)
    for name in _HIDDEN:
        flags.DEFINE_list(name, [], "", flag_values=values)
    if hasattr(command, "define"):  # it has flags of its own
        command.define(values)
    return values


def _setting_of(arg: str) -> str | None:
    """Return the setting `x.y` that an argument `--config.x.y=value` or `--noconfig.x.y` sets, or None."""
    match = _SETTING.match(arg)
    return None if match is None else match[1]


def _check_path(names: Sequence[str], config: Any) -> None:
    at, section = config, "config"
    for part in names:
        if not isinstance(at, Mapping) and not hasattr(at, "keys"):
            raise UserError(f"--{section}.{part}: {section} is a setting, not a section of settings")
        bare = part.split("[")[0]
        if bare not in at:
            raise UserError(f"--{section}.{part}: {section} has no {bare!r}{suggest(bare, list(at.keys()))}")
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


def switch(argv: Sequence[str], name: str) -> bool:
    """Return True if a yes/no flag is set; works even if parsing the other flags has failed."""
    return f"--{name}" in argv or f"--{name}=true" in argv


def _names(values: Flags) -> list[str]:
    return sorted(name for name in values if name not in (*_HIDDEN, "help"))


def help_of(name: str, command: Any) -> str:
    """Return the help text of a command: its docstring and its flags."""
    values = _define(command)
    lines = [inspect.cleandoc(command.__doc__ or ""), "", "flags:"]
    for flag in _names(values):
        shown = f"--{flag}" if values[flag].boolean else f"--{flag}=..."
        lines.append(f"  {shown:<18} {values[flag].help}")
    if "config" in values:
        lines.append(f"  {'--config.x.y=...':<18} value of the setting x.y of the config (None = unset)")
    return "\n".join(lines)
