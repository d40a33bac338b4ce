"""How the tests run; their fixtures are in `support.fixtures`."""

import gc
import os
from typing import Any

import pytest

# Tiny models gain nothing from a second thread, and wait for it on a busy machine; servers and
# commands that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.disable()  # until all tests are collected: they import PyTorch and transformers


def pytest_configure(config: pytest.Config) -> None:
    """Import the fixtures, and with them PyTorch, except where other processes run the tests."""
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        config.pluginmanager.import_plugin("support.fixtures")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Divide the tests among processes by `support.scheduling.group`."""
    from support.scheduling import Groups

    return Groups(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes share the tests, put them into the order that takes least time."""
    if hasattr(config, "workerinput"):
        from support.scheduling import in_order

        items[:] = in_order(items)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking at PyTorch and transformers again and again.

    An export makes very many objects: collecting took half of the time of the tests that build.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    gc.enable()
