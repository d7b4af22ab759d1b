"""ssh to a guest whose image has an sshd: a configuration for the host's own `ssh`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pytest_vmsandbox.errors import RequestInvalid, TimedOut
from pytest_vmsandbox.jail.off_loop import run_off_loop
from pytest_vmsandbox.machine.build import Build
from pytest_vmsandbox.machine.commands import Commands
from pytest_vmsandbox.machine.ports import Ports
from pytest_vmsandbox.machine.ssh_files import (
    SshRoute,
    parse_public_keys,
    render_configuration,
    render_known_hosts,
)
from pytest_vmsandbox.machine.ssh_key import worker_key

# What the guest's script answers then.
_NO_SSHD: Final = 3

CONFIGURATION: Final = "ssh_config"
KNOWN_HOSTS: Final = "ssh_known_hosts"

# The public halves of the keys that sshd has, as it says itself.
_HOST_KEYS: Final = """
sshd=$(command -v sshd) || exit 3
"$sshd" -T 2>/dev/null | sed -n 's/^hostkey //p' | while read -r key; do
    cat "$key.pub" 2>/dev/null || ssh-keygen -y -f "$key" </dev/null
done
"""

# A key in place of all others; an sshd that runs reads it once it is told (sshd(8), SIGHUP), and
# then writes its pid anew. Prints where, if there is one.
_NEW_HOST_KEYS: Final = """
sshd=$(command -v sshd) || exit 0
rm -f /etc/ssh/ssh_host_*_key /etc/ssh/ssh_host_*_key.pub
ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key </dev/null || exit
file=$("$sshd" -T 2>/dev/null | sed -n 's/^pidfile //p')
pid=$(cat "$file" 2>/dev/null) || exit 0
rm "$file" && kill -HUP "$pid" && echo "$file"
"""

# Lets $1 in. A file whose last line has no end gets one first.
_LET_IN: Final = """
umask 077
mkdir -p "$HOME/.ssh" && cd "$HOME/.ssh" && touch authorized_keys || exit
grep -qxF "$1" authorized_keys && exit
[ -z "$(tail -c 1 authorized_keys)" ] || echo >>authorized_keys
printf '%s\\n' "$1" >>authorized_keys
"""


class Ssh(Commands, Ports):
    """The verb for whoever wants ssh."""

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        self._ssh_ports: dict[int, int] = {}
        self._arranging_ssh = asyncio.Lock()

    async def ssh_config(
        self,
        *,
        user: str = "root",
        port: int = 22,
        new_host_keys: bool = False,
        timeout: float | None = None,
    ) -> Path:
        """The path of a configuration by which the host's ssh reaches this guest by its name.

        As in `ssh -F vm.ssh_config() NAME`. It lets a key of this worker in as `user`, and knows
        the guest's host keys from the guest itself; with `new_host_keys` that is first given
        another one in place of all it has. The file goes with the machine, and is written anew by
        each call.
        Raises RequestInvalid where the image has no sshd, TimedOut where none listens on `port`
        within `timeout` seconds (30), HostUnfit where the host has no ssh-keygen.
        """
        directory = self.build.config.directory
        async with self._arranging_ssh:
            if new_host_keys:
                await self._make_host_keys()
            host_keys = await self._host_keys()
            await self._require_sshd(port, timeout)
            key = await run_off_loop(lambda: worker_key(directory.parent))
            letting_in = ["sh", "-c", _LET_IN, "sh", key.public]
            await self.run(letting_in, user=user, check=True)
            if port not in self._ssh_ports:
                _, self._ssh_ports[port] = await self.forward(port)
            route = SshRoute(
                name=self.name,
                alias=self.id,
                port=self._ssh_ports[port],
                user=user,
                identity=key.path,
                known_hosts=directory / KNOWN_HOSTS,
            )
            known = render_known_hosts(route.alias, host_keys)
            route.known_hosts.write_text(known, encoding="ascii")
            (directory / CONFIGURATION).write_text(render_configuration(route), encoding="utf-8")
        return directory / CONFIGURATION

    async def _host_keys(self) -> Sequence[str]:
        found = await self.run(_HOST_KEYS)
        if found.returncode == _NO_SSHD:
            raise RequestInvalid(
                f"{self.name} has no sshd: there is none in its image {self.build.image}",
                "an image, or a template, with openssh-server (docs/ssh.md)",
            )
        keys = parse_public_keys(found.stdout)
        if not keys:
            raise RequestInvalid(
                f"the sshd of {self.name} has no host key that can be read: {found.stderr.strip()}",
                "ssh-keygen -A in the guest makes them",
            )
        return keys

    async def _make_host_keys(self) -> None:
        told = await self.run(_NEW_HOST_KEYS, check=True)
        if pid_file := told.stdout.strip():
            await self.wait_until(["test", "-s", pid_file])

    async def _require_sshd(self, port: int, timeout: float | None) -> None:
        try:
            await self.wait_for_port(port, timeout=timeout)
        except TimedOut as error:
            raise TimedOut(
                f"{self.name}: an sshd that listens on port {port}",
                error.after_s,
                "nobody listens there: ssh_config starts none, the image, or the test, does",
            ) from None
