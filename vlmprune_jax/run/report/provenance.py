"""The report's section about provenance: machine, command, versions, settings and data of every stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vlmprune_jax.base.errors import printable
from vlmprune_jax.run.report.page import Section, Table
from vlmprune_jax.run.workdir.ledger import StageRecord

_MOST_NAMED, _LONGEST = 8, 300  # maximum stages named for a value, and characters of a value


def provenance_section(records: Mapping[str, StageRecord]) -> Section:
    """Return a report section with command, machine and package versions of all stages."""
    rows, settings, inputs = (
        list[tuple[str, ...]](),
        dict[str, dict[str, list[str]]](),
        dict[str, dict[str, list[str]]](),
    )
    environments = dict[str, dict[str, list[str]]]()
    for name, record in records.items():
        by = record.by
        rows.append((printable(name), f"{record.seconds:.1f}", by.finished, printable(by.processor)))
        for setting, value in record.made_from.settings.items():
            settings.setdefault(setting, {}).setdefault(_short(value), []).append(name)
        for path, digest in record.made_from.inputs.items():
            inputs.setdefault(path, {}).setdefault(digest, []).append(name)
        environment = {"command": by.command, "versions": ", ".join(f"{k} {v}" for k, v in by.versions.items())}
        environment["commit"] = by.commit or "not known: the package is not run from its repository"
        for what, value in environment.items():
            environments.setdefault(what, {}).setdefault(value, []).append(name)
    facts = [("Made by", environments), ("Settings", settings), ("Data and models, by content", inputs)]
    return Section(
        "Where it comes from",
        tables=(Table("Stages", ("stage", "seconds", "finished", "processor"), tuple(rows)),) if rows else (),
        facts=tuple((title, _as_facts(values)) for title, values in facts if values),
    )


def _as_facts(facts: Mapping[str, Mapping[str, list[str]]]) -> tuple[tuple[str, str], ...]:
    """Return (name, value) pairs; values that differ between stages name their stages."""
    return tuple(
        (printable(name), " | ".join(v if len(values) == 1 else f"{v} ({_named(mine)})" for v, mine in values.items()))
        for name, values in sorted(facts.items())
    )


def _named(stages: list[str]) -> str:
    return printable(", ".join(stages[:_MOST_NAMED])) + (", ..." if len(stages) > _MOST_NAMED else "")


def _short(value: Any) -> str:
    text = printable(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
