"""Tests run as on a machine that was never calibrated: its user's own target is neither read nor replaced."""

import tempfile

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Before tests are collected, and for the processes that they start as well."""
    folder = tempfile.TemporaryDirectory(prefix="effc-tests-")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", folder.name)
    # Test processes run side by side: threads of PyTorch that wait for each other by spinning take minutes.
    patch.setenv("OMP_NUM_THREADS", "1")
    config.add_cleanup(folder.cleanup)
    config.add_cleanup(patch.undo)
