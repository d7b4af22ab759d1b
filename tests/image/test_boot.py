"""A built image boots in a real QEMU, and its modules load."""

from __future__ import annotations

import platform
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import platformdirs
import pytest

from pytest_vmsandbox.deadline import Deadline
from pytest_vmsandbox.errors import HostUnfit
from pytest_vmsandbox.guest.compiler import agent_binary
from pytest_vmsandbox.image.cache import ensure_image, list_images, remove_image
from pytest_vmsandbox.image.image import Image
from pytest_vmsandbox.image.progress import SilentProgress
from pytest_vmsandbox.image.recipe import host_architecture

QEMU = shutil.which("qemu-system-x86_64")
pytestmark = pytest.mark.skipif(
    QEMU is None or platform.machine() != "x86_64", reason="needs qemu-system-x86_64 on x86_64"
)

Q35 = "q35,usb=off,sata=off,smbus=off,vmport=off,smm=off,hpet=off"
MICROVM = "microvm,pit=on,pic=on,rtc=on"

WANTED = (
    *("virtio_console", "virtio_blk", "virtio_net", "virtio_rng", "virtio_balloon"),
    *("overlay", "ext4", "fuse", "virtiofs", "loop", "dm_mod", "nbd"),
    *("veth", "bridge", "tun", "nf_tables"),
)


class Guest:
    """A machine of this image alone, with a line to its first process."""

    def __init__(
        self, image: Image, directory: Path, *, machine: str = Q35, kernel: Path | None = None
    ) -> None:
        assert QEMU is not None
        assert image.modules is not None
        bus = "device" if machine.startswith("microvm") else "pci"
        self.log = directory / "console"
        self.log.touch()
        self._undo = ExitStack()
        ours, theirs = socket.socketpair()
        self._line = self._undo.enter_context(ours)
        with theirs:
            self._process = subprocess.Popen(
                [
                    *(QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
                    *("-machine", machine, "-accel", "tcg", "-cpu", "max", "-m", "256"),
                    *("-kernel", kernel or image.kernel, "-initrd", image.initramfs),
                    *("-append", " ".join(image.command_line)),
                    *("-chardev", f"file,id=console,path={self.log}", "-serial", "chardev:console"),
                    *("-chardev", f"socket,id=agent,fd={theirs.fileno()}"),
                    *("-device", f"virtio-serial-{bus}"),
                    *("-device", "virtserialport,chardev=agent,name=vmsandbox.agent"),
                    *("-drive", f"if=none,id=m,format=raw,readonly=on,file={image.modules}"),
                    *("-device", f"virtio-blk-{bus},drive=m,serial=vmsandbox-mods"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
                pass_fds=[theirs.fileno()],
            )
        self._undo.callback(self._end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def wait_for(self, pattern: bytes) -> str:
        """What came over the line until `pattern`, which must come."""
        seen, deadline = b"", Deadline.after(seconds=90)
        while not re.search(pattern, seen):
            self._line.settimeout(deadline.left_s or 0.001)
            try:
                more = self._line.recv(4096)
            except TimeoutError:
                more = b""
            if not more:
                tail = self.log.read_text(errors="replace")[-3000:]
                pytest.fail(f"no {pattern!r}; last seen {seen[-500:]!r}\n{tail}")
            seen += more
        return seen.decode()

    def wait_on_console(self, text: str) -> None:
        """Return once the console shows `text`, which it must."""
        deadline = Deadline.after(seconds=90)
        while text not in (seen := self.log.read_text(errors="replace")):
            if deadline.passed or self._process.poll() is not None:
                pytest.fail(f"no {text!r} on the console\n{seen[-3000:]}")
            time.sleep(0.01)

    def run(self, command: str) -> tuple[int, str]:
        """Exit status and output of a shell command."""
        self._line.sendall(command.encode())
        said = self.wait_for(rb"\nEXIT [0-9]+\n")
        output, _, status = said.rpartition("\nEXIT ")
        return int(status), output

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=20)


@pytest.fixture(scope="module")
def guest(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    with Guest(image, tmp_path_factory.mktemp("guest")) as guest:
        assert guest.wait_for(rb"HELLO .*\n") == f"HELLO {image.kernel_release}\n"
        yield guest


def test_the_kernel_that_is_booted_is_uncompressed(image: Image, guest: Guest) -> None:
    assert image.kernel.name == "vmlinux"
    assert guest.run("uname -r") == (0, f"{image.kernel_release}\n")


def test_microvm_enters_the_uncompressed_kernel(image: Image, tmp_path: Path) -> None:
    # No further: under TCG on a busy host its timer calibration may fail, and it then hangs.
    with Guest(image, tmp_path, machine=MICROVM) as guest:
        guest.wait_on_console(f"Linux version {image.kernel_release}")


def test_the_kernel_as_it_was_shipped_boots_too(image: Image, tmp_path: Path) -> None:
    with Guest(image, tmp_path, kernel=image.compressed_kernel) as guest:
        assert guest.wait_for(rb"HELLO .*\n") == f"HELLO {image.kernel_release}\n"


def test_our_own_agent_mounts_the_modules_disk(cache: Path, tmp_path: Path) -> None:
    program = agent_binary(architecture=host_architecture(), cache_dir=tmp_path)
    image = ensure_image("mini", cache_dir=cache, agent=program, progress=SilentProgress())

    with Guest(image, tmp_path) as guest:
        guest.wait_on_console("EXT4-fs (vda): mounted filesystem")


@pytest.mark.parametrize("module", WANTED)
def test_a_test_machine_can_load(module: str, guest: Guest) -> None:
    assert guest.run(f"modprobe {module}") == (0, "")


def test_mini_full_has_what_the_cloud_kernel_lacks(agent: Path, tmp_path: Path) -> None:
    # Its packages are large, so its cache stays from one run to the next.
    cache = platformdirs.user_cache_path("pytest-vmsandbox") / "tests"
    try:
        image = ensure_image("mini-full", cache_dir=cache, agent=agent, progress=SilentProgress())
    except HostUnfit as reason:
        pytest.skip(str(reason))

    for other in list_images(cache):
        if other.digest != image.digest:
            remove_image(other, cache_dir=cache)

    with Guest(image, tmp_path) as guest:
        guest.wait_for(rb"HELLO .*\n")
        assert guest.run("modprobe 9p && modprobe 9pnet_virtio && modprobe virtiofs") == (0, "")


def test_the_kernel_finds_modules_for_itself(guest: Guest) -> None:
    # By request_module(): an alias, resolved by busybox's modprobe.
    status, output = guest.run(
        "grep -q xfs /proc/filesystems; echo $?; mount -t xfs none /mnt; grep xfs /proc/filesystems"
    )

    assert status == 0, output
    assert output.startswith("1\n")


def test_the_modules_disk_is_mounted_and_read_only(guest: Guest) -> None:
    status, output = guest.run("grep /lib/modules /proc/mounts; touch /lib/modules/x")

    assert status != 0
    assert re.search(r"/dev/vd\w /lib/modules ext4 ro,", output)
    assert "Read-only file system" in output


def test_all_in_the_root_file_system_is_as_root_expects_it(guest: Guest) -> None:
    status, output = guest.run(
        "stat -c '%U:%G %a %n' / /root /tmp /bin/busybox /etc/passwd /init && "
        "readlink /bin/ls && wc -c </etc/machine-id && id nobody && ls /etc/resolv.conf"
    )

    assert status != 0
    assert output.splitlines()[:-1] == [
        "root:root 755 /",
        "root:root 700 /root",
        "root:root 1777 /tmp",
        "root:root 755 /bin/busybox",
        "root:root 644 /etc/passwd",
        "root:root 755 /init",
        "/bin/busybox",
        "0",
        "uid=65534(nobody) gid=65534(nogroup) groups=65534(nogroup)",
    ]


def test_the_kernel_and_init_had_nothing_to_complain_of(guest: Guest) -> None:
    guest.run("true")
    console = guest.log.read_text(errors="replace")

    for complaint in ("initial console", "did not load", "junk", "Unable to open", "Call Trace"):
        assert complaint not in console
