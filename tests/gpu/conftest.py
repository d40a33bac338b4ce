"""Tests on a GPU: what failed is printed at once, because their time may end before a summary."""

import pytest


class _Failures:
    """Prints each failure's message when it happens, also of tests in other processes."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Print the message of a failed test."""
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        crash = getattr(report.longrepr, "reprcrash", None)
        if report.failed and terminal is not None and crash is not None:
            terminal.ensure_newline()
            terminal.write_line(f"{report.nodeid}: {crash.message[:1000]}")


def pytest_configure(config: pytest.Config) -> None:
    """Have failures printed by the process that reports, which is not a worker of xdist."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Failures(config), "failures of the GPU")
