"""The face to pytest. Every pytest run loads it: no room below is imported until it is needed."""

from __future__ import annotations

from pytest_vmsandbox.plugin.fixtures import (
    async_vm,
    async_vm_factory,
    vm,
    vm_factory,
    vm_host,
    vm_image,
    vm_jail,
    vm_module,
    vm_network,
    vm_session,
    vm_templates,
)
from pytest_vmsandbox.plugin.hooks import (
    pytest_addoption,
    pytest_configure,
    pytest_generate_tests,
    pytest_make_collect_report,
    pytest_report_collectionfinish,
    pytest_runtest_call,
    pytest_runtest_makereport,
    pytest_runtest_protocol,
    pytest_runtest_setup,
    pytest_runtest_teardown,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

__all__ = [
    "async_vm",
    "async_vm_factory",
    "pytest_addoption",
    "pytest_configure",
    "pytest_generate_tests",
    "pytest_make_collect_report",
    "pytest_report_collectionfinish",
    "pytest_runtest_call",
    "pytest_runtest_makereport",
    "pytest_runtest_protocol",
    "pytest_runtest_setup",
    "pytest_runtest_teardown",
    "pytest_sessionfinish",
    "pytest_terminal_summary",
    "pytest_testnodedown",
    "vm",
    "vm_factory",
    "vm_host",
    "vm_image",
    "vm_jail",
    "vm_module",
    "vm_network",
    "vm_session",
    "vm_templates",
]
