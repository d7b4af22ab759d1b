"""testinfra's modules where the guest's programs are busybox's, which lack options they use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from testinfra.modules.file import GNUFile
from testinfra.modules.package import Package, RpmPackage
from testinfra.modules.process import BusyboxProcess

# A process in proc_pid_stat(5): its pid, its name, and the fields behind that, from the third.
_STAT: Final = re.compile(rb"(\d+) \(.*\) (.*)")
_START: Final = 22 - 3


class SmallFile(GNUFile):  # type: ignore[misc]  # it has no types
    """A file, where `ls` has no `-q`."""

    @classmethod
    def get_module_class(cls, host: Any) -> Any:  # noqa: ANN401, ARG003  # testinfra's own
        """It, always: testinfra would choose by what the system says."""
        return cls

    def listdir(self) -> list[str]:
        """What is in the directory."""
        out = self.run_test("ls -1 -- %s", self.path)
        if out.rc != 0:
            raise RuntimeError(f"Unexpected output {out}")
        return str(out.stdout).splitlines()


class SmallProcess(BusyboxProcess):  # type: ignore[misc]  # it has no types
    """Processes, where `ps` has no `time`: what tells a process from a later one is its start."""

    @classmethod
    def get_module_class(cls, host: Any) -> Any:  # noqa: ANN401, ARG003  # testinfra's own
        """It, always: testinfra would choose by what the system says."""
        return cls

    def _get_processes(self, **filters: object) -> list[dict[str, Any]]:
        names = [*sorted({"pid", "comm", *filters} - {"args", "lstart"}), "args"]
        seen = self.check_output("ps -A -o %s", ",".join(names)).splitlines()[1:]
        starts = self._starts()
        found = []
        for line in seen:
            values = line.split(None, len(names) - 1)
            process: dict[str, Any] = dict(zip(names, map(_number, values), strict=False))
            process.setdefault("args", "")
            process["lstart"] = starts.get(process["pid"], "")
            found.append(process)
        return found

    def _get_process_attribute_by_pid(self, pid: int, name: str) -> dict[str, Any]:
        for process in self._get_processes(**{name: None}):
            if process["pid"] == pid:
                return process
        raise RuntimeError(f"Process with pid {pid} does not exist any more")

    def _starts(self) -> dict[int, str]:
        """When each process began, in ticks since the boot."""
        # One that ends meanwhile can't be read.
        lines = self.run("cat /proc/[0-9]*/stat").stdout_bytes.splitlines()
        found = (_STAT.fullmatch(line) for line in lines)
        return {int(match[1]): match[2].split()[_START].decode() for match in found if match}


class SmallPackage(Package):  # type: ignore[misc]  # it has no types
    """Packages, where `rpm` may be busybox's, which knows of none that are installed."""

    @classmethod
    def get_module_class(cls, host: Any) -> Any:  # noqa: ANN401  # testinfra's own
        """The class for the guest's package manager; NotImplementedError without one."""
        found = Package.get_module_class(host)
        if found is RpmPackage and host.run("rpm --version").rc != 0:
            raise NotImplementedError("the guest has no package manager that testinfra knows")
        return found


def _number(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


MODULES: Final[Mapping[str, Any]] = {
    "file": SmallFile,
    "process": SmallProcess,
    "package": SmallPackage,
}
