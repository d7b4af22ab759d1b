"""QEMU: the machine's configuration, rendered to a command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from pytest_vmsandbox.errors import RequestInvalid
from pytest_vmsandbox.vmm.disk import DiskStack, render_disk
from pytest_vmsandbox.vmm.launch import Handed, VmmView, Wire

# QEMU's default translation cache is up to 1 GiB for each machine; a kernel and a shell fit
# in this, and a machine that outgrows it only translates again.
TCG_CACHE_MIB = 128

# What QEMU takes beside the guest's memory and the translation cache: some 60 MiB for its code and
# heap, and room for what it has in flight.
OVERHEAD_MIB = 256

# What QEMU listens on, in the order in which it makes them.
SOCKETS = ("console", "agent", "qmp")

RAM = "ram"
AGENT_PORT = "vmsandbox.agent"
MODULES_SERIAL = "vmsandbox-mods"


class MachineType(StrEnum):
    """QEMU's machine types that we use (qemu-system-x86_64 -machine help)."""

    Q35 = "q35"
    MICROVM = "microvm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A network card: its Ethernet address, and the wire that it is plugged into, once it is on.

    `wire` is a path, /proc/self/fd/N, once it is seen through a view. A `tap` takes on work for
    the guest, which knows of it for as long as it runs: a card stays what it is.
    """

    mac: str
    wire: Wire | Path | None = None
    tap: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuConfig:
    """All that decides how QEMU is started; paths are ours until `seen_through` a view.

    `memory` is where the guest's RAM lies, if not in QEMU's own: shared with us while it is
    `freezable`, else mapped privately, each page copied when it is written. One that is `restored`
    waits for the state of its devices, and then runs.
    """

    program: str
    name: str
    directory: Path
    kernel: Path
    initramfs: Path
    command_line: Sequence[str]
    machine_type: MachineType
    accel: str
    memory_mib: int
    cpus: int
    disks: Sequence[DiskStack] = ()
    read_only_disks: Mapping[str, Path] = field(default_factory=dict)
    cards: Sequence[Card] = ()
    seccomp: bool = True
    memory: Handed | None = None
    freezable: bool = False
    restored: bool = False

    @property
    def files(self) -> tuple[Handed, ...]:
        """What QEMU is handed of the host."""
        memory = () if self.memory is None else (self.memory,)
        disks = (file for disk in self.disks for file in disk.files)
        wires = [card.wire for card in self.cards if card.wire is not None]
        read_only = self.read_only_disks.values()
        return (self.kernel, self.initramfs, *disks, *read_only, *memory, *wires)

    @property
    def written_bytes(self) -> int:
        """How long a file QEMU must be able to write: the longest of its disks."""
        return max((disk.written_bytes for disk in self.disks), default=0)

    @property
    def vmm_memory_mib(self) -> int:
        """What the guest and QEMU itself may take together."""
        return self.memory_mib + TCG_CACHE_MIB + OVERHEAD_MIB

    def seen_through(self, view: VmmView) -> QemuConfig:
        """The same with every path as QEMU will see it."""
        disks = {serial: view.files[path] for serial, path in self.read_only_disks.items()}
        return replace(
            self,
            directory=view.directory,
            kernel=view.files[self.kernel],
            initramfs=view.files[self.initramfs],
            disks=tuple(disk.seen_through(view.files) for disk in self.disks),
            read_only_disks=disks,
            memory=None if self.memory is None else view.files[self.memory],
            cards=[
                replace(card, wire=None if card.wire is None else view.files[card.wire])
                for card in self.cards
            ],
        )


def card_id(number: int) -> str:
    """What QEMU calls the card of that number, counted from 0; QMP knows it by that."""
    return f"card{number}"


def socket_name(purpose: str) -> str:
    """What the socket for `purpose`, one of `SOCKETS`, is called in QEMU's directory."""
    return f"{purpose}.sock"


def render_command(config: QemuConfig) -> list[str]:
    """The argv that starts QEMU, paused before the guest's first instruction."""
    return [
        config.program,
        *_render_base(config),
        *_render_control(config),
        *_render_boot(config),
        *_render_devices(config),
    ]


def _render_base(config: QemuConfig) -> Iterator[str]:
    yield from ("-name", f"{_escape(config.name)},debug-threads=on")
    yield from ("-nodefaults", "-no-user-config", "-display", "none")
    yield from ("-incoming", "defer") if config.restored else ("-S",)
    yield from ("-action", "panic=pause")
    yield from ("-machine", _machine(config))
    yield from ("-accel", _accel(config))
    yield from ("-cpu", _cpu(config))
    yield from ("-m", f"{config.memory_mib}M", "-smp", str(config.cpus))
    yield from ("-object", _memory(config))
    if config.seccomp:
        yield from (
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        )


def _render_control(config: QemuConfig) -> Iterator[str]:
    for purpose in SOCKETS:
        path = _escape(str(config.directory / socket_name(purpose)))
        # The monitor's own thread sets it up: a client that comes in that moment would be greeted
        # twice, and take the second greeting for the answer to its first command. So QEMU waits
        # for us there, and the others, which it makes first, are there by then.
        wait = "on" if purpose == "qmp" else "off"
        yield from ("-chardev", f"socket,id={purpose},path={path},server=on,wait={wait}")
    yield from ("-mon", "chardev=qmp,mode=control")
    yield from ("-serial", "chardev:console")


def _render_boot(config: QemuConfig) -> Iterator[str]:
    yield from ("-kernel", str(config.kernel), "-initrd", str(config.initramfs))
    yield from ("-append", " ".join(config.command_line))


def _render_devices(config: QemuConfig) -> Iterator[str]:
    bus = "device" if config.machine_type is MachineType.MICROVM else "pci"
    yield from ("-device", f"virtio-serial-{bus},max_ports=4")
    yield from ("-device", f"virtserialport,chardev=agent,name={AGENT_PORT}")
    yield from ("-device", f"virtio-rng-{bus}")
    for disk in config.disks:  # before any disk of ours: the user's first one is /dev/vda
        yield from render_disk(disk, bus=bus)
    for serial, path in config.read_only_disks.items():
        yield from (
            "-drive",
            f"if=none,id={serial},file={_escape(str(path))},format=raw,readonly=on,file.locking=off",
        )
        yield from ("-device", f"virtio-blk-{bus},drive={serial},serial={serial}")
    for number, card in enumerate(config.cards):
        yield from _render_card(card_id(number), card, bus=bus)
    if config.machine_type is MachineType.Q35:
        yield from ("-device", "pvpanic-pci")
        # For screenshots; the kernel's text console needs no driver for it, and it costs no
        # measurable time. Little memory: a frozen machine will have to carry it.
        yield from ("-device", "VGA,vgamem_mb=2")


def _render_card(name: str, card: Card, *, bus: str) -> Iterator[str]:
    # Nothing is booted over it, and the option ROM for that is not there on every host.
    rom = ",romfile=" if bus == "pci" else ""
    if card.wire is None:
        raise RequestInvalid(f"{name} is not plugged in")
    kind = "tap" if card.tap else "socket"
    yield from ("-netdev", f"{kind},id=wire-{name},fd={Path(str(card.wire)).name}")
    # A guest that is restored would say where it is by the addresses of the one that was frozen.
    card_is = f"netdev=wire-{name},mac={card.mac},guest_announce=off{rom}"
    yield from ("-device", f"virtio-net-{bus},id={name},{card_is}")


def _cpu(config: QemuConfig) -> str:
    if config.accel == "kvm":  # needs kvm
        return "host"
    # TCG runs `rep movsb` byte by byte. A kernel that is told of "enhanced" and "fast short" rep
    # movsb copies everything with it; without them it copies words, some four times as fast. Page
    # tables of five levels (la57) only give it more code to translate.
    return "max,erms=off,fsrm=off,la57=off"


def _machine(config: QemuConfig) -> str:
    memory = f"memory-backend={RAM}"
    if config.machine_type is MachineType.Q35:
        return f"q35,usb=off,smbus=off,sata=off,smm=off,vmport=off,hpet=off,graphics=off,{memory}"
    clocks = "" if config.accel == "kvm" else ",pit=on,pic=on"
    return f"microvm,rtc=on,auto-kernel-cmdline=on{clocks},{memory}"


def _memory(config: QemuConfig) -> str:
    """Where the guest's RAM lies; it has the same name wherever that is, so that it can move."""
    common = f"id={RAM},size={config.memory_mib}M"
    if config.memory is None:
        return f"memory-backend-ram,{common}"
    share = "on" if config.freezable else "off"
    return f"memory-backend-file,{common},mem-path={_escape(str(config.memory))},share={share}"


def _accel(config: QemuConfig) -> str:
    if config.accel == "tcg":
        return f"tcg,thread=multi,tb-size={TCG_CACHE_MIB}"
    return config.accel


def _escape(value: str) -> str:
    """A value inside a QEMU option string, where a comma ends it unless doubled."""
    if not value.isprintable():
        raise RequestInvalid(f"control characters can't be handed to QEMU: {value!r}")
    return value.replace(",", ",,")
