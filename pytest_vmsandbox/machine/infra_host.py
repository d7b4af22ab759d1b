"""A machine as pytest-testinfra sees it: a `Host` whose commands go over the agent's line.

Needs the extra `testinfra`, so nothing but `Face.testinfra` imports this, and only when asked.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Final

from testinfra.backend.base import BaseBackend, CommandResult
from testinfra.host import Host

from pytest_vmsandbox.machine.caller import Caller
from pytest_vmsandbox.machine.infra_busybox import MODULES

# What a shell says of a command that signal N ended, and so ssh and docker too: 128 + N.
_SIGNALLED = 128

# The line's own encoding, whatever the locales of host and guest.
_ENCODING = "utf-8"

# As user $1, the line $2. Without a sudo in the guest, su does it: we are root, it asks nothing.
_AS_USER: Final = (
    'if command -v sudo >/dev/null; then exec sudo -u "$1" /bin/sh -c "$2"; fi; '
    'exec su -s /bin/sh -c "$2" "$1"'
)


class VmsandboxBackend(BaseBackend):
    """What testinfra's modules run their commands with: /bin/sh in the guest, as root."""

    NAME = "vmsandbox"

    def __init__(self, caller: Caller) -> None:
        super().__init__(caller.controller.name)
        self._caller = caller

    def run(
        self, command: str, *args: str, timeout: float | None = None, **_: Any
    ) -> CommandResult:
        """Run a line of shell to its end, each `%s` in it being one of `args`, quoted.

        Raises as `MachineController.run` does: TimedOut after `timeout` seconds (120), the
        machine's failure where it has one.
        """
        line = self.get_command(command, *args)
        running = self._caller.controller.run(
            ["/bin/sh", "-c", line], timeout=timeout, encoding=None
        )
        done = self._caller.run(running)
        status = done.returncode if done.returncode >= 0 else _SIGNALLED - done.returncode
        return self.result(status, self.encode(line), done.stdout, done.stderr)

    def get_sudo_command(self, command: str, sudo_user: str | None) -> str:
        """That line of shell as another user: root, unless one is named."""
        return self.quote("/bin/sh -c %s sh %s %s", _AS_USER, sudo_user or "root", command)

    def get_encoding(self) -> str:
        """UTF-8; what is not, is to be had from `stdout_bytes`."""
        return _ENCODING


class GuestHost(Host):  # type: ignore[misc]  # tools that read no py.typed see no types there
    """testinfra's `Host`, which does without what busybox lacks."""

    @cached_property
    def is_busybox(self) -> bool:
        """Whether the guest's usual programs are busybox's."""
        return bool(self.run("ls --help 2>&1 | grep -q BusyBox").rc == 0)

    # Any, as the modules are called: by testinfra's own annotations they can't be.
    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        if name in MODULES and self.is_busybox:
            module = MODULES[name].get_module(self)
            setattr(self, name, module)
            return module
        return super().__getattr__(name)


def make_host(caller: Caller) -> GuestHost:
    """A testinfra `Host` of the machine."""
    backend = VmsandboxBackend(caller)
    host = GuestHost(backend)
    backend.set_host(host)
    return host
