"""Puts the guest's agent, built for the architecture of this host, into a wheel."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_PLACE = "pytest_vmsandbox/guest"


class AgentBuildHook(BuildHookInterface[Any]):
    """Compiles the agent; an editable install builds it on demand instead."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Part of hatchling's interface."""
        if self.target_name != "wheel" or version == "editable":
            return
        toolchain = self._load_toolchain()
        architecture = toolchain.host_architecture()
        command = toolchain.find_compiler(architecture=architecture)
        if command is None:
            message = f"no C compiler for {architecture}: pip install ziglang"
            raise RuntimeError(message)
        self._scratch = tempfile.TemporaryDirectory(prefix="vmsandbox-agent-")
        made = Path(self._scratch.name) / f"agent-{architecture}"
        toolchain.compile_agent(made, command=command)
        build_data["force_include"][str(made)] = f"{_PLACE}/bin/{made.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002 - given by hatchling
        """Part of hatchling's interface."""
        if hasattr(self, "_scratch"):
            self._scratch.cleanup()

    def _load_toolchain(self) -> ModuleType:
        # By path: importing the package would need its dependencies, which a build has not.
        path = Path(self.root) / _PLACE / "toolchain.py"
        spec = importlib.util.spec_from_file_location("agent_toolchain", path)
        if spec is None or spec.loader is None:
            raise ImportError(str(path))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
