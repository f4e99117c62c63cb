"""Workdirs that several reports are made of."""

import pytest
from markupsafe import Markup
from report_cases import write_several, write_workdir

from vlmprune_jax.run.report import figures


@pytest.fixture(autouse=True)
def _undrawn(request, monkeypatch):
    """Figures are made but not drawn, which is most of a page's time, except for a test that asks for `drawn`."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(figures, "figure_of", lambda _, *texts: figures.Figure(Markup("<svg></svg>"), *texts))


@pytest.fixture
def drawn():
    """For a test of what figures look like, or of names in them."""


@pytest.fixture
def workdir(tmp_path):
    """A finished run."""
    write_workdir(tmp_path)
    return tmp_path


@pytest.fixture
def several(workdir):
    """Several evaluation sets, with metrics that nothing here has ever heard of."""
    write_several(workdir)
    return workdir
