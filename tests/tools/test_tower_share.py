"""Share of the vision tower: gains by hand, and the table of the study."""

import importlib
import sys

import pytest
from repository import ROOT


@pytest.fixture
def tower_share(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("tower_share")
    for name in ("tower_share", "models", "plan"):
        sys.modules.pop(name, None)


def test_the_study_has_the_table_that_the_script_prints(tower_share, capsys):
    tower_share.main()
    table = capsys.readouterr().out
    assert table in (ROOT / "docs/explanation/study.md").read_text(encoding="utf-8")
    assert "|LLaVA-1.5-7B|655|4|1.40|1.01|" in table


def test_gains_by_hand(tower_share):
    assert tower_share.gain(1.0, 0.5) == 2.0
    assert tower_share.gain(0.0) == 1.0
    assert tower_share.gain(0.5, 0.4) == pytest.approx(1 / 0.8)
