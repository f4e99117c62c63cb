"""Checks of names and numbers given by a user, with a suggestion for a misspelled name."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import os
import sysconfig
import traceback
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vlmprune_jax.base.errors import UserError, reason

_T = TypeVar("_T")
_PACKAGE = Path(__file__).parents[1]
_READERS = {"Model": "vp.load(DIR)", "PrunePlan": "vp.PrunePlan.from_json(FILE)", "Scores": "vp.Scores.load(FILE)"}
_RENAMED = {"snap_for": "align_to", "by_kind": "by_token_type"}  # names of settings in version 0.1
_LIBRARIES = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}


class Registry(dict[str, _T]):
    """Mapping {name: object of one class}; users add their own object with `vp.NAME["mine"] = ...`."""

    def __init__(self, name: str, kind: type = object, known: Mapping[str, _T] = types.MappingProxyType({})):
        super().__init__(known)
        self._name, self._kind = name, kind

    def fill(self, kind: type[_T], known: Mapping[str, _T]) -> None:
        """Set the class and the built-in objects of a registry that settings declare by its name alone."""
        self._kind = kind
        self.update(known)

    def __setitem__(self, key: str, value: _T) -> None:
        if not isinstance(key, str) or not isinstance(value, self._kind):
            raise UserError(f"vp.{self._name}[{key!r}]: must be a vp.{self._kind.__name__}, got {value!r}")
        super().__setitem__(key, value)


class ModuleRegistry(dict[type, _T]):
    """Mapping {config class: class of its NNX module}; users add their own with `vp.NAME[Mine] = MyModule`.

    Args:
      name: name of the mapping in the public API.
      config, module: base class of the keys, and of the values.
    """

    def __init__(self, name: str, config: type, module: type, known: Mapping[Any, _T]):
        super().__init__(known)
        self._name, self._config, self._module = name, config, module

    def __setitem__(self, key: type, value: _T) -> None:
        for role, given, base in (("key", key, self._config), ("value", value, self._module)):
            if not isinstance(given, type) or not issubclass(given, base):
                raise UserError(
                    f"vp.{self._name}: the {role} must be a subclass of {_public(base)}, got {given!r}: assign "
                    f"vp.{self._name}[Mine] = MyModule"
                )
        super().__setitem__(key, value)

    def __missing__(self, key: type) -> _T:
        raise UserError(
            f"vp.{self._name} has no module for {key.__name__}: assign vp.{self._name}[{key.__name__}] = ..."
        )


def _public(kind: type) -> str:
    package, _, _ = kind.__module__.partition(".")
    return f"{'vp' if package == _PACKAGE.name else package}.{kind.__name__}"


def one_of(kind: str, value: Any, known: Collection[str]) -> str:
    """Return `value` if it is a known name; raise a UserError that suggests the most similar name otherwise."""
    if value in known:
        return value
    raise UserError(f"{kind} {value!r} is not one of {', '.join(known)}{_near(str(value), known)}")


def _near(name: str, known: Iterable[str]) -> str:
    names = list(known)
    if _RENAMED.get(name) in names:
        return f": it is now {_RENAMED[name]!r}"
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def with_defaults(what: str, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dictionary `defaults` updated with `options`; raise a UserError for a name that `defaults` lacks."""
    for name in options:
        if name not in defaults:
            options_text = ", ".join(defaults) or "none"
            raise UserError(f"{what} has no option {name!r} (options: {options_text}){_near(name, defaults)}")
    return {**defaults, **options}


def layer_range(name: str, value: Sequence[int], n_layers: int) -> range:
    """Return the original layer numbers in the half-open range (start, stop), where () means all layers."""
    if not value:
        return range(n_layers)
    if len(value) != 2:
        raise UserError(f"{name}={value!r} must be a half-open pair (start, stop), or () for all layers")
    start, stop = value
    if not 0 <= start <= stop <= n_layers:
        raise UserError(f"{name}={value!r} must lie within the {n_layers} layers: 0 <= start <= stop <= {n_layers}")
    return range(start, stop)


def fraction(name: str, value: Any) -> float:
    """Return `value` as a float; raise UserError unless 0 <= value < 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise UserError(f"{name}={value!r} must be at least 0 and below 1 (0.3 is 30 %)")
    return float(value)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the most similar known name, or a list of all known names if none is similar."""
    names = list(known)
    return _near(name, names) or f" (known: {', '.join(names)})"


def file_of_users(function: Any) -> Path | None:
    """Return the path of the source file that defines a user's function; None for functions of vlmprune."""
    code = getattr(function, "__code__", None)
    path = Path("" if code is None else code.co_filename)
    return path if path.is_file() and _PACKAGE not in path.parents else None


def check_returned(function: Any, value: Any, fits: bool, expected: str) -> None:
    """Raise UserError naming a user's file and function unless the value that it returned `fits`."""
    if not fits:
        file, name = file_of_users(function), getattr(function, "__qualname__", repr(function))
        shown = f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else reason(TypeError(repr(value)))
        raise UserError(
            f"{'' if file is None else f'{file}: '}{name} returned {shown}, expected {expected}: correct it"
        )


@contextlib.contextmanager
def blaming(what: str, *functions: Any) -> Iterator[None]:
    """Context that converts exceptions and wrong return values of a user's function to a UserError naming the function.

    Errors in vlmprune's own functions are raised unchanged. Raises a UserError with the user's file and line.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        modules = (getattr(getattr(function, "func", function), "__module__", None) for function in functions)
        if all((module or "").split(".")[0] == _PACKAGE.name for module in modules):
            raise
        line = line_of_users(error)
        raise UserError(
            f"{what} failed{f' at {line}' if line else ''} with {type(error).__name__}: {reason(error)}: correct it "
            "(--debug shows more)"
        ) from error


def line_of_users(error: BaseException, ours: Collection[Path] = ()) -> str:
    """Return "FILE:LINE" of the innermost traceback frame in the user's own code; "" if there is none.

    `ours`: folders, beside this package and installed libraries, whose files are not the user's.
    """
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path, known = Path(frame.filename), {_PACKAGE, *_LIBRARIES, *ours}
        if path.is_file() and not known & {*path.parents} and "site-packages" not in path.parts:
            return f"{path}:{frame.lineno}"
    return ""


def checked_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a public function: an argument that does not fit its annotation raises a UserError that says what to do.

    Numbers, arrays and protocols are not checked. `batches` must be a collection of batches, not a single batch. The
    signature lists the settings in `**options` by name.
    """
    signature, hints = inspect.signature(function), typing.get_type_hints(function)
    usage = [name for name, param in signature.parameters.items() if param.kind is param.POSITIONAL_OR_KEYWORD]
    kinds = {name: kinds for name, hint in hints.items() if name != "return" and (kinds := _kinds(hint))}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name, value in {**dict(zip(usage, args, strict=False)), **kwargs}.items():
            if name in kinds:
                _check_argument(function.__name__, usage, name, value, kinds[name])
        return function(*args, **kwargs)

    call.__module__ = _PACKAGE.name  # where pickle finds it
    call.__signature__ = _with_settings(function)  # type: ignore[attr-defined]
    return call


def _kinds(hint: Any) -> tuple[type, ...]:
    """Return the classes that a type hint allows; () if arguments of this type are not checked (numbers, arrays)."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [typing.get_origin(option) or option for option in options]
    unchecked = {Any, int, float, bool}
    if any(kind in unchecked or getattr(kind, "_is_protocol", kind.__module__ == "numpy") for kind in kinds):
        return ()
    more = {Path: os.PathLike, tuple: list}
    return (*kinds, *(more[kind] for kind in kinds if kind in more))


def _check_argument(function: str, usage: Sequence[str], name: str, value: Any, kinds: tuple[type, ...]) -> None:
    """Raise UserError unless an argument of a public function is of one of these classes."""
    single = isinstance(value, str) or (name == "batches" and (isinstance(value, Mapping) or hasattr(value, "arrays")))
    if isinstance(value, kinds) and not (single and str not in kinds):
        return
    names = [kind.__name__ for kind in kinds if kind not in (types.NoneType, os.PathLike, list)]
    if names == ["Iterable"]:
        todo = "pass a list, such as [batch]"
    elif name == "config":
        todo = f"pass vp.{names[0]}(...)"
    elif isinstance(value, str | os.PathLike) and names[0] in _READERS:
        todo = f"pass {_READERS[names[0]]}"
    else:
        todo = f"call vp.{function}({', '.join([*usage, *([] if name in usage else [f'{name}=...'])])})"
    raise UserError(f"vp.{function}: {name} must be of type {' or '.join(names)}, got {type(value).__name__}: {todo}")


def _with_settings(function: Callable[..., Any]) -> inspect.Signature:
    """Return a signature with keywords for `**options: Unpack[TypedDict]` or `Annotated[Any, dataclass]`."""
    signature, hints = inspect.signature(function), typing.get_type_hints(function, include_extras=True)
    *others, last = signature.parameters.values()
    if typing.get_origin(hints.get(last.name)) not in (typing.Unpack, typing.Annotated):
        return signature
    settings = typing.get_type_hints(typing.get_args(hints[last.name])[-1]).items()
    keywords = [inspect.Parameter(name, last.KEYWORD_ONLY, default=..., annotation=hint) for name, hint in settings]
    return signature.replace(parameters=[*others, *keywords])
