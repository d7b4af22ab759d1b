"""Files and trees of the guest."""

from __future__ import annotations

from pathlib import Path

from pytest_vmsandbox.machine.core import MachineCore

# What a transfer may take unless its caller says otherwise, in seconds, before scaling.
TRANSFER_S = 300.0


class Files(MachineCore):
    """The verbs that carry files in and out."""

    async def push(self, source: Path | str, target: str, *, timeout: float | None = None) -> None:
        """Copy a file or a tree of the host into the guest, as `target`; modes are kept.

        Raises OSError as the guest or the host reported it (FileNotFoundError, ENOSPC, ...);
        no half-written file is left under a final name.
        """
        deadline = self._deadline(timeout, TRANSFER_S)
        channel = await self._channel(deadline)
        async with self._in_time(deadline, f"push of {source} to {target}"):
            await channel.push(Path(source), target)

    async def pull(self, source: str, target: Path | str, *, timeout: float | None = None) -> None:
        """Copy a file or a tree of the guest to the host, as `target`; modes are kept.

        Names and links from the guest never lead outside `target`.
        """
        deadline = self._deadline(timeout, TRANSFER_S)
        channel = await self._channel(deadline)
        async with self._in_time(deadline, f"pull of {source} to {target}"):
            await channel.pull(source, Path(target))

    async def read_bytes(self, path: str) -> bytes:
        """The content of a file in the guest; OSError as in `open`."""
        deadline = self._deadline(None, TRANSFER_S)
        channel = await self._channel(deadline)
        async with self._in_time(deadline, f"reading {path}"):
            return await channel.read_file(path)

    async def write_bytes(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Write a file in the guest, whole or not at all; OSError as in `open`."""
        deadline = self._deadline(None, TRANSFER_S)
        channel = await self._channel(deadline)
        async with self._in_time(deadline, f"writing {path}"):
            await channel.write_file(path, data, mode=mode)

    async def read_text(self, path: str, *, encoding: str = "utf-8") -> str:
        """The content of a text file in the guest."""
        return (await self.read_bytes(path)).decode(encoding)

    async def write_text(
        self, path: str, text: str, *, encoding: str = "utf-8", mode: int = 0o644
    ) -> None:
        """Write a text file in the guest, whole or not at all."""
        await self.write_bytes(path, text.encode(encoding), mode=mode)
