"""What holds of every reader: nothing of it reaches the terminal, not even from a library in C or Rust."""

import pytest


@pytest.fixture(autouse=True)
def silent(capfd):
    """Fail a test during which anything was written to standard output or error."""
    yield
    assert capfd.readouterr() == ("", "")
