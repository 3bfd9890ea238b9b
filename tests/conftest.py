"""Tests run as on a machine that was never calibrated: its user's own target is neither read nor replaced.

What is marked `models` needs real models and data, in the folder that EFFC_DATA names, and is skipped without it.
"""

import os
import tempfile
from collections.abc import Iterator

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "EFFC_DATA" in os.environ:
        return
    absent = pytest.mark.skip(reason="EFFC_DATA is not set to the folder of models and data")
    for item in items:
        if item.get_closest_marker("models"):
            item.add_marker(absent)


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
