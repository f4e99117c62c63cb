"""What holds of every reader: nothing of it reaches the terminal, not even from a library in C or Rust."""

import logging

import pytest


@pytest.fixture(autouse=True)
def silent(capfd):
    """Fail a test during which anything was written to standard output or error.

    But for Python's logs, which the command line collects: the handlers of libraries hold streams of other tests.
    """
    logging.disable()
    yield
    logging.disable(logging.NOTSET)
    assert capfd.readouterr() == ("", "")
