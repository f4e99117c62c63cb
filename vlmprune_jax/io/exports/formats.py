"""Export formats by name, and the choice of one by its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune_jax.base.checks import Registry, one_of, suggest
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import check_settings, settings_of
from vlmprune_jax.io.exports.format import Format
from vlmprune_jax.io.exports.gguf import GGUF
from vlmprune_jax.io.exports.huggingface import HUGGINGFACE

# A user's file adds its own by assignment: FORMATS["mine"] = Format(...).
FORMATS = Registry("formats", Format, {"huggingface": HUGGINGFACE, "gguf": GGUF})


def quantizations() -> tuple[str, ...]:
    """Return the names of the quantisations that all export formats offer."""
    return tuple(dict.fromkeys(name for chosen in FORMATS.values() for name in chosen.quantizations))


def choose_format(name: str, values: Mapping[str, Any]) -> tuple[Format, Any]:
    """Return an export format and its options: values passed by name, otherwise defaults.

    Options of other formats are accepted if they have their default values, because configs contain the options of all
    formats.

    Raises UserError for an unknown format or option, or a value that the format does not support.
    """
    chosen = FORMATS[one_of("format", name, tuple(FORMATS))]
    quantize = one_of("quantize", values.get("quantize", "none"), quantizations())
    if quantize not in ("none", *chosen.quantizations):
        supported = ", ".join(chosen.quantizations)
        raise UserError(f"quantize {quantize!r} is not supported by format {name!r} (supported: {supported})")
    option_settings = settings_of(chosen.options)
    for option, value in values.items():
        if option not in option_settings:
            _check_foreign(option, value, name, tuple(option_settings))
    options = chosen.options(**{option: value for option, value in values.items() if option in option_settings})
    check_settings("export", options, elsewhere=True)
    return chosen, options


def _check_foreign(option: str, value: Any, name: str, option_names: tuple[str, ...]) -> None:
    """Raise UserError if an option that only other export formats have is set."""
    others = {other: settings_of(f.options) for other, f in FORMATS.items()}
    homes = {other: settings[option].default for other, settings in others.items() if option in settings}
    if not homes:
        raise UserError(f"format {name!r} has no option {option!r}{suggest(option, option_names)}")
    if value not in homes.values():
        raise UserError(
            f"{option}={value!r} is an option of format {' or '.join(map(repr, homes))}, not of {name!r}: leave it "
            "out, or choose another format"
        )
