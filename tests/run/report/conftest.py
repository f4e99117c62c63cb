"""Workdirs that several reports are made of."""

import pytest
from report_cases import write_several, write_workdir


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
