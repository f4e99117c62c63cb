"""By what a stage was made: versions, commit, processor, command and time, noted with it in the ledger."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from vlmprune_jax.distributed.processor import processor
from vlmprune_jax.errors import printable
from vlmprune_jax.report.page import Section, Table

_PACKAGES = ("vlmprune-jax", "jax", "flax", "optax", "transformers", "numpy")
_MOST_NAMED, _LONGEST = 8, 300  # stages of a value, letters of one
_SOURCE = Path(__file__).parents[2]


class MadeBy(TypedDict):
    """`versions`: of packages, and of Python. `commit`: of the source, with "-dirty" where it was changed; or null."""

    finished: str
    command: str
    processor: str
    versions: dict[str, str]
    commit: str | None


def made_by() -> MadeBy:
    """This process, now."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    command = printable(shlex.join(["vlmprune", *sys.argv[1:]]))
    return {
        "finished": now, "command": command, "processor": processor(), "versions": _versions(), "commit": _commit()
    }  # fmt: skip


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a folder that is not installed
            continue
    return found


@functools.cache
def _commit() -> str | None:
    """Of the repository that this package lies in, if it lies in one."""
    if not (_SOURCE / ".git").exists():
        return None
    command = ["git", "-C", str(_SOURCE), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def provenance_section(records: Mapping[str, Mapping[str, Any]]) -> Section:
    """What made a workdir's stages and from what, by their records in the ledger."""
    rows, settings, inputs = (
        list[tuple[str, ...]](),
        dict[str, dict[str, list[str]]](),
        dict[str, dict[str, list[str]]](),
    )
    made = dict[str, dict[str, list[str]]]()
    for name, record in records.items():
        by = record.get("by")
        when, where = (by["finished"], by["processor"]) if by else ("", "")
        rows.append((printable(name), f"{record['seconds']:.1f}", when, where))
        for setting, value in record["made_from"]["settings"].items():
            settings.setdefault(setting, {}).setdefault(_short(value), []).append(name)
        for path, digest in record["made_from"]["inputs"].items():
            inputs.setdefault(path, {}).setdefault(digest, []).append(name)
        if by:
            told = {"command": by["command"], "versions": ", ".join(f"{k} {v}" for k, v in by["versions"].items())}
            told["commit"] = by["commit"] or "not known: the package is not run from its repository"
            for what, value in told.items():
                made.setdefault(what, {}).setdefault(value, []).append(name)
    facts = [("Made by", made), ("Settings", settings), ("Data and models, by content", inputs)]
    return Section(
        "Where it comes from",
        tables=(Table("Stages", ("stage", "seconds", "finished (UTC)", "processor"), tuple(rows)),) if rows else (),
        facts=tuple((title, _as_facts(of)) for title, of in facts if of),
    )


def _as_facts(of: Mapping[str, Mapping[str, list[str]]]) -> tuple[tuple[str, str], ...]:
    """What all stages share as it is, else each value with the stages that it is of."""
    return tuple(
        (printable(name), " | ".join(v if len(values) == 1 else f"{v} ({_named(mine)})" for v, mine in values.items()))
        for name, values in sorted(of.items())
    )


def _named(stages: list[str]) -> str:
    return printable(", ".join(stages[:_MOST_NAMED])) + (", ..." if len(stages) > _MOST_NAMED else "")


def _short(value: Any) -> str:
    text = printable(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
