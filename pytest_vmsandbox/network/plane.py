"""The data plane of one network: what carries its frames, as the switch sees it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Protocol

from pytest_vmsandbox.linux.owned_fd import OwnedFd
from pytest_vmsandbox.network.impairment import Impairment
from pytest_vmsandbox.network.pcap import PcapWriter

# The host's end is a port like the others; no machine can be called so.
HOST_PORT = "(host)"


class Part(StrEnum):
    """What carries frames, and can be removed by somebody else."""

    BRIDGE = "bridge"
    TAP = "tap"


class Broken(Exception):
    """What carried frames is gone, and not by us: which part, and a sentence about it."""

    def __init__(self, part: Part, sentence: str) -> None:
        super().__init__(part, sentence)
        self.part, self.sentence = part, sentence


class Plane(Protocol):
    """One network; machines on it are known by name."""

    def plug(self, port: str, *, machine: int | None) -> OwnedFd:
        """A new machine's end of a wire, for the caller to hand over and close.

        `machine` is its number, where the hub is to know it. ValueError where one of that name is
        there.
        """

    def unplug(self, port: str) -> bool:
        """Carry its frames no more; whether the host has an end here.

        KeyError where there is none of that name.
        """

    def cut(self, pairs: Iterable[frozenset[str]]) -> None:
        """Let nothing pass between these pairs, and everything between all others."""

    def impair(self, impairment: Impairment) -> None:
        """Treat every frame so from now on."""

    def capture(self, number: int, writer: PcapWriter) -> None:
        """Write every frame that is sent, until `end_capture`."""

    def end_capture(self, number: int) -> None:
        """Write no more; what was written is in the file, also if the network is gone."""

    def counts(self) -> Mapping[str, int]:
        """What became of frames: carried, cut, lost, overflowed."""

    def require_host_end(self) -> None:
        """Have an end for the host's own connections; OSError where there can be none."""

    def require_whole(self) -> None:
        """Raise Broken where what carries it is gone."""

    def close(self) -> None:
        """Let go of everybody, and leave nothing."""
