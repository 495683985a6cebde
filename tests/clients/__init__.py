"""Tests with other people's packages around Keras: the clients extra, `make test-clients`."""

import pytest


def client(name):
    """A module of the clients extra; the test file is skipped where it is not installed."""
    return pytest.importorskip(name, reason=f"{name} is not installed: pip install .[clients]")
