"""The guarded hub: a network with a way out, whose machines see the gateway and not each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pytest_vmsandbox.network.border import Border, Speaker
from pytest_vmsandbox.network.hub import Hub, Wire
from pytest_vmsandbox.network.port import Port

# The gateway is a port like the others; no machine can be called so.
GATEWAY_PORT = "(gateway)"


class GuardedHub(Hub):
    """A hub that knows which of its ports are machines, and has a border to their gateway.

    A machine says nothing in another's name. The gateway hears what the border lets out; whoever
    is neither a machine nor the gateway, which is the host's end, hears the machines alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.border = Border(())
        self._speakers: dict[str, Speaker] = {}

    @property
    def disturbed(self) -> bool:
        """Part of Hub: what may pass is for the hub alone to say."""
        return True

    def plug_machine(self, port: Port, machine: int | None) -> None:
        """Plug in the card of the machine with that number; ValueError where it has none."""
        if machine is None:
            raise ValueError(f"{port.name} has no number to be known by")
        self.plug(port)
        self._speakers[port.name] = Speaker.of(machine)

    def unplug(self, name: str) -> None:
        """Part of Hub."""
        super().unplug(name)
        self._speakers.pop(name, None)

    def carry(self, source: Port, frames: Sequence[bytes]) -> None:
        """Bring each frame that may be said to whom it is for."""
        speaker = self._speakers.get(source.name)
        if speaker is not None:
            frames = [frame for frame in frames if self._may_be_said(speaker, frame)]
        super().carry(source, frames)

    def _may_be_said(self, speaker: Speaker, frame: bytes) -> bool:
        if speaker.says(frame):
            return True
        self._capture(frame)  # it was sent all the same
        self.counts.cut += 1
        return False

    def _targets(self, source: str, address: bytes) -> Iterator[Wire]:
        """Between a machine and whoever is none."""
        from_machine = source in self._speakers
        for wire in super()._targets(source, address):
            if from_machine != (wire.port.name in self._speakers):
                yield wire

    def _send(self, source: str, target: Wire, frame: bytes) -> bool:
        if self._passes(source, target.port.name, frame):
            return super()._send(source, target, frame)
        self.counts.cut += 1
        return False

    def _passes(self, source: str, target: str, frame: bytes) -> bool:
        if source == GATEWAY_PORT:
            return self.border.lets_in(frame)
        return target != GATEWAY_PORT or self.border.lets_out(self._speakers[source], frame)
