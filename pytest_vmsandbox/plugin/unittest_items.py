"""Outcomes of unittest's tests: their exceptions reach pytest by a way of their own."""

from __future__ import annotations

import pytest
from _pytest.unittest import TestCaseFunction

from pytest_vmsandbox.plugin.expectations import forgiving_expected_ends
from pytest_vmsandbox.plugin.skips import skipping_what_is_unfit


class TestCaseOutcomes:
    """Treats what a TestCase's method raised as what a function's body raises is treated.

    A plugin of its own, because one module has one implementation of a hook: this one runs
    after pytest has put the method's exception into `call`, and before the report is made.
    """

    __test__ = False

    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> None:
        """Make a skip of an unfit host, and nothing of an end that was announced."""
        if call.when != "call" or call.excinfo is None or not isinstance(item, TestCaseFunction):
            return
        raised, call.excinfo = call.excinfo, None
        try:
            with skipping_what_is_unfit(item), forgiving_expected_ends(item):
                raise raised.value
        except pytest.skip.Exception:
            call.excinfo = pytest.ExceptionInfo.from_current()
        except BaseException:  # noqa: BLE001  # whatever it is, it goes back to where it was
            call.excinfo = raised
