"""Progress of a long step, shown on the terminal while tests are captured."""

from __future__ import annotations

import pytest


class TerminalProgress:
    """Writes a line for each step; silent where there is no terminal (xdist's workers)."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def step(self, title: str) -> None:
        """A new step begins."""
        manager = self._config.pluginmanager
        terminal = manager.get_plugin("terminalreporter")
        capture = manager.get_plugin("capturemanager")
        if terminal is None or capture is None:
            return
        with capture.global_and_fixture_disabled():
            terminal.ensure_newline()
            terminal.write_line(f"vmsandbox: {title}")
