"""Workdirs that several reports are made of."""

import pytest
from report_cases import write_several, write_workdir

from vlmprune_jax.run.report.build import build_report


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run with its report, which is only read."""
    folder = tmp_path_factory.mktemp("finished")
    write_workdir(folder)
    build_report(folder)
    return folder


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
