"""Values from configs and command lines in place of a dataclass's own, checked against its types."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from vlmprune_jax.core.checks import settings_of, suggest
from vlmprune_jax.core.errors import UserError


def hints_of(spec: Any) -> dict[str, Any]:
    """Name -> type of everything that a config has in place of this dataclass."""
    kept_back = {name for name, about in settings_of(spec).items() if not about.offered}
    hints = typing.get_type_hints(spec if isinstance(spec, type) else type(spec))
    return {name: hint for name, hint in hints.items() if name not in kept_back}


def override(spec: Any, values: Mapping[str, Any], where: str = "config") -> Any:
    """`spec` (a dataclass of settings) with a nested mapping of values in place of its own.

    Raises:
      UserError: a name that does not exist, with the nearest that does, or a value of the wrong kind.
    """
    hints = hints_of(spec)
    changes = {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{where} has no {name!r}{suggest(name, hints)}")
        current = getattr(spec, name)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, Mapping):
                raise UserError(f"{where}.{name} is a section, it cannot be {value!r}")
            changes[name] = override(current, value, f"{where}.{name}")
        else:
            changes[name] = _checked(value, hints[name], f"{where}.{name}")
    return dataclasses.replace(spec, **changes)


def _named(value: Any, section: Any, where: str) -> Any:
    """A section of those that a mapping has by names of the user's."""
    if isinstance(value, section):
        return value
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is a section, it cannot be {value!r}")
    return override(section(), value, where)


def _checked(value: Any, kind: Any, where: str) -> Any:
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    for option in options:
        plain = typing.get_origin(option) or option
        if option is Any:
            return value
        if plain is tuple and isinstance(value, (tuple, list)):
            first, *rest = typing.get_args(option)
            kinds = [first] * len(value) if rest[-1:] == [...] else [first, *rest]
            if len(kinds) == len(value):
                items = enumerate(zip(value, kinds, strict=True))
                return tuple(_checked(item, inner, f"{where}[{i}]") for i, (item, inner) in items)
        if plain is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            # what no float holds is infinite, which bounds refuse
            return float(value) if isinstance(value, float) or abs(value) < 2**1023 else math.inf
        if plain is Mapping and isinstance(value, Mapping):
            inner = typing.get_args(option)[1]
            check = _named if dataclasses.is_dataclass(inner) else _checked
            return {key: check(item, inner, f"{where}.{key}") for key, item in value.items()}
        if isinstance(plain, type) and isinstance(value, plain) and (plain is bool or not isinstance(value, bool)):
            return value
    names = " or ".join("nothing" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    raise UserError(f"{where} is {value!r}, expected {names}")
