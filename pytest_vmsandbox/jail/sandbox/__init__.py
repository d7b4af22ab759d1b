"""A command of the host behind walls: `run_sandbox` and what belongs to it."""

from pytest_vmsandbox.jail.sandbox.calls import run_sandbox, run_sandbox_with_redirection
from pytest_vmsandbox.jail.sandbox.capabilities import (
    CAPABILITIES,
    SandboxDegraded,
    degrade_config_for_capabilities,
)
from pytest_vmsandbox.jail.sandbox.config import CAPTURE, DISCARD, STDOUT

__all__ = [
    "CAPABILITIES",
    "CAPTURE",
    "DISCARD",
    "STDOUT",
    "SandboxDegraded",
    "degrade_config_for_capabilities",
    "run_sandbox",
    "run_sandbox_with_redirection",
]
